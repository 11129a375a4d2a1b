//! C++ signatures: which classes are passed by address, and what follows from more than a
//! type's members.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compiled;

use compiled::{compile, function};
use flea_symbols::Module;
use flea_symbols::signature::{ArgWord, Signature, SignatureSource, Type};

fn signature(module: &Module<'_>, name: &str) -> Signature {
    module.signature(function(module, name))
}

#[test]
fn cpp_signatures() {
    let source = r#"
        struct trivial { int a, b; };
        struct counted { long n; counted(const counted &o) : n(o.n + 1) {} ~counted() {} };
        struct holder { counted c; };
        struct shape { virtual ~shape() {} virtual int area(int scale) { return n * scale; } int n; };
        struct derived : trivial { int c; };
        struct empty {};
        extern "C" int f_trivial(trivial t, int x) { return t.a + x; }
        extern "C" long f_counted(counted c, int x) { return c.n + x; }
        extern "C" long f_holder(holder h, int x) { return h.c.n + x; }
        extern "C" int f_reference(const int &r, int &&s) { return r + s; }
        extern "C" int f_empty(empty e, int x) { return x; }
        extern "C" int f_derived(derived d) { return d.c; }
        extern "C" holder f_make(holder *h) { return *h; }
        int use(shape *s) { return s->area(3); }
        shape the_shape;
    "#;
    for compiler in ["g++", "clang++"] {
        for flags in [["-gdwarf-5", "-O0"], ["-gdwarf-4", "-O1"]] {
            let name = format!("cpp{compiler}{}", flags[0]);
            let Some(bytes) = compile(&name, compiler, source, &flags) else { continue };
            let module = Module::parse(&bytes, None).unwrap();
            let words = |f: &str| -> Vec<ArgWord> { signature(&module, f).arg_words().collect() };
            use ArgWord::Gpr;
            assert_eq!(words("f_trivial"), [Gpr(0), Gpr(1)], "{name}");
            assert_eq!(words("f_counted"), [Gpr(0), Gpr(1)], "{name}");
            assert_eq!(words("f_holder"), [Gpr(0), Gpr(1)], "{name}");
            assert_eq!(words("f_reference"), [Gpr(0), Gpr(1)], "{name}");
            assert_eq!(words("f_empty"), [Gpr(0)], "{name}");
            assert_eq!(words("f_derived"), [Gpr(0), Gpr(1)], "{name}");
            assert_eq!(words("f_make"), [Gpr(1)], "{name}");
            let area = signature(&module, "_ZN5shape4areaEi");
            assert_eq!(area.source, SignatureSource::Dwarf);
            assert_eq!(area.params[0].name.as_deref(), Some("this"));
            assert_eq!(area.params.len(), 2);
            // A class of eight bytes that is passed by address and one that is not look
            // alike but for the type.
            assert!(matches!(
                &signature(&module, "f_counted").params[0].ty,
                Type::Aggregate { size_bytes: 8, .. }
            ));
        }
    }
}

/// Types whose place follows from more than their members.
#[test]
fn cpp_classes() {
    let source = r#"
        struct empty {};
        struct defaulted { int a; long b; defaulted() = default; defaulted(const defaulted &) = default; ~defaulted() = default; };
        struct copied { long a; copied(const copied &); };
        struct moved { long a; moved(moved &&); };
        struct child : empty { long a; };
        struct grown : child { int b; };
        struct poly { virtual int f(); long a; };
        enum class color : short { red };
        struct holder { empty e; double d; };
        union either { double d; long l; };
        struct host { long h; defaulted method(defaulted d, empty e, float _Complex c); static int plain(child c); };
        #define KEEP(p) __asm__ volatile("" : : "r"(&p) : "memory")
        extern "C" {
        long f_defaulted(defaulted a, int x) { KEEP(a); return x; }
        long f_copied(copied a, int x) { KEEP(a); return x; }
        long f_moved(moved a, int x) { KEEP(a); return x; }
        long f_child(child a, int x) { KEEP(a); return x; }
        long f_grown(grown a, int x) { KEEP(a); return x; }
        long f_poly(poly a, int x) { KEEP(a); return x; }
        long f_color(color a, decltype(nullptr) n, int x) { KEEP(a); return x; }
        long f_holder(holder a, int x) { KEEP(a); return x; }
        long f_either(either a, int x) { KEEP(a); return x; }
        long f_member(int (host::*m)(), long host::*d, int x) { KEEP(m); KEEP(d); return x; }
        long f_empty(long a, long b, long c, long d, long e, long f, long g, empty h, long i) { KEEP(h); return i; }
        copied f_made(copied *c) { return *c; }
        }
        defaulted host::method(defaulted d, empty e, float _Complex c) { KEEP(d); KEEP(e); KEEP(c); return d; }
        int host::plain(child c) { KEEP(c); return 1; }
        copied::copied(const copied &o) : a(o.a) {}
        moved::moved(moved &&o) : a(o.a) {}
        int poly::f() { return 1; }
    "#;
    use ArgWord::{Gpr, Stack, Xmm};
    for (compiler, level) in
        [("g++", "-O0"), ("g++", "-O2"), ("clang++", "-O0"), ("clang++", "-O2")]
    {
        for version in ["-gdwarf-4", "-gdwarf-5"] {
            let name = format!("classes{compiler}{level}{version}");
            let Some(bytes) = compile(&name, compiler, source, &[level, version]) else { continue };
            let module = Module::parse(&bytes, None).unwrap();
            let check = |f: &str, expect: &[ArgWord]| {
                let signature = signature(&module, f);
                assert_eq!(
                    signature.source,
                    SignatureSource::Dwarf,
                    "{name} {f}: {:?}",
                    signature.doubt
                );
                let words: Vec<ArgWord> = signature.arg_words().collect();
                assert_eq!(words, expect, "{name}: {}", signature.declaration(f));
            };
            check("f_defaulted", &[0, 1, 2].map(Gpr));
            for by_address in ["f_copied", "f_moved", "f_poly"] {
                check(by_address, &[0, 1].map(Gpr));
            }
            check("f_child", &[0, 1].map(Gpr));
            check("f_grown", &[0, 1, 2].map(Gpr));
            check("f_color", &[0, 1, 2].map(Gpr));
            check("f_holder", &[Xmm(0), Gpr(0)]);
            check("f_either", &[0, 1].map(Gpr));
            check("f_member", &[0, 1, 2, 3].map(Gpr));
            check("f_empty", &[Gpr(0), Gpr(1), Gpr(2), Gpr(3), Gpr(4), Gpr(5), Stack(0), Stack(1)]);
            check("f_made", &[Gpr(1)]);
            check("_ZN4host6methodE9defaulted5emptyCf", &[Gpr(0), Gpr(1), Gpr(2), Xmm(0)]);
            check("_ZN4host5plainE5child", &[Gpr(0)]);
        }
    }
}
