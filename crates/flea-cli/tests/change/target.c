/* A program whose functions say what they are called with, and whose callers say what they get.
 * Each line on standard input is a command:
 *
 *   add A B       add(A, B): what it saw of both, and what it returned
 *   narrow A      an int to an unsigned char
 *   pair A B      two words of result: rax and rdx
 *   sum           nine arguments, three of them on the stack
 *   mixed         a double first, then a long; a double is returned
 *   big           a struct in memory is returned
 *   kept A        a caller that counts on its argument registers, as gcc -fipa-ra lets it
 *
 * End of input ends it with code 7. */
#include <stdio.h>
#include <string.h>

#define OWN __attribute__((noinline, noclone, noipa))

struct pair { long first, second; };
struct big { long words[4]; };

static long seen[2];

OWN long add(long a, long b)
{
    seen[0] = a;
    seen[1] = b;
    return a + b;
}

OWN unsigned char narrow(int a) { return (unsigned char)(a + 1); }

OWN struct pair pair(long a, long b) { return (struct pair){ b, a }; }

OWN long sum(long a, long b, long c, long d, long e, long f, long g, long h, long i)
{
    return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 9 * i;
}

OWN double mixed(double x, long n) { return x + (double)n; }

OWN struct big big(long a) { return (struct big){ { a, a + 1, a + 2, a + 3 } }; }

/* Leaves rdi and rdx alone, and its caller knows. */
__attribute__((noinline, noclone)) static long third(long a, long b, long c)
{
    (void)a;
    (void)c;
    return b / 3;
}

OWN static void kept(long a)
{
    long result = third(a, a + 1, a + 2);
    printf("kept %ld %ld %ld\n", a, a + 2, result);
}

static void run(const char *command, long a, long b)
{
    if (!strcmp(command, "add")) {
        long result = add(a, b);
        printf("add saw %ld %ld returned %ld\n", seen[0], seen[1], result);
    } else if (!strcmp(command, "narrow")) {
        printf("narrow %d\n", narrow((int)a));
    } else if (!strcmp(command, "pair")) {
        struct pair result = pair(a, b);
        printf("pair %ld %ld\n", result.first, result.second);
    } else if (!strcmp(command, "sum")) {
        printf("sum %ld\n", sum(1, 1, 1, 1, 1, 1, 1, 1, 1));
    } else if (!strcmp(command, "mixed")) {
        printf("mixed %.1f\n", mixed(0.5, 2));
    } else if (!strcmp(command, "big")) {
        printf("big %ld\n", big(a).words[3]);
    } else if (!strcmp(command, "kept")) {
        kept(a);
    } else {
        printf("what is %s?\n", command);
    }
    fflush(stdout);
}

int main(void)
{
    char line[64], command[32];
    printf("ready\n");
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin) != NULL) {
        long a = 0, b = 0;
        if (sscanf(line, "%31s %ld %ld", command, &a, &b) >= 1)
            run(command, a, b);
    }
    return 7;
}
