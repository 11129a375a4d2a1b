//! Signatures against what compilers really do: each parameter word is stored by a function
//! of its own, and the store's source is where the word is.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compiled;

use std::fmt::Write as _;

use compiled::{compile, function, gcc};
use flea_symbols::signature::{
    Absent, ArgWord, Param, RetWord, Signature, SignatureSource, StackWords, Type,
};
use flea_symbols::{Function, Module};
use iced_x86::{Decoder, DecoderOptions, Mnemonic, OpKind, Register};

fn signature(module: &Module<'_>, name: &str) -> Signature {
    module.signature(function(module, name))
}

#[test]
fn c_declarations() {
    let source = r#"
        #include <stdarg.h>
        #include <stdbool.h>
        struct point { long x, y; }; struct big { long a[4]; }; enum color { RED, BLUE };
        typedef unsigned int u32; typedef const char *text;
        int add(int a, int b) { return a + b; }
        const char *greet(const char *name, unsigned char **out) { return name; }
        void nothing(void) {}
        double scale(double v, float by, bool up) { return up ? v * by : v; }
        u32 typed(u32 n, text t, enum color c) { return n; }
        long by_value(struct point p, struct big b, int last) { return p.x + b.a[0] + last; }
        struct big make_big(int seed) { struct big b = {{seed}}; return b; }
        struct point make_point(long x) { struct point p = {x, 1}; return p; }
        long double wide(long double v, __int128 w) { return v + w; }
        int format(const char *fmt, ...) { va_list l; va_start(l, fmt); int x = va_arg(l, int); va_end(l); return x; }
        int apply(int (*f)(int, char *), void *user) { return f(1, user); }
        int nine(int a, int b, int c, int d, int e, int f, int g, char h, int i) { return g + h + i; }
    "#;
    for version in ["-gdwarf-4", "-gdwarf-5"] {
        for compiler in ["gcc", "clang"] {
            for level in ["-O0", "-O2"] {
                let name = format!("decl{compiler}{version}{level}");
                let Some(bytes) = compile(&name, compiler, source, &[version, level]) else {
                    continue;
                };
                let module = Module::parse(&bytes, None).unwrap();
                let expect = [
                    ("add", "int add(int a, int b)"),
                    ("greet", "const char *greet(const char *name, unsigned char **out)"),
                    ("nothing", "void nothing(void)"),
                    ("typed", "u32 typed(u32 n, text t, enum color c)"),
                    ("by_value", "long by_value(struct point p, struct big b, int last)"),
                    ("make_big", "struct big make_big(int seed)"),
                    ("format", "int format(const char *fmt, ...)"),
                    ("apply", "int apply(int (*f)(int, char *), void *user)"),
                ];
                for (f, declaration) in expect {
                    let text = signature(&module, f).declaration(f).replace("long int", "long");
                    assert_eq!(text, declaration, "{name}");
                }
                details(&module);
            }
        }
    }
}

fn details(module: &Module<'_>) {
    use ArgWord::{Gpr, Stack, Xmm};
    let words = |name: &str| -> Vec<ArgWord> { signature(module, name).arg_words().collect() };
    assert_eq!(words("scale"), [Xmm(0), Xmm(1), Gpr(0)]);
    let by_value = signature(module, "by_value");
    assert_eq!(words("by_value"), [Gpr(0), Gpr(1), Stack(0), Stack(1), Stack(2), Stack(3), Gpr(2)]);
    assert_eq!(by_value.stack_words, StackWords::Known(4));
    assert_eq!(words("make_big"), [Gpr(1)]);
    assert_eq!(signature(module, "make_big").ret.words, [RetWord::Rax]);
    assert_eq!(signature(module, "make_point").ret.words, [RetWord::Rax, RetWord::Rdx]);
    assert_eq!(words("wide"), [Stack(0), Stack(1), Gpr(0), Gpr(1)]);
    assert_eq!(
        signature(module, "wide").ret.words,
        [0, 1].map(|word| RetWord::X87 { reg: 0, word })
    );
    assert_eq!(signature(module, "nothing").ret.words, []);
    assert_eq!(signature(module, "scale").ret.words, [RetWord::Xmm0]);
    assert_eq!(words("nine")[6..], [Stack(0), Stack(1), Stack(2)]);
    assert_eq!(signature(module, "nine").stack_words, StackWords::Known(3));
    let greet = signature(module, "greet");
    assert!(matches!(&greet.params[0].ty, Type::Pointer { to_char: true, .. }));
    assert!(matches!(&greet.params[1].ty, Type::Pointer { to_char: false, .. }));
    let typed = signature(module, "typed");
    assert!(matches!(&typed.params[0].ty, Type::Int { size_bytes: 4, signed: false, .. }));
    assert!(signature(module, "format").variadic);
}

