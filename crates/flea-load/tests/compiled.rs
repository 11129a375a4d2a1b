//! Shared objects as compilers make them: what is loaded, and what is refused with its reason.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use flea_fixtures::{Tool, require};
use flea_load::{LinkError, ParseError, Protection, SharedObject};
use flea_symbols::addr::{RemoteAddr, Svma};
use object::{Object as _, ObjectSymbol as _};
use proptest::prelude::*;

/// A directory of this test alone, removed with its guard.
struct Dir(PathBuf);

impl Dir {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("load-{}-{number}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The bytes of `source`, compiled and linked with `flags`.
fn build(tool: Tool, source: &str, flags: &[&str]) -> Option<Vec<u8>> {
    let compiler = require(tool)?;
    let dir = Dir::new();
    let is_cpp = matches!(tool, Tool::Gxx | Tool::Clangxx);
    let file = dir.0.join(if is_cpp { "a.cpp" } else { "a.c" });
    let object = dir.0.join("a.so");
    fs::write(&file, source).unwrap();
    let output = Command::new(compiler)
        .args(["-shared", "-fPIC", "-o"])
        .arg(&object)
        .arg(&file)
        .args(flags)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(fs::read(object).unwrap())
}

/// Code, constants, variables with and without a value, pointers to its own things, imports.
const EVERYTHING: &str = r#"
#include <stdio.h>
#include <string.h>
extern int helper(int) __attribute__((weak));
extern int target_variable;
static int counter;
int exported = 7;
const char *const names[] = {"one", "two"};
int *pointer = &exported;
static char buffer[10000];
int answer(int x)
{
    counter += *pointer;
    strcpy(buffer, names[x & 1]);
    printf("%s\n", buffer);
    return helper ? helper(counter) : target_variable;
}
"#;

const BASE: RemoteAddr = RemoteAddr(0x7f12_3456_7000);

/// What a stranger's loader would write for an import.
fn made_up(index: usize) -> RemoteAddr {
    RemoteAddr(0x7f00_0000_0000 + 0x100 * index as u64)
}

fn own_symbol(bytes: &[u8], name: &str) -> Svma {
    let file = object::File::parse(bytes).unwrap();
    let symbol = file.symbols().find(|s| s.name() == Ok(name));
    Svma(symbol.unwrap().address())
}

fn word_at(bytes: &[u8], at: u64) -> u64 {
    let at = usize::try_from(at).unwrap();
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn check_everything(bytes: &[u8]) {
    let object = SharedObject::parse(bytes).unwrap();
    let names: BTreeSet<&str> = object.imports().iter().map(|i| i.name.as_str()).collect();
    assert!(names.is_superset(&BTreeSet::from(["helper", "target_variable"])), "{names:?}");
    assert!(!names.contains("exported"), "it defines that itself");
    let import = |name| object.imports().iter().position(|i| i.name == name).unwrap();
    assert!(object.imports()[import("helper")].weak);
    assert!(!object.imports()[import("target_variable")].weak);

    let linked = object.link(BASE, made_up).unwrap();
    assert_eq!(linked.bytes.len() as u64, object.size_bytes());
    let offset = |name: &str| object.offset_of(own_symbol(bytes, name)).unwrap();
    assert_eq!(word_at(&linked.bytes, offset("pointer")), BASE.0 + offset("exported"));
    assert_eq!(word_at(&linked.bytes, offset("exported")) & 0xffff_ffff, 7);
    let first_name = word_at(&linked.bytes, offset("names")) - BASE.0;
    assert_eq!(&linked.bytes[usize::try_from(first_name).unwrap()..][..4], b"one\0");
    let words: BTreeSet<u64> =
        linked.bytes.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect();
    for (i, import) in object.imports().iter().enumerate() {
        assert!(words.contains(&made_up(i).0), "{import} was bound nowhere");
    }
    // All of it is protected as its part of the program wants.
    let protection = |name: &str| {
        let at = BASE.0 + offset(name);
        let holds = |r: &&flea_load::Region| (r.at.0..r.at.0 + r.size_bytes).contains(&at);
        linked.regions.iter().find(holds).unwrap().protection
    };
    assert_eq!(protection("answer"), Protection::ReadExecute);
    assert_eq!(protection("counter"), Protection::ReadWrite);
    assert_eq!(protection("buffer"), Protection::ReadWrite);
    assert_eq!(protection("names"), Protection::Read, "relocated, then read-only");
    let covered: u64 = linked.regions.iter().map(|r| r.size_bytes).sum();
    assert_eq!(covered, object.size_bytes());
}

#[test]
fn what_compilers_make_is_loaded() {
    let flags: [&[&str]; 6] = [
        &["-O2", "-g"],
        &["-O0"],
        &["-O2", "-Wl,-z,now"],
        &["-O2", "-Wl,-z,pack-relative-relocs"],
        &["-O2", "-fcf-protection=full", "-Wl,-z,noseparate-code", "-Wl,-z,relro"],
        &["-O2", "-nostartfiles", "-Wl,-Bsymbolic"],
    ];
    for flags in flags {
        let Some(bytes) = build(Tool::Gcc, EVERYTHING, flags) else { return };
        check_everything(&bytes);
    }
    // musl's wrapper does not find the shared libgcc.
    for (tool, flag) in [(Tool::Clang, "-g"), (Tool::MuslGcc, "-static-libgcc")] {
        let Some(bytes) = build(tool, EVERYTHING, &["-O2", flag]) else { continue };
        check_everything(&bytes);
    }
}

#[test]
fn versions_are_read() {
    let Some(bytes) = build(Tool::Gcc, EVERYTHING, &["-O2", "-fno-builtin"]) else { return };
    let object = SharedObject::parse(&bytes).unwrap();
    let import = |name| object.imports().iter().find(|i| i.name == name).unwrap();
    assert_eq!(import("strcpy").version.as_deref(), Some("GLIBC_2.2.5"));
    assert_eq!(import("helper").version, None);
    assert_eq!(import("strcpy").to_string(), "strcpy@GLIBC_2.2.5");
}

#[test]
fn what_would_need_a_loader_is_refused() {
    let refused = |tool, source: &str, flags: &[&str]| {
        let bytes = build(tool, source, flags)?;
        Some(SharedObject::parse(&bytes).map(|_| ()).unwrap_err())
    };
    let gcc = |source: &str, flags: &[&str]| refused(Tool::Gcc, source, flags);
    type Case<'a> = (&'a str, &'a [&'a str], fn(&ParseError) -> bool);
    let cases: [Case<'_>; 10] = [
        ("__thread int t; int f(void) { return t++; }", &[], |e| {
            matches!(e, ParseError::ThreadLocal { .. })
        }),
        (
            "extern __thread int theirs; int f(void) { return theirs++; }",
            &[],
            |e| matches!(e, ParseError::ThreadLocal { symbol: Some(s) } if s == "theirs"),
        ),
        (
            "__attribute__((constructor)) void start(void) {}",
            &["-g"],
            |e| matches!(e, ParseError::StartCode { symbol: Some(s), .. } if s == "start"),
        ),
        (
            "__attribute__((destructor)) void finish(void) {}",
            &["-g"],
            |e| matches!(e, ParseError::StartCode { symbol: Some(s), .. } if s == "finish"),
        ),
        (
            "void mine(void) {}",
            &["-Wl,-init=mine"],
            |e| matches!(e, ParseError::StartCode { symbol: Some(s), .. } if s == "mine"),
        ),
        ("int f(void) { return 1; }", &["-Wl,-s"], |e| {
            matches!(e, ParseError::StartCode { symbol: None, .. })
        }),
        (
            "static int one(void) { return 1; } static void *pick(void) { return one; }\n\
             int f(void) __attribute__((ifunc(\"pick\"))); int g(void) { return f(); }",
            &[],
            |e| matches!(e, ParseError::IndirectFunction { .. }),
        ),
        ("int f(void) { return 1; }", &["-Wl,-z,execstack"], |e| {
            matches!(e, ParseError::ExecutableStack)
        }),
        ("int f(void) { return 1; }", &["-nostdlib", "-Wl,--omagic"], |e| {
            matches!(e, ParseError::WritableCode { .. })
        }),
        ("_Alignas(65536) char c[65536] = {1}; void *f(void) { return c; }", &[], |e| {
            matches!(e, ParseError::Alignment { align: 65536 })
        }),
    ];
    for (source, flags, expected) in cases {
        let Some(error) = gcc(source, flags) else { return };
        assert!(expected(&error), "{source}: {error:?}");
    }
    let catches = "int g(); int f() { try { return g(); } catch (...) { return 1; } }";
    if let Some(error) = refused(Tool::Gxx, catches, &[]) {
        assert_eq!(error, ParseError::Exceptions);
    }
    let constructed = "struct A { A(); int x; }; A a; int f() { return a.x; }";
    if let Some(error) = refused(Tool::Gxx, constructed, &[]) {
        assert!(matches!(error, ParseError::StartCode { symbol: Some(_), .. }), "{error}");
    }
}

#[test]
fn other_files_are_refused() {
    let error = |bytes: &[u8]| SharedObject::parse(bytes).unwrap_err();
    assert_eq!(error(b""), ParseError::NotElf);
    assert_eq!(error(b"#!/bin/sh\n"), ParseError::NotElf);
    assert!(matches!(error(b"\x7fELF\x02"), ParseError::Damaged { .. }));
    // This very test: a position-independent executable.
    let own = fs::read(std::env::current_exe().unwrap()).unwrap();
    assert!(SharedObject::parse(&own).is_err());
    let Some(compiled) = build(Tool::Gcc, "int f(void) { return 1; }", &["-r", "-no-pie"]) else {
        return;
    };
    let found = "an object file that was not linked";
    assert_eq!(error(&compiled), ParseError::NotSharedObject { found });
}

/// A 32-bit distance to an import, as assembly can ask for it.
#[test]
fn distances_have_a_reach() {
    let source = "int f(void) { return 1; }\n\
                  __asm__(\".data; .globl field; field: .long near_by - .; .text\");";
    let Some(bytes) = build(Tool::Gcc, source, &["-O1"]) else { return };
    let object = SharedObject::parse(&bytes).unwrap();
    let near_by = object.imports().iter().position(|i| i.name == "near_by").unwrap();
    let at = |to: u64| object.link(BASE, move |i| if i == near_by { RemoteAddr(to) } else { BASE });
    let offset = object.offset_of(own_symbol(&bytes, "field")).unwrap();
    let linked = at(BASE.0 + 0x1234).unwrap();
    let distance = word_at(&linked.bytes, offset) & 0xffff_ffff;
    assert_eq!(distance as u32 as i32, 0x1234 - i32::try_from(offset).unwrap());
    let error = at(BASE.0 + (1 << 33)).unwrap_err();
    let place = RemoteAddr(BASE.0 + offset);
    assert_eq!(error, LinkError::OutOfReach { symbol: "near_by".into(), at: place });
}

/// Every prefix of a good file is an error or a good file.
#[test]
fn truncated_files_are_refused() {
    let Some(bytes) = build(Tool::Gcc, EVERYTHING, &["-O2"]) else { return };
    for len in (0..bytes.len()).step_by(61) {
        if let Ok(object) = SharedObject::parse(&bytes[..len]) {
            object.link(BASE, made_up).unwrap();
        }
    }
    assert!(SharedObject::parse(&bytes[..bytes.len() / 4]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 600, failure_persistence: None, ..ProptestConfig::default()
    })]

    /// Whatever stands in the headers and tables: an error, or bytes and regions that fit.
    #[test]
    fn scribbled_files_harm_nobody(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
        headers in prop::collection::vec((0usize..0x600, any::<u8>()), 0..6),
    ) {
        static GOOD: std::sync::OnceLock<Option<Vec<u8>>> = std::sync::OnceLock::new();
        let good = GOOD.get_or_init(|| build(Tool::Gcc, EVERYTHING, &["-O2", "-g"]));
        let Some(mut bytes) = good.clone() else { return Ok(()) };
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        for (at, byte) in headers {
            bytes[at] = byte;
        }
        if let Ok(object) = SharedObject::parse(&bytes) {
            prop_assert!(object.size_bytes().is_multiple_of(4096));
            if let Ok(linked) = object.link(BASE, made_up) {
                prop_assert_eq!(linked.bytes.len() as u64, object.size_bytes());
                let covered: u64 = linked.regions.iter().map(|r| r.size_bytes).sum();
                prop_assert_eq!(covered, object.size_bytes());
            }
        }
    }
}
