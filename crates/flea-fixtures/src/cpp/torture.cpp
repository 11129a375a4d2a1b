// A program to be traced, stopped and signalled at random while it checks all that it does.
//
// usage: torture [without-NAME]...    NAME: throw churn plugin fork signals queue
//
// Threads compute what is known, throw and catch, start and join threads, open and close a
// library, fork, wait with timeouts, and timers interrupt all of them. Main prints
//   ready
//   beat N TIME ERRORS STALL_MS BORN    every 10 ms; TIME: after the call of `pulse`, ns since the
//                                       epoch; STALL_MS: the longest that a thread has been where
//                                       it is; BORN: threads and children so far
// and reads lines: "quiet" ends the threads and timers and is answered by "quiet", "go" starts
// them again, "end" exits with code 7 (3 after an error). The end of input exits at once. What
// went wrong is said on stderr.
#include "torture.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define NOINLINE __attribute__((noinline))

static std::atomic<bool> running;
static std::atomic<unsigned long> n_errors, n_threads, n_forks;
static std::string plugin_path;

static void wrong(const char *what, unsigned long found, unsigned long expected)
{
    n_errors++;
    fprintf(stderr, "torture: %s: %#lx, not %#lx (errno %d)\n", what, found, expected, errno);
}

extern "C" NOINLINE unsigned long step(unsigned long x)
{
    __asm__ volatile("" ::: "memory");
    return mixed(x);
}

static unsigned long steps_inline(unsigned long x, int rounds)
{
    for (int i = 0; i < rounds; i++)
        x = mixed(x);
    return x;
}

extern "C" NOINLINE unsigned long steps(unsigned long x, int rounds)
{
    for (int i = 0; i < rounds; i++)
        x = step(x);
    return x;
}

extern "C" NOINLINE double blend(double a, float b, int c, unsigned long d)
{
    __asm__ volatile("" ::: "memory");
    return a * 2 + b + c + (double)(d & 0xff);
}

struct Wide {
    unsigned long word[5];
};

extern "C" NOINLINE Wide spread(unsigned long x, Wide w)
{
    __asm__ volatile("" ::: "memory");
    for (unsigned long &word : w.word)
        word += x;
    return w;
}

extern "C" NOINLINE unsigned long down(unsigned long n)
{
    return n == 0 ? 0 : 1 + down(n - 1);
}

NOINLINE int may_throw(int depth, int bad)
{
    std::string name = "depth " + std::to_string(depth);
    if (depth == 0) {
        if (bad)
            throw std::runtime_error(name);
        return 1;
    }
    int below = may_throw(depth - 1, bad);
    return below + (name.size() > 5);
}

struct Base {
    virtual ~Base() = default;
    virtual NOINLINE unsigned long turn(unsigned long x) const { return x + 1; }
};
struct Derived : Base {
    NOINLINE unsigned long turn(unsigned long x) const override { return step(x); }
};

// Main calls it once per beat: its calls are known from outside.
extern "C" NOINLINE unsigned long pulse(unsigned long n)
{
    __asm__ volatile("" ::: "memory");
    return n + 1;
}

// The progress of a thread, looked at by main.
struct Progress {
    std::atomic<unsigned long> n{0};
    unsigned long seen = 0;
    std::chrono::steady_clock::time_point since;
};
static Progress progress[8];

static void compute(Progress &mine)
{
    std::unique_ptr<Base> virt = std::make_unique<Derived>();
    for (unsigned long seed = 1; running; seed++, mine.n++) {
        unsigned long found = steps(seed, 40), expected = steps_inline(seed, 40);
        if (found != expected)
            wrong("steps", found, expected);
        double b = blend(1.5, 2.25f, (int)(seed & 7), seed);
        if (b != 5.25 + (double)(seed & 7) + (double)(seed & 0xff))
            wrong("blend", (unsigned long)b, seed);
        Wide w = spread(seed, Wide{{1, 2, 3, 4, 5}});
        for (unsigned long i = 0; i < 5; i++)
            if (w.word[i] != seed + 1 + i)
                wrong("spread", w.word[i], seed + 1 + i);
        if (down(seed % 20) != seed % 20)
            wrong("down", down(seed % 20), seed % 20);
        if (virt->turn(seed) != mixed(seed))
            wrong("turn", virt->turn(seed), mixed(seed));
        std::map<unsigned long, std::string> map;
        for (unsigned long i = 0; i < 8; i++)
            map[mixed(i + seed)] = std::to_string(i);
        unsigned long sum = 0;
        for (auto &[key, value] : map)
            sum += std::stoul(value);
        if (sum != 28)
            wrong("map", sum, 28);
    }
}

