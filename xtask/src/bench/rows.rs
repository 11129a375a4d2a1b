//! What is put on which function, and the rounds that measure it.

use std::collections::HashMap;

use anyhow::{Context, Error, Result};
use flea::ProgramKind::{self, Fentry, Fexit, Fsession};
use flea::Session;

use super::controller::{Attached, Flea, mentions};
use super::goals::{self, Goal, N_MIXED};
use super::harness::Harness;
use super::programs::{AttachedPrograms, Programs, Work};
use super::site::{Text, ensure_restored};

/// What is put on a row's function.
#[derive(Clone)]
pub enum Probe {
    /// Nothing: the function as it is.
    Nothing,
    /// A kernel probe: `uprobe` or `uretprobe`.
    Kernel(&'static str),
    /// `flea` with these words, `FN` standing for the function, in this many processes.
    Flea(&'static [&'static str], usize),
    /// Programs of one object, attached with the library.
    Library(Programs),
}

/// One row of the plan.
#[derive(Clone)]
pub struct Row {
    /// What a reader sees.
    pub label: &'static str,
    /// The function of `bench_loop.c` that is called.
    pub function: &'static str,
    /// The same function untouched.
    pub bare: &'static str,
    /// What is put on it.
    pub probe: Probe,
}

/// A row, measured.
pub struct Hit {
    /// The row.
    pub row: Row,
    /// The times, or why there are none.
    pub outcome: Result<Times>,
}

/// What was measured of one row.
pub struct Times {
    /// Nanoseconds per call, the lower quartile of all rounds.
    pub ns: f64,
    /// The same less the bare function's.
    pub added_ns: f64,
    /// `added_ns` in units of the hand-written counter's.
    pub ratio: f64,
    /// The same ratio from medians, of all three functions.
    pub median_ratio: f64,
    /// Instructions per call, the function's own included.
    pub n_insns: Option<u32>,
    /// Whether what the probe counted is what was called; `None` where nothing counts.
    pub exact: Option<bool>,
}

/// The row of the hand-written counter: what the ratios are relative to.
const HAND: &str = "hand";
// Functions of rows that `goals.rs` sets against each other.
pub(super) const BARE: &str = "f0";
pub(super) const CLOCK: &str = "hand_clock";
pub(super) const WALK: &str = "hand_walk";
pub(super) const SESSION: &str = "f2";
pub(super) const ENTRY: &str = "f10";
pub(super) const EXIT: &str = "f12";
pub(super) const MIXED: &str = "f19";

const fn row(label: &'static str, function: &'static str, bare: &'static str, probe: Probe) -> Row {
    Row { label, function, bare, probe }
}

const fn programs(kinds: &'static [ProgramKind], work: Work, n: u32) -> Probe {
    Probe::Library(Programs { kinds, work, n })
}

/// Calls in each of eight threads, to see that none is lost between them.
const N_CALLS_PER_THREAD: u64 = 100_000;

const COUNT: &[&str] = &["count", "FN"];
const LATENCY: &[&str] = &["latency", "FN"];
const HIST: &[&str] = &["hist", "FN", "arg0"];

/// What is mixed in one row.
const ALL_KINDS: &[ProgramKind] = &[Fentry, Fexit, Fsession];

/// Every function is used once, so that all of it is attached at the same time.
#[rustfmt::skip] // a table
const PLAN: &[Row] = &[
    row("bare call, nop at entry",             "f0", "f0", Probe::Nothing),
    row("bare call, ordinary prologue",        "p0", "p0", Probe::Nothing),
    row("by hand: call, ret",                  "hand_empty", "f0", Probe::Nothing),
    row("by hand: call, inc, ret (the limit)", HAND, "f0", Probe::Nothing),
    row("by hand: per thread (fs:)",           "hand_thread", "f0", Probe::Nothing),
    row("by hand: lock inc",                   "hand_lock", "f0", Probe::Nothing),
    row("by hand: two time reads",             CLOCK, "f0", Probe::Nothing),
    row("by hand: list of 100, hash look-ups", WALK, "f0", Probe::Nothing),
    row("flea count, nop",                     "f1", "f0", Probe::Flea(COUNT, 1)),
    row("flea count, prologue",                "p1", "p0", Probe::Flea(COUNT, 1)),
    row("flea latency, nop",                   SESSION, "f0", Probe::Flea(LATENCY, 1)),
    row("flea latency, prologue",              "p2", "p0", Probe::Flea(LATENCY, 1)),
    row("flea hist arg0, nop",                 "f3", "f0", Probe::Flea(HIST, 1)),
    row("2 x flea count, nop",                 "f4", "f0", Probe::Flea(COUNT, 2)),
    row("8 x flea count, nop",                 "f5", "f0", Probe::Flea(COUNT, 8)),
    row("32 x flea count, nop",                "f6", "f0", Probe::Flea(COUNT, 32)),
    row("fentry empty, nop",                   "f9", "f0", programs(&[Fentry], Work::Nothing, 1)),
    row("fentry counter, nop",                 ENTRY, "f0", programs(&[Fentry], Work::Count, 1)),
    row("fentry counter, prologue",            "p10", "p0", programs(&[Fentry], Work::Count, 1)),
    row("fexit empty, nop",                    "f11", "f0", programs(&[Fexit], Work::Nothing, 1)),
    row("fexit counter, nop",                  EXIT, "f0", programs(&[Fexit], Work::Count, 1)),
    row("fexit counter, prologue",             "p12", "p0", programs(&[Fexit], Work::Count, 1)),
    row("fsession empty, nop",                 "f13", "f0", programs(&[Fsession], Work::Nothing, 1)),
    row("fsession counter on both sides, nop", "f14", "f0", programs(&[Fsession], Work::Count, 1)),
    row("2 fentry counters in one object",     "f15", "f0", programs(&[Fentry], Work::Count, 2)),
    row("8 fentry counters in one object",     "f16", "f0", programs(&[Fentry], Work::Count, 8)),
    row("32 fentry counters in one object",    "f17", "f0", programs(&[Fentry], Work::Count, 32)),
    row("8 fexit counters in one object",      "f18", "f0", programs(&[Fexit], Work::Count, 8)),
    row("100 empty programs of mixed kinds",   MIXED, "f0", programs(ALL_KINDS, Work::Nothing, N_MIXED)),
    row("kernel uprobe, nop",                  "f7", "f0", Probe::Kernel("uprobe")),
    row("kernel uprobe, prologue",             "p7", "p0", Probe::Kernel("uprobe")),
    row("kernel uretprobe, nop",               "f8", "f0", Probe::Kernel("uretprobe")),
    row("kernel uretprobe, prologue",          "p8", "p0", Probe::Kernel("uretprobe")),
];

