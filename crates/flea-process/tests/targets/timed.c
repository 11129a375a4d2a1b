/* Threads in every kind of system call that ends by its own timeout, once each.
 *
 * usage: timed MS       prints one line "NAME TID NAME TID ...", makes the calls, and when all have
 *                       ended a line "NAME ok|wrong MS ERRNO RESULT" for each.
 *
 * A name that begins with "socket" has its timeout in the socket, one with "const" in memory that
 * cannot be written. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <mqueue.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>
#include <netinet/in.h>

static long ms;
static struct timespec wait_time;
static struct timespec *const_time; /* in a page without write permission */
static int pipe_fds[2], ep, sem, word;

static long now_ns(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000L + t.tv_nsec;
}

static struct timespec until(clockid_t clock)
{
    long at = now_ns(clock) + ms * 1000000L;
    return (struct timespec){at / 1000000000L, at % 1000000000L};
}

static struct timeval timeval(void)
{
    return (struct timeval){ms / 1000, ms % 1000 * 1000};
}

static long fail(int error)
{
    errno = error;
    return error ? -1 : 0;
}

static long do_epoll_wait(void) { struct epoll_event e; return epoll_wait(ep, &e, 1, ms); }
static long do_epoll_pwait(void) { struct epoll_event e; sigset_t s; sigfillset(&s); return epoll_pwait(ep, &e, 1, ms, &s); }
static long do_epoll_pwait2(void) { struct epoll_event e; return syscall(SYS_epoll_pwait2, ep, &e, 1, &wait_time, NULL, 8); }
static long do_poll(void) { struct pollfd p = {pipe_fds[0], POLLIN, 0}; return poll(&p, 1, ms); }
static long do_ppoll(void) { struct pollfd p = {pipe_fds[0], POLLIN, 0}; sigset_t s; sigfillset(&s); return ppoll(&p, 1, &wait_time, &s); }
static long do_const_ppoll(void) { struct pollfd p = {pipe_fds[0], POLLIN, 0}; return syscall(SYS_ppoll, &p, 1, const_time, NULL, 8); }
static long do_select(void) { fd_set f; FD_ZERO(&f); FD_SET(pipe_fds[0], &f); struct timeval t = timeval(); return select(pipe_fds[0] + 1, &f, 0, 0, &t); }
static long do_pselect(void) { fd_set f; FD_ZERO(&f); FD_SET(pipe_fds[0], &f); return pselect(pipe_fds[0] + 1, &f, 0, 0, &wait_time, NULL); }
static long do_const_pselect(void) { fd_set f; FD_ZERO(&f); FD_SET(pipe_fds[0], &f); return syscall(SYS_pselect6, pipe_fds[0] + 1, &f, 0, 0, const_time, NULL); }
static long do_nanosleep(void) { return nanosleep(&wait_time, NULL); }
static long do_usleep(void) { return usleep(ms * 1000); }
static long do_clock_nanosleep(void) { return fail(clock_nanosleep(CLOCK_BOOTTIME, 0, &wait_time, NULL)); }
static long do_clock_nanosleep_until(void) { struct timespec t = until(CLOCK_MONOTONIC); return fail(clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL)); }
static long do_futex(void) { return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &wait_time, NULL, 0); }
static long do_futex_bitset(void) { struct timespec t = until(CLOCK_MONOTONIC); return syscall(SYS_futex, &word, FUTEX_WAIT_BITSET_PRIVATE, 0, &t, NULL, 1); }
static long do_cond_timedwait(void)
{
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
    struct timespec t = until(CLOCK_REALTIME);
    int r;
    pthread_mutex_lock(&mutex);
    while (!(r = pthread_cond_timedwait(&cond, &mutex, &t)))
        ;
    pthread_mutex_unlock(&mutex);
    return fail(r);
}
static long do_sem_timedwait(void) { sem_t s; sem_init(&s, 0, 0); struct timespec t = until(CLOCK_REALTIME); return sem_timedwait(&s, &t); }
static long do_semtimedop(void) { struct sembuf b = {0, -1, 0}; return semtimedop(sem, &b, 1, &wait_time); }
static long do_sigtimedwait(void) { sigset_t s; sigemptyset(&s); sigaddset(&s, SIGUSR2); return sigtimedwait(&s, NULL, &wait_time); }
static long do_const_sigtimedwait(void) { sigset_t s; sigemptyset(&s); sigaddset(&s, SIGUSR2); return syscall(SYS_rt_sigtimedwait, &s, NULL, const_time, 8); }
static long do_mq_timedreceive(void)
{
    char name[40], text[16];
    struct mq_attr attr = {.mq_maxmsg = 1, .mq_msgsize = sizeof text};
    snprintf(name, sizeof name, "/flea-timed-%d", getpid());
    mqd_t q = mq_open(name, O_RDWR | O_CREAT | O_EXCL, 0600, &attr);
    if (q < 0)
        return -1;
    mq_unlink(name);
    struct timespec t = until(CLOCK_REALTIME);
    return mq_timedreceive(q, text, sizeof text, NULL, &t);
}
static long do_timerfd(void)
{
    struct itimerspec at = {.it_value = wait_time};
    uint64_t n;
    int fd = timerfd_create(CLOCK_MONOTONIC, 0);
    timerfd_settime(fd, 0, &at, NULL);
    return read(fd, &n, sizeof n) == sizeof n && n == 1 ? 0 : -1;
}
static long do_io_getevents(void)
{
    aio_context_t context = 0;
    struct io_event event;
    if (syscall(SYS_io_setup, 1, &context))
        return -1;
    struct timespec t = wait_time;
    return syscall(SYS_io_getevents, context, 1, 1, &event, &t);
}
static long do_io_pgetevents(void)
{
    aio_context_t context = 0;
    struct io_event event;
    if (syscall(SYS_io_setup, 1, &context))
        return -1;
    struct timespec t = wait_time;
    return syscall(SYS_io_pgetevents, context, 1, 1, &event, &t, NULL);
}
static long do_io_uring(void)
{
    struct io_uring_params params = {0};
    int fd = syscall(SYS_io_uring_setup, 1, &params);
    if (fd < 0)
        return fail(ETIME); /* forbidden here: nothing to see */
    struct io_uring_getevents_arg arg = {.ts = (uintptr_t)&wait_time};
    return syscall(SYS_io_uring_enter, fd, 0, 1, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &arg, sizeof arg);
}