#[test]
fn rust_signatures() {
    let source = r#"
        #[unsafe(no_mangle)] #[inline(never)]
        pub fn scalars(a: i32, b: u64, c: f64, d: bool) -> u64 { a as u64 + b + c as u64 + d as u64 }
        #[unsafe(no_mangle)] #[inline(never)]
        pub fn text(s: &str, t: &[u32], n: usize) -> usize { s.len() + t.len() + n }
        #[unsafe(no_mangle)] #[inline(never)]
        pub fn owned(s: String, n: usize) -> usize { s.len() + n }
        #[unsafe(no_mangle)] #[inline(never)]
        pub fn made(n: usize) -> Vec<u8> { vec![0; n] }
    "#;
    let flags = ["--crate-type=cdylib", "-g", "--edition=2024", "-Cpanic=abort", "-Copt-level=1"];
    let Some(bytes) = compile("rust", "rustc", source, &flags) else { return };
    let module = Module::parse(&bytes, None).unwrap();
    use ArgWord::{Gpr, Xmm};
    let scalars = signature(&module, "scalars");
    assert_eq!(scalars.arg_words().collect::<Vec<_>>(), [Gpr(0), Gpr(1), Xmm(0), Gpr(2)]);
    let text = signature(&module, "text");
    assert_eq!(text.arg_words().collect::<Vec<_>>(), [0, 1, 2, 3, 4].map(Gpr));
    assert_eq!(text.params[0].words.len(), 2);
    // By address, and into memory that the caller provides.
    let owned = signature(&module, "owned");
    assert_eq!(owned.arg_words().collect::<Vec<_>>(), [Gpr(0), Gpr(1)]);
    let made = signature(&module, "made");
    assert_eq!(made.arg_words().collect::<Vec<_>>(), [Gpr(1)]);
    assert_eq!(made.ret.words, [RetWord::Rax]);
}

/// clang has wide vectors of variadic functions in memory even with AVX, gcc does not.
#[test]
fn wide_vectors_of_variadic_functions() {
    let source = "
        #include <stdarg.h>
        typedef int v8i __attribute__((vector_size(32)));
        v8i kept;
        v8i dots(long n, v8i v, ...) { va_list l; va_start(l, v); kept = v; long x = va_arg(l, long); va_end(l); return v + (int)(x + n); }
    ";
    use ArgWord::{Gpr, Stack, Xmm, XmmWord};
    for compiler in ["gcc", "clang"] {
        let name = format!("dots{compiler}");
        let Some(bytes) = compile(&name, compiler, source, &["-O1", "-g", "-mavx"]) else {
            continue;
        };
        let signature = signature(&Module::parse(&bytes, None).unwrap(), "dots");
        let upper = |word| XmmWord { reg: 0, word };
        let expect = match compiler {
            "gcc" => vec![Gpr(0), Xmm(0), upper(1), upper(2), upper(3)],
            _ => vec![Gpr(0), Stack(0), Stack(1), Stack(2), Stack(3)],
        };
        assert_eq!(signature.arg_words().collect::<Vec<_>>(), expect, "{compiler}");
        assert_eq!(signature.stack_align_bytes, if compiler == "gcc" { 16 } else { 32 });
        assert_eq!(signature.ret.words.len(), 4, "{compiler}");
    }
}

