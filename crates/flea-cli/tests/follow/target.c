/* A program that makes processes and threads, loads libraries and executes programs, and knows
 * how often work() was called by all of them. Commands come by lines on standard input; each is
 * answered by one line:
 *
 *   work N         calls work N times                                  done
 *   fork K N       K children after each other, each of N calls        done
 *   vfork K N      the same by vfork, calls before the exec            done
 *   spawn K N      K programs by posix_spawn, each of N calls          done
 *   vexec K N      K programs by vfork and execv, each of N calls      done
 *   storm K N      K rounds of threads, fork, vfork and spawn at once  done
 *   stay           a child that calls until told to stop               its number
 *   part           tells the child to stop and waits for it            how it ended
 *   run PROGRAM    a program by posix_spawn, without arguments         done
 *   total          calls so far, of this program and its children      the number
 *   exec N         becomes a program of N calls, which ends at the next line or without one
 *   open PATH      loads a library with lib_step                       done
 *   lib N          calls lib_step N times                              their sum
 *   close          unloads it                                          done
 *   cover          maps other memory where its code was                done
 *   covered        whether that memory is as it was                    yes or no
 *
 * `target calls N` makes N calls and ends with code 0, `target linger N` waits for input. End of input ends it with code 7. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define OWN __attribute__((noinline, noclone, noipa))
#define COVER_BYTES 8192

extern char **environ;
static struct {
    _Atomic long calls;
    _Atomic int stop;
} *shared;
static char *own_path;
static void *library;
static int (*lib_step)(int);
static unsigned char *cover;

OWN int work(int x)
{
    atomic_fetch_add(&shared->calls, 1);
    return x + 1;
}

/* Traced by those who come and go. */
OWN int other(int x) { return x * 3 + 1; }

static void calls(long n)
{
    for (long i = 0; i < n; i++)
        other(work((int)i));
}

static void wait_for(pid_t child)
{
    int status;
    /* A stop that a tracer let shine through would be an answer, too. */
    if (child < 0 || waitpid(child, &status, WUNTRACED | WCONTINUED) != child || status != 0)
        _exit(4);
}

static void forked(long k, long n)
{
    while (k-- > 0) {
        pid_t child = fork();
        if (child == 0) {
            calls(n);
            _exit(0);
        }
        wait_for(child);
    }
}

static void vforked(long k, long n)
{
    while (k-- > 0) {
        pid_t child = vfork();
        if (child == 0) {
            calls(n);
            _exit(0);
        }
        wait_for(child);
    }
}

static void spawned(long k, long n)
{
    char number[24];
    snprintf(number, sizeof number, "%ld", n);
    while (k-- > 0) {
        char *arguments[] = {own_path, "calls", number, NULL};
        pid_t child;
        if (posix_spawn(&child, own_path, NULL, NULL, arguments, environ))
            _exit(5);
        wait_for(child);
    }
}

static void vexeced(long k, long n)
{
    char number[24];
    snprintf(number, sizeof number, "%ld", n);
    char *arguments[] = {own_path, "calls", number, NULL};
    while (k-- > 0) {
        pid_t child = vfork();
        if (child == 0) {
            execv(own_path, arguments);
            _exit(6);
        }
        wait_for(child);
    }
}

static void run(const char *path)
{
    char *arguments[] = {(char *)path, NULL};
    pid_t child;
    if (posix_spawn(&child, path, NULL, NULL, arguments, environ))
        _exit(5);
    wait_for(child);
}

static long storm_rounds, storm_calls;

static void *one_thread(void *unused)
{
    calls(storm_calls);
    return unused;
}

static void *storm_threads(void *unused)
{
    for (long i = 0; i < storm_rounds * 8; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, one_thread, NULL))
            _exit(8);
        pthread_join(thread, NULL);
    }
    return unused;
}
static void *storm_forks(void *unused) { forked(storm_rounds, storm_calls); return unused; }
static void *storm_vforks(void *unused) { vforked(storm_rounds, storm_calls); return unused; }
static void *storm_spawns(void *unused) { spawned(storm_rounds, storm_calls); return unused; }

