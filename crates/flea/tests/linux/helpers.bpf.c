/* What the helpers say about the call: arguments by number, the result, the function's address,
 * the link's cookie, the session; and what happens to a program that is entered again. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

extern _Bool bpf_session_is_return(void *ctx) __ksym;
extern __u64 *bpf_session_cookie(void *ctx) __ksym;

struct {
	__u64 right[16];
	__u64 cookies[2];
	__u64 runs[3];
	__u64 address;
} state;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, __u64);
	__type(value, __u64);
} table SEC(".maps");

static __always_inline void check(int n, int holds)
{
	if (holds)
		state.right[n]++;
}

SEC("fentry/two")
int get_args(__u64 *ctx)
{
	__u64 a = 0, b = 0, c = 99, ret = 99;
	long err_a = bpf_get_func_arg(ctx, 0, &a);
	long err_b = bpf_get_func_arg(ctx, 1, &b);
	long err_c = bpf_get_func_arg(ctx, 2, &c);

	check(0, bpf_get_func_arg_cnt(ctx) == 2);
	check(1, !err_a && (int)a == 2 && !err_b && b == 3);
	check(2, err_c == -22);
	check(3, bpf_get_func_ret(ctx, &ret) == -95);
	check(4, bpf_get_func_ip(ctx) == state.address);
	return 0;
}

SEC("fexit/two")
int get_args_at_exit(__u64 *ctx)
{
	__u64 a = 0, b = 0, c = 99, ret = 0;
	long err_a = bpf_get_func_arg(ctx, 0, &a);
	long err_b = bpf_get_func_arg(ctx, 1, &b);
	long err_c = bpf_get_func_arg(ctx, 2, &c);

	check(5, bpf_get_func_arg_cnt(ctx) == 2);
	check(6, !err_a && (int)a == 2 && !err_b && b == 3);
	check(7, err_c == -22);
	check(8, !bpf_get_func_ret(ctx, &ret) && (int)ret == 5);
	check(9, bpf_get_func_ip(ctx) == state.address);
	return 0;
}

SEC("fentry")
int cookie_entry(__u64 *ctx)
{
	state.cookies[0] += bpf_get_attach_cookie(ctx);
	return 0;
}

SEC("fexit")
int cookie_exit(__u64 *ctx)
{
	state.cookies[1] += bpf_get_attach_cookie(ctx);
	return 0;
}

SEC("fsession/one")
int session(__u64 *ctx)
{
	__u64 *cookie = bpf_session_cookie(ctx);

	if (!bpf_session_is_return(ctx)) {
		check(10, *cookie == 0 && (int)ctx[0] == 1);
		*cookie = 0x1234567800000000ULL + (int)ctx[0];
		/* Linux: what it returns does not keep the exit side from running. */
		return 1;
	}
	check(11, *cookie == 0x1234567800000001ULL && (int)ctx[0] == 1 && (int)ctx[1] == 2);
	return 0;
}

/* Two on one function: each has a cookie of its own. */
SEC("fsession/one")
int session_too(__u64 *ctx)
{
	__u64 *cookie = bpf_session_cookie(ctx);

	if (!bpf_session_is_return(ctx)) {
		check(12, *cookie == 0);
		*cookie = 7;
	} else {
		check(13, *cookie == 7);
	}
	return 0;
}

/* Runs once in each call, however deep the traced function itself goes. */
SEC("fentry/again")
int in_recursion(__u64 *ctx)
{
	state.runs[0]++;
	return 0;
}

SEC("fexit/again")
int out_of_recursion(__u64 *ctx)
{
	state.runs[1]++;
	return 0;
}

/* Takes its time, so that a signal finds it running. */
SEC("fentry/nothing")
int slow(__u64 *ctx)
{
	for (__u64 key = 0; key < 64; key++)
		bpf_map_update_elem(&table, &key, &key, BPF_ANY);
	__sync_fetch_and_add(&state.runs[2], 1);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
