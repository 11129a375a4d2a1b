//! The program that is patched, and the objects that patch it, compiled in a directory of
//! their own.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{Running, Tool, require};

use crate::run;

/// A directory with the program, removed with its guard.
pub struct Dir {
    path: PathBuf,
    /// What objects for it are compiled with.
    compiler: PathBuf,
    is_musl: bool,
}

impl Dir {
    /// Compiles the program. `None`, said on stderr, where the compiler is missing.
    pub fn new(tool: Tool, flags: &[&str]) -> Result<Option<Self>> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let Some(compiler) = require(tool) else { return Ok(None) };
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("replace-{}-{number}", std::process::id());
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        fs::create_dir_all(&path)?;
        let dir = Self { path, compiler, is_musl: tool == Tool::MuslGcc };
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/replace/target.c");
        let flags = [flags, &["-g", "-pthread"]].concat();
        dir.compile(Path::new(source), &dir.path.join("target"), &flags)?;
        Ok(Some(dir))
    }

    /// A file of this name in it.
    pub fn path(&self, name: &str) -> String {
        self.path.join(name).to_string_lossy().into_owned()
    }

    /// Compiles a shared object, with debug information if not told otherwise.
    pub fn object(&self, name: &str, source: &str, flags: &[&str]) -> Result<String> {
        let file = self.path.join(format!("{name}.c"));
        fs::write(&file, source)?;
        let object = self.path.join(format!("{name}.so"));
        // musl's wrapper does not find the shared libgcc.
        let libgcc: &[&str] = if self.is_musl { &["-static-libgcc"] } else { &[] };
        self.compile(&file, &object, &[&["-shared", "-fPIC", "-g"], libgcc, flags].concat())?;
        Ok(object.to_string_lossy().into_owned())
    }

    /// Starts the program with threads that call.
    pub fn start(&self, n_threads: u32) -> Result<Patched> {
        let mut command = Command::new(self.path.join("target"));
        let mut running = Running::start(command.arg(n_threads.to_string()))?;
        running.expect_line("ready")?;
        Ok(Patched(running))
    }

    fn compile(&self, source: &Path, to: &Path, flags: &[&str]) -> Result<()> {
        let output =
            Command::new(&self.compiler).arg("-o").arg(to).arg(source).args(flags).output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// The running program.
pub struct Patched(Running);

impl Patched {
    pub fn pid(&self) -> u32 {
        self.0.pid()
    }

    /// Sends a command and reads its answer.
    pub fn expect(&mut self, command: &str, answer: &str) -> Result<()> {
        self.0.send(command)?;
        self.0.expect_line(answer).with_context(|| format!("after `{command}`"))
    }

    /// Its mappings, but for what its heap has grown by.
    pub fn maps(&self) -> Result<BTreeSet<String>> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid()))?;
        Ok(maps.lines().filter(|line| !line.ends_with("[heap]")).map(str::to_owned).collect())
    }

    /// Mappings that were not there before.
    pub fn new_mappings(&self, before: &BTreeSet<String>) -> Result<Vec<String>> {
        Ok(self.maps()?.difference(before).cloned().collect())
    }

    /// Waits until the mappings are those of before. A thread that was on its way out of a
    /// replacement, or the trace of one on its stack, keeps the object for a while; what finds
    /// it gone is the next command.
    pub fn settle(&mut self, before: &BTreeSet<String>) -> Result<()> {
        for _ in 0..50 {
            if self.maps()? == *before {
                return Ok(());
            }
            self.expect("calls 10", "110")?;
            // It attaches and takes off again.
            let pid = self.pid().to_string();
            run(&["count", "-p", &pid, "keep", "--duration", "0.01"])?;
        }
        let new = self.new_mappings(before)?;
        anyhow::bail!("the mappings are not as before: {new:#?}")
    }

    /// Lets it end.
    pub fn finish(mut self) -> Result<()> {
        self.0.close_stdin();
        let status = self.0.wait()?;
        ensure!(status.code() == Some(7), "it ended with {status}");
        Ok(())
    }
}
