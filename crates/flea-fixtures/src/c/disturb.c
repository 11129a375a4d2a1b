/* Notices every way in which a tracer could disturb a process: a system call that returns
 * EINTR, a signal that arrives, a signal mask or handler that changes, a thread too many.
 *
 * usage: disturb          prints "ready", then obeys lines on stdin:
 *   gap     prints "gap NS": the longest time between two rounds of a busy thread since
 *           the last time it was asked, and forgets it
 *   check   wakes all threads, prints "gap NS", then "undisturbed" and exits with code 0,
 *           or a line "disturbed: WHO: WHAT" per finding and exits with code 1
 *
 * `busy_step`, `woken` and `blocked_step` are there to be attached to. End of input ends
 * the program (code 9). */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ipc.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { N_SIGNALS = 65, TICK_MS = 20, MAX_FINDINGS = 64 };

static atomic_int stop, n_ready;
static atomic_int caught[N_SIGNALS];
static atomic_long longest_gap_ns;
static char findings[MAX_FINDINGS][128];
static int n_findings;
static pthread_mutex_t findings_lock = PTHREAD_MUTEX_INITIALIZER;

static int wake_fd;    /* an eventfd that becomes readable at the end */
static int pipe_fds[2];
static int listener;
static int semaphore;
static int futex_word;

__attribute__((format(printf, 2, 3))) static void found(const char *who, const char *what, ...)
{
    char text[96];
    va_list ap;
    va_start(ap, what);
    vsnprintf(text, sizeof text, what, ap);
    va_end(ap);
    pthread_mutex_lock(&findings_lock);
    if (n_findings < MAX_FINDINGS)
        snprintf(findings[n_findings++], sizeof findings[0], "disturbed: %s: %s", who, text);
    pthread_mutex_unlock(&findings_lock);
}

__attribute__((noinline)) long busy_step(long i)
{
    __asm__ volatile("" ::: "memory");
    return i + 1;
}

__attribute__((noinline)) void woken(long n)
{
    __asm__ volatile("" ::"r"(n) : "memory");
}

__attribute__((noinline)) long blocked_step(long i)
{
    __asm__ volatile("" ::: "memory");
    return i + 2;
}

static long now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

/* What a wait returned: the expected thing, its timeout, or a finding. */
static void judge(const char *who, long r, int timeout_errno)
{
    int e = errno;
    if (r < 0 && e == EINTR)
        found(who, "EINTR");
    else if (r < 0 && e != timeout_errno)
        found(who, "%s", strerror(e));
}

static const struct timespec tick = {0, TICK_MS * 1000000L};

static void wait_epoll(const char *who)
{
    int ep = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN};
    epoll_ctl(ep, EPOLL_CTL_ADD, wake_fd, &event);
    judge(who, epoll_wait(ep, &event, 1, -1), 0);
    close(ep);
}

static void wait_epoll_tick(const char *who)
{
    int ep = epoll_create1(0);
    struct epoll_event event;
    judge(who, epoll_wait(ep, &event, 1, TICK_MS), 0);
    close(ep);
}

static void wait_poll(const char *who)
{
    struct pollfd p = {.fd = wake_fd, .events = POLLIN};
    judge(who, poll(&p, 1, -1), 0);
}

static void wait_select(const char *who)
{
    fd_set set;
    FD_ZERO(&set);
    FD_SET(wake_fd, &set);
    struct timeval timeout = {0, TICK_MS * 1000};
    judge(who, select(wake_fd + 1, &set, NULL, NULL, &timeout), 0);
}

static void wait_nanosleep(const char *who)
{
    long before = now_ns();
    judge(who, nanosleep(&tick, NULL), 0);
    if (now_ns() - before < TICK_MS * 1000000L)
        found(who, "woke early");
}

static void wait_futex(const char *who)
{
    judge(who, syscall(SYS_futex, &futex_word, FUTEX_WAIT_PRIVATE, 0, &tick, NULL, 0), ETIMEDOUT);
}

