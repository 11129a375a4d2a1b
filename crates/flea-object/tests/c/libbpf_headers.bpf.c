/* Written as people write them: with libbpf's headers. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, __u64);
} sizes SEC(".maps");

SEC("fentry/libc.so.6:malloc")
int BPF_PROG(count_sizes, unsigned long size)
{
	__u64 key = size, one = 1;
	__u64 *count = bpf_map_lookup_elem(&sizes, &key);

	if (count)
		__sync_fetch_and_add(count, 1);
	else
		bpf_map_update_elem(&sizes, &key, &one, BPF_ANY);
	bpf_printk("malloc(%lu)", size);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
