/* A program under restrictions: what a sandbox, a container or a strange program does to itself.
 *
 * usage: confined RESTRICTION...    in order:
 *   deny=N,N      seccomp: these system calls fail with EPERM
 *   kill=N,N      seccomp: these kill the process
 *   only=N,N      seccomp: all but these kill the process
 *   strict        seccomp's strict mode: read, write, exit and sigreturn are left
 *   as=BYTES      RLIMIT_AS is what is mapped now and this much more; also data= (RLIMIT_DATA)
 *   fsize=BYTES   RLIMIT_FSIZE
 *   nofile        every file descriptor that it may have is open
 *   locked        mlockall(MCL_CURRENT | MCL_FUTURE)
 *   locked=BYTES  the same, and no more than this may be locked by who has no right to it
 *   mdwe          prctl(PR_SET_MDWE): no memory becomes executable later
 *   dispatch      its system calls could be dispatched to it by SIGSYS, as Wine has it
 *   undumpable    prctl(PR_SET_DUMPABLE, 0)
 *   tracer=any    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY)
 *   copied        its text moves to anonymous memory, as node's --use-largepages does it
 *   huge          the same, and the page of `confined_step` becomes a huge one
 *   hot           a thread calls `hot_step` for ever
 *   vfork         a thread is in vfork, uninterruptibly, until "end"
 *   leaderless    the first thread ends, another goes on
 *   handlers      SIGTRAP and SIGSEGV have handlers, and a thread sends itself both for ever
 *
 * Prints "ready". A line "go N" on stdin calls `confined_step` N times and prints how often in
 * all, and how many results were wrong; "end" exits with code 7 (as strict mode lets it), end of
 * input with 9. Only read and write are used for that. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_CALLS = 64, HUGE_PAGE = 2 << 20, STACK = 64 << 10 };

static long n_calls, n_wrong;
static volatile long n_signals;
static int vfork_pipe[2] = {-1, -1};
static int is_strict;

#ifdef HUGE
/* In a huge page of its own: what follows it in its section begins at the next one. */
#define STEP __attribute__((noinline, noclone, section(".text.step"), aligned(2 << 20)))
STEP void confined_end(void)
{
}
#else
#define STEP __attribute__((noinline, noclone))
#endif

STEP long confined_step(long i)
{
    __asm__ volatile("" ::: "memory");
    return i + 1;
}

__attribute__((noinline, noclone)) long hot_step(long i)
{
    __asm__ volatile("" ::: "memory");
    return i + 2;
}

static void fail(const char *what)
{
    fprintf(stderr, "confined: %s: %s\n", what, strerror(errno));
    exit(2);
}

static void filter(const char *numbers, unsigned hit, unsigned miss)
{
    struct sock_filter code[3 * MAX_CALLS + 4];
    unsigned short n = 0;
    code[n++] = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
                                             offsetof(struct seccomp_data, nr));
    for (const char *at = numbers; *at && n < 3 * MAX_CALLS;) {
        char *end;
        unsigned number = (unsigned)strtoul(at, &end, 10);
        code[n++] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 1);
        code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, hit);
        at = *end ? end + 1 : end;
    }
    code[n++] = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, miss);
    struct sock_fprog program = {n, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
        syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, &program))
        fail("seccomp");
}

static void limit(int which, rlim_t value)
{
    struct rlimit both = {value, value};
    if (setrlimit(which, &both))
        fail("setrlimit");
}

/* The line of /proc/self/status with this name, in bytes. */
static unsigned long status_bytes(const char *name)
{
    char line[256];
    unsigned long kib = 0;
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (!strncmp(line, name, strlen(name)))
            kib = strtoul(line + strlen(name) + 1, NULL, 10);
    if (status)
        fclose(status);
    return kib << 10;
}

static void use_up_descriptors(void)
{
    limit(RLIMIT_NOFILE, 64);
    while (dup(0) >= 0)
        ;
}

/* The page of `confined_step`, perhaps with this function in it: mremap puts the copy in its place
 * in one step, and it is the same. */
static void copy_text(int huge)
{
    unsigned long page = huge ? HUGE_PAGE : (unsigned long)sysconf(_SC_PAGESIZE);
    unsigned long start = (unsigned long)&confined_step & ~(page - 1);
    unsigned long end = start + page;
    unsigned long size = end - start;
    char *copy = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (copy == MAP_FAILED)
        fail("mmap");
    memcpy(copy, (void *)start, size);
    if (mprotect(copy, size, PROT_READ | PROT_EXEC) ||
        mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)start) == MAP_FAILED)
        fail("mremap");
    if (huge) {
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
        if (madvise((void *)start, size, MADV_COLLAPSE))
            fail("MADV_COLLAPSE");
    }
}

static void *hot(void *unused)
{
    (void)unused;
    for (long i = 0;; i = hot_step(i))
        ;
    return NULL;
}

