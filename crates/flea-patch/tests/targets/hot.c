/* Threads that call three small functions all the time and check everything a tracer could
   disturb: results, signal masks, SIGTRAP's disposition, pending signals, children.
   Usage: hot N_THREADS LETTERS. Ends when its input does; exits 0 if nothing was wrong.
     b  workers block every signal          h  SIGTRAP has a handler
     i  SIGTRAP is ignored                  p  workers have a SIGTRAP pending (with b)
     u  a storm of SIGUSR1 with a handler   c  threads are born and end all the time
     f  children are forked all the time    v  children are started by posix_spawn
     a  the handler runs on an alternate stack
     t  a storm of SIGTRAP (with h or i)    o  every other worker blocks every signal
     e  one SIGTRAP after the other, each of which must be handled once (with h) */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

long nops5(long), nop5(long), prologue(long);
asm(".text\n.p2align 4\nnops5: nop; nop; nop; nop; nop; lea 1(%rdi,%rdi,2),%rax; ret\n"
    ".p2align 4\nnop5: .byte 0x0f,0x1f,0x44,0,0; lea 1(%rdi,%rdi,2),%rax; ret\n"
    ".p2align 4\nprologue: push %rbp; mov %rsp,%rbp; push %rbx; sub $24,%rsp; mov %rdi,%rbx;"
    " lea 1(%rbx,%rbx,2),%rax; add $24,%rsp; pop %rbx; pop %rbp; ret\n");
long counter;
static volatile int stop;
static atomic_long calls, handled, births, forks, n_workers;
static const char *letters = "";
static int has(char c) { return strchr(letters, c) != 0; }

static void fail(const char *what) {
    printf("WRONG: %s (errno %d)\n", what, errno);
    fflush(stdout);
    _exit(7);
}

static void call_all(long n) {
    for (long i = 0; i < n; i++)
        if (nops5(i) != 3 * i + 1 || nop5(i) != 3 * i + 1 || prologue(i) != 3 * i + 1) fail("result");
}

static void on_usr1(int s) { for (volatile int i = 0; i < 50; i++) {} call_all(1); handled++; }
static void on_trap(int s) { handled++; }

static void check(const sigset_t *mask) {
    sigset_t now, pending;
    struct sigaction action;
    pthread_sigmask(SIG_SETMASK, 0, &now);
    if (memcmp(&now, mask, 8)) fail(sigismember(mask, SIGTRAP) ? "mask has lost a signal" : "mask has got a signal");
    sigaction(SIGTRAP, 0, &action);
    void (*expected)(int) = has('h') ? on_trap : has('i') ? SIG_IGN : SIG_DFL;
    /* The kernel resets it when a thread traps that blocks or ignores SIGTRAP; the tracer puts
       it back, SIG_IGN only when its window closes, and how long that takes is a matter of how
       busy the machine is. That it is back when a commit returns, live.rs checks. This bound
       only ends a test that hangs. */
    for (int i = 0; action.sa_handler != expected; i++) {
        if (i == 15000) fail("SIGTRAP's handler");
        usleep(1000);
        sigaction(SIGTRAP, 0, &action);
    }
    if (has('h') && !sigismember(&action.sa_mask, SIGUSR2)) fail("SIGTRAP's mask");
    sigpending(&pending);
    if (!has('o') && has('p') != sigismember(&pending, SIGTRAP)) fail("pending SIGTRAP");
    if (sigismember(&pending, SIGSTOP)) fail("pending SIGSTOP");
}

