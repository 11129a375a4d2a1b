/* What the counting programs share: threads that start together, a tally per function that
 * the *caller* keeps (so it is right whatever a tracer does to the callee), JSON at the end.
 *
 * usage: PROGRAM THREADS CALLS [wait]
 *
 * With `wait`: prints "ready", waits for a line, runs, prints the JSON and "done", waits for
 * another line and exits with code 7. End of input ends the program at once (code 9), so that
 * a dead test leaves nothing behind. A wrong result seen by a caller makes the code 3.
 *
 * arg0_sum and retval_sum are sums modulo 2^64, printed signed: of the value for integers,
 * of the address for pointers, of the (integral) value for floating point; 0 where the
 * function has no such thing or it is a struct. */
#ifndef FLEA_HARNESS_H
#define FLEA_HARNESS_H

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__clang__)
#define NOINLINE __attribute__((noinline))
#else
/* noclone: a constant-propagated copy would take calls away from the name being counted.
 * no_icf: two functions with one body must stay two functions. */
#define NOINLINE __attribute__((noinline, noclone, no_icf))
#endif
/* Without a side effect the compiler may drop or merge calls. */
#define KEEP() __asm__ volatile("" ::: "memory")

enum { MAX_FUNCTIONS = 64 };

struct tally {
    unsigned long count;
    unsigned long arg0_sum;
    unsigned long retval_sum;
};

struct work {
    long thread;
    long calls;
    long errors;
    struct tally tallies[MAX_FUNCTIONS];
};

struct program {
    const char *const *names;
    int n_functions;
    void (*prepare)(void); /* after the first line arrived; may be null */
    void (*run)(struct work *);
};

static pthread_barrier_t harness_barrier;
static const struct program *harness_program;

static inline void counted(struct work *w, int which, unsigned long arg0, unsigned long ret)
{
    w->tallies[which].count += 1;
    w->tallies[which].arg0_sum += arg0;
    w->tallies[which].retval_sum += ret;
}

static inline void check(struct work *w, int holds)
{
    w->errors += !holds;
}

static inline void *harness_thread(void *arg)
{
    struct work *w = (struct work *)arg;
    pthread_barrier_wait(&harness_barrier);
    harness_program->run(w);
    return NULL;
}

static inline void harness_wait_line(void)
{
    char line[64];
    if (!fgets(line, sizeof line, stdin))
        exit(9);
}

static inline void harness_print(const struct work *sum, long threads, long calls)
{
    printf("{\"threads\":%ld,\"calls\":%ld,\"errors\":%ld,\"functions\":{", threads, calls,
           sum->errors);
    for (int f = 0; f < harness_program->n_functions; f++)
        printf("%s\"%s\":{\"count\":%lu,\"arg0_sum\":%ld,\"retval_sum\":%ld}", f ? "," : "",
               harness_program->names[f], sum->tallies[f].count, (long)sum->tallies[f].arg0_sum,
               (long)sum->tallies[f].retval_sum);
    printf("}}\n");
    fflush(stdout);
}

static inline void harness_run_all(struct work *sum, long threads, long calls)
{
    struct work *all = (struct work *)calloc((size_t)threads, sizeof *all);
    pthread_t *ids = (pthread_t *)calloc((size_t)threads, sizeof *ids);
    if (!all || !ids || pthread_barrier_init(&harness_barrier, NULL, (unsigned)threads))
        exit(2);
    for (long t = 0; t < threads; t++) {
        all[t].thread = t;
        all[t].calls = calls;
        if (pthread_create(&ids[t], NULL, harness_thread, &all[t]))
            exit(2);
    }
    for (long t = 0; t < threads; t++) {
        pthread_join(ids[t], NULL);
        sum->errors += all[t].errors;
        for (int f = 0; f < harness_program->n_functions; f++) {
            sum->tallies[f].count += all[t].tallies[f].count;
            sum->tallies[f].arg0_sum += all[t].tallies[f].arg0_sum;
            sum->tallies[f].retval_sum += all[t].tallies[f].retval_sum;
        }
    }
    free(all);
    free(ids);
}

static inline int harness_main(int argc, char **argv, const struct program *program)
{
    long threads = argc > 2 ? atol(argv[1]) : 0;
    long calls = argc > 2 ? atol(argv[2]) : 0;
    int waits = argc > 3 && !strcmp(argv[3], "wait");
    if (threads < 1 || threads > 1024 || calls < 0) {
        fprintf(stderr, "usage: %s THREADS CALLS [wait]\n", argv[0]);
        return 2;
    }
    harness_program = program;
    if (waits) {
        puts("ready");
        fflush(stdout);
        harness_wait_line();
    }
    if (program->prepare)
        program->prepare();
    struct work sum;
    memset(&sum, 0, sizeof sum);
    harness_run_all(&sum, threads, calls);
    harness_print(&sum, threads, calls);
    if (waits) {
        puts("done");
        fflush(stdout);
        harness_wait_line();
    }
    if (sum.errors)
        return 3;
    return waits ? 7 : 0;
}

#endif
