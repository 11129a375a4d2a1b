/* Processes that are born at awkward moments. Commands come by lines on standard input, each is
 * answered by "done":
 *
 *   exec N    N children at once, each of which forks and executes another program right behind it
 *   end N     the same, each of which forks and ends
 *   thread N  the same, where a thread that is not the first one forks and executes
 *   vfork N   the same, each of which has a vfork child that forks and executes
 *   sibling N the same, each of which makes not a child but a sibling, and executes
 *   trap      a child that calls traced(), while the process executes a program that waits for it
 *
 * Its first line is the address of traced(). `births leaf` ends at once with code 0. All children are waited for; one that was killed, or was
 * seen to stop, makes it end with an error. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int n_calls;

__attribute__((noinline, noclone)) void traced(void) { __asm__ volatile("nop"); n_calls++; }

static void become_another(const char *what)
{
    execl("/proc/self/exe", "births", what, (char *)NULL);
    _exit(3);
}

/* A child that ends at once, from here on without the C library: threads may have its locks. */
static void make_child(void)
{
    if (fork() == 0)
        _exit(0);
}

static void *fork_and_execute(void *unused)
{
    make_child();
    become_another("leaf");
    return unused;
}

static void become(const char *way)
{
    pthread_t thread;
    if (!strcmp(way, "exec"))
        fork_and_execute(NULL);
    if (!strcmp(way, "end")) {
        make_child();
        _exit(0);
    }
    if (!strcmp(way, "thread") && pthread_create(&thread, NULL, fork_and_execute, NULL) == 0)
        for (;;)
            pause();
    if (!strcmp(way, "vfork")) {
        if (vfork() == 0) {
            /* By the system call: fork() here is not for the C library's locks. */
            if (syscall(SYS_fork) == 0)
                _exit(0);
            become_another("leaf");
        }
        _exit(0);
    }
    if (!strcmp(way, "sibling")) {
        if (syscall(SYS_clone, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0) == 0)
            _exit(0);
        become_another("leaf");
    }
    _exit(4);
}

/* Those whose parents have ended are ours as well. */
static void wait_for_all(void)
{
    int status;
    while (waitpid(-1, &status, WUNTRACED | WCONTINUED) > 0)
        if (status != 0) {
            fprintf(stderr, "a child ended with status %#x\n", status);
            exit(5);
        }
    if (errno != ECHILD)
        exit(6);
}

int main(int argc, char **argv)
{
    char line[64], way[32];
    int n;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 2 && !strcmp(argv[1], "leaf"))
        return 0;
    if (argc == 2 && !strcmp(argv[1], "wait")) {
        wait_for_all();
        puts("done");
        return 0;
    }
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    printf("%p\n", (void *)traced);
    while (fgets(line, sizeof line, stdin)) {
        n = 0;
        sscanf(line, "%31s %d", way, &n);
        if (!strcmp(way, "trap")) {
            if (fork() == 0) {
                traced();
                _exit(n_calls != 1);
            }
            become_another("wait");
        }
        while (n-- > 0)
            if (fork() == 0)
                become(way);
        wait_for_all();
        puts("done");
    }
    return 0;
}
