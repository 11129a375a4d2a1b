/* The functions that the tests of main.rs trace: own versions of the shapes that Linux's
 * bpf_fentry_test1..8, bpf_testmod_fentry_test7/11 and bpf_testmod_test_struct_arg_1..9 have. */
#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

#define TRACED __attribute__((noinline, noclone, noipa))
/* Keeps a call from being moved, merged or dropped. */
#define HERE() __asm__ volatile("" ::: "memory")

TRACED int one(int a)
{
	HERE();
	return a + 1;
}

TRACED int two(int a, uint64_t b)
{
	HERE();
	return a + (int)b;
}

TRACED int three(char a, int b, uint64_t c)
{
	HERE();
	return a + b + (int)c;
}

TRACED int four(void *a, char b, int c, uint64_t d)
{
	HERE();
	return (int)(intptr_t)a + b + c + (int)d;
}

TRACED int five(uint64_t a, void *b, short c, int d, uint64_t e)
{
	HERE();
	return (int)a + (int)(intptr_t)b + c + d + (int)e;
}

TRACED int six(uint64_t a, void *b, short c, int d, void *e, uint64_t f)
{
	HERE();
	return (int)a + (int)(intptr_t)b + c + d + (int)(intptr_t)e + (int)f;
}

struct node {
	struct node *next;
};

TRACED int null_pointer(struct node *a)
{
	HERE();
	return a != NULL;
}

TRACED int null_member(struct node *a)
{
	HERE();
	return a->next != NULL;
}

TRACED int seven(uint64_t a, void *b, short c, int d, void *e, char f, int g)
{
	HERE();
	return (int)a + (int)(intptr_t)b + c + d + (int)(intptr_t)e + f + g;
}

TRACED int eleven(uint64_t a, void *b, short c, int d, void *e, char f, int g, unsigned int h,
		  long i, uint64_t j, unsigned long k)
{
	HERE();
	return (int)a + (int)(intptr_t)b + c + d + (int)(intptr_t)e + f + g + (int)h + (int)i +
	       (int)j + (int)k;
}

struct pair {
	long a;
	long b;
};

struct small {
	int a;
	int b;
};

struct mixed {
	char a;
	short b;
	int c;
	long d;
};

struct large {
	long words[5];
};

TRACED int struct_first(struct pair a, int b, int c)
{
	HERE();
	return (int)(a.a + a.b + b + c);
}

TRACED int struct_middle(int a, struct pair b, int c)
{
	HERE();
	return (int)(a + b.a + b.b + c);
}

TRACED int struct_last(int a, int b, struct pair c)
{
	HERE();
	return (int)(a + b + c.a + c.b);
}

TRACED int struct_small(struct small a)
{
	HERE();
	return a.a + a.b;
}

/* The second struct finds one register left: it goes to the stack as a whole, and `f` still
 * gets that register. */
TRACED int struct_no_room(long a, long b, long c, struct pair d, struct pair e, int f, struct small g)
{
	HERE();
	return (int)(a + b + c + d.a + d.b + e.a + e.b + f + g.a + g.b);
}

TRACED int struct_mixed(uint64_t a, void *b, short c, int d, void *e, struct mixed f, int g)
{
	HERE();
	return (int)(a + (uintptr_t)b + c + d + (uintptr_t)e + f.a + f.b + f.c + f.d + g);
}

TRACED int struct_large(int a, struct large b, int c)
{
	HERE();
	return (int)(a + b.words[0] + b.words[4] + c);
}

TRACED int nothing(void)
{
	HERE();
	return 0;
}

TRACED int again(int depth)
{
	if (depth == 0)
		return 0;
	int below = again(depth - 1);
	HERE();
	return below + 1;
}
