//! Signatures from BTF: the same as from DWARF, as far as BTF describes a type, and no wrong
//! word where it does not.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "btf/builder.rs"]
mod builder;
mod compiled;

use std::path::PathBuf;

use builder::{Builder, GLOBAL, STATIC};
use compiled::{compile, function, gcc};
use flea_symbols::Module;
use flea_symbols::signature::{
    Absent, ArgWord, Choice, Doubt, Signature, SignatureSource, StackWords, Type, Unclassified,
};
use proptest::prelude::*;

const SHAPES: &str = include_str!("btf/shapes.c");

fn signature(module: &Module<'_>, name: &str) -> Signature {
    module.signature(function(module, name))
}

/// The functions of `shapes.c` before the line BEYOND, and those behind it.
fn names() -> (Vec<&'static str>, Vec<&'static str>) {
    let names = |text: &'static str| -> Vec<&'static str> {
        let functions = text.lines().filter(|line| line.ends_with('}') && line.contains(") {"));
        let name = |line: &'static str| {
            line.split_once('(').map(|(before, _)| before)?.rsplit([' ', '*']).next()
        };
        let attribute = |line: &&str| !line.starts_with("static");
        functions.filter(attribute).filter_map(name).collect()
    };
    let (plain, beyond) = SHAPES.split_once("#ifdef BEYOND").unwrap();
    let (plain, beyond) = (names(plain), names(beyond));
    assert!(plain.len() > 40 && beyond.len() == 9, "{plain:?} {beyond:?}");
    (plain, beyond)
}

/// What may differ: where it is from, and that the stack is aligned to what it may have to be.
fn comparable(signature: Signature) -> Signature {
    Signature { source: SignatureSource::Dwarf, stack_align_bytes: 16, ..signature }
}

#[test]
fn as_from_dwarf() {
    let (plain, _) = names();
    for level in ["-O0", "-O1", "-O2"] {
        let flags = |debug| [debug, level, "-w"];
        let btf = gcc(&format!("btf{level}"), SHAPES, &flags("-gbtf"));
        let dwarf = gcc(&format!("dwarf{level}"), SHAPES, &flags("-g"));
        let (btf, dwarf) =
            (Module::parse(&btf, None).unwrap(), Module::parse(&dwarf, None).unwrap());
        for name in &plain {
            let (found, expect) = (signature(&btf, name), signature(&dwarf, name));
            assert_eq!(found.source, SignatureSource::Btf, "{level} {name}: {:?}", found.doubt);
            assert_eq!(expect.source, SignatureSource::Dwarf, "{level} {name}");
            assert!(found.stack_align_bytes >= expect.stack_align_bytes, "{level} {name}");
            let (f, e) = (comparable(found), comparable(expect));
            if f != e {
                eprintln!("{level} {name}:\n  {f:?}\n  {e:?}");
            }
        }
    }
}

/// Every word that is told is one that DWARF tells.
#[test]
fn no_wrong_word_of_what_is_beyond_btf() {
    let (_, beyond) = names();
    for level in ["-O0", "-O2"] {
        let flags = |debug| [debug, level, "-w", "-DBEYOND"];
        let btf = gcc(&format!("beyond{level}"), SHAPES, &flags("-gbtf"));
        let dwarf = gcc(&format!("beyond-dwarf{level}"), SHAPES, &flags("-g"));
        let (btf, dwarf) =
            (Module::parse(&btf, None).unwrap(), Module::parse(&dwarf, None).unwrap());
        for name in &beyond {
            let (found, expect) = (signature(&btf, name), signature(&dwarf, name));
            if let Some(doubt) = &found.doubt {
                assert!(!doubt.to_string().is_empty() && *doubt != Doubt::NoDebugInfo, "{name}");
                continue;
            }
            let is_whole = found.ret.absent.is_none()
                && found.params.iter().all(|param| param.absent.is_none());
            assert!(!is_whole, "{level} {}", found.declaration(name));
            for (found, expect) in found.params.iter().zip(&expect.params) {
                let is_same = found.words == expect.words;
                assert!(is_same || found.absent.is_some(), "{level} {name}: {found:?}");
            }
            // gcc writes `void` for a type that it cannot describe.
            let is_same = found.ret.words == expect.ret.words;
            assert!(is_same || found.ret.words.is_empty(), "{level} {name}: {:?}", found.ret);
        }
    }
}

