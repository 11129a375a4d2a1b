/* Functions to be traced and timed side by side in one process.
 *
 *   f0..f31  begin with one 5-byte nop (0f 1f 44 00 00), 64-byte aligned
 *   p0..p31  begin with an ordinary prologue (push rbp; mov rbp, rsp; ...)
 *   hand     as f0, but its nop is a call to `inc [rip+counter]; ret`: the limit
 *   hand_thread  the same with a counter per thread (fs:)
 *   hand_lock    the same with `lock inc`
 *   hand_empty   the same with a stub that only returns
 *   hand_clock   the same with a stub that reads the time twice
 *   hand_walk    the same with one that walks a list of 100 empty programs and looks up for
 *                each, in a hash table, whether it is for this function
 *
 * Every one is `long NAME(long x)`, does x + 1 and is called through the same loop. The
 * bodies are naked so that their bytes do not depend on the compiler or its flags; their
 * unwind rows are therefore written by hand.
 *
 * Commands on stdin, one answer line each on stdout:
 *   round NAME N      calls it N times             "round NAME NS_PER_CALL"
 *   threads NAME N    calls it N times in each of 8 threads  "threads NAME N"
 *   uprobe NAME       counts it with a kernel uprobe, as long as this process lives; no
 *   uretprobe NAME    tracefs, so nothing is left behind        "ok" or "error WHY"
 *   hits NAME         what those count             "hits NAME N"
 *   total NAME        calls made by this program   "total NAME N"
 *   counter           the hand-written counters    "counter N N N"
 *   address NAME      where it is                  "address NAME HEX"
 *   once NAME         int3, then one call, for a tracer that single-steps: kills an
 *                     untraced process             "once"
 *   quit, end of input */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <link.h>
#include <linux/perf_event.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef long (*function)(long);

unsigned long hand_counter, hand_lock_counter;
__thread unsigned long hand_thread_counter;

#define NAKED __attribute__((naked, noinline, used, aligned(64)))
/* The argument is read by the assembly, which the compiler cannot see. */
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wreturn-type"

#define NOP_FUNCTION(n)                                                                      \
    NAKED long f##n(long x)                                                                  \
    {                                                                                        \
        __asm__(".byte 0x0f, 0x1f, 0x44, 0x00, 0x00\n lea 1(%rdi), %rax\n ret");             \
    }
#define PROLOGUE_FUNCTION(n)                                                                 \
    NAKED long p##n(long x)                                                                  \
    {                                                                                        \
        __asm__("push %rbp\n .cfi_adjust_cfa_offset 8\n mov %rsp, %rbp\n mov %rdi, %rax\n"    \
                "inc %rax\n pop %rbp\n .cfi_adjust_cfa_offset -8\n ret");                     \
    }
#define HAND_FUNCTION(name, stub)                                                            \
    NAKED static void stub##_stub(void);                                                     \
    NAKED long name(long x)                                                                  \
    {                                                                                        \
        __asm__("call " #stub "_stub\n lea 1(%rdi), %rax\n ret");                            \
    }

#define EACH(X)                                                                              \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)    \
    X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29)      \
    X(30) X(31)

EACH(NOP_FUNCTION)
EACH(PROLOGUE_FUNCTION)
HAND_FUNCTION(hand, inc)
HAND_FUNCTION(hand_thread, thread)
HAND_FUNCTION(hand_lock, lock)
HAND_FUNCTION(hand_empty, empty)
HAND_FUNCTION(hand_clock, clock)
HAND_FUNCTION(hand_walk, walk)

NAKED static void inc_stub(void)
{
    __asm__("incq hand_counter(%rip)\n ret");
}
NAKED static void lock_stub(void)
{
    __asm__("lock incq hand_lock_counter(%rip)\n ret");
}
NAKED static void thread_stub(void)
{
    __asm__("incq %fs:hand_thread_counter@tpoff\n ret");
}
NAKED static void empty_stub(void)
{
    __asm__("ret");
}

/* The kernel's own clock_gettime, without libc around it. */
static int (*vdso_clock)(clockid_t, struct timespec *) = clock_gettime;

