/* Ends in the middle of calls: threads call `step` until, after MS milliseconds, the
 * process exits (code 3), aborts, faults, kills itself or executes itself anew.
 *
 * usage: dies MS exit|abort|segv|kill|exec          prints "ready" at once */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

enum { N_THREADS = 4 };

static volatile int *volatile nowhere;

__attribute__((noinline)) long step(long i)
{
    __asm__ volatile("" ::: "memory");
    return i + 1;
}

static void *forever(void *unused)
{
    (void)unused;
    for (long i = 0; i >= 0;)
        i = step(i);
    return NULL;
}

int main(int argc, char **argv)
{
    long ms = argc > 2 ? atol(argv[1]) : -1;
    if (ms < 0) {
        fprintf(stderr, "usage: %s MS exit|abort|segv|kill|exec\n", argv[0]);
        return 2;
    }
    /* A fault here is the test, not something to leave a core file for. */
    prctl(PR_SET_DUMPABLE, 1);
    puts("ready");
    fflush(stdout);
    pthread_t id;
    for (int i = 0; i < N_THREADS; i++)
        if (pthread_create(&id, NULL, forever, NULL))
            return 2;
    struct timespec pause = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&pause, NULL);
    if (!strcmp(argv[2], "abort"))
        abort();
    if (!strcmp(argv[2], "segv"))
        *nowhere = 1;
    if (!strcmp(argv[2], "kill"))
        kill(getpid(), SIGKILL);
    if (!strcmp(argv[2], "exec"))
        execl("/proc/self/exe", argv[0], argv[1], "exit", (char *)NULL);
    exit(3);
}