static void *worker(void *once) {
    sigset_t mask;
    char *alternate = 0;
    if (has('a')) {
        alternate = malloc(65536);
        stack_t s = {.ss_sp = alternate, .ss_size = 65536};
        sigaltstack(&s, 0);
    }
    if (has('b') || (has('o') && atomic_fetch_add(&n_workers, 1) % 2)) { sigfillset(&mask); pthread_sigmask(SIG_SETMASK, &mask, 0); }
    if (has('p')) pthread_kill(pthread_self(), SIGTRAP);
    pthread_sigmask(SIG_SETMASK, 0, &mask);
    do {
        call_all(500);
        calls += 500;
        check(&mask);
    } while (!stop && !once);
    if (alternate) { stack_t s = {.ss_flags = SS_DISABLE}; sigaltstack(&s, 0); free(alternate); }
    return 0;
}

static void *storm(void *arg) {
    pthread_t *threads = arg;
    int n = atoi((char *)threads[63]);
    for (int i = 0; !stop; i++) { pthread_kill(threads[i % n], has('t') ? SIGTRAP : SIGUSR1); usleep(has('t') ? 300 : 20); }
    return 0;
}

static void *one_by_one(void *arg) {
    for (long sent = 1; !stop; sent++) {
        kill(getpid(), SIGTRAP);
        /* Held until the batch is done, which a busy machine makes long: this ends a test that hangs. */
        for (long i = 0; handled < sent; i++) {
            if (i == 300000) fail("a SIGTRAP was lost");
            usleep(50);
        }
        if (handled > sent) fail("a SIGTRAP came twice");
    }
    return 0;
}

static void *churn(void *arg) {
    pthread_t t[4];
    while (!stop) {
        for (int i = 0; i < 4; i++) if (pthread_create(&t[i], 0, worker, "once")) fail("pthread_create");
        for (int i = 0; i < 4; i++) pthread_join(t[i], 0);
        births += 4;
    }
    return 0;
}

static void *fork_churn(void *arg) {
    char *argv[] = {"true", 0};
    while (!stop) {
        int status;
        pid_t child;
        if (has('v')) {
            if (posix_spawn(&child, "/bin/true", 0, 0, argv, 0)) fail("posix_spawn");
        } else if ((child = fork()) == 0) {
            struct sigaction action;
            sigaction(SIGTRAP, 0, &action);
            if (has('i') && action.sa_handler != SIG_IGN) _exit(9);
            call_all(300);
            _exit(0);
        }
        while (waitpid(child, &status, 0) < 0) if (errno != EINTR) fail("waitpid");
        if (status) { printf("child status %x\n", status); fail("a child"); }
        forks++;
    }
    return 0;
}

int main(int argc, char **argv) {
    int n = atoi(argv[1]);
    pthread_t threads[64], more[3];
    int n_more = 0;
    letters = argc > 2 ? argv[2] : "";
    struct sigaction action = {.sa_handler = on_usr1, .sa_flags = SA_RESTART | (has('a') ? SA_ONSTACK : 0)};
    sigaction(SIGUSR1, &action, 0);
    action.sa_handler = on_trap;
    sigaddset(&action.sa_mask, SIGUSR2);
    if (has('h')) sigaction(SIGTRAP, &action, 0);
    if (has('i')) signal(SIGTRAP, SIG_IGN);
    for (int i = 0; i < n; i++) pthread_create(&threads[i], 0, worker, 0);
    threads[63] = (pthread_t)argv[1];
    if (has('u') || has('t')) pthread_create(&more[n_more++], 0, storm, threads);
    if (has('e')) pthread_create(&more[n_more++], 0, one_by_one, 0);
    if (has('c')) pthread_create(&more[n_more++], 0, churn, 0);
    if (has('f') || has('v')) pthread_create(&more[n_more++], 0, fork_churn, 0);
    printf("%lx %lx %lx %lx\n", (long)nops5, (long)nop5, (long)prologue, (long)&counter);
    fflush(stdout);
    while (getchar() != EOF) {}
    stop = 1;
    for (int i = 0; i < n_more; i++) pthread_join(more[i], 0);
    for (int i = 0; i < n; i++) pthread_join(threads[i], 0);
    printf("calls %ld counted %ld handled %ld births %ld forks %ld\n", calls, counter, handled, births, forks);
    return 0;
}
