/* Ways out of C functions: see ways.h. More of them, which musl has not, are in stacks.c. */
#define _GNU_SOURCE
#define FUNCTIONS(X)                                                                           \
    X(w_level1) X(w_level2) X(w_jumps) X(w_raises) X(w_handler_jumps)                          \
    X(w_exits_thread) X(w_sleeps) X(w_spins) X(w_cleans)                                       \
    X(w_tail_first) X(w_tail_second) X(w_tail_last) X(w_only_a_jump)                           \
    X(w_deep) X(w_even) X(w_odd)                                                               \
    X(w_calls_exit) X(w_calls__exit) X(w_aborts) X(w_executes) X(w_only_jumps) X(w_at_exit)    \
    X(w_works) X(w_inner_works) X(w_in_handler) X(w_after) X(w_stepped)
#include "ways.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <sys/time.h>
#include <ucontext.h>

/* ---- jumps ---- */

static jmp_buf target;
static sigjmp_buf signal_target;

TRACED static long w_jumps(long x)
{
    ENTER(w_jumps);
    if (x % 4)
        longjmp(target, (int)(x % 4));
    RETURN(w_jumps, x);
}

TRACED static long w_level2(long x, long (*leaves)(long))
{
    ENTER(w_level2);
    RETURN(w_level2, leaves(x) + 1);
}

/* More arguments than registers: a tracer's frame has copies of them. */
TRACED static long w_level1(long a, long b, long c, long d, long e, long f, long g,
                            long (*leaves)(long))
{
    ENTER(w_level1);
    RETURN(w_level1, w_level2(a + b + c + d + e + f + g, leaves) + 1);
}

static long jump_once(long i)
{
    int jumped = setjmp(target);
    return jumped ? jumped : w_level1(i, 0, 1, 0, 2, 0, 1, w_jumps);
}

TRACED static void w_handler_jumps(int number)
{
    ENTER(w_handler_jumps);
    siglongjmp(signal_target, number);
}

TRACED static long w_raises(long x)
{
    ENTER(w_raises);
    if (x % 2)
        raise(SIGUSR1);
    RETURN(w_raises, x);
}

static long signal_jump_once(long i)
{
    int jumped = sigsetjmp(signal_target, 1);
    return jumped ? -jumped : w_level1(i, 1, 1, 1, 1, 1, 1, w_raises);
}

/* Anonymous memory of this process in KiB. */
static long anonymous_kib(void)
{
    char line[256];
    long kib = -1;
    FILE *status = fopen("/proc/self/status", "r");
    while (status && fgets(line, sizeof line, status))
        if (sscanf(line, "RssAnon: %ld", &kib) == 1)
            break;
    if (status)
        fclose(status);
    return kib;
}

enum { N_JUMPS = 100000 };

static void jump_often(const char *name, long (*once)(long))
{
    long sum = 0, before = 0;
    for (long i = 0; i < N_JUMPS; i++) {
        if (i == N_JUMPS / 10)
            before = anonymous_kib();
        sum += once(i);
    }
    long grown = anonymous_kib() - before;
    check(grown < 512, "memory grew");
    printf("%s %ld\n", name, sum);
}

static void run_longjmp(void)
{
    jump_often("longjmp", jump_once);
}

static void run_siglongjmp(void)
{
    handle(SIGUSR1, w_handler_jumps, 0);
    jump_often("siglongjmp", signal_jump_once);
}

/* ---- the end of a thread ---- */

static int cleaned;

TRACED static void w_cleans(void *which)
{
    ENTER(w_cleans);
    cleaned = cleaned * 10 + (int)(intptr_t)which;
    LEAVE(w_cleans);
}

TRACED static long w_exits_thread(long x)
{
    ENTER(w_exits_thread);
    pthread_cleanup_push(w_cleans, (void *)3);
    if (opaque(x) >= 0)
        pthread_exit((void *)x);
    pthread_cleanup_pop(0);
    RETURN(w_exits_thread, x);
}

static volatile int sleeping;

TRACED static long w_sleeps(long x)
{
    ENTER(w_sleeps);
    pthread_cleanup_push(w_cleans, (void *)4);
    sleeping = 1;
    while (opaque(x) >= 0)
        pause();
    pthread_cleanup_pop(0);
    RETURN(w_sleeps, x);
}

TRACED static long w_spins(long x)
{
    ENTER(w_spins);
    int before;
    pthread_cleanup_push(w_cleans, (void *)5);
    pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &before);
    sleeping = 1;
    while (opaque(x) >= 0)
        ;
    pthread_cleanup_pop(0);
    RETURN(w_spins, x);
}

static void *thread_leaves(void *leaves)
{
    pthread_cleanup_push(w_cleans, (void *)1);
    pthread_cleanup_push(w_cleans, (void *)2);
    w_level1(1, 2, 3, 4, 5, 6, 7, (long (*)(long))leaves);
    pthread_cleanup_pop(0);
    pthread_cleanup_pop(0);
    return NULL;
}

