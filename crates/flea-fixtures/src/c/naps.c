/* Threads that sleep inside functions for as long as they are told to.
 *
 * usage: naps THREADS            prints "ready"; then commands, a line each:
 *   in      every thread calls `nap` and sleeps in it               prints "asleep"
 *   out     they wake and return                                    prints "N wrong"
 *   away    a coroutine calls `hop`, which leaves it for main       prints "away"
 *   back    it is gone back to and returns                          prints "N wrong"
 *   storm   every thread calls `doze` again and again, which
 *           sleeps up to 2 ms                                       prints "storm"
 *   now     prints "ENTERED LEFT" of `doze`, all threads together
 *   calm    the storm is over                                       prints "N wrong"
 *   end     exits with code 7 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { MAX_THREADS = 64, STACK = 64 << 10 };

static int n_threads, wake[2];
static pthread_t threads[MAX_THREADS];
static atomic_long wrong, inside, entered, left;
static atomic_int stormy;
static ucontext_t main_context, coroutine;

__attribute__((noinline)) long nap(long n)
{
    char byte;
    inside++;
    if (read(wake[0], &byte, 1) != 1)
        exit(2);
    return n * 3;
}

__attribute__((noinline)) long hop(long x)
{
    swapcontext(&coroutine, &main_context);
    return x / 2;
}

__attribute__((noinline)) long doze(long n, unsigned *seed)
{
    *seed = *seed * 1103515245 + 12345;
    /* One in four does not sleep at all. */
    struct timespec pause = {0, (*seed >> 16) % 4 ? (*seed >> 8) % 2000000 : 0};
    if (pause.tv_nsec)
        nanosleep(&pause, NULL);
    return n + 7;
}

static void *naps(void *arg)
{
    wrong += nap((long)arg) != (long)arg * 3;
    return NULL;
}

static void hops(void)
{
    wrong += hop(5) != 2;
}

static void *storms(void *arg)
{
    unsigned seed = (unsigned)(long)arg;
    for (long i = 0; stormy; i++) {
        entered++;
        wrong += doze(i, &seed) != i + 7;
        left++;
    }
    return NULL;
}

static void start(void *(*function)(void *))
{
    /* Little memory: all of it is looked through for ways back into code that has gone. */
    pthread_attr_t small;
    if (pthread_attr_init(&small) || pthread_attr_setstacksize(&small, 2 * STACK))
        exit(2);
    for (long i = 0; i < n_threads; i++)
        if (pthread_create(&threads[i], &small, function, (void *)i))
            exit(2);
}

static void join(void)
{
    for (int i = 0; i < n_threads; i++)
        pthread_join(threads[i], NULL);
    printf("%ld wrong\n", wrong);
}

static void command(const char *line)
{
    static char stack[STACK] __attribute__((aligned(16)));
    if (!strcmp(line, "in\n")) {
        inside = 0;
        start(naps);
        while (inside < n_threads)
            usleep(1000);
        puts("asleep");
    } else if (!strcmp(line, "out\n")) {
        for (int i = 0; i < n_threads; i++)
            if (write(wake[1], "", 1) != 1)
                exit(2);
        join();
    } else if (!strcmp(line, "away\n")) {
        getcontext(&coroutine);
        coroutine.uc_stack.ss_sp = stack;
        coroutine.uc_stack.ss_size = sizeof stack;
        coroutine.uc_link = &main_context;
        makecontext(&coroutine, hops, 0);
        swapcontext(&main_context, &coroutine);
        puts("away");
    } else if (!strcmp(line, "back\n")) {
        swapcontext(&main_context, &coroutine);
        printf("%ld wrong\n", wrong);
    } else if (!strcmp(line, "storm\n")) {
        stormy = 1;
        start(storms);
        puts("storm");
    } else if (!strcmp(line, "now\n")) {
        printf("%ld %ld\n", entered, left);
    } else if (!strcmp(line, "calm\n")) {
        stormy = 0;
        join();
    } else {
        exit(strcmp(line, "end\n") ? 2 : 7);
    }
    fflush(stdout);
}

int main(int argc, char **argv)
{
    n_threads = argc > 1 ? atoi(argv[1]) : 0;
    if (n_threads < 1 || n_threads > MAX_THREADS || pipe(wake)) {
        fprintf(stderr, "usage: %s THREADS\n", argv[0]);
        return 2;
    }
    puts("ready");
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof line, stdin))
        command(line);
    return 9;
}