/// A row while it is measured.
struct Active {
    row: Row,
    attached: Vec<Attached>,
    programs: Option<AttachedPrograms>,
    original: Option<Text>,
    n_calls: u64,
    rounds: Vec<f64>,
    n_insns: Option<u32>,
    failed: Option<Error>,
}

impl Active {
    fn begin(row: &Row, harness: &mut Harness, flea: Option<&Flea>, session: &Session) -> Self {
        let mut active = Self {
            row: row.clone(),
            attached: Vec::new(),
            programs: None,
            original: None,
            n_calls: 0,
            rounds: Vec::new(),
            n_insns: None,
            failed: None,
        };
        active.failed = active.set_up(harness, flea, session).err();
        active
    }

    fn set_up(
        &mut self,
        harness: &mut Harness,
        flea: Option<&Flea>,
        session: &Session,
    ) -> Result<()> {
        let function = self.row.function;
        match self.row.probe {
            Probe::Nothing => {}
            Probe::Kernel(kind) => harness.kernel_probe(kind, function)?,
            Probe::Flea(words, n_processes) => {
                let flea = flea.context("no flea to run")?;
                let site = harness.site(function)?;
                self.original = Some(site.text()?);
                let words: Vec<&str> =
                    words.iter().map(|w| if *w == "FN" { function } else { *w }).collect();
                for _ in 0..n_processes {
                    self.attached.push(flea.attach(&words, harness.pid(), &[site])?);
                }
            }
            Probe::Library(programs) => {
                self.original = Some(harness.site(function)?.text()?);
                self.programs = Some(programs.attach(session, function)?);
            }
        }
        self.n_calls = harness.calibrate(function)?;
        if matches!(self.row.probe, Probe::Flea(..) | Probe::Library(_)) {
            harness.in_threads(function, N_CALLS_PER_THREAD)?;
        }
        Ok(())
    }

    fn round(&mut self, harness: &mut Harness) {
        if self.failed.is_none() {
            match harness.round(self.row.function, self.n_calls) {
                Ok(ns) => self.rounds.push(ns),
                Err(e) => self.failed = Some(e),
            }
        }
    }

    /// Single-stepping runs into the kernel's breakpoint, so not there.
    fn count_instructions(&mut self, harness: &mut Harness) {
        if self.failed.is_none() && !matches!(self.row.probe, Probe::Kernel(_)) {
            match harness.instructions(self.row.function) {
                Ok(n_insns) => self.n_insns = Some(n_insns),
                Err(e) => eprintln!("{}: instructions: {e:#}", self.row.label),
            }
        }
    }

    /// Takes everything off and says whether it counted what was called.
    fn end(&mut self, harness: &mut Harness) -> Result<Option<bool>> {
        let function = self.row.function;
        let n_called = harness.number("total", function)?;
        let mut exact = None;
        if matches!(self.row.probe, Probe::Kernel(_)) && self.failed.is_none() {
            exact = Some(harness.number("hits", function)? == n_called);
        }
        if let Some(programs) = self.programs.take() {
            exact = programs.finish(n_called)?;
        }
        for attached in self.attached.drain(..) {
            let finished = attached.finish()?;
            let right = mentions(&finished.output, n_called);
            // Only `count` promises the number itself in its output.
            if matches!(self.row.probe, Probe::Flea(words, _) if words == COUNT) {
                exact = Some(right && exact.unwrap_or(true));
            }
        }
        if let Some(original) = self.original {
            ensure_restored(&[harness.site(function)?], &[original])?;
        }
        Ok(exact)
    }
}

