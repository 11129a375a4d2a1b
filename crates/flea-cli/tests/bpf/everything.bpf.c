/* Each map type, program type and helper that `flea run` has, on the functions of the fixture
 * counts.c; what it must find out is in ../run.rs. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

extern _Bool bpf_session_is_return(void *ctx) __ksym;
extern __u64 *bpf_session_cookie(void *ctx) __ksym;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 8);
	__type(key, __u32);
	__type(value, __u64);
} chosen SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, __u64);
	__type(value, __u64);
} lengths SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} leaves SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 16);
	__type(key, __u64);
	__type(value, __u64);
} depths SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} events SEC(".maps");

/* One structure, so that the reader knows where each word is. */
struct {
	__u64 string_bytes;
	__u64 wrong_strings;
	__u64 stack_args;
	__u64 big_results;
	__u64 big_arg_cnt;
	__u64 big_ip;
	__u64 cookies;
	__u64 pid;
	__u64 wrong_pids;
	char comm[16];
	__u64 clock_backwards;
	__u64 sessions;
	__u64 session_sum;
	__u64 wrong_sessions;
	__u64 ring_bytes;
	__u64 add_sum;
} seen;

__u64 first_pid = 1;	/* .data */
const volatile __u32 printed = 5;	/* .rodata */

SEC("fentry/choose")
int BPF_PROG(on_choose, int n)
{
	__u32 index = n;
	__u64 *count = bpf_map_lookup_elem(&chosen, &index);

	if (count)
		__sync_fetch_and_add(count, 1);
	if (index == printed)
		bpf_printk("choose %d of %s", n, "eight");
	return 0;
}

SEC("fexit/str")
int BPF_PROG(on_str, const char *s, unsigned long length)
{
	char text[32];
	long n = bpf_probe_read_user_str(text, sizeof text, s);
	__u64 key = length, one = 1, *count;

	if (n < 1 || (unsigned long)n != length + 1 ||
	    (text[0] != 0 && text[0] != 'a' && text[0] != 'f'))
		__sync_fetch_and_add(&seen.wrong_strings, 1);
	__sync_fetch_and_add(&seen.string_bytes, n);
	count = bpf_map_lookup_elem(&lengths, &key);
	if (count)
		__sync_fetch_and_add(count, 1);
	else if (bpf_map_update_elem(&lengths, &key, &one, BPF_NOEXIST)) {
		/* Another thread was faster. */
		count = bpf_map_lookup_elem(&lengths, &key);
		if (count)
			__sync_fetch_and_add(count, 1);
	}
	return 0;
}

SEC("fentry/leaf")
int on_leaf(void *ctx)
{
	__u32 index = 1;
	__u64 *count = bpf_map_lookup_elem(&leaves, &index);

	if (count)
		*count += 1;
	return 0;
}

SEC("fentry/down")
int BPF_PROG(on_down, long n)
{
	__u64 key = n, one = 1, *count;

	count = bpf_map_lookup_elem(&depths, &key);
	if (count)
		*count += 1;
	else
		bpf_map_update_elem(&depths, &key, &one, BPF_ANY);
	return 0;
}

SEC("fexit/big")
int on_big(__u64 *ctx)
{
	__u64 arg = 0, result = 0;

	if (bpf_get_func_arg(ctx, 7, &arg) == 0)
		__sync_fetch_and_add(&seen.stack_args, arg);
	if (bpf_get_func_ret(ctx, &result) == 0)
		__sync_fetch_and_add(&seen.big_results, result);
	seen.big_arg_cnt = bpf_get_func_arg_cnt(ctx);
	seen.big_ip = bpf_get_func_ip(ctx);
	__sync_fetch_and_add(&seen.cookies, bpf_get_attach_cookie(ctx));
	return 0;
}

SEC("fentry/tail")
int on_tail(void *ctx)
{
	__u64 pid = bpf_get_current_pid_tgid() >> 32;
	__u64 *event, before = bpf_ktime_get_ns();

	if (first_pid == 1)
		first_pid = pid;
	seen.pid = pid;
	if (first_pid != pid)
		__sync_fetch_and_add(&seen.wrong_pids, 1);
	bpf_get_current_comm(seen.comm, sizeof seen.comm);
	event = bpf_ringbuf_reserve(&events, 24, 0);
	if (event) {
		event[0] = pid;
		event[1] = before;
		event[2] = bpf_ktime_get_ns();
		if (event[2] < before)
			__sync_fetch_and_add(&seen.clock_backwards, 1);
		bpf_ringbuf_submit(event, 0);
	}
	return 0;
}

/* The cookie carries the first argument to the exit. */
SEC("fsession/hidden")
int on_hidden(__u64 *ctx)
{
	__u64 *cookie = bpf_session_cookie(ctx);

	if (!bpf_session_is_return(ctx)) {
		*cookie = (int)ctx[0] + 1;
		return 0;
	}
	__sync_fetch_and_add(&seen.sessions, 1);
	__sync_fetch_and_add(&seen.session_sum, (long)(int)ctx[2]);
	if (*cookie != (__u64)((int)ctx[0] + 1))
		__sync_fetch_and_add(&seen.wrong_sessions, 1);
	return 0;
}

/* Two programs on one function, of two kinds. */
SEC("fentry/add")
int BPF_PROG(add_entry, int a, int b)
{
	__sync_fetch_and_add(&seen.add_sum, (long)a + b);
	return 0;
}

SEC("fexit/add")
int BPF_PROG(add_exit, int a, int b, int sum)
{
	__sync_fetch_and_add(&seen.add_sum, -(long)sum);
	seen.ring_bytes = bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
