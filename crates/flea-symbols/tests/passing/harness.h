/* Calls functions of any type, and says where their arguments and results really were.
 *
 * `grab` takes the place of a callee: it keeps the argument registers and the words above its
 * return address. `spy` calls a function without parameters and keeps the result registers.
 */
#include <stdio.h>
#include <string.h>

enum { STACK_WORDS = 96 };
struct dump {
    unsigned long gpr[6], area, pad;
    unsigned char xmm[8][64];
    unsigned long stack[STACK_WORDS];
    unsigned long rax, rdx;
    unsigned char result[2][64];
    unsigned char x87[2][16];
} __attribute__((aligned(64)));

#ifdef __cplusplus
extern "C" {
#endif
struct dump dump;
void (*spied)(void);
void grab(void);
void spy(void);
#ifdef __cplusplus
}
#endif

#if defined(__AVX512F__)
#define STORE(n, at) "vmovups %zmm" #n ", " #at "(%rax)\n"
#elif defined(__AVX__)
#define STORE(n, at) "vmovups %ymm" #n ", " #at "(%rax)\n"
#else
#define STORE(n, at) "movups %xmm" #n ", " #at "(%rax)\n"
#endif

__asm__(
    ".text\n.globl grab\n.type grab, @function\ngrab:\n"
    "mov dump@GOTPCREL(%rip), %rax\n"
    "mov %rdi, 0(%rax)\nmov %rsi, 8(%rax)\nmov %rdx, 16(%rax)\n"
    "mov %rcx, 24(%rax)\nmov %r8, 32(%rax)\nmov %r9, 40(%rax)\n"
    "lea 8(%rsp), %rcx\nmov %rcx, 48(%rax)\n"
    STORE(0, 64) STORE(1, 128) STORE(2, 192) STORE(3, 256)
    STORE(4, 320) STORE(5, 384) STORE(6, 448) STORE(7, 512)
    "xor %ecx, %ecx\n"
    "1: mov 8(%rsp,%rcx,8), %rdx\nmov %rdx, 576(%rax,%rcx,8)\n"
    "inc %ecx\ncmp $96, %ecx\njb 1b\n"
    "mov %rdi, %rax\nret\n"
    ".size grab, . - grab\n"
    ".globl spy\n.type spy, @function\nspy:\n"
    "sub $8, %rsp\n"
    "mov spied@GOTPCREL(%rip), %rax\ncall *(%rax)\n"
    "mov dump@GOTPCREL(%rip), %rcx\n"
    "mov %rax, 1344(%rcx)\nmov %rdx, 1352(%rcx)\n"
    "mov %rcx, %rax\n"
    STORE(0, 1360) STORE(1, 1424)
    "mov 1344(%rcx), %rax\n"
    "fstpt 1488(%rcx)\nfstpt 1504(%rcx)\nfninit\n"
    "add $8, %rsp\nret\n"
    ".size spy, . - spy\n"
    ".section .note.GNU-stack,\"\",@progbits\n.text\n");

static void hex(const char *what, const char *name, int i, const void *bytes, unsigned long n) {
    const unsigned char *b = (const unsigned char *)bytes;
    printf("%s %s %d ", what, name, i);
    for (unsigned long k = 0; k < n; k++) printf("%02x", b[k]);
    printf("\n");
}

/* What is behind a word that points into the caller's frame. */
static void behind(const char *name, int i, unsigned long word) {
    if (word >= dump.area && word < dump.area + 4096) hex("behind", name, i, (void *)word, 64);
}

static void report(const char *name) {
    for (int i = 0; i < 6; i++) hex("gpr", name, i, &dump.gpr[i], 8), behind(name, i, dump.gpr[i]);
    for (int i = 0; i < 8; i++) hex("xmm", name, i, dump.xmm[i], 64);
    for (int i = 0; i < STACK_WORDS; i++)
        hex("stack", name, i, &dump.stack[i], 8), behind(name, 6 + i, dump.stack[i]);
    hex("area", name, 0, &dump.area, 8);
}

static void report_result(const char *name) {
    hex("rax", name, 0, &dump.rax, 8);
    hex("rax", name, 1, &dump.rdx, 8);
    for (int i = 0; i < 2; i++) hex("vector", name, i, dump.result[i], 64);
    for (int i = 0; i < 2; i++) hex("x87", name, i, dump.x87[i], 16);
}

/* Where results in memory go. */
static char area[256] __attribute__((aligned(64)));

static unsigned char fill_state = 17;
static void fill(void *at, unsigned long n) {
    unsigned char *b = (unsigned char *)at;
    for (unsigned long k = 0; k < n; k++) b[k] = (fill_state = fill_state * 5 + 3);
}