__attribute__((constructor)) static void find_clock(void)
{
    void *vdso = dlopen("linux-vdso.so.1", RTLD_LAZY | RTLD_NOLOAD);
    void *found = vdso ? dlsym(vdso, "__vdso_clock_gettime") : NULL;
    if (found)
        memcpy(&vdso_clock, &found, sizeof found);
}

__attribute__((used)) static void read_clock(void)
{
    struct timespec t;
    vdso_clock(CLOCK_MONOTONIC, &t);
}

/* A program as a tracer without images of its own has it (Linux: struct ftrace_ops, and
 * ftrace_ops_list_func): it says by a hash table which functions it is for. */
enum { N_PROGRAMS = 100, N_BUCKETS = 16 };

struct traced {
    struct traced *next;
    uintptr_t function;
};

struct program {
    struct program *next;
    struct traced *buckets[N_BUCKETS];
    struct traced traced;
    void (*run)(uintptr_t function);
};

static struct program programs[N_PROGRAMS], *first_program;

static size_t bucket_of(uintptr_t function)
{
    return (function * 0x61c8864680b583ebul) >> 60;
}

__attribute__((noinline)) static void run_nothing(uintptr_t function)
{
    __asm__ volatile("" : : "r"(function));
}

__attribute__((constructor)) static void make_programs(void)
{
    for (int i = 0; i < N_PROGRAMS; i++) {
        struct program *p = &programs[i];
        p->traced.function = (uintptr_t)hand_walk;
        p->buckets[bucket_of(p->traced.function)] = &p->traced;
        p->run = run_nothing;
        p->next = first_program;
        first_program = p;
    }
}

__attribute__((used)) static void walk(uintptr_t function)
{
    for (struct program *p = first_program; p; p = p->next)
        for (struct traced *t = p->buckets[bucket_of(function)]; t; t = t->next)
            if (t->function == function) {
                p->run(function);
                break;
            }
}

#define SAVE_ARGUMENTS "push %rdi\n push %rsi\n push %rdx\n push %rcx\n push %r8\n push %r9\n"
#define RESTORE_ARGUMENTS "pop %r9\n pop %r8\n pop %rcx\n pop %rdx\n pop %rsi\n pop %rdi\n ret"

NAKED static void clock_stub(void)
{
    __asm__(SAVE_ARGUMENTS "call read_clock\n call read_clock\n" RESTORE_ARGUMENTS);
}
NAKED static void walk_stub(void)
{
    __asm__(SAVE_ARGUMENTS "lea hand_walk(%rip), %rdi\n call walk\n" RESTORE_ARGUMENTS);
}

#define NOP_ENTRY(n) {"f" #n, f##n, -1, 0},
#define PROLOGUE_ENTRY(n) {"p" #n, p##n, -1, 0},
static struct entry {
    const char *name;
    function f;
    int perf_fd;
    unsigned long total;
} entries[] = {
    EACH(NOP_ENTRY) EACH(PROLOGUE_ENTRY){"hand", hand, -1, 0},
    {"hand_thread", hand_thread, -1, 0},
    {"hand_lock", hand_lock, -1, 0},
    {"hand_empty", hand_empty, -1, 0},
    {"hand_clock", hand_clock, -1, 0},
    {"hand_walk", hand_walk, -1, 0},
};

static struct entry *find(const char *name)
{
    for (size_t i = 0; i < sizeof entries / sizeof *entries; i++)
        if (!strcmp(entries[i].name, name))
            return &entries[i];
    return NULL;
}

static long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* One loop for all: what is around the call is the same for every function. */
__attribute__((noinline, aligned(64))) static long call_many(function f, long n)
{
    long x = 0;
    for (long i = 0; i < n; i++)
        x = f(x);
    return x;
}

static void round_of(struct entry *e, long n)
{
    long before = now_ns();
    long x = call_many(e->f, n);
    long after = now_ns();
    e->total += (unsigned long)n;
    if (x != n)
        printf("error %s returned %ld after %ld calls\n", e->name, x, n);
    else
        printf("round %s %.4f\n", e->name, (double)(after - before) / (double)n);
}

enum { N_THREADS = 8 };

struct share {
    struct entry *e;
    long n;
};

static void *call_share(void *arg)
{
    struct share *share = arg;
    return (void *)(intptr_t)(call_many(share->e->f, share->n) == share->n);
}

