/* Calls `spin_step` for as long as it is wanted.
 *
 * usage: spin THREADS [churn|fork]
 *
 * churn: each thread does its calls in short-lived threads; fork: in forked children.
 * Prints "ready". A line "now" on stdin prints the calls so far (children's included, once
 * they ended); "stop" or end of input prints them a last time and exits with code 0. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BATCH = 64 };

static atomic_ulong n_calls;
static atomic_int stop;
static const char *mode = "";

__attribute__((noinline)) long spin_step(long i)
{
    __asm__ volatile("" ::: "memory");
    return i + 1;
}

static void *batch(void *unused)
{
    (void)unused;
    for (long i = 0; i < BATCH;)
        i = spin_step(i);
    atomic_fetch_add(&n_calls, BATCH);
    return NULL;
}

static void forked_batch(void)
{
    pid_t child = fork();
    if (child == 0) {
        batch(NULL);
        _exit(0);
    }
    int status;
    if (child > 0 && waitpid(child, &status, 0) == child && status == 0)
        atomic_fetch_add(&n_calls, BATCH);
}

static void *spin(void *unused)
{
    (void)unused;
    while (!atomic_load(&stop)) {
        pthread_t id;
        if (!strcmp(mode, "churn")) {
            if (!pthread_create(&id, NULL, batch, NULL))
                pthread_join(id, NULL);
        } else if (!strcmp(mode, "fork")) {
            forked_batch();
        } else {
            batch(NULL);
        }
    }
    return NULL;
}

static void report(void)
{
    printf("{\"functions\":{\"spin_step\":{\"count\":%lu}}}\n", atomic_load(&n_calls));
    fflush(stdout);
}

int main(int argc, char **argv)
{
    int threads = argc > 1 ? atoi(argv[1]) : 0;
    if (threads < 1 || threads > 256) {
        fprintf(stderr, "usage: %s THREADS [churn|fork]\n", argv[0]);
        return 2;
    }
    if (argc > 2)
        mode = argv[2];
    pthread_t ids[256];
    for (int i = 0; i < threads; i++)
        if (pthread_create(&ids[i], NULL, spin, NULL))
            return 2;
    puts("ready");
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof line, stdin) && strcmp(line, "stop\n"))
        report();
    atomic_store(&stop, 1);
    for (int i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
    report();
    return 0;
}
