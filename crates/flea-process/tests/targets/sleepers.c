/* Threads asleep in every kind of system call. Each counts the times it was woken for no
   reason of its own. Prints how many threads it has; ends when its input does, and prints
   "NAME wakeups" for each. */
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
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>
#include <netinet/in.h>
#include <sys/un.h>

static int word;
static int pipe_fds[2], ep, sem, listener, timed_listener, pair[2], msgq, full_msgq;
static pid_t child;

static long do_epoll(void) { struct epoll_event e; return epoll_wait(ep, &e, 1, -1); }
static long do_epoll_timeout(void) { struct epoll_event e; return epoll_wait(ep, &e, 1, 3600000); }
static long do_epoll_pwait(void) { struct epoll_event e; sigset_t s; sigfillset(&s); return epoll_pwait(ep, &e, 1, -1, &s); }
static long do_poll(void) { struct pollfd p = {pipe_fds[0], POLLIN, 0}; return poll(&p, 1, 3600000); }
static long do_ppoll(void) { struct pollfd p = {pipe_fds[0], POLLIN, 0}; struct timespec t = {3600, 0}; sigset_t s; sigfillset(&s); return ppoll(&p, 1, &t, &s); }
static long do_select(void) { fd_set f; FD_ZERO(&f); FD_SET(pipe_fds[0], &f); struct timeval t = {3600, 0}; return select(pipe_fds[0] + 1, &f, 0, 0, &t); }
static long do_nanosleep(void) { struct timespec t = {3600, 0}; return nanosleep(&t, 0); }
static long do_clock_nanosleep(void) { struct timespec t = {1L << 40, 0}; return clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, 0) ? (errno = EINTR, -1) : 0; }
static long do_futex(void) { return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, 0, 0, 0); }
static long do_futex_timeout(void) { struct timespec t = {3600, 0}; return syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t, 0, 0); }
static long do_read(void) { char c; return read(pipe_fds[0], &c, 1); }
static long do_semop(void) { struct sembuf b = {0, -1, 0}; return semop(sem, &b, 1); }
static long do_semtimedop(void) { struct sembuf b = {0, -1, 0}; struct timespec t = {3600, 0}; return semtimedop(sem, &b, 1, &t); }
static long do_sigtimedwait(void) { sigset_t s; sigemptyset(&s); sigaddset(&s, SIGUSR2); struct timespec t = {3600, 0}; return sigtimedwait(&s, 0, &t); }
static long do_accept(void) { return accept(listener, 0, 0); }
static long do_accept_timeout(void) { return accept(timed_listener, 0, 0); }
static long do_recv_timeout(void) { char c; return recv(pair[0], &c, 1, 0); }
static long do_msgrcv(void) { struct { long t; char c; } m; return msgrcv(msgq, &m, 1, 0, 0); }
static long do_pause(void) { return pause(); }
static long do_sigsuspend(void) { sigset_t s; sigfillset(&s); return sigsuspend(&s); }
static long do_epoll_pwait2(void) { struct epoll_event e; return syscall(SYS_epoll_pwait2, ep, &e, 1, 0, 0, 8); }
static long do_pselect(void) { fd_set f; FD_ZERO(&f); FD_SET(pipe_fds[0], &f); sigset_t s; sigfillset(&s); return pselect(pipe_fds[0] + 1, &f, 0, 0, 0, &s); }
static long do_futex_waitv(void) { struct { uint64_t val, addr; uint32_t flags, none; } w = {0, (uintptr_t)&word, 2, 0}; return syscall(449, &w, 1, 0, 0, 0); }
static long do_sem_wait(void) { sem_t s; sem_init(&s, 0, 0); return sem_wait(&s); }
static long do_cond_timedwait(void)
{
    pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t cond = PTHREAD_COND_INITIALIZER;
    struct timespec t = {1L << 33, 0};
    pthread_mutex_lock(&mutex);
    return pthread_cond_timedwait(&cond, &mutex, &t);
}
static long do_readv(void) { char c; struct iovec v = {&c, 1}; return readv(pipe_fds[0], &v, 1); }
static long do_terminal(void)
{
    char c;
    int master = posix_openpt(O_RDWR | O_NOCTTY);
    if (master < 0 || grantpt(master) || unlockpt(master))
        return -1;
    return read(open(ptsname(master), O_RDWR | O_NOCTTY), &c, 1);
}
static long do_eventfd(void) { uint64_t n; return read(eventfd(0, 0), &n, sizeof n); }
static long do_timerfd(void)
{
    struct itimerspec hour = {.it_value = {3600, 0}};
    uint64_t n;
    int fd = timerfd_create(CLOCK_MONOTONIC, 0);
    timerfd_settime(fd, 0, &hour, 0);
    return read(fd, &n, sizeof n);
}
static long do_signalfd(void) { struct signalfd_siginfo i; sigset_t s; sigemptyset(&s); sigaddset(&s, SIGUSR2); return read(signalfd(-1, &s, 0), &i, sizeof i); }
static long do_inotify(void) { char bytes[512]; int fd = inotify_init(); inotify_add_watch(fd, "/proc/self", IN_CREATE); return read(fd, bytes, sizeof bytes); }
static long do_pipe_write(void)
{
    int full[2];
    char bytes[4096] = {0};
    if (pipe2(full, O_NONBLOCK))
        return -1;
    while (write(full[1], bytes, sizeof bytes) > 0)
        ;
    fcntl(full[1], F_SETFL, 0);
    return write(full[1], bytes, sizeof bytes);
}
static long do_splice(void) { int to[2]; return pipe(to) ? -1 : splice(pipe_fds[0], 0, to[1], 0, 4096, 0); }
static long do_fifo(void)
{
    char path[64];
    snprintf(path, sizeof path, "/tmp/flea-fifo-%d", getpid());
    if (mkfifo(path, 0600))
        return -1;
    /* Opened for reading and writing it waits for nobody, and its name can go. */
    int both = open(path, O_RDWR);
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", both);
    int other = open(path, O_PATH);
    unlink(path);
    close(both);
    snprintf(name, sizeof name, "/proc/self/fd/%d", other);
    return open(name, O_RDONLY);
}
static int temporary(void) { return open("/tmp", O_TMPFILE | O_RDWR, 0600); }
static long do_flock(void)
{
    char name[64];
    int one = temporary();
    snprintf(name, sizeof name, "/proc/self/fd/%d", one);
    return flock(one, LOCK_EX) ? -1 : flock(open(name, O_RDWR), LOCK_EX);
}
static long do_setlkw(void)
{
    char name[64];
    struct flock all = {.l_type = F_WRLCK};
    int one = temporary();
    snprintf(name, sizeof name, "/proc/self/fd/%d", one);
    return fcntl(one, F_OFD_SETLK, &all) ? -1 : fcntl(open(name, O_RDWR), F_SETLKW, &all);
}
static long do_ofd_setlkw(void)
{
    char name[64];
    struct flock all = {.l_type = F_WRLCK};
    int one = temporary();
    snprintf(name, sizeof name, "/proc/self/fd/%d", one);
    return fcntl(one, F_OFD_SETLK, &all) ? -1 : fcntl(open(name, O_RDWR), F_OFD_SETLKW, &all);
}
static long do_msgsnd(void)
{
    struct { long t; char c[1024]; } m = {1, {0}};
    while (!msgsnd(full_msgq, &m, sizeof m.c, IPC_NOWAIT))
        ;
    return msgsnd(full_msgq, &m, sizeof m.c, 0);
}
static long do_mq_receive(void)
{
    char name[40], text[16];
    struct mq_attr attr = {.mq_maxmsg = 1, .mq_msgsize = sizeof text};
    snprintf(name, sizeof name, "/flea-sleepers-%d", getpid());
    mqd_t q = mq_open(name, O_RDWR | O_CREAT | O_EXCL, 0600, &attr);
    mq_unlink(name);
    return mq_receive(q, text, sizeof text, 0);
}
static long do_sigwaitinfo(void) { sigset_t s; sigemptyset(&s); sigaddset(&s, SIGUSR2); return sigwaitinfo(&s, 0); }
static long do_wait4(void) { return waitpid(child, 0, 0); }
static long do_waitid(void) { siginfo_t i; return waitid(P_PID, child, &i, WEXITED | WNOWAIT); }
static long do_io_getevents(void) { aio_context_t c = 0; struct io_event e; syscall(SYS_io_setup, 1, &c); return syscall(SYS_io_getevents, c, 1, 1, &e, 0); }
static long do_io_uring(void)
{
    struct io_uring_params params = {0};
    int fd = syscall(SYS_io_uring_setup, 1, &params);
    return fd < 0 ? pause() : syscall(SYS_io_uring_enter, fd, 0, 1, IORING_ENTER_GETEVENTS, 0, 0);
}
static long do_send(void)
{
    int s[2];
    char bytes[1024] = {0};
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, s))
        return -1;
    while (send(s[0], bytes, sizeof bytes, MSG_DONTWAIT) > 0)
        ;
    return send(s[0], bytes, sizeof bytes, 0);
}
static long do_recvmsg(void) { int s[2]; struct msghdr m = {0}; return socketpair(AF_UNIX, SOCK_DGRAM, 0, s) ? -1 : recvmsg(s[0], &m, 0); }
static long do_recvmmsg(void) { int s[2]; struct mmsghdr m[2] = {0}; return socketpair(AF_UNIX, SOCK_DGRAM, 0, s) ? -1 : recvmmsg(s[0], m, 2, 0, 0); }
/* Connects until there is no room in the listener's queue. */
static long connect_to_full(int family, struct sockaddr *address, socklen_t size)
{
    int to = socket(family, SOCK_STREAM, 0);
    if (bind(to, address, family == AF_UNIX ? sizeof(sa_family_t) : size) || listen(to, 0) ||
        getsockname(to, address, &size))
        return -1;
    for (;;) {
        struct pollfd p = {socket(family, SOCK_STREAM | SOCK_NONBLOCK, 0), POLLOUT, 0};
        if (connect(p.fd, address, size) && (errno == EAGAIN || (errno == EINPROGRESS && !poll(&p, 1, 20))))
            break;
    }
    return connect(socket(family, SOCK_STREAM, 0), address, size);
}
static long do_connect_unix(void) { struct sockaddr_un a = {AF_UNIX, ""}; return connect_to_full(AF_UNIX, (struct sockaddr *)&a, sizeof a); }
/* Ends with ETIMEDOUT after two minutes, not by us. */
static long do_connect_tcp(void) { struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}}; return connect_to_full(AF_INET, (struct sockaddr *)&a, sizeof a); }

