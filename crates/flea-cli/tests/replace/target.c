/* A program that is patched while it runs. Its first argument is the number of threads that
 * call all the while; commands come by lines on standard input:
 *
 *   ask N      prints answer(N)
 *   calls N    calls answer N times and prints the sum of the results
 *   sleep      calls answer(-1) in a thread of its own, prints "asleep" when it is inside
 *   wake       lets that call end, prints its result
 *   kept       prints what the kept callback says
 *   forget     forgets the callback
 *   mixed      prints mixed(1, "ab", 0.5, 4)
 *   leaf       prints what calls of leaf come to
 *
 * A thread that gets a result that no version of the function can give ends the program with
 * code 3. End of input ends it with code 7. */
#define _GNU_SOURCE
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define OWN __attribute__((noinline, noclone, noipa))

/* A statically linked program has no more of the C library than it uses. */
__attribute__((used)) static const void *const used[] = {
    abort, free, memchr, memcpy, memset, snprintf, stpcpy, strcmp, strcpy, strlen,
};
static volatile int scale = 10;
static sem_t inside, woken;
static const char *(*volatile kept)(void);

/* Nobody else can see these two: not exported, or not even global. */
OWN static int scaled(int x) { return x * scale; }
OWN void nap(void)
{
    sem_post(&inside);
    while (sem_wait(&woken)) {
    }
}

OWN void keep(const char *(*callback)(void)) { kept = callback; }
OWN void forget(void) { kept = NULL; }

OWN int answer(int x)
{
    if (x == -1)
        nap();
    return scaled(x) + 1;
}

OWN double mixed(int a, const char *b, double c, long d) { return a + strlen(b) + c + (double)d; }

/* b and c stay where they are, for gcc knows that leaf changes rax alone. */
__attribute__((noinline, noclone)) static long leaf(long x) { return x / 13 + 1; }
__attribute__((noinline, noclone)) static long branch(long a, long b, long c)
{
    return leaf(a) + b * c;
}

static void *caller(void *unused)
{
    (void)unused;
    /* The heap's pages for this thread and this size are there from the beginning. */
    void *volatile heap = malloc(64);
    (void)heap;
    sem_post(&inside);
    for (;;) {
        int result = answer(5);
        /* 51, or what a replacement returns: a thousand and more. */
        if (result != 51 && result < 1000)
            _exit(3);
        usleep(50);
    }
    return NULL;
}

static void *sleeper(void *result)
{
    *(int *)result = answer(-1);
    return NULL;
}

int main(int argc, char **argv)
{
    static char line[64];
    pthread_t id;
    int result = 0;
    sem_init(&inside, 0, 0);
    sem_init(&woken, 0, 0);
    for (int i = 0; i < (argc > 1 ? atoi(argv[1]) : 0); i++)
        if (!pthread_create(&id, NULL, caller, NULL))
            sem_wait(&inside);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        if (!strncmp(line, "ask ", 4)) {
            printf("%d\n", answer(atoi(line + 4)));
        } else if (!strncmp(line, "calls ", 6)) {
            long sum = 0;
            for (int n = atoi(line + 6); n > 0; n--)
                sum += answer(1);
            printf("%ld\n", sum);
        } else if (!strncmp(line, "sleep", 5)) {
            pthread_create(&id, NULL, sleeper, &result);
            sem_wait(&inside);
            puts("asleep");
        } else if (!strncmp(line, "wake", 4)) {
            sem_post(&woken);
            pthread_join(id, NULL);
            printf("%d\n", result);
        } else if (!strncmp(line, "kept", 4)) {
            puts(kept ? kept() : "nothing");
        } else if (!strncmp(line, "forget", 6)) {
            forget();
            puts("forgotten");
        } else if (!strncmp(line, "leaf", 4)) {
            printf("%ld\n", branch(12, 3, atol("14")) + branch(0, 1, 1000) - 1);
        } else if (!strncmp(line, "mixed", 5)) {
            printf("%g\n", mixed(1, "ab", 0.5, 4));
        }
        fflush(stdout);
    }
    return 7;
}
