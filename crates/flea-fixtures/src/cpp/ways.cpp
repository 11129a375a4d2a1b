// Ways out of C++ functions: see c/ways.h.
#define FUNCTIONS(X)                                                                           \
    X(w_throws) X(w_cleans_up) X(w_passes) X(w_catches) X(w_rethrows) X(w_nests)               \
    X(w_in_destructor) X(w_stores) X(w_throws_again) X(w_noexcept)                             \
    X(w_exits_thread) X(w_sleeps) X(w_leaves_thread) X(w_catches_all)                          \
    X(w_begins) X(w_between) X(w_resumes)
#include "ways.h"

#include <atomic>
#include <coroutine>
#include <csignal>
#include <cxxabi.h>
#include <exception>
#include <future>
#include <stdexcept>
#include <string>

static std::atomic<long> destroyed;

struct Counted {
    ~Counted() { destroyed++; }
};

// ---- throw, catch, throw again ----

extern "C" {

TRACED long w_throws(long x)
{
    ENTER(w_throws);
    if (x % 3 == 1)
        throw std::runtime_error("three");
    if (x % 3 == 2)
        throw x;
    RETURN(w_throws, x);
}

TRACED long w_cleans_up(long x)
{
    ENTER(w_cleans_up);
    Counted counted;
    RETURN(w_cleans_up, w_throws(x) + 1);
}

// More arguments than registers: a tracer's frame has copies of them.
TRACED long w_passes(long a, long b, long c, long d, long e, long f, long g, long h)
{
    ENTER(w_passes);
    RETURN(w_passes, w_cleans_up(a + b + c + d + e + f + g + h) + 1);
}

TRACED long w_catches(long x)
{
    ENTER(w_catches);
    long result;
    try {
        result = w_passes(x, 0, 3, 0, 6, 0, 9, 0);
    } catch (long value) {
        result = -value;
    } catch (const std::exception &e) {
        result = -1000 - (long)strlen(e.what());
    }
    RETURN(w_catches, result);
}

TRACED long w_rethrows(long x)
{
    ENTER(w_rethrows);
    Counted counted;
    try {
        RETURN(w_rethrows, w_passes(x, 3, 0, 3, 0, 3, 0, 3));
    } catch (const std::exception &) {
        throw;
    }
}

TRACED long w_nests(long x)
{
    ENTER(w_nests);
    try {
        RETURN(w_nests, w_rethrows(x));
    } catch (...) {
        std::throw_with_nested(std::logic_error("outer"));
    }
}

TRACED long w_in_destructor(long x)
{
    ENTER(w_in_destructor);
    RETURN(w_in_destructor, w_catches(x));
}

} // extern "C"

// Runs traced functions that throw and catch while an exception is on its way.
struct Throws {
    long x;
    long *sum;
    ~Throws() { *sum += w_in_destructor(x); }
};

static long throw_through_destructor(long x)
{
    long sum = 0;
    try {
        Throws throws{x + 1, &sum};
        sum += w_rethrows(x);
    } catch (const std::exception &) {
        sum += 10;
    } catch (long value) {
        sum += value;
    }
    return sum;
}

static void run_throw()
{
    long caught = 0, above = 0, nested = 0, destructor = 0;
    for (long x = 0; x < 999; x++) {
        caught += w_catches(x);
        try {
            above += w_rethrows(x);
        } catch (const std::exception &e) {
            above += (long)strlen(e.what());
        } catch (long value) {
            above -= value;
        }
        try {
            nested += w_nests(x);
        } catch (const std::nested_exception &e) {
            try {
                e.rethrow_nested();
            } catch (long value) {
                nested += value;
            } catch (const std::runtime_error &) {
                nested += 1;
            }
        }
        destructor += throw_through_destructor(x);
    }
    printf("throw %ld %ld %ld %ld, %ld destroyed\n", caught, above, nested, destructor,
           destroyed.load());
}

// ---- exceptions and threads ----

extern "C" {

TRACED long w_stores(long x)
{
    ENTER(w_stores);
    RETURN(w_stores, w_cleans_up(x));
}

TRACED long w_throws_again(std::exception_ptr *stored)
{
    ENTER(w_throws_again);
    Counted counted;
    if (*stored)
        std::rethrow_exception(*stored);
    RETURN(w_throws_again, 0);
}

}

struct Stored {
    long x;
    std::exception_ptr exception;
};

static void *stores(void *argument)
{
    Stored *stored = (Stored *)argument;
    try {
        w_stores(stored->x);
    } catch (...) {
        stored->exception = std::current_exception();
    }
    return nullptr;
}

static void run_exception_ptr()
{
    long sum = 0;
    for (long x = 0; x < 60; x++) {
        Stored stored{x, nullptr};
        end_thread(start_thread(stores, &stored));
        try {
            sum += w_throws_again(&stored.exception);
        } catch (long value) {
            sum += value;
        } catch (const std::exception &e) {
            sum += (long)strlen(e.what());
        }
    }
    printf("exception_ptr %ld, %ld destroyed\n", sum, destroyed.load());
}

