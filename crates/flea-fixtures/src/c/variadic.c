/* Variadic functions, called with every number of arguments of every kind, from every position
 * of the stack, also from its very end. Prints what they return, so that a run can be compared
 * with another, and at the end how often each was called.
 *
 * usage: variadic [wait]       with wait: "ready", a line from stdin, the calls, "done", a line
 */
#define _GNU_SOURCE
#include <alloca.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#define KEEP __attribute__((noinline, noclone, used))

struct small { long a; double b; };
struct big { long a[5]; };
struct wide { long a[4]; } __attribute__((aligned(32)));
struct cache_line { long a[8]; } __attribute__((aligned(64)));

static long n_mixed, n_longs, n_first, n_named;

static unsigned long mix(unsigned long h, const void *bytes, size_t n)
{
    const unsigned char *b = bytes;
    while (n--)
        h = (h ^ *b++) * 0x100000001b3ul;
    return h;
}

/* One letter per argument: i int, l long, d double, D long double, s small, b big, w wide. */
KEEP unsigned long mixed(const char *kinds, ...)
{
    unsigned long h = 0xcbf29ce484222325ul;
    va_list list;
    va_start(list, kinds);
    __atomic_fetch_add(&n_mixed, 1, __ATOMIC_RELAXED);
    for (const char *k = kinds; *k; k++) {
        switch (*k) {
        case 'i': { int v = va_arg(list, int); h = mix(h, &v, sizeof v); break; }
        case 'l': { long v = va_arg(list, long); h = mix(h, &v, sizeof v); break; }
        case 'd': { double v = va_arg(list, double); h = mix(h, &v, sizeof v); break; }
        case 'D': { long double v = va_arg(list, long double); h = mix(h, &v, 10); break; }
        case 's': { struct small v = va_arg(list, struct small); h = mix(h, &v, sizeof v); break; }
        case 'w': { struct wide v = va_arg(list, struct wide); h = mix(h, &v, sizeof v); break; }
        case 'b': { struct big v = va_arg(list, struct big); h = mix(h, &v, sizeof v); break; }
        }
    }
    va_end(list);
    return h;
}

KEEP long longs(long n, ...)
{
    long sum = 0;
    va_list list;
    va_start(list, n);
    __atomic_fetch_add(&n_longs, 1, __ATOMIC_RELAXED);
    for (long i = 1; i <= n; i++)
        sum += i * va_arg(list, long);
    va_end(list);
    return sum;
}

/* Named arguments on the stack, in front of the others. */
KEEP double named(struct big b, long double x, long n, ...)
{
    double sum = b.a[0] + 2 * b.a[4] + (double)x;
    va_list list;
    va_start(list, n);
    __atomic_fetch_add(&n_named, 1, __ATOMIC_RELAXED);
    for (long i = 0; i < n; i++)
        sum += va_arg(list, double);
    va_end(list);
    return sum;
}

/* What a thread or a coroutine begins with. */
KEEP void *first(void *arg, ...)
{
    va_list list;
    va_start(list, arg);
    __atomic_fetch_add(&n_first, 1, __ATOMIC_RELAXED);
    *(long *)arg += 1;
    va_end(list);
    return arg;
}

/* Over-aligned arguments in memory: 1 for each that is where it must be. The compiler is sure
 * that they are; what is asked goes through a register that it knows nothing of. */
#define IS_ALIGNED(x, n) ({ uintptr_t p_; __asm__("" : "=r"(p_) : "0"(&(x))); p_ % (n) == 0; })

KEEP long aligned32(long a, struct wide x, long b, struct big y, struct wide z)
{
    return a + b + y.a[3] + x.a[3] + z.a[0] + 100 * IS_ALIGNED(x, 32) + 1000 * IS_ALIGNED(z, 32);
}

KEEP long aligned64(struct big y, long a, struct cache_line x, long double b)
{
    return a + (long)b + y.a[1] + x.a[7] + 100 * IS_ALIGNED(x, 64);
}

/* As a compiler would load it that vectorises. */
KEEP __attribute__((target("avx"))) long loaded(struct big y, struct wide x)
{
    struct wide copy;
    __asm__("vmovaps %1, %%ymm5\n\tvmovups %%ymm5, %0" : "=m"(copy) : "m"(x) : "xmm5");
    return copy.a[0] + copy.a[3] + y.a[4];
}

