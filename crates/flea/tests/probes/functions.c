/* What probes.rs traces, and a caller that knows every register before and after. */

/* long call_filled(const unsigned long in[16], unsigned long out[16], void *function)
 *
 * in and out by hardware number; in[4] is not used, out[4] is rsp behind the call. */
__asm__(".text\n"
	".globl call_filled\n"
	".type call_filled, @function\n"
	"call_filled:\n"
	"	push %rbx\n	push %rbp\n	push %r12\n	push %r13\n	push %r14\n	push %r15\n"
	"	push %rsi\n	push %rdx\n	sub $8, %rsp\n"
	"	mov (%rdi), %rax\n	mov 8(%rdi), %rcx\n	mov 16(%rdi), %rdx\n"
	"	mov 24(%rdi), %rbx\n	mov 40(%rdi), %rbp\n	mov 48(%rdi), %rsi\n"
	"	mov 64(%rdi), %r8\n	mov 72(%rdi), %r9\n	mov 80(%rdi), %r10\n"
	"	mov 88(%rdi), %r11\n	mov 96(%rdi), %r12\n	mov 104(%rdi), %r13\n"
	"	mov 112(%rdi), %r14\n	mov 120(%rdi), %r15\n	mov 56(%rdi), %rdi\n"
	"	call *8(%rsp)\n"
	".globl call_returns\n"
	"call_returns:\n"
	"	mov %rax, (%rsp)\n	mov 16(%rsp), %rax\n"
	"	mov %rcx, 8(%rax)\n	mov %rdx, 16(%rax)\n	mov %rbx, 24(%rax)\n"
	"	mov %rsp, 32(%rax)\n	mov %rbp, 40(%rax)\n	mov %rsi, 48(%rax)\n"
	"	mov %rdi, 56(%rax)\n	mov %r8, 64(%rax)\n	mov %r9, 72(%rax)\n"
	"	mov %r10, 80(%rax)\n	mov %r11, 88(%rax)\n	mov %r12, 96(%rax)\n"
	"	mov %r13, 104(%rax)\n	mov %r14, 112(%rax)\n	mov %r15, 120(%rax)\n"
	"	mov (%rsp), %rcx\n	mov %rcx, (%rax)\n"
	"	add $24, %rsp\n"
	"	pop %r15\n	pop %r14\n	pop %r13\n	pop %r12\n	pop %rbp\n	pop %rbx\n"
	"	ret\n"
	".size call_filled, . - call_filled\n"

	/* Changes every register that it may. */
	".globl probed\n"
	".type probed, @function\n"
	"probed:\n"
	".cfi_startproc\n"
	"	lea 7(%rdi, %rsi, 2), %rax\n"
	"	not %rdx\n	not %rcx\n	add $5, %rsi\n	add $6, %rdi\n	add $7, %r8\n"
	"	add $8, %r9\n	add $9, %r10\n	add $10, %r11\n"
	"	ret\n"
	".cfi_endproc\n"
	".size probed, . - probed\n");