/// Functions that nobody but this module calls: compilers take out parameters that are not
/// used or always the same, replace a pointer by what it points to, and drop results.
const CHANGED: &str = "
    struct S { long a, b, c; };
    volatile long sink;
    #define LOCAL static __attribute__((noinline))
    LOCAL int inner(int unused, int a, int b) { sink = b; return a * b + 1; }
    LOCAL long pointed(struct S *p, long k) { sink = k; return p->b * k; }
    LOCAL long dropped(long a, long b) { sink = a; sink = b; return a * 77; }
    LOCAL long mode(long a, long mode, double d) { sink = a; if (mode == 3) sink = d; else sink = 7; return a * 3 + mode; }
    LOCAL long by_value(struct S s, long k) { sink = s.b + k; return s.c; }
    LOCAL long eight(long a, long b, long c, long d, long e, long f, long u, long g) { sink = a + g; sink = b + c + d + e + f; return g; }
    LOCAL double floats(float x, int unused, double y) { sink = x; return y * 2; }
    int outer(int x, struct S *s) {
        dropped(x, 3);
        return inner(7, x, 3) + inner(8, x + 1, x) + pointed(s, x) + pointed(s, x + 1) + mode(x, 3, 1.0) + mode(x + 1, 3, 2.0)
            + by_value(*s, 4) + eight(1, 2, 3, 4, 5, x, 7, 8) + eight(x, 2, 3, 4, 5, 6, 8, 9) + floats(x, 3, 2.0) + floats(2.0, 5, x);
    }
    int outer2(int x, struct S *s) { dropped(x, x + 1); return inner(9, x, 3) + by_value(*s, x) + floats(1.0, 7, 3.0); }
";

/// The words of each parameter; `None` for one that is optimized out.
fn placed(signature: &Signature) -> Vec<Option<Vec<ArgWord>>> {
    let words = |param: &Param| match &param.absent {
        None => Some(param.words.clone()),
        Some(absent) => {
            assert_eq!((absent, param.words.len()), (&Absent::OptimizedOut, 0));
            None
        }
    };
    signature.params.iter().map(words).collect()
}

#[test]
fn changed_functions_are_told_by_dwarf_alone() {
    use ArgWord::{Gpr, Stack, Xmm};
    let at = |word: ArgWord| Some(vec![word]);
    for compiler in ["gcc", "clang", "clang-19"] {
        let name = format!("changed{compiler}");
        let Some(bytes) = compile(&name, compiler, CHANGED, &["-O2", "-g"]) else { continue };
        let module = Module::parse(&bytes, None).unwrap();
        let of = |name: &str| {
            let is_it = |f: &&Function| f.name.split('.').next() == Some(name);
            let found = module.functions().iter().find(is_it);
            module.signature(found.unwrap_or_else(|| panic!("{compiler} has no {name}")))
        };
        assert_eq!(placed(&of("inner")), [None, at(Gpr(0)), at(Gpr(1))], "{compiler}");
        assert_eq!(placed(&of("mode")), [at(Gpr(0)), None, at(Xmm(0))], "{compiler}");
        assert_eq!(placed(&of("floats")), [at(Xmm(0)), None, at(Xmm(1))], "{compiler}");
        let (first, third) = (at(Gpr(0)), at(Gpr(2)));
        let expect = [first.clone(), None, None, None, None, at(Gpr(1)), None, third.clone()];
        assert_eq!(placed(&of("eight")), expect, "{compiler}");
        let dropped = of("dropped");
        assert_eq!(placed(&dropped), [at(Gpr(0)), at(Gpr(1))], "{compiler}");
        assert_eq!(dropped.ret.absent, Some(Absent::MayBeDropped), "{compiler}");
        assert!(dropped.ret.words.is_empty(), "{compiler}");
        // gcc passes members where clang goes on passing the struct and the pointer.
        let (by_value, pointed) = (placed(&of("by_value")), placed(&of("pointed")));
        if compiler == "gcc" {
            assert_eq!(by_value, [None, third]);
            assert_eq!(pointed, [None, at(Gpr(1))]);
            assert_eq!(of("mode").ret.words, [RetWord::Rax], "only its parameters have changed");
        } else {
            assert_eq!(by_value, [Some([0, 1, 2].map(Stack).to_vec()), first.clone()]);
            assert_eq!(pointed, [first, at(Gpr(1))]);
        }
        let text = of("inner").declaration("inner");
        assert!(text.contains("int unused /* optimized out */"), "{text}");
        let text = dropped.declaration("dropped").replace("long int", "long");
        assert!(text.starts_with("long /* the compiler may have dropped it */ dropped("), "{text}");
        assert_eq!(of("inner").stack_words, StackWords::Proved(0), "{compiler}");
    }
}