/// The linker puts the sections of several objects one behind the other.
#[test]
fn names_that_several_objects_have() {
    let other = "
        static __attribute__((noinline)) long helper(double d) { volatile double v = d; return v; }
        int odd();
        int agreed(int, char *);
        long second(double d) { return helper(d) + odd(1) + agreed(2, 0); }
        double far(int n, double d) { return n + d; }
    ";
    let first = "
        static __attribute__((noinline)) int helper(int n) { volatile int v = n; return v; }
        int odd(int n) { return n; }
        int agreed(int n, char *to) { return n + !to; }
        int first(int n) { return helper(n); }
    ";
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("btf-other-{}.c", std::process::id()));
    std::fs::write(&path, other).unwrap();
    let bytes = gcc("btf-two", first, &["-gbtf", "-O1", "-w", path.to_str().unwrap()]);
    std::fs::remove_file(&path).unwrap();
    let module = Module::parse(&bytes, None).unwrap();
    let text = |name: &str| signature(&module, name).declaration(name);
    assert_eq!(text("first"), "int first(int n)");
    assert_eq!(text("second"), "long int second(double d)");
    assert_eq!(text("far"), "double far(int n, double d)");
    // The declaration has no names.
    assert_eq!(text("agreed"), "int agreed(int n, char *to)");
    assert_eq!(signature(&module, "helper").doubt, Some(Doubt::SharedName));
    assert_eq!(signature(&module, "odd").doubt, Some(Doubt::Prototypes));
}

/// As pahole describes vectors.
#[test]
fn arrays_that_may_be_vectors() {
    let mut btf = Builder::new();
    let int = btf.int();
    let float = btf.add("float", 16, 0, 4, &[]);
    let vector = btf.array(float, 4);
    let held = btf.holder("held", vector, 16);
    let ints = btf.array(int, 3);
    let three = btf.holder("three", ints, 12);
    btf.function("passed", GLOBAL, int, &[("v", vector), ("n", int)]);
    btf.function("inside", GLOBAL, int, &[("h", held), ("n", int)]);
    btf.function("no_vector", GLOBAL, int, &[("t", three), ("n", int)]);
    let source = format!(
        "{}
        typedef float v4f __attribute__((vector_size(16)));
        int passed(v4f v, int n) {{ return v[1] + n; }}
        struct held {{ float x[4]; }}; int inside(struct held h, int n) {{ return h.x[1] + n; }}
        struct three {{ int x[3]; }}; int no_vector(struct three t, int n) {{ return t.x[1] + n; }}",
        btf.source()
    );
    let bytes = gcc("btf-vectors", &source, &["-O1"]);
    let module = Module::parse(&bytes, None).unwrap();
    let words = |name: &str| signature(&module, name).arg_words().collect::<Vec<_>>();
    use ArgWord::{Gpr, Xmm, XmmWord};
    assert_eq!(words("passed"), [Xmm(0), XmmWord { reg: 0, word: 1 }, Gpr(0)]);
    assert_eq!(words("no_vector"), [Gpr(0), Gpr(1), Gpr(2)]);
    let inside = signature(&module, "inside");
    assert_eq!(inside.source, SignatureSource::Btf);
    assert_eq!(inside.params[0].absent, Some(Absent::Ambiguous(Choice::Btf)));
    assert_eq!(inside.params[1].words, [Gpr(0)]);
}

/// What LLVM alone may have changed, and what another language's rules decide.
#[test]
fn whose_code_it_is() {
    let mut btf = Builder::new();
    let int = btf.int();
    let record = btf.holder("record", int, 4);
    btf.function("own", STATIC, int, &[("n", int)]);
    btf.function("exported", GLOBAL, int, &[("n", int)]);
    btf.function("of_record", GLOBAL, int, &[("r", record)]);
    let source = format!(
        "{}
        struct record {{ int member; }};
        #ifdef __cplusplus
        int mangled(int n) {{ return n; }}
        extern \"C\" {{
        #endif
        static __attribute__((noinline)) int own(int n) {{ volatile int v = n; return v; }}
        int exported(int n) {{ return own(n) + own(n + 1); }}
        int of_record(struct record r) {{ return r.member; }}
        #ifdef __cplusplus
        }}
        #endif",
        btf.source()
    );
    let doubts = |compiler: &str| {
        let bytes = compile(&format!("btf-{compiler}"), compiler, &source, &["-O1"])?;
        let module = Module::parse(&bytes, None).unwrap();
        Some(["own", "exported", "of_record"].map(|name| signature(&module, name).doubt))
    };
    assert_eq!(doubts("gcc"), Some([None, None, None]));
    let Some(of_clang) = doubts("clang") else { return };
    assert_eq!(of_clang, [Some(Doubt::Private), None, None]);
    assert_eq!(doubts("g++"), Some([None, None, Some(Doubt::MixedLanguages)]));
}