static void *sleep_in_vfork(void *unused)
{
    (void)unused;
    char byte;
    if (vfork() == 0) {
        /* The parent's memory and descriptors: nothing is written but to the stack. */
        syscall(SYS_read, vfork_pipe[0], &byte, 1);
        _exit(0);
    }
    return NULL;
}

static void count_signal(int signal)
{
    (void)signal;
    n_signals++;
}

static void *signals(void *unused)
{
    (void)unused;
    for (;;) {
        raise(SIGTRAP);
        raise(SIGSEGV);
        usleep(500);
    }
    return NULL;
}

static void start(void *(*function)(void *))
{
    pthread_t id;
    if (pthread_create(&id, NULL, function, NULL))
        fail("pthread_create");
}

static void say(const char *line)
{
    if (write(1, line, strlen(line)) < 0)
        syscall(SYS_exit, 9);
}

static char *decimal(char *end, long n)
{
    do
        *--end = (char)('0' + n % 10);
    while (n /= 10);
    return end;
}

static void go(long n)
{
    for (long i = 0; i < n; i++)
        n_wrong += confined_step(i) != i + 1;
    n_calls += n;
    char line[96], *end = line + sizeof line - 1;
    *end = 0;
    *--end = '\n';
    end = decimal(end, n_wrong);
    *--end = ' ';
    say(decimal(end, n_calls));
}

static void quit(int code)
{
    if (vfork_pipe[1] >= 0 && write(vfork_pipe[1], "", 1) < 0)
        code = 9;
    if (!is_strict)
        _exit(code);
    syscall(SYS_exit, code);
}

static void *serve(void *unused)
{
    (void)unused;
    say("ready\n");
    char line[64];
    unsigned n = 0;
    while (n + 1 < sizeof line && read(0, line + n, 1) == 1) {
        if (line[n++] != '\n')
            continue;
        line[n] = 0;
        n = 0;
        if (!strncmp(line, "go ", 3))
            go(atol(line + 3));
        else if (!strcmp(line, "end\n"))
            quit(7);
    }
    quit(9);
    return NULL;
}

static int restrict_to(const char *what)
{
    const char *value = strchr(what, '=');
    value = value ? value + 1 : "";
    if (!strncmp(what, "deny=", 5))
        filter(value, SECCOMP_RET_ERRNO | EPERM, SECCOMP_RET_ALLOW);
    else if (!strncmp(what, "kill=", 5))
        filter(value, SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_ALLOW);
    else if (!strncmp(what, "only=", 5))
        filter(value, SECCOMP_RET_ALLOW, SECCOMP_RET_KILL_PROCESS);
    else if (!strncmp(what, "as=", 3))
        limit(RLIMIT_AS, status_bytes("VmSize") + strtoul(value, NULL, 0));
    else if (!strncmp(what, "data=", 5))
        limit(RLIMIT_DATA, status_bytes("VmData") + strtoul(value, NULL, 0));
    else if (!strncmp(what, "fsize=", 6))
        limit(RLIMIT_FSIZE, strtoul(value, NULL, 0));
    else if (!strncmp(what, "locked", 6)) {
        if (mlockall(MCL_CURRENT | MCL_FUTURE))
            fail("mlockall");
        if (*value)
            limit(RLIMIT_MEMLOCK, strtoul(value, NULL, 0));
    } else if (!strcmp(what, "nofile"))
        use_up_descriptors();
    else if (!strcmp(what, "mdwe")) {
        if (prctl(65 /* PR_SET_MDWE */, 1 /* PR_MDWE_REFUSE_EXEC_GAIN */, 0, 0, 0))
            fail("PR_SET_MDWE");
    } else if (!strcmp(what, "dispatch")) {
        static char selector; /* SYSCALL_DISPATCH_FILTER_ALLOW */
        if (prctl(59 /* PR_SET_SYSCALL_USER_DISPATCH */, 1, 0, 0, &selector))
            fail("PR_SET_SYSCALL_USER_DISPATCH");
    } else if (!strcmp(what, "undumpable"))
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    else if (!strcmp(what, "tracer=any"))
        prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
    else if (!strcmp(what, "copied") || !strcmp(what, "huge"))
        copy_text(!strcmp(what, "huge"));
    else if (!strcmp(what, "hot"))
        start(hot);
    else if (!strcmp(what, "handlers")) {
        signal(SIGTRAP, count_signal);
        signal(SIGSEGV, count_signal);
        start(signals);
    } else if (!strcmp(what, "vfork")) {
        if (pipe(vfork_pipe))
            fail("pipe");
        start(sleep_in_vfork);
    } else
        return 0;
    return 1;
}

int main(int argc, char **argv)
{
    int leaderless = 0;
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "strict"))
            is_strict = 1;
        else if (!strcmp(argv[i], "leaderless"))
            leaderless = 1;
        else if (!restrict_to(argv[i])) {
            fprintf(stderr, "confined: no restriction `%s`\n", argv[i]);
            return 2;
        }
    }
    if (leaderless) {
        start(serve);
        pthread_exit(NULL);
    }
    if (is_strict && prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT, 0, 0, 0))
        fail("strict mode");
    serve(NULL);
}