/// With line tables only, every function looks as if it took nothing.
#[test]
fn line_tables_are_no_signatures() {
    let source =
        "long seven(long a, long b, long c, long d, long e, long f, long g) { return a + g; }
        void none(void) {}";
    for (compiler, flag) in [("gcc", "-g1"), ("clang", "-gline-tables-only"), ("clang", "-g1")] {
        let name = format!("lines{compiler}{flag}");
        let Some(bytes) = compile(&name, compiler, source, &[flag, "-O1"]) else { continue };
        let module = Module::parse(&bytes, None).unwrap();
        let seven = signature(&module, "seven");
        assert_eq!(seven.source, SignatureSource::Guessed, "{name}");
        assert_eq!(seven.stack_words, StackWords::Proved(1), "{name}");
        assert_eq!(signature(&module, "none").source, SignatureSource::Guessed, "{name}");
    }
}

#[test]
fn separate_debug_files_and_symbols_from_dwarf() {
    let directory = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let source = "static __attribute__((noinline)) int hidden(int a) { return a + 1; } int add(int a) { return hidden(a); }";
    let whole = gcc("split", source, &["-g", "-O2"]);
    let path = directory.join(format!("whole-{}", std::process::id()));
    std::fs::write(&path, &whole).unwrap();
    let run = |args: &[&str]| {
        let out = path.with_extension("out");
        let done = std::process::Command::new("objcopy").args(args).arg(&path).arg(&out).status();
        assert!(done.unwrap().success());
        let bytes = std::fs::read(&out).unwrap();
        std::fs::remove_file(&out).unwrap();
        bytes
    };
    let (stripped, debug) = (run(&["--strip-all"]), run(&["--only-keep-debug"]));
    let compressed = run(&["--compress-debug-sections=zlib"]);
    let no_symbols = run(&["--strip-all", "--keep-section=.debug_*"]);
    std::fs::remove_file(&path).unwrap();

    let module = Module::parse(&stripped, None).unwrap();
    assert!(!module.functions().iter().any(|f| f.name == "hidden"));
    assert_eq!(signature(&module, "add").source, SignatureSource::Guessed);
    let module = Module::parse(&stripped, Some(&debug)).unwrap();
    assert_eq!(signature(&module, "hidden").declaration("hidden"), "int hidden(int a)");
    assert!(module.site(function(&module, "hidden")).is_ok());
    let module = Module::parse(&compressed, None).unwrap();
    assert_eq!(signature(&module, "add").declaration("add"), "int add(int a)");
    let module = Module::parse(&no_symbols, None).unwrap();
    assert!(module.functions().iter().any(|f| f.name == "hidden"));
    assert!(module.site(function(&module, "hidden")).is_ok());
}

#[test]
fn what_uses_its_return_address_is_told() {
    let source = r#"
        void *reads(void) { return __builtin_return_address(0); }
        long plain(long a, long b) { return a + b; }
        long frame(long n) { volatile long x[8] = { n }; return x[n & 7]; }
        long seventh(long a, long b, long c, long d, long e, long f, long g) { return g; }
        void *hop(long n) { return reads(); }
        __asm__(
            ".globl pops\n.type pops, @function\n"
            "pops: .cfi_startproc\n"
            "pop %rdi\n.cfi_adjust_cfa_offset -8\n.cfi_register rip, rdi\n"
            "mov $39, %eax\nsyscall\n"
            "push %rdi\n.cfi_adjust_cfa_offset 8\n"
            "ret\n.cfi_endproc\n.size pops, . - pops\n");
    "#;
    for flags in [["-O2", "-fno-inline"], ["-O0", "-fcf-protection"]] {
        let name = format!("return_address{}", flags[0]);
        let bytes = gcc(&name, source, &flags);
        let module = Module::parse(&bytes, None).unwrap();
        let uses = |name: &str| module.uses_return_address(function(&module, name));
        assert!(uses("reads") && uses("pops"), "{flags:?}");
        assert!(!uses("plain") && !uses("frame") && !uses("seventh"), "{flags:?}");
        if flags[0] == "-O0" {
            assert!(!uses("hop"), "it calls, and what it calls returns into it");
        }
    }
}

