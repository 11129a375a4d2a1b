/* Signals with a handler, for threads asleep in calls that let them in: each has to end its call
 * with EINTR (or be what was waited for), exactly once.
 *
 * usage: signalled ROUNDS     prints "TID TID ...", and, when all rounds are done, "KIND EINTRS
 *                             HANDLED" for each kind. A thread whose EINTR is hidden sleeps for
 *                             ever, and so does the program.
 *
 * The signal is blocked outside of the calls, so that none can come too early. Calls that cannot
 * let it in themselves are looked for in /proc before it is sent. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/ipc.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long rounds;
static int semaphores;
static sigset_t open_mask, usr1;
static __thread volatile long *handled_here;

static void on_usr1(int signal)
{
    (void)signal;
    ++*handled_here;
}

static int do_epoll_pwait(void)
{
    static __thread int ep;
    struct epoll_event e;
    if (!ep)
        ep = epoll_create1(0);
    return epoll_pwait(ep, &e, 1, -1, &open_mask);
}
static int do_epoll_pwait_timeout(void)
{
    static __thread int ep;
    struct epoll_event e;
    if (!ep)
        ep = epoll_create1(0);
    return epoll_pwait(ep, &e, 1, 3600000, &open_mask);
}
static int do_ppoll(void) { return ppoll(NULL, 0, NULL, &open_mask); }
static int do_pselect(void) { return pselect(0, NULL, NULL, NULL, NULL, &open_mask); }
static int do_sigsuspend(void) { return sigsuspend(&open_mask); }
static int do_sigwaitinfo(void)
{
    int r = sigwaitinfo(&usr1, NULL);
    *handled_here += r == SIGUSR1;
    errno = EINTR;
    return r == SIGUSR1 ? -1 : r;
}
static int do_sigtimedwait(void)
{
    struct timespec hour = {3600, 0};
    int r = sigtimedwait(&usr1, NULL, &hour);
    *handled_here += r == SIGUSR1;
    errno = EINTR;
    return r == SIGUSR1 ? -1 : r;
}
static int do_epoll_wait(void)
{
    static __thread int ep;
    struct epoll_event e;
    if (!ep)
        ep = epoll_create1(0);
    return epoll_wait(ep, &e, 1, 3600000);
}
static int do_semop(void) { struct sembuf b = {0, -1, 0}; return syscall(SYS_semop, semaphores, &b, 1); }
static int do_pause(void) { return syscall(SYS_pause); }
static int do_nanosleep(void) { struct timespec hour = {3600, 0}; return syscall(SYS_nanosleep, &hour, NULL); }
static int do_io_getevents(void)
{
    static __thread aio_context_t context;
    struct io_event event;
    if (!context)
        syscall(SYS_io_setup, 1, &context);
    return syscall(SYS_io_getevents, context, 1, 1, &event, NULL);
}

static struct kind {
    const char *name;
    int (*wait)(void);
    long number; /* for one that is looked for */
    sem_t woken;
    pid_t tid;
    volatile long eintrs, handled;
} kinds[] = {
#define K(n) {.name = #n, .wait = do_##n}
#define OPEN(n, call) {.name = #n, .wait = do_##n, .number = call}
    K(epoll_pwait), K(epoll_pwait_timeout), K(ppoll), K(pselect), K(sigsuspend), K(sigwaitinfo),
    K(sigtimedwait), OPEN(epoll_wait, SYS_epoll_wait), OPEN(semop, SYS_semop),
    OPEN(pause, SYS_pause), OPEN(nanosleep, SYS_nanosleep),
    OPEN(io_getevents, SYS_io_getevents),
};
enum { N = sizeof kinds / sizeof *kinds };

static void *sleeper(void *arg)
{
    struct kind *k = arg;
    handled_here = &k->handled;
    k->tid = gettid();
    if (k->number)
        sigprocmask(SIG_SETMASK, &open_mask, NULL);
    sem_post(&k->woken);
    for (long n = 0; n < rounds; n++) {
        int r = k->wait();
        k->eintrs += r < 0 && errno == EINTR;
        sem_post(&k->woken);
    }
    return NULL;
}

static int is_in(const struct kind *k)
{
    char path[64], text[16] = "";
    snprintf(path, sizeof path, "/proc/self/task/%d/syscall", k->tid);
    int fd = open(path, O_RDONLY);
    if (read(fd, text, sizeof text - 1) < 0)
        text[0] = 0;
    close(fd);
    long number = strtol(text, NULL, 10);
    return number == k->number || number == SYS_restart_syscall;
}

/* One signal at a time: the next one when the last one has woken its thread. */
static void *sender(void *arg)
{
    struct kind *k = arg;
    for (long n = 0; n < rounds; n++) {
        while (sem_wait(&k->woken))
            ;
        if (n % 3)
            usleep(n % 7 * 100); /* asleep by now, or just about to be */
        while (k->number && !is_in(k))
            usleep(50);
        syscall(SYS_tgkill, getpid(), k->tid, SIGUSR1);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t sleepers[N], senders[N];
    struct sigaction action = {.sa_handler = on_usr1}; /* no SA_RESTART */
    rounds = argc > 1 ? atol(argv[1]) : 100;
    unshare(CLONE_NEWIPC); /* where it may: then nothing outlives a kill */
    semaphores = semget(IPC_PRIVATE, 1, 0600);
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    sigprocmask(SIG_BLOCK, &usr1, &open_mask);
    sigaction(SIGUSR1, &action, NULL);
    for (int i = 0; i < N; i++) {
        sem_init(&kinds[i].woken, 0, 0);
        pthread_create(&sleepers[i], NULL, sleeper, &kinds[i]);
        while (sem_wait(&kinds[i].woken))
            ;
        printf("%d ", kinds[i].tid);
        sem_post(&kinds[i].woken);
    }
    puts("");
    fflush(stdout);
    for (int i = 0; i < N; i++)
        pthread_create(&senders[i], NULL, sender, &kinds[i]);
    for (int i = 0; i < N; i++) {
        pthread_join(senders[i], NULL);
        pthread_join(sleepers[i], NULL);
    }
    semctl(semaphores, 0, IPC_RMID);
    for (int i = 0; i < N; i++)
        printf("%s %ld %ld\n", kinds[i].name, kinds[i].eintrs, kinds[i].handled);
    return 0;
}
