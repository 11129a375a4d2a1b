//! Skeletons that cannot be, and the instructions that move.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use expect_test::expect;
use flea_image::unwind::{FDE_OFFSET, HEADER_OFFSET, frame_arena_rows};
use flea_image::{
    BODY_FRAMES_OFFSET, BodyRef, Changes, FrameArena, LinkError, Question, Reads, RelocateError,
    Save, Saved, SiteKind, Skeleton, SkeletonBody, SkeletonRequest, StackCopy, When, call_patch,
    link_skeleton, link_unwinder_skeleton,
};
use flea_symbols::addr::RemoteAddr;

const SITE: RemoteAddr = RemoteAddr(0x40_1000);
const NEAR: RemoteAddr = RemoteAddr(0x60_0000);

fn request<'a>(replaced: &'a [u8], bodies: &'a [SkeletonBody<'a>]) -> SkeletonRequest<'a> {
    SkeletonRequest {
        site: SITE,
        replaced,
        kind: SiteKind::Relocated,
        image_address: NEAR,
        bodies,
        skip: None,
        stack_copy: StackCopy::Exactly(0),
        stack_align_bytes: 16,
        replacement: None,
    }
}

fn link(replaced: &[u8]) -> Result<Skeleton, LinkError> {
    link_skeleton(&request(replaced, &[]))
}

