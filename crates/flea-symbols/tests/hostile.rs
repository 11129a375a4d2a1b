//! Files come from strangers: whatever is in them, an answer or an error comes back.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compiled;

use std::sync::OnceLock;

use compiled::{compile, gcc};
use flea_object::header::header;
use flea_object::types::TypeId;
use flea_symbols::addr::{FileOffset, Svma};
use flea_symbols::{Module, ModuleError, Pattern, TypeNames};
use proptest::prelude::*;

const SOURCE: &str = "
    struct s { long a; double b[1]; union { int c : 3; float d; } u; };
    typedef struct s t;
    volatile int sink; void die(int) __attribute__((cold, noreturn));
    int sw(int k, t x, ...) {
        switch (k) {
            case 0: sink = 1; return x.a; case 1: sink = 2; k *= 7; break;
            case 2: sink = 3; k ^= 91; break; case 3: sink = 4; return k / 3;
            case 4: sink = 5; k -= 17; break; case 5: die(k);
        }
        return k + sink;
    }
    void die(int x) { for (;;) sink = x; }
    double sum(t *p, double (*f)(t, long double), char *name) { return p->b[0] + f(*p, 1.0L); }
";

fn fixture() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| gcc("hostile", SOURCE, &["-g", "-O2"]))
}

/// Asks everything there is to ask.
fn exercise(image: &[u8], debug: Option<&[u8]>) {
    let Ok(module) = Module::parse(image, debug) else { return };
    let _ = (module.build_id(), module.debuglink(), module.debugaltlink(), module.interpreter());
    let _ = (module.is_static(), module.entry(), module.svma_to_offset(Svma(u64::MAX)));
    let _ = (module.offset_to_svma(FileOffset(u64::MAX)), module.function_at(Svma(0x1100)));
    let pattern = Pattern::parse("s*m").unwrap();
    assert!(module.find(&pattern).len() <= module.functions().len());
    let _ = module.nearest_names("sun", 3);
    for function in module.functions().iter().take(64) {
        let _ = (function.demangled(), function.display_name());
        if let Ok(site) = module.site(function) {
            assert!(site.len_bytes() >= 5);
            assert_eq!(site.boundaries[0], 0);
            let bytes = module.bytes_from(site.address).unwrap();
            assert!(bytes.starts_with(&site.original));
        }
        let signature = module.signature(function);
        let _ = signature.declaration(&function.name);
        let _ = module.stack_words_proof(function);
        let graph = module.types(&[(function, &signature)], TypeNames::These(&["s", "t"]));
        assert!(graph.slots[0].len() > signature.arg_words().count());
    }
    let types = module.types(&[], TypeNames::All).types;
    let ids: Vec<TypeId> = types.iter().map(|(id, _)| id).collect();
    assert!(header(&types, &ids).text.ends_with("#endif\n"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_files_do_no_harm(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..24),
        in_headers in prop::collection::vec((0_usize..1024, any::<u8>()), 0..3),
        as_debug in any::<bool>(),
    ) {
        let mut bytes = fixture().to_vec();
        for (index, value) in edits {
            let at = index.index(bytes.len());
            bytes[at] = value;
        }
        for (at, value) in in_headers {
            bytes[at + 16] = value;
        }
        if as_debug {
            exercise(fixture(), Some(&bytes));
        } else {
            exercise(&bytes, None);
        }
    }

    #[test]
    fn mutated_sections_do_no_harm(
        section in prop::sample::select(&[".eh_frame", ".debug_info", ".debug_abbrev", ".symtab", ".dynsym",
            ".text", ".rela.dyn", ".rodata", ".debug_loclists", ".debug_line_str", ".debug_str", ".debug_rnglists", ".gcc_except_table"][..]),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
    ) {
        use object::{Object as _, ObjectSection as _};
        let mut bytes = fixture().to_vec();
        let range = object::File::parse(&*bytes).unwrap().section_by_name(section).and_then(|s| s.file_range());
        let Some((start, len)) = range.filter(|(_, len)| *len > 0) else { return Ok(()) };
        for (index, value) in edits {
            bytes[usize::try_from(start).unwrap() + index.index(usize::try_from(len).unwrap())] = value;
        }
        exercise(&bytes, None);
    }

    #[test]
    fn cut_files_do_no_harm(len in any::<prop::sample::Index>()) {
        let bytes = fixture();
        exercise(&bytes[..len.index(bytes.len())], None);
    }
}

#[test]
fn errors_say_what_the_file_is() {
    let bytes = fixture();
    let error = |bytes: &[u8]| Module::parse(bytes, None).unwrap_err();
    assert_eq!(error(b"#!/bin/sh\n"), ModuleError::NotElf);
    assert_eq!(error(b""), ModuleError::NotElf);
    assert!(matches!(error(&bytes[..10]), ModuleError::Damaged { .. }));
    assert!(matches!(error(&bytes[..4096]), ModuleError::Damaged { .. }));
    let mut other = bytes.to_vec();
    other[4] = 1;
    other[18] = 3;
    assert_eq!(error(&other).to_string(), "32-bit (i386) ELF: Flea traces 64-bit x86-64 only");
    other[4] = 2;
    other[18] = 183;
    assert_eq!(error(&other).to_string(), "ELF for AArch64: Flea traces 64-bit x86-64 only");
    let mut object = bytes.to_vec();
    object[16] = 1;
    assert_eq!(error(&object), ModuleError::NotLoadable { e_type: 1 });
    assert!(matches!(
        Module::parse(bytes, Some(b"text")).unwrap_err(),
        ModuleError::Debug(inner) if *inner == ModuleError::NotElf
    ));
}

/// A module is shared between the threads of a controller.
/// lld lays segments out one behind the other in the file and a page further on in memory, so
/// that a page of the file belongs to two segments.
#[test]
fn a_code_mapping_begins_before_its_segment() {
    // This very test was linked by lld where the toolchain does so; the layout is checked in
    // any case.
    let bytes = std::fs::read("/proc/self/exe").unwrap();
    let module = Module::parse(&bytes, None).unwrap();
    let code = module.segments().iter().find(|s| s.executable).unwrap();
    let before = code.file_offset.0 % 4096;
    let mapped = FileOffset(code.file_offset.0 - before);
    let first = Svma(code.address.0 - before);
    assert_eq!(module.code_mapping_to_svma(mapped), Some(first));
    assert_eq!(module.code_mapping_to_svma(code.file_offset), Some(code.address));
    let behind = FileOffset(code.file_offset.0 + code.file_size_bytes);
    assert_eq!(module.code_mapping_to_svma(behind), None);
    assert_eq!(module.code_mapping_to_svma(FileOffset(u64::MAX)), None);
}

#[test]
fn modules_cross_threads() {
    fn assert_shared<T: Send + Sync>() {}
    assert_shared::<Module<'static>>();
}

#[test]
fn kinds_of_modules() {
    let main = "int main(void) { return 0; }";
    let cases: [(&[&str], bool, bool, bool); 4] = [
        (&["-pie", "-fPIE"], true, false, true),
        (&["-no-pie"], false, false, true),
        (&["-no-pie", "-static"], false, true, false),
        (&["-pie", "-static-pie", "-fPIE"], true, true, false),
    ];
    for (flags, moves, is_static, has_interpreter) in cases {
        let bytes = gcc(&format!("kind{}", flags.join("")), main, flags);
        let module = Module::parse(&bytes, None).unwrap();
        assert_eq!(module.is_position_independent(), moves, "{flags:?}");
        assert_eq!(module.is_static(), is_static, "{flags:?}");
        assert_eq!(module.interpreter().is_some(), has_interpreter, "{flags:?}");
        let entry = module.entry();
        let offset = module.svma_to_offset(entry).unwrap();
        assert_eq!(module.offset_to_svma(offset), Some(entry));
        let code = module.segments().iter().find(|s| s.executable).unwrap();
        let page = |address: u64| address & !0xfff;
        assert_eq!(
            module.code_mapping_to_svma(FileOffset(page(code.file_offset.0))),
            Some(flea_symbols::addr::Svma(page(code.address.0)))
        );
        let main = compiled::function(&module, "main");
        assert_eq!(
            module.function_at(main.address.offset(1)).map(|f| f.address),
            Some(main.address)
        );
        assert!(module.site(main).is_ok(), "{flags:?}");
    }
    let bytes = gcc("library", main, &[]);
    assert!(!Module::parse(&bytes, None).unwrap().is_static());
}

#[test]
fn names_are_found_and_suggested() {
    let source =
        "namespace net { struct server { void accept(int); }; void server::accept(int) {} }
        extern \"C\" void reply(void) {}
        void net_alias() __attribute__((alias(\"reply\")));";
    let Some(bytes) = compile("names", "g++", source, &["-O1"]) else { return };
    let module = Module::parse(&bytes, None).unwrap();
    let find = |text: &str| -> Vec<&str> {
        let pattern = Pattern::parse(text).unwrap();
        module.find(&pattern).into_iter().map(|f| f.name.as_str()).collect()
    };
    let accept = ["_ZN3net6server6acceptEi"];
    assert_eq!(find("net::server::accept"), accept);
    assert_eq!(find("net::server::accept(int)"), accept);
    assert_eq!(find("net::*"), accept);
    assert_eq!(find("repl?"), ["reply"]);
    assert_eq!(find("net_alias"), ["reply"]);
    assert_eq!(module.nearest_names("repyl", 2), ["reply"]);
    assert_eq!(module.nearest_names("acept", 1), ["net::server::accept"]);
}
