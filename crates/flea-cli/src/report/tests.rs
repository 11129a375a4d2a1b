//! Reports of classic mistakes: `tests/reports/mistakes.bpf.c`, what is told of each in
//! `reports.txt` beside it. `UPDATE_EXPECT=1 cargo test -p flea-cli --bin flea` writes it: look at
//! the difference before it is committed.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::PathBuf;
use std::process::Command;

use expect_test::expect_file;
use flea_fixtures::{Tool, require};
use flea_object::spec::{Object, Program};
use flea_verifier::{Context, Verifier};

use super::*;

/// A function of two arguments.
const CONTEXT: Context = Context::Tracing { n_args: 2, n_results: 0, session: false };

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/reports")
}

/// The object that is kept.
fn mistakes() -> Object {
    flea_object::parse(&std::fs::read(directory().join("mistakes.bpf.o")).unwrap()).unwrap()
}

fn refusal(program: &Program, object: &Object) -> Rejection {
    let verdict = Verifier::new(program, &object.maps, CONTEXT).verify();
    verdict.expect_err(&format!("{} is a mistake", program.name))
}

#[test]
fn what_is_told_of_classic_mistakes() {
    let object = mistakes();
    assert!(object.programs.len() >= 30, "only {} mistakes", object.programs.len());
    let told = |program| text(&refusal(program, &object));
    let reports = object.programs.iter().map(|p| format!("== {}\n{}\n\n", p.name, told(p)));
    expect_file![directory().join("reports.txt")].assert_eq(&reports.collect::<String>());
}

/// Whatever the compiler makes of them, they are refused for the same reasons.
#[test]
fn the_source_is_what_the_kept_object_was_made_from() {
    let Some(clang) = require(Tool::Clang) else { return };
    let made = std::env::temp_dir().join(format!("flea-mistakes-{}.o", std::process::id()));
    let mut command = Command::new(clang);
    command.args(["-target", "bpf", "-O2", "-g", "-c", "mistakes.bpf.c", "-o"]).arg(&made);
    let output = command.current_dir(directory()).output().unwrap();
    let bytes = std::fs::read(&made);
    let _ = std::fs::remove_file(&made);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (fresh, kept) = (flea_object::parse(&bytes.unwrap()).unwrap(), mistakes());
    assert_eq!(fresh.programs.len(), kept.programs.len());
    // Registers and offsets may differ: what is left of the words once digits are gone.
    let words = |message: &str| message.replace(|c: char| c.is_ascii_digit(), "");
    for (fresh_program, kept_program) in fresh.programs.iter().zip(&kept.programs) {
        let (a, b) = (refusal(fresh_program, &fresh), refusal(kept_program, &kept));
        assert_eq!(words(&a.message), words(&b.message), "{}", fresh_program.name);
        let line = |r: &Rejection| r.place.as_ref().and_then(|p| p.line.as_ref()).map(|l| l.number);
        assert_eq!(line(&a), line(&b), "{}", fresh_program.name);
    }
}

/// Nothing is told of a program that the complete log does not show as well.
#[test]
fn the_complete_log_of_a_refusal_and_of_a_proof() {
    let object = mistakes();
    let log = |program: &Program| {
        let mut lines = Vec::new();
        let verifier = Verifier::new(program, &object.maps, CONTEXT);
        let verdict = verifier.verify_logged(&mut |line| lines.push(line.to_owned()));
        (lines, verdict)
    };
    let of = |name: &str| object.programs.iter().find(|p| p.name == name).unwrap();
    let (lines, verdict) = log(of("mask_too_wide"));
    assert!(lines.contains(&verdict.unwrap_err().message), "{lines:#?}");
    assert!(lines.last().unwrap().starts_with("processed "), "{lines:#?}");

    let mut mended = of("mask_too_wide").clone();
    let mask = mended.insns.iter_mut().find(|insn| insn.opcode == 0x57 && insn.imm == 15).unwrap();
    mask.imm = 7;
    let (lines, verdict) = log(&mended);
    verdict.unwrap();
    expect_file![directory().join("log.txt")].assert_eq(&(lines.join("\n") + "\n"));
}
