/* Ways out of functions that may be traced: what the programs in C and in C++ share.
 *
 * usage: PROGRAM SCENARIO [wait]
 *
 * Standard output is a transcript that is the same in every run, traced or not. With `wait`,
 * "ready" and a line of stdin come before it, "done" and a line of stdin after. Ends with 7.
 *
 * Standard error gets "tally NAME ENTERED RETURNED" at the end for each function that is meant
 * to be traced: how often it was entered, and how often it was left by returning. Children of
 * the program count too. All those functions begin with `w_`.
 *
 * A program defines FUNCTIONS(X), the list of them, before it includes this.
 */
#ifndef FLEA_WAYS_H
#define FLEA_WAYS_H

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__clang__)
#define TRACED __attribute__((noinline))
#else
/* Nothing of a caller is known to the callee, and the other way round. */
#define TRACED __attribute__((noipa))
#endif

struct tally {
    long entered, returned;
};

#define INDEX(f) T_##f,
#define NAME(f) #f,
enum { FUNCTIONS(INDEX) N_FUNCTIONS };
static const char *const names[] = {FUNCTIONS(NAME)};
/* Shared with children. */
static struct tally *tallies;

/* At the very beginning: what comes before it may be seen by a tracer and not by us. */
#define ENTER(f) __atomic_fetch_add(&tallies[T_##f].entered, 1, __ATOMIC_RELAXED)
#define LEAVE(f) __atomic_fetch_add(&tallies[T_##f].returned, 1, __ATOMIC_RELAXED)
#define RETURN(f, value)                                                                       \
    do {                                                                                       \
        long returned_value = (value);                                                         \
        LEAVE(f);                                                                              \
        return returned_value;                                                                 \
    } while (0)

/* Makes a value one that the compiler knows nothing of. */
static inline long opaque(long x)
{
    __asm__ volatile("" : "+r"(x) : : "memory");
    return x;
}

static inline void say(const char *text)
{
    puts(text);
    fflush(stdout);
}

static inline void wait_line(void)
{
    char text[64];
    if (!fgets(text, sizeof text, stdin))
        exit(9);
}

static inline void check(int fine, const char *what)
{
    if (!fine) {
        printf("wrong: %s\n", what);
        fflush(stdout);
    }
}

/* Overwrites what calls have left on the stack below, as a busy program does sooner or later:
 * who looks for return addresses there is to find those of calls that have not returned. */
static __attribute__((noinline)) void wipe(void)
{
    char below[131072];
    memset(below, 0, sizeof below);
    __asm__ volatile("" : : "r"(below) : "memory");
}

enum { STACK_BYTES = 8 << 20 };

/* A stack that goes away with what calls have left on it; the C library keeps its own ones. */
static inline void *new_stack(void)
{
    void *stack = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED)
        exit(4);
    return stack;
}

struct thread {
    pthread_t id;
    void *stack;
};

static inline struct thread start_thread(void *(*begin)(void *), void *argument)
{
    struct thread thread;
    pthread_attr_t attributes;
    thread.stack = new_stack();
    pthread_attr_init(&attributes);
    pthread_attr_setstack(&attributes, thread.stack, STACK_BYTES);
    if (pthread_create(&thread.id, &attributes, begin, argument))
        exit(4);
    pthread_attr_destroy(&attributes);
    return thread;
}

static inline void *end_thread(struct thread thread)
{
    void *result;
    pthread_join(thread.id, &result);
    munmap(thread.stack, STACK_BYTES);
    return result;
}

/* Runs `way` in a child that it is to end, and prints how that ended. */
static inline void in_child(const char *name, void (*way)(void))
{
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        way();
        _exit(99);
    }
    int status = 0;
    waitpid(child, &status, 0);
    if (WIFEXITED(status))
        printf("%s: code %d\n", name, WEXITSTATUS(status));
    else
        printf("%s: signal %d\n", name, WTERMSIG(status));
}

static pid_t ways_pid;

static void print_tallies(void)
{
    if (getpid() != ways_pid)
        return;
    for (int i = 0; i < N_FUNCTIONS; i++)
        fprintf(stderr, "tally %s %ld %ld\n", names[i], tallies[i].entered,
                tallies[i].returned);
}

static inline void handle(int number, void (*handler)(int), int flags)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = handler;
    action.sa_flags = flags;
    sigaction(number, &action, NULL);
}

struct scenario {
    const char *name;
    void (*run)(void);
};

static inline int ways_main(int argc, char **argv, const struct scenario *scenarios)
{
    int waits = argc == 3 && !strcmp(argv[2], "wait");
    const struct scenario *chosen = scenarios;
    while (chosen->name && (argc < 2 || strcmp(chosen->name, argv[1])))
        chosen++;
    if (!chosen->name) {
        fprintf(stderr, "usage: %s SCENARIO [wait]\n", argv[0]);
        return 2;
    }
    size_t bytes = sizeof(struct tally) * N_FUNCTIONS;
    tallies = (struct tally *)mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                                   MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (tallies == MAP_FAILED)
        return 4;
    ways_pid = getpid();
    atexit(print_tallies);
    if (waits) {
        say("ready");
        wait_line();
    }
    chosen->run();
    wipe();
    fflush(stdout);
    if (waits) {
        say("done");
        wait_line();
    }
    return 7;
}

#endif
