//! `flea types`, and what its header is for: an object that is compiled once runs on every build
//! of the target.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{Running, Tool, require};
use support::{TempFile, Tracing, assert_clean, flea};

fn directory() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/types")
}

fn run(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// A build of target.c; `None`, said on stderr, where there is no gcc.
fn build(flags: &[&str]) -> Result<Option<TempFile>> {
    let Some(gcc) = require(Tool::Gcc) else { return Ok(None) };
    let program = TempFile::new("target");
    let source = directory().join("target.c");
    run(Command::new(gcc).args(["-O2", "-w"]).args(flags).arg(source).arg("-o").arg(&program.0))?;
    Ok(Some(program))
}

/// The object for the older build; `None`, said on stderr, where it cannot be compiled.
fn object(older: &TempFile, flags: &[&str]) -> Result<Option<TempFile>> {
    let (Some(clang), Some(_)) = (require(Tool::Clang), require(Tool::LibbpfHeaders)) else {
        return Ok(None);
    };
    let header = TempFile::new("types.h");
    run(flea().arg("types").arg(&older.0).arg("describe").arg("-o").arg(&header.0))?;
    let object = TempFile::new("program.bpf.o");
    run(Command::new(clang)
        .args(["-target", "bpf", "-O2", "-g", "-Wall", "-I/usr/include/x86_64-linux-gnu"])
        .args(flags)
        .arg("-include")
        .arg(&header.0)
        .arg("-c")
        .arg(directory().join("program.bpf.c"))
        .arg("-o")
        .arg(&object.0))?;
    Ok(Some(object))
}

/// What the program on describe() found, and what the target says.
fn answers(object: &TempFile, target: &TempFile) -> Result<(Vec<i64>, Vec<i64>)> {
    let mut running = Running::start(&mut Command::new(&target.0))?;
    running.expect_line("ready")?;
    let words = ["run", object.0.to_str().unwrap()];
    let tracing = Tracing::attach(&words, running.pid())?;
    running.send("go")?;
    let line = running.line()?;
    let expected: Vec<i64> =
        line.split(' ').map(str::parse).collect::<Result<_, _>>().context(line.clone())?;
    let records = tracing.stop()?;
    assert_clean(running.pid())?;
    let mut found = vec![0; expected.len()];
    for record in records.of("map") {
        let key = usize::try_from(record["key"].as_u64().unwrap())?;
        found[key] = record["value"].as_u64().unwrap().cast_signed();
    }
    running.close_stdin();
    ensure!(running.wait()?.success());
    Ok((found, expected))
}

#[test]
fn one_object_runs_on_every_build() -> Result<()> {
    let older = ["-g"];
    let Some(oldest) = build(&older)? else { return Ok(()) };
    let Some(copying) = object(&oldest, &[])? else { return Ok(()) };
    let direct = object(&oldest, &["-DDIRECT"])?.context("clang was there before")?;
    let builds: [&[&str]; 5] = [
        &older,
        &["-g", "-DNEWER"],
        &["-gbtf", "-DNEWER"],
        &["-gdwarf-4", "-fdebug-types-section", "-O0", "-DNEWER"],
        &["-gbtf", "-O0"],
    ];
    for flags in builds {
        let target = build(flags)?.context("gcc was there before")?;
        for object in [&copying, &direct] {
            let (found, expected) = answers(object, &target)?;
            assert_eq!(found, expected, "{flags:?} {}", object.0.display());
            assert_eq!(found[0], 123_456_789_012);
        }
    }
    Ok(())
}

/// A program that reads, without asking, what a build does not have.
#[test]
fn a_missing_field_is_named() -> Result<()> {
    let Some(older) = build(&["-g"])? else { return Ok(()) };
    let Some(object) = object(&older, &["-DLIVE"])? else { return Ok(()) };
    let (found, expected) = answers(&object, &older)?;
    assert_eq!(found[3], expected[3]);
    let newer = build(&["-g", "-DNEWER"])?.context("gcc was there before")?;
    let mut running = Running::start(&mut Command::new(&newer.0))?;
    running.expect_line("ready")?;
    let pid = running.pid().to_string();
    let output = flea().arg("run").arg(&object.0).args(["-p", &pid]).output()?;
    let text = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("failed to resolve CO-RE relocation: field 'struct client.age'")
            && text.contains("ask first: bpf_core_field_exists"),
        "{text}"
    );
    assert_clean(running.pid())?;
    // Without debug information there is nothing to go by.
    let bare = build(&["-s"])?.context("gcc was there before")?;
    let output = flea().arg("types").arg(&bare.0).output()?;
    let text = String::from_utf8(output.stderr)?;
    assert!(text.contains("has no debug information that describes types"), "{text}");
    running.close_stdin();
    ensure!(running.wait()?.success());
    Ok(())
}

#[test]
fn header_of_a_process() -> Result<()> {
    let Some(target) = build(&["-g"])? else { return Ok(()) };
    let mut running = Running::start(&mut Command::new(&target.0))?;
    running.expect_line("ready")?;
    let pid = running.pid().to_string();
    let header = |names: &[&str]| -> Result<String> {
        let mut command = flea();
        Ok(String::from_utf8(run(command.args(["types", "-p", &pid]).args(names))?)?)
    };
    let of_function = header(&["describe"])?;
    assert!(of_function.contains("\nstruct client {\n"), "{of_function}");
    assert!(of_function.contains("\tunsigned int kind : 5;\n"), "{of_function}");
    let of_type = header(&["address"])?;
    assert!(of_type.contains("struct address {\n\tunsigned short port;\n};"), "{of_type}");
    assert!(!of_type.contains("client"), "{of_type}");
    let all = header(&[])?;
    assert!(all.contains("struct client {") && all.contains("enum state {"), "{all}");
    let output = flea().args(["types", "-p", &pid, "describe", "no_such"]).output()?;
    let text = String::from_utf8(output.stderr)?;
    assert!(text.contains("has neither a function nor a type called no_such"), "{text}");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(flea().arg("types").output()?.status.code(), Some(2));
    running.close_stdin();
    ensure!(running.wait()?.success());
    Ok(())
}
