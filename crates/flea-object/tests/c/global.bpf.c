/* Global functions, with every kind of parameter, and others that look like them. */
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define __noinline __attribute__((noinline))
#define __hidden __attribute__((visibility("hidden")))
#define __arg_ctx __attribute__((btf_decl_tag("arg:ctx")))
#define __arg_nonnull __attribute__((btf_decl_tag("arg:nonnull")))

struct pair {
	u64 first;
	u32 second;
	u8 third[4];
};

struct tight {
	u8 first;
	u64 second;
} __attribute__((packed));

struct opaque;

struct pt_regs;

enum kind { KIND_A, KIND_B };

__noinline int numbers(int a, u64 b, enum kind c, u8 d)
{
	return a + b * 3 + c + (d ^ 1);
}

__noinline u64 pairs(struct pair *p, const struct pair *q __arg_nonnull, u32 *n)
{
	if (!p || !n)
		return q->first;
	p->first += *n;
	p->third[2] ^= q->second;
	*n += p->second;
	return p->first * 5 + q->third[1];
}

__noinline int bytes(u8 (*buf)[12], struct tight *t)
{
	if (!buf || !t)
		return -1;
	return (*buf)[11] + t->second;
}

__noinline int contexts(void *ctx, u64 *also __arg_ctx)
{
	return also[1] + (ctx != 0);
}

__noinline int unknown(struct opaque *what)
{
	return what != 0;
}

__noinline int probed(struct pt_regs *regs)
{
	return *(volatile u64 *)regs + 1;
}

static __noinline int not_global(struct opaque *what, u64 n)
{
	return (what != 0) + n;
}

__hidden __noinline int only_here(u64 n)
{
	return n * 7;
}

__noinline void nothing(u64 *p)
{
	if (p)
		*p = 1;
}

/* r1: 64 bytes of memory, for the interpreter and compiled code. */
SEC("fentry/f") u64 run(u64 *memory)
{
	struct pair p = { .first = memory[0], .second = memory[1], .third = { 1, 2, 3, 4 } };
	struct pair q = { .first = memory[2], .second = memory[3], .third = { 4, memory[4], 6, 7 } };
	u32 n = memory[5];
	u64 sum = 0;

	for (int i = 0; i < 4; i++)
		sum = sum * 31 + pairs(i == 2 ? 0 : &p, &q, &n);
	memory[6] = p.first ^ n;
	sum += numbers(n, sum, n & 1 ? KIND_A : KIND_B, memory[7]);
	sum = sum * 31 + pairs((struct pair *)memory, (struct pair *)(memory + 4), (u32 *)(memory + 3));
	return sum + only_here(n) + p.third[2];
}

SEC("fentry/f") int all(u64 *ctx)
{
	u64 n = ctx[0];
	u8 buf[12] = {};
	struct tight t = {};

	nothing(&n);
	return bytes(&buf, &t) + contexts(ctx, ctx) + unknown((void *)n) + not_global((void *)n, 2);
}

SEC("uprobe") int probe(struct pt_regs *regs)
{
	return probed(regs);
}
