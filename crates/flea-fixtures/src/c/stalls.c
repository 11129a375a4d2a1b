/* Ten thousand functions, and threads that call them all the time and notice when one call takes
 * long. One thread calls `slot_0000` alone, one the first N in turn.
 *
 * usage: stalls N       prints "ready", then obeys lines on stdin:
 *   stall   prints "stall STOPPED ALL": ns of the longest call since it was asked last, without
 *           and with the time for which the thread was ready to run and had no CPU. Where the
 *           kernel does not count that, both are the same.
 *
 * `slot_0000` to `slot_9999` are there to be attached to. A wrong result is printed as "wrong", and
 * the code is 3. End of input ends the program, with code 0. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define TEN(f, a) f(a##0) f(a##1) f(a##2) f(a##3) f(a##4) f(a##5) f(a##6) f(a##7) f(a##8) f(a##9)
#define SLOTS_100(f, a)                                                                          \
    TEN(f, a##0) TEN(f, a##1) TEN(f, a##2) TEN(f, a##3) TEN(f, a##4) TEN(f, a##5) TEN(f, a##6)    \
    TEN(f, a##7) TEN(f, a##8) TEN(f, a##9)
#define SLOTS_1000(f, a)                                                                         \
    SLOTS_100(f, a##0) SLOTS_100(f, a##1) SLOTS_100(f, a##2) SLOTS_100(f, a##3)                   \
    SLOTS_100(f, a##4) SLOTS_100(f, a##5) SLOTS_100(f, a##6) SLOTS_100(f, a##7)                   \
    SLOTS_100(f, a##8) SLOTS_100(f, a##9)
#define SLOTS(f)                                                                                 \
    SLOTS_1000(f, 0) SLOTS_1000(f, 1) SLOTS_1000(f, 2) SLOTS_1000(f, 3) SLOTS_1000(f, 4)          \
    SLOTS_1000(f, 5) SLOTS_1000(f, 6) SLOTS_1000(f, 7) SLOTS_1000(f, 8) SLOTS_1000(f, 9)

#define DEFINE(i)                                                                                \
    __attribute__((noinline, noclone, no_icf)) long slot_##i(long x)                             \
    {                                                                                            \
        __asm__ volatile("" ::: "memory");                                                       \
        return 3 * x + 1;                                                                        \
    }
#define NAME(i) slot_##i,
SLOTS(DEFINE)
static long (*const slots[])(long) = {SLOTS(NAME)};

enum { LONG_NS = 50000, N_CALLERS = 2 };

static atomic_int stop;
static atomic_long longest_stopped, longest_all;

struct caller {
    pthread_t id;
    long n_slots;
};

static long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* How long this thread has been ready to run without a CPU so far. */
static long waited_ns(int schedstat)
{
    char text[64] = "";
    long on_cpu, waited = 0;
    if (pread(schedstat, text, sizeof text - 1, 0) > 0)
        sscanf(text, "%ld %ld", &on_cpu, &waited);
    return waited;
}

static void raise_to(atomic_long *longest, long ns)
{
    long before = atomic_load(longest);
    while (ns > before && !atomic_compare_exchange_weak(longest, &before, ns))
        ;
}

static void *call_slots(void *arg)
{
    const struct caller *caller = arg;
    int schedstat = open("/proc/thread-self/schedstat", O_RDONLY);
    long waited = waited_ns(schedstat), last = now_ns();
    for (long k = 0; !atomic_load(&stop); k++) {
        if (slots[k % caller->n_slots](k) != 3 * k + 1) {
            puts("wrong");
            fflush(stdout);
            _exit(3);
        }
        long now = now_ns(), took = now - last;
        if (took > LONG_NS) {
            long waited_now = waited_ns(schedstat);
            raise_to(&longest_all, took);
            raise_to(&longest_stopped, took - (waited_now - waited));
            waited = waited_now;
            now = now_ns();
        }
        last = now;
    }
    return NULL;
}

int main(int argc, char **argv)
{
    long n = argc > 1 ? atol(argv[1]) : 0;
    struct caller callers[N_CALLERS] = {{.n_slots = 1}, {.n_slots = n}};
    char line[64];
    if (n < 1 || n > (long)(sizeof slots / sizeof *slots)) {
        fprintf(stderr, "usage: %s N\n", argv[0]);
        return 2;
    }
    for (int i = 0; i < N_CALLERS; i++)
        if (pthread_create(&callers[i].id, NULL, call_slots, &callers[i]))
            return 2;
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin))
        if (!strcmp(line, "stall\n")) {
            long stopped = atomic_exchange(&longest_stopped, 0);
            printf("stall %ld %ld\n", stopped, atomic_exchange(&longest_all, 0));
            fflush(stdout);
        }
    atomic_store(&stop, 1);
    for (int i = 0; i < N_CALLERS; i++)
        pthread_join(callers[i].id, NULL);
    return 0;
}