static void end_of_thread(const char *name, long (*leaves)(long), int cancel)
{
    for (int i = 0; i < 20; i++) {
        cleaned = 0;
        sleeping = 0;
        struct thread thread = start_thread(thread_leaves, (void *)leaves);
        while (cancel && !sleeping)
            usleep(100);
        if (cancel)
            pthread_cancel(thread.id);
        void *result = end_thread(thread);
        if (i == 0)
            printf("%s %ld %d\n", name, result == PTHREAD_CANCELED ? -1 : (long)result, cleaned);
        check(cleaned % 10 == 1 && cleaned / 10 % 10 == 2 && cleaned > 300, name);
    }
}

static void run_threads(void)
{
    end_of_thread("pthread_exit", w_exits_thread, 0);
    end_of_thread("deferred cancel", w_sleeps, 1);
    end_of_thread("asynchronous cancel", w_spins, 1);
}

/* ---- tail calls ---- */

TRACED static long w_tail_last(long a, long b)
{
    ENTER(w_tail_last);
    RETURN(w_tail_last, a * 3 + b);
}

/* It jumps; to its caller, it returns all the same. */
TRACED static long w_tail_second(long a, long b)
{
    ENTER(w_tail_second);
    LEAVE(w_tail_second);
    return w_tail_last(b, a);
}

TRACED static long w_tail_first(long a, long b)
{
    ENTER(w_tail_first);
    LEAVE(w_tail_first);
    return w_tail_second(a + 1, b);
}

/* Its whole body is `jmp w_tail_last`. */
long w_only_a_jump(long a, long b);
__attribute__((used)) static long (*const last)(long, long) = w_tail_last;
__asm__(".text\n.p2align 4\n.globl w_only_a_jump\n.type w_only_a_jump, @function\n"
        "w_only_a_jump: .cfi_startproc\njmp w_tail_last\n.cfi_endproc\n"
        ".size w_only_a_jump, . - w_only_a_jump\n");

static void run_tail_calls(void)
{
    long sum = 0;
    for (long i = 0; i < 1000; i++) {
        sum += w_tail_first(i, 2 * i) + w_only_a_jump(i, 7);
        ENTER(w_only_a_jump);
        LEAVE(w_only_a_jump);
    }
    printf("tail calls %ld\n", sum);
}

/* ---- recursion ---- */

static char *deepest;

TRACED static long w_deep(long n)
{
    ENTER(w_deep);
    char here;
    deepest = &here;
    __asm__ volatile("" : : "r"(&here) : "memory");
    RETURN(w_deep, n ? w_deep(n - 1) + n : 0);
}

TRACED static long w_odd(long n);

TRACED static long w_even(long n)
{
    ENTER(w_even);
    RETURN(w_even, n ? w_odd(n - 1) + 1 : 0);
}

TRACED static long w_odd(long n)
{
    ENTER(w_odd);
    RETURN(w_odd, n ? w_even(n - 1) + 1 : 1);
}

static void *recurses(void *unused)
{
    (void)unused;
    char here;
    printf("deep %ld\n", w_deep(10000));
    fprintf(stderr, "stack %ld\n", (long)(&here - deepest));
    printf("mutual %ld %ld\n", w_even(10000), w_odd(10000));
    return NULL;
}

/* On a stack of the usual size, which is gone afterwards. */
static void run_recursion(void)
{
    end_thread(start_thread(recurses, NULL));
}

/* ---- functions that do not return ---- */

TRACED static void w_at_exit(void)
{
    ENTER(w_at_exit);
    say("at exit");
    LEAVE(w_at_exit);
}

TRACED __attribute__((noreturn)) static void w_calls_exit(void)
{
    ENTER(w_calls_exit);
    atexit(w_at_exit);
    exit(21);
}

TRACED __attribute__((noreturn)) static void w_calls__exit(void)
{
    ENTER(w_calls__exit);
    _exit(22);
}

TRACED __attribute__((noreturn)) static void w_aborts(void)
{
    ENTER(w_aborts);
    abort();
}

TRACED __attribute__((noreturn)) static void w_executes(void)
{
    ENTER(w_executes);
    execl("/bin/sh", "sh", "-c", "echo executed; exit 23", (char *)NULL);
    _exit(98);
}

TRACED __attribute__((noreturn)) static void w_only_jumps(void)
{
    ENTER(w_only_jumps);
    longjmp(target, 24);
}

static void jumps_and_ends(void)
{
    int code = setjmp(target);
    if (code)
        _exit(code);
    w_only_jumps();
}

static void run_no_return(void)
{
    in_child("exit", w_calls_exit);
    in_child("_exit", w_calls__exit);
    in_child("abort", w_aborts);
    in_child("execve", w_executes);
    in_child("longjmp", jumps_and_ends);
    w_calls_exit();
}

/* ---- signals at any instruction ---- */

TRACED static long w_inner_works(long a, double b)
{
    ENTER(w_inner_works);
    RETURN(w_inner_works, a + (long)b);
}

