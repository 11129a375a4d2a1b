/* Each function answers one question about any build of target.c. It knows the fields that it
 * asks for, in an order of its own. */
typedef unsigned long long u64;
typedef unsigned int u32;

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
enum color { RED, GREEN = 4000, BLUE = 4001 };
struct inner { int more; };
typedef struct { unsigned char y, x; } point_t;
struct node___mine {
	u32 small;
	long key;
	char text[8];
	unsigned a : 12;
	unsigned b : 12;
	int s : 12;
	int count;
	unsigned char gone;
	signed char negative;
	enum color color;
	struct inner in[3];
	struct node___mine *next;
	point_t at;
	union { float real; int number; } value;
	int grown[];
};
struct node___pointer { u64 next; };
struct only_here { int x; };
struct nowhere { int x; };
union either { int a; };
struct either___struct { int a; };
#pragma clang attribute pop

#define FIELD(field, kind) __builtin_preserve_field_info(field, kind)
#define OFFSET 0
#define SIZE 1
#define EXISTS 2
#define SIGNED 3
#define LSHIFT 4
#define RSHIFT 5
#define TYPE_EXISTS(type) __builtin_preserve_type_info(*(typeof(type) *)0, 0)
#define TYPE_SIZE(type) __builtin_preserve_type_info(*(typeof(type) *)0, 1)
#define VALUE_EXISTS(type, value) __builtin_preserve_enum_value(*(typeof(type) *)value, 0)
#define VALUE(type, value) __builtin_preserve_enum_value(*(typeof(type) *)value, 1)

#define BITS(s, field) ({ \
	const void *p = (const void *)(s) + FIELD((s)->field, OFFSET); \
	u64 val; \
	asm volatile("" : "+r"(p)); \
	switch (FIELD((s)->field, SIZE)) { \
	case 1: val = *(const unsigned char *)p; break; \
	case 2: val = *(const unsigned short *)p; break; \
	case 4: val = *(const unsigned int *)p; break; \
	default: val = *(const u64 *)p; break; \
	} \
	val <<= FIELD((s)->field, LSHIFT); \
	if (FIELD((s)->field, SIGNED)) \
		val = (u64)((long long)val >> FIELD((s)->field, RSHIFT)); \
	else \
		val = val >> FIELD((s)->field, RSHIFT); \
	val; })

#define QUESTION(name, answer) \
	__attribute__((section("fentry/describe"), used)) u64 name(u64 *ctx) { \
		struct node___mine *n = (void *)ctx[0]; \
		return answer; \
	}

QUESTION(next, (u64)n->next)
QUESTION(small, n->small)
QUESTION(count, n->count)
QUESTION(key, n->key)
QUESTION(text, n->text[3])
QUESTION(more, n->in[2].more)
QUESTION(a, BITS(n, a))
QUESTION(b, BITS(n, b))
QUESTION(s, BITS(n, s))
QUESTION(negative, (long long)BITS(n, negative))
QUESTION(color, n->color)
QUESTION(x_y, n->at.x << 8 | n->at.y)
QUESTION(number, n->value.number)
QUESTION(grown, n->grown[1])
QUESTION(size, TYPE_SIZE(struct node___mine))
QUESTION(size_typedef, TYPE_SIZE(point_t))
QUESTION(size_more, FIELD(n->in, SIZE))
QUESTION(blue, VALUE(enum color, BLUE))
QUESTION(gone, FIELD(n->gone, EXISTS) ? n->gone : 777)
QUESTION(green, VALUE_EXISTS(enum color, GREEN) ? VALUE(enum color, GREEN) : 1000)
QUESTION(signed_small, FIELD(n->small, SIGNED))
QUESTION(size_only_here, TYPE_SIZE(struct only_here))
QUESTION(exists, FIELD(n->gone, EXISTS)
	| FIELD(((struct node___pointer *)n)->next, EXISTS) << 1
	| TYPE_EXISTS(struct only_here) << 2
	| TYPE_EXISTS(struct nowhere) << 3
	| TYPE_EXISTS(union either) << 4
	| TYPE_EXISTS(struct either___struct) << 5
	| FIELD(((struct nowhere *)n)->x, EXISTS) << 6
	| FIELD(n->in[2].more, EXISTS) << 8)
QUESTION(live, n->gone)
