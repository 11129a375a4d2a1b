/* What every program of the matrix has: registers filled before a call and noted after it, and
 * a loop that does as it is told on stdin.
 *
 *   run RESIDUE IN OUT    reads all inputs from IN, calls every function once over a stack full of
 *                         RESIDUE, writes to OUT, for each function a struct record, then the
 *                         log; says "done"
 *   (end)                 ends */
#include <cpuid.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R15 = 15 };
enum { X_BYTES = 4096 };

struct cpu {
    uint64_t in[16], fill[16], out[16], ret, target, flags, index;
};
struct record {
    uint64_t in[16], out[16], flags, has_thunk;
    unsigned char x_in[X_BYTES], x_out[X_BYTES];
};
struct cpu matrix_cpu;
_Alignas(64) unsigned char matrix_x_in[X_BYTES], matrix_x_fill[X_BYTES], matrix_x_out[X_BYTES],
    matrix_x_back[X_BYTES], matrix_x_clean[X_BYTES];

extern void *matrix_target[];
extern void (*matrix_call[])(void);
extern unsigned long matrix_n, matrix_n_in, matrix_n_log;
extern unsigned char matrix_in[], matrix_log[];

unsigned char matrix_residue;
static struct record *records;
static volatile unsigned long current;
/* Where AVX-512's parts are in the save area; 0 where the processor does not have them. */
static unsigned opmask_at, zmm_hi256_at, hi16_zmm_at;
static uint64_t components;

static uint64_t pattern(unsigned n)
{
    return 0xf1ea000000000000u + n * 0x0000010000010001u;
}

static void fill(unsigned char *at, unsigned n_bytes, unsigned salt)
{
    for (unsigned i = 0; i < n_bytes; i += 8) {
        uint64_t word = pattern(salt + i);
        memcpy(at + i, &word, 8);
    }
}

/* Vector registers from `first` (0 or 8) up, as wide as they are, and mask registers. */
static void fill_vectors(unsigned char *area, unsigned first, unsigned salt)
{
    fill(area + 160 + 16 * first, 256 - 16 * first, salt);
    if (components & 4)
        fill(area + 576 + 16 * first, 256 - 16 * first, salt + 0x1000);
    if (opmask_at)
        fill(area + opmask_at, 64, salt + 0x2000);
    if (zmm_hi256_at)
        fill(area + zmm_hi256_at + 32 * first, 512 - 32 * first, salt + 0x3000);
    if (hi16_zmm_at)
        fill(area + hi16_zmm_at, 1024, salt + 0x4000);
}

/* The function's arguments stay, all else gets a value of its own: r10, r11 and what the
 * function has to keep, xmm8 to xmm15, the upper parts of those, everything of AVX-512. The
 * control words get unusual values that a function has to live with. */
void matrix_prepare(void)
{
    memcpy(matrix_cpu.fill, matrix_cpu.in, sizeof matrix_cpu.fill);
    for (unsigned i = 0; i < 16; i++)
        if (i == RBX || i == RBP || i == R10 || i == R11 || i >= R12)
            matrix_cpu.fill[i] = pattern(0x100 * i);
    /* Only al means something, and only to variadic functions. */
    matrix_cpu.fill[RAX] = (matrix_cpu.in[RAX] & 0xff) | pattern(7) << 8;
    matrix_cpu.target = (uint64_t)matrix_target[matrix_cpu.index];

    memcpy(matrix_x_fill, matrix_x_in, X_BYTES);
    uint16_t control = 0x0f7f; /* 64-bit mantissas, rounded towards zero */
    uint32_t mxcsr = 0x5f80;   /* rounded up */
    memcpy(matrix_x_fill, &control, 2);
    memcpy(matrix_x_fill + 24, &mxcsr, 4);
    fill_vectors(matrix_x_fill, 8, 0x2000);
    memcpy(matrix_x_fill + 512, &components, 8);
}

/* Results stay, and the caller gets its control words back whatever became of them. */
void matrix_finish(void)
{
    struct record *r = &records[matrix_cpu.index];
    memcpy(r->in, matrix_cpu.fill, sizeof r->in);
    r->in[RSP] = matrix_cpu.in[RSP];
    memcpy(r->out, matrix_cpu.out, sizeof r->out);
    r->flags = matrix_cpu.flags;
    r->has_thunk = 1;
    memcpy(r->x_in, matrix_x_fill, X_BYTES);
    memcpy(r->x_out, matrix_x_out, X_BYTES);
    memcpy(matrix_x_back, matrix_x_out, X_BYTES);
    memcpy(matrix_x_back, matrix_x_in, 2);
    memcpy(matrix_x_back + 24, matrix_x_in + 24, 4);
}

/* Which function it was is all that is needed to find out more. */
static void died(int number)
{
    static char text[] = "died by signal 00 in function 000\n";
    text[15] += number / 10, text[16] += number % 10;
    text[30] += current / 100, text[31] += current / 10 % 10, text[32] += current % 10;
    ssize_t ignored = write(2, text, sizeof text - 1);
    (void)ignored;
    _exit(3);
}

static unsigned component_at(unsigned n)
{
    unsigned a, b, c, d;
    __cpuid_count(0xd, n, a, b, c, d);
    return components >> n & 1 ? b : 0;
}

static void learn_components(void)
{
    unsigned a, b, c, d;
    __cpuid(1, a, b, c, d);
    if (!(c & 1u << 27)) {
        puts("no xsave");
        exit(0);
    }
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    components = a & 0xe7;
    opmask_at = component_at(5);
    zmm_hi256_at = component_at(6);
    hi16_zmm_at = component_at(7);
    uint16_t control = 0x037f;
    uint32_t mxcsr = 0x1f80;
    memcpy(matrix_x_clean, &control, 2);
    memcpy(matrix_x_clean + 24, &mxcsr, 4);
    memcpy(matrix_x_clean + 512, &components, 8);
    fill_vectors(matrix_x_clean, 0, 0x8000);
}

/* Fills the stack with matrix_residue, which is what a caller leaves in the padding of its
 * arguments, and all registers that need not be kept with matrix_x_clean and numbers. */
void matrix_clean(void);

static void run(const char *in, const char *out)
{
    FILE *file = fopen(in, "r");
    if (!file || fread(matrix_in, 1, matrix_n_in, file) != matrix_n_in)
        exit(4);
    fclose(file);
    memset(matrix_log, 0, matrix_n_log);
    memset(records, 0, matrix_n * sizeof *records);
    for (current = 0; current < matrix_n; current++) {
        matrix_clean();
        matrix_call[current]();
    }
    file = fopen(out, "w");
    if (!file || fwrite(records, sizeof *records, matrix_n, file) != matrix_n ||
        fwrite(matrix_log, 1, matrix_n_log, file) != matrix_n_log || fclose(file))
        exit(5);
}

int main(void)
{
    static char stack[16384], line[2048], in[1000], out[1000];
    stack_t other = { .ss_sp = stack, .ss_size = sizeof stack };
    struct sigaction action = { .sa_handler = died, .sa_flags = SA_ONSTACK };
    static const int deadly[] = { SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP };
    sigaltstack(&other, 0);
    for (unsigned i = 0; i < sizeof deadly / sizeof *deadly; i++)
        sigaction(deadly[i], &action, 0);
    learn_components();
    records = calloc(matrix_n, sizeof *records);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        unsigned residue;
        if (sscanf(line, "run %u %999s %999s", &residue, in, out) != 3)
            return 2;
        matrix_residue = residue;
        run(in, out);
        puts("done");
        fflush(stdout);
    }
    return 7;
}
