//! Signatures against callers: for every parameter list, a caller that gcc or clang compiled
//! passes known bytes to a function that keeps all registers and the stack, and each word of
//! the signature has to hold the bytes that belong there. Results likewise.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compiled;

use std::fmt::Write as _;

use compiled::{Said, function, parse_said, run_program};
use flea_symbols::Module;
use flea_symbols::signature::{Absent, ArgWord, RetWord, Signature, SignatureSource, Unclassified};

const HARNESS: &str = include_str!("passing/harness.h");

/// A type: its spelling, and the expressions that are its members (those that cannot be
/// written through memory are set to all ones by an assignment).
struct Kind {
    spelling: &'static str,
    members: &'static [&'static str],
    /// `long double` and the like: how many bytes of each member have a value.
    value_bytes: usize,
}

const fn kind(spelling: &'static str, members: &'static [&'static str]) -> Kind {
    Kind { spelling, members, value_bytes: usize::MAX }
}

const PRELUDE: &str = "
    typedef void *pointer; typedef float v8 __attribute__((vector_size(8)));
    typedef float v16 __attribute__((vector_size(16)));
    typedef double v32 __attribute__((vector_size(32)));
    typedef int v64 __attribute__((vector_size(64)));
    typedef char v4c __attribute__((vector_size(4)));
    typedef long v1l __attribute__((vector_size(8)));
    struct ll { long a, b; }; struct ld { long a; double b; }; struct dl { double a; long b; };
    struct dd { double a, b; }; struct ff { float a, b; }; struct fff { float a, b, c; };
    struct ifl { int a; float b; }; struct fd { float a; double b; }; struct cl { char a; long b; };
    struct c3 { char a[3]; }; struct c9 { char a[9]; }; struct c16 { char a[16]; };
    struct lll { long a, b, c; }; struct deep { struct { struct ff x; } y; struct ifl z; };
    struct ldb { long double a; }; union dul { double a; long b; }; union ldu { long double a; int b; };
    union fv { v16 a; float b[4]; }; union vv { v16 a; v8 b; };
    struct s16 { v16 a; }; struct s32 { v32 a; }; struct s64 { v64 a; }; struct s32a { v32 a[1]; };
    struct v2 { v16 a, b; }; union u32v { v32 a; double b[4]; }; struct wrap64 { struct s64 a; };
    struct cf { float a; float _Complex b; }; struct cd { double _Complex a; };
    struct __attribute__((packed)) pk { char a; int b; }; struct __attribute__((packed)) pk2 { short a; char b; short c; };
    struct bf { unsigned a : 3; unsigned long b : 40; unsigned c; };
    struct __attribute__((packed)) bfp { unsigned char a; unsigned long b : 61; unsigned c : 19; };
    struct bfd { unsigned a : 9; double b; };
    struct al16 { _Alignas(16) long a; }; struct al32 { _Alignas(32) long a; }; struct al64 { _Alignas(64) long a[3]; };
    struct i128 { __int128 a; }; struct e { }; struct fx { long a; char x[]; }; struct z { float a; long x[0]; };
    struct q { __float128 a; }; struct arr { float a[3]; }; struct p { char *a; int *b; };
    enum color { RED = 1, BLUE = 70000 };
";

const KINDS: &[Kind] = &[
    kind("char", &[""]),
    kind("unsigned short", &[""]),
    kind("int", &[""]),
    kind("enum color", &[""]),
    kind("long", &[""]),
    kind("pointer", &[""]),
    kind("float", &[""]),
    kind("double", &[""]),
    kind("__int128", &[""]),
    kind("__float128", &[""]),
    kind("float _Complex", &[""]),
    kind("double _Complex", &[""]),
    Kind { spelling: "long double", members: &[""], value_bytes: 10 },
    Kind { spelling: "long double _Complex", members: &["@0", "@16"], value_bytes: 10 },
    kind("v4c", &[""]),
    kind("v1l", &[""]),
    kind("v8", &[""]),
    kind("v16", &[""]),
    kind("v32", &[""]),
    kind("v64", &[""]),
    kind("struct ll", &[".a", ".b"]),
    kind("struct ld", &[".a", ".b"]),
    kind("struct dl", &[".a", ".b"]),
    kind("struct dd", &[".a", ".b"]),
    kind("struct ff", &[".a", ".b"]),
    kind("struct fff", &[".a", ".b", ".c"]),
    kind("struct ifl", &[".a", ".b"]),
    kind("struct fd", &[".a", ".b"]),
    kind("struct cl", &[".a", ".b"]),
    kind("struct c3", &[".a"]),
    kind("struct c9", &[".a"]),
    kind("struct c16", &[".a"]),
    kind("struct lll", &[".a", ".b", ".c"]),
    kind("struct deep", &[".y", ".z"]),
    Kind { spelling: "struct ldb", members: &[".a"], value_bytes: 10 },
    kind("union dul", &[".a"]),
    kind("union ldu", &[".b"]),
    kind("union fv", &[".a"]),
    kind("union vv", &[".a"]),
    kind("struct s16", &[".a"]),
    kind("struct s32", &[".a"]),
    kind("struct s64", &[".a"]),
    kind("struct s32a", &[".a"]),
    kind("struct v2", &[".a", ".b"]),
    kind("union u32v", &[".a"]),
    kind("struct wrap64", &[".a"]),
    kind("struct cf", &[".a", ".b"]),
    kind("struct cd", &[".a"]),
    kind("struct pk", &[".a", ".b"]),
    kind("struct pk2", &[".a", ".b", ".c"]),
    kind("struct bf", &["=a", "=b", "=c"]),
    kind("struct bfp", &[".a", "=b", "=c"]),
    kind("struct bfd", &["=a", ".b"]),
    kind("struct al16", &[".a"]),
    kind("struct al32", &[".a"]),
    kind("struct al64", &[".a"]),
    kind("struct i128", &[".a"]),
    kind("struct e", &[]),
    kind("struct fx", &[".a"]),
    kind("struct z", &[".a"]),
    kind("struct q", &[".a"]),
    kind("struct arr", &[".a"]),
    kind("struct p", &[".a", ".b"]),
];

/// xorshift: the same lists every time.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % n
    }
}

