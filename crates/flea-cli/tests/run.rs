//! `flea run` with an object made by clang: what its programs found out is exact.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::{collections::BTreeMap, process::Command};

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{CBuild, Fixture, Report, Tool, build, require, spawn_waiting};
use serde_json::Value;
use support::{Records, TempFile, Tracing, ask, assert_clean, compile_bpf, flea};

/// The elements of a map, added up over threads.
fn elements(records: &Records, map: &str) -> BTreeMap<u64, u64> {
    let sum = |value: &Value| match value {
        Value::Array(per_thread) => per_thread.iter().filter_map(Value::as_u64).sum(),
        one => one.as_u64().unwrap(),
    };
    let of_map = records.of("map").filter(|r| r["map"] == map);
    of_map.map(|r| (r["key"].as_u64().unwrap(), sum(&r["value"]))).collect()
}

/// The words of `struct seen`.
fn seen(records: &Records) -> Result<Vec<u64>> {
    let bss = records.of("map").find(|r| r["map"] == ".bss").context("no .bss")?;
    let hex = bss["value"].as_str().context("hex bytes")?;
    let byte = |i: usize| u8::from_str_radix(&hex[i * 2..i * 2 + 2], 16);
    let bytes = (0..hex.len() / 2).map(byte).collect::<Result<Vec<_>, _>>()?;
    Ok(bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect())
}

fn check(records: &Records, report: &Report, pid: u32, big: &str, program: &str) -> Result<()> {
    records.assert_complete()?;
    let of = |name: &str| report.functions[name];
    let per_round = report.calls * report.threads;
    assert_eq!(report.calls % 8, 0);

    let eighth = per_round / 8;
    assert_eq!(elements(records, "chosen"), (0..8).map(|n| (n, eighth)).collect());
    let lengths = [0, 1, 4, 25].map(|length| (length, per_round / 4));
    assert_eq!(elements(records, "lengths"), lengths.into());
    assert_eq!(elements(records, "leaves"), [(1, of("leaf").count)].into());
    assert_eq!(elements(records, "depths"), (0..6).map(|n| (n, per_round)).collect());
    let lines: Vec<_> = records.of("printk").map(|r| r["message"].as_str().unwrap()).collect();
    assert_eq!(lines, vec!["choose 5 of eight"; usize::try_from(eighth)?]);

    let words = seen(records)?;
    let [string_bytes, wrong_strings, stack_args, results, arg_cnt, ip, cookies, ..] = words[..]
    else {
        anyhow::bail!("{} words", words.len());
    };
    assert_eq!(string_bytes, of("str").retval_sum.cast_unsigned() + of("str").count);
    assert_eq!(wrong_strings, 0);
    assert_eq!(stack_args.cast_signed(), -8 * i64::try_from(per_round)?);
    assert_eq!(results.cast_signed(), of("big").retval_sum);
    assert_eq!((arg_cnt, format!("{ip:#x}"), cookies), (8, big.to_owned(), 0));
    assert_eq!((words[7], words[8]), (u64::from(pid), 0), "pid, others");
    let comm: Vec<u8> = words[9..11].iter().flat_map(|word| word.to_le_bytes()).collect();
    let comm = String::from_utf8(comm)?;
    assert_eq!(comm.trim_end_matches('\0'), &program[..program.len().min(15)]);
    assert_eq!(words[11], 0, "the clock went backwards");
    assert_eq!(words[12], of("hidden").count);
    assert_eq!(words[13].cast_signed(), of("hidden").retval_sum);
    assert_eq!(words[14], 0, "cookies that were another call's");
    // 8 bytes of header, 24 of event; seen by a later call of `add`.
    assert!(words[15] > 0 && words[15] <= 32 * of("tail").count && words[15] % 32 == 0);
    assert_eq!(words[16], 0, "arguments at entry, less results at exit");
    let data = elements(records, ".data");
    assert_eq!(data, [(0, u64::from(pid))].into());
    Ok(())
}

fn address(pid: u32, function: &str) -> Result<String> {
    let records = ask(&["list", function, "-p", &pid.to_string()])?;
    Ok(records.one("function", function)?["address"].as_str().context("address")?.to_owned())
}

