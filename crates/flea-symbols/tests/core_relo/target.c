/* A program in several builds. It says what is in a `struct node`, its bytes, and the answers
 * that a program for any of its builds must find. */
#include <stdio.h>
#include <string.h>

#ifdef MOVED
enum color { BLUE = 77, RED = 1, WHITE = 3 };
typedef struct { char pad[24]; unsigned char x, y; } point_t;
struct inner { long before; int more; short tag; };
struct node {
	char head[33];
	int count;
	unsigned long small;
	struct { struct { union { char text[8]; long key; }; }; };
	struct inner in[5];
	unsigned long b : 40, a : 20;
	struct node *next;
	int s : 29;
	signed char negative;
	enum color color;
	point_t at;
	union { int number; float real; } value;
	int grown[];
};
#else
enum color { RED, GREEN = 5, BLUE };
typedef struct { unsigned char x, y; } point_t;
struct inner { short tag; int more; };
struct node {
	struct node *next;
	unsigned int small;
	int count;
	unsigned a : 3, b : 9;
	int s : 5;
	union { long key; char text[8]; };
	struct inner in[3];
	unsigned char gone;
	signed char negative;
	enum color color;
	point_t at;
	union { int number; float real; } value;
	int grown[];
};
struct only_here { int x; };
struct only_here *only_here;
#endif
union either { int a; } either;

#define SAY(name, value) printf("%s %llx\n", name, (unsigned long long)(value))

long describe(struct node *n) {
	const unsigned char *bytes = (const unsigned char *)n;
	printf("image ");
	for (unsigned i = 0; i < sizeof *n + 8; i++) printf("%02x", bytes[i]);
	printf("\n");
	SAY("next", n->next);
	SAY("small", n->small);
	SAY("count", n->count);
	SAY("key", n->key);
	SAY("text", n->text[3]);
	SAY("more", n->in[2].more);
	SAY("a", n->a);
	SAY("b", n->b);
	SAY("s", (long long)n->s);
	SAY("negative", n->negative);
	SAY("color", n->color);
	SAY("x_y", n->at.x << 8 | n->at.y);
	SAY("number", n->value.number);
	SAY("grown", n->grown[1]);
	SAY("size", sizeof *n);
	SAY("size_typedef", sizeof(point_t));
	SAY("size_more", sizeof n->in);
	SAY("blue", BLUE);
#ifdef MOVED
	SAY("gone", 777);
	SAY("green", 1000);
	SAY("signed_small", 0);
	SAY("size_only_here", 0);
	SAY("exists", 1 << 4 | 1 << 8);
#else
	SAY("gone", n->gone);
	SAY("green", GREEN);
	SAY("signed_small", 0);
	SAY("size_only_here", sizeof *only_here);
	SAY("exists", 1 | 1 << 2 | 1 << 4 | 1 << 8);
#endif
	return either.a;
}

static union { struct node n; char bytes[sizeof(struct node) + 8]; } u;

int main(void) {
	struct node *n = &u.n;
	memset(u.bytes, 0xa5, sizeof u.bytes);
	n->next = (void *)0x123456789abcUL;
	n->small = 0xfedcba98u;
	n->count = -3;
	n->key = 0x1122334455667788;
	n->in[2].more = -70000;
	n->a = 5;
	n->b = 0x155;
	n->s = -7;
	n->negative = -100;
	n->color = BLUE;
	n->at.x = 3;
	n->at.y = 200;
	n->value.number = 424242;
	n->grown[1] = 99;
	describe(n);
	return 0;
}
