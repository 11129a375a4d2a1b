//! Functions with a call among their first bytes, patched and called in this process.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod support;

use expect_test::expect;
use flea_image::{
    BodyRef, Changes, LinkError, Reads, RelocateError, SiteKind, SkeletonBody, SkeletonRequest,
    StackCopy, link_skeleton,
};
use flea_symbols::addr::RemoteAddr;
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::Pages;
use support::rig::assemble;

const PAGE: usize = 4096;
const FUNCTION: usize = 0;
const CALLEE: usize = 0x200;
const POINTER: usize = 0x340;
const COUNTER: usize = 0x400;
const COUNT: usize = 0x480;
const IMAGE: usize = PAGE;
/// Written while the code is executed.
const DATA: usize = 2 * PAGE;

/// Writes a function's code up to its call.
type Begin = fn(&mut CodeAssembler, u64) -> Result<(), IcedError>;

/// A call as it may stand at the end of the replaced bytes, and the bytes of stack that are
/// taken then.
const CALLS: [(&str, Begin, i32); 8] = [
    ("direct", |a, base| a.sub(rsp, 8).and_then(|()| a.call(base + CALLEE as u64)), 8),
    ("at the first byte", |a, base| a.call(base + CALLEE as u64), 0),
    (
        "by register",
        |a, base| {
            a.mov(r11, base + CALLEE as u64)?;
            a.call(r11)
        },
        0,
    ),
    // call [rip + POINTER - 6]
    (
        "relative to rip",
        |a, _| a.db(&[0xff, 0x15, POINTER as u8 - 6, (POINTER >> 8) as u8, 0, 0]),
        0,
    ),
    ("of the stack's top", |a, _| a.push(r10).and_then(|()| a.call(qword_ptr(rsp))), 8),
    ("of an argument", |a, _| a.push(rdi).and_then(|()| a.call(qword_ptr(rsp + 16))), 8),
    ("by a table", |a, _| a.push(rdi).and_then(|()| a.call(qword_ptr(rdx + rcx * 8 + 16))), 8),
    ("with notrack", |a, _| a.push(rdi).and_then(|()| a.db(&[0x3e, 0x41, 0xff, 0xd2])), 8),
];

/// `fn(rdi, rsi, rdx = pointers, rcx = 1) -> callee's return address`, called with r10 = callee
/// and the callee's address as first stack word.
fn harness(at: u64, base: u64) -> Vec<u8> {
    assemble(at, |a| {
        a.mov(r10, base + CALLEE as u64)?;
        a.push(r10)?;
        a.call(base + FUNCTION as u64)?;
        a.add(rsp, 8)?;
        a.ret()
    })
}

struct Patched {
    code: Pages,
    resume: u64,
    listing: String,
}

/// Puts `begin` and its rest at the first byte and patches it with `bodies`.
fn patched(begin: Begin, taken: i32, entry: bool, exit: bool) -> Patched {
    let code = Pages::new(3 * PAGE);
    let base = code.address();
    let start = assemble(base, |a| begin(a, base));
    let rest = assemble(base + start.len() as u64, |a| {
        a.add(rsp, taken)?;
        a.ret()
    });
    // Returns where it was called from, and notes that it ran.
    let callee = assemble(base + CALLEE as u64, |a| {
        a.mov(rax, base + DATA as u64)?;
        a.inc(qword_ptr(rax))?;
        a.mov(rax, qword_ptr(rsp))?;
        a.ret()
    });
    let count = assemble(base + COUNT as u64, |a| {
        a.push(rax)?;
        a.mov(rax, base + DATA as u64 + 8)?;
        a.inc(qword_ptr(rax))?;
        a.pop(rax)?;
        a.ret()
    });
    let body = |wanted: bool| wanted.then_some(BodyRef::Call(RemoteAddr(base + COUNT as u64)));
    let reads = Reads::default();
    let bodies = [SkeletonBody {
        entry: body(entry),
        session: None,
        modify: None,
        exit: body(exit),
        reads: &reads,
        saves: &[],
        changes: Changes::NONE,
        frame_words: 0,
        frame_offset: 0,
    }];
    let skeleton = link_skeleton(&SkeletonRequest {
        replacement: None,
        site: RemoteAddr(base),
        replaced: &start,
        kind: SiteKind::Relocated,
        image_address: RemoteAddr(base + IMAGE as u64),
        bodies: &bodies,
        skip: None,
        stack_copy: StackCopy::Exactly(1),
        stack_align_bytes: 16,
    })
    .unwrap();
    code.write(FUNCTION, &[start.clone(), rest].concat());
    code.write(FUNCTION, &skeleton.site_patch);
    code.write(CALLEE, &callee);
    code.write(COUNT, &count);
    code.write(POINTER, &(base + CALLEE as u64).to_le_bytes());
    code.write(POINTER + 24, &(base + CALLEE as u64).to_le_bytes());
    code.write(COUNTER, &harness(base + COUNTER as u64, base));
    code.write(IMAGE, &skeleton.bytes);
    executable_but(&code, DATA);
    Patched { resume: base + start.len() as u64, code, listing: skeleton.listing() }
}

