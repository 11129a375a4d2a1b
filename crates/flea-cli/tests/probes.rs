//! `flea run` with probes that were written for the kernel: uprobe, uretprobe and `.multi`
//! sections, as clang compiles them with libbpf's headers.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{CBuild, Fixture, Report, Tool, build, require, spawn_waiting};
use serde_json::Value;
use support::{Records, TempFile, Tracing, ask, assert_clean, flea};

/// `None` where there is no clang or no libbpf, which was printed.
fn compile(source: &Path, program: &Path) -> Result<Option<TempFile>> {
    let (Some(clang), Some(_)) = (require(Tool::Clang), require(Tool::LibbpfHeaders)) else {
        return Ok(None);
    };
    let object = TempFile::new("probes.bpf.o");
    let output = Command::new(clang)
        .args(["-target", "bpf", "-O2", "-g", "-Wall", "-mcpu=v3", "-D__TARGET_ARCH_x86"])
        .arg(format!("-DBIN=\"{}\"", program.display()))
        .args(["-I", "/usr/include/x86_64-linux-gnu", "-c"])
        .arg(source)
        .arg("-o")
        .arg(&object.0)
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(Some(object))
}

/// A map with numbers for keys and values.
fn elements(records: &Records, map: &str) -> BTreeMap<u64, u64> {
    let of_map = records.of("map").filter(|r| r["map"] == map);
    of_map.map(|r| (r["key"].as_u64().unwrap(), r["value"].as_u64().unwrap())).collect()
}

/// The words of `struct seen`.
fn seen(records: &Records) -> Result<Vec<u64>> {
    let bss = records.of("map").find(|r| r["map"] == ".bss").context("no .bss")?;
    let hex = bss["value"].as_str().context("hex bytes")?;
    let byte = |i: usize| u8::from_str_radix(&hex[i * 2..i * 2 + 2], 16);
    let bytes = (0..hex.len() / 2).map(byte).collect::<Result<Vec<_>, _>>()?;
    Ok(bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect())
}

/// The addresses of the program's functions that can be attached to.
fn addresses(pid: u32) -> Result<BTreeMap<String, u64>> {
    let records = ask(&["list", "/proc/self/exe:*", "-p", &pid.to_string()])?;
    let mut found = BTreeMap::new();
    for record in records.of("function").filter(|r| r["site"] != "refused") {
        let text = |field: &str| record[field].as_str().context("text").map(str::to_owned);
        let address = u64::from_str_radix(text("address")?.trim_start_matches("0x"), 16)?;
        found.insert(text("function")?, address);
    }
    Ok(found)
}

fn check(records: &Records, report: &Report, addresses: &BTreeMap<String, u64>) -> Result<()> {
    records.assert_complete()?;
    let of = |name: &str| report.functions[name];
    let per_round = report.calls * report.threads;
    let words = seen(records)?;
    let [adds, add_sum, stack_args, wrong_returns, wrong_frames, cookies, some, ..] = words[..]
    else {
        anyhow::bail!("{} words", words.len());
    };
    assert_eq!(adds, of("add").count);
    assert_eq!(add_sum, 0, "arguments at entry, less results at exit");
    assert_eq!(stack_args.cast_signed(), -8 * i64::try_from(per_round)?);
    assert_eq!((wrong_returns, wrong_frames, cookies), (0, 0, 0));
    assert_eq!(some, of("tail").count + of("tail_end").count);
    assert_eq!(words[7], 0, "nobody asked for it");
    for (map, is_return) in [("entries", false), ("returns", true)] {
        let counted = elements(records, map);
        for (name, tally) in &report.functions {
            let Some(address) = addresses.get(name) else { continue };
            // A function that `.multi` left out (no stack words known) has no count at all.
            let count = counted.get(address).copied();
            ensure!(
                count == Some(tally.count) || (is_return && count.is_none()),
                "{map}: {name} was called {} times, {count:?} were counted",
                tally.count
            );
        }
        assert_eq!(counted.get(&addresses["add"]), Some(&of("add").count), "{map}");
        assert_eq!(counted.get(&addresses["big"]), Some(&of("big").count), "{map}");
    }
    Ok(())
}

