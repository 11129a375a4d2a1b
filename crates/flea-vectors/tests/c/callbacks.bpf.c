/* Programs with callbacks. Each returns a number that the test knows. */
#include "../../../flea-object/tests/c/flea_test.h"

static long (*for_each)(void *map, void *callback, void *ctx, u64 flags) = (void *)164;
static long (*map_delete_elem)(void *map, const void *key) = (void *)3;

struct {
	__uint(type, ARRAY);
	__uint(max_entries, 10);
	__type(key, u32);
	__type(value, u64);
} array SEC(".maps");

struct {
	__uint(type, PERCPU_ARRAY);
	__uint(max_entries, 5);
	__type(key, u32);
	__type(value, u64);
} percpu_array SEC(".maps");

struct {
	__uint(type, HASH);
	__uint(max_entries, 64);
	__type(key, u64);
	__type(value, u64);
} hash SEC(".maps");

struct {
	__uint(type, PERCPU_HASH);
	__uint(max_entries, 64);
	__type(key, u32);
	__type(value, u64);
} percpu_hash SEC(".maps");

struct sum {
	u64 n;
	u64 total;
	u64 limit;
};

static long add(u32 i, struct sum *sum)
{
	if (sum->n >= sum->limit)
		return 1;
	sum->n++;
	sum->total += i;
	return 0;
}

/* 0 + 1 + ... + 99, and all rounds done. */
SEC("fentry/sum_of_all") u64 sum_of_all(u64 *ctx)
{
	struct sum sum = { .limit = 1000 };
	u64 n = loop(100, add, &sum, 0);

	return n * 100000 + sum.total;
}

/* The eleventh round stops. */
SEC("fentry/sum_of_some") u64 sum_of_some(u64 *ctx)
{
	struct sum sum = { .limit = 10 };
	u64 n = loop(100, add, &sum, 0);

	return n * 100000 + sum.total;
}

/* Rounds of a number that is known when it runs: ctx[0] & 63 is 1. */
SEC("fentry/unknown_rounds") u64 unknown_rounds(u64 *ctx)
{
	struct sum sum = { .limit = 1000 };
	u64 n = loop((ctx[0] & 63) + 5, add, &sum, 0);

	return n * 100000 + sum.total;
}

static long nothing(u32 i, void *ctx)
{
	return 0;
}

SEC("fentry/too_many") s64 too_many(u64 *ctx)
{
	return loop((1 << 23) + 1, nothing, 0, 0);
}

SEC("fentry/wrong_flags") s64 wrong_flags(u64 *ctx)
{
	return loop(5, nothing, 0, ctx[0]);
}

SEC("fentry/no_rounds") s64 no_rounds(u64 *ctx)
{
	return loop(ctx[0] & 2, nothing, 0, 0);
}

struct grid {
	u64 row;
	u64 cells;
};

static long column(u32 i, struct grid *grid)
{
	u64 key = grid->row * 8 + i, value = grid->row;

	map_update_elem(&hash, &key, &value, 0);
	grid->cells++;
	return 0;
}

static long row(u32 i, struct grid *grid)
{
	grid->row = i;
	loop(4, column, grid, 0);
	return 0;
}

static long add_element(void *map, const u64 *key, u64 *value, struct sum *sum)
{
	sum->n++;
	sum->total += *key * 1000 + *value;
	*value += 1;
	return 0;
}

static long drop_even(void *map, const u64 *key, u64 *value, void *ctx)
{
	if (!(*key & 1))
		map_delete_elem(map, key);
	return 0;
}

/* A loop in a loop fills a hash: rows 0 to 4 of 4 cells each. */
SEC("fentry/hash_elements") u64 hash_elements(u64 *ctx)
{
	struct grid grid = {};
	struct sum sum = {};

	loop(5, row, &grid, 0);
	for_each(&hash, drop_even, 0, 0);
	for_each(&hash, add_element, &sum, 0);
	u64 n = for_each(&hash, add_element, &sum, 0);
	return grid.cells * 100000000 + n * 1000000 + sum.total;
}

static long fill(u32 i, void *ctx)
{
	u32 key = i;
	u64 value = i * i;

	map_update_elem(&percpu_hash, &key, &value, 0);
	map_update_elem(&percpu_array, &key, &value, 0);
	map_update_elem(&array, &key, &value, 0);
	return 0;
}

static long add_indexed(void *map, const u32 *key, u64 *value, struct sum *sum)
{
	sum->n++;
	sum->total += *key * 1000 + *value;
	return sum->n == sum->limit;
}

SEC("fentry/percpu_hash_elements") u64 percpu_hash_elements(u64 *ctx)
{
	struct sum sum = {};

	loop(7, fill, 0, 0);
	return for_each(&percpu_hash, add_indexed, &sum, 0) * 1000000 + sum.total;
}

SEC("fentry/array_elements") u64 array_elements(u64 *ctx)
{
	struct sum sum = {};

	loop(20, fill, 0, 0);
	return for_each(&array, add_indexed, &sum, 0) * 1000000 + sum.total;
}

SEC("fentry/some_of_percpu_array") u64 some_of_percpu_array(u64 *ctx)
{
	struct sum sum = { .limit = 4 };

	loop(20, fill, 0, 0);
	return for_each(&percpu_array, add_indexed, &sum, 0) * 1000000 + sum.total;
}

/* The callback's frame is its own in each round. */
static __noinline u64 scramble(u64 x)
{
	volatile u64 local[4] = { x, x + 1, x + 2, x + 3 };

	return local[0] + 2 * local[3];
}

static long calls(u32 i, u64 *total)
{
	*total += scramble(i);
	return 0;
}

SEC("fentry/nested_calls") u64 nested_calls(u64 *ctx)
{
	u64 total = 0;

	loop(8, calls, &total, 0);
	return total;
}
