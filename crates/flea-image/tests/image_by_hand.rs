//! The checker of whole images on code that no emitter made: ways to skip the original, branches
//! that are written in later, saves of the widest registers, an unwinder's questions.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, reason = "a test")]

use flea_image::x86_64::image_check::{
    FrameWord, Holds, KnownCall, Moved, Rule, Runs, Source, Trusted,
};
use flea_image::{ImageError, ImageUnderCheck, check_image};
use flea_symbols::addr::RemoteAddr;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const IMAGE: u64 = 0x60_0000;
const SITE: RemoteAddr = RemoteAddr(0x40_1000);
const NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];
const MODIFY: u64 = 0x50_0000;
const EXIT: u64 = 0x50_1000;
const RAX: Source = Source::Gpr(0);

/// An image's code and the places in it.
struct Hand {
    bytes: Vec<u8>,
    original: u64,
    moved: u64,
    switch: Option<(u64, u64)>,
}

/// The labels of an image under construction.
struct Labels {
    original: CodeLabel,
    moved: CodeLabel,
    switch_from: CodeLabel,
    switch_to: CodeLabel,
}

/// What `write` assembles, and behind it the marker and the original of a nop site; `write` sets
/// the labels that it needs.
fn assemble(write: impl FnOnce(&mut CodeAssembler, &mut Labels) -> Result<(), IcedError>) -> Hand {
    let build = || {
        let mut a = CodeAssembler::new(64)?;
        let mut labels = Labels {
            original: a.create_label(),
            moved: a.create_label(),
            switch_from: a.create_label(),
            switch_to: a.create_label(),
        };
        write(&mut a, &mut labels)?;
        a.db(b"\x0f\x1f\x84\x00flea")?;
        a.set_label(&mut labels.original)?;
        a.zero_bytes()?;
        a.set_label(&mut labels.moved)?;
        a.jmp(SITE.0 + 5)?;
        let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let result = a.assemble_options(IMAGE, options)?;
        let switch = result.label_ip(&labels.switch_from).ok();
        Ok::<_, IcedError>(Hand {
            original: result.label_ip(&labels.original)?,
            moved: result.label_ip(&labels.moved)?,
            switch: switch.zip(result.label_ip(&labels.switch_to).ok()),
            bytes: result.inner.code_buffer,
        })
    };
    build().unwrap()
}

fn image(hand: &Hand) -> ImageUnderCheck<'_> {
    let call = |address, runs, reads: &[u32]| KnownCall {
        address: RemoteAddr(address),
        runs,
        reads: reads.to_vec(),
        changes: vec![],
    };
    ImageUnderCheck {
        bytes: &hand.bytes,
        address: RemoteAddr(IMAGE),
        original: RemoteAddr(hand.original),
        moved: Moved {
            at: RemoteAddr(hand.moved),
            site: SITE,
            replaced: &NOP,
            goes_on: SITE.offset(5),
        },
        stack_words: 0,
        stack_align_bytes: 16,
        probe_read_user: None,
        calls: vec![call(MODIFY, Runs::Modifies, &[]), call(EXIT, Runs::AtExit, &[8])],
        frame: vec![FrameWord { below_rbp: 8, holds: Holds::Result(RAX) }],
        frame_bytes: 0x90,
        changers: vec![],
        given_back: vec![],
        memory: Trusted::Ranges(&[]),
        runtime: Trusted::Ranges(&[]),
        switches: hand
            .switch
            .iter()
            .map(|(from, to)| (RemoteAddr(*from), RemoteAddr(*to)))
            .collect(),
        skip: Some(vec![RAX]),
        answer_bytes: None,
        replacement: None,
    }
}

fn rule(image: &ImageUnderCheck<'_>) -> Rule {
    match check_image(image) {
        Err(ImageError::Broken { rule, .. }) => rule,
        other => panic!("{other:?}"),
    }
}

fn prologue(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.push(rbp)?;
    a.mov(rbp, rsp)?;
    a.lea(rsp, ptr(rsp - 0x90))
}

fn call_original(a: &mut CodeAssembler, labels: &mut Labels) -> Result<(), IcedError> {
    a.call(labels.original)?;
    a.set_label(&mut labels.switch_from)?;
    a.mov(qword_ptr(rsp - 8), rbp)
}

