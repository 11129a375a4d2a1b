//! The targets that check themselves: `cpp/torture.cpp` and `rust/torture.rs` of the fixtures.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use flea::Pid;
use flea_fixtures::{Fixture, Running, try_build};
use nix::sys::signal::Signal;

use super::bout::{Bout, Numbers};
use super::calls::Calls;
use super::target::{Known, Target, last_words_of};

const CPP_PATTERNS: &[&str] = &[
    "step",
    "steps",
    "down",
    "blend",
    "spread",
    "pulse",
    "may_throw*",
    "*turn*",
    "short_life*",
    "on_signal*",
    "s*",
    "*",
    "libc.so.6:malloc",
    "libc.so.6:free",
    "libc.so.6:pthread_*",
    "libc.so.6:clock_*",
    "libc.so.6:fork",
    "libc.so.6:wait*",
    "libc.so.6:dl*",
    "libc.so.6:mem*",
    "libc.so.6:write",
    "libstdc++:__cxa_*",
    "libstdc++:*basic_string*append*",
    "libgcc_s:_Unwind_*",
    "libtorture_plugin.so:plugin_*",
];
const RUST_PATTERNS: &[&str] = &[
    "*::step",
    "*::steps",
    "*may_panic*",
    "*text_of*",
    "pulse",
    "*torture*",
    "*mpmc*",
    "*thread*",
    "*panic*",
    "*fmt*",
    "*alloc*",
    "libc.so.6:malloc",
    "libc.so.6:free",
    "libc.so.6:pthread_*",
    "libc.so.6:mem*",
    "libc.so.6:write",
    "libc.so.6:syscall",
    "libgcc_s:_Unwind_*",
];

/// One of the two, running.
pub struct Program {
    running: Mutex<Running>,
    pid: Pid,
    fixture: Fixture,
    patterns: Vec<&'static str>,
    path: PathBuf,
    calls: Calls,
    /// Time and births of the last beat.
    last: Mutex<Option<(SystemTime, u64)>>,
}

impl Program {
    /// Starts it; `None` where its compiler is missing, which was said.
    pub fn start(fixture: Fixture, without: &[String]) -> Result<Option<Self>> {
        let Some(path) = try_build(fixture)? else { return Ok(None) };
        let all = if fixture == Fixture::TortureCpp { CPP_PATTERNS } else { RUST_PATTERNS };
        let is_there = |pattern: &&&str| !without.iter().any(|name| pattern.contains(&**name));
        let patterns = all.iter().filter(is_there).copied().collect();
        let without = without.iter().map(|name| format!("without-{name}"));
        let mut running = Running::start_group(Command::new(&path).args(without))?;
        running.expect_line("ready")?;
        let pid = running.pid().cast_signed();
        let (running, calls, last) = (Mutex::new(running), Calls::default(), Mutex::default());
        Ok(Some(Self { running, pid, fixture, patterns, path, calls, last }))
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One line of its output; whether it was a beat.
    fn read(&self, bout: &Bout<'_>, patience: Duration) -> Result<bool> {
        let mut running = self.running();
        let asked = Instant::now();
        let line = running.line_within(patience)?;
        if line == "quiet" {
            return Ok(false);
        }
        bout.answered("the next beat", asked);
        let numbers: Vec<u64> = line
            .strip_prefix("beat ")
            .and_then(|rest| rest.split(' ').map(|word| word.parse().ok()).collect())
            .with_context(|| format!("a beat, not {line:?}"))?;
        let &[_, time_ns, errors, stall_ms, born] = numbers.as_slice() else {
            bail!("a beat has five numbers, not {line:?}");
        };
        let time = UNIX_EPOCH + Duration::from_nanos(time_ns);
        if errors > 0 {
            // What it says of them may be on its way.
            std::thread::sleep(Duration::from_millis(100));
            bail!("it found {errors} errors: {:?}", running.stderr_so_far());
        }
        let stall = Duration::from_millis(stall_ms);
        let now = Instant::now();
        bout.waited("a thread's next step", now.checked_sub(stall).unwrap_or(now), now);
        // Since the last beat, `pulse` was called once.
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((last_time, last_born)) = last.replace((time, born)) {
            self.calls.add(last_time, time);
            Numbers::add(&bout.numbers.n_born, born - last_born);
        }
        Ok(true)
    }
}

impl Target for Program {
    fn pids(&self) -> Vec<Pid> {
        vec![self.pid]
    }

    fn patterns(&self) -> &[&'static str] {
        &self.patterns
    }

    fn signals(&self) -> &'static [Signal] {
        match self.fixture {
            Fixture::TortureCpp => {
                &[Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGALRM, Signal::SIGTRAP]
            }
            _ => &[Signal::SIGWINCH, Signal::SIGCHLD],
        }
    }

    fn known(&self) -> Option<Known<'_>> {
        Some(Known { function: "pulse", pid: self.pid, calls: &self.calls })
    }

    fn patch(&self) -> Option<(String, &'static str)> {
        let patch = self.path.with_file_name("torture_patch.so");
        (self.fixture == Fixture::TortureCpp).then(|| (patch.display().to_string(), "step"))
    }

    fn n_clients(&self) -> usize {
        1
    }

    fn work(&self, _: usize, bout: &Bout<'_>) -> Result<()> {
        while bout.goes_on() {
            self.read(bout, Duration::from_secs(30))?;
        }
        Ok(())
    }

    fn quiet(&self, bout: &Bout<'_>) -> Result<()> {
        self.running().send("quiet")?;
        while self.read(bout, Duration::from_secs(30))? {}
        Ok(())
    }

    fn last_words(&mut self) -> String {
        last_words_of(self.running.get_mut().unwrap_or_else(PoisonError::into_inner))
    }

    fn end(&mut self, _: &Bout<'_>) -> Result<()> {
        let mut running = self.running();
        running.send("end")?;
        let status = running.wait()?;
        ensure!(status.code() == Some(7), "it ended with {status}: {:?}", running.rest_of_stderr());
        Ok(())
    }
}
