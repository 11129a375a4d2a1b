/* Classic mistakes, one program each: what people are told of them is in reports.txt beside this
 * file, made from mistakes.bpf.o, which is kept because instructions differ between compilers:
 *
 *   clang -target bpf -O2 -g -fdebug-compilation-dir=. -c mistakes.bpf.c -o mistakes.bpf.o
 */
typedef unsigned char u8;
typedef unsigned int u32;
typedef int s32;
typedef unsigned long long u64;
typedef long long s64;

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, value) int (*name)[value]
#define __type(name, of) of *name
#define barrier_var(x) asm volatile("" : "+r"(x))

static void *(*bpf_map_lookup_elem)(void *map, const void *key) = (void *)1;
static u64 (*bpf_ktime_get_ns)(void) = (void *)5;
static long (*bpf_probe_read_user)(void *dst, u32 size, const void *src) = (void *)112;
static long (*bpf_probe_read_user_str)(void *dst, u32 size, const void *src) = (void *)114;
static long (*bpf_ringbuf_output)(void *ring, void *data, u64 size, u64 flags) = (void *)130;
static void *(*bpf_ringbuf_reserve)(void *ring, u64 size, u64 flags) = (void *)131;
static void (*bpf_ringbuf_submit)(void *record, u64 flags) = (void *)132;
static long (*bpf_get_func_ret)(void *ctx, u64 *value) = (void *)184;

struct row {
	u64 cells[8];
};

struct event {
	u8 kind;
	u64 when;
};

struct {
	__uint(type, 1);
	__uint(max_entries, 64);
	__type(key, u64);
	__type(value, u64);
} counts SEC(".maps");

struct {
	__uint(type, 2);
	__uint(max_entries, 4);
	__type(key, u32);
	__type(value, struct row);
} rows SEC(".maps");

struct {
	__uint(type, 27);
	__uint(max_entries, 4096);
} events SEC(".maps");

const volatile u64 limit = 8;
u64 total;

#define PROGRAM(name) SEC("fentry/f") int name(u64 *ctx)

PROGRAM(missing_null_check)
{
	u64 key = ctx[0];
	u64 *count = bpf_map_lookup_elem(&counts, &key);

	*count += 1;
	return 0;
}

PROGRAM(null_check_of_another)
{
	u64 key = ctx[0], other = ctx[1];
	u64 *a = bpf_map_lookup_elem(&counts, &key);
	u64 *b = bpf_map_lookup_elem(&counts, &other);

	if (!a)
		return 0;
	*b += 1;
	return 0;
}

PROGRAM(unbounded_index)
{
	u32 key = 0;
	struct row *row = bpf_map_lookup_elem(&rows, &key);
	u64 i = ctx[0];

	if (!row)
		return 0;
	return row->cells[i];
}

PROGRAM(index_one_too_far)
{
	u32 key = 0;
	struct row *row = bpf_map_lookup_elem(&rows, &key);
	u64 i = ctx[0];

	if (!row || i > 8)
		return 0;
	return row->cells[i];
}

PROGRAM(index_below_zero)
{
	u32 key = 0;
	struct row *row = bpf_map_lookup_elem(&rows, &key);
	s64 i = ctx[0];

	if (!row || i > 7)
		return 0;
	return row->cells[i];
}

PROGRAM(index_bound_unknown)
{
	u32 key = 0;
	struct row *row = bpf_map_lookup_elem(&rows, &key);
	u64 i = ctx[0], n = ctx[1];

	if (!row || i >= n)
		return 0;
	return row->cells[i];
}

PROGRAM(mask_too_wide)
{
	u32 key = 0;
	struct row *row = bpf_map_lookup_elem(&rows, &key);

	if (!row)
		return 0;
	return row->cells[ctx[0] & 15];
}

PROGRAM(constant_past_the_value)
{
	u32 key = 0;
	struct row *row = bpf_map_lookup_elem(&rows, &key);

	if (!row)
		return 0;
	return *(&row->cells[0] + 9);
}

PROGRAM(index_from_a_map)
{
	u32 key = 0;
	struct row *row = bpf_map_lookup_elem(&rows, &key);

	if (!row)
		return 0;
	return row->cells[row->cells[0]];
}

PROGRAM(uninitialised_key)
{
	u64 key[1];

	barrier_var(ctx);
	return bpf_map_lookup_elem(&counts, key) != 0;
}

PROGRAM(padding_not_written)
{
	struct event e;

	e.kind = 1;
	e.when = bpf_ktime_get_ns();
	bpf_ringbuf_output(&events, &e, sizeof(e), 0);
	return 0;
}

PROGRAM(leaked_record)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e)
		return 0;
	e->when = ctx[0];
	if (ctx[0] == 7)
		return 0;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

