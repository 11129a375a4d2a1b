/* Loops and walks over maps, with callbacks: bpf_loop and bpf_for_each_map_elem. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

extern _Bool bpf_session_is_return(void *ctx) __ksym;

struct {
	__u64 rounds;
	__u64 sum;
	__u64 elements;
	__u64 total;
	__u64 own_elements;
	__u64 own_total;
	__u64 at_entry;
	__u64 at_return;
} state;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 256);
	__type(key, __u64);
	__type(value, __u64);
} table SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __u64);
} own SEC(".maps");

struct sum {
	__u64 total;
	__u64 by;
};

static long add(__u32 i, struct sum *sum)
{
	sum->total += i * sum->by;
	return 0;
}

/* two(a, b): the numbers below a, each times b. */
SEC("fentry/two")
int sum_up(__u64 *ctx)
{
	struct sum sum = { .by = ctx[1] };
	__u64 key = ctx[0], *seen;
	__u32 small = key & 7;
	__u64 one = 1;

	state.rounds += bpf_loop((__u32)ctx[0], add, &sum, 0);
	state.sum += sum.total;
	bpf_map_update_elem(&table, &key, &sum.total, BPF_ANY);
	seen = bpf_map_lookup_elem(&own, &small);
	if (seen)
		*seen += 1;
	else
		bpf_map_update_elem(&own, &small, &one, BPF_ANY);
	return 0;
}

static long drop(void *map, const __u64 *key, __u64 *value, struct sum *sum)
{
	sum->total += *value;
	bpf_map_delete_elem(map, key);
	return 0;
}

static long count(void *map, const __u32 *key, __u64 *value, struct sum *sum)
{
	sum->total += *value;
	return 0;
}

/* one(): all that was put into the table, and the table empty. */
SEC("fexit/one")
int take_all(__u64 *ctx)
{
	struct sum sum = {}, mine = {};

	state.elements += bpf_for_each_map_elem(&table, drop, &sum, 0);
	state.total += sum.total;
	state.own_elements = bpf_for_each_map_elem(&own, count, &mine, 0);
	state.own_total = mine.total;
	return 0;
}

static long count_entry(__u32 i, void *ctx)
{
	state.at_entry++;
	return 0;
}

static long count_return(__u32 i, void *ctx)
{
	state.at_return++;
	return i == 4;
}

SEC("fsession/three")
int both_sides(__u64 *ctx)
{
	if (bpf_session_is_return(ctx))
		bpf_loop(10, count_return, 0, 0);
	else
		bpf_loop(3, count_entry, 0, 0);
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