/// The lower quartile: what the machine does when its other tenants leave it alone, which on a
/// shared one they do not for half of the time. The median is told beside it.
fn quartile(values: &[f64]) -> Option<f64> {
    sorted(values).get(values.len() / 4).copied()
}

fn median(values: &[f64]) -> Option<f64> {
    sorted(values).get(values.len() / 2).copied()
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

/// Nanoseconds per call, by function.
pub type Summary = HashMap<&'static str, f64>;

/// All rows, and what two of them say together.
pub struct Measured {
    /// In the plan's order.
    pub hits: Vec<Hit>,
    /// What is wanted.
    pub goals: Vec<Goal>,
}

/// Measures every row of the plan over `n_rounds` interleaved rounds.
pub fn measure(flea: Option<&Flea>, n_rounds: usize) -> Result<Measured> {
    let mut harness = Harness::start()?;
    let session = Session::attach(harness.pid().cast_signed())?;
    let mut rows: Vec<Active> =
        PLAN.iter().map(|row| Active::begin(row, &mut harness, flea, &session)).collect();
    for round in 0..n_rounds {
        let n_rows = rows.len();
        // Another first row each time: no row always follows the same neighbour's caches.
        for i in 0..n_rows {
            rows[(i + round) % n_rows].round(&mut harness);
        }
    }
    for active in &mut rows {
        active.count_instructions(&mut harness);
    }
    let summary = |of: fn(&[f64]) -> Option<f64>| -> Summary {
        let all = rows.iter().map(|active| (active.row.function, of(&active.rounds)));
        all.filter_map(|(function, ns)| Some((function, ns?))).collect()
    };
    let (quartiles, medians) = (summary(quartile), summary(median));
    let goals = goals::of(&quartiles, &medians);
    let ratio = |ns: &Summary, row: &Row| {
        let of =
            |function: &str| ns.get(function).with_context(|| format!("no rounds of {function}"));
        Ok::<_, Error>((of(row.function)? - of(row.bare)?) / (of(HAND)? - of("f0")?))
    };
    let hits = rows
        .into_iter()
        .map(|mut active| {
            let exact = active.end(&mut harness);
            let times = match active.failed.take() {
                Some(e) => Err(e),
                None => exact.and_then(|exact| {
                    let row = &active.row;
                    let (ratio, median_ratio) = (ratio(&quartiles, row)?, ratio(&medians, row)?);
                    let ns = quartiles[row.function];
                    let added_ns = ns - quartiles[row.bare];
                    let n_insns = active.n_insns;
                    Ok(Times { ns, added_ns, ratio, median_ratio, n_insns, exact })
                }),
            };
            Hit { row: active.row, outcome: times }
        })
        .collect();
    Ok(Measured { hits, goals })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_function_has_one_row() {
        let mut functions: Vec<_> = PLAN.iter().map(|row| row.function).collect();
        functions.sort_unstable();
        functions.dedup();
        assert_eq!(functions.len(), PLAN.len());
    }

    #[test]
    fn quartiles() {
        assert_eq!(quartile(&[]), None);
        assert_eq!(quartile(&[5.0, 1.0, 4.0, 2.0, 3.0]), Some(2.0));
        assert_eq!(median(&[5.0, 1.0, 4.0, 2.0, 3.0]), Some(3.0));
    }

    /// The whole path without flea: every row without a probe has times, and what
    /// single-stepping counts is what the sources say.
    #[test]
    fn bare_rows_are_measured() {
        if flea_fixtures::build(flea_fixtures::Fixture::BenchLoop).is_none() {
            return;
        }
        let Measured { hits, goals } = measure(None, 3).unwrap();
        let n_insns = |function: &str| {
            let hit = hits.iter().find(|hit| hit.row.function == function).unwrap();
            let times = hit.outcome.as_ref().unwrap_or_else(|e| panic!("{function}: {e:#}"));
            times.n_insns
        };
        assert_eq!(n_insns("f0"), Some(3)); // nop, lea, ret
        assert_eq!(n_insns("p0"), Some(6));
        assert_eq!(n_insns(HAND), Some(5)); // call, inc, ret, lea, ret
        // Without a command there is no latency, so nothing is said of it.
        let is_known: Vec<bool> = goals.iter().map(|goal| goal.value.is_some()).collect();
        assert_eq!(is_known, [true, true, true, false]);
        for hit in &hits {
            match (&hit.row.probe, &hit.outcome) {
                (Probe::Nothing, outcome) => assert!(outcome.is_ok(), "{}", hit.row.label),
                (Probe::Library(_), Ok(times)) => assert_ne!(times.exact, Some(false)),
                (Probe::Library(_), Err(e)) => panic!("{}: {e:#}", hit.row.label),
                (Probe::Flea(..), outcome) => assert!(outcome.is_err(), "{}", hit.row.label),
                (Probe::Kernel(_), Ok(times)) => assert_eq!(times.exact, Some(true)),
                (Probe::Kernel(_), Err(e)) => eprintln!("skipped: {}: {e:#}", hit.row.label),
            }
        }
    }
}
