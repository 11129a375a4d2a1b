/* Threads asleep in every kind of system call. Each counts the times it was woken for no
   reason of its own. Ends when its input does; prints "NAME wakeups" for each. */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/msg.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
#include <netinet/in.h>
#include <sys/un.h>

static int word;
static int pipe_fds[2], ep, sem, listener, timed_listener, pair[2], msgq;

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

static struct job { const char *name; long (*run)(void); volatile int woken; volatile int last_errno; } jobs[] = {
#define J(n) {#n, do_##n, 0, 0}
    J(epoll), J(epoll_timeout), J(epoll_pwait), J(poll), J(ppoll), J(select), J(nanosleep),
    J(clock_nanosleep), J(futex), J(futex_timeout), J(read), J(semop), J(semtimedop),
    J(sigtimedwait), J(accept), J(accept_timeout), J(recv_timeout), J(msgrcv), J(pause),
    J(sigsuspend),
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
    sem = semget(IPC_PRIVATE, 1, 0600);
    msgq = msgget(IPC_PRIVATE, 0600);
    listener = socket(AF_INET, SOCK_STREAM, 0);
    timed_listener = socket(AF_INET, SOCK_STREAM, 0);
    if (listen(listener, 1) || listen(timed_listener, 1)) return 8;
    setsockopt(timed_listener, SOL_SOCKET, SO_RCVTIMEO, &hour, sizeof hour);
    setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &hour, sizeof hour);
    for (int i = 0; i < N; i++) {
        pthread_t t;
        if (argc > 1 && !strstr(argv[1], jobs[i].name)) continue;
        pthread_create(&t, 0, sleeper, &jobs[i]);
    }
    usleep(100000);
    puts("ready");
    fflush(stdout);
    while (getchar() != EOF) {}
    int bad = 0;
    for (int i = 0; i < N; i++) {
        printf("%s %d errno %d\n", jobs[i].name, jobs[i].woken, jobs[i].last_errno);
        bad += jobs[i].woken;
    }
    semctl(sem, 0, IPC_RMID);
    msgctl(msgq, IPC_RMID, 0);
    fflush(stdout);
    _exit(bad ? 3 : 0);
}
