//! The checker of whole images on code, made by no emitter, that changes an argument and the
//! result: who may do so, and what has to follow.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, reason = "a test")]

use flea_image::x86_64::image_check::{
    FrameWord, Holds, InlineChanges, KnownCall, Moved, Rule, Runs, Source, Trusted,
};
use flea_image::{ImageError, ImageUnderCheck, check_image};
use flea_symbols::addr::RemoteAddr;
use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};

const IMAGE: u64 = 0x60_0000;
const SITE: RemoteAddr = RemoteAddr(0x40_1000);
const NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];
const CALLED: u64 = 0x50_0000;
const RAX: Source = Source::Gpr(0);
const RDI: Source = Source::Gpr(7);

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// The parts of an image.
#[derive(Clone, Copy)]
struct Parts {
    /// May change rdi's word.
    session: Write,
    reload: Write,
    /// In front of the original, and may change nothing.
    between: Write,
    /// May change rax's word.
    exit: Write,
    reload_result: Write,
    give_back: Write,
}

/// Everything is changed, on some ways, and followed by what has to follow.
const GOOD: Parts = Parts {
    session: |a| {
        let mut unchanged = a.create_label();
        a.push(rdi)?;
        a.mov(rdi, qword_ptr(rbp - 40))?;
        a.test(rdi, rdi)?;
        a.je(unchanged)?;
        a.add(qword_ptr(rbp - 40), 5)?;
        a.set_label(&mut unchanged)?;
        a.pop(rdi)
    },
    reload: |a| a.mov(rdi, qword_ptr(rbp - 40)),
    between: CodeAssembler::nop,
    exit: |a| a.mov(dword_ptr(rbp - 8), 7),
    reload_result: |a| a.mov(rax, qword_ptr(rbp - 8)),
    give_back: |a| {
        a.cmp(rdi, qword_ptr(rbp - 40))?;
        a.cmove(rdi, qword_ptr(rbp - 152))
    },
};

/// An image's code, where its parts are, and where the original is.
struct Hand {
    bytes: Vec<u8>,
    session: std::ops::Range<u64>,
    exit: std::ops::Range<u64>,
    original: u64,
}

fn assemble(parts: &Parts) -> Hand {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut labels: Vec<CodeLabel> = (0..5).map(|_| a.create_label()).collect();
    let mut write = || {
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.lea(rsp, ptr(rsp - 0xa0))?;
        a.mov(qword_ptr(rbp - 40), rdi)?;
        a.mov(qword_ptr(rbp - 152), rdi)?;
        a.set_label(&mut labels[0])?;
        (parts.session)(&mut a)?;
        a.set_label(&mut labels[1])?;
        (parts.reload)(&mut a)?;
        (parts.between)(&mut a)?;
        a.call(labels[4])?;
        a.mov(qword_ptr(rsp - 8), rbp)?;
        a.mov(qword_ptr(rbp - 8), rax)?;
        a.set_label(&mut labels[2])?;
        (parts.exit)(&mut a)?;
        a.set_label(&mut labels[3])?;
        (parts.reload_result)(&mut a)?;
        (parts.give_back)(&mut a)?;
        a.leave()?;
        a.ret()?;
        a.db(b"\x0f\x1f\x84\x00flea")?;
        a.set_label(&mut labels[4])?;
        a.jmp(SITE.0 + 5)
    };
    write().unwrap();
    let options = BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let result = a.assemble_options(IMAGE, options).unwrap();
    let at = |i: usize| result.label_ip(&labels[i]).unwrap();
    Hand {
        session: at(0)..at(1),
        exit: at(2)..at(3),
        original: at(4),
        bytes: result.inner.code_buffer.clone(),
    }
}

fn image(hand: &Hand) -> ImageUnderCheck<'_> {
    let changes =
        |code: &std::ops::Range<u64>, word| InlineChanges { code: code.clone(), words: vec![word] };
    ImageUnderCheck {
        bytes: &hand.bytes,
        address: RemoteAddr(IMAGE),
        original: RemoteAddr(hand.original),
        moved: Moved {
            at: RemoteAddr(hand.original),
            site: SITE,
            replaced: &NOP,
            goes_on: SITE.offset(5),
        },
        stack_words: 0,
        stack_align_bytes: 16,
        probe_read_user: None,
        calls: vec![],
        frame: vec![
            FrameWord { below_rbp: 8, holds: Holds::Result(RAX) },
            FrameWord { below_rbp: 40, holds: Holds::Argument(RDI) },
            FrameWord { below_rbp: 152, holds: Holds::Argument(RDI) },
        ],
        frame_bytes: 152,
        changers: vec![changes(&hand.session, 40), changes(&hand.exit, 8)],
        given_back: vec![RDI],
        memory: Trusted::Ranges(&[]),
        runtime: Trusted::Ranges(&[]),
        switches: vec![],
        skip: None,
        answer_bytes: None,
        replacement: None,
    }
}

fn verdict(image: &ImageUnderCheck<'_>) -> Result<(), Rule> {
    check_image(image).map_err(|e| match e {
        ImageError::Broken { rule, .. } => rule,
        other => panic!("{other}"),
    })
}

fn check(parts: Parts) -> Result<(), Rule> {
    verdict(&image(&assemble(&parts)))
}

#[test]
fn what_follows_a_change() {
    assert_eq!(check(GOOD), Ok(()));
    let nothing: Write = CodeAssembler::nop;
    assert_eq!(check(Parts { reload: nothing, ..GOOD }), Err(Rule::NotKept(RDI)));
    assert_eq!(check(Parts { reload_result: nothing, ..GOOD }), Err(Rule::NotKept(RAX)));
    assert_eq!(check(Parts { give_back: nothing, ..GOOD }), Err(Rule::NotKept(RDI)));
    // What has not been changed may be loaded all the same, and is given back.
    assert_eq!(check(Parts { session: nothing, exit: nothing, ..GOOD }), Ok(()));
    // Without a reload, but without a change: nobody knows that it is one of these ways.
    assert_eq!(check(Parts { session: nothing, reload: nothing, ..GOOD }), Ok(()));
}

