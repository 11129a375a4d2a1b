//! Programs are taken off while threads sleep inside the traced function, after Linux's
//! fexit_sleep: the programs and their memory go at once, the threads find their way back
//! whenever they wake, and then nothing of Flea is left.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use flea::builtin::{Expr, Histograms};
use flea::{Function, Session, attached};
use flea_fixtures::{Fixture, Running, build};
use support::{Tracing, assert_clean, compile_bpf};

const THREADS: u64 = 8;

struct Target {
    running: Running,
    session: Session,
}

impl Target {
    fn start() -> Result<Option<Self>> {
        let Some(program) = build(Fixture::Naps) else { return Ok(None) };
        let mut running = Running::start(Command::new(program).arg(THREADS.to_string()))?;
        running.expect_line("ready")?;
        let session = Session::attach(running.pid().cast_signed())?;
        Ok(Some(Self { running, session }))
    }

    fn function(&self, name: &str) -> Result<Function> {
        self.session.find(name)?.into_iter().next().context("it was found")
    }

    /// Reads the results of `name` when it returns.
    fn results(&self, name: &str) -> Result<Histograms> {
        Ok(Histograms::of(&self.session, &self.function(name)?, &Expr::Retval)?)
    }

    /// Reads its times: a session.
    fn times(&self, name: &str) -> Result<Histograms> {
        Ok(Histograms::of_duration(&self.session, &[self.function(name)?])?)
    }

    fn tell(&mut self, command: &str, answer: &str) -> Result<()> {
        self.running.send(command)?;
        self.running.expect_line(answer)
    }

    /// Mappings whose line has `text`.
    fn n_mappings(&self, text: &str) -> Result<usize> {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.running.pid()))?;
        Ok(maps.lines().filter(|line| line.contains(text)).count())
    }

    /// Data arenas of loaded objects.
    fn n_arenas(&self) -> Result<usize> {
        self.n_mappings("/memfd:flea-maps")
    }

    /// Somebody comes by, finds nothing to do and tidies up.
    fn tidied(&self) -> Result<()> {
        attached::detach(self.session.pid(), &[])?;
        assert_clean(self.running.pid())
    }

    fn finish(mut self) -> Result<()> {
        self.tidied()?;
        self.running.send("end")?;
        let status = self.running.wait()?;
        ensure!(status.code() == Some(7), "{status}");
        Ok(())
    }
}

fn count(histograms: &Histograms) -> u64 {
    histograms.read()[0].count
}

#[test]
fn one_controller_goes() -> Result<()> {
    let Some(mut target) = Target::start()? else { return Ok(()) };
    for round in 0..3 {
        let mut programs = if round == 1 { target.times("nap")? } else { target.results("nap")? };
        target.tell("in", "asleep")?;
        programs.detach()?;
        assert_eq!(target.n_arenas()?, 1, "an object keeps its memory for as long as it lives");
        assert_eq!(count(&programs), 0);
        if round == 2 {
            target.tell("out", "0 wrong")?;
            assert_eq!(count(&programs), 0, "it was taken off before they returned");
            drop(programs);
        } else {
            drop(programs);
            assert_eq!(target.n_arenas()?, 0, "its memory goes while they sleep");
            assert_eq!(target.n_mappings("/memfd:flea ")?, 1, "the way back is still there");
            target.tell("out", "0 wrong")?;
        }
        target.tidied()?;
    }
    target.finish()
}

/// Programs that run before the function alone have nobody to come back to.
#[test]
fn programs_without_an_exit_go() -> Result<()> {
    let Some(file) = compile_bpf("modify_return.bpf.c", "v3")? else { return Ok(()) };
    let Some(mut target) = Target::start()? else { return Ok(()) };
    let object = target.session.load(flea::parse_object(&std::fs::read(&file.0)?)?)?;
    let program = object.program("only_count").context("it is in the object")?;
    let link = program.attach(&target.function("nap")?)?;
    let stays = target.results("nap")?;
    target.tell("in", "asleep")?;
    link.detach()?;
    drop((program, object));
    assert_eq!(target.n_arenas()?, 1);
    target.tell("out", "0 wrong")?;
    assert_eq!(count(&stays), THREADS);
    drop(stays);
    target.finish()
}

/// With others at the same function: those that stay see every call that they saw begin, also
/// the calls that were entered before others came or went.
#[test]
fn some_of_several_go() -> Result<()> {
    // How many there are; which go, one after another. More than four are called, not copied.
    let cases: [(usize, &[usize]); 5] =
        [(2, &[0]), (2, &[1]), (3, &[1, 0]), (6, &[5, 0, 2]), (3, &[0, 1, 2])];
    for (n_controllers, go) in cases {
        let Some(mut target) = Target::start()? else { return Ok(()) };
        let mut programs = Vec::new();
        for i in 0..n_controllers {
            let one = if i % 2 == 0 { target.results("nap")? } else { target.times("nap")? };
            programs.push(Some(one));
        }
        target.tell("in", "asleep")?;
        let late = target.results("nap")?;
        for &i in go {
            let mut gone = programs[i].take().unwrap();
            gone.detach()?;
            assert_eq!(count(&gone), 0);
            let before = target.n_arenas()?;
            drop(gone);
            assert_eq!(target.n_arenas()?, before - 1, "{n_controllers} {go:?}");
        }
        target.tell("out", "0 wrong")?;
        for one in programs.iter().flatten() {
            assert_eq!(count(one), THREADS, "{n_controllers} {go:?}");
        }
        assert_eq!(count(&late), 0, "it has not seen them begin");
        drop((programs, late));
        target.finish()?;
    }
    Ok(())
}