#[test]
fn what_never_returns_is_told() {
    let source = r#"
        void abort(void) __attribute__((noreturn));
        int plain(int a) { return a; }
        int may(int a) { if (a) abort(); return 1; }
        void dies(void) { abort(); }
        void loops(volatile int *a) { for (;;) *a += 1; }
        void hop(void) { dies(); }
        int through(int (*f)(int)) { return f(1); }
        void hidden(int a) { if (a) plain(a); abort(); }
    "#;
    for flags in [["-O2", "-fno-inline"], ["-O0", "-fcf-protection"]] {
        let name = format!("never_returns{}", flags[0]);
        let bytes = gcc(&name, source, &flags);
        let module = Module::parse(&bytes, None).unwrap();
        let never = |name: &str| module.never_returns(function(&module, name));
        assert!(never("dies") && never("loops") && never("hidden"), "{flags:?}");
        assert!(!never("plain") && !never("may") && !never("through"), "{flags:?}");
    }
}

#[test]
fn stack_words_are_read_from_code() {
    let source = r#"
        #include <stdarg.h>
        long ext(long *);
        long six(long a, long b, long c, long d, long e, long f) { return a + f; }
        long eight(long a, long b, long c, long d, long e, long f, long g, long h) { return g + h; }
        long buffer(long n) { long x[8] = { n }; ext(x); return x[0]; }
        long address(long a, long b, long c, long d, long e, long f, long g) { return ext(&g); }
        long tail(long a, long b, long c, long d, long e, long f, long g, long h) { return eight(a, b, c, d, e, f, g, h); }
        long pointer(long (*f)(long), long x) { return f(x); }
        long dots(long n, ...) { va_list l; va_start(l, n); long x = va_arg(l, long); va_end(l); return x; }
        long sized(long n) { long x[n]; ext(x); return x[0]; }
        __attribute__((noinline)) long ext(long *p) { return *p; }
    "#;
    use StackWords::{Proved, Unknown};
    for flags in [
        ["-O1", "-fomit-frame-pointer", "-fvisibility=hidden"],
        ["-O2", "-fno-omit-frame-pointer", "-fvisibility=hidden"],
        ["-O0", "-fcf-protection", "-fvisibility=hidden"],
    ] {
        let name = format!("words{}", flags[0]);
        let bytes = gcc(&name, source, &flags);
        let module = Module::parse(&bytes, None).unwrap();
        let proof = |name: &str| module.stack_words_proof(function(&module, name));
        assert_eq!(proof("six"), Proved(0), "{flags:?}");
        assert_eq!(proof("eight"), Proved(2), "{flags:?}");
        assert_eq!(proof("buffer"), Proved(0), "{flags:?}");
        assert_eq!(proof("address"), Unknown, "{flags:?}");
        assert_eq!(proof("tail"), Proved(2), "{flags:?}");
        assert_eq!(proof("dots"), Unknown, "{flags:?}");
        // At -O2 it ends in a jump, and what that reaches nobody knows.
        let pointer = if flags[0] == "-O2" { Unknown } else { Proved(0) };
        assert_eq!(proof("pointer"), pointer, "{flags:?}");
        assert!(matches!(proof("sized"), Proved(0) | Unknown), "{flags:?}");
    }
}

/// Parameter types: C spelling, and the member that holds each of its words.
const TYPES: [(&str, &[&str]); 17] = [
    ("char", &[""]),
    ("short", &[""]),
    ("int", &[""]),
    ("long", &[""]),
    ("void *", &[""]),
    ("float", &[""]),
    ("double", &[""]),
    ("struct ll", &[".a", ".b"]),
    ("struct ld", &[".a", ".b"]),
    ("struct dl", &[".a", ".b"]),
    ("struct dd", &[".a", ".b"]),
    ("struct l", &[".a"]),
    ("struct d", &[".a"]),
    ("struct lll", &[".a", ".b", ".c"]),
    ("struct u", &[".a"]),
    ("struct arr", &[".a[0]", ".a[1]"]),
    ("_Bool", &[""]),
];