static void wait_read(const char *who)
{
    char c;
    judge(who, read(pipe_fds[0], &c, 1), 0);
}

static void wait_accept(const char *who)
{
    int fd = accept(listener, NULL, NULL);
    judge(who, fd, 0);
    if (fd >= 0)
        close(fd);
}

static void wait_semop(const char *who)
{
    struct sembuf take = {0, -1, 0};
    judge(who, semop(semaphore, &take, 1), EIDRM);
}

static void wait_sigtimedwait(const char *who)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    int r = sigtimedwait(&set, NULL, &tick);
    if (r > 0)
        found(who, "signal %d", r);
    else
        judge(who, r, EAGAIN);
}

static void wait_blocked(const char *who)
{
    sigset_t pending, none;
    long i = 0;
    for (int n = 0; n < 20000; n++)
        i = blocked_step(i);
    sigemptyset(&none);
    sigpending(&pending);
    if (memcmp(&pending, &none, 8))
        found(who, "a signal is pending");
    judge(who, nanosleep(&tick, NULL), 0);
}

static void wait_busy(const char *who)
{
    (void)who;
    long last = now_ns(), i = 0;
    while (!atomic_load(&stop)) {
        for (int n = 0; n < 50; n++)
            i = busy_step(i);
        long now = now_ns(), longest = atomic_load(&longest_gap_ns);
        while (now - last > longest &&
               !atomic_compare_exchange_weak(&longest_gap_ns, &longest, now - last))
            ;
        last = now;
    }
}

enum mask { OPEN, USR2_BLOCKED, ALL_BLOCKED };

static const struct waiter {
    const char *name;
    void (*wait)(const char *who);
    enum mask mask;
} waiters[] = {
    {"epoll_wait", wait_epoll, OPEN},          {"epoll_wait with timeout", wait_epoll_tick, OPEN},
    {"poll", wait_poll, OPEN},                 {"select", wait_select, OPEN},
    {"nanosleep", wait_nanosleep, OPEN},       {"futex", wait_futex, OPEN},
    {"read", wait_read, OPEN},                 {"accept", wait_accept, OPEN},
    {"semop", wait_semop, OPEN},               {"sigtimedwait", wait_sigtimedwait, USR2_BLOCKED},
    {"all blocked", wait_blocked, ALL_BLOCKED}, {"busy", wait_busy, OPEN},
};
enum { N_WAITERS = sizeof waiters / sizeof *waiters };

static void *waiter_thread(void *arg)
{
    const struct waiter *w = arg;
    sigset_t set, before, after;
    sigemptyset(&set);
    if (w->mask == USR2_BLOCKED)
        sigaddset(&set, SIGUSR2);
    if (w->mask == ALL_BLOCKED)
        sigfillset(&set);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    pthread_sigmask(SIG_BLOCK, NULL, &before);
    atomic_fetch_add(&n_ready, 1);
    for (long n = 0; !atomic_load(&stop); n++) {
        w->wait(w->name);
        woken(n);
        pthread_sigmask(SIG_BLOCK, NULL, &after);
        /* The kernel's set has 64 bits; the rest of sigset_t is never written. */
        if (memcmp(&before, &after, 8)) {
            found(w->name, "signal mask changed");
            before = after;
        }
    }
    return NULL;
}

static void on_signal(int number)
{
    atomic_fetch_add(&caught[number], 1);
}

static int catchable(int number)
{
    /* 32 and 33 belong to the C library. */
    return number != SIGKILL && number != SIGSTOP && number != 32 && number != 33;
}

static void install_handlers(void)
{
    for (int s = 1; s < N_SIGNALS; s++) {
        /* No SA_RESTART: an interruption has to show. */
        struct sigaction action = {.sa_handler = on_signal};
        if (catchable(s) && sigaction(s, &action, NULL))
            found("sigaction", "%d: %s", s, strerror(errno));
    }
}