/// An image whose `modify` body may decide that the original is not called.
fn modifying(
    skipped: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    drained: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Hand {
    assemble(|a, labels| {
        let (mut skip, mut save) = (a.create_label(), a.create_label());
        prologue(a)?;
        a.mov(qword_ptr(rbp - 8), 0)?;
        a.call(MODIFY)?;
        a.cmp(qword_ptr(rbp - 8), 0)?;
        a.jne(skip)?;
        call_original(a, labels)?;
        a.set_label(&mut save)?;
        a.mov(qword_ptr(rbp - 8), rax)?;
        a.call(EXIT)?;
        a.leave()?;
        a.ret()?;
        a.set_label(&mut labels.switch_to)?;
        drained(a)?;
        a.leave()?;
        a.ret()?;
        a.set_label(&mut skip)?;
        skipped(a)?;
        a.jmp(save)
    })
}

fn load_result(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(rax, qword_ptr(rbp - 8))
}

fn overwrite(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(qword_ptr(rsp - 8), rbp)
}

#[test]
fn a_skipped_original() {
    let good = modifying(load_result, overwrite);
    check_image(&image(&good)).unwrap();
    assert_eq!(rule(&ImageUnderCheck { skip: None, ..image(&good) }), Rule::WrongTime);
    let xmm0_word = Source::Vector { reg: 0, word: 0 };
    let in_xmm0 = ImageUnderCheck { skip: Some(vec![xmm0_word]), ..image(&good) };
    assert_eq!(rule(&in_xmm0), Rule::NotKept(xmm0_word));
    let nowhere = ImageUnderCheck { skip: Some(vec![]), ..image(&good) };
    assert_eq!(rule(&nowhere), Rule::NotKept(RAX));
    let clobbers = modifying(|a| load_result(a).and_then(|()| a.xor(edx, edx)), overwrite);
    assert_eq!(rule(&image(&clobbers)), Rule::NotKept(Source::Gpr(2)));
    let forgets = modifying(|_| Ok(()), overwrite);
    assert_eq!(rule(&image(&forgets)), Rule::NotKept(RAX));
    let another = modifying(|a| a.mov(rax, qword_ptr(rbp)), overwrite);
    assert_eq!(rule(&image(&another)), Rule::NotKept(RAX));
}

#[test]
fn a_branch_that_is_written_in_later() {
    let forgets = modifying(load_result, |_| Ok(()));
    assert_eq!(rule(&image(&forgets)), Rule::UsedReturn);
    let clobbers = modifying(load_result, |a| overwrite(a).and_then(|()| a.xor(eax, eax)));
    assert_eq!(rule(&image(&clobbers)), Rule::NotKept(RAX));
    // Without the branch nobody gets there.
    check_image(&ImageUnderCheck { switches: vec![], ..image(&clobbers) }).unwrap();
}

/// A frame that saves what the original left, and an exit body that reads it.
fn saving(save: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Hand {
    assemble(|a, labels| {
        prologue(a)?;
        a.call(MODIFY)?;
        call_original(a, labels)?;
        save(a)?;
        a.call(EXIT)?;
        a.leave()?;
        a.ret()
    })
}

/// The rule broken when an exit body reads `words` from the frame.
fn reading(hand: &Hand, words: &[(u32, Source)]) -> Option<Rule> {
    let mut image = image(hand);
    let holds = |(below_rbp, source)| FrameWord { below_rbp, holds: Holds::Result(source) };
    image.frame = words.iter().copied().map(holds).collect();
    image.calls[1].reads = words.iter().map(|(below_rbp, _)| *below_rbp).collect();
    image.skip = None;
    match check_image(&image) {
        Ok(()) => None,
        Err(ImageError::Broken { rule, .. }) => Some(rule),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn saves_of_wide_registers() {
    let ymm: Vec<(u32, Source)> = (0u8..4)
        .map(|word| (0x40 - 8 * u32::from(word), Source::Vector { reg: 1, word }))
        .collect();
    let whole = saving(|a| a.vmovups(ymmword_ptr(rbp - 0x40), ymm1));
    assert_eq!(reading(&whole, &ymm), None);
    let half = saving(|a| a.vmovups(xmmword_ptr(rbp - 0x40), xmm1));
    assert_eq!(reading(&half, &ymm), Some(Rule::FrameWord(0x30)));
    let other = saving(|a| a.vmovups(ymmword_ptr(rbp - 0x40), ymm2));
    assert_eq!(reading(&other, &ymm), Some(Rule::FrameWord(0x40)));

    let upper = [(0x20, Source::X87 { reg: 1, word: 0 }), (0x18, Source::X87 { reg: 1, word: 1 })];
    let good = saving(|a| {
        a.mov(qword_ptr(rbp - 0x18), 0)?;
        a.fld(st1)?;
        a.fstp(tbyte_ptr(rbp - 0x20))
    });
    assert_eq!(reading(&good, &upper), None);
    let dirty = saving(|a| {
        a.fld(st1)?;
        a.fstp(tbyte_ptr(rbp - 0x20))
    });
    assert_eq!(reading(&dirty, &upper), Some(Rule::FrameWord(0x18)));
    let unbalanced = saving(|a| a.fld(st1));
    assert_eq!(reading(&unbalanced, &[]), Some(Rule::X87));
    // Popped, kept, and pushed again.
    let there_and_back = saving(|a| {
        a.fstp(tbyte_ptr(rbp - 0x20))?;
        a.fld(tbyte_ptr(rbp - 0x20))
    });
    assert_eq!(reading(&there_and_back, &[]), None);
}

/// What is found in the code in front of the moved instructions, of an unwinder or of a function
/// that is replaced.
fn in_front(
    replacement: Option<RemoteAddr>,
    write: fn(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), Rule> {
    let mut a = CodeAssembler::new(64).unwrap();
    write(&mut a).unwrap();
    let moved = IMAGE + a.assemble(IMAGE).unwrap().len() as u64;
    a.jmp(SITE.0 + 5).unwrap();
    let bytes = a.assemble(IMAGE).unwrap();
    let hand = Hand { bytes, original: IMAGE, moved, switch: None };
    let answer_bytes = replacement.is_none().then_some(24);
    let image =
        ImageUnderCheck { calls: vec![], skip: None, answer_bytes, replacement, ..image(&hand) };
    check_image(&image).map_err(|e| match e {
        ImageError::Broken { rule, .. } => rule,
        other => panic!("{other}"),
    })
}

#[test]
fn an_unwinder_s_questions() {
    let asking = |write| in_front(None, write);
    assert_eq!(asking(|a| a.mov(qword_ptr(rsi + 16), rax)), Ok(()));
    assert_eq!(asking(|a| a.mov(r11, 5u64)), Ok(()));
    assert_eq!(asking(|a| a.mov(rcx, 5u64)), Err(Rule::NotKept(Source::Gpr(1))));
    assert_eq!(asking(|a| a.mov(qword_ptr(rsi + 24), rax)), Err(Rule::WritesAnywhere));
    assert_eq!(asking(|a| a.mov(qword_ptr(rdi), rax)), Err(Rule::WritesAnywhere));
    assert_eq!(asking(|a| a.push(rax)), Err(Rule::StackNotLevel(-8)));
}

#[test]
fn a_replacement() {
    let replaced = |write| in_front(Some(RemoteAddr(0x7000_1234)), write);
    let by_r11 = |a: &mut CodeAssembler| {
        a.mov(r11, 0x7000_1234u64)?;
        a.jmp(r11)
    };
    assert_eq!(replaced(|a| a.jmp(0x7000_1234)), Ok(()));
    assert_eq!(replaced(by_r11), Ok(()));
    assert_eq!(replaced(|a| a.jmp(0x7000_1235)), Err(Rule::UnknownTarget));
    assert_eq!(replaced(|a| a.jmp(r11)), Err(Rule::UnknownTarget));
    assert_eq!(replaced(CodeAssembler::nop), Err(Rule::RunsOff));
    assert_eq!(replaced(CodeAssembler::ret), Err(Rule::Skips));
    let by_rax = |a: &mut CodeAssembler| {
        a.mov(rax, 0x7000_1234u64)?;
        a.jmp(rax)
    };
    assert_eq!(replaced(by_rax), Err(Rule::NotKept(RAX)));
}

/// What is unknown spreads by one word a round.
#[test]
fn work_is_bounded() {
    const N_WORDS: i32 = 150;
    let hand = assemble(|a, _| {
        let mut again = a.create_label();
        a.lea(rsp, ptr(rsp - 8 * (N_WORDS + 2)))?;
        for i in 0..N_WORDS {
            a.mov(qword_ptr(rsp + 8 * i), 0)?;
        }
        a.set_label(&mut again)?;
        for i in (1..N_WORDS).rev() {
            a.mov(rax, qword_ptr(rsp + 8 * (i - 1)))?;
            a.mov(qword_ptr(rsp + 8 * i), rax)?;
        }
        a.mov(qword_ptr(rsp), rdi)?;
        a.jne(again)?;
        a.ud2()
    });
    let found = check_image(&image(&hand));
    assert!(matches!(found, Err(ImageError::TooComplex { .. })), "{found:?}");
}