#[test]
fn branches_and_rip_relative_operands_move() {
    // 1: test edi, edi; je +0x20 (outside); dec edi; jne 1b
    let skeleton = link(&[0x85, 0xff, 0x74, 0x20, 0xff, 0xcf, 0x75, 0xf8]).unwrap();
    expect![[r#"
        0000  test %edi,%edi
        0002  je 0x0000000000401024
        0008  dec %edi
        000a  jne +0x0
        000c  jmp 0x0000000000401008
    "#]]
    .assert_eq(&skeleton.listing());
    // cmp qword [rip + 0x10], 0
    let skeleton = link(&[0x48, 0x83, 0x3d, 0x10, 0, 0, 0, 0]).unwrap();
    expect![[r#"
        0000  cmpq $0,0x401018
        0008  jmp 0x0000000000401008
    "#]]
    .assert_eq(&skeleton.listing());
}

/// Calls go to the replacement; a thread inside the replaced instructions goes on in copies.
#[test]
fn a_replacement_stands_in_front_of_the_original() {
    // push rbp; mov rbp, rsp; push rbx
    let replaced = [0x55, 0x48, 0x89, 0xe5, 0x53];
    let link = |to| {
        let replacement = Some(RemoteAddr(to));
        link_skeleton(&SkeletonRequest { replacement, ..request(&replaced, &[]) }).unwrap()
    };
    let near = link(0x70_0000);
    expect![[r#"
        0000  jmp 0x0000000000700000
        0005  push %rbp
        0006  mov %rsp,%rbp
        0009  push %rbx
        000a  jmp 0x0000000000401005
    "#]]
    .assert_eq(&near.listing());
    assert_eq!(near.original_entry, NEAR);
    let moves = [(0, 5), (1, 6), (4, 9)].map(|(a, b)| (SITE.offset(a), NEAR.offset(b)));
    assert_eq!(near.moves, moves);
    // What one object replaces may be in two modules that are far apart.
    expect![[r#"
        0000  movabs $0x7F0012345678,%r11
        000a  jmp *%r11
        000d  push %rbp
        000e  mov %rsp,%rbp
        0011  push %rbx
        0012  jmp 0x0000000000401005
    "#]]
    .assert_eq(&link(0x7f00_1234_5678).listing());
}

#[test]
fn what_cannot_be_linked_says_why() {
    let nop = [0x0f, 0x1f, 0x44, 0, 0];
    assert_eq!(link(&nop[..4]), Err(LinkError::SiteTooSmall { site: SITE, n_bytes: 4 }));

    // jmp into the second byte of itself
    let source = RelocateError::IntoMiddle { offset: 0 };
    assert_eq!(link(&[0xeb, 0xff, 0x90, 0x90, 0x90]), Err(LinkError::Site { site: SITE, source }));

    // half an instruction
    let source = RelocateError::Invalid { offset: 4 };
    assert_eq!(link(&[0x90, 0x90, 0x90, 0x90, 0x48]), Err(LinkError::Site { site: SITE, source }));

    let not_nops = SkeletonRequest { kind: SiteKind::Nops, ..request(&[0x55; 5], &[]) };
    assert!(matches!(link_skeleton(&not_nops), Err(LinkError::NotNops { .. })));

    // XRay's sled jumps over its nop; a jump elsewhere does something.
    let mut sled = [0xeb, 9, 0x66, 0x0f, 0x1f, 0x84, 0, 0, 2, 0, 0];
    link_skeleton(&SkeletonRequest { kind: SiteKind::Nops, ..request(&sled, &[]) }).unwrap();
    sled[1] = 10;
    let other = SkeletonRequest { kind: SiteKind::Nops, ..request(&sled, &[]) };
    assert!(matches!(link_skeleton(&other), Err(LinkError::NotNops { .. })));

    let far =
        SkeletonRequest { image_address: RemoteAddr(SITE.0 + (1 << 31)), ..request(&nop, &[]) };
    assert!(matches!(link_skeleton(&far), Err(LinkError::OutOfReach { .. })));

    // lea rax, [rip - 0x7fff0000]: reaches from the site, not from an image above it
    let lea = [0x48, 0x8d, 0x05, 0, 0, 0x01, 0x80];
    let far =
        SkeletonRequest { image_address: RemoteAddr(SITE.0 + 0x1000_0000), ..request(&lea, &[]) };
    assert!(matches!(link_skeleton(&far), Err(LinkError::Encode { .. })));

    let many = SkeletonRequest { stack_copy: StackCopy::Exactly(100_000), ..request(&nop, &[]) };
    assert!(matches!(link_skeleton(&many), Err(LinkError::TooManyStackWords { .. })));

    let odd = SkeletonRequest { stack_align_bytes: 48, ..request(&nop, &[]) };
    assert_eq!(link_skeleton(&odd), Err(LinkError::StackAlignment { align_bytes: 48 }));

    assert_eq!(call_patch(SITE, RemoteAddr(SITE.0 + (1 << 32))), None);
    assert_eq!(call_patch(SITE, RemoteAddr(SITE.0 + 5)), Some([0xe8, 0, 0, 0, 0]));
}

#[test]
fn words_that_may_not_be_there_are_read_with_care() {
    let nop = [0x0f, 0x1f, 0x44, 0, 0];
    let reads = Reads::default();
    let bodies = [SkeletonBody {
        entry: None,
        session: None,
        modify: None,
        exit: Some(BodyRef::Call(NEAR)),
        reads: &reads,
        saves: &[],
        changes: Changes::NONE,
        frame_words: 0,
        frame_offset: 0,
    }];
    let probe_read_user = RemoteAddr(0x7000_0000_0000);
    let skeleton = link_skeleton(&SkeletonRequest {
        kind: SiteKind::Nops,
        stack_copy: StackCopy::UpTo { n_words: 2, probe_read_user },
        stack_align_bytes: 64,
        ..request(&nop, &bodies)
    });
    expect![[r#"
        0000  push %rbp
        0001  mov %rsp,%rbp
        0004  lea -0xA0(%rsp),%rsp
        000c  mov %rax,-8(%rbp)
        0010  lea 8(%rbp),%rax
        0014  and $0xFFF,%eax
        0019  cmp $0xFE8,%eax
        001e  mov -8(%rbp),%rax
        0022  ja +0x42
        0024  pushq 0x18(%rbp)
        0027  pushq 0x10(%rbp)
        002a  call 0x000000000060009E
        002f  mov %rbp,-8(%rsp)
        0034  call 0x0000000000600000
        0039  leave
        003a  ret
        003b  mov %rbp,-8(%rsp)
        0040  leave
        0041  ret
        0042  mov %rdi,-0x28(%rbp)
        0046  mov %rsi,-0x30(%rbp)
        004a  mov %rdx,-0x38(%rbp)
        004e  mov %rcx,-0x40(%rbp)
        0052  lea -0x10(%rsp),%rsp
        0057  lea 0x10(%rbp),%rsi
        005b  mov %rsp,%rdi
        005e  mov %esi,%ecx
        0060  neg %ecx
        0062  and $0xFFF,%ecx
        0068  mov $0x10,%edx
        006d  sub %ecx,%edx
        006f  rep movsb (%rsi),(%rdi)
        0071  xchg %rdx,%rsi
        0074  movabs $0x700000000000,%rax
        007e  call *%rax
        0080  mov -0x28(%rbp),%rdi
        0084  mov -0x30(%rbp),%rsi
        0088  mov -0x38(%rbp),%rdx
        008c  mov -0x40(%rbp),%rcx
        0090  mov -8(%rbp),%rax
        0094  jmp +0x2a
        0096  nopl 0x61656C66(%rax,%rax)
        009e  jmp 0x0000000000401005
    "#]]
    .assert_eq(&skeleton.unwrap().listing());
}

#[test]
fn frame_words_of_bodies_do_not_overlap() {
    let reads = Reads::default();
    let body = |frame_offset, frame_words| SkeletonBody {
        entry: None,
        session: Some(BodyRef::Call(NEAR)),
        modify: None,
        exit: None,
        reads: &reads,
        saves: &[],
        changes: Changes::NONE,
        frame_words,
        frame_offset,
    };
    let nop = [0x0f, 0x1f, 0x44, 0, 0];
    let with = |bodies: &[SkeletonBody<'_>]| link_skeleton(&request(&nop, bodies));
    let first = BODY_FRAMES_OFFSET;
    with(&[body(first, 2), body(first + 16, 1)]).unwrap();
    with(&[body(first + 40, 2), body(first, 5)]).unwrap();
    let found = first + 8;
    let overlap = LinkError::FrameOffset { free_from: first + 16, found };
    assert_eq!(with(&[body(first, 2), body(found, 1)]), Err(overlap));
    let outside = LinkError::FrameOffset { free_from: first, found: first - 8 };
    assert_eq!(with(&[body(first - 8, 1)]), Err(outside));
}

#[test]
fn the_unwind_row_reads_as_meant() {
    use gimli::{
        BaseAddresses, CfaRule, EhFrame, LittleEndian, Register, RegisterRule, UnwindSection,
    };
    let at = RemoteAddr(0x7000_8000);
    let bytes = frame_arena_rows(at, RemoteAddr(0x7000_0000), 0x1_0000);
    let section = EhFrame::new(&bytes, LittleEndian);
    let bases = BaseAddresses::default();
    let mut context = gimli::UnwindContext::new();
    let row = section
        .unwind_info_for_address(&bases, &mut context, 0x7000_1234, |section, bases, offset| {
            section.cie_from_offset(bases, offset)
        })
        .unwrap();
    assert_eq!(row.cfa(), &CfaRule::RegisterAndOffset { register: Register(6), offset: 16 });
    assert_eq!(row.register(Register(16)), Some(RegisterRule::Offset(-8)));
    assert_eq!(row.register(Register(6)), Some(RegisterRule::Offset(-16)));
    assert_eq!((row.start_address(), row.end_address()), (0x7000_0000, 0x7001_0000));
    // The FDE is where it is said to be: its second word leads back to the CIE at 0.
    let back = u32::from_le_bytes(bytes[FDE_OFFSET + 4..FDE_OFFSET + 8].try_into().unwrap());
    assert_eq!(back as usize, FDE_OFFSET + 4);
    // The personality is where the CIE says, behind the terminating word.
    let fde = section.fde_for_address(&bases, 0x7000_1234, |section, bases, offset| {
        section.cie_from_offset(bases, offset)
    });
    let Some(gimli::Pointer::Direct(personality)) = fde.unwrap().cie().personality() else {
        panic!("no personality");
    };
    let code = &bytes[usize::try_from(personality - at.0).unwrap()..];
    assert_eq!(bytes[HEADER_OFFSET - 4..][..4], [0; 4]);
    expect![[r#"
        0000  endbr64
        0004  mov $8,%eax
        0009  mov 0x98(%r8),%r9
        0010  movabs $0x70000000,%r11
        001a  cmp %r11,%r9
        001d  jb +0x50
        001f  movabs $0x70010000,%r11
        0029  cmp %r11,%r9
        002c  jae +0x50
        002e  andq $0,0x98(%r8)
        0036  test $2,%esi
        003c  je +0x50
        003e  mov 0x90(%r8),%r10
        0045  cmp %r9,-8(%r10)
        0049  jne +0x50
        004b  andq $0,-8(%r10)
        0050  ret
    "#]]
    .assert_eq(&flea_image::listing(code, RemoteAddr(personality)));
}

/// What libgcc reads if it is the loader that answers.
#[test]
fn the_header_leads_to_the_row() {
    use gimli::{BaseAddresses, EhFrame, EhFrameHdr, LittleEndian, UnwindSection};
    for (at, start) in [(0x7000_8000, 0x7000_0000), (0x7000_0000, 0x7000_8000u64)] {
        let bytes = frame_arena_rows(RemoteAddr(at), RemoteAddr(start), 0x1_0000);
        let header_at = at + HEADER_OFFSET as u64;
        let bases = BaseAddresses::default().set_eh_frame_hdr(header_at).set_eh_frame(at);
        let header = EhFrameHdr::new(&bytes[HEADER_OFFSET..], LittleEndian);
        let header = header.parse(&bases, 8).unwrap();
        assert_eq!(header.eh_frame_ptr(), gimli::Pointer::Direct(at));
        let table = header.table().unwrap();
        let section = EhFrame::new(&bytes, LittleEndian);
        let fde = table.fde_for_address(&section, &bases, start + 0x1234, |section, bases, at| {
            section.cie_from_offset(bases, at)
        });
        let fde = fde.unwrap();
        assert_eq!((fde.initial_address(), fde.offset()), (start, FDE_OFFSET));
    }
}

/// Its first instructions are those for a row: see the next test.
#[test]
fn a_loader_answers_with_the_header() {
    // push r15; push r14; push r13
    let replaced = [0x41, 0x57, 0x41, 0x56, 0x41, 0x55];
    let arena = FrameArena {
        start: RemoteAddr(0x7000_0000_0000),
        end: RemoteAddr(0x7000_0020_0000),
        rows: RemoteAddr(0x7000_0000_1000),
    };
    let link = |question| {
        let request = request(&replaced, &[]);
        link_unwinder_skeleton(&request, question, &[arena]).unwrap().listing()
    };
    let (row, object) = (link(Question::Row), link(Question::Object));
    let answer = |listing: &str| listing.find("0051  ").unwrap();
    let asks = |listing: &str| listing[..answer(listing)].lines().count();
    assert_eq!(asks(&row), asks(&object));
    expect![[r#"
        0051  xor %eax,%eax
        0053  mov %rax,(%rsi)
        0056  movabs $0x700000000000,%r11
        0060  mov %r11,8(%rsi)
        0064  movabs $0x700000200000,%r11
        006e  mov %r11,0x10(%rsi)
        0072  mov %rax,0x18(%rsi)
        0076  movabs $0x70000000104C,%r11
        0080  mov %r11,0x20(%rsi)
        0084  ret
        0085  push %r15
        0087  push %r14
        0089  push %r13
        008b  jmp 0x0000000000401006
    "#]]
    .assert_eq(&object[answer(&object)..]);
}

#[test]
fn an_unwinder_is_asked_about_foreign_frames_only() {
    // push r15; push r14; push r13
    let replaced = [0x41, 0x57, 0x41, 0x56, 0x41, 0x55];
    let arena = FrameArena {
        start: RemoteAddr(0x7000_0000_0000),
        end: RemoteAddr(0x7000_0020_0000),
        rows: RemoteAddr(0x7000_0000_1000),
    };
    let second = FrameArena { start: RemoteAddr(0x1000), ..arena };
    let link = |arenas: &[FrameArena]| {
        link_unwinder_skeleton(&request(&replaced, &[]), Question::Row, arenas).unwrap()
    };
    assert_eq!(link(&[]), link_skeleton(&request(&replaced, &[])).unwrap());
    assert!(link(&[arena, second]).bytes.len() > link(&[arena]).bytes.len());
    expect![[r#"
        0000  movabs $0x700000000008,%r11
        000a  cmp %r11,%rdi
        000d  jb +0x73
        000f  movabs $0x700000200000,%r11
        0019  cmp %r11,%rdi
        001c  jae +0x73
        001e  cmpb $0xE8,-4(%rdi)
        0022  jne +0x73
        0024  movslq -3(%rdi),%rax
        0028  lea 1(%rdi,%rax),%rax
        002d  cmp %r11,%rax
        0030  jae +0x73
        0032  movabs $0x700000000008,%r11
        003c  cmp %r11,%rax
        003f  jb +0x73
        0041  movabs $0x61656C6600841F0F,%r11
        004b  cmp %r11,-8(%rax)
        004f  jne +0x73
        0051  movabs $0x700000000000,%rax
        005b  mov %rax,0x10(%rsi)
        005f  xor %eax,%eax
        0061  mov %rax,(%rsi)
        0064  mov %rax,8(%rsi)
        0068  movabs $0x700000001028,%rax
        0072  ret
        0073  push %r15
        0075  push %r14
        0077  push %r13
        0079  jmp 0x0000000000401006
    "#]]
    .assert_eq(&link(&[arena]).listing());
}

/// Everything that can be saved, where it goes, and what cannot be saved.
#[test]
fn saves_go_into_the_words_of_their_body() {
    let reads = Reads::default();
    let nop = [0x0f, 0x1f, 0x44, 0, 0];
    let with = |saves: &[Save], frame_words| {
        let body = SkeletonBody {
            entry: None,
            session: Some(BodyRef::Call(NEAR)),
            modify: None,
            exit: Some(BodyRef::Call(NEAR)),
            reads: &reads,
            saves,
            changes: Changes::NONE,
            frame_words,
            frame_offset: BODY_FRAMES_OFFSET,
        };
        link_skeleton(&request(&nop, &[body]))
    };
    let save = |when, what, word| Save { when, what, word };
    let saves = [
        save(When::Entry, Saved::Gpr(0), 0),
        save(When::Entry, Saved::Gpr(15), 1),
        save(When::Entry, Saved::Vector { reg: 1, n_words: 2 }, 3),
        save(When::Exit, Saved::Vector { reg: 2, n_words: 4 }, 7),
        save(When::Exit, Saved::Vector { reg: 7, n_words: 8 }, 15),
        save(When::Exit, Saved::X87 { reg: 0 }, 17),
        save(When::Exit, Saved::X87 { reg: 1 }, 19),
    ];
    expect![[r#"
        0000  push %rbp
        0001  mov %rsp,%rbp
        0004  lea -0x130(%rsp),%rsp
        000c  mov %rax,-0x98(%rbp)
        0013  mov %r15,-0xA0(%rbp)
        001a  movups %xmm1,-0xB0(%rbp)
        0021  call 0x0000000000600000
        0026  call 0x000000000060007E
        002b  mov %rbp,-8(%rsp)
        0030  vmovups %ymm2,-0xD0(%rbp)
        0038  vmovups %zmm7,-0x110(%rbp)
        0042  movq $0,-0x118(%rbp)
        004d  fld %st(0)
        004f  fstpt -0x120(%rbp)
        0055  movq $0,-0x128(%rbp)
        0060  fld %st(1)
        0062  fstpt -0x130(%rbp)
        0068  call 0x0000000000600000
        006d  leave
        006e  ret
        006f  mov %rbp,-8(%rsp)
        0074  leave
        0075  ret
        0076  nopl 0x61656C66(%rax,%rax)
        007e  nopl (%rax,%rax)
        0083  jmp 0x0000000000401005
    "#]]
    .assert_eq(&with(&saves, 20).unwrap().listing());
    for what in [
        Saved::Gpr(4),
        Saved::Gpr(5),
        Saved::Gpr(16),
        Saved::Vector { reg: 8, n_words: 2 },
        Saved::Vector { reg: 0, n_words: 3 },
        Saved::X87 { reg: 2 },
    ] {
        let save = save(When::Entry, what, 8);
        let error = LinkError::NoSuchSave { save, frame_words: 20 };
        assert_eq!(with(&[save], 20), Err(error));
    }
    // The first word that there is not, and words that begin above the body's.
    for (what, word) in [(Saved::Gpr(0), 20), (Saved::Vector { reg: 0, n_words: 8 }, 6)] {
        let save = save(When::Exit, what, word);
        let error = LinkError::NoSuchSave { save, frame_words: 20 };
        assert_eq!(with(&[save], 20), Err(error));
    }
}
