/* Two builds of a program. It calls describe() for each line that it reads, and then says what
 * a program on that function must find, in the order of program.bpf.c's answers. */
#include <stdio.h>
#include <string.h>

#ifdef NEWER
enum state { BUSY = 70, IDLE = 71 };
struct address { char family[3]; unsigned short port; };
struct client {
	char head[21];
	struct address *from[4];
	struct { unsigned long bytes; } in;
	long id;
	unsigned long kind : 40;
	int level : 20;
	char name[32];
	enum state state;
};
#define BYTES(c) (c)->in.bytes
#define AGE(c) 99
#else
enum state { IDLE, BUSY };
struct address { unsigned short port; };
struct client {
	long id;
	unsigned kind : 5;
	int level : 7;
	unsigned int age;
	enum state state;
	struct address *from[2];
	char name[16];
	struct { char unused; unsigned long bytes; } in;
};
#define BYTES(c) (c)->in.bytes
#define AGE(c) (c)->age
#endif

__attribute__((noipa)) long describe(struct client *client) { return client->id * client->kind + client->level; }

int main(void) {
	char line[64];
	struct address address = { .port = 6379 };
	struct client c = { .id = 123456789012, .kind = 21, .level = -50, .state = BUSY };
	c.from[1] = &address;
	BYTES(&c) = 4000000000;
#ifndef NEWER
	c.age = 33;
#endif
	strcpy(c.name, "a client");
	setvbuf(stdout, NULL, _IONBF, 0);
	puts("ready");
	while (fgets(line, sizeof line, stdin)) {
		describe(&c);
		printf("%ld %d %d %d %d %lu %d %d %lu\n", c.id, c.kind, c.level, AGE(&c), c.state == BUSY,
		       BYTES(&c), address.port, c.name[2], sizeof c);
	}
	return 0;
}