fn executable_but(code: &Pages, data: usize) {
    code.executable();
    // SAFETY: one page of our own mapping, in which there is no code.
    let failed = unsafe {
        let at = (code.address() as usize + data) as *mut libc::c_void;
        libc::mprotect(at, PAGE, libc::PROT_READ | libc::PROT_WRITE)
    };
    assert_eq!(failed, 0);
}

impl Patched {
    fn call(&self) -> u64 {
        let at = self.code.address();
        // SAFETY: the harness takes four integers, returns one and keeps what the ABI says.
        let harness: extern "sysv64" fn(u64, u64, u64, u64) -> u64 =
            unsafe { std::mem::transmute(at + COUNTER as u64) };
        harness(1, 2, at + POINTER as u64, 1)
    }
}

#[test]
fn the_callee_returns_to_the_function_itself() {
    for (name, begin, taken) in CALLS {
        for (entry, exit) in [(true, false), (false, true), (true, true)] {
            let patched = patched(begin, taken, entry, exit);
            for n in 1..=3 {
                assert_eq!(patched.call(), patched.resume, "{name}\n{}", patched.listing);
                let n_runs = n * (u64::from(entry) + u64::from(exit));
                let seen = (patched.code.read(DATA), patched.code.read(DATA + 8));
                assert_eq!(seen, (n, n_runs), "{name} {entry} {exit}");
            }
        }
    }
}

/// `dec edi; js 1f; call itself; 1: ret`: each call is seen, the inner ones too.
#[test]
fn calls_of_itself_go_through_the_site() {
    let recursive: Begin = |a, base| {
        let mut out = a.create_label();
        a.dec(edi)?;
        a.js(out)?;
        a.call(base + FUNCTION as u64)?;
        a.set_label(&mut out)?;
        a.zero_bytes()
    };
    for exit in [false, true] {
        let patched = patched(recursive, 0, !exit, exit);
        let at = patched.code.address();
        // SAFETY: it takes one integer and keeps what the ABI says.
        let function: extern "sysv64" fn(u64) = unsafe { std::mem::transmute(at) };
        function(5);
        assert_eq!(patched.code.read(DATA + 8), 6, "{}", patched.listing);
    }
}

fn link(replaced: &[u8]) -> Result<String, LinkError> {
    let request = SkeletonRequest {
        replacement: None,
        site: RemoteAddr(0x5555_8040_1000),
        replaced,
        kind: SiteKind::Relocated,
        image_address: RemoteAddr(0x5555_8060_0000),
        bodies: &[],
        skip: None,
        stack_copy: StackCopy::Exactly(0),
        stack_align_bytes: 16,
    };
    link_skeleton(&request).map(|skeleton| skeleton.listing())
}

#[test]
fn a_moved_call_is_a_push_and_a_jump() {
    // sub rsp, 8; call +0x100
    expect![[r#"
        0000  sub $8,%rsp
        0004  push $0xFFFFFFFF80401009
        0009  movl $0x5555,4(%rsp)
        0011  jmp 0x0000555580401109
        0016  jmp 0x0000555580401009
    "#]]
    .assert_eq(&link(&[0x48, 0x83, 0xec, 8, 0xe8, 0, 1, 0, 0]).unwrap());
    // push rbx; push rbx; call [rsp+rax*8+0x7c]
    expect![[r#"
        0000  push %rbx
        0001  push %rbx
        0002  push $0xFFFFFFFF80401006
        0007  movl $0x5555,4(%rsp)
        000f  jmpq *0x84(%rsp,%rax,8)
        0016  jmp 0x0000555580401006
    "#]]
    .assert_eq(&link(&[0x53, 0x53, 0xff, 0x54, 0xc4, 0x7c]).unwrap());
}

#[test]
fn calls_that_cannot_be_moved_say_so() {
    let unfit = |bytes: &[u8], offset| {
        let source = RelocateError::Call { offset };
        let site = RemoteAddr(0x5555_8040_1000);
        assert_eq!(link(bytes), Err(LinkError::Site { site, source }), "{bytes:02x?}");
    };
    unfit(&[0xff, 0xd0, 0x90, 0x90, 0x90], 0); // call rax; nops: it returns to one of them
    unfit(&[0x90, 0x90, 0x90, 0xff, 0xd4], 3); // call rsp
    let source = RelocateError::IntoMiddle { offset: 0 };
    let site = RemoteAddr(0x5555_8040_1000);
    let into_itself = link(&[0xe8, 0xfd, 0xff, 0xff, 0xff]);
    assert_eq!(into_itself, Err(LinkError::Site { site, source }));
}