/// Statements that fill `v` with bytes and `m` with a mask of those that have a value.
fn fill(kind: &Kind) -> String {
    let mut text = String::from("memset(&v, 0, sizeof v); memset(&m, 0, sizeof m);");
    for member in kind.members {
        if let Some(field) = member.strip_prefix('=') {
            write!(text, "v.{field} = 0x5a5a5a5a5a5a5a5a; m.{field} = -1;").unwrap();
            continue;
        }
        let (at, size) = match member.strip_prefix('@') {
            Some(offset) => (format!("(char *)&%+{offset}"), "16".to_owned()),
            None => (format!("(char *)&%{member}"), format!("sizeof v{member}")),
        };
        let n = kind.value_bytes;
        let size = if n == usize::MAX { size } else { n.to_string() };
        write!(text, "fill({}, {size});", at.replace('%', "v")).unwrap();
        write!(text, "memset({}, 255, {size});", at.replace('%', "m")).unwrap();
    }
    text
}

/// A program with `n` functions of random parameter lists, and a function per type that
/// returns it.
fn program(n: usize, seed: u64) -> (String, Vec<Vec<usize>>) {
    let mut random = Random(seed);
    let mut source = format!("{HARNESS}\n{PRELUDE}\n");
    let mut main = String::new();
    let mut lists = Vec::new();
    for (t, kind) in KINDS.iter().enumerate() {
        let ty = kind.spelling;
        writeln!(source, "static {ty} r{t}_v, r{t}_m; {ty} r{t}(void) {{ return r{t}_v; }}")
            .unwrap();
        writeln!(main, "returned{t}();").unwrap();
        writeln!(
            source,
            "static __attribute__((noinline)) void returned{t}(void) {{ {ty} v, m; {} r{t}_v = v; hex(\"value\", \"r{t}\", 0, &v, sizeof v); hex(\"mask\", \"r{t}\", 0, &m, sizeof m);
              spied = (void (*)(void))r{t}; ((void (*)(void *))spy)(area); hex(\"behind\", \"r{t}\", 0, area, sizeof v); {{ void *at = area; hex(\"area\", \"r{t}\", 0, &at, 8); }} report_result(\"r{t}\"); }}",
            fill(kind)
        )
        .unwrap();
    }
    for f in 0..n {
        let list: Vec<usize> =
            (0..1 + random.below(9)).map(|_| random.below(KINDS.len())).collect();
        let result =
            if random.below(3) == 0 { KINDS[random.below(KINDS.len())].spelling } else { "void" };
        let named: Vec<String> =
            list.iter().enumerate().map(|(i, t)| format!("{} p{i}", KINDS[*t].spelling)).collect();
        let types: Vec<&str> = list.iter().map(|t| KINDS[*t].spelling).collect();
        let keep: String = (0..list.len())
            .map(|i| format!("__asm__ volatile(\"\" : : \"r\"(&p{i}) : \"memory\");"))
            .collect();
        let back =
            if result == "void" { String::new() } else { format!("static {result} r; return r;") };
        writeln!(source, "{result} f{f}({}) {{ {keep} {back} }}", named.join(", ")).unwrap();
        let mut call = format!("static __attribute__((noinline)) void call{f}(void) {{");
        let mut args = Vec::new();
        for (i, t) in list.iter().enumerate() {
            let ty = KINDS[*t].spelling;
            write!(call, "{ty} a{i}; {{ {ty} v, m; {} a{i} = v; hex(\"value\", \"f{f}\", {i}, &v, sizeof v); hex(\"mask\", \"f{f}\", {i}, &m, sizeof m); }}", fill(&KINDS[*t])).unwrap();
            args.push(format!("a{i}"));
        }
        writeln!(main, "call{f}();").unwrap();
        writeln!(
            source,
            "{call} (({result} (*)({}))grab)({}); report(\"f{f}\"); }}",
            types.join(", "),
            args.join(", ")
        )
        .unwrap();
        lists.push(list);
    }
    writeln!(source, "int main(void) {{\n{main}\nreturn 0; }}").unwrap();
    (source, lists)
}

fn get<'s>(said: &'s Said, what: &str, name: &str, index: usize) -> &'s [u8] {
    let key = (what.to_owned(), name.to_owned(), index);
    said.get(&key).unwrap_or_else(|| panic!("the program said nothing of {key:?}"))
}