static void in_threads(struct entry *e, long n)
{
    struct share share = {e, n};
    pthread_t threads[N_THREADS];
    int n_started = 0, right = 1;
    while (n_started < N_THREADS &&
           !pthread_create(&threads[n_started], NULL, call_share, &share))
        n_started++;
    for (int i = 0; i < n_started; i++) {
        void *result;
        pthread_join(threads[i], &result);
        right = right && result;
    }
    e->total += (unsigned long)n * (unsigned long)n_started;
    if (n_started < N_THREADS || !right)
        printf("error %s: %d threads, results %s\n", e->name, n_started, right ? "right" : "wrong");
    else
        printf("threads %s %ld\n", e->name, n);
}

struct place {
    uintptr_t address;
    uint64_t file_offset;
};

static int offset_in_program(struct dl_phdr_info *info, size_t size, void *arg)
{
    struct place *place = arg;
    (void)size;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        uintptr_t start = info->dlpi_addr + p->p_vaddr;
        if (p->p_type == PT_LOAD && place->address - start < p->p_filesz)
            place->file_offset = place->address - start + p->p_offset;
    }
    return 1; /* the program itself is the first; its libraries do not matter */
}

static int uprobe_type(void)
{
    FILE *file = fopen("/sys/bus/event_source/devices/uprobe/type", "r");
    int type = -1;
    if (!file)
        return -1;
    if (fscanf(file, "%d", &type) != 1)
        type = -1;
    fclose(file);
    return type;
}

static void uprobe(struct entry *e, int is_return)
{
    struct place place = {(uintptr_t)e->f, 0};
    int type = uprobe_type();
    char path[4096];
    ssize_t length = readlink("/proc/self/exe", path, sizeof path - 1);
    if (type < 0 || length < 0) {
        printf("error this kernel has no uprobe events\n");
        return;
    }
    path[length] = 0;
    dl_iterate_phdr(offset_in_program, &place);
    struct perf_event_attr attr = {
        .size = sizeof attr,
        .type = (unsigned)type,
        .config = (unsigned)is_return, /* format/retprobe: config:0 */
        .uprobe_path = (uintptr_t)path,
        .probe_offset = place.file_offset,
    };
    e->perf_fd = (int)syscall(SYS_perf_event_open, &attr, 0, -1, -1, PERF_FLAG_FD_CLOEXEC);
    if (e->perf_fd < 0)
        printf("error perf_event_open: %s\n", strerror(errno));
    else
        printf("ok\n");
}

static void hits(const struct entry *e)
{
    uint64_t n = 0;
    if (e->perf_fd < 0 || read(e->perf_fd, &n, sizeof n) != sizeof n)
        printf("error no kernel probe on %s\n", e->name);
    else
        printf("hits %s %llu\n", e->name, (unsigned long long)n);
}

static void obey(const char *command, struct entry *e, long n)
{
    if (!strcmp(command, "counter"))
        printf("counter %lu %lu %lu\n", hand_counter, hand_thread_counter, hand_lock_counter);
    else if (!e)
        printf("error no such function\n");
    else if (!strcmp(command, "round") && n > 0)
        round_of(e, n);
    else if (!strcmp(command, "threads") && n > 0)
        in_threads(e, n);
    else if (!strcmp(command, "uprobe"))
        uprobe(e, 0);
    else if (!strcmp(command, "uretprobe"))
        uprobe(e, 1);
    else if (!strcmp(command, "hits"))
        hits(e);
    else if (!strcmp(command, "total"))
        printf("total %s %lu\n", e->name, e->total);
    else if (!strcmp(command, "address"))
        printf("address %s %lx\n", e->name, (unsigned long)(uintptr_t)e->f);
    else if (!strcmp(command, "once")) {
        __asm__ volatile("int3" ::: "memory");
        e->total++;
        e->f(1);
        printf("once\n");
    } else
        printf("error unknown command %s\n", command);
}

int main(void)
{
    char line[256], command[32], name[32];
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        long n = 0;
        command[0] = name[0] = 0;
        if (sscanf(line, "%31s %31s %ld", command, name, &n) < 1 || !strcmp(command, "quit"))
            break;
        obey(command, find(name), n);
        fflush(stdout);
    }
    return 0;
}