static void storm(long k, long n)
{
    void *(*const all[])(void *) = {storm_threads, storm_forks, storm_vforks, storm_spawns};
    pthread_t threads[4];
    storm_rounds = k;
    storm_calls = n;
    for (int i = 0; i < 4; i++)
        if (pthread_create(&threads[i], NULL, all[i], NULL))
            _exit(8);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
}

static pid_t stay(void)
{
    atomic_store(&shared->stop, 0);
    pid_t child = fork();
    if (child == 0) {
        while (!atomic_load(&shared->stop)) {
            calls(1);
            usleep(100);
        }
        _exit(0);
    }
    return child;
}

static int part(pid_t child)
{
    int status = -1;
    atomic_store(&shared->stop, 1);
    waitpid(child, &status, 0);
    return status;
}

static void open_library(const char *path)
{
    library = dlopen(path, RTLD_NOW);
    if (library == NULL) {
        fprintf(stderr, "%s\n", dlerror());
        _exit(9);
    }
    lib_step = (int (*)(int))dlsym(library, "lib_step");
}

/* The page of the function and the one behind it: executable, and full of what could be a site. */
static void cover_it(void)
{
    cover = (unsigned char *)((uintptr_t)lib_step & ~(uintptr_t)4095);
    int prot = PROT_READ | PROT_WRITE | PROT_EXEC;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
    if (mmap(cover, COVER_BYTES, prot, flags, -1, 0) != cover)
        _exit(10);
    memset(cover, 0x5a, COVER_BYTES);
}

static int is_as_it_was(void)
{
    for (int i = 0; i < COVER_BYTES; i++)
        if (cover[i] != 0x5a)
            return 0;
    return 1;
}

static long sum_of(long n)
{
    long sum = 0;
    for (long i = 0; i < n; i++)
        sum += lib_step((int)i);
    return sum;
}

/* Whether it was a command whose answer is "done". */
static int act(const char *word, const char *text, long a, long b)
{
    if (!strcmp(word, "work"))
        calls(a);
    else if (!strcmp(word, "fork"))
        forked(a, b);
    else if (!strcmp(word, "vfork"))
        vforked(a, b);
    else if (!strcmp(word, "spawn"))
        spawned(a, b);
    else if (!strcmp(word, "vexec"))
        vexeced(a, b);
    else if (!strcmp(word, "storm"))
        storm(a, b);
    else if (!strcmp(word, "run"))
        run(text);
    else if (!strcmp(word, "open"))
        open_library(text);
    else if (!strcmp(word, "close"))
        dlclose(library);
    else if (!strcmp(word, "cover"))
        cover_it();
    else
        return 0;
    return 1;
}

int main(int argc, char **argv)
{
    char line[4096], word[16], text[4000], number[24];
    pid_t child = -1;
    own_path = argv[0];
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (argc == 3 && !strcmp(argv[1], "calls")) {
        calls(atol(argv[2]));
        return 0;
    }
    if (argc == 3 && !strcmp(argv[1], "linger")) {
        calls(atol(argv[2]));
        return fgets(line, sizeof line, stdin) ? 3 : 0;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        long a = 0, b = 0;
        text[0] = 0;
        sscanf(line, "%15s %3999s", word, text);
        sscanf(line, "%*s %ld %ld", &a, &b);
        if (act(word, text, a, b)) {
            puts("done");
        } else if (!strcmp(word, "stay")) {
            child = stay();
            printf("%d\n", (int)child);
        } else if (!strcmp(word, "part")) {
            printf("%d\n", part(child));
        } else if (!strcmp(word, "total")) {
            printf("%ld\n", atomic_load(&shared->calls));
        } else if (!strcmp(word, "lib")) {
            printf("%ld\n", sum_of(a));
        } else if (!strcmp(word, "covered")) {
            puts(is_as_it_was() ? "yes" : "no");
        } else if (!strcmp(word, "exec")) {
            snprintf(number, sizeof number, "%ld", a);
            execl(own_path, own_path, "linger", number, (char *)NULL);
            _exit(6);
        }
    }
    return 7;
}