fn word_bytes<'s>(said: &'s Said, name: &str, word: ArgWord) -> &'s [u8] {
    let upper =
        |reg: u8, word: u8| &get(said, "xmm", name, reg.into())[8 * usize::from(word)..][..8];
    match word {
        ArgWord::Gpr(i) => get(said, "gpr", name, i.into()),
        ArgWord::Xmm(i) => upper(i, 0),
        ArgWord::XmmWord { reg, word } => upper(reg, word),
        ArgWord::Stack(i) => get(said, "stack", name, usize::try_from(i).unwrap()),
    }
}

/// Whether the words hold what was passed.
fn check_words(held: &[&[u8]], value: &[u8], mask: &[u8], what: &str) {
    assert!(
        held.len() * 8 >= value.len(),
        "{what}: {} words for {} bytes",
        held.len(),
        value.len()
    );
    for (i, (value, mask)) in value.iter().zip(mask).enumerate() {
        let byte = held[i / 8][i % 8];
        assert_eq!(byte & mask, value & mask, "{what}: byte {i}");
    }
}

fn check_params(said: &Said, name: &str, signature: &Signature) -> usize {
    let text = signature.declaration(name);
    for (i, param) in signature.params.iter().enumerate() {
        assert_eq!(param.absent, None, "{text}: parameter {i}");
        let (value, mask) = (get(said, "value", name, i), get(said, "mask", name, i));
        let held: Vec<&[u8]> =
            param.words.iter().map(|word| word_bytes(said, name, *word)).collect();
        if mask.iter().any(|byte| *byte != 0) {
            let what = format!("{text}: parameter {i} in {:?}", param.words);
            // Of `struct { _Alignas(16) long a; }` only the first half is in a register.
            let value =
                if held.len() * 8 < value.len() && mask[8 * held.len()..].iter().all(|m| *m == 0) {
                    &value[..8 * held.len()]
                } else {
                    value
                };
            check_words(&held, value, mask, &what);
        }
    }
    let area = u64::from_le_bytes(get(said, "area", name, 0).try_into().unwrap());
    assert_eq!(area % u64::from(signature.stack_align_bytes), 0, "{text}");
    signature.params.len()
}