static void over_aligned(void)
{
    struct wide w = {{1, 2, 3, 4}};
    struct big b = {{5, 6, 7, 8, 9}};
    struct cache_line c = {{1, 2, 3, 4, 5, 6, 7, 8}};
    long sum = 0;
    for (long i = 0; i < 8; i++) {
        sum += aligned32(1, w, i, b, w) + aligned64(b, i, c, 3.0L);
        sum += __builtin_cpu_supports("avx") ? loaded(b, w) : 14;
    }
    printf("over-aligned: %ld\n", sum);
}

#include "variadic_calls.h"

/* long call_at(void *rsp, long (*f)(long, ...)): f(0) with its first stack argument at rsp. */
long call_at(void *rsp, long (*f)(long, ...));
__asm__(".text\n.globl call_at\n.type call_at,@function\ncall_at:\n"
        ".cfi_startproc\npush %rbx\n.cfi_adjust_cfa_offset 8\n.cfi_offset rbx,-16\n"
        "mov %rsp,%rbx\n.cfi_def_cfa_register rbx\nmov %rdi,%rsp\nxor %edi,%edi\nxor %eax,%eax\n"
        "call *%rsi\nmov %rbx,%rsp\n.cfi_def_cfa_register rsp\npop %rbx\n"
        ".cfi_adjust_cfa_offset -8\nret\n.cfi_endproc\n.size call_at,.-call_at");

enum { PAGE = 4096, STACK = 16 * PAGE };

/* A stack with an unmapped page right above it. */
static char *lone_stack(void)
{
    char *at = mmap(0, STACK + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED || mprotect(at + STACK, PAGE, PROT_NONE))
        abort();
    return at;
}

static void at_the_end_of_a_stack(void)
{
    char *stack = lone_stack();
    long sum = 0;
    for (long below = 0; below <= PAGE; below += 16)
        sum += call_at(stack + STACK - below, longs) + 1;
    printf("at the end: %ld\n", sum);
}

static void at_every_position(void)
{
    long sum = 0;
    for (long below = 0; below < PAGE; below += 16) {
        volatile char *room = alloca(16);
        room[0] = 1;
        sum += longs(9, 1l, 2l, 3l, 4l, 5l, 6l, 7l, 8l, below);
        sum ^= (long)mixed("lbDsid", 7l, (struct big){{1, 2, 3, 4, below}}, 2.5L,
                           (struct small){below, 0.5}, 9, 1.5);
    }
    printf("at every position: %lx\n", sum);
}

static ucontext_t home, away;

static void in_other_contexts(void)
{
    long n = 0;
    pthread_t thread;
    void *(*start)(void *) = (void *(*)(void *))first;
    if (pthread_create(&thread, 0, start, &n) || pthread_join(thread, 0))
        abort();
    char *stack = lone_stack();
    for (int i = 0; i < 20; i++) {
        getcontext(&away);
        away.uc_stack.ss_sp = stack;
        away.uc_stack.ss_size = STACK - 16 * i;
        away.uc_link = &home;
        makecontext(&away, (void (*)(void))first, 1, (void *)&n);
        swapcontext(&home, &away);
    }
    printf("in other contexts: %ld\n", n);
}

static void of_libc(void)
{
    char text[512];
    int n = snprintf(text, sizeof text, "%d %s %.3f %Lg %c %ld %d %d %g %g %g %g %g %g %g %g %x",
                     1, "two", 3.0, 4.0L, '5', 6l, 7, 8, .9, 1., 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 17);
    printf("%d %s\n", n, text);
    fprintf(stdout, "%s %d %d %d %d %d %d %f\n", "fprintf", 1, 2, 3, 4, 5, 6, 7.0);
    int fd = open("/dev/null", O_RDWR | O_CREAT, 0600);
    printf("open %d fcntl %d\n", fd >= 0, fcntl(fd, F_GETFD, 0));
    close(fd);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        execl("/bin/echo", "echo", "execl", "b", "c", "d", "e", "f", "g", "h", (char *)0);
        _exit(1);
    }
    int status;
    printf("waited %d\n", waitpid(child, &status, 0) == child && status == 0);
}

static void wait_line(void)
{
    char line[64];
    if (!fgets(line, sizeof line, stdin))
        exit(9);
}

int main(int argc, char **argv)
{
    int waits = argc > 1 && !strcmp(argv[1], "wait");
    if (waits) {
        puts("ready");
        fflush(stdout);
        wait_line();
    }
    all_calls();
    over_aligned();
    at_the_end_of_a_stack();
    at_every_position();
    in_other_contexts();
    of_libc();
    printf("calls: mixed %ld longs %ld named %ld first %ld\n", n_mixed, n_longs, n_named, n_first);
    fflush(stdout);
    if (waits) {
        puts("done");
        fflush(stdout);
        wait_line();
    }
    return 0;
}