TRACED static long w_works(long a, long b, long c, long d, long e, long f, long g, double h)
{
    ENTER(w_works);
    RETURN(w_works, a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + w_inner_works(8, h));
}

static volatile long n_wrong;

static void work(long n)
{
    long got = w_works(n, 1, 1, 1, 1, 1, 1, 0.5 + (double)n);
    n_wrong += got != 2 * n + 27 + 8;
}

TRACED static void w_in_handler(int number)
{
    ENTER(w_in_handler);
    int saved = errno;
    work(number);
    errno = saved;
    LEAVE(w_in_handler);
}

static void storm(void (*handler)(int), int period_us, void (*once)(long), long n)
{
    struct itimerval often = {{0, period_us}, {0, period_us}}, never = {{0, 0}, {0, 0}};
    handle(SIGALRM, handler, SA_RESTART);
    setitimer(ITIMER_REAL, &often, NULL);
    for (long i = 0; i < n; i++)
        once(i);
    setitimer(ITIMER_REAL, &never, NULL);
}

static void run_storm(void)
{
    storm(w_in_handler, 150, work, 500000);
    printf("storm: %ld wrong\n", n_wrong);
}

/* Where signals may jump away from. */
static volatile sig_atomic_t may_jump;

static void handler_may_jump(int number)
{
    if (may_jump)
        w_handler_jumps(number);
}

static void work_or_jump(long n)
{
    if (!sigsetjmp(signal_target, 1)) {
        may_jump = 1;
        work(n);
    }
    may_jump = 0;
}

TRACED static long w_after(long x)
{
    ENTER(w_after);
    RETURN(w_after, x + 1);
}

/* Jumps away from any instruction, also those of a tracer; afterwards all is as it was. */
static void run_jumping_storm(void)
{
    storm(handler_may_jump, 40, work_or_jump, 40000);
    long sum = 0;
    for (long i = 0; i < 1000; i++)
        sum += w_after(i);
    printf("jumping storm: %ld wrong, %ld\n", n_wrong, sum);
}

enum { TRAP_FLAG = 0x100 };

static volatile int stepping;
static volatile long n_steps;

static void on_step(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info;
    ucontext_t *at = (ucontext_t *)context;
    if (!stepping) {
        at->uc_mcontext.gregs[REG_EFL] &= ~TRAP_FLAG;
        return;
    }
    n_steps++;
    work(n_steps);
}

TRACED static long w_stepped(long a, long b, long c, long d, long e, long f, long g, double h)
{
    ENTER(w_stepped);
    RETURN(w_stepped, (a ^ b ^ c ^ d ^ e ^ f ^ g) + (long)h);
}

/* Calls it with a signal after every instruction, from a caller that has all registers that a
 * callee has to keep in use. */
static long step_once(long x)
{
    long sum[6];
    register long rbx __asm__("rbx") = x + 1;
    register long r12 __asm__("r12") = x + 2;
    register long r13 __asm__("r13") = x + 3;
    register long r14 __asm__("r14") = x + 4;
    register long r15 __asm__("r15") = x + 5;
    __asm__ volatile("" : "+r"(rbx), "+r"(r12), "+r"(r13), "+r"(r14), "+r"(r15));
    stepping = 1;
    __asm__ volatile("sub $128, %%rsp; pushfq; orq $0x100, (%%rsp); popfq; add $128, %%rsp"
                     : : : "memory", "cc");
    sum[0] = w_stepped(x, 1, 2, 4, 8, 16, 32, 3.5);
    __asm__ volatile("" : "+r"(rbx), "+r"(r12), "+r"(r13), "+r"(r14), "+r"(r15) : : "memory");
    stepping = 0;
    __asm__ volatile("nop; nop");
    sum[1] = rbx, sum[2] = r12, sum[3] = r13, sum[4] = r14, sum[5] = r15;
    n_wrong += sum[0] != (x ^ 63) + 3;
    for (int i = 1; i < 6; i++)
        n_wrong += sum[i] != x + i;
    return sum[0];
}

static void run_steps(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_step;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGTRAP, &action, NULL);
    long sum = 0;
    for (long i = 0; i < 20; i++)
        sum += step_once(i << 8);
    fprintf(stderr, "steps %ld\n", n_steps);
    printf("steps: %ld, %ld wrong, %s\n", sum, n_wrong, n_steps > 200 ? "many" : "few");
}

int main(int argc, char **argv)
{
    static const struct scenario scenarios[] = {
        {"longjmp", run_longjmp},
        {"siglongjmp", run_siglongjmp},
        {"threads", run_threads},
        {"tail-calls", run_tail_calls},
        {"recursion", run_recursion},
        {"no-return", run_no_return},
        {"storm", run_storm},
        {"jumping-storm", run_jumping_storm},
        {"steps", run_steps},
        {NULL, NULL},
    };
    return ways_main(argc, argv, scenarios);
}