/// DWARF goes first; BTF is asked where that has line tables only.
#[test]
fn dwarf_goes_first() {
    let source = "int add(int a, int b) { return a + b; }";
    let check = |debug: &[&str], expect: SignatureSource| {
        let bytes = gcc(&format!("btf-with{}", debug.concat()), source, debug);
        let found = signature(&Module::parse(&bytes, None).unwrap(), "add");
        assert_eq!(found.source, expect, "{debug:?}");
    };
    check(&["-g", "-gbtf"], SignatureSource::Dwarf);
    check(&["-gbtf"], SignatureSource::Btf);
    check(&[], SignatureSource::Guessed);
    let mut btf = Builder::new();
    let int = btf.int();
    btf.function("add", GLOBAL, int, &[("a", int), ("b", int)]);
    let bytes = gcc("btf-lines", &format!("{}{source}", btf.source()), &["-g1"]);
    let found = signature(&Module::parse(&bytes, None).unwrap(), "add");
    assert_eq!(
        (found.source, found.declaration("add")),
        (SignatureSource::Btf, "int add(int a, int b)".into())
    );
}

/// gcc gives what it changes another name, which BTF does not know.
#[test]
fn clones_are_not_believed() {
    let check = |level: &str, symbol: &str, expect: SignatureSource| {
        let bytes = gcc(&format!("btf-clone{level}"), SHAPES, &["-gbtf", "-w", level]);
        let module = Module::parse(&bytes, None).unwrap();
        let hidden = module.functions().iter().find(|f| f.name.starts_with("hidden")).unwrap();
        assert_eq!(hidden.name, symbol);
        assert_eq!(module.signature(hidden).source, expect, "{level}");
    };
    check("-O0", "hidden", SignatureSource::Btf);
    check("-O2", "hidden.isra.0", SignatureSource::Guessed);
}

#[test]
fn what_is_told_of_a_parameter() {
    let bytes = gcc("btf-told", SHAPES, &["-gbtf", "-O1", "-w", "-DBEYOND"]);
    let module = Module::parse(&bytes, None).unwrap();
    let greet = signature(&module, "greet");
    assert!(matches!(&greet.params[0].ty, Type::Pointer { to_char: true, .. }));
    assert!(signature(&module, "format").variadic);
    assert_eq!(signature(&module, "many").stack_words, StackWords::Known(3));
    for name in ["decimal", "takes_half"] {
        assert!(matches!(signature(&module, name).doubt, Some(Doubt::Result { .. })), "{name}");
    }
    let vector = signature(&module, "takes_vector");
    let absent: Vec<_> = vector.params.iter().map(|param| param.absent.clone()).collect();
    let unknown = Absent::Unclassified(Unclassified::NotDescribed);
    assert_eq!(absent, [None, Some(unknown), Some(Absent::Behind("v".into()))]);
}

/// Asks for the signatures of all functions, with `section` as the module's BTF.
fn ask(fixture: &[u8], edit: impl FnOnce(&mut [u8])) {
    use object::{Object as _, ObjectSection as _};
    let section =
        object::File::parse(fixture).unwrap().section_by_name(".BTF").unwrap().file_range();
    let (start, len) = section
        .map(|(at, len)| (usize::try_from(at).unwrap(), usize::try_from(len).unwrap()))
        .unwrap();
    let mut bytes = fixture.to_vec();
    edit(&mut bytes[start..start + len]);
    let module = Module::parse(&bytes, None).unwrap();
    for function in module.functions() {
        let signature = module.signature(function);
        let _ = signature.declaration(&function.name);
        assert!(signature.is_known() == signature.doubt.is_none());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_sections_do_no_harm(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..16),
    ) {
        ask(fixture(), |section| {
            for (at, value) in edits {
                section[at.index(section.len())] = value;
            }
        });
    }

    #[test]
    fn type_ids_may_lead_anywhere(edits in prop::collection::vec((any::<prop::sample::Index>(), 0_u32..160), 1..48)) {
        ask(fixture(), |section| {
            let n_words = section.len() / 4;
            for (at, id) in edits {
                // The header stays.
                let at = 24 + at.index(n_words - 6) * 4;
                section[at..at + 4].copy_from_slice(&id.to_le_bytes());
            }
        });
    }
}

fn fixture() -> &'static [u8] {
    static BYTES: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    BYTES.get_or_init(|| gcc("btf-hostile", SHAPES, &["-gbtf", "-O1", "-w", "-DBEYOND"]))
}
