/* Probes as they are written for the kernel, on the functions of the fixture counts.c: paths,
 * libbpf's macros, `.multi` forms. What it must find out is in ../probes.rs. */
#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

/* Of libbpf 1.2. */
#ifndef BPF_UPROBE
#define BPF_UPROBE(name, args...) BPF_KPROBE(name, ##args)
#define BPF_URETPROBE(name, args...) BPF_KRETPROBE(name, ##args)
#endif

struct by_address {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u64);
	__type(value, __u64);
};

struct by_address entries SEC(".maps");
struct by_address returns SEC(".maps");

/* One structure, so that the reader knows where each word is. */
struct {
	__u64 adds;
	__u64 add_sum;
	__u64 stack_args;
	__u64 wrong_returns;
	__u64 wrong_frames;
	__u64 cookies;
	__u64 some;
	__u64 manual;
	__u64 fentries;
} seen;

static void count(void *map, __u64 key)
{
	__u64 one = 1, *count = bpf_map_lookup_elem(map, &key);

	if (count)
		__sync_fetch_and_add(count, 1);
	else if (bpf_map_update_elem(map, &key, &one, BPF_NOEXIST)) {
		/* Another thread was faster. */
		count = bpf_map_lookup_elem(map, &key);
		if (count)
			__sync_fetch_and_add(count, 1);
	}
}

SEC("uprobe/add")
int BPF_UPROBE(add_entry, int a, int b)
{
	__sync_fetch_and_add(&seen.adds, 1);
	__sync_fetch_and_add(&seen.add_sum, (long)a + b);
	return 0;
}

SEC("uretprobe//proc/self/exe:add")
int BPF_URETPROBE(add_exit, int sum)
{
	__sync_fetch_and_add(&seen.add_sum, -(long)sum);
	return 1;
}

/* The eighth argument is on the stack, above the return address, which is where the uretprobe
 * says that it is. */
SEC("uprobe/" BIN ":big")
int big_entry(struct pt_regs *ctx)
{
	__u64 arg = 0, returns_to = 0;

	bpf_probe_read_user(&arg, 8, (void *)(PT_REGS_SP(ctx) + 16));
	bpf_probe_read_user(&returns_to, 8, (void *)PT_REGS_SP(ctx));
	__sync_fetch_and_add(&seen.stack_args, arg);
	if (PT_REGS_IP(ctx) != bpf_get_func_ip(ctx) || !returns_to)
		__sync_fetch_and_add(&seen.wrong_returns, 1);
	__sync_fetch_and_add(&seen.cookies, bpf_get_attach_cookie(ctx));
	return 0;
}

SEC("uretprobe/" BIN ":big")
int big_exit(struct pt_regs *ctx)
{
	__u64 returns_to = 0;

	bpf_probe_read_user(&returns_to, 8, (void *)(PT_REGS_SP(ctx) - 8));
	if (returns_to != PT_REGS_IP(ctx))
		__sync_fetch_and_add(&seen.wrong_frames, 1);
	return 0;
}

SEC("uprobe.multi//proc/self/exe:*")
int every_entry(struct pt_regs *ctx)
{
	count(&entries, bpf_get_func_ip(ctx));
	return 0;
}

SEC("uretprobe.multi/" BIN ":*")
int every_return(struct pt_regs *ctx)
{
	count(&returns, bpf_get_func_ip(ctx));
	return 0;
}

SEC("fentry.multi/tail*")
int some_entries(void *ctx)
{
	__sync_fetch_and_add(&seen.some, 1);
	return 0;
}

/* Needs a second argument: functions with fewer are left out. */
SEC("fentry.multi/????")
int second_argument(__u64 *ctx)
{
	__sync_fetch_and_add(&seen.fentries, ctx[1] != 12345678901234);
	return 0;
}

/* No function in its name, and nobody asks for it. */
SEC("?uprobe")
int by_hand(struct pt_regs *ctx)
{
	__sync_fetch_and_add(&seen.manual, 1);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
