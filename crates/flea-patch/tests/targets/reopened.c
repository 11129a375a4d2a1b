/* Threads that call a function of a plug-in, while another closes and opens it as fast as it can.
   Usage: reopened PLUGIN N_THREADS. Prints the function, the loader's r_debug and its r_brk;
   begins to close when it is sent a line, and ends when its input does. Exits 0 if no call went
   wrong and the plug-in was opened again. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

typedef long step(long);
static pthread_rwlock_t lock;
static step *plugin_step;
static void *plugin;
static atomic_int stop;
static long n_opened;

static void open_it(const char *path) {
    plugin = dlopen(path, RTLD_NOW);
    if (!plugin) {
        printf("WRONG: %s\n", dlerror());
        exit(7);
    }
    plugin_step = (step *)dlsym(plugin, "plugin_step");
}

static void *call(void *unused) {
    for (long n = 0; !stop; n++) {
        pthread_rwlock_rdlock(&lock);
        for (long k = 0; k < 50; k++) {
            long got = plugin_step(n + k);
            if (got != n + k + 1) {
                printf("WRONG: %ld after %ld\n", got, n + k);
                fflush(stdout);
                _exit(7);
            }
        }
        pthread_rwlock_unlock(&lock);
    }
    return unused;
}

static void *reopen(void *path) {
    while (!stop) {
        pthread_rwlock_wrlock(&lock);
        dlclose(plugin);
        open_it(path);
        n_opened++;
        pthread_rwlock_unlock(&lock);
    }
    return 0;
}

int main(int argc, char **argv) {
    pthread_rwlockattr_t attr;
    pthread_rwlockattr_init(&attr);
    pthread_rwlockattr_setkind_np(&attr, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&lock, &attr);
    int n_threads = argc > 2 ? atoi(argv[2]) : 1;
    pthread_t callers[64], opener;
    open_it(argv[1]);
    printf("%lx %lx %lx\n", (long)plugin_step, (long)&_r_debug, (long)_r_debug.r_brk);
    fflush(stdout);
    char c;
    if (read(0, &c, 1) != 1) return 0;
    for (int i = 0; i < n_threads; i++) pthread_create(&callers[i], 0, call, 0);
    pthread_create(&opener, 0, reopen, argv[1]);
    while (read(0, &c, 1) == 1) {}
    stop = 1;
    for (int i = 0; i < n_threads; i++) pthread_join(callers[i], 0);
    pthread_join(opener, 0);
    printf("opened %ld times\n", n_opened);
    return n_opened == 0;
}
