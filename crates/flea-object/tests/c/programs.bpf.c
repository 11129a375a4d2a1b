/* One of everything that an object may hold. */
#include "flea_test.h"

struct event {
	u64 when;
	u32 what;
};

struct {
	__uint(type, HASH);
	__uint(max_entries, 100);
	__type(key, u64);
	__type(value, struct event);
} by_address SEC(".maps");

/* Referred to by its section's symbol, not its own. */
static struct {
	__uint(type, PERCPU_ARRAY);
	__uint(max_entries, 3);
	__uint(key_size, sizeof(u32));
	__uint(value_size, 24);
} counts SEC(".maps");

struct {
	__uint(type, RINGBUF);
	__uint(max_entries, 1 << 16);
} events SEC(".maps");

typedef const u32 key_type;
struct {
	__uint(type, ARRAY);
	__uint(map_flags, 1 << 7);
	__uint(max_entries, 5);
	__type(key, key_type);
	__type(value, u16[3]);
} settings SEC(".maps");

u64 total = 40;
u64 hits;
static u32 seen_twice[4] = { 1, 2, 3, 4 };
const volatile u32 limit = 7;
u64 elsewhere SEC(".data.elsewhere") = 11;
u64 nobody_looks_here SEC(".data.unused") = 12;

static __noinline u64 twice(u64 x)
{
	seen_twice[x & 3]++;
	return x * 2 + total;
}

__noinline u64 thrice(u64 x)
{
	return twice(x) + x + limit;
}

static long each(u32 index, void *ctx)
{
	hits += index;
	return 0;
}

SEC("fentry/malloc")
u64 on_malloc(u64 *ctx)
{
	struct event e = { ktime_get_ns(), (u32)ctx[0] };
	u64 key = ctx[0];

	hits++;
	map_update_elem(&by_address, &key, &e, 0);
	ringbuf_output(&events, &e, sizeof(e), 0);
	return 0;
}

SEC("fexit/libc.so.6:malloc")
u64 on_malloc_return(u64 *ctx)
{
	u32 zero = 0;
	u64 *count = map_lookup_elem(&counts, &zero);

	if (count)
		*count += thrice(ctx[1]);
	return elsewhere;
}

SEC("?fentry/free")
u64 on_free(u64 *ctx)
{
	u32 zero = 0;

	if (!map_lookup_elem(&settings, &zero))
		trace_printk("freed %d\n", sizeof("freed %d\n"), seen_twice[1]);
	return twice(ctx[0]);
}

SEC("fentry/free")
u64 on_free_too(u64 *ctx)
{
	return loop(10, each, 0, 0);
}

SEC("fentry")
u64 anywhere(u64 *ctx)
{
	return 0;
}

char _license[] SEC("license") = "Dual MIT/GPL";
