# What has to be done to registers around a call. Programs of the matrix are linked with it.
#
# struct matrix_cpu: in[16] at 0, fill[16] at 128, out[16] at 256, return address at 384,
# function at 392, flags at 400, index at 408. General registers by their hardware numbers.
    .text

.macro each_gpr do, base
    \do %rax, matrix_cpu+\base+0(%rip)
    \do %rcx, matrix_cpu+\base+8(%rip)
    \do %rdx, matrix_cpu+\base+16(%rip)
    \do %rbx, matrix_cpu+\base+24(%rip)
    \do %rbp, matrix_cpu+\base+40(%rip)
    \do %rsi, matrix_cpu+\base+48(%rip)
    \do %rdi, matrix_cpu+\base+56(%rip)
    \do %r8, matrix_cpu+\base+64(%rip)
    \do %r9, matrix_cpu+\base+72(%rip)
    \do %r10, matrix_cpu+\base+80(%rip)
    \do %r11, matrix_cpu+\base+88(%rip)
    \do %r12, matrix_cpu+\base+96(%rip)
    \do %r13, matrix_cpu+\base+104(%rip)
    \do %r14, matrix_cpu+\base+112(%rip)
    \do %r15, matrix_cpu+\base+120(%rip)
.endm
.macro note reg, place
    movq \reg, \place
.endm
.macro take reg, place
    movq \place, \reg
.endm
# x87, SSE, AVX and AVX-512; what the processor does not have is left out by itself.
.macro extended insn, place
    movl $0xe7, %eax
    xorl %edx, %edx
    \insn \place(%rip)
.endm
# What is found in the padding of locals and arguments is what was on the stack before.
.macro fill_below
    leaq -32768(%rsp), %rdi
    movl $32768, %ecx
    movb matrix_residue(%rip), %al
    rep stosb
.endm

# The same state before each call of a caller: of everything that need not be kept.
    .globl matrix_clean
    .type matrix_clean, @function
matrix_clean:
    fill_below
    extended xrstor64, matrix_x_clean
    movl $1, %eax
    movl $2, %ecx
    movl $3, %edx
    movl $4, %esi
    movl $5, %edi
    movl $6, %r8d
    movl $7, %r9d
    movl $8, %r10d
    movl $9, %r11d
    ret
    .size matrix_clean, .-matrix_clean

# A thunk has taken its return address off the stack and said which function is meant. Notes
# the state, fills every register that carries no argument, calls the function, notes the state
# again, and goes back to the thunk's caller.
    .globl matrix_enter
    .type matrix_enter, @function
matrix_enter:
    each_gpr note, 0
    movq %rsp, matrix_cpu+32(%rip)
    extended xsave64, matrix_x_in
    call matrix_prepare
    extended xrstor64, matrix_x_fill
    fill_below
    each_gpr take, 128
    call *matrix_cpu+392(%rip)
    each_gpr note, 256
    movq %rsp, matrix_cpu+288(%rip)
    pushfq
    popq matrix_cpu+400(%rip)
    cld
    extended xsave64, matrix_x_out
    movq matrix_cpu+32(%rip), %rsp
    call matrix_finish
    extended xrstor64, matrix_x_back
    each_gpr take, 256
    movq matrix_cpu+24(%rip), %rbx
    movq matrix_cpu+40(%rip), %rbp
    movq matrix_cpu+96(%rip), %r12
    movq matrix_cpu+104(%rip), %r13
    movq matrix_cpu+112(%rip), %r14
    movq matrix_cpu+120(%rip), %r15
    jmp *matrix_cpu+384(%rip)
    .size matrix_enter, .-matrix_enter
    .section .note.GNU-stack,"",@progbits
