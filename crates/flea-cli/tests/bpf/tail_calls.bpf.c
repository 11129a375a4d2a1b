/* Tail calls for ../tail_calls.rs: each program is attached to a function of the counting fixture,
 * or stands in an array. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

extern _Bool bpf_session_is_return(void *ctx) __ksym;
extern __u64 *bpf_session_cookie(void *ctx) __ksym;

enum { EVEN, ODD, MISSED, CHAINED, RESULTS, AROUND, CALLED, ENTERED, LEFT, WRONG, N_COUNTS };

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, N_COUNTS);
	__type(key, __u32);
	__type(value, __u64);
} counts SEC(".maps");

static __always_inline void add(__u32 what, __u64 n)
{
	__u64 *count = bpf_map_lookup_elem(&counts, &what);

	if (count)
		__sync_fetch_and_add(count, n);
}

int even(__u64 *ctx);
int odd(__u64 *ctx);
int chained(__u64 *ctx);
int around(__u64 *ctx);
int result(__u64 *ctx);
int session(__u64 *ctx);

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 7);
	__type(key, __u32);
	__array(values, int (__u64 *));
} at_entry SEC(".maps") = {
	.values = {
		[0] = (void *)&even,
		[1] = (void *)&odd,
		[2] = (void *)&even,
		[3] = (void *)&odd,
		[4] = (void *)&chained,
		[6] = (void *)&around,
	},
};

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, int (__u64 *));
} at_exit SEC(".maps") = { .values = { (void *)&result } };

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__array(values, int (__u64 *));
} at_both SEC(".maps") = { .values = { (void *)&session } };

SEC("fentry")
int even(__u64 *ctx)
{
	add(EVEN, 1);
	return 0;
}

SEC("fentry")
int odd(__u64 *ctx)
{
	add(ODD, 1);
	return 0;
}

SEC("?fentry/nowhere")
int chained(__u64 *ctx)
{
	add(CHAINED, 1);
	bpf_tail_call(ctx, &at_entry, 0);
	add(WRONG, 1);
	return 0;
}

/* 0 to 7: 5 is empty, 7 is past the end. */
SEC("fentry/choose")
int chooses(__u64 *ctx)
{
	int n = ctx[0];

	bpf_tail_call(ctx, &at_entry, n == 6 ? 5 : n);
	add(MISSED, 1);
	return 0;
}

/* Until there were 33. */
SEC("fentry/leaf")
int around(__u64 *ctx)
{
	add(AROUND, 1);
	bpf_tail_call(ctx, &at_entry, 6);
	return 0;
}

SEC("fexit/add")
int before_result(__u64 *ctx)
{
	bpf_tail_call(ctx, &at_exit, 0);
	add(WRONG, 1);
	return 0;
}

SEC("fexit")
int result(__u64 *ctx)
{
	__u64 value = 0;

	bpf_get_func_ret(ctx, &value);
	add(RESULTS, (int)value);
	return 0;
}

/* Comes back with 0 where the array is used, with 1 where it is not. */
static __noinline int calls(void *ctx, __u32 index)
{
	int result = 1;

	bpf_tail_call(ctx, &at_entry, index);
	asm volatile("" : "+r"(result));
	return result;
}

SEC("fentry/narrow")
int caller(__u64 *ctx)
{
	if (calls(ctx, 1) == 0 && calls(ctx, 5) == 1)
		add(CALLED, 1);
	return 0;
}

SEC("fsession/str")
int before_session(__u64 *ctx)
{
	bpf_tail_call(ctx, &at_both, 0);
	add(WRONG, 1);
	return 0;
}

SEC("fsession")
int session(__u64 *ctx)
{
	__u64 *cookie = bpf_session_cookie(ctx);

	if (bpf_session_is_return(ctx)) {
		add(LEFT, 1);
		if (*cookie != ctx[0])
			add(WRONG, 1);
	} else {
		add(ENTERED, 1);
		*cookie = ctx[0];
	}
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