#[test]
fn an_object_on_a_running_program() -> Result<()> {
    for (isa, variant) in
        [("v3", CBuild::O2), ("v2", CBuild::NopMcount), ("v3", CBuild::Static), ("v3", CBuild::O0)]
    {
        let Some(object) = compile_bpf("everything.bpf.c", isa)? else { return Ok(()) };
        let fixture = Fixture::CountsC(variant);
        let Some(mut target) = spawn_waiting(fixture, 4, 240)? else { return Ok(()) };
        let file = object.0.to_str().context("a path")?;
        let tracing = Tracing::attach(&["run", file], target.pid())?;
        let big = address(target.pid(), "big")?;
        let report = target.run_counts()?;
        let records = tracing.stop()?;
        assert_clean(target.pid())?;
        assert_eq!(report.errors, 0);
        let name = build(fixture).context("it was built")?;
        let name = name.file_name().context("a name")?.to_string_lossy().into_owned();
        check(&records, &report, target.pid(), &big, &name)
            .with_context(|| format!("{isa} {variant:?}"))?;
        target.finish_counts()?;
    }
    Ok(())
}

/// Which maps are in a map of maps is printed, and what is in those under their own names; counts
/// that threads change under a lock are whole.
#[test]
fn maps_of_maps_and_locks() -> Result<()> {
    let Some(object) = compile_bpf("inner.bpf.c", "v3")? else { return Ok(()) };
    let Some(mut target) = spawn_waiting(Fixture::CountsC(CBuild::O2), 4, 240)? else {
        return Ok(());
    };
    let file = object.0.to_str().context("a path")?;
    let tracing = Tracing::attach(&["run", file], target.pid())?;
    let report = target.run_counts()?;
    let records = tracing.stop()?;
    assert_clean(target.pid())?;
    let inner = |map: &str| {
        let of_map = records.of("map").filter(|r| r["map"] == map);
        of_map.map(|r| (r["key"].as_u64().unwrap(), r["value"].as_str().unwrap())).collect()
    };
    let halves: Vec<(u64, &str)> = inner("halves");
    assert_eq!(halves, [(0, "even"), (1, "odd")]);
    let by_name: Vec<(u64, &str)> = inner("by_name");
    assert_eq!(by_name, [(7, "odd")]);

    let (even, odd) = (elements(&records, "even"), elements(&records, "odd"));
    assert_eq!(even.keys().copied().collect::<Vec<_>>(), [0, 2, 4, 6]);
    assert_eq!(odd.keys().copied().collect::<Vec<_>>(), [1, 3, 5, 7]);
    // Who waited too long for a lock, on a busy machine, is counted.
    let missed = records.summary("missed")?;
    let counted: u64 = even.values().chain(odd.values()).sum();
    assert_eq!(counted + missed, report.calls * report.threads);
    target.finish_counts()
}

/// Refused as a whole, in the verifier's words, before anything is changed.
#[test]
fn an_object_that_could_do_harm() -> Result<()> {
    let Some(clang) = require(Tool::Clang) else { return Ok(()) };
    let source = TempFile::new("bad.bpf.c");
    let object = TempFile::new("bad.bpf.o");
    std::fs::write(
        &source.0,
        "__attribute__((section(\"fentry/add\"), used))\n\
         int reads_anywhere(unsigned long long *ctx) { return *(int *)ctx[0]; }\n\
         char LICENSE[] __attribute__((section(\"license\"), used)) = \"GPL\";\n",
    )?;
    let status = Command::new(clang)
        .args(["-target", "bpf", "-O2", "-g", "-c"])
        .arg(&source.0)
        .arg("-o")
        .arg(&object.0)
        .status()?;
    ensure!(status.success());
    let Some(mut target) = spawn_waiting(Fixture::CountsC(CBuild::O2), 1, 8)? else {
        return Ok(());
    };
    let output =
        flea().arg("run").arg(&object.0).arg("-p").arg(target.pid().to_string()).output()?;
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr)?;
    assert!(said.contains("R1 invalid mem access 'scalar'"), "{said}");
    assert!(said.contains("nothing was changed"), "{said}");
    assert_clean(target.pid())?;
    let report = target.run_counts()?;
    assert_eq!((report.errors, report.functions["add"].count), (0, 9));
    target.finish_counts()
}