PROGRAM(record_used_after_submit)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e)
		return 0;
	bpf_ringbuf_submit(e, 0);
	e->when = 1;
	return 0;
}

PROGRAM(record_not_checked)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	e->when = 1;
	bpf_ringbuf_submit(e, 0);
	return 0;
}

PROGRAM(record_moved)
{
	struct event *e = bpf_ringbuf_reserve(&events, sizeof(*e), 0);

	if (!e)
		return 0;
	bpf_ringbuf_submit((u8 *)e + 8, 0);
	return 0;
}

PROGRAM(record_of_unknown_size)
{
	void *e = bpf_ringbuf_reserve(&events, ctx[0] & 63, 0);

	if (e)
		bpf_ringbuf_submit(e, 0);
	return 0;
}

PROGRAM(wrong_helper_argument)
{
	return bpf_map_lookup_elem(&counts, (void *)ctx[0]) != 0;
}

PROGRAM(map_and_key_swapped)
{
	u64 key = ctx[0];

	return bpf_map_lookup_elem(&key, &counts) != 0;
}

PROGRAM(wrong_kind_of_map)
{
	u32 key = 0;

	return bpf_map_lookup_elem(&events, &key) != 0;
}

PROGRAM(context_past_the_end)
{
	return ctx[5];
}

PROGRAM(context_index_unknown)
{
	return ctx[ctx[0] & 1];
}

PROGRAM(context_between_words)
{
	return *(volatile u32 *)((char *)ctx + 6);
}

PROGRAM(context_written)
{
	*(volatile u64 *)ctx = 1;
	return 0;
}

PROGRAM(pointer_of_the_target)
{
	u64 *p = (u64 *)ctx[0];

	return *p;
}

PROGRAM(infinite_loop)
{
	u64 i = 0;

	while (i < 10)
		barrier_var(ctx);
	return 0;
}

PROGRAM(buffer_too_small)
{
	char name[16];

	bpf_probe_read_user_str(name, 64, (void *)ctx[0]);
	return name[0];
}

PROGRAM(size_unknown)
{
	char text[64] = {};
	u64 n = ctx[1];

	bpf_probe_read_user(text, n, (void *)ctx[0]);
	return text[0];
}

PROGRAM(constant_written)
{
	*(volatile u64 *)&limit = 9;
	return 0;
}

PROGRAM(variable_index_into_globals)
{
	u64 i = ctx[0];

	if (i > 2)
		return 0;
	return *(volatile u64 *)((u8 *)&total + 8 * i);
}

PROGRAM(pointer_times_two)
{
	u32 key = 0;
	u64 row = (u64)bpf_map_lookup_elem(&rows, &key);

	row *= 2;
	barrier_var(row);
	return 0;
}

SEC("fentry/f") u64 pointer_returned(u64 *ctx)
{
	u32 key = 0;

	return (u64)bpf_map_lookup_elem(&rows, &key);
}

PROGRAM(result_not_asked_for)
{
	u64 value;

	if (bpf_get_func_ret(ctx, &value))
		return 0;
	return ctx[7];
}

static __attribute__((noinline)) u64 fill(u64 seed)
{
	volatile u64 words[50];

	for (int i = 0; i < 50; i++)
		words[i] = seed;
	return words[seed & 1 ? 3 : 7];
}

PROGRAM(stack_too_large)
{
	volatile u64 words[30];

	for (int i = 0; i < 30; i++)
		words[i] = ctx[0];
	return fill(words[3]) + words[5];
}

static __attribute__((noinline)) u64 cell(struct row *row, u64 i)
{
	return row->cells[i];
}

PROGRAM(index_handed_to_a_function)
{
	u32 key = 0;
	struct row *row = bpf_map_lookup_elem(&rows, &key);

	if (!row)
		return 0;
	return cell(row, ctx[1]);
}

/* Not static: verified for any caller, also one that passes NULL. */
__attribute__((noinline)) u64 first_cell(struct row *row)
{
	return row->cells[0];
}

PROGRAM(global_function_without_check)
{
	u32 key = 0;
	struct row *row = bpf_map_lookup_elem(&rows, &key);

	if (!row)
		return 0;
	return first_cell(row);
}

PROGRAM(global_function_of_an_unwritten_struct)
{
	struct row row;

	row.cells[0] = ctx[0];
	barrier_var(ctx);
	return first_cell(&row);
}

PROGRAM(argument_lost_by_a_call)
{
	u64 now;

	asm volatile("r1 = 5; call 5; %0 = r1" : "=r"(now) : : "r0", "r1", "r2", "r3", "r4", "r5");
	return now;
}

char _license[] SEC("license") = "GPL";