static struct job { const char *name; long (*run)(void); volatile int woken; volatile int last_errno; } jobs[] = {
#define J(n) {#n, do_##n, 0, 0}
    J(epoll), J(epoll_timeout), J(epoll_pwait), J(poll), J(ppoll), J(select), J(nanosleep),
    J(clock_nanosleep), J(futex), J(futex_timeout), J(read), J(semop), J(semtimedop),
    J(sigtimedwait), J(accept), J(accept_timeout), J(recv_timeout), J(msgrcv), J(pause),
    J(sigsuspend), J(epoll_pwait2), J(pselect), J(futex_waitv), J(sem_wait), J(cond_timedwait),
    J(readv), J(terminal), J(eventfd), J(timerfd), J(signalfd), J(inotify), J(pipe_write), J(splice),
    J(fifo), J(flock), J(setlkw), J(ofd_setlkw), J(msgsnd), J(mq_receive), J(sigwaitinfo), J(wait4),
    J(waitid), J(io_getevents), J(io_uring), J(send), J(recvmsg), J(recvmmsg), J(connect_unix),
    J(connect_tcp),
};
enum { N = sizeof jobs / sizeof *jobs };

static void *sleeper(void *arg) {
    struct job *job = arg;
    for (;;) {
        job->run();
        job->last_errno = errno;
        job->woken++;
    }
    return 0;
}

