/* Exceptions of every way through functions that may be traced, and backtraces.
 *
 * usage: throws ROUNDS [wait]     a line of sums; with `wait`, "ready" and a line of stdin
 *                                 before, "done" and a line of stdin after. Ends with 7.
 *        throws inside            `waits` reads a line from stdin and then throws
 */
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <execinfo.h>
#include <stdexcept>
#include <thread>

#define TRACED extern "C" __attribute__((noinline, noclone))

static thread_local long destroyed;

struct Counted {
    ~Counted() { destroyed++; }
};

static void keep(long &x) { __asm__ volatile("" : "+r"(x) : : "memory"); }

static void line()
{
    char text[64];
    if (!fgets(text, sizeof text, stdin))
        exit(9);
}

static void say(const char *text)
{
    puts(text);
    fflush(stdout);
}

/* Overwrites what calls have left on the stack below, as a busy program does sooner or later:
 * who looks for return addresses there is to find those of calls that have not returned. */
static __attribute__((noinline)) void wipe(void)
{
    char below[65536];
    memset(below, 0, sizeof below);
    __asm__ volatile("" : : "r"(below) : "memory");
}

TRACED long thrower(long x)
{
    if (x % 3 == 0)
        throw std::runtime_error("three");
    if (x % 5 == 0)
        throw x;
    keep(x);
    return x;
}

/* Has something to clean up. */
TRACED long middle(long x)
{
    Counted counted;
    return thrower(x) + 1;
}

TRACED long rethrower(long x)
{
    try {
        return middle(x) + 1;
    } catch (const std::exception &) {
        throw;
    }
}

TRACED long catches_some(long x)
{
    try {
        return rethrower(x);
    } catch (long value) {
        return -value;
    }
}

/* Thrown, caught and gone inside one traced call. */
TRACED long catcher(long x)
{
    long sum;
    try {
        sum = catches_some(x) * 2;
    } catch (const std::exception &e) {
        sum = -1000 - x + (long)strlen(e.what());
    }
    keep(sum);
    return sum;
}

/* More arguments than registers: the frame has copies of them. */
TRACED long many(long a, long b, long c, long d, long e, long f, long g, long h)
{
    return thrower(a + b + c + d + e + f + g + h);
}

TRACED void start(long rounds, long *out)
{
    long sum = 0;
    for (long i = 1; i <= rounds; i++) {
        sum += catcher(i);
        try {
            sum += many(i, 0, 1, 0, 1, 0, 1, 0);
        } catch (...) {
            sum += 7;
        }
    }
    *out = sum * 1000 + destroyed % 1000;
}

static void *main_return;

TRACED long bottom(long n)
{
    void *frames[64];
    int found = backtrace(frames, 64);
    for (int i = 0; i < found; i++)
        if (frames[i] == main_return)
            return n;
    return -1;
}

TRACED long walker(long n)
{
    long r = n > 0 ? walker(n - 1) : bottom(5);
    keep(r);
    return r + 1;
}

TRACED long top(void)
{
    main_return = __builtin_return_address(0);
    long r = walker(5);
    memset(&main_return, 0, sizeof main_return);
    keep(r);
    return r;
}

TRACED long waits(long x)
{
    Counted counted;
    say("inside");
    line();
    return thrower(x);
}

TRACED long around(long x)
{
    long r;
    try {
        r = waits(x);
    } catch (const std::exception &) {
        r = 77;
    }
    keep(r);
    return r;
}

int main(int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "inside")) {
        say("ready");
        line();
        long r = around(3);
        printf("%ld %ld\n", r, destroyed);
        wipe();
        say("done");
        line();
        return 7;
    }
    long rounds = argc > 1 ? atol(argv[1]) : 1;
    bool wait = argc > 2 && !strcmp(argv[2], "wait");
    if (wait) {
        say("ready");
        line();
    }
    long first = 0, second = 0;
    std::thread thread(start, rounds, &first);
    start(rounds, &second);
    thread.join();
    long walked = rounds > 0 ? top() : 0;
    printf("%ld %ld %ld\n", first, second, walked);
    fflush(stdout);
    wipe();
    if (wait) {
        say("done");
        line();
    }
    return 7;
}
