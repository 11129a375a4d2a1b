//! gdb and perf, which look at a process from outside, show the traced functions and their
//! callers.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::fs::Permissions;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use flea_fixtures::{CBuild, Fixture, Running, Tool, build, require};
use support::{TempFile, Tracing, assert_clean, flea};

/// Called by each other, the innermost first; all but the last one are traced.
const CALLERS: [&str; 3] = ["w_middle", "w_outer", "main"];

fn start(fixture: Fixture, scenario: &str) -> Result<Option<Running>> {
    let Some(program) = build(fixture) else { return Ok(None) };
    let mut target = Running::start(Command::new(program).args([scenario, "wait"]))?;
    target.expect_line("ready")?;
    Ok(Some(target))
}

/// The functions in a backtrace, as gdb prints it.
fn gdb_functions(gdb: &Path, script: &Path, pid: u32) -> Result<Vec<String>> {
    let output = Command::new(gdb)
        .args(["-nx", "-batch", "-x"])
        .arg(script)
        .args(["-p", &pid.to_string(), "-ex", "bt", "-ex", "detach"])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    // `#1  0x5555 in name (...)` or `#1  name (...)`
    let name = |line: &str| {
        let rest = line.strip_prefix('#')?.split_once(' ')?.1;
        let rest = rest.split_once(" in ").map_or(rest, |(_, rest)| rest);
        Some(rest.split_once(" (")?.0.trim().to_owned())
    };
    let names: Vec<String> = text.lines().filter_map(name).collect();
    ensure!(!names.is_empty(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    Ok(names)
}

/// Whether `names` has `wanted` in this order.
fn has_in_order(names: &[String], wanted: &[&str]) -> bool {
    let mut names = names.iter();
    wanted.iter().all(|wanted| names.any(|name| name == wanted))
}

#[test]
fn by_gdb() -> Result<()> {
    let Some(gdb) = require(Tool::Gdb) else { return Ok(()) };
    let script = TempFile::new("flea.py");
    let printed = flea().arg("gdb-script").output()?;
    assert_eq!(printed.status.code(), Some(0));
    std::fs::write(&script.0, printed.stdout)?;
    for variant in [CBuild::O0, CBuild::O2, CBuild::Static, CBuild::ClangPatchable5] {
        let Some(mut target) = start(Fixture::StacksC(variant), "inside")? else { return Ok(()) };
        let pid = target.pid();
        let latency = Tracing::attach(&["latency", "w_*"], pid)?;
        target.send("go")?;
        target.expect_line("inside")?;
        let names = gdb_functions(&gdb, &script.0, pid)?;
        let wanted: Vec<&str> =
            ["w_waits"].iter().chain(&CALLERS).flat_map(|name| ["[flea]", *name]).collect();
        ensure!(has_in_order(&names, &wanted[1..]), "{variant:?}: {names:?}");
        // The frames are there for as long as the calls take.
        latency.stop()?;
        let names = gdb_functions(&gdb, &script.0, pid)?;
        ensure!(has_in_order(&names, &wanted[1..]), "{variant:?}, detached: {names:?}");
        target.send("on")?;
        target.expect_line("30")?;
        target.expect_line("done")?;
        Tracing::attach(&["count", "w_walks"], pid)?.stop()?;
        assert_clean(pid)?;
        target.send("end")?;
        assert_eq!(target.wait()?.code(), Some(7), "{variant:?}");
    }
    Ok(())
}

/// What perf says: the functions of each sample, the innermost first. `None`, said on stderr,
/// where the kernel does not let it sample.
fn perf_samples(perf: &Path, call_graph: &str, pid: u32) -> Result<Option<Vec<Vec<String>>>> {
    let data = TempFile::new("perf.data");
    let recorded = Command::new(perf)
        .args(["record", "-q", "-e", "cpu-clock:u", "-F", "999", "--call-graph", call_graph])
        .args(["-p", &pid.to_string(), "-o"])
        .arg(&data.0)
        .args(["--", "sleep", "0.5"])
        .output()?;
    let said = String::from_utf8_lossy(&recorded.stderr);
    if !recorded.status.success() {
        ensure!(!std::env::var("CI").is_ok_and(|ci| ci == "true"), "{said}");
        eprintln!("skipped: perf cannot record: {said}");
        return Ok(None);
    }
    let script = Command::new(perf)
        .args(["script", "--no-inline", "-F", "ip,sym", "-i"])
        .arg(&data.0)
        .output()?;
    let text = String::from_utf8(script.stdout)?;
    let functions = |sample: &str| -> Vec<String> {
        let lines = sample.lines().filter_map(|line| line.trim().split_once(' '));
        lines.map(|(_, name)| name.to_owned()).collect()
    };
    Ok(Some(text.split("\n\n").map(functions).filter(|names| !names.is_empty()).collect()))
}

/// Of the samples inside the innermost function, most show all callers. (Some are taken in its
/// first instructions, before it has a frame pointer.)
fn check_perf(variant: CBuild, call_graph: &str, frames: Option<&Path>) -> Result<()> {
    let Some(perf) = require(Tool::Perf) else { return Ok(()) };
    let Some(mut target) = start(Fixture::StacksC(variant), "spins")? else { return Ok(()) };
    let pid = target.pid();
    let mut command = flea();
    // A file that happens to be installed here is not what is tested.
    command.env("FLEA_FRAMES_FILE", frames.unwrap_or(Path::new("/nowhere/flea-frames.so")));
    let mut latency = Tracing::start_by(command, &["latency", "w_*"], pid)?;
    latency.wait_attached()?;
    let is_mapped = std::fs::read_to_string(format!("/proc/{pid}/maps"))?.contains(FRAMES_FILE);
    assert_eq!(is_mapped, frames.is_some());
    target.send("go")?;
    let samples = perf_samples(&perf, call_graph, pid)?;
    let records = latency.stop()?;
    ensure!(records.functions("histogram").contains(&"w_spins".to_owned()));
    let Some(samples) = samples else { return Ok(()) };
    let inside: Vec<_> =
        samples.iter().filter(|names| names.first().is_some_and(|n| n == "w_spins")).collect();
    let whole = inside.iter().filter(|names| has_in_order(names, &CALLERS)).count();
    let last = inside.last();
    ensure!(whole > 0, "{variant:?} {call_graph}: none of {} samples, {last:?}", inside.len());
    ensure!(whole * 10 >= inside.len() * 9, "{whole} of {}, {last:?}", inside.len());
    Ok(())
}

#[test]
fn by_perf_with_frame_pointers() -> Result<()> {
    check_perf(CBuild::O0, "fp", None)
}

const FRAMES_FILE: &str = "flea-frames.so";

/// A directory with the file that perf needs, removed with its guard.
struct FramesFile(TempFile);

impl FramesFile {
    fn new() -> Result<Self> {
        let directory = TempFile::new("frames");
        std::fs::create_dir(&directory.0)?;
        let file = Self(directory);
        let made = flea().arg("frames-file").arg(file.path()).output()?;
        ensure!(made.status.success(), "{made:?}");
        Ok(file)
    }

    fn path(&self) -> PathBuf {
        self.0.0.join(FRAMES_FILE)
    }
}

impl Drop for FramesFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0.0);
    }
}

