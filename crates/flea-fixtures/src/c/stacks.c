/* Stacks that are switched, and stacks that are walked: see ways.h. */
#define _GNU_SOURCE
#define FUNCTIONS(X)                                                                           \
    X(w_coroutine) X(w_yields) X(w_resumes)                                                    \
    X(w_walks) X(w_walks_above) X(w_walks_top) X(w_interrupted)                                \
    X(w_waits) X(w_spins) X(w_middle) X(w_outer)
#include "ways.h"

#include <execinfo.h>
#include <signal.h>
#include <ucontext.h>

/* ---- coroutines ---- */

/* The one that runs, and where it goes when it yields. */
static struct coroutine {
    ucontext_t context, resumer;
    void *stack;
    long value;
    int over;
} coroutines[3];

/* Leaves this frame for another stack, and comes back on whatever thread resumes it. */
TRACED static long w_yields(struct coroutine *c, long x)
{
    ENTER(w_yields);
    c->value = x;
    swapcontext(&c->context, &c->resumer);
    RETURN(w_yields, c->value + x);
}

TRACED static long w_coroutine(struct coroutine *c, long n)
{
    ENTER(w_coroutine);
    long sum = 0;
    for (long i = 0; i < n; i++)
        sum += w_yields(c, i);
    RETURN(w_coroutine, sum);
}

static void coroutine_main(unsigned index, unsigned n)
{
    struct coroutine *c = &coroutines[index];
    c->value = w_coroutine(c, n);
    c->over = 1;
    swapcontext(&c->context, &c->resumer);
}

TRACED static long w_resumes(struct coroutine *c, long x)
{
    ENTER(w_resumes);
    c->value = x;
    swapcontext(&c->resumer, &c->context);
    RETURN(w_resumes, c->value);
}

static void new_coroutine(unsigned index, unsigned n)
{
    struct coroutine *c = &coroutines[index];
    memset(c, 0, sizeof *c);
    c->stack = new_stack();
    getcontext(&c->context);
    c->context.uc_stack.ss_sp = c->stack;
    c->context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&c->context, (void (*)(void))coroutine_main, 2, index, n);
}

static void free_coroutine(unsigned index)
{
    munmap(coroutines[index].stack, STACK_BYTES);
}

/* Resumes all coroutines once. */
static void *resume_all(void *sum)
{
    for (unsigned i = 0; i < 3; i++)
        if (!coroutines[i].over)
            *(long *)sum += w_resumes(&coroutines[i], i + 1);
    return NULL;
}

/* Each step of a coroutine is on a thread of its own. */
static void run_coroutines(void)
{
    long sum = 0, rounds = 0;
    for (unsigned i = 0; i < 3; i++)
        new_coroutine(i, 40);
    while (!(coroutines[0].over && coroutines[1].over && coroutines[2].over)) {
        end_thread(start_thread(resume_all, &sum));
        rounds++;
    }
    for (unsigned i = 0; i < 3; i++)
        free_coroutine(i);
    printf("coroutines %ld %ld\n", sum, rounds);
}

/* Time passes while a coroutine is inside its functions and no thread is. */
static void run_away(void)
{
    long sum = 0;
    new_coroutine(0, 3);
    sum += w_resumes(&coroutines[0], 1);
    wipe();
    say("away");
    wait_line();
    while (!coroutines[0].over)
        sum += w_resumes(&coroutines[0], 1);
    free_coroutine(0);
    printf("back %ld\n", sum);
}

/* ---- backtraces ---- */

enum { MAX_FRAMES = 64 };

static void *frames[MAX_FRAMES];
static int n_frames;
static void *run_returns_to;

TRACED static long w_walks(long x)
{
    ENTER(w_walks);
    n_frames = backtrace(frames, MAX_FRAMES);
    RETURN(w_walks, x + 1);
}

TRACED static void w_interrupted(int number)
{
    ENTER(w_interrupted);
    opaque(w_walks(number));
    LEAVE(w_interrupted);
}

/* Room between functions: an address that `lies_in` one of them lies in no other. */
TRACED static long w_walks_above(long x)
{
    ENTER(w_walks_above);
    long result = x ? w_walks(x) : raise(SIGUSR2);
    RETURN(w_walks_above, result + 1);
}

TRACED static long w_walks_top(long x)
{
    ENTER(w_walks_top);
    RETURN(w_walks_top, w_walks_above(x) + 1);
}

/* Whether frame `i` returns into the function at `function`, which is short. */
static int is_in(int i, void *function)
{
    return i < n_frames && (char *)frames[i] > (char *)function &&
           (char *)frames[i] < (char *)function + 160;
}

/* Whether the frames from `i` on have these functions, in this order. */
static int next_in(int i, void *function)
{
    while (i < n_frames && !is_in(i, function))
        i++;
    return i + 1;
}

static void print_walk(const char *name, int interrupted)
{
    int i = next_in(0, (void *)w_walks);
    if (interrupted)
        i = next_in(i, (void *)w_interrupted);
    i = next_in(i, (void *)w_walks_above);
    i = next_in(i, (void *)w_walks_top);
    int whole = i <= n_frames;
    while (i < n_frames && frames[i] != run_returns_to)
        i++;
    printf("%s: %s, %s\n", name, whole ? "all functions" : "functions are missing",
           i < n_frames ? "to the end" : "not to the end");
}

static void run_walks(void)
{
    run_returns_to = __builtin_return_address(0);
    handle(SIGUSR2, w_interrupted, 0);
    for (long x = 1; x >= 0; x--) {
        opaque(w_walks_top(x));
        print_walk(x ? "called" : "interrupted", !x);
    }
    memset(frames, 0, sizeof frames);
    run_returns_to = NULL;
}

/* ---- for who looks from outside ---- */

TRACED static long w_waits(long x)
{
    ENTER(w_waits);
    say("inside");
    wait_line();
    RETURN(w_waits, x);
}

static volatile long spun;

TRACED static long w_spins(long x)
{
    ENTER(w_spins);
    for (long i = 0; i < 20000; i++)
        spun += i;
    RETURN(w_spins, x);
}

/* More arguments than registers: a tracer's frame has copies of them. */
TRACED static long w_middle(long a, long b, long c, long d, long e, long f, long g,
                            long (*innermost)(long))
{
    ENTER(w_middle);
    RETURN(w_middle, innermost(a + b + c + d + e + f + g) + 1);
}

TRACED static long w_outer(long (*innermost)(long))
{
    ENTER(w_outer);
    RETURN(w_outer, w_middle(1, 2, 3, 4, 5, 6, 7, innermost) + 1);
}

static void run_inside(void)
{
    printf("%ld\n", w_outer(w_waits));
}

/* Until it is killed. */
static void run_spins(void)
{
    while (opaque(1))
        opaque(w_outer(w_spins));
}

int main(int argc, char **argv)
{
    static const struct scenario scenarios[] = {
        {"coroutines", run_coroutines}, {"away", run_away},   {"walks", run_walks},
        {"inside", run_inside},         {"spins", run_spins}, {NULL, NULL},
    };
    return ways_main(argc, argv, scenarios);
}
