// The C++ shapes: overloads, namespaces, methods, virtual calls, templates, references,
// and exceptions thrown through several frames. Names are as a demangler prints them.
// See harness.h for the usage and the output.
#include "harness.h"
#include <string>

namespace geo {
NOINLINE int area(int side)
{
    KEEP();
    return side * side;
}
NOINLINE double area(double w, double h)
{
    KEEP();
    return w * h;
}
namespace inner {
NOINLINE long scale(long x)
{
    KEEP();
    return x * 10;
}
} // namespace inner
} // namespace geo

class Account {
public:
    NOINLINE long deposit(long amount)
    {
        KEEP();
        total_ += amount;
        return total_;
    }

private:
    long total_ = 0;
};

struct Shape {
    virtual ~Shape() = default;
    virtual int sides(int extra) const = 0;
};
struct Square : Shape {
    NOINLINE int sides(int extra) const override
    {
        KEEP();
        return 4 + extra;
    }
};
struct Triangle : Shape {
    NOINLINE int sides(int extra) const override
    {
        KEEP();
        return 3 + extra * 2;
    }
};

template <typename T> NOINLINE T twice(T x)
{
    KEEP();
    return x + x;
}

NOINLINE unsigned long text(const std::string &s)
{
    KEEP();
    return s.size();
}

// Returned through a hidden pointer, with a destructor.
NOINLINE std::string repeat(char c, int n)
{
    KEEP();
    return std::string(static_cast<size_t>(n), c);
}

static thread_local long guards_dropped;
struct Guard {
    ~Guard() { guards_dropped++; }
};

NOINLINE int may_throw(int n)
{
    KEEP();
    if (n % 3 == 0)
        throw n;
    return n;
}

NOINLINE int passes(int n)
{
    Guard guard;
    int r = may_throw(n);
    KEEP();
    return r + 1;
}

NOINLINE int catches(int n)
{
    try {
        return passes(n);
    } catch (int thrown) {
        return -thrown;
    }
}

enum {
    AREA_INT, AREA_DOUBLE, SCALE, DEPOSIT, SQUARE, TRIANGLE, TWICE_INT, TWICE_DOUBLE, TEXT,
    REPEAT, MAY_THROW, PASSES, CATCHES, N_FUNCTIONS
};

static const char *const names[] = {
    "geo::area(int)", "geo::area(double, double)", "geo::inner::scale(long)",
    "Account::deposit(long)", "Square::sides(int) const", "Triangle::sides(int) const",
    "int twice<int>(int)", "double twice<double>(double)",
    "text(std::__cxx11::basic_string<char, std::char_traits<char>, std::allocator<char> > const&)",
    "repeat[abi:cxx11](char, int)", "may_throw(int)", "passes(int)", "catches(int)",
};

static void run_plain(struct work *w, long i, Account &account, long &balance)
{
    int a = static_cast<int>(i & 1023);

    int area = geo::area(a);
    counted(w, AREA_INT, a, area);
    check(w, area == a * a);

    double wide = geo::area(static_cast<double>(i), 2.0);
    counted(w, AREA_DOUBLE, i, static_cast<unsigned long>(wide));
    check(w, wide == static_cast<double>(i) * 2.0);

    long scaled = geo::inner::scale(i);
    counted(w, SCALE, i, scaled);
    check(w, scaled == i * 10);

    balance += i;
    long total = account.deposit(i);
    counted(w, DEPOSIT, reinterpret_cast<unsigned long>(&account), total);
    check(w, total == balance);

    int t = twice<int>(a);
    counted(w, TWICE_INT, a, t);
    check(w, t == a * 2);
    double d = twice<double>(a);
    counted(w, TWICE_DOUBLE, a, static_cast<unsigned long>(d));
    check(w, d == a * 2.0);
}

static void run_objects(struct work *w, long i, const Shape *const *shapes)
{
    int extra = static_cast<int>(i & 15);
    const Shape *shape = shapes[i & 1];
    int sides = shape->sides(extra);
    counted(w, i & 1 ? TRIANGLE : SQUARE, reinterpret_cast<unsigned long>(shape), sides);
    check(w, sides == (i & 1 ? 3 + extra * 2 : 4 + extra));

    std::string word = repeat('x', extra);
    counted(w, REPEAT, 0, 0);
    unsigned long size = text(word);
    counted(w, TEXT, reinterpret_cast<unsigned long>(&word), size);
    check(w, size == static_cast<unsigned long>(extra));
}

// A function left by an exception is counted, with no return value.
static void run_throwing(struct work *w, long i)
{
    int n = static_cast<int>(i & 1023);
    bool throws = n % 3 == 0;
    long dropped = guards_dropped;
    int r = catches(n);
    counted(w, CATCHES, n, static_cast<unsigned long>(static_cast<long>(r)));
    counted(w, PASSES, n, throws ? 0 : n + 1);
    counted(w, MAY_THROW, n, throws ? 0 : n);
    check(w, r == (throws ? -n : n + 1));
    check(w, guards_dropped == dropped + 1);
}

static void run(struct work *w)
{
    Account account;
    long balance = 0;
    Square square;
    Triangle triangle;
    const Shape *volatile shapes[] = {&square, &triangle};
    const Shape *const both[] = {shapes[0], shapes[1]};
    for (long i = 0; i < w->calls; i++) {
        run_plain(w, i, account, balance);
        run_objects(w, i, both);
        run_throwing(w, i);
    }
}

int main(int argc, char **argv)
{
    static const struct program program = {names, N_FUNCTIONS, NULL, run};
    return harness_main(argc, argv, &program);
}
