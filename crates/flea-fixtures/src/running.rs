//! A child process that never outlives its guard, talked to in lines, with timeouts.

use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::{Fixture, Report, build};

/// How long a line or an exit may take where no time is given: machines are slow at times,
/// and a test that hangs says less than one that fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// A child with its standard streams in our hands. Dropping it kills and reaps it.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Receiver<String>,
    stderr: Receiver<String>,
    exited: Option<ExitStatus>,
    scope: Scope,
}

/// What the guard answers for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    Child,
    Group,
}

/// A reader of its own for each stream: the child never blocks on a full pipe, and a wait
/// for a line can time out.
fn lines_of(stream: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(stream);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).is_ok_and(|n| n > 0) {
            let line = String::from_utf8_lossy(&bytes);
            if sender.send(line.trim_end_matches('\n').to_owned()).is_err() {
                return;
            }
            bytes.clear();
        }
    });
    receiver
}

impl Running {
    /// Starts `command` with all three streams piped.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        Self::start_in(command, Scope::Child)
    }

    /// As [`Running::start`], in a process group of its own that is killed with it: for
    /// commands that start others, as `flea count -- COMMAND` or a server with workers do.
    /// What such a command leaves behind after it has exited by itself is not looked for.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_group(command: &mut Command) -> Result<Self> {
        Self::start_in(command.process_group(0), Scope::Group)
    }

    fn start_in(command: &mut Command, scope: Scope) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {command:?}"))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().map(lines_of).context("stdout was piped")?;
        let stderr = child.stderr.take().map(lines_of).context("stderr was piped")?;
        Ok(Self { child, stdin, stdout, stderr, exited: None, scope })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn nix_pid(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.child.id())?))
    }

    /// Writes a line to its stdin.
    ///
    /// # Errors
    /// When it no longer reads.
    pub fn send(&mut self, line: &str) -> Result<()> {
        let stdin = self.stdin.as_mut().context("stdin is closed")?;
        stdin.write_all(format!("{line}\n").as_bytes()).with_context(|| format!("sending {line}"))
    }

    /// Ends its stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has exited.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        ensure!(self.exited.is_none(), "it has exited");
        kill(self.nix_pid()?, signal).with_context(|| format!("sending {signal}"))
    }

    /// The next line of its stdout.
    ///
    /// # Errors
    /// When none comes within a minute, or its output has ended.
    pub fn line(&mut self) -> Result<String> {
        self.line_within(PATIENCE)
    }

    /// As [`Running::line`], with another timeout.
    ///
    /// # Errors
    /// When none comes in time, or its output has ended; both with what it said on stderr.
    pub fn line_within(&mut self, timeout: Duration) -> Result<String> {
        match self.stdout.recv_timeout(timeout) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Timeout) => {
                bail!("no line within {timeout:?}; stderr: {:?}", self.stderr_so_far())
            }
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.wait();
                bail!("its output ended ({status:?}); stderr: {:?}", self.rest_of_stderr())
            }
        }
    }

    /// Reads a line of stdout that must be `expected`.
    ///
    /// # Errors
    /// When another one comes, or none.
    pub fn expect_line(&mut self, expected: &str) -> Result<()> {
        let line = self.line()?;
        ensure!(line == expected, "expected the line {expected:?}, got {line:?}");
        Ok(())
    }

    /// The next line of its stderr.
    ///
    /// # Errors
    /// When none comes in time, or its output has ended.
    pub fn stderr_line_within(&mut self, timeout: Duration) -> Result<String> {
        self.stderr.recv_timeout(timeout).context("waiting for a line on stderr")
    }

    /// The lines of stdout that have come and were not read.
    pub fn lines_so_far(&mut self) -> Vec<String> {
        self.stdout.try_iter().collect()
    }

    /// The lines of stderr that have come and were not read.
    pub fn stderr_so_far(&mut self) -> Vec<String> {
        self.stderr.try_iter().collect()
    }

    /// The lines of stderr up to its end, for a child that has exited: the reader may lag
    /// behind the exit. Gives up after two silent seconds, as a child of the child may keep
    /// the stream open.
    pub fn rest_of_stderr(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while let Ok(line) = self.stderr.recv_timeout(Duration::from_secs(2)) {
            lines.push(line);
        }
        lines
    }

    /// All lines of stdout up to its end, which must come within a minute each.
    ///
    /// # Errors
    /// When it neither writes nor ends.
    pub fn rest(&mut self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        loop {
            match self.stdout.recv_timeout(PATIENCE) {
                Ok(line) => lines.push(line),
                Err(RecvTimeoutError::Disconnected) => return Ok(lines),
                Err(RecvTimeoutError::Timeout) => bail!("its output does not end: {lines:?}"),
            }
        }
    }

    /// Waits for its exit, at most a minute.
    ///
    /// # Errors
    /// When it does not exit in time.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        self.wait_within(PATIENCE)
    }

    /// As [`Running::wait`], with another timeout.
    ///
    /// # Errors
    /// When it does not exit in time.
    pub fn wait_within(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.exited {
                return Ok(status);
            }
            self.exited = self.child.try_wait().context("waiting for its exit")?;
            if self.exited.is_none() {
                ensure!(Instant::now() < deadline, "it did not exit within {timeout:?}");
                thread::sleep(Duration::from_millis(2));
            }
        }
    }

    /// For a counting program started by [`spawn_waiting`]: lets it run and returns what it
    /// counted. It is then waiting again, so that a tracer can be looked at or taken off.
    ///
    /// # Errors
    /// When it says anything else.
    pub fn run_counts(&mut self) -> Result<Report> {
        self.send("go")?;
        let line = self.line()?;
        let report = serde_json::from_str(&line).with_context(|| format!("parsing {line:?}"))?;
        self.expect_line("done")?;
        Ok(report)
    }

    /// Lets a counting program exit, and checks that it ends as it must: code 7.
    ///
    /// # Errors
    /// When it ends in any other way.
    pub fn finish_counts(&mut self) -> Result<()> {
        self.send("end")?;
        let status = self.wait()?;
        ensure!(status.code() == Some(7), "ended with {status}, not with its code 7");
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.exited.is_none() {
            // All fail only when it is gone already, which is what is wanted. It is not
            // reaped yet, so nobody else can have its number or its group's.
            if let (Scope::Group, Ok(pid)) = (self.scope, self.nix_pid()) {
                let _ = killpg(pid, Signal::SIGKILL);
            }
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Starts a counting fixture that has said "ready" and waits to be traced: let it go with
/// [`Running::run_counts`]. `None` when its compiler is missing, which was printed.
///
/// # Errors
/// When it cannot be started or does not become ready.
pub fn spawn_waiting(fixture: Fixture, threads: u32, calls: u64) -> Result<Option<Running>> {
    let Some(program) = build(fixture) else {
        return Ok(None);
    };
    let mut command = Command::new(program);
    if !matches!(fixture, Fixture::Many(_)) {
        command.arg(threads.to_string());
    }
    command.arg(calls.to_string()).arg("wait");
    let mut running = Running::start(&mut command)?;
    running.expect_line("ready")?;
    Ok(Some(running))
}
