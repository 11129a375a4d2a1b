// C++ frames that Rust panics pass through, and exceptions that pass through Rust frames.
#include <stdexcept>

static long destroyed;

struct Counted {
    ~Counted() { destroyed++; }
};

extern "C" {

long w_rust_panics(long x);
long w_rust_passes(long x);
void entered(int which);
void returned(int which);

long n_destroyed() { return destroyed; }

// Between two Rust functions, with something to destroy.
__attribute__((noinline)) long w_between_rust(long x)
{
    entered(0);
    Counted counted;
    long result = w_rust_panics(x) + 1;
    returned(0);
    return result;
}

__attribute__((noinline)) long w_cpp_throws(long x)
{
    entered(1);
    if (x % 2)
        throw std::runtime_error("odd");
    returned(1);
    return x;
}

// Catches what passed through a Rust function.
__attribute__((noinline)) long w_cpp_catches(long x)
{
    entered(2);
    long result;
    try {
        result = w_rust_passes(x);
    } catch (const std::exception &) {
        result = -1;
    }
    returned(2);
    return result;
}

}
