/* Three threads that do nothing but start others, each of which calls traced() some times. The first
 * line is the address of traced(), whose first instruction is a nop of one byte. Ends with code 0 at the
 * end of its input. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

void traced(void);
__asm__(".text\n.globl traced\n.type traced, @function\ntraced: nop\nret\n.size traced, . - traced");

static atomic_int stop;
static int pause_us;

static void *newborn(void *unused)
{
    for (int i = 0; i < 20; i++) {
        traced();
        if (pause_us)
            usleep(pause_us);
    }
    return unused;
}

static void *starts_others(void *unused)
{
    while (!atomic_load(&stop)) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, newborn, NULL))
            exit(3);
        pthread_join(thread, NULL);
    }
    return unused;
}

int main(int argc, char **argv)
{
    int n = argc > 1 ? atoi(argv[1]) : 3;
    pthread_t threads[n];
    char line[16];
    pause_us = argc > 2 ? atoi(argv[2]) : 0;
    for (int i = 0; i < n; i++)
        if (pthread_create(&threads[i], NULL, starts_others, NULL))
            exit(4);
    printf("%p\n", (void *)traced);
    fflush(stdout);
    while (read(0, line, sizeof line) > 0)
        ;
    atomic_store(&stop, 1);
    for (int i = 0; i < n; i++)
        pthread_join(threads[i], NULL);
    return 0;
}
