//! What must hold when nothing is attached any more: all code is what its files say, and nothing
//! of Flea is left in the process.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use flea::builtin::Count;
use flea::{Pid, Session};

use super::bout::Bout;
use super::refusals::is_alive;
use super::target::Target;

/// How long threads may need to leave what was traced.
const PATIENCE: Duration = Duration::from_secs(15);
/// How many controllers come, at least: on a busy machine each takes seconds.
const MIN_VISITS: u32 = 10;
const JUMP_BYTES: u64 = 5;

/// Takes everything off, and looks. How many processes keep memory of ours, because a thread of
/// theirs waits in a function that was traced.
pub fn check(bout: &Bout<'_>, target: &dyn Target) -> Result<usize> {
    let pids = target.pids();
    let mut files = HashMap::new();
    let mut n_keep = 0;
    for pid in pids {
        let outcome = check_one(bout, pid, &mut files);
        match outcome {
            Ok(kept) => n_keep += usize::from(kept),
            // A process of a server may end at any time.
            Err(_) if !is_alive(pid) => {}
            Err(error) => return Err(error.context(format!("process {pid} at the end"))),
        }
    }
    Ok(n_keep)
}

fn check_one(bout: &Bout<'_>, pid: Pid, files: &mut HashMap<PathBuf, Vec<u8>>) -> Result<bool> {
    if !flea::attached::in_process(pid)?.is_empty() {
        let output = Command::new(&bout.flea).args(["detach", &pid.to_string()]).output()?;
        ensure!(output.status.success(), "flea detach: {output:?}");
    }
    let left = flea::attached::in_process(pid)?;
    ensure!(left.is_empty(), "attached after `flea detach`: {left:?}");
    let begun = Instant::now();
    let mut ours = our_mappings(pid)?;
    let mut n_came = 0;
    while !ours.is_empty() && (begun.elapsed() < PATIENCE || n_came < MIN_VISITS) {
        // The next controller that comes frees what nobody is in any more.
        come_and_go(pid)?;
        n_came += 1;
        ours = our_mappings(pid)?;
        std::thread::sleep(Duration::from_millis(20));
    }
    let told = if ours.is_empty() { Vec::new() } else { unwinders(pid)? };
    compare_code(pid, files, &told)?;
    Ok(!ours.is_empty())
}

/// Where a process whose thread waits in a traced function may still have a jump of ours: an
/// exception may yet pass through that function's frame, and its unwinder has to know that.
fn unwinders(pid: Pid) -> Result<Vec<u64>> {
    let session = Session::attach(pid)?;
    let names = ["_Unwind_Find_FDE", "_dl_find_object"];
    // A process that has none of a name has no such function.
    let functions = names.iter().flat_map(|name| session.find(name).unwrap_or_default());
    Ok(functions.filter_map(|function| Some(function.site().ok()?.address.0)).collect())
}

/// One attachment, on and off.
fn come_and_go(pid: Pid) -> Result<()> {
    let session = Session::attach(pid)?;
    let mut functions = session.find("libc.so.6:malloc")?;
    functions.retain(|function| function.site().is_ok());
    functions.truncate(1);
    let mut count = Count::start(&session, &functions)?;
    count.detach()?;
    Ok(())
}

/// The lines of `/proc/PID/maps` about memory of ours.
pub fn our_mappings(pid: Pid) -> Result<Vec<String>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let is_ours = |line: &&str| line.contains("/memfd:flea") || line.contains("/flea-frames.so");
    Ok(maps.lines().filter(is_ours).map(str::to_owned).collect())
}

/// Compares all code that is mapped from a file with the file, but for jumps at `told`.
fn compare_code(pid: Pid, files: &mut HashMap<PathBuf, Vec<u8>>, told: &[u64]) -> Result<()> {
    let is_told = |at: u64| told.iter().any(|&start| (start..start + JUMP_BYTES).contains(&at));
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = fs::File::open(format!("/proc/{pid}/mem"))?;
    let mut n_compared = 0;
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let &[range, perms, offset, _, _, path] = fields.as_slice() else { continue };
        let of_file = perms.contains('x') && path.starts_with('/');
        if !of_file || path.starts_with("/memfd:") || path.ends_with("/flea-frames.so") {
            continue;
        }
        let (start, end) = range.split_once('-').context("a range")?;
        let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
        let mut now = vec![0; usize::try_from(end - start)?];
        memory.read_exact_at(&mut now, start).with_context(|| format!("reading {line}"))?;
        let file = PathBuf::from(format!("/proc/{pid}/root{path}"));
        let stated =
            files.entry(path.into()).or_insert_with(|| fs::read(&file).unwrap_or_default());
        let from = usize::try_from(u64::from_str_radix(offset, 16)?)?;
        let Some(stated) = stated.get(from..) else { bail!("{path} has become shorter") };
        let mut pairs = (start..).zip(now.iter().zip(stated));
        if let Some(at) = pairs.position(|(at, (a, b))| a != b && !is_told(at)) {
            let until = (at + 16).min(now.len());
            bail!(
                "lost text: {path} differs at {from:#x} + {at:#x}: {:02x?}, not {:02x?}",
                &now[at..until],
                stated.get(at..until).unwrap_or_default()
            );
        }
        n_compared += 1;
    }
    ensure!(n_compared > 0, "no code was compared");
    Ok(())
}