static int with_timeout(int fd, int option)
{
    struct timeval t = timeval();
    setsockopt(fd, SOL_SOCKET, option, &t, sizeof t);
    return fd;
}
static long do_socket_accept(void) { int fd = socket(AF_INET, SOCK_STREAM, 0); return listen(fd, 1) ? 0 : accept(with_timeout(fd, SO_RCVTIMEO), NULL, NULL); }
static long do_socket_recv(void) { int s[2]; char c; return socketpair(AF_UNIX, SOCK_STREAM, 0, s) ? 0 : recv(with_timeout(s[0], SO_RCVTIMEO), &c, 1, 0); }
static long do_socket_recvmsg(void) { int s[2]; struct msghdr m = {0}; return socketpair(AF_UNIX, SOCK_DGRAM, 0, s) ? 0 : recvmsg(with_timeout(s[0], SO_RCVTIMEO), &m, 0); }
static long do_socket_recvmmsg(void) { int s[2]; struct mmsghdr m[2] = {0}; return socketpair(AF_UNIX, SOCK_DGRAM, 0, s) ? 0 : recvmmsg(with_timeout(s[0], SO_RCVTIMEO), m, 2, 0, NULL); }
static long do_socket_send(void)
{
    int s[2];
    char bytes[1024] = {0};
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, s))
        return 0;
    while (send(s[0], bytes, sizeof bytes, MSG_DONTWAIT) > 0)
        ;
    return send(with_timeout(s[0], SO_SNDTIMEO), bytes, sizeof bytes, 0);
}