#[test]
fn by_perf_with_dwarf() -> Result<()> {
    let file = FramesFile::new()?;
    for variant in [CBuild::O0, CBuild::O2] {
        check_perf(variant, "dwarf", Some(&file.path()))?;
    }
    Ok(())
}

/// The file is a module of the process, and none of the program's; it goes with the rest. What
/// is not the file, or may be changed by anybody, is not used.
#[test]
fn the_frames_file_is_ours() -> Result<()> {
    let file = FramesFile::new()?;
    let path = file.path();
    let Some(mut target) = start(Fixture::StacksC(CBuild::O2), "walks")? else { return Ok(()) };
    let pid = target.pid();
    let attach = || -> Result<(Tracing, bool)> {
        let mut command = flea();
        command.env("FLEA_FRAMES_FILE", &path);
        let mut tracing = Tracing::start_by(command, &["latency", "w_*"], pid)?;
        tracing.wait_attached()?;
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
        Ok((tracing, maps.contains(FRAMES_FILE)))
    };
    let (tracing, is_mapped) = attach()?;
    ensure!(is_mapped, "{} was not mapped", path.display());
    let listed = flea().args(["list", "flea", "-p", &pid.to_string()]).output()?;
    assert_eq!(listed.status.code(), Some(1), "{listed:?}");
    // Making it anew leaves what is mapped as it is.
    ensure!(flea().arg("frames-file").arg(&path).output()?.status.success());
    Tracing::attach(&["count", "w_walks"], pid)?.stop()?;
    tracing.stop()?;
    assert_clean(pid)?;

    std::fs::set_permissions(&path, Permissions::from_mode(0o666))?;
    let (tracing, is_mapped) = attach()?;
    ensure!(!is_mapped, "anybody may write to it");
    tracing.stop()?;
    std::fs::set_permissions(&path, Permissions::from_mode(0o644))?;
    std::fs::OpenOptions::new().write(true).open(&path)?.write_all_at(b"other", 200)?;
    let (tracing, is_mapped) = attach()?;
    ensure!(!is_mapped, "it has other rows");
    target.send("go")?;
    target.expect_line("called: all functions, to the end")?;
    target.expect_line("interrupted: all functions, to the end")?;
    target.expect_line("done")?;
    tracing.stop()?;
    assert_clean(pid)?;
    target.send("end")?;
    assert_eq!(target.wait()?.code(), Some(7));
    let refused = flea().args(["frames-file", "frames.so"]).output()?;
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    Ok(())
}
