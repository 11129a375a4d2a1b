//! `flea` as a person starts it, and what it leaves behind in a process.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use flea_fixtures::{Running, Tool, require};
use nix::sys::signal::Signal;
use serde_json::Value;

/// A debug build indexes a large binary on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The command.
pub fn flea() -> Command {
    Command::new(env!("CARGO_BIN_EXE_flea"))
}

/// A file of this test alone, removed with its guard.
pub struct TempFile(pub PathBuf);

impl TempFile {
    pub fn new(name: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}-{name}", std::process::id());
        Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name))
    }

    pub fn records(&self) -> Result<Vec<Value>> {
        fs::read_to_string(&self.0)?.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Compiles `tests/bpf/SOURCE`. `None` where there is no clang or no libbpf, which was printed.
pub fn compile_bpf(source: &str, isa: &str) -> Result<Option<TempFile>> {
    let (Some(clang), Some(_)) = (require(Tool::Clang), require(Tool::LibbpfHeaders)) else {
        return Ok(None);
    };
    let object = TempFile::new(&source.replace(".c", ".o"));
    let output = Command::new(clang)
        .args(["-target", "bpf", "-O2", "-g", "-Wall", &format!("-mcpu={isa}")])
        .args(["-D__TARGET_ARCH_x86", "-I", "/usr/include/x86_64-linux-gnu", "-c"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bpf").join(source))
        .arg("-o")
        .arg(&object.0)
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(Some(object))
}

/// A `flea` that traces a running process and writes JSON to a file.
pub struct Tracing {
    running: Running,
    output: TempFile,
    /// What it said on stderr before it was attached.
    pub said: Vec<String>,
}

/// What a tracing command printed.
#[derive(Debug)]
pub struct Records(pub Vec<Value>);

impl Tracing {
    /// Starts `flea WORDS --json -p PID`; it may not be attached yet.
    pub fn start<S: AsRef<str>>(words: &[S], pid: u32) -> Result<Self> {
        Self::start_by(flea(), words, pid)
    }

    /// The same by a `flea` that is given, with an environment of its own for example.
    pub fn start_by<S: AsRef<str>>(mut command: Command, words: &[S], pid: u32) -> Result<Self> {
        let output = TempFile::new("records");
        command.args(words.iter().map(AsRef::as_ref)).arg("--json").arg("--output");
        command.arg(&output.0).arg("-p").arg(pid.to_string());
        Ok(Self { running: Running::start(&mut command)?, output, said: Vec::new() })
    }

    /// Starts it and waits until everything is in place.
    pub fn attach<S: AsRef<str>>(words: &[S], pid: u32) -> Result<Self> {
        let mut tracing = Self::start(words, pid)?;
        tracing.wait_attached()?;
        Ok(tracing)
    }

    /// Waits for its word that everything is in place.
    pub fn wait_attached(&mut self) -> Result<()> {
        self.wait_said("flea: attached to ")
    }

    /// Waits for a line on stderr that contains this.
    pub fn wait_said(&mut self, what: &str) -> Result<()> {
        loop {
            let line = self
                .running
                .stderr_line_within(PATIENCE)
                .with_context(|| format!("not `{what}`; it said {:?}", self.said))?;
            if line.contains(what) {
                return Ok(());
            }
            self.said.push(line);
        }
    }

    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// Ctrl-C: what it found out.
    pub fn stop(mut self) -> Result<Records> {
        self.running.signal(Signal::SIGINT)?;
        let status = self.running.wait_within(PATIENCE)?;
        let said = self.running.rest_of_stderr();
        ensure!(status.code() == Some(0), "flea ended with {status}: {said:?}");
        Ok(Records(self.output.records()?))
    }

    /// SIGKILL: it can do nothing about what is attached.
    pub fn kill(mut self) -> Result<()> {
        self.running.signal(Signal::SIGKILL)?;
        self.running.wait()?;
        Ok(())
    }

    /// Its end, because the target has ended.
    pub fn wait(mut self) -> Result<(ExitStatus, Records)> {
        let status = self.running.wait_within(PATIENCE)?;
        Ok((status, Records(self.output.records()?)))
    }
}

impl Records {
    /// Those of a type.
    pub fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter(move |r| r["type"] == kind)
    }

    /// The one of this type about this function.
    pub fn one(&self, kind: &str, function: &str) -> Result<&Value> {
        let mut found = self.0.iter().filter(|r| r["type"] == kind && r["function"] == function);
        let Some(one) = found.next() else {
            bail!("no {kind} of `{function}` in {:#?}", self.0);
        };
        ensure!(found.next().is_none(), "two records about {function}");
        Ok(one)
    }

    /// The functions that records of this type are about.
    pub fn functions(&self, kind: &str) -> Vec<String> {
        let mut names: Vec<_> =
            self.of(kind).filter_map(|r| r["function"].as_str()).map(str::to_owned).collect();
        names.sort();
        names
    }

    /// A field of the summary.
    pub fn summary(&self, field: &str) -> Result<u64> {
        let summary = self.of("summary").next().context("there is no summary")?;
        number(&summary[field])
    }

    /// Nothing was skipped and nothing was lost.
    pub fn assert_complete(&self) -> Result<()> {
        ensure!(self.summary("missed")? == 0, "{:?}", self.0.last());
        ensure!(self.summary("lost")? == 0, "{:?}", self.0.last());
        Ok(())
    }
}

/// A count.
pub fn number(value: &Value) -> Result<u64> {
    value.as_u64().with_context(|| format!("{value} is not a number"))
}

/// Runs a `flea` command that ends by itself and succeeds: its JSON records.
pub fn ask<S: AsRef<str>>(words: &[S]) -> Result<Records> {
    let output = flea().args(words.iter().map(AsRef::as_ref)).arg("--json").output()?;
    ensure!(output.status.code() == Some(0), "{output:?}");
    let text = String::from_utf8(output.stdout)?;
    let records = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    Ok(Records(records))
}

/// Nothing of Flea is left in the process, and all its code is what its files say.
pub fn assert_clean(pid: u32) -> Result<()> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let is_ours = |line: &&str| line.contains("/memfd:flea") || line.contains("/flea-frames.so");
    let ours: Vec<_> = maps.lines().filter(is_ours).collect();
    ensure!(ours.is_empty(), "left behind: {ours:?}");
    assert_original_code(pid, "")
}

/// The code of the modules whose path begins so is what their files say.
pub fn assert_original_code(pid: u32, paths: &str) -> Result<()> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = fs::File::open(format!("/proc/{pid}/mem"))?;
    let mut n_compared = 0;
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let &[range, perms, offset, _, _, path] = fields.as_slice() else { continue };
        if !perms.contains('x') || !path.starts_with('/') || !path.starts_with(paths) {
            continue;
        }
        let (start, end) = range.split_once('-').context("a range")?;
        let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
        let mut now = vec![0; usize::try_from(end - start)?];
        memory.read_exact_at(&mut now, start).with_context(|| line.to_owned())?;
        let file = fs::read(format!("/proc/{pid}/root{path}"))?;
        let from = usize::try_from(u64::from_str_radix(offset, 16)?)?;
        let stated = &file[from..file.len().min(from + now.len())];
        let differs = now.iter().zip(stated).position(|(a, b)| a != b);
        ensure!(differs.is_none(), "{path} differs at its offset {from:#x} + {differs:?}");
        n_compared += 1;
    }
    ensure!(n_compared > 0, "no code was compared");
    Ok(())
}
