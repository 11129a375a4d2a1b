/* Calls the functions of asm/odd.S a known number of times.
 * See harness.h for the usage and the output. */
#include "harness.h"

long odd_nop5(long), odd_endbr_nop5(long), odd_nops(long), odd_tight(long),
    odd_tight_next(long), odd_riprel(long), odd_jcc(long), odd_call(long), odd_loop(long),
    odd_entry_loop(long), odd_jrcxz(long), odd_saved(long);
void odd_ret(long);

enum {
    NOP5, ENDBR_NOP5, NOPS, RET, TIGHT, TIGHT_NEXT, RIPREL, JCC, CALL, LOOP, ENTRY_LOOP, JRCXZ,
    SAVED, N_FUNCTIONS
};

static const char *const names[] = {
    "odd_nop5", "odd_endbr_nop5", "odd_nops", "odd_ret", "odd_tight", "odd_tight_next",
    "odd_riprel", "odd_jcc", "odd_call", "odd_loop", "odd_entry_loop", "odd_jrcxz", "odd_saved",
};

static void one(struct work *w, int which, long (*f)(long), long arg, long expected)
{
    long r = f(arg);
    counted(w, which, (unsigned long)arg, (unsigned long)r);
    check(w, r == expected);
}

static void run(struct work *w)
{
    for (long i = 0; i < w->calls; i++) {
        one(w, NOP5, odd_nop5, i, i + 1);
        one(w, ENDBR_NOP5, odd_endbr_nop5, i, i + 2);
        one(w, NOPS, odd_nops, i, i + 3);
        odd_ret(i);
        counted(w, RET, (unsigned long)i, 0);
        one(w, TIGHT, odd_tight, i, i);
        one(w, TIGHT_NEXT, odd_tight_next, i, i + 4);
        one(w, RIPREL, odd_riprel, i, i + 1000);
        one(w, JCC, odd_jcc, i & 1, i & 1 ? 6 : 99);
        one(w, CALL, odd_call, i, i + 6);
        one(w, LOOP, odd_loop, 1 + (i & 7), 1 + (i & 7));
        one(w, ENTRY_LOOP, odd_entry_loop, 1 + (i & 7), 8);
        one(w, JRCXZ, odd_jrcxz, i & 1, i & 1 ? 10 : 98);
        one(w, SAVED, odd_saved, i, i + 10);
    }
}

int main(int argc, char **argv)
{
    static const struct program program = {names, N_FUNCTIONS, NULL, run};
    return harness_main(argc, argv, &program);
}
