/* Programs that lead to each other, for ../tail_calls.rs. */
#include "flea_test.h"

static long (*tail_call)(void *ctx, void *map, u32 index) = (void *)12;

int twice(u64 *ctx);
int thrice(u64 *ctx);

/* Not the first variable of its section: offsets count from its own start. */
struct {
	__uint(type, HASH);
	__uint(max_entries, 3);
	__type(key, u32);
	__type(value, u32);
} before SEC(".maps");

struct {
	__uint(type, PROG_ARRAY);
	__uint(max_entries, 4);
	__uint(key_size, sizeof(u32));
	__array(values, int (u64 *));
} jumps SEC(".maps") = {
	.values = {
		[0] = (void *)&twice,
		[3] = (void *)&thrice,
	},
};

struct {
	__uint(type, PROG_ARRAY);
	__uint(max_entries, 1000);
	__type(key, u32);
	__type(value, u32);
} empty SEC(".maps");

u64 seen;

/* A target that is attached to nothing. */
SEC("fentry")
int twice(u64 *ctx)
{
	seen += 2;
	return 2 * ctx[0];
}

SEC("?fentry/f")
int thrice(u64 *ctx)
{
	seen += 3;
	tail_call(ctx, &jumps, 0);
	return 3 * ctx[0];
}

SEC("fentry/known")
int known(u64 *ctx)
{
	seen += 1;
	tail_call(ctx, &empty, 3);
	tail_call(ctx, &jumps, 3);
	return ctx[0];
}

SEC("fentry/unknown")
int unknown(u64 *ctx)
{
	tail_call(ctx, &jumps, ctx[1]);
	return 1;
}

static __noinline int called(u64 *ctx)
{
	int result = 1;

	tail_call(ctx, &jumps, 0);
	/* The compiler must not know what comes back: it may be the target's. */
	__asm__ volatile("" : "+r"(result));
	return result;
}

SEC("fentry/calls")
int calls(u64 *ctx)
{
	return called(ctx) + 100;
}