static void throwing(Progress &mine)
{
    for (int i = 0; running; i++, mine.n++) {
        int depth = i % 12, bad = i % 3 == 0;
        try {
            int n = may_throw(depth, bad);
            if (bad || n != depth + 1)
                wrong("may_throw returned", (unsigned long)n, (unsigned long)depth + 1);
        } catch (const std::runtime_error &e) {
            if (!bad || strcmp(e.what(), "depth 0") != 0)
                wrong(e.what(), (unsigned long)bad, 1);
        }
    }
}

static NOINLINE void short_life(unsigned long seed, unsigned long *result)
{
    thread_local unsigned long kept = seed;
    kept = steps(kept, 3);
    *result = kept;
}

static void churn(Progress &mine)
{
    for (unsigned long seed = 1; running; seed += 4, mine.n++) {
        unsigned long results[4] = {};
        std::vector<std::thread> threads;
        for (unsigned long i = 0; i < 4; i++)
            threads.emplace_back(short_life, seed + i, &results[i]);
        for (std::thread &thread : threads)
            thread.join();
        for (unsigned long i = 0; i < 4; i++)
            if (results[i] != steps_inline(seed + i, 3))
                wrong("short_life", results[i], steps_inline(seed + i, 3));
        n_threads += 4;
    }
}

static void plugin(Progress &mine)
{
    for (unsigned long seed = 1; running; seed++, mine.n++) {
        void *library = dlopen(plugin_path.c_str(), RTLD_NOW | RTLD_LOCAL);
        auto *work = library ? (unsigned long (*)(unsigned long, int))dlsym(library, "plugin_work") : nullptr;
        if (!work) {
            wrong(dlerror(), 0, 1);
            return;
        }
        unsigned long found = work(seed, 20);
        if (found != steps_inline(seed, 20))
            wrong("plugin_work", found, steps_inline(seed, 20));
        std::this_thread::sleep_for(std::chrono::milliseconds(1 + seed % 7));
        if (dlclose(library))
            wrong("dlclose", 1, 0);
    }
}

