//! The target of a command, from its flags: a running process or one that is started.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use flea::{Exit, Function, Session};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{args, interrupt::Interrupt};

/// How often results are collected while waiting.
const POLL: Duration = Duration::from_millis(20);
/// Indexing that takes longer than this shows that it goes on.
const PROGRESS_AFTER: Duration = Duration::from_millis(500);

/// A target and what was asked of it.
pub struct Target {
    /// The process.
    pub session: Session,
    interrupt: Interrupt,
    duration: Option<Duration>,
    exit: Option<Exit>,
    /// It was started here: only waiting for it tells that it has ended.
    is_command: bool,
    /// It was not started here, and is no more.
    is_gone: bool,
    /// It runs another program now, which was said.
    is_another: bool,
}

impl Target {
    /// Attaches to the process or starts the command, which then waits before its first own
    /// instruction.
    pub fn open(target: &args::Target, span: &args::Span) -> Result<Self> {
        let interrupt = Interrupt::install()?;
        let session = match target.pid {
            Some(pid) => Session::attach(pid)?,
            None => {
                let (program, args) =
                    target.command.split_first().context("no command was given")?;
                let mut command = Command::new(program);
                command.args(args);
                Session::spawn(command)?
            }
        };
        Ok(Self {
            session,
            interrupt,
            duration: span.duration,
            exit: None,
            is_command: target.pid.is_none(),
            is_gone: false,
            is_another: false,
        })
    }

    /// The functions that `patterns` name, each once.
    pub fn find(&self, patterns: &[String]) -> Result<Vec<Function>> {
        let bar = ProgressBar::hidden();
        bar.set_style(ProgressStyle::with_template("{spinner} {msg} {elapsed}")?);
        bar.set_message("reading symbols");
        let started = Instant::now();
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    if started.elapsed() > PROGRESS_AFTER && bar.is_hidden() {
                        // Draws nothing where standard error is no terminal.
                        bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
                    }
                    bar.tick();
                    std::thread::park_timeout(Duration::from_millis(50));
                }
            });
            let found = self.find_quietly(patterns);
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            bar.finish_and_clear();
            found
        })
    }

    fn find_quietly(&self, patterns: &[String]) -> Result<Vec<Function>> {
        let mut functions: Vec<Function> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        for pattern in patterns {
            for function in self.session.find(pattern)? {
                if seen.insert(function.address()) {
                    functions.push(function);
                }
            }
        }
        Ok(functions)
    }

    /// Lets the target run and waits for Ctrl-C, the duration or its end; calls `tick` all the
    /// while.
    pub fn run(&mut self, mut tick: impl FnMut() -> Result<()>) -> Result<()> {
        self.session.resume()?;
        let started = Instant::now();
        loop {
            let ended = match self.session.try_wait()? {
                Some(exit) => {
                    self.exit = Some(exit);
                    true
                }
                // A command is waited for whatever it becomes: its exit code is ours.
                None if self.is_command => {
                    self.is_another();
                    false
                }
                None => self.has_ended() || self.is_another(),
            };
            tick()?;
            let over = self.duration.is_some_and(|d| started.elapsed() >= d);
            if ended || over || self.interrupt.asked() {
                return Ok(());
            }
            let left = self.duration.map_or(POLL, |d| d.saturating_sub(started.elapsed()));
            std::thread::sleep(left.min(POLL));
        }
    }

    /// Whether a process that was not started here is no more; says so once.
    fn has_ended(&mut self) -> bool {
        if !self.is_gone && !self.session.is_alive() {
            self.is_gone = true;
            let pid = self.session.pid();
            let how = match self.session.ended_how() {
                Some(Exit::Code(code)) => format!(" with exit code {code}"),
                Some(Exit::Signal(signal)) => format!(", killed by signal {signal}"),
                None => String::new(),
            };
            eprintln!("flea: process {pid} has ended{how}; the results are up to then");
        }
        self.is_gone
    }

    /// Whether the process has executed another program, in which nothing is attached; says so
    /// once.
    fn is_another(&mut self) -> bool {
        if !self.is_another
            && let Some(path) = self.session.executed()
        {
            self.is_another = true;
            let (pid, path) = (self.session.pid(), path.display());
            eprintln!(
                "flea: process {pid} has executed another program, {path}; the results are up to \
                 then"
            );
        }
        self.is_another
    }

    /// Ends a command that was started only to be looked at.
    pub fn abandon(self) -> Result<()> {
        Ok(self.session.abandon()?)
    }

    /// The exit code: the command's own where one was started and has run to its end. One
    /// that still runs (after `--duration` or Ctrl-C) is waited for, as strace does. For a
    /// process that was running before, 0; 1 where a signal killed it while it was traced.
    pub fn finish(mut self) -> Result<u8> {
        if self.exit.is_none() {
            self.exit = self.session.wait()?;
        }
        Ok(match self.exit {
            None if self.is_gone => {
                matches!(self.session.ended_how(), Some(Exit::Signal(_))).into()
            }
            None => 0,
            Some(Exit::Code(code)) => u8::try_from(code & 0xff).unwrap_or(1),
            // What a shell reports for a command that a signal ended.
            Some(Exit::Signal(signal)) => u8::try_from(128 + signal).unwrap_or(1),
        })
    }
}
