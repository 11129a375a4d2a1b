/* Functions of many shapes, each called a known number of times by several threads at once.
 * See harness.h for the usage and the output. */
#include "harness.h"
#include <stdarg.h>

struct pair {
    int x;
    long y;
};

struct huge {
    long v[5];
};

enum {
    ADD, LEAF, BIG, SUM_DOUBLE, STR, SWAP_PAIR, ROTATE_HUGE, MIXED, SUM_ALL, NARROW, CHOOSE,
    DOWN, HIDDEN, TAIL, TAIL_END, BY_POINTER, HALF, N_FUNCTIONS
};

static const char *const names[] = {
    "add", "leaf", "big", "sum_double", "str", "swap_pair", "rotate_huge", "mixed", "sum_all",
    "narrow", "choose", "down", "hidden", "tail", "tail_end", "by_pointer", "half",
};

NOINLINE int add(int a, int b)
{
    KEEP();
    return a + b;
}

/* A single `ret` where the optimiser is on. */
NOINLINE void leaf(void)
{
    KEEP();
}

/* Two arguments on the stack. */
NOINLINE long big(long a, long b, long c, long d, long e, long f, long g, long h)
{
    KEEP();
    return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h;
}

NOINLINE double sum_double(double a, double b)
{
    KEEP();
    return a + b;
}

NOINLINE unsigned long str(const char *s)
{
    KEEP();
    return strlen(s);
}

/* Struct in two registers, result in rax:rdx. */
NOINLINE struct pair swap_pair(struct pair p)
{
    KEEP();
    struct pair r = {(int)p.y, p.x};
    return r;
}

/* Struct on the stack, result through a hidden pointer. */
NOINLINE struct huge rotate_huge(struct huge h)
{
    KEEP();
    struct huge r = {{h.v[1], h.v[2], h.v[3], h.v[4], h.v[0]}};
    return r;
}

NOINLINE double mixed(int a, double b, char c, float d, long e)
{
    KEEP();
    return a + b + c + (double)d + (double)e;
}

NOINLINE long sum_all(int n, ...)
{
    va_list ap;
    long sum = 0;
    va_start(ap, n);
    for (int i = 0; i < n; i++)
        sum += va_arg(ap, long);
    va_end(ap);
    KEEP();
    return sum;
}

NOINLINE unsigned char narrow(signed char a, unsigned short b, _Bool c)
{
    KEEP();
    return (unsigned char)(a + b + c);
}

/* A jump table. */
NOINLINE int choose(int n)
{
    KEEP();
    switch (n) {
    case 0: KEEP(); return 11;
    case 1: __asm__ volatile("nop"); return 7;
    case 2: return add(1, 1) + 20;
    case 3: leaf(); return 5;
    case 4: __asm__ volatile("nop;nop"); return 31;
    case 5: __asm__ volatile("nop;nop;nop"); return 2;
    case 6: return n * 3;
    default: return -1;
    }
}

/* Recursion that no optimiser turns into a loop. */
NOINLINE long down(long n)
{
    long r = n > 0 ? down(n - 1) : 0;
    __asm__ volatile("" : "+r"(r));
    return r + n;
}

/* A local function: gcc may use a calling convention of its own (-fipa-ra). */
static NOINLINE int hidden(int a, int b)
{
    KEEP();
    return a * 3 + b;
}

NOINLINE int tail_end(int a)
{
    KEEP();
    return a * 2;
}

NOINLINE int tail(int a)
{
    KEEP();
    return tail_end(a + 1);
}

NOINLINE int by_pointer(int a)
{
    KEEP();
    return ~a;
}

/* An x87 argument and result. */
NOINLINE long double half(long double x)
{
    KEEP();
    return x / 2;
}

static int (*volatile pointer)(int) = by_pointer;

