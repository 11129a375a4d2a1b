/* The same object for Flea and for the kernel: what struct pt_regs holds at both ends. */
#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

/* Of libbpf 1.2. */
#ifndef BPF_UPROBE
#define BPF_UPROBE(name, args...) BPF_KPROBE(name, ##args)
#define BPF_URETPROBE(name, args...) BPF_KRETPROBE(name, ##args)
#endif

enum { N_REGS = sizeof(struct pt_regs) / 8 };

struct seen {
	__u64 entry[N_REGS];
	__u64 exit[N_REGS];
	__u64 n_entry;
	__u64 n_exit;
	__u64 params;
	__u64 results;
	__u64 others;
	__u64 ip;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct seen);
} seen SEC(".maps");

static struct seen *get(void)
{
	__u32 key = 0;

	return bpf_map_lookup_elem(&seen, &key);
}

SEC("uprobe/probed")
int all_at_entry(struct pt_regs *ctx)
{
	struct seen *s = get();
	int i;

	if (!s)
		return 0;
#pragma unroll
	for (i = 0; i < N_REGS; i++)
		s->entry[i] = ((volatile __u64 *)ctx)[i];
	return 1;
}

SEC("uretprobe/probed")
int all_at_exit(struct pt_regs *ctx)
{
	struct seen *s = get();
	int i;

	if (!s)
		return 0;
#pragma unroll
	for (i = 0; i < N_REGS; i++)
		s->exit[i] = ((volatile __u64 *)ctx)[i];
	return 1;
}

SEC("uprobe/probed")
int BPF_UPROBE(params, long a, int b, void *c, long d, char e)
{
	struct seen *s = get();

	if (!s)
		return 0;
	s->n_entry++;
	s->params += a + 3 * (long)b + 5 * (long)c + 7 * d + 11 * (long)e;
	s->others ^= PT_REGS_PARM1(ctx) + PT_REGS_PARM5(ctx) + ctx->r9 + PT_REGS_SP(ctx) + PT_REGS_FP(ctx);
	s->ip = PT_REGS_IP(ctx) - bpf_get_func_ip(ctx);
	return 0;
}

SEC("uretprobe/probed")
int BPF_URETPROBE(result, long ret)
{
	struct seen *s = get();

	if (!s)
		return 0;
	s->n_exit++;
	s->results += ret + PT_REGS_RC(ctx);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
