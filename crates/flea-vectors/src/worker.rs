//! Another process for programs that may crash it or never end: lines in, lines out, with a
//! time limit for each. The process is this very program, started again.

use std::io::{self, BufRead, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{Answer, Vector, Verdict, answer};

/// The worker's side: answers lines of stdin until it ends.
///
/// # Errors
/// Reading or writing failed.
pub fn serve() -> Result<()> {
    serve_lines(|line| Ok(serde_json::to_string(&answer_line(line))?))
}

/// The same for lines of any kind: `reply` makes one line of one.
///
/// # Errors
/// Reading or writing failed, or `reply` did.
pub fn serve_lines(reply: impl Fn(&str) -> Result<String>) -> Result<()> {
    let mut out = io::stdout().lock();
    for line in io::stdin().lock().lines() {
        writeln!(out, "{}", reply(&line?)?)?;
        out.flush()?;
    }
    Ok(())
}

fn answer_line(line: &str) -> Answer {
    match serde_json::from_str::<Vector>(line) {
        Ok(vector) => answer(&vector),
        Err(e) => Answer::without_result(id_of(line), Verdict::Skipped, format!("no vector: {e}")),
    }
}

/// The id of a line that may be no vector.
fn id_of(line: &str) -> Value {
    let value: Value = serde_json::from_str(line).unwrap_or_default();
    value.get("id").cloned().unwrap_or_default()
}

/// The other side: a worker that is started again whenever it is lost.
pub struct Pool {
    command: fn() -> Result<Command>,
    patience: Duration,
    running: Option<Running>,
}

struct Running {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may be in an endless loop; one that has ended is no error.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Pool {
    /// `command` starts a process that calls [`serve`]; a line may take `patience`.
    #[must_use]
    pub fn new(command: fn() -> Result<Command>, patience: Duration) -> Self {
        Self { command, patience, running: None }
    }

    /// Answers one line, whatever it does to the worker.
    ///
    /// # Errors
    /// The worker could not be started.
    pub fn answer(&mut self, line: &str) -> Result<Answer> {
        match self.reply(line)? {
            Ok(text) => serde_json::from_str(&text).context("the worker's answer"),
            Err(lost) => {
                let checked = serde_json::from_str::<Vector>(line).is_ok_and(|v| v.check);
                // A verified program that does this is a fault of Flea.
                let verdict = if checked { Verdict::Accept } else { Verdict::Skipped };
                Ok(Answer::without_result(id_of(line), verdict, lost))
            }
        }
    }

    /// The worker's line for this one, or how the worker was lost.
    ///
    /// # Errors
    /// The worker could not be started.
    pub fn reply(&mut self, line: &str) -> Result<Result<String, String>> {
        let mut running = match self.running.take() {
            Some(running) => running,
            None => Running::start((self.command)()?)?,
        };
        if writeln!(running.stdin, "{line}").is_err() {
            return Ok(Err(format!("the process ended: {}", running.end())));
        }
        Ok(match running.answers.recv_timeout(self.patience) {
            Ok(text) => {
                self.running = Some(running);
                Ok(text)
            }
            Err(RecvTimeoutError::Timeout) => {
                Err(format!("no end after {} s", self.patience.as_secs()))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(format!("the process ended: {}", running.end()))
            }
        })
    }
}

impl Running {
    fn start(mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting a worker")?;
        let stdin = child.stdin.take().context("a pipe was asked for")?;
        let stdout = child.stdout.take().context("a pipe was asked for")?;
        let (sender, answers) = channel();
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { child, stdin, answers })
    }

    fn end(&mut self) -> String {
        let status: io::Result<ExitStatus> = self.child.wait();
        status.map_or_else(|e| e.to_string(), |status| status.to_string())
    }
}