int main(int argc, char **argv) {
    struct timeval hour = {3600, 0};
    if (pipe(pipe_fds) || socketpair(AF_UNIX, SOCK_STREAM, 0, pair)) return 9;
    ep = epoll_create1(0);
    struct epoll_event e = {EPOLLIN, {0}};
    epoll_ctl(ep, EPOLL_CTL_ADD, pipe_fds[0], &e);
    unshare(CLONE_NEWIPC); /* where it may: then nothing outlives a kill */
    sem = semget(IPC_PRIVATE, 1, 0600);
    msgq = msgget(IPC_PRIVATE, 0600);
    full_msgq = msgget(IPC_PRIVATE, 0600);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    timed_listener = socket(AF_INET, SOCK_STREAM, 0);
    if (listen(listener, 1) || listen(timed_listener, 1)) return 8;
    setsockopt(timed_listener, SOL_SOCKET, SO_RCVTIMEO, &hour, sizeof hour);
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &hour, sizeof hour);
    child = fork();
    if (!child) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (;;)
            pause();
    }
    sigset_t usr2;
    sigemptyset(&usr2);
    sigaddset(&usr2, SIGUSR2);
    sigprocmask(SIG_BLOCK, &usr2, 0);
    for (int i = 0; i < N; i++) {
        pthread_t t;
        if (argc > 1 && !strstr(argv[1], jobs[i].name)) continue;
        pthread_create(&t, 0, sleeper, &jobs[i]);
    }
    usleep(300000);
    printf("%d\n", argc > 1 ? 0 : N + 1);
    fflush(stdout);
    while (getchar() != EOF) {}
    int bad = 0;
    for (int i = 0; i < N; i++) {
        printf("%s %d errno %d\n", jobs[i].name, jobs[i].woken, jobs[i].last_errno);
        bad += jobs[i].woken;
    }
    semctl(sem, 0, IPC_RMID);
    msgctl(msgq, IPC_RMID, 0);
    msgctl(full_msgq, IPC_RMID, 0);
    kill(child, SIGKILL);
    fflush(stdout);
    _exit(bad ? 3 : 0);
}
