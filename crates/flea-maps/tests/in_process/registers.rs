//! Calls a function with a known value in every register, on a stack of its own, and reads
//! all of them back.

use std::arch::naked_asm;
use std::mem::offset_of;

pub const STACK_BYTES: usize = 64 << 10;
const FILL: u8 = 0xa5;

/// rcx, rdx, rsi, rdi, r8, r9, r10, r11, rbx, rbp, r12..r15
pub const N_GPRS: usize = 14;

#[repr(C)]
pub struct Frame {
    target: u64,
    stack: u64,
    saved_rsp: u64,
    rax: u64,
    before: [u64; N_GPRS],
    after: [u64; N_GPRS],
    xmm_before: [u128; 16],
    xmm_after: [u128; 16],
    rsp_after: u64,
}

pub struct Outcome {
    pub rax: u64,
    pub stack_bytes: usize,
}

/// Calls `target(args)`, with the stack `misalign` bytes off 16. Panics if any register but
/// rax differs afterwards.
pub fn call(target: u64, args: &[u64], misalign: u64) -> Outcome {
    let mut stack = vec![FILL; STACK_BYTES];
    let top = (stack.as_mut_ptr() as u64 + STACK_BYTES as u64) & !15;
    let mut before = [0u64; N_GPRS];
    for (i, word) in before.iter_mut().enumerate() {
        *word = 0x1111_2222_0000_0000 + i as u64;
    }
    // rdi, rsi, rdx, rcx, r8, r9
    for (arg, place) in args.iter().zip([3, 2, 1, 0, 4, 5]) {
        before[place] = *arg;
    }
    let mut frame = Frame {
        target,
        stack: top - 64 - misalign,
        saved_rsp: 0,
        rax: 0,
        before,
        after: [0; N_GPRS],
        xmm_before: std::array::from_fn(|i| (0x5a5a << 64) + i as u128),
        xmm_after: [0; 16],
        rsp_after: 0,
    };
    // SAFETY: the frame is whole and the stack is ours.
    unsafe { call_with_registers(&raw mut frame) };
    assert_eq!(frame.before, frame.after, "general registers");
    assert_eq!(frame.xmm_before, frame.xmm_after, "vector registers");
    assert_eq!(frame.rsp_after, frame.stack - 16, "the stack pointer");
    let untouched = stack.iter().take_while(|byte| **byte == FILL).count();
    let used = usize::try_from(frame.rsp_after).unwrap() - (stack.as_ptr() as usize + untouched);
    Outcome { rax: frame.rax, stack_bytes: used }
}

/// # Safety
/// `frame` is whole, its stack is large enough, its target keeps the stack.
#[unsafe(naked)]
unsafe extern "C" fn call_with_registers(frame: *mut Frame) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi + {saved_rsp}], rsp",
        "mov rsp, [rdi + {stack}]",
        "push rdi",
        "push qword ptr [rdi + {target}]",
        "lea rax, [rdi + {xmm_before}]",
        "movdqu xmm0, [rax]",
        "movdqu xmm1, [rax + 16]",
        "movdqu xmm2, [rax + 32]",
        "movdqu xmm3, [rax + 48]",
        "movdqu xmm4, [rax + 64]",
        "movdqu xmm5, [rax + 80]",
        "movdqu xmm6, [rax + 96]",
        "movdqu xmm7, [rax + 112]",
        "movdqu xmm8, [rax + 128]",
        "movdqu xmm9, [rax + 144]",
        "movdqu xmm10, [rax + 160]",
        "movdqu xmm11, [rax + 176]",
        "movdqu xmm12, [rax + 192]",
        "movdqu xmm13, [rax + 208]",
        "movdqu xmm14, [rax + 224]",
        "movdqu xmm15, [rax + 240]",
        "lea rax, [rdi + {before}]",
        "mov rcx, [rax]",
        "mov rdx, [rax + 8]",
        "mov rsi, [rax + 16]",
        "mov rdi, [rax + 24]",
        "mov r8, [rax + 32]",
        "mov r9, [rax + 40]",
        "mov r10, [rax + 48]",
        "mov r11, [rax + 56]",
        "mov rbx, [rax + 64]",
        "mov rbp, [rax + 72]",
        "mov r12, [rax + 80]",
        "mov r13, [rax + 88]",
        "mov r14, [rax + 96]",
        "mov r15, [rax + 104]",
        "call [rsp]",
        "mov [rsp], rax",
        "mov rax, [rsp + 8]",
        "mov [rax + {rsp_after}], rsp",
        "mov [rax + {after}], rcx",
        "mov [rax + {after} + 8], rdx",
        "mov [rax + {after} + 16], rsi",
        "mov [rax + {after} + 24], rdi",
        "mov [rax + {after} + 32], r8",
        "mov [rax + {after} + 40], r9",
        "mov [rax + {after} + 48], r10",
        "mov [rax + {after} + 56], r11",
        "mov [rax + {after} + 64], rbx",
        "mov [rax + {after} + 72], rbp",
        "mov [rax + {after} + 80], r12",
        "mov [rax + {after} + 88], r13",
        "mov [rax + {after} + 96], r14",
        "mov [rax + {after} + 104], r15",
        "mov rcx, [rsp]",
        "mov [rax + {rax}], rcx",
        "lea rcx, [rax + {xmm_after}]",
        "movdqu [rcx], xmm0",
        "movdqu [rcx + 16], xmm1",
        "movdqu [rcx + 32], xmm2",
        "movdqu [rcx + 48], xmm3",
        "movdqu [rcx + 64], xmm4",
        "movdqu [rcx + 80], xmm5",
        "movdqu [rcx + 96], xmm6",
        "movdqu [rcx + 112], xmm7",
        "movdqu [rcx + 128], xmm8",
        "movdqu [rcx + 144], xmm9",
        "movdqu [rcx + 160], xmm10",
        "movdqu [rcx + 176], xmm11",
        "movdqu [rcx + 192], xmm12",
        "movdqu [rcx + 208], xmm13",
        "movdqu [rcx + 224], xmm14",
        "movdqu [rcx + 240], xmm15",
        "mov rsp, [rax + {saved_rsp}]",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        saved_rsp = const offset_of!(Frame, saved_rsp),
        stack = const offset_of!(Frame, stack),
        target = const offset_of!(Frame, target),
        rax = const offset_of!(Frame, rax),
        before = const offset_of!(Frame, before),
        after = const offset_of!(Frame, after),
        xmm_before = const offset_of!(Frame, xmm_before),
        xmm_after = const offset_of!(Frame, xmm_after),
        rsp_after = const offset_of!(Frame, rsp_after),
    )
}
