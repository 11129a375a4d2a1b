/* Bytes that go from one thread to another by pipes, sockets and a terminal, in calls that block
 * half way.
 *
 * usage: transfers KIB   prints "TID TID ..." of all threads; when KIB have gone through each way, a
 *                        line "NAME ok|wrong SHORT" each: whether all bytes arrived in order and no
 *                        call failed, and how many calls took fewer bytes than they were given. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <termios.h>
#include <unistd.h>

enum { CHUNK = 96 << 10 };

static size_t total;
static int source; /* a file of CHUNK bytes */

static __thread char chunk[CHUNK];

static unsigned char byte_at(size_t n)
{
    return (n % CHUNK * 2654435761u) >> 13;
}

struct way {
    const char *name;
    int (*open)(int fds[2]);
    ssize_t (*send)(int fd, const char *bytes, size_t size);
    int fds[2];
    pid_t tids[2];
    int failed;
    long n_short;
};

static int open_pipe(int fds[2]) { return pipe(fds); }
static int open_socket(int fds[2]) { return socketpair(AF_UNIX, SOCK_STREAM, 0, fds); }
static int open_terminal(int fds[2])
{
    struct termios raw;
    fds[0] = posix_openpt(O_RDWR | O_NOCTTY);
    if (fds[0] < 0 || grantpt(fds[0]) || unlockpt(fds[0]))
        return -1;
    fds[1] = open(ptsname(fds[0]), O_RDWR | O_NOCTTY);
    tcgetattr(fds[1], &raw);
    cfmakeraw(&raw);
    return tcsetattr(fds[1], TCSANOW, &raw);
}

static ssize_t by_write(int fd, const char *bytes, size_t size) { return write(fd, bytes, size); }
static ssize_t by_send(int fd, const char *bytes, size_t size) { return send(fd, bytes, size, 0); }
static ssize_t by_writev(int fd, const char *bytes, size_t size)
{
    struct iovec parts[2] = {{(char *)bytes, size / 2}, {(char *)bytes + size / 2, size - size / 2}};
    return writev(fd, parts, 2);
}
static ssize_t by_sendfile(int fd, const char *bytes, size_t size)
{
    off_t from = bytes - chunk;
    return sendfile(fd, source, &from, size);
}

static struct way ways[] = {
    {.name = "pipe", .open = open_pipe, .send = by_write},
    {.name = "pipe_writev", .open = open_pipe, .send = by_writev},
    {.name = "pipe_sendfile", .open = open_pipe, .send = by_sendfile},
    {.name = "socket", .open = open_socket, .send = by_send},
    {.name = "socket_writev", .open = open_socket, .send = by_writev},
    {.name = "terminal", .open = open_terminal, .send = by_write},
};
enum { N = sizeof ways / sizeof *ways };
static pthread_barrier_t known, begin;

static void *sender(void *arg)
{
    struct way *w = arg;
    for (size_t i = 0; i < CHUNK; i++)
        chunk[i] = byte_at(i);
    w->tids[0] = gettid();
    pthread_barrier_wait(&known);
    pthread_barrier_wait(&begin);
    for (size_t sent = 0; sent < total;) {
        size_t in_chunk = CHUNK - sent % CHUNK, left = total - sent;
        size_t size = in_chunk < left ? in_chunk : left;
        ssize_t n = w->send(w->fds[1], chunk + sent % CHUNK, size);
        if (n <= 0) {
            w->failed = errno ? errno : -1;
            break;
        }
        w->n_short += (size_t)n < size;
        sent += n;
    }
    return NULL;
}

static void *receiver(void *arg)
{
    struct way *w = arg;
    char bytes[5000];
    w->tids[1] = gettid();
    pthread_barrier_wait(&known);
    pthread_barrier_wait(&begin);
    for (size_t seen = 0; seen < total && !w->failed;) {
        ssize_t n = read(w->fds[0], bytes, sizeof bytes);
        if (n <= 0) {
            w->failed = errno ? errno : -1;
            break;
        }
        for (ssize_t i = 0; i < n; i++)
            if ((unsigned char)bytes[i] != byte_at(seen + i))
                w->failed = -2;
        seen += n;
        if (seen % 7 == 0)
            usleep(100);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t threads[N][2];
    total = (argc > 1 ? strtoul(argv[1], NULL, 10) : 1024) << 10;
    source = open("/tmp", O_TMPFILE | O_RDWR, 0600);
    for (size_t i = 0; i < CHUNK; i++) {
        unsigned char byte = byte_at(i);
        if (write(source, &byte, 1) != 1)
            return 9;
    }
    pthread_barrier_init(&known, NULL, 2 * N + 1);
    pthread_barrier_init(&begin, NULL, 2 * N + 1);
    for (int i = 0; i < N; i++)
        if (ways[i].open(ways[i].fds) || pthread_create(&threads[i][0], NULL, sender, &ways[i]) ||
            pthread_create(&threads[i][1], NULL, receiver, &ways[i]))
            return 8;
    pthread_barrier_wait(&known);
    for (int i = 0; i < N; i++)
        printf("%d %d ", ways[i].tids[0], ways[i].tids[1]);
    puts("");
    fflush(stdout);
    pthread_barrier_wait(&begin);
    for (int i = 0; i < 2 * N; i++)
        pthread_join(threads[i / 2][i % 2], NULL);
    for (int i = 0; i < N; i++)
        printf("%s %s %ld %d\n", ways[i].name, ways[i].failed ? "wrong" : "ok", ways[i].n_short, ways[i].failed);
    return 0;
}
