/* A program whose data is read through typed pointers. Commands come by lines on standard input;
 * each is a call of visit in a thread that blocks every signal, with
 *
 *   list      the first of three items
 *   null      no item at all
 *   broken    an item whose successor is in a page that may not be read
 *   half      an item that such a page cuts in two, behind its name
 *   stack     an item on the caller's stack
 *   next      the first item: visit's caller prints what find(item, 1) returns
 *
 * What visit returns is printed. End of input ends it with code 7. */
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define OWN __attribute__((noinline, noclone, noipa))

struct point { int x; short y; };

struct item {
    struct item *next;
    const char *name;
    char label[8];
    struct point at;
    unsigned flags : 3, kind : 5;
    union { struct item *owner; long number; } u;
    struct point *corners[2];
    double weight;
};

static struct point corner = { -7, 70 };
static struct item items[3] = {
    { &items[1], "first", "label1", { -1, 10 }, 5, 17, { .number = 100 }, { &corner }, 0.5 },
    { &items[2], "second", "label2", { -2, 20 }, 6, 18, { .number = 200 }, { 0, &corner }, 1.5 },
    { NULL, "third", "label3", { -3, 30 }, 7, 19, { .number = 300 }, { 0 }, 2.5 },
};

OWN long visit(struct item *item) { return item == NULL ? -1 : item->at.x; }
OWN struct item *find(struct item *list, int n)
{
    while (list != NULL && n-- > 0)
        list = list->next;
    return list;
}

/* The last readable byte is `bytes` into it. */
static struct item *before_nothing(size_t bytes)
{
    char *pages = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *at = pages + 4096 - bytes;
    if (pages == MAP_FAILED)
        abort();
    memcpy(at, &items[0], sizeof(items[0]));
    if (mprotect(pages + 4096, 4096, PROT_NONE))
        abort();
    return (struct item *)at;
}

static struct item broken;
static const char *command;

OWN static void call(void)
{
    struct item on_stack = items[1];
    struct item *item = &items[0];
    if (!strcmp(command, "null"))
        item = NULL;
    if (!strcmp(command, "broken"))
        item = &broken;
    if (!strcmp(command, "half"))
        /* What visit itself reads is there. */
        item = before_nothing(offsetof(struct item, u));
    if (!strcmp(command, "stack"))
        item = &on_stack;
    if (!strcmp(command, "next"))
        printf("found %s\n", find(item, 1)->name);
    else
        printf("visited %ld %s\n", visit(item), item == NULL ? "" : item->name);
    fflush(stdout);
}

static void *without_signals(void *unused)
{
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, NULL);
    call();
    return unused;
}

int main(void)
{
    char line[64];
    broken = items[0];
    broken.next = before_nothing(0);
    printf("ready\n");
    fflush(stdout);
    while (fgets(line, sizeof(line), stdin) != NULL) {
        pthread_t thread;
        line[strcspn(line, "\n")] = 0;
        command = line;
        if (pthread_create(&thread, NULL, without_signals, NULL))
            abort();
        pthread_join(thread, NULL);
    }
    return 7;
}
