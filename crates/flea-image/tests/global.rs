//! Global functions, which the verifier proves alone and the compiler inlines: what is compiled
//! leaves what the interpreter leaves.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../../flea-object/tests/support/mod.rs"]
mod clang;
mod support;

use std::path::Path;
use std::process::Command;

use flea_image::compile_plain;
use flea_object::interp::{Host, Interpreter, Memory, Protection};
use flea_object::spec::{MapIdx, Program};
use flea_verifier::facts::Fact;
use flea_verifier::{Context, Verified, verify};
use proptest::prelude::*;
use support::Pages;

const MEMORY_BYTES: u32 = 64;

/// The program has neither helpers nor maps.
struct NoHost;

impl Host for NoHost {
    fn call(&mut self, helper: i32, _: [u64; 5], _: &mut Memory) -> Result<u64, String> {
        Err(format!("helper {helper}"))
    }

    fn map_handle(&self, _: MapIdx) -> Option<u64> {
        None
    }

    fn map_value_address(&self, _: MapIdx) -> Option<u64> {
        None
    }
}

/// The program `run` of flea-object's `tests/c/global.bpf.c`, by each compiler.
fn programs() -> Vec<Program> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../flea-object/tests/c/global.bpf.c");
    let compiled = clang::compilers().into_iter().map(|compiler| {
        let mut command = Command::new(compiler);
        command.args(["-target", "bpf", "-O2", "-g", "-Wno-unused", "-c", "-o", "-"]).arg(&source);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let object = flea_object::parse(&output.stdout).unwrap();
        object.programs.into_iter().find(|p| p.name == "run").unwrap()
    });
    compiled.collect()
}

fn interpret(program: &Program, words: &[u64; 8]) -> (u64, Vec<u8>) {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mut memory = Memory::new();
    let at = memory.add(bytes, Protection::ReadWrite);
    let args = [at, u64::from(MEMORY_BYTES), 0, 0, 0];
    let interpreter = Interpreter::new(&program.insns).unwrap();
    let r0 = interpreter.run(args, &mut memory, &mut NoHost).unwrap();
    (r0, memory.read(at, u64::from(MEMORY_BYTES)).unwrap().to_vec())
}

fn run(pages: &Pages, words: &[u64; 8]) -> (u64, Vec<u8>) {
    let mut memory = *words;
    // SAFETY: the page holds a function of exactly this type, compiled from a program that was
    // verified for 64 bytes of memory.
    let function: extern "sysv64" fn(*mut u64, u64) -> u64 =
        unsafe { std::mem::transmute(pages.address()) };
    let r0 = function(memory.as_mut_ptr(), u64::from(MEMORY_BYTES));
    (r0, memory.iter().flat_map(|w| w.to_le_bytes()).collect())
}

fn compiled(verified: &Verified) -> Pages {
    let code = compile_plain(verified).unwrap();
    let bytes = code.resolve(|target| panic!("no {target:?} here"));
    let pages = Pages::new(bytes.len().next_multiple_of(4096));
    pages.write(0, &bytes);
    pages.executable();
    pages
}

#[test]
fn compiled_and_interpreted_agree() {
    for program in programs() {
        let context = Context::Memory { size_bytes: MEMORY_BYTES };
        let verified = verify(&program, &[], context).unwrap_or_else(|e| panic!("{e:#?}"));
        let calls = verified.facts().iter().filter(|f| matches!(f, Fact::CallLocal { .. }));
        assert!(calls.count() >= 4, "the compiler has inlined them");
        let pages = compiled(&verified);
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let words = proptest::array::uniform8(any::<u64>());
        let outcome = runner.run(&words, |words| {
            prop_assert_eq!(run(&pages, &words), interpret(&program, &words));
            Ok(())
        });
        outcome.unwrap();
    }
}