static void check_signals(void)
{
    for (int s = 1; s < N_SIGNALS; s++) {
        struct sigaction now;
        if (atomic_load(&caught[s]))
            found("signal", "%d arrived %d times", s, atomic_load(&caught[s]));
        if (catchable(s) && (sigaction(s, NULL, &now) || now.sa_handler != on_signal ||
                             (now.sa_flags & (SA_RESTART | SA_SIGINFO | SA_ONSTACK))))
            found("handler", "of signal %d changed", s);
    }
}

static int n_threads(void)
{
    DIR *dir = opendir("/proc/self/task");
    int n = 0;
    for (struct dirent *entry; dir && (entry = readdir(dir));)
        n += entry->d_name[0] != '.';
    if (dir)
        closedir(dir);
    return n;
}

static void open_sources(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    /* A private namespace takes the semaphore along however this process ends; without the
     * right to one, the semaphore is removed at the orderly end. */
    if (unshare(CLONE_NEWIPC) && errno != EPERM)
        found("unshare", "%s", strerror(errno));
    wake_fd = eventfd(0, 0);
    listener = socket(AF_UNIX, SOCK_STREAM, 0);
    semaphore = semget(IPC_PRIVATE, 1, 0600);
    /* Length of the family alone: the kernel picks a free abstract name. */
    if (wake_fd < 0 || pipe(pipe_fds) || listener < 0 || semaphore < 0 ||
        bind(listener, (struct sockaddr *)&address, sizeof address.sun_family) ||
        listen(listener, 1)) {
        perror("disturb");
        exit(2);
    }
}

static void wake_all(void)
{
    struct sockaddr_un address;
    socklen_t length = sizeof address;
    unsigned long long one = 1;
    atomic_store(&stop, 1);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (write(wake_fd, &one, sizeof one) < 0 || write(pipe_fds[1], "x", 1) < 0 ||
        getsockname(listener, (struct sockaddr *)&address, &length) ||
        connect(fd, (struct sockaddr *)&address, length) || semctl(semaphore, 0, IPC_RMID))
        found("wake", "%s", strerror(errno));
}

static void print_gap(void)
{
    printf("gap %ld\n", atomic_exchange(&longest_gap_ns, 0));
    fflush(stdout);
}

/* The next line on stdin; EINTR here is a finding as well. */
static void read_line(char *line, size_t size)
{
    size_t n = 0;
    while (n + 1 < size) {
        ssize_t r = read(0, line + n, 1);
        if (r < 0 && errno == EINTR) {
            found("read of stdin", "EINTR");
            continue;
        }
        if (r <= 0) {
            semctl(semaphore, 0, IPC_RMID);
            exit(9);
        }
        if (line[n] == '\n')
            break;
        n++;
    }
    line[n] = 0;
}

int main(void)
{
    pthread_t ids[N_WAITERS];
    char line[64];
    install_handlers();
    open_sources();
    for (int i = 0; i < N_WAITERS; i++)
        if (pthread_create(&ids[i], NULL, waiter_thread, (void *)&waiters[i]))
            return 2;
    while (atomic_load(&n_ready) < N_WAITERS)
        sched_yield();
    nanosleep(&tick, NULL); /* let each reach its system call */
    int threads_before = n_threads();
    puts("ready");
    fflush(stdout);
    for (read_line(line, sizeof line); strcmp(line, "check"); read_line(line, sizeof line))
        if (!strcmp(line, "gap"))
            print_gap();
    if (n_threads() != threads_before)
        found("threads", "%d, were %d", n_threads(), threads_before);
    wake_all();
    for (int i = 0; i < N_WAITERS; i++)
        pthread_join(ids[i], NULL);
    check_signals();
    print_gap();
    for (int i = 0; i < n_findings; i++)
        puts(findings[i]);
    if (!n_findings)
        puts("undisturbed");
    return n_findings != 0;
}