static void run_integers(struct work *w, long i)
{
    static const char *const words[] = {"", "a", "four", "a longer string than that"};
    int a = (int)i, t = (int)w->thread;

    int sum = add(a, t);
    counted(w, ADD, (unsigned long)(long)a, (unsigned long)(long)sum);
    check(w, sum == a + t);

    leaf();
    counted(w, LEAF, 0, 0);

    long all = big(i, t, 3, 4, 5, 6, 7, -8);
    counted(w, BIG, (unsigned long)i, (unsigned long)all);
    check(w, all == i + 2 * t + 9 + 16 + 25 + 36 + 49 - 64);

    const char *word = words[i & 3];
    unsigned long length = str(word);
    counted(w, STR, (unsigned long)word, length);
    check(w, length == strlen(word));

    long many = sum_all(7, i, 1L, 2L, 3L, 4L, 5L, (long)t);
    counted(w, SUM_ALL, 7, (unsigned long)many);
    check(w, many == i + 15 + t);

    signed char c = (signed char)(i & 127);
    unsigned char n = narrow((signed char)-c, (unsigned short)(i & 0xffff), i & 1);
    counted(w, NARROW, (unsigned long)(long)-c, n);
    check(w, n == (unsigned char)(-c + (i & 0xffff) + (i & 1)));

    int p = pointer(a);
    counted(w, BY_POINTER, (unsigned long)(long)a, (unsigned long)(long)p);
    check(w, p == ~a);

    int h = hidden(a, t);
    counted(w, HIDDEN, (unsigned long)(long)a, (unsigned long)(long)h);
    check(w, h == a * 3 + t);
}

static void run_control(struct work *w, long i)
{
    static const int chosen[] = {11, 7, 22, 5, 31, 2, 18, -1};
    int a = (int)i, which = a & 7;

    int c = choose(which);
    counted(w, CHOOSE, (unsigned long)which, (unsigned long)(long)c);
    check(w, c == chosen[which]);
    if (which == 2)
        counted(w, ADD, 1, 2);
    if (which == 3)
        counted(w, LEAF, 0, 0);

    long r = down(5);
    check(w, r == 15);
    for (unsigned long n = 0, d = 0; n <= 5; n++) {
        d += n;
        counted(w, DOWN, n, d);
    }

    int e = tail(a);
    counted(w, TAIL, (unsigned long)(long)a, (unsigned long)(long)e);
    counted(w, TAIL_END, (unsigned long)(long)(a + 1), (unsigned long)(long)e);
    check(w, e == (a + 1) * 2);
}

static void run_wide(struct work *w, long i)
{
    double d = sum_double((double)i, (double)w->thread);
    counted(w, SUM_DOUBLE, (unsigned long)i, (unsigned long)(long)d);
    check(w, d == (double)(i + w->thread));

    struct pair in = {(int)i, i * 2 + w->thread};
    struct pair out = swap_pair(in);
    counted(w, SWAP_PAIR, 0, 0);
    check(w, out.x == (int)in.y && out.y == in.x);

    struct huge before = {{i, 1, 2, 3, w->thread}};
    struct huge after = rotate_huge(before);
    counted(w, ROTATE_HUGE, 0, 0);
    check(w, after.v[0] == 1 && after.v[3] == w->thread && after.v[4] == i);

    double m = mixed((int)i, 2.0, 'A', 4.0f, w->thread);
    counted(w, MIXED, (unsigned long)i, (unsigned long)(long)m);
    check(w, m == (double)(i + 2 + 'A' + 4 + w->thread));

    long double l = half((long double)(i * 2));
    counted(w, HALF, (unsigned long)i * 2, (unsigned long)(long)l);
    check(w, l == (long double)i);
}

static void run(struct work *w)
{
    for (long i = 0; i < w->calls; i++) {
        run_integers(w, i);
        run_control(w, i);
        run_wide(w, i);
    }
}

int main(int argc, char **argv)
{
    static const struct program program = {names, N_FUNCTIONS, NULL, run};
    return harness_main(argc, argv, &program);
}
