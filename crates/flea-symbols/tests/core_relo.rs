//! CO-RE: one object, relocated for several builds of a program by each format of debug
//! information, reads from the program's own memory what the program itself reads there.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compiled;

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use compiled::run_program;
use flea_object::core_relo::{POISON, Relocated, relocate};
use flea_object::interp::{Interpreter, Memory, NoHost, Protection};
use flea_object::spec::{Object, Program};
use flea_object::types::Types;
use flea_symbols::{Module, TypeNames};
use object::{Object as _, ObjectSection as _};
use proptest::prelude::*;

const TARGET: &str = include_str!("core_relo/target.c");
/// Their ways to relocate differ.
const CLANGS: [&str; 3] = ["clang-14", "clang-16", "clang-19"];

/// The object by every clang that there is.
fn objects() -> Vec<(&'static str, Object)> {
    let parse =
        |(clang, bytes): &(&'static str, Vec<u8>)| (*clang, flea_object::parse(bytes).unwrap());
    files().iter().map(parse).collect()
}

fn files() -> &'static [(&'static str, Vec<u8>)] {
    static FILES: OnceLock<Vec<(&str, Vec<u8>)>> = OnceLock::new();
    FILES.get_or_init(compile_objects)
}

fn compile_objects() -> Vec<(&'static str, Vec<u8>)> {
    let directory: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests", "core_relo"].iter().collect();
    let mut found = Vec::new();
    for clang in CLANGS {
        let output = Command::new(clang)
            .current_dir(&directory)
            .args(["-target", "bpf", "-O2", "-g", "-c", "program.bpf.c", "-o", "-"])
            .output();
        let Ok(output) = output else { continue };
        assert!(output.status.success(), "{clang}: {}", String::from_utf8_lossy(&output.stderr));
        found.push((clang, output.stdout));
    }
    if found.is_empty() {
        assert!(std::env::var_os("CI").is_none(), "no clang on CI");
        eprintln!("skipped: no clang is installed");
    }
    found
}

/// A build of the target: its bytes, the image of a node, and what it says of it.
struct Build {
    what: String,
    bytes: Vec<u8>,
    image: Vec<u8>,
    answers: HashMap<String, u64>,
}

fn builds() -> &'static [Build] {
    static BUILDS: OnceLock<Vec<Build>> = OnceLock::new();
    BUILDS.get_or_init(compile_builds)
}

fn compile_builds() -> Vec<Build> {
    let mut found = Vec::new();
    for (compiler, debug) in
        [("gcc", "-gdwarf-5"), ("gcc", "-gdwarf-4"), ("gcc", "-gbtf"), ("clang", "-gdwarf-5")]
    {
        for moved in [None, Some("-DMOVED")] {
            let what = format!("core{compiler}{debug}{}", moved.unwrap_or_default());
            let flags: Vec<&str> =
                [debug, "-O1", "-pie", "-fPIE"].into_iter().chain(moved).collect();
            let Some((bytes, said)) = run_program(&what, compiler, TARGET, &flags) else {
                continue;
            };
            let mut lines = said.lines();
            let image = lines.next().unwrap().strip_prefix("image ").unwrap();
            let byte =
                |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
            let image = image.as_bytes().chunks(2).map(byte).collect();
            let answer = |line: &str| {
                let (name, value) = line.split_once(' ').unwrap();
                (name.to_owned(), u64::from_str_radix(value, 16).unwrap())
            };
            found.push(Build { what, bytes, image, answers: lines.map(answer).collect() });
        }
    }
    found
}

/// The target's types that the programs of `object` name.
fn types_for(object: &Object, bytes: &[u8]) -> Types {
    let relocations = object.programs.iter().flat_map(|program| &program.core_relocations);
    let names: Vec<&str> = relocations.flat_map(|r| r.names.iter().map(String::as_str)).collect();
    Module::parse(bytes, None).unwrap().types(&[], TypeNames::These(&names)).types
}

fn relocated(object: &Object, program: &Program, target: &Types) -> Relocated {
    relocate(&program.insns, &program.core_relocations, &object.types, target)
        .unwrap_or_else(|error| panic!("{}: {error}", program.name))
}

/// What the program returns for a node of these bytes.
fn run(relocated: &Relocated, image: &[u8]) -> u64 {
    let mut memory = Memory::new();
    let node = memory.add(image.to_vec(), Protection::ReadOnly);
    let ctx = memory.add(node.to_le_bytes().to_vec(), Protection::ReadOnly);
    let interpreter = Interpreter::new(&relocated.insns).unwrap();
    interpreter.run([ctx, 0, 0, 0, 0], &mut memory, &mut NoHost).unwrap()
}

#[test]
fn one_object_reads_every_build() {
    for (clang, object) in objects() {
        for build in builds() {
            let types = types_for(&object, &build.bytes);
            for program in object.programs.iter().filter(|program| program.name != "live") {
                let (name, what) = (&program.name, &build.what);
                let found = run(&relocated(&object, program, &types), &build.image);
                let expect = build.answers[name];
                assert_eq!(found, expect, "{clang} {what} {name}: {found:#x} {expect:#x}");
            }
            assert_eq!(build.answers.len() + 1, object.programs.len());
        }
    }
}

#[test]
fn what_is_missing_poisons_its_instruction() {
    for (clang, object) in objects() {
        let live = object.programs.iter().find(|program| program.name == "live").unwrap();
        for build in builds() {
            let types = types_for(&object, &build.bytes);
            let relocated = relocated(&object, live, &types);
            let n_poisoned = relocated.insns.iter().filter(|insn| insn.imm == POISON).count();
            if !build.what.contains("MOVED") {
                assert_eq!((n_poisoned, relocated.poisoned), (0, Vec::new()));
                continue;
            }
            assert_eq!(n_poisoned, 1, "{clang} {}", build.what);
            let [(at, reason)] = relocated.poisoned.as_slice() else { panic!("{relocated:?}") };
            assert_eq!(relocated.insns[*at as usize].imm, POISON);
            assert_eq!(
                reason,
                "field 'struct node___mine.gone': the target's 'node' has no such field, \
                 or one of another kind"
            );
        }
    }
}

/// Bytes of types and relocations, changed anywhere.
fn damaged() -> impl Strategy<Value = (usize, Vec<(usize, u8)>)> {
    let change = (any::<prop::sample::Index>().prop_map(|at| at.index(1 << 20)), any::<u8>());
    (0usize..8, prop::collection::vec(change, 1..6))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// There is an answer or an error.
    #[test]
    fn damaged_objects_are_no_trouble((which, changes) in damaged()) {
        let Some((_, good)) = files().get(which % files().len().max(1)) else { return Ok(()) };
        let file = object::File::parse(good.as_slice()).unwrap();
        let ranges = [".BTF", ".BTF.ext"].map(|name| file.section_by_name(name).unwrap());
        let mut bytes = good.clone();
        for (at, value) in changes {
            let (start, len) = ranges[at % 2].file_range().unwrap();
            bytes[usize::try_from(start).unwrap() + at / 2 % usize::try_from(len).unwrap()] = value;
        }
        let Ok(object) = flea_object::parse(&bytes) else { return Ok(()) };
        let types = types_for(&object, &builds()[which % builds().len()].bytes);
        for program in &object.programs {
            let (insns, relocations) = (&program.insns, &program.core_relocations);
            if let Ok(relocated) = relocate(insns, relocations, &object.types, &types) {
                prop_assert_eq!(relocated.insns.len(), insns.len());
            }
        }
    }
}