#[test]
fn probes_of_the_kernel_run_unchanged() -> Result<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bpf/probes.bpf.c");
    for variant in [CBuild::O2, CBuild::NopMcount, CBuild::Static] {
        let fixture = Fixture::CountsC(variant);
        let Some(program) = build(fixture) else { return Ok(()) };
        let Some(object) = compile(&source, &program)? else { return Ok(()) };
        let Some(mut target) = spawn_waiting(fixture, 4, 240)? else { return Ok(()) };
        let addresses = addresses(target.pid())?;
        let file = object.0.to_str().context("a path")?;
        let tracing = Tracing::attach(&["run", file], target.pid())?;
        let left_out: Vec<_> = tracing.said.iter().filter(|l| l.contains("left out")).collect();
        // `leaf` has no argument, `tail` has one.
        assert!(
            left_out.iter().any(|line| line.contains("`second_argument`")
                && line.contains("program not accepted for its signature: ")),
            "{:?}",
            tracing.said
        );
        let report = target.run_counts()?;
        let records = tracing.stop()?;
        assert!(records.summary("refused")? > 0);
        // Its main thread waits in a function that `every_return` was on: that image stays until
        // it returns.
        assert_eq!(ask(&["ps", "-p", &target.pid().to_string()])?.of("attached").count(), 0);
        assert_eq!(report.errors, 0);
        check(&records, &report, &addresses).with_context(|| format!("{variant:?}"))?;
        target.finish_counts()?;
    }
    Ok(())
}

/// Runs an object that is refused: what `flea` says.
fn refused(source: &str) -> Result<Option<String>> {
    let Some(program) = build(Fixture::CountsC(CBuild::O2)) else { return Ok(None) };
    let file = TempFile::new("refused.bpf.c");
    let prologue = "#include <linux/bpf.h>\n#include <linux/ptrace.h>\n\
                    #include <bpf/bpf_helpers.h>\n#include <bpf/bpf_tracing.h>\n\
                    char LICENSE[] SEC(\"license\") = \"GPL\";\n";
    std::fs::write(&file.0, format!("{prologue}{source}"))?;
    let Some(object) = compile(&file.0, &program)? else { return Ok(None) };
    let Some(mut target) = spawn_waiting(Fixture::CountsC(CBuild::O2), 1, 8)? else {
        return Ok(None);
    };
    let output =
        flea().arg("run").arg(&object.0).arg("-p").arg(target.pid().to_string()).output()?;
    assert_eq!(output.status.code(), Some(1));
    assert_clean(target.pid())?;
    assert_eq!(target.run_counts()?.errors, 0);
    target.finish_counts()?;
    Ok(Some(String::from_utf8(output.stderr)?))
}

#[test]
fn what_is_refused_says_why() -> Result<()> {
    for (source, expected) in [
        (
            "SEC(\"uprobe/add+4\") int f(struct pt_regs *ctx) { return 0; }",
            "programs are attached to a function's entry, not 4 bytes behind it",
        ),
        (
            "SEC(\"uprobe/add\") int f(struct pt_regs *ctx) { ctx->rax = 1; return 0; }",
            "invalid bpf_context access off=80 size=8",
        ),
        (
            "SEC(\"uprobe\") int f(struct pt_regs *ctx) { return 0; }",
            "its section names no function; write SEC(\"uprobe/FUNCTION\")",
        ),
        (
            "SEC(\"uprobe//no/such/file:add\") int f(struct pt_regs *ctx) { return 0; }",
            "no loaded module has that name",
        ),
        // Nothing is left of what the pattern names.
        (
            "SEC(\"fexit.multi/lea?\") int f(__u64 *ctx) { return ctx[5] == 1; }",
            "invalid bpf_context access off=40 size=8; nothing was changed",
        ),
    ] {
        let Some(said) = refused(source)? else { return Ok(()) };
        assert!(said.contains(expected), "{source}\n{said}");
    }
    Ok(())
}

/// As libbpf finds it: in whatever directory the library is.
#[test]
fn a_probe_by_library_name() -> Result<()> {
    let Some(program) = build(Fixture::CountsC(CBuild::O2)) else { return Ok(()) };
    let file = TempFile::new("strlen.bpf.c");
    std::fs::write(
        &file.0,
        "#include <linux/bpf.h>\n#include <linux/ptrace.h>\n#include <bpf/bpf_helpers.h>\n\
         #include <bpf/bpf_tracing.h>\n\
         __u64 calls;\n\
         SEC(\"uprobe/libc.so.6:exit\") int f(struct pt_regs *ctx)\n\
         { calls += 1000 + PT_REGS_PARM1(ctx); return 0; }\n\
         char LICENSE[] SEC(\"license\") = \"GPL\";\n",
    )?;
    let Some(object) = compile(&file.0, &program)? else { return Ok(()) };
    let output = flea().args(["run", "--json"]).arg(&object.0).args(["--", "false"]).output()?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8(output.stdout)?;
    let lines = text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    let bss = lines.iter().find(|r| r["map"] == ".bss").context("no .bss")?;
    assert_eq!(bss["value"], 1001);
    Ok(())
}
