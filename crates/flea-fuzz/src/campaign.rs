//! Seeds for a fuzzer, for some time, and the sum of what came of them.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::Result;

/// Failures after which a campaign ends: they are likely the same one.
const MAX_FAILURES: usize = 10;
/// How often a campaign says that it is alive.
const SIGN_OF_LIFE: Duration = Duration::from_secs(60);

/// What one input came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Accepted, and right.
    Accepted,
    /// Refused, and that is no fault.
    Refused,
    /// A fault.
    Failed(Failure),
}

/// A fault, with all that it takes to see it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What is wrong.
    pub kind: Kind,
    /// What was seen.
    pub seen: String,
    /// The input, made smaller: a case for a test.
    pub input: String,
}

/// Kinds of faults, each of which is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A program was accepted that is not safe.
    UnsafeAccept,
    /// Two ways of running a program differ.
    Disagreement,
    /// A panic, no end, or too much memory.
    Misbehaviour,
}

/// Makes inputs and judges them.
pub trait Fuzzer {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// One input.
    ///
    /// # Errors
    /// The input could not be judged, for a reason that ends the campaign.
    fn judge(&mut self, seed: u64) -> Result<Outcome>;

    /// More lines for the end.
    fn summary(&self) -> String {
        String::new()
    }
}

/// When a campaign ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// After so many inputs.
    Inputs(u64),
    /// After this time.
    Time(Duration),
}

/// The sum of a campaign.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// The fuzzer's.
    pub name: &'static str,
    /// The first seed; input `n` had this plus `n`.
    pub seed: u64,
    /// Inputs.
    pub tried: u64,
    /// Inputs that were accepted.
    pub accepted: u64,
    /// What went wrong.
    pub failures: Vec<Failure>,
    /// The fuzzer's own lines.
    pub summary: String,
}

impl Report {
    /// Accepted inputs in a hundred.
    #[must_use]
    pub fn accepted_percent(&self) -> f64 {
        if self.tried == 0 { 0.0 } else { 100.0 * self.accepted as f64 / self.tried as f64 }
    }

    fn count(&self, kind: Kind) -> usize {
        self.failures.iter().filter(|failure| failure.kind == kind).count()
    }

    /// The report that a person reads.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |s: String| writeln!(text, "{s}").expect("a String takes everything");
        line(format!(
            "{}: {} tried, {} accepted ({:.1} %), {} unsafe accepts, {} disagreements, {} misbehaved, \
             seed {}",
            self.name,
            self.tried,
            self.accepted,
            self.accepted_percent(),
            self.count(Kind::UnsafeAccept),
            self.count(Kind::Disagreement),
            self.count(Kind::Misbehaviour),
            self.seed,
        ));
        for summary in self.summary.lines() {
            line(format!("  {summary}"));
        }
        text
    }
}

/// Gives `fuzzer` the seeds from `seed` on. Failures are shown as they are found.
///
/// # Errors
/// [`Fuzzer::judge`]'s.
pub fn run(fuzzer: &mut dyn Fuzzer, seed: u64, end: End) -> Result<Report> {
    let begun = Instant::now();
    let mut shown = begun;
    let mut report = Report { name: fuzzer.name(), seed, ..Report::default() };
    loop {
        let ended = match end {
            End::Inputs(n) => report.tried >= n,
            End::Time(time) => begun.elapsed() >= time,
        };
        if ended || report.failures.len() >= MAX_FAILURES {
            break;
        }
        let this = seed.wrapping_add(report.tried);
        report.tried += 1;
        match fuzzer.judge(this)? {
            Outcome::Accepted => report.accepted += 1,
            Outcome::Refused => {}
            Outcome::Failed(failure) => {
                println!("{} seed {this}: {}\n{}", report.name, failure.seen, failure.input);
                report.failures.push(failure);
            }
        }
        if shown.elapsed() >= SIGN_OF_LIFE {
            shown = Instant::now();
            println!("{}: {} tried, {} accepted", report.name, report.tried, report.accepted);
        }
    }
    report.summary = fuzzer.summary();
    Ok(report)
}