#[test]
fn a_register_of_its_own_for_every_word() {
    let from_the_save: Write = |a| a.mov(rdi, qword_ptr(rbp - 152));
    assert_eq!(check(Parts { reload: from_the_save, ..GOOD }), Err(Rule::NotKept(RDI)));
    let other: Write = |a| a.mov(rsi, qword_ptr(rbp - 40));
    assert_eq!(check(Parts { reload: other, ..GOOD }), Err(Rule::NotKept(Source::Gpr(6))));
    let of_the_argument: Write = |a| a.mov(rax, qword_ptr(rbp - 40));
    assert_eq!(check(Parts { reload_result: of_the_argument, ..GOOD }), Err(Rule::NotKept(RAX)));
    // A copy from before the change.
    let stale: Write = |a| {
        a.mov(r11, qword_ptr(rbp - 40))?;
        a.mov(qword_ptr(rbp - 40), 5)?;
        a.mov(r11, qword_ptr(rbp - 40))?;
        a.push(r11)?;
        a.mov(qword_ptr(rbp - 40), 6)?;
        a.pop(rdi)
    };
    let stale = Parts { session: stale, reload: CodeAssembler::nop, ..GOOD };
    assert!(matches!(check(stale), Err(Rule::NotKept(_))));
}

#[test]
fn who_may_change_a_word() {
    let changes: Write = |a| a.mov(qword_ptr(rbp - 40), 5);
    assert_eq!(check(Parts { between: changes, ..GOOD }), Err(Rule::ChangesWord(40)));
    assert_eq!(check(Parts { exit: changes, ..GOOD }), Err(Rule::ChangesWord(40)));
    let half: Write = |a| a.mov(byte_ptr(rbp - 40), 5);
    assert_eq!(check(Parts { between: half, ..GOOD }), Err(Rule::ChangesWord(40)));
    let result: Write = |a| a.mov(qword_ptr(rbp - 8), 5);
    assert_eq!(check(Parts { give_back: result, ..GOOD }), Err(Rule::ChangesWord(8)));
    let hand = assemble(&GOOD);
    let nobody = ImageUnderCheck { changers: vec![], ..image(&hand) };
    assert_eq!(verdict(&nobody), Err(Rule::ChangesWord(40)));
    // What has not been saved is not changed by anybody.
    let unsaved: Write = |a| a.mov(qword_ptr(rbp - 48), 5);
    let hand = assemble(&Parts { session: unsaved, ..GOOD });
    let mut image = image(&hand);
    image.changers[0].words.push(48);
    image.frame.push(FrameWord { below_rbp: 48, holds: Holds::Argument(Source::Gpr(6)) });
    assert_eq!(verdict(&image), Err(Rule::FrameWord(48)));
}

#[test]
fn what_is_given_back() {
    let whatever_it_is: Write = |a| a.mov(rdi, qword_ptr(rbp - 152));
    assert_eq!(check(Parts { give_back: whatever_it_is, ..GOOD }), Err(Rule::NotKept(RDI)));
    let if_it_differs: Write = |a| {
        a.cmp(rdi, qword_ptr(rbp - 40))?;
        a.cmovne(rdi, qword_ptr(rbp - 152))
    };
    assert_eq!(check(Parts { give_back: if_it_differs, ..GOOD }), Err(Rule::NotKept(RDI)));
    let the_changed_one: Write = |a| {
        a.cmp(rdi, qword_ptr(rbp - 40))?;
        a.cmove(rdi, qword_ptr(rbp - 40))
    };
    assert_eq!(check(Parts { give_back: the_changed_one, ..GOOD }), Err(Rule::NotKept(RDI)));
    let by_other_flags: Write = |a| {
        a.cmp(rdi, qword_ptr(rbp - 40))?;
        a.test(eax, eax)?;
        a.cmove(rdi, qword_ptr(rbp - 152))
    };
    assert_eq!(check(Parts { give_back: by_other_flags, ..GOOD }), Err(Rule::NotKept(RDI)));
    let of_another: Write = |a| {
        a.cmp(rsi, qword_ptr(rbp - 40))?;
        a.cmove(rdi, qword_ptr(rbp - 152))
    };
    assert_eq!(check(Parts { give_back: of_another, ..GOOD }), Err(Rule::NotKept(RDI)));
}

/// A called body that changes the argument, in front of one that reads the register.
#[test]
fn called_bodies() {
    let calls: Write = |a| a.call(CALLED);
    let parts = Parts { session: calls, between: |a| a.call(CALLED + 0x100), ..GOOD };
    let call = |address, changes: &[u32]| KnownCall {
        address: RemoteAddr(address),
        runs: Runs::InFrame,
        reads: vec![],
        changes: changes.to_vec(),
    };
    let with = |parts: &Parts, changes: &[u32]| {
        let hand = assemble(parts);
        let calls = vec![call(CALLED, changes), call(CALLED + 0x100, &[])];
        verdict(&ImageUnderCheck { calls, ..image(&hand) })
    };
    assert_eq!(with(&parts, &[40]), Ok(()));
    let forgets = Parts { reload: CodeAssembler::nop, ..parts };
    assert_eq!(with(&forgets, &[40]), Err(Rule::NotKept(RDI)));
    assert_eq!(with(&forgets, &[]), Ok(()));
}
