/* Calls a shared library: through the PLT, or, built with -DUSE_DLOPEN, through dlopen after
 * the first line arrived (attachments made before that are pending until then).
 * See harness.h for the usage and the output. */
#define _GNU_SOURCE
#include "harness.h"
#include "counted_lib.h"

enum { LIB_ADD, LIB_LEN, LIB_TWICE, LOCAL, N_FUNCTIONS };
static const char *const names[] = {"lib_add", "lib_len", "lib_twice", "local"};

#ifdef USE_DLOPEN
#include <dlfcn.h>
static long (*add_pointer)(long, long);
static unsigned long (*len_pointer)(const char *);
static long (*twice_pointer)(long);
#define lib_add add_pointer
#define lib_len len_pointer
#define lib_twice twice_pointer

static void *symbol_of(void *library, const char *name)
{
    void *address = dlsym(library, name);
    if (!address) {
        fprintf(stderr, "dlsym: %s\n", dlerror());
        exit(2);
    }
    return address;
}

static void prepare(void)
{
    char path[4096];
    FILE *self = fopen("/proc/self/cmdline", "r");
    size_t n = self ? fread(path, 1, sizeof path - 32, self) : 0;
    path[n] = 0;
    char *slash = strrchr(path, '/');
    strcpy(slash ? slash + 1 : path, "libcounted.so");
    void *library = dlopen(path, RTLD_NOW);
    if (!library) {
        fprintf(stderr, "dlopen: %s\n", dlerror());
        exit(2);
    }
    add_pointer = (long (*)(long, long))symbol_of(library, "lib_add");
    len_pointer = (unsigned long (*)(const char *))symbol_of(library, "lib_len");
    twice_pointer = (long (*)(long))symbol_of(library, "lib_twice");
}
#else
#define prepare NULL
#endif

NOINLINE long local(long a)
{
    KEEP();
    return a - 1;
}

static void run(struct work *w)
{
    static const char *const words[] = {"", "ab"};
    for (long i = 0; i < w->calls; i++) {
        long sum = lib_add(i, w->thread);
        counted(w, LIB_ADD, (unsigned long)i, (unsigned long)sum);
        check(w, sum == i + w->thread);

        const char *word = words[i & 1];
        unsigned long length = lib_len(word);
        counted(w, LIB_LEN, (unsigned long)word, length);
        check(w, length == (unsigned long)(i & 1) * 2);

        long twice = lib_twice(i);
        counted(w, LIB_TWICE, (unsigned long)i, (unsigned long)twice);
        counted(w, LIB_ADD, (unsigned long)i, (unsigned long)twice);
        check(w, twice == 2 * i);

        long less = local(i);
        counted(w, LOCAL, (unsigned long)i, (unsigned long)less);
        check(w, less == i - 1);
    }
}

int main(int argc, char **argv)
{
    static const struct program program = {names, N_FUNCTIONS, prepare, run};
    return harness_main(argc, argv, &program);
}
