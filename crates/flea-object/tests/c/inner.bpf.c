/* Maps of maps, and values with a lock. */
#include "flea_test.h"

struct route {
	u64 hits;
	struct bpf_spin_lock lock;
	u32 weight;
};

/* The shape of what `routes` holds, and two such maps; one of them is static, which the compiler
 * refers to in another way. */
struct table {
	__uint(type, HASH);
	__uint(max_entries, 16);
	__type(key, u32);
	__type(value, struct route);
};

struct table north SEC(".maps");
static struct table south SEC(".maps");

struct {
	__uint(type, ARRAY_OF_MAPS);
	__uint(max_entries, 4);
	__type(key, u32);
	__array(values, struct table);
} routes SEC(".maps") = {
	.values = { [0] = &north, [2] = &south },
};

/* Arrays of any length. */
struct list {
	__uint(type, ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, 1 << 12);
	__type(key, u32);
	__type(value, u64);
};

struct {
	__uint(type, ARRAY);
	__uint(max_entries, 9);
	__uint(map_flags, 1 << 12);
	__type(key, u32);
	__type(value, u64);
} nine SEC(".maps");

struct {
	__uint(type, HASH_OF_MAPS);
	__uint(max_entries, 8);
	__uint(key_size, 4);
	__uint(value_size, 4);
	__array(values, struct list);
} lists SEC(".maps") = {
	.values = { [5] = (void *)&nine },
};

/* A lock among global variables, which has a section of its own as the compiler may put
 * variables of one section anywhere. */
struct bpf_spin_lock global_lock SEC(".data.guarded");
u64 guarded SEC(".data.guarded");
u64 before;

SEC("fentry/f") u64 route(u64 *ctx)
{
	u32 key = 0;
	void *table = map_lookup_elem(&routes, &key);
	struct route *route;

	if (!table)
		return 1;
	key = ctx[0];
	route = map_lookup_elem(table, &key);
	if (!route)
		return 2;
	spin_lock(&route->lock);
	route->hits += route->weight;
	spin_unlock(&route->lock);
	spin_lock(&global_lock);
	guarded++;
	spin_unlock(&global_lock);
	before++;
	return 0;
}

SEC("fentry/f") u64 list(u64 *ctx)
{
	u32 key = ctx[0];
	void *list = map_lookup_elem(&lists, &key);
	u64 *value;

	if (!list)
		return 1;
	key = 8;
	value = map_lookup_elem(list, &key);
	return value ? *value : 2;
}

/* Never read: only that their maps are found to be of these shapes. */
struct nested {
	struct { u16 a; struct { struct bpf_spin_lock one[1]; } b; } inside;
};
struct {
	__uint(type, ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct nested);
} deep SEC(".maps");
