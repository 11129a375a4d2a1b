/* Entries that a patcher must get right or refuse, one per function. Every function follows
 * the C calling convention and keeps the flags and registers that it must keep.
 *
 *   name            what its first bytes are                       a correct tool
 *   odd_nop5        one 5-byte nop                                 attaches at the nop
 *   odd_endbr_nop5  endbr64, then one 5-byte nop                   attaches after endbr64
 *   odd_nops        five 1-byte nops                               attaches at the nops
 *   odd_ret         a lone `ret`, padding behind it                may use the padding
 *   odd_tight       3 bytes, the next function right behind        refuses
 *   odd_riprel      a load relative to rip                         re-encodes it
 *   odd_jcc         a short conditional jump out of the bytes      re-encodes it
 *   odd_call        a call as first instruction                    keeps the return address's meaning
 *   odd_loop        a loop that jumps back into the first 5 bytes  refuses
 *   odd_entry_loop  a loop that jumps back to the first byte       refuses, or counts entries only
 *   odd_jrcxz       jrcxz, which has no long form                  re-encodes it as two
 *   odd_saved       5 one-byte pushes                              attaches
 */
    .intel_syntax noprefix
    .text

.macro begin name
    .globl \name
    .type \name, @function
    .p2align 4
\name:
    .cfi_startproc
.endm
.macro finish name
    .cfi_endproc
    .size \name, . - \name
.endm

begin odd_nop5
    .byte 0x0f, 0x1f, 0x44, 0x00, 0x00
    lea rax, [rdi + 1]
    ret
finish odd_nop5

begin odd_endbr_nop5
    endbr64
    .byte 0x0f, 0x1f, 0x44, 0x00, 0x00
    lea rax, [rdi + 2]
    ret
finish odd_endbr_nop5

begin odd_nops
    .byte 0x90, 0x90, 0x90, 0x90, 0x90
    lea rax, [rdi + 3]
    ret
finish odd_nops

begin odd_ret
    ret
finish odd_ret

/* Nothing may be aligned between these two. */
begin odd_tight
    push rdi
    pop rax
    ret
finish odd_tight
    .globl odd_tight_next
    .type odd_tight_next, @function
odd_tight_next:
    .cfi_startproc
    lea rax, [rdi + 4]
    ret
finish odd_tight_next

begin odd_riprel
    mov rax, [rip + odd_constant]
    add rax, rdi
    ret
finish odd_riprel

begin odd_jcc
    test edi, edi
    je 1f
    lea rax, [rdi + 5]
    ret
1:  mov eax, 99
    ret
finish odd_jcc

begin odd_call
    call odd_helper
    add rax, rdi
    ret
finish odd_call

begin odd_helper
    mov eax, 6
    ret
finish odd_helper

/* rdi >= 1: counts it down, result rdi. */
begin odd_loop
    xor eax, eax
1:  inc eax
    dec edi
    jnz 1b
    ret
finish odd_loop

/* rdi >= 1: the loop's head is the entry itself, so jumps reach the patched first byte. */
begin odd_entry_loop
    dec edi
    nop
    nop
    nop
    jnz odd_entry_loop
    mov eax, 8
    ret
finish odd_entry_loop

begin odd_jrcxz
    mov ecx, edi
    jrcxz 1f
    lea rax, [rdi + 9]
    ret
1:  mov eax, 98
    ret
finish odd_jrcxz

begin odd_saved
    push rbx
    .cfi_adjust_cfa_offset 8
    push rbp
    .cfi_adjust_cfa_offset 8
    push rdi
    .cfi_adjust_cfa_offset 8
    push rsi
    .cfi_adjust_cfa_offset 8
    push rdx
    .cfi_adjust_cfa_offset 8
    lea rbx, [rdi + 10]
    mov rax, rbx
    pop rdx
    .cfi_adjust_cfa_offset -8
    pop rsi
    .cfi_adjust_cfa_offset -8
    pop rdi
    .cfi_adjust_cfa_offset -8
    pop rbp
    .cfi_adjust_cfa_offset -8
    pop rbx
    .cfi_adjust_cfa_offset -8
    ret
finish odd_saved

    .section .rodata
    .p2align 3
odd_constant:
    .quad 1000
    .section .note.GNU-stack, "", @progbits
