//! Programs that fork, execute others, load and unload libraries, and come and go in thousands:
//! what is counted, what is left behind, and what is said.
#![allow(clippy::unwrap_used, reason = "a test")]

mod families;
mod following;
mod libraries;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{Running, Tool, require};
use support::Records;

/// A directory with the program and its library, removed with its guard.
struct Dir {
    path: PathBuf,
    compiler: PathBuf,
}

impl Dir {
    /// Compiles the program. `None`, said on stderr, where the compiler is missing.
    fn new() -> Result<Option<Self>> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let Some(compiler) = require(Tool::Gcc) else { return Ok(None) };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("follow-{}-{number}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&path)?;
        let dir = Self { path, compiler };
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/follow/target.c");
        dir.compile(Path::new(source), "target", &["-O2", "-g", "-pthread"])?;
        Ok(Some(dir))
    }

    /// Compiles a library whose `lib_step(x)` is `x * factor`.
    fn library(&self, name: &str, factor: u32) -> Result<String> {
        let source = self.path.join(format!("{name}.c"));
        let text = format!(
            "static volatile int factor = {factor};\n\
             int lib_step(int x) {{ int y = factor; factor = {factor}; return x * y; }}\n"
        );
        fs::write(&source, text)?;
        self.compile(&source, name, &["-O2", "-shared", "-fPIC"])?;
        Ok(self.path(name))
    }

    fn path(&self, name: &str) -> String {
        self.path.join(name).to_string_lossy().into_owned()
    }

    fn compile(&self, source: &Path, to: &str, flags: &[&str]) -> Result<()> {
        let to = self.path.join(to);
        let output =
            Command::new(&self.compiler).args(flags).arg(source).arg("-o").arg(to).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn start(&self) -> Result<Family> {
        let mut running = Running::start(&mut Command::new(self.path("target")))?;
        running.expect_line("ready")?;
        Ok(Family(running))
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The running program.
struct Family(Running);

impl Family {
    fn pid(&self) -> u32 {
        self.0.pid()
    }

    fn ask(&mut self, command: &str) -> Result<String> {
        self.0.send(command)?;
        self.0.line().with_context(|| format!("after `{command}`"))
    }

    fn act(&mut self, command: &str) -> Result<()> {
        let answer = self.ask(command)?;
        ensure!(answer == "done", "`{command}` was answered by `{answer}`");
        Ok(())
    }

    fn number(&mut self, command: &str) -> Result<u64> {
        let answer = self.ask(command)?;
        answer.parse().with_context(|| format!("`{command}` was answered by `{answer}`"))
    }

    /// Lets it end.
    fn finish(mut self) -> Result<()> {
        self.0.close_stdin();
        let status = self.0.wait()?;
        ensure!(status.code() == Some(7), "it ended with {status}");
        Ok(())
    }
}

/// Calls of `function`, where nothing was missed.
fn counted(records: &Records, function: &str) -> Result<u64> {
    records.assert_complete()?;
    support::number(&records.one("count", function)?["count"])
}