const PRELUDE: &str = "
    struct ll { long a, b; }; struct ld { long a; double b; }; struct dl { double a; long b; };
    struct dd { double a, b; }; struct l { long a; }; struct d { double a; };
    struct lll { long a, b, c; }; struct u { union { double x; long a; }; }; struct arr { double a[2]; };
";

#[test]
fn words_are_where_gcc_reads_them() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = |n: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 33).unwrap() % n
    };
    let mut source = PRELUDE.to_owned();
    let mut checks = Vec::new();
    for f in 0..48 {
        let types: Vec<usize> = (0..1 + random(11)).map(|_| random(TYPES.len())).collect();
        let list: Vec<String> =
            types.iter().enumerate().map(|(i, t)| format!("{} p{i}", TYPES[*t].0)).collect();
        let list = list.join(", ");
        for (p, t) in types.iter().enumerate() {
            for (w, member) in TYPES[*t].1.iter().enumerate() {
                let name = format!("f{f}_{p}_{w}");
                writeln!(source, "volatile __typeof__((({}){{0}}){member}) s_{name};", TYPES[*t].0)
                    .unwrap();
                writeln!(source, "void {name}({list}) {{ s_{name} = p{p}{member}; }}").unwrap();
                checks.push((name, p, w));
            }
        }
    }
    let bytes =
        gcc("places", &source, &["-O2", "-g", "-fvisibility=hidden", "-fcf-protection=none", "-w"]);
    let module = Module::parse(&bytes, None).unwrap();
    assert!(checks.len() > 200);
    for (name, param, word) in checks {
        let signature = signature(&module, &name);
        assert_eq!(signature.source, SignatureSource::Dwarf, "{name}");
        let read = place_read(&module, &name);
        let stated = signature.params[param].words[word];
        assert_eq!(stated, read, "{}", signature.declaration(&name));
        let StackWords::Known(n) = signature.stack_words else { panic!() };
        let proof = module.stack_words_proof(function(&module, &name));
        let StackWords::Proved(read) = proof else { panic!("{name}: {proof:?}") };
        assert!(read <= n, "{name}: {read} read of {n}");
    }
}

/// What the function's store stores.
fn place_read(module: &Module<'_>, name: &str) -> ArgWord {
    let address = function(module, name).address;
    let code = module.bytes_from(address).unwrap();
    let decoder =
        Decoder::with_ip(64, &code[..64.min(code.len())], address.0, DecoderOptions::NONE);
    let gprs =
        [Register::RDI, Register::RSI, Register::RDX, Register::RCX, Register::R8, Register::R9];
    for instruction in decoder {
        assert_ne!(instruction.mnemonic(), Mnemonic::Ret, "{name}");
        let reads_memory = instruction.op1_kind() == OpKind::Memory;
        if reads_memory && instruction.memory_base() == Register::RSP {
            let word = (instruction.memory_displacement64() - 8) / 8;
            return ArgWord::Stack(word.try_into().unwrap());
        }
        if instruction.op0_kind() == OpKind::Memory && instruction.op1_kind() == OpKind::Register {
            let from = instruction.op1_register();
            if from.is_xmm() {
                return ArgWord::Xmm(u8::try_from(from.number()).unwrap());
            }
            let from = from.full_register();
            return ArgWord::Gpr(gprs.iter().position(|r| *r == from).unwrap().try_into().unwrap());
        }
        // gcc moves a union's double through an integer register, and the reverse.
        if instruction.op0_kind() == OpKind::Register && instruction.op1_kind() == OpKind::Register
        {
            let from = instruction.op1_register();
            if from.is_xmm() && instruction.op0_register().is_gpr() {
                return ArgWord::Xmm(u8::try_from(from.number()).unwrap());
            }
        }
    }
    panic!("{name} stores nothing")
}