static void forks(Progress &mine)
{
    for (unsigned long seed = 1; running; seed++, mine.n++) {
        pid_t child = fork();
        if (child == 0)
            _exit((int)(steps(seed, 30) & 0x7f));
        if (child < 0) {
            wrong("fork", 0, 1);
            continue;
        }
        int status = 0;
        while (waitpid(child, &status, 0) < 0)
            if (errno != EINTR) {
                wrong("waitpid", 0, (unsigned long)child);
                break;
            }
        unsigned long expected = (steps_inline(seed, 30) & 0x7f) << 8;
        if ((unsigned long)status != expected)
            wrong("a child's status", (unsigned long)status, expected);
        n_forks++;
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
}

static std::mutex queue_mutex;
static std::condition_variable queue_ready;
static std::deque<unsigned long> queue;
static unsigned long n_put, n_taken;

static void put(Progress &mine)
{
    for (; running; mine.n++) {
        {
            std::lock_guard lock(queue_mutex);
            for (int i = 0; i < 5; i++)
                queue.push_back(n_put++);
        }
        queue_ready.notify_one();
        std::this_thread::sleep_for(std::chrono::microseconds(500));
    }
}

static void take(Progress &mine)
{
    for (; running; mine.n++) {
        std::unique_lock lock(queue_mutex);
        queue_ready.wait_for(lock, std::chrono::milliseconds(2), [] { return !queue.empty(); });
        for (; !queue.empty(); queue.pop_front(), n_taken++)
            if (queue.front() != n_taken)
                wrong("the queue", queue.front(), n_taken);
    }
}

static NOINLINE void on_signal(int signal, siginfo_t *, void *)
{
    int before = errno;
    if (steps((unsigned long)signal, 5) != steps_inline((unsigned long)signal, 5))
        n_errors++;
    errno = before;
}

static void set_timers(long period_us)
{
    itimerval real = {{0, period_us}, {0, period_us}}, prof = {{0, period_us / 2}, {0, period_us / 2}};
    setitimer(ITIMER_REAL, &real, nullptr);
    setitimer(ITIMER_PROF, &prof, nullptr);
}

struct Part {
    const char *name;
    void (*run)(Progress &);
};
static const Part parts[] = {
    {"compute", compute}, {"throw", throwing}, {"churn", churn}, {"plugin", plugin},
    {"fork", forks},      {"queue", put},      {"queue", take},
};
enum { N_PARTS = sizeof parts / sizeof *parts };
static std::vector<std::string> without;
static std::vector<std::thread> workers;
static bool active[N_PARTS];

static bool wanted(const char *name)
{
    for (const std::string &word : without)
        if (word == std::string("without-") + name)
            return false;
    return true;
}

static void go()
{
    running = true;
    for (int i = 0; i < N_PARTS; i++) {
        active[i] = wanted(parts[i].name);
        progress[i].since = std::chrono::steady_clock::now();
        if (active[i])
            workers.emplace_back(parts[i].run, std::ref(progress[i]));
    }
    if (wanted("signals"))
        set_timers(20000);
}

static void quiet()
{
    running = false;
    set_timers(0);
    for (std::thread &worker : workers)
        worker.join();
    workers.clear();
    std::lock_guard lock(queue_mutex);
    if (n_taken + queue.size() != n_put)
        wrong("queued", n_taken + queue.size(), n_put);
}

// The longest that a thread has been where it was, in milliseconds.
static long stall_ms()
{
    auto now = std::chrono::steady_clock::now();
    long longest = 0;
    for (int i = 0; i < N_PARTS; i++) {
        Progress &p = progress[i];
        unsigned long n = p.n;
        long ms = (long)std::chrono::duration_cast<std::chrono::milliseconds>(now - p.since).count();
        if (active[i] && running && ms > longest)
            longest = ms;
        if (n != p.seen) {
            p.seen = n;
            p.since = now;
        }
    }
    return longest;
}

static bool read_line(std::string &line)
{
    static std::string pending;
    size_t end = pending.find('\n');
    if (end == std::string::npos) {
        pollfd in = {0, POLLIN, 0};
        if (poll(&in, 1, 10) <= 0)
            return false;
        char bytes[256];
        ssize_t n = read(0, bytes, sizeof bytes);
        if (n < 0)
            return false;
        if (n == 0)
            _exit(9);
        pending.append(bytes, (size_t)n);
        end = pending.find('\n');
        if (end == std::string::npos)
            return false;
    }
    line = pending.substr(0, end);
    pending.erase(0, end + 1);
    return true;
}

static void say(const std::string &text)
{
    std::string line = text + "\n";
    for (size_t done = 0; done < line.size();) {
        ssize_t n = write(1, line.data() + done, line.size() - done);
        if (n < 0 && errno != EINTR)
            _exit(9);
        done += n > 0 ? (size_t)n : 0;
    }
}

static void handle_signals()
{
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    for (int signal : {SIGALRM, SIGPROF, SIGUSR1, SIGTRAP, SIGRTMIN + 1})
        sigaction(signal, &action, nullptr);
    // This one interrupts system calls.
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGUSR2, &action, nullptr);
}

int main(int argc, char **argv)
{
    without.assign(argv + 1, argv + argc);
    plugin_path = argv[0];
    plugin_path = plugin_path.substr(0, plugin_path.rfind('/') + 1) + "libtorture_plugin.so";
    handle_signals();
    go();
    say("ready");
    std::string line;
    for (unsigned long n = 0;;) {
        if (read_line(line)) {
            if (line == "end")
                break;
            if (line == "go")
                go();
            if (line == "quiet") {
                quiet();
                say("quiet");
            }
        }
        n = pulse(n);
        char beat[160];
        auto now = std::chrono::system_clock::now().time_since_epoch();
        auto ns = std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
        snprintf(beat, sizeof beat, "beat %lu %lu %lu %ld %lu", n, (unsigned long)ns,
                 n_errors.load(), stall_ms(), n_threads.load() + n_forks.load());
        say(beat);
    }
    if (running)
        quiet();
    return n_errors ? 3 : 7;
}
