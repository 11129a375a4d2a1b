//! Generates a program whose functions have every split of nops around their entries that
//! `-fpatchable-function-entry=N,M` can make.

use std::fmt::Write as _;

/// Nops behind the entry, and before it: 0 to this many of each.
pub const MAX_ENTRY_NOPS: u32 = 16;

/// Functions that have room in front of their entries only: by hand, for no compiler is made to
/// leave them this short. Each is entered once per call of `hard_calls`.
const HARD: &str = r#"
#define HARD(name, endbr, nops, body)                                                      \
    __asm__(".text\n.byte 0x90,0x90,0x90,0x90,0x90\n.globl " #name "\n.type " #name ",@function\n" \
            #name ":\n.cfi_startproc\n" endbr nops body ".cfi_endproc\n.size " #name ",.-" #name "\n" \
            ".section __patchable_function_entries,\"awo\",@progbits,.text\n.p2align 3\n"      \
            ".quad " #name "-5\n.text\n");                                                   \
    long name(long x);
__asm__(".text\n.p2align 4\n");
HARD(hard_ret, "", "nop\nnop\n", "xchg %edi,%eax\nret\n")
HARD(hard_next, "", "xchg %ax,%ax\n", "xchg %edi,%eax\nret\n")
HARD(hard_endbr, "endbr64\n", "nop\nnop\n", "xchg %edi,%eax\nret\n")
HARD(hard_wide, "", "nopl (%rax)\n", "1: sub $3,%rdi\njns 1b\nlea 3(%rdi),%rax\nret\n")
HARD(hard_loop, "", "nop\nnop\n", "1: sub $3,%rdi\njns 1b\nlea 3(%rdi),%rax\nret\n")
HARD(hard_call, "", "nop\nnop\n", "call *%rsi\nmov %rdi,%rax\nret\n")
static void nothing(void) {}
static long hard_calls(long c)
{
    long (*call)(long, void (*)(void)) = (long (*)(long, void (*)(void)))hard_call;
    return (hard_ret(c) != c) + (hard_next(c) != c) + (hard_endbr(c) != c) + (hard_wide(c & 15) != (c & 15) % 3)
        + (hard_loop(c & 15) != (c & 15) % 3) + (call(c, nothing) != c);
}
"#;

/// What the compiler is to put at entries.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Nops, as each function's name says.
    Nops,
    /// What its flags say.
    AsFlagsSay,
}

/// The program's text; functions `nops_BEHIND_BEFORE`. It counts like [`crate::Fixture::Many`].
pub(crate) fn source(entry: Entry) -> String {
    let mut text = String::from(
        "/* Generated: nops_B_A has B nops behind its entry and A before it, where nops were asked for. */\n\
         #include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n",
    );
    let splits = || (0..=MAX_ENTRY_NOPS).flat_map(|b| (0..=MAX_ENTRY_NOPS).map(move |a| (b, a)));
    for (behind, before) in splits() {
        let nops = match entry {
            Entry::Nops => format!(", patchable_function_entry({}, {before})", behind + before),
            Entry::AsFlagsSay => String::new(),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "__attribute__((noinline{nops})) long nops_{behind}_{before}(long x) \
             {{ __asm__ volatile(\"\" ::: \"memory\"); return x * {} + {before}; }}",
            behind + 3,
        );
    }
    text.push_str(HARD);
    text.push_str("static long (*const all[])(long) = {\n");
    for (behind, before) in splits() {
        let _ = writeln!(text, "nops_{behind}_{before},");
    }
    let n_columns = MAX_ENTRY_NOPS + 1;
    let _ = write!(
        text,
        "}};\n\
         enum {{ N = sizeof all / sizeof *all }};\n\
         static void wait_line(void) {{ char l[64]; if (!fgets(l, sizeof l, stdin)) exit(9); }}\n\
         static void say(const char *s) {{ puts(s); fflush(stdout); }}\n\
         int main(int argc, char **argv)\n{{\n\
         \x20   long calls = argc > 1 ? atol(argv[1]) : 1, errors = 0;\n\
         \x20   int waits = argc > 2 && !strcmp(argv[2], \"wait\");\n\
         \x20   if (waits) {{ say(\"ready\"); wait_line(); }}\n\
         \x20   for (long c = 0; c < calls; errors += hard_calls(c), c++)\n\
         \x20       for (long i = 0; i < N; i++)\n\
         \x20           errors += all[i](c) != c * (i / {n_columns} + 3) + i % {n_columns};\n\
         \x20   printf(\"{{\\\"threads\\\":1,\\\"calls\\\":%ld,\\\"errors\\\":%ld,\\\"functions\\\":\"\n\
         \x20          \"{{\\\"nops_*\\\":{{\\\"count\\\":%ld}}}}}}\\n\", calls, errors, calls * N);\n\
         \x20   fflush(stdout);\n\
         \x20   if (waits) {{ say(\"done\"); wait_line(); }}\n\
         \x20   return errors ? 3 : waits ? 7 : 0;\n}}\n"
    );
    text
}
