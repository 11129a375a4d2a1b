/* fmod_ret programs for ../modify_return.rs, each for one of its tests. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

enum { LARGE = 100 << 20 };

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} calls SEC(".maps");

/* Nothing larger comes from the kernel, so malloc has nothing to give. */
SEC("fmod_ret/libc.so.6:mmap")
long BPF_PROG(no_mmap, void *address, unsigned long size)
{
	return size >= LARGE ? -1 : 0;
}

SEC("fmod_ret/libc.so.6:sbrk")
long BPF_PROG(no_sbrk, long more)
{
	return more >= LARGE ? -1 : 0;
}

SEC("?fmod_ret")
long skip(void *ctx)
{
	return 1;
}

/* 7.0 */
SEC("?fmod_ret")
long skip_double(void *ctx)
{
	return 0x401c000000000000;
}

SEC("?fmod_ret")
long only_count(void *ctx)
{
	__u32 zero = 0;
	__u64 *n = bpf_map_lookup_elem(&calls, &zero);

	if (n)
		*n += 1;
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