static struct job {
    const char *name;
    long (*run)(void);
    long result;
    int error;
    pid_t tid;
    long result_seen, took_ms;
    int error_seen;
} jobs[] = {
#define J(n, result, error) {#n, do_##n, result, error, 0, 0, 0, 0}
    J(epoll_wait, 0, 0), J(epoll_pwait, 0, 0), J(epoll_pwait2, 0, 0), J(poll, 0, 0), J(ppoll, 0, 0),
    J(const_ppoll, 0, 0), J(select, 0, 0), J(pselect, 0, 0), J(const_pselect, 0, 0),
    J(nanosleep, 0, 0), J(usleep, 0, 0), J(clock_nanosleep, 0, 0), J(clock_nanosleep_until, 0, 0),
    J(futex, -1, ETIMEDOUT), J(futex_bitset, -1, ETIMEDOUT), J(cond_timedwait, -1, ETIMEDOUT),
    J(sem_timedwait, -1, ETIMEDOUT), J(semtimedop, -1, EAGAIN), J(sigtimedwait, -1, EAGAIN),
    J(const_sigtimedwait, -1, EAGAIN), J(mq_timedreceive, -1, ETIMEDOUT), J(timerfd, 0, 0),
    J(io_getevents, 0, 0), J(io_pgetevents, 0, 0), J(io_uring, -1, ETIME),
    J(socket_accept, -1, EAGAIN), J(socket_recv, -1, EAGAIN), J(socket_recvmsg, -1, EAGAIN),
    J(socket_recvmmsg, -1, EAGAIN), J(socket_send, -1, EAGAIN),
};
enum { N = sizeof jobs / sizeof *jobs };
static pthread_barrier_t known, begin;

static void *thread(void *arg)
{
    struct job *job = arg;
    job->tid = gettid();
    pthread_barrier_wait(&known);
    pthread_barrier_wait(&begin);
    long before = now_ns(CLOCK_MONOTONIC);
    errno = 0;
    job->result_seen = job->run();
    job->error_seen = job->result_seen < 0 ? errno : 0;
    job->took_ms = (now_ns(CLOCK_MONOTONIC) - before) / 1000000L;
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[N];
    ms = argc > 1 ? atol(argv[1]) : 500;
    wait_time = (struct timespec){ms / 1000, ms % 1000 * 1000000L};
    const_time = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *const_time = wait_time;
    unshare(CLONE_NEWIPC); /* where it may: then nothing outlives a kill */
    sem = semget(IPC_PRIVATE, 1, 0600);
    ep = epoll_create1(0);
    if (mprotect(const_time, 4096, PROT_READ) || pipe(pipe_fds) || sem < 0 || ep < 0)
        return 9;
    pthread_barrier_init(&known, NULL, N + 1);
    pthread_barrier_init(&begin, NULL, N + 1);
    for (int i = 0; i < N; i++)
        if (pthread_create(&threads[i], NULL, thread, &jobs[i]))
            return 8;
    pthread_barrier_wait(&known);
    for (int i = 0; i < N; i++)
        printf("%s %d ", jobs[i].name, jobs[i].tid);
    puts("");
    fflush(stdout);
    pthread_barrier_wait(&begin);
    for (int i = 0; i < N; i++)
        pthread_join(threads[i], NULL);
    semctl(sem, 0, IPC_RMID);
    for (int i = 0; i < N; i++) {
        struct job *j = &jobs[i];
        int ok = j->result_seen == j->result && j->error_seen == j->error && j->took_ms >= ms - 1;
        printf("%s %s %ld %d %ld\n", j->name, ok ? "ok" : "wrong", j->took_ms, j->error_seen, j->result_seen);
    }
    return 0;
}
