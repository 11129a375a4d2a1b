//! The file that code arenas are mapped from reads as meant, by somebody else's readers.
#![allow(clippy::unwrap_used, reason = "a test")]

use flea_image::frames_file::{FILE_BYTES, HEAD_BYTES, head};
use gimli::{BaseAddresses, CfaRule, EhFrame, EhFrameHdr, LittleEndian, Register, RegisterRule};
use gimli::{UnwindContext, UnwindSection as _};
use object::{Object as _, ObjectSection as _, ObjectSegment as _, ObjectSymbol as _};

#[test]
fn all_of_it_is_one_executable_segment() {
    let bytes = head();
    assert_eq!(bytes.len() as u64, HEAD_BYTES);
    let file = object::File::parse(&bytes[..]).unwrap();
    assert_eq!(file.kind(), object::ObjectKind::Dynamic);
    let segments: Vec<_> = file.segments().map(|s| (s.address(), s.size())).collect();
    assert_eq!(segments, [(0, FILE_BYTES)]);
    let text = file.section_by_name(".text").unwrap();
    assert_eq!((text.address(), text.size()), (HEAD_BYTES, FILE_BYTES - HEAD_BYTES));
    let symbols: Vec<_> = file.symbols().map(|s| (s.name().unwrap(), s.address())).collect();
    assert_eq!(symbols, [("flea", HEAD_BYTES)]);
}

#[test]
fn its_row_is_that_of_exit_skeletons() {
    let bytes = head();
    let file = object::File::parse(&bytes[..]).unwrap();
    let section = |name| file.section_by_name(name).unwrap();
    let (header, frame) = (section(".eh_frame_hdr"), section(".eh_frame"));
    let bases = BaseAddresses::default()
        .set_eh_frame_hdr(header.address())
        .set_eh_frame(frame.address())
        .set_text(HEAD_BYTES);
    let parsed = EhFrameHdr::new(header.data().unwrap(), LittleEndian).parse(&bases, 8).unwrap();
    assert_eq!(parsed.eh_frame_ptr(), gimli::Pointer::Direct(frame.address()));
    let rows = EhFrame::new(frame.data().unwrap(), LittleEndian);
    let mut context = UnwindContext::new();
    for address in [HEAD_BYTES, 0x12_3456, FILE_BYTES - 1] {
        let row = parsed
            .table()
            .unwrap()
            .unwind_info_for_address(&rows, &bases, &mut context, address, |rows, bases, at| {
                rows.cie_from_offset(bases, at)
            })
            .unwrap();
        assert_eq!(row.cfa(), &CfaRule::RegisterAndOffset { register: Register(6), offset: 16 });
        assert_eq!(row.register(Register(16)), Some(RegisterRule::Offset(-8)));
        assert_eq!(row.register(Register(6)), Some(RegisterRule::Offset(-16)));
        assert_eq!((row.start_address(), row.end_address()), (HEAD_BYTES, FILE_BYTES));
    }
}