/// The same with commands, which end; the last one with a signal that it cannot answer.
#[test]
fn commands_end() -> Result<()> {
    let Some(mut target) = Target::start()? else { return Ok(()) };
    let pid = target.running.pid();
    let killed = Tracing::attach(&["latency", "nap"], pid)?;
    let stopped = Tracing::attach(&["hist", "nap", "retval"], pid)?;
    let stays = Tracing::attach(&["hist", "nap", "retval"], pid)?;
    target.tell("in", "asleep")?;
    let records = stopped.stop()?;
    assert_eq!(records.one("histogram", "nap")?["count"], 0);
    killed.kill()?;
    let ids: Vec<u32> = attached::in_process(target.session.pid())?
        .iter()
        .filter(|body| !body.controller_alive)
        .map(|body| body.id)
        .collect();
    assert_eq!(ids.len(), 1);
    attached::detach(target.session.pid(), &ids)?;
    assert_eq!(target.n_arenas()?, 1, "that of the one that stays");
    target.tell("out", "0 wrong")?;
    let records = stays.stop()?;
    assert_eq!(records.one("histogram", "nap")?["count"], THREADS);
    target.finish()
}

/// No thread is inside: the call is on a coroutine's stack, which nobody is on.
#[test]
fn a_coroutine_is_away() -> Result<()> {
    let Some(mut target) = Target::start()? else { return Ok(()) };
    let (mut goes, stays) = (target.times("hop")?, target.results("hop")?);
    target.tell("away", "away")?;
    goes.detach()?;
    drop(goes);
    assert_eq!(target.n_arenas()?, 1);
    target.tell("back", "0 wrong")?;
    assert_eq!(count(&stays), 1);
    drop(stays);
    target.tidied()?;

    let mut alone = target.results("hop")?;
    target.tell("away", "away")?;
    alone.detach()?;
    drop(alone);
    assert_eq!(target.n_arenas()?, 0);
    assert_eq!(target.n_mappings("/memfd:flea ")?, 1, "the way back is still there");
    target.tell("back", "0 wrong")?;
    target.finish()
}

impl Target {
    /// Calls of `doze` that were entered and left.
    fn now(&mut self) -> Result<(u64, u64)> {
        self.running.send("now")?;
        let line = self.running.line()?;
        let (entered, left) = line.split_once(' ').context("two numbers")?;
        Ok((entered.parse()?, left.parse()?))
    }

    /// Waits for some calls.
    fn go_on(&mut self) -> Result<()> {
        let (_, from) = self.now()?;
        for _ in 0..1_000_000 {
            if self.now()?.1 > from + 2 * THREADS {
                return Ok(());
            }
        }
        anyhow::bail!("it makes no more calls")
    }
}

/// A thousand times on and off under threads that sleep and return as they like: what is
/// counted is right each time, and memory does not grow.
#[test]
fn a_thousand_rounds() -> Result<()> {
    const ROUNDS: usize = 1000;
    let Some(mut target) = Target::start()? else { return Ok(()) };
    let n_mappings = target.n_mappings("")?;
    target.tell("storm", "storm")?;
    let mut n_seen = 0;
    for round in 0..ROUNDS {
        let before = target.now()?;
        let mut programs =
            if round % 3 == 0 { target.times("doze")? } else { target.results("doze")? };
        let since = target.now()?;
        if round % 10 == 0 {
            target.go_on()?;
        }
        let until = target.now()?;
        programs.detach()?;
        let after = target.now()?;
        let n = count(&programs);
        // A thread may be between its call and its own counting of it.
        assert!(n <= after.1 - before.1 + THREADS, "{round}: {n} in {before:?}..{after:?}");
        assert!(n + since.0 >= until.1, "{round}: {n} in {since:?}..{until:?}");
        n_seen += n;
        drop(programs);
        assert_eq!(target.n_arenas()?, 0, "round {round}");
    }
    assert!(n_seen > 100 * 2 * THREADS, "{n_seen} calls were seen");
    target.tell("calm", "0 wrong")?;
    target.tidied()?;
    // The threads have left their stacks behind.
    let grown = target.n_mappings("")?.saturating_sub(n_mappings);
    assert!(grown < 4 * usize::try_from(THREADS)?, "{grown} more mappings");
    target.finish()
}