extern "C" {

TRACED long w_noexcept(long x) noexcept
{
    ENTER(w_noexcept);
    RETURN(w_noexcept, w_cleans_up(x));
}

// The start function of a thread.
TRACED void *w_leaves_thread(void *x)
{
    ENTER(w_leaves_thread);
    w_passes((long)x, 0, 0, 0, 0, 0, 0, 0);
    LEAVE(w_leaves_thread);
    return nullptr;
}

}

static void says_why()
{
    try {
        std::rethrow_exception(std::current_exception());
    } catch (const std::exception &e) {
        printf("terminate: %s\n", e.what());
    } catch (...) {
        printf("terminate: something\n");
    }
    fflush(stdout);
    abort();
}

static void run_terminate()
{
    in_child("uncaught", [] { w_cleans_up(1); });
    in_child("noexcept", [] { w_noexcept(1); });
    in_child("thread", [] { end_thread(start_thread(w_leaves_thread, (void *)1)); });
    in_child("noexcept, handled", [] {
        std::set_terminate(says_why);
        w_noexcept(2);
    });
    in_child("thread, handled", [] {
        std::set_terminate(says_why);
        end_thread(start_thread(w_leaves_thread, (void *)1));
    });
    in_child("not at all", [] {
        w_noexcept(3);
        end_thread(start_thread(w_leaves_thread, (void *)3));
        _exit(31);
    });
}

// ---- the end of a thread ----

static std::atomic<int> sleeping;

extern "C" {

TRACED long w_exits_thread(long x)
{
    ENTER(w_exits_thread);
    Counted counted;
    if (opaque(x) >= 0)
        pthread_exit((void *)x);
    RETURN(w_exits_thread, x);
}

TRACED long w_sleeps(long x)
{
    ENTER(w_sleeps);
    Counted counted;
    sleeping = 1;
    while (opaque(x) >= 0)
        pause();
    RETURN(w_sleeps, x);
}

// A forced unwinding is caught and has to go on.
TRACED long w_catches_all(long x, long (*leaves)(long))
{
    ENTER(w_catches_all);
    Counted counted;
    try {
        RETURN(w_catches_all, leaves(x));
    } catch (abi::__forced_unwind &) {
        destroyed += 100;
        throw;
    }
}

}

static void *thread_leaves(void *leaves)
{
    Counted counted;
    w_catches_all(17, (long (*)(long))leaves);
    return nullptr;
}

static void end_of_thread(const char *name, long (*leaves)(long), bool cancel)
{
    destroyed = 0;
    void *result = nullptr;
    for (int i = 0; i < 20; i++) {
        sleeping = 0;
        thread thread = start_thread(thread_leaves, (void *)leaves);
        while (cancel && !sleeping)
            usleep(100);
        if (cancel)
            pthread_cancel(thread.id);
        result = end_thread(thread);
    }
    printf("%s %ld, %ld destroyed\n", name, result == PTHREAD_CANCELED ? -1 : (long)result,
           destroyed.load());
}

static void run_threads()
{
    end_of_thread("pthread_exit", w_exits_thread, false);
    end_of_thread("pthread_cancel", w_sleeps, true);
}

// ---- coroutines ----

struct Steps {
    struct promise_type {
        long value = 0;
        std::exception_ptr thrown;
        Steps get_return_object()
        {
            return {std::coroutine_handle<promise_type>::from_promise(*this)};
        }
        std::suspend_always initial_suspend() noexcept { return {}; }
        std::suspend_always final_suspend() noexcept { return {}; }
        std::suspend_always yield_value(long x)
        {
            value = x;
            return {};
        }
        void return_void() {}
        void unhandled_exception() { thrown = std::current_exception(); }
    };
    std::coroutine_handle<promise_type> handle;
};

extern "C" {

TRACED long w_between(long x)
{
    ENTER(w_between);
    RETURN(w_between, w_catches(x));
}

}

static Steps steps(long n)
{
    Counted counted;
    for (long i = 0; i < n; i++)
        co_yield w_between(i);
    w_throws(1);
}

extern "C" {

// Makes a coroutine, whose frame outlives this call.
TRACED void *w_begins(long n)
{
    ENTER(w_begins);
    void *made = steps(n).handle.address();
    LEAVE(w_begins);
    return made;
}

TRACED void *w_resumes(void *coroutine)
{
    ENTER(w_resumes);
    std::coroutine_handle<>::from_address(coroutine).resume();
    LEAVE(w_resumes);
    return nullptr;
}

}

// Every step is on a thread of its own.
static void run_coroutines()
{
    void *coroutine = w_begins(30);
    auto handle = std::coroutine_handle<Steps::promise_type>::from_address(coroutine);
    long sum = 0;
    while (!handle.done()) {
        end_thread(start_thread(w_resumes, coroutine));
        sum += handle.promise().value;
    }
    try {
        if (handle.promise().thrown)
            std::rethrow_exception(handle.promise().thrown);
    } catch (const std::exception &e) {
        printf("coroutine %ld, thrown %s, ", sum, e.what());
    }
    handle.destroy();
    printf("%ld destroyed\n", destroyed.load());
}

int main(int argc, char **argv)
{
    static const scenario scenarios[] = {
        {"throw", run_throw},
        {"exception-ptr", run_exception_ptr},
        {"terminate", run_terminate},
        {"threads", run_threads},
        {"coroutines", run_coroutines},
        {nullptr, nullptr},
    };
    return ways_main(argc, argv, scenarios);
}