fn check_result(said: &Said, name: &str, signature: &Signature) {
    let text = signature.declaration(name);
    assert_eq!(signature.ret.absent, None, "{text}");
    let (value, mask) = (get(said, "value", name, 0), get(said, "mask", name, 0));
    let vector =
        |reg: u8, word: u8| &get(said, "vector", name, reg.into())[8 * usize::from(word)..][..8];
    let held: Vec<&[u8]> = signature
        .ret
        .words
        .iter()
        .map(|word| match *word {
            RetWord::Rax => get(said, "rax", name, 0),
            RetWord::Rdx => get(said, "rax", name, 1),
            RetWord::Xmm0 => vector(0, 0),
            RetWord::Xmm1 => vector(1, 0),
            RetWord::XmmWord { reg, word } => vector(reg, word),
            RetWord::X87 { reg, word } => {
                &get(said, "x87", name, reg.into())[8 * usize::from(word)..][..8]
            }
        })
        .collect();
    let what = format!("{text}: result in {:?}", signature.ret.words);
    if mask.iter().all(|byte| *byte == 0) {
        return;
    }
    let size = value.len();
    let is_area = get(said, "rax", name, 0) == get(said, "area", name, 0);
    if signature.ret.words == [RetWord::Rax] && is_area {
        check_words(
            &get(said, "behind", name, 0)
                .chunks(8)
                .map(pad)
                .collect::<Vec<_>>()
                .iter()
                .map(|c| c.as_slice())
                .collect::<Vec<_>>(),
            value,
            mask,
            &what,
        );
        return;
    }
    let kept = value.len().min(held.len() * 8);
    assert!(mask[kept..].iter().all(|m| *m == 0), "{what}: {size} bytes");
    check_words(&held, &value[..kept], mask, &what);
}

fn pad(chunk: &[u8]) -> [u8; 8] {
    let mut word = [0; 8];
    word[..chunk.len()].copy_from_slice(chunk);
    word
}

fn check_c(compiler: &str, flags: &[&str], seed: u64) {
    if flags.iter().any(|f| f.starts_with("-mavx512")) && !std::is_x86_feature_detected!("avx512f")
        || flags.iter().any(|f| f.starts_with("-mavx")) && !std::is_x86_feature_detected!("avx")
    {
        eprintln!("skipped {compiler} {flags:?}: this processor has no such registers");
        return;
    }
    let (source, lists) = program(24, seed);
    let name = format!("passing{compiler}{}", flags.join(""));
    let mut all = vec!["-g", "-w", "-no-pie", "-fcf-protection=none"];
    all.extend(flags);
    let Some((bytes, output)) = run_program(&name, compiler, &source, &all) else { return };
    let said = parse_said(&output);
    let module = Module::parse(&bytes, None).unwrap();
    let mut n_checked = 0;
    for (f, list) in lists.iter().enumerate() {
        let name = format!("f{f}");
        let signature = module.signature(function(&module, &name));
        assert_eq!(
            signature.source,
            SignatureSource::Dwarf,
            "{compiler} {flags:?} {name}: {:?}",
            signature.doubt
        );
        assert_eq!(signature.params.len(), list.len());
        n_checked += check_params(&said, &name, &signature);
    }
    assert!(n_checked > 60, "{n_checked} parameters");
    for (t, kind) in KINDS.iter().enumerate() {
        let name = format!("r{t}");
        let signature = module.signature(function(&module, &name));
        // clang without AVX returns 64 bytes in four registers, of which two are not read.
        let too_large = Some(Absent::Unclassified(Unclassified::TooLarge));
        let is_clang_without_avx = compiler == "clang" && flags.len() == 1;
        if is_clang_without_avx && kind.spelling == "v64" {
            assert_eq!(signature.ret.absent, too_large);
            continue;
        }
        assert_eq!(
            signature.source,
            SignatureSource::Dwarf,
            "{compiler} {flags:?} {}: {:?}",
            kind.spelling,
            signature.doubt
        );
        check_result(&said, &name, &signature);
    }
}

#[test]
fn gcc_without_avx() {
    check_c("gcc", &["-O0"], 0x1234_5678_9abc_def1);
    check_c("gcc", &["-O2"], 0x1234_5678_9abc_def2);
}

#[test]
fn gcc_with_avx() {
    check_c("gcc", &["-O0", "-mavx"], 0x1234_5678_9abc_def3);
    check_c("gcc", &["-O2", "-mavx512f"], 0x1234_5678_9abc_def4);
}

#[test]
fn clang_without_avx() {
    check_c("clang", &["-O0"], 0x1234_5678_9abc_def5);
    check_c("clang", &["-O2"], 0x1234_5678_9abc_def6);
}

#[test]
fn clang_with_avx() {
    check_c("clang", &["-O1", "-mavx"], 0x1234_5678_9abc_def7);
    check_c("clang", &["-O0", "-mavx512f"], 0x1234_5678_9abc_def8);
}
