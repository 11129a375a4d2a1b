/* Calls of `choose` by its argument, in one map for the even and one for the odd, each count
 * changed under its lock by whichever thread calls. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct count {
	__u32 calls;
	struct bpf_spin_lock lock;
};

struct half {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8);
	__type(key, __u32);
	__type(value, struct count);
};

struct half even SEC(".maps");
struct half odd SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 3);
	__type(key, __u32);
	__array(values, struct half);
} halves SEC(".maps") = {
	.values = { [0] = (void *)&even, [1] = (void *)&odd },
};

/* Only to be printed. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(max_entries, 4);
	__type(key, __u32);
	__array(values, struct half);
} by_name SEC(".maps") = {
	.values = { [7] = (void *)&odd },
};

SEC("fentry/choose")
int on_choose(__u64 *ctx)
{
	__u32 n = ctx[0], which = n & 1;
	void *half = bpf_map_lookup_elem(&halves, &which);
	struct count *count, none = {};

	if (!half)
		return 0;
	bpf_map_update_elem(half, &n, &none, BPF_NOEXIST);
	count = bpf_map_lookup_elem(half, &n);
	if (!count)
		return 0;
	bpf_spin_lock(&count->lock);
	count->calls++;
	bpf_spin_unlock(&count->lock);
	return 0;
}
