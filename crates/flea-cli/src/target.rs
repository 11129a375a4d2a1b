//! The target of a command, from its flags: a running process or one that is started.

use std::{
    collections::HashSet,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use flea::{Exit, FindError, Followed, Following, Function, Session};
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
    /// With `--follow`.
    following: Option<Following>,
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
        let following = if span.follow { Some(session.follow()?) } else { None };
        Ok(Self {
            session,
            following,
            interrupt,
            duration: span.duration,
            exit: None,
            is_command: target.pid.is_none(),
            is_gone: false,
            is_another: false,
        })
    }

    /// The functions that `patterns` name, each once, and the patterns of which nothing is there:
    /// an error, unless they may wait.
    pub fn find(
        &self,
        patterns: &[String],
        may_wait: bool,
    ) -> Result<(Vec<Function>, Vec<String>)> {
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
            let found = find_all(&self.session, patterns);
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            bar.finish_and_clear();
            let (functions, missing) = found;
            let mut waiting = Vec::new();
            for (pattern, error) in missing {
                let may_come = matches!(
                    error,
                    FindError::NoSuchModule { .. } | FindError::NoSuchFunction { .. }
                );
                if !(may_wait && may_come) {
                    return Err(error.into());
                }
                waiting.push(pattern);
            }
            Ok((functions, waiting))
        })
    }

    /// Lets the target run and waits for Ctrl-C, the duration or its end; calls `tick` all the
    /// while.
    pub fn run(&mut self, mut tick: impl FnMut() -> Result<()>) -> Result<()> {
        self.run_meeting(|met| if met.is_some() { Ok(()) } else { tick() })
    }

    /// As [`Target::run`], and where the target is followed, `tick` is called with what becomes of
    /// it and its children; the end is that of all of them.
    pub fn run_meeting(
        &mut self,
        mut tick: impl FnMut(Option<(&Following, Followed)>) -> Result<()>,
    ) -> Result<()> {
        self.session.resume()?;
        let started = Instant::now();
        loop {
            let ended = self.is_at_its_end()?;
            tick(None)?;
            let over = self.duration.is_some_and(|d| started.elapsed() >= d);
            if ended || over || self.interrupt.asked() {
                // What is known of those that have ended.
                while let Some(following) = &self.following
                    && let Some(event) = following.next_within(Duration::ZERO)
                {
                    tick(Some((following, event)))?;
                }
                return Ok(());
            }
            let left = self.duration.map_or(POLL, |d| d.saturating_sub(started.elapsed()));
            match &self.following {
                None => std::thread::sleep(left.min(POLL)),
                Some(following) => {
                    if let Some(event) = following.next_within(left.min(POLL)) {
                        tick(Some((following, event)))?;
                    }
                }
            }
        }
    }

    /// Whether there is nobody left to wait for.
    fn is_at_its_end(&mut self) -> Result<bool> {
        if self.exit.is_none() {
            self.exit = self.session.try_wait()?;
        }
        Ok(match &self.following {
            Some(following) => following.is_over(),
            None if self.exit.is_some() => true,
            // A command is waited for whatever it becomes: its exit code is ours.
            None if self.is_command => {
                self.is_another();
                false
            }
            None => self.has_ended() || self.is_another(),
        })
    }

    /// Who follows the target.
    pub fn following(&self) -> Option<&Following> {
        self.following.as_ref()
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
        // Whoever is waited for runs on as if nobody had looked.
        self.following = None;
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

/// The functions of a process that `patterns` name, each once, and the patterns of which nothing is
/// there.
pub fn find_all(
    session: &Session,
    patterns: &[String],
) -> (Vec<Function>, Vec<(String, FindError)>) {
    let mut functions: Vec<Function> = Vec::new();
    let mut missing = Vec::new();
    let mut seen = HashSet::new();
    for pattern in patterns {
        match session.find(pattern) {
            Ok(found) => functions.extend(found.into_iter().filter(|f| seen.insert(f.address()))),
            Err(error) => missing.push((pattern.clone(), error)),
        }
    }
    (functions, missing)
}
