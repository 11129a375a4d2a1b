/* Programs for ../change.rs that change what functions are called with and return. Those whose
 * section has no question mark are attached by `flea run`. */
#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

extern _Bool bpf_session_is_return(void *ctx) __ksym;

/* What programs found, and how often they ran. */
struct {
	__u64 entry, exit_argument, exit_result, probed, returned, runs;
} seen;

/* --- arguments --- */

SEC("?fentry/add")
int ten_more(__u64 *ctx)
{
	ctx[0] += 10;
	seen.runs++;
	return 0;
}

SEC("?fentry/add")
int twice(__u64 *ctx)
{
	ctx[0] *= 2;
	return 0;
}

SEC("?fentry/add")
int second_is_seven(__u64 *ctx)
{
	ctx[1] = 7;
	return 0;
}

/* Changes nothing. */
SEC("?fentry/add")
int looks(__u64 *ctx)
{
	seen.entry = ctx[0];
	return 0;
}

SEC("?fexit/add")
int looks_back(__u64 *ctx)
{
	seen.exit_argument = ctx[0];
	seen.exit_result = ctx[2];
	return 0;
}

SEC("?uprobe/add")
int probe(struct pt_regs *ctx)
{
	seen.probed = ctx->rdi;
	ctx->rdi = seen.probed + 100;
	ctx->rsi = 0;
	return 0;
}

/* Negative numbers alone. */
SEC("?fentry/add")
int absolute(__u64 *ctx)
{
	__s64 a = ctx[0];

	if (a < 0)
		ctx[0] = -a;
	return 0;
}

/* --- results --- */

SEC("?fexit/add")
int result_negated(__u64 *ctx)
{
	ctx[2] = -ctx[2];
	seen.runs++;
	return 0;
}

SEC("?fexit/add")
int result_plus_one(__u64 *ctx)
{
	ctx[2]++;
	return 0;
}

SEC("?uretprobe/add")
int return_probe(struct pt_regs *ctx)
{
	seen.returned = ctx->rax;
	ctx->rax = 5000;
	return 0;
}

SEC("fexit/narrow")
int narrow_result(__u64 *ctx)
{
	*(volatile __u8 *)&ctx[1] = 200;
	return 0;
}

SEC("?fexit/pair")
int first_of_two(__u64 *ctx)
{
	ctx[2] = 33;
	return 0;
}

/* --- both ends --- */

SEC("?fsession/add")
int both(__u64 *ctx)
{
	if (!bpf_session_is_return(ctx)) {
		ctx[0] = 1000;
		return 0;
	}
	ctx[2] += ctx[0];
	return 0;
}

SEC("?fmod_ret/add")
int never_here(__u64 *ctx)
{
	seen.entry = ctx[0];
	return ctx[0] == 13 ? 4242 : 0;
}

/* --- whose caller counts on its registers --- */

SEC("?fentry/third")
int everything(__u64 *ctx)
{
	ctx[0] = 0;
	ctx[1] = 30;
	ctx[2] = 0;
	return 0;
}

SEC("?uprobe/third")
int every_register(struct pt_regs *ctx)
{
	ctx->rdi = 0;
	ctx->rsi = 60;
	ctx->rdx = 0;
	ctx->rcx = 0;
	ctx->r8 = 0;
	ctx->r9 = 0;
	return 0;
}

/* --- nine arguments --- */

SEC("fentry/sum")
int sixth(__u64 *ctx)
{
	ctx[5] = 101;
	return 0;
}

/* --- what cannot be changed --- */

SEC("?fentry/sum")
int on_the_stack(__u64 *ctx)
{
	ctx[6] = 1;
	return 0;
}

SEC("?fentry/mixed")
int a_double(__u64 *ctx)
{
	ctx[0] = 1;
	return 0;
}

SEC("?fentry/mixed")
int behind_a_double(__u64 *ctx)
{
	ctx[1] = 40;
	return 0;
}

SEC("?fexit/mixed")
int a_double_result(__u64 *ctx)
{
	ctx[2] = 1;
	return 0;
}

SEC("?fexit/pair")
int second_of_two(__u64 *ctx)
{
	ctx[3] = 1;
	return 0;
}

SEC("?fexit/big")
int in_memory(__u64 *ctx)
{
	ctx[1] = 1;
	return 0;
}

SEC("?fexit/add")
int argument_at_exit(__u64 *ctx)
{
	ctx[0] = 1;
	return 0;
}

SEC("?fmod_ret/add")
int argument_of_fmod_ret(__u64 *ctx)
{
	ctx[0] = 1;
	return 0;
}

SEC("?uprobe/add")
int program_counter(struct pt_regs *ctx)
{
	ctx->rip = 1;
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
