//! A controller in this process: random sets of functions on and off, as fast as it goes, and
//! counts that are compared with what the target did.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use flea::builtin::{Count, Histograms, Trace};
use flea::{Function, Pid, Session};

use super::bout::{Bout, Numbers};
use super::calls::Calls;
use super::random::Random;
use super::refusals::{Refusals, is_alive};
use super::target::Target;

/// Sessions that are kept: reading symbols takes long.
const MAX_SESSIONS: usize = 4;
/// How long a set may stay attached.
const LONGEST: Duration = Duration::from_millis(100);
/// How long to wait for calls to become known.
const PATIENCE: Duration = Duration::from_secs(10);

/// One set after the other, until the bout ends.
pub struct Library<'a> {
    bout: &'a Bout<'a>,
    target: &'a dyn Target,
    refusals: &'a Refusals,
    random: Random,
    sessions: BTreeMap<Pid, Session>,
}

/// What is attached.
enum Attached {
    Count(Count),
    Histograms(Histograms),
    Trace(Trace),
}

impl<'a> Library<'a> {
    /// The actor.
    pub fn new(bout: &'a Bout<'a>, target: &'a dyn Target, refusals: &'a Refusals) -> Self {
        let random = Random::new(bout.seed, 50);
        Self { bout, target, refusals, random, sessions: BTreeMap::new() }
    }

    /// Works until the bout ends.
    pub fn run(&mut self) -> Result<()> {
        while self.bout.goes_on() {
            let is_known = self.random.percent(25);
            let known = self.target.known().filter(|_| is_known).map(|known| known.pid);
            let pid = known.unwrap_or_else(|| *self.random.pick(&self.target.pids()));
            let outcome = if known.is_some() { self.compare() } else { self.round(pid) };
            match outcome {
                Ok(()) => {}
                // A process of a server may end at any time; the one that is known, with the bout.
                Err(_) if !is_alive(pid) && (known.is_none() || !self.bout.goes_on()) => {
                    drop(self.sessions.remove(&pid));
                }
                Err(error) if self.refusals.all_known(&[format!("{error:#}")]) => {}
                Err(error) => return Err(error),
            }
            Numbers::add(&self.bout.numbers.n_rounds, 1);
        }
        Ok(())
    }

    fn session(&mut self, pid: Pid) -> Result<Session> {
        if let Some(session) = self.sessions.get(&pid) {
            return Ok(session.clone());
        }
        if self.sessions.len() == MAX_SESSIONS {
            self.sessions.pop_first();
        }
        let session = Session::attach(pid).with_context(|| format!("a session with {pid}"))?;
        self.sessions.insert(pid, session.clone());
        Ok(session)
    }

    /// Functions of a random size of set.
    fn functions(&mut self, session: &Session) -> Vec<Function> {
        let pattern = *self.random.pick(self.target.patterns());
        // A library that is not loaded at the moment has none.
        let mut all = session.find(pattern).unwrap_or_default();
        all.retain(|function| function.site().is_ok());
        let size = match self.random.below(100) {
            0..50 => 1,
            50..80 => 10,
            80..97 => 100,
            _ => 3000,
        };
        let size = 1 + self.random.below(size);
        self.random.shuffle_front(&mut all, size);
        all.truncate(size);
        all
    }

    fn round(&mut self, pid: Pid) -> Result<()> {
        let session = self.session(pid)?;
        let functions = self.functions(&session);
        if functions.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = functions.iter().take(5).map(Function::name).collect();
        let what = || format!("{} functions of {pid}: {names:?}", functions.len());
        let kind = self.random.below(10);
        let start = || -> Result<Attached> {
            Ok(match kind {
                0..5 => Attached::Count(Count::start(&session, &functions).with_context(what)?),
                5..8 => Attached::Histograms(
                    Histograms::of_duration(&session, &functions).with_context(what)?,
                ),
                _ => Attached::Trace(Trace::start(&session, &functions).with_context(what)?),
            })
        };
        let mut attached = self.bout.event(|| format!("attach {}", what()), start)?;
        let pause = self.random.time(LONGEST);
        let begun = Instant::now();
        while self.bout.goes_on() && begun.elapsed() < pause {
            if let Attached::Trace(trace) = &mut attached {
                trace.poll(|_| Ok::<(), anyhow::Error>(()))?;
            }
            self.bout.sleep(pause / 8);
        }
        let n = self.bout.event(|| format!("detach {}", what()), || attached.detach());
        let n = n.with_context(what)?;
        Numbers::add(&self.bout.numbers.n_swaps, 2 * n as u64);
        Ok(())
    }

    /// Counts the calls of a function that are known, and compares.
    fn compare(&mut self) -> Result<()> {
        let Some(known) = self.target.known() else { return Ok(()) };
        if !is_alive(known.pid) {
            return Ok(());
        }
        let session = self.session(known.pid)?;
        let functions = session.find(known.function)?;
        ensure!(functions.len() == 1, "{} is not one function", known.function);
        let (_, n_done) = self.bout.n_taken_off();
        let before = SystemTime::now();
        let mut count = Count::start(&session, &functions).context("a known function")?;
        let began = SystemTime::now();
        let pause = self.random.time(LONGEST * 5);
        self.bout.sleep(pause);
        let ending = SystemTime::now();
        count.detach().context("a known function")?;
        let after = SystemTime::now();
        Numbers::add(&self.bout.numbers.n_swaps, 2);
        if !self.wait_known(known.calls, after) {
            return Ok(());
        }
        let Some(bounds) = known.calls.bounds((before, began), (ending, after)) else {
            return Ok(());
        };
        let n = count.read().iter().sum::<u64>();
        let (n_begun, _) = self.bout.n_taken_off();
        let undisturbed = n_begun == n_done;
        ensure!(
            n <= bounds.most && (n >= bounds.least || !undisturbed),
            "wrong count of {}: {n}, and it was called {} to {} times (missed: {})",
            known.function,
            bounds.least,
            bounds.most,
            count.missed(),
        );
        Numbers::add(&self.bout.numbers.n_counts, 1);
        Ok(())
    }

    /// Whether the calls until `time` have become known.
    fn wait_known(&self, calls: &Calls, time: SystemTime) -> bool {
        let begun = Instant::now();
        while self.bout.goes_on() && begun.elapsed() < PATIENCE {
            if calls.are_known_until(time) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        false
    }
}

impl Attached {
    /// Takes it off and looks at what was seen; the number of functions.
    fn detach(self) -> Result<usize> {
        match self {
            Self::Count(mut count) => {
                count.detach()?;
                Ok(count.read().len())
            }
            Self::Histograms(mut histograms) => {
                histograms.detach()?;
                Ok(histograms.read().len())
            }
            Self::Trace(mut trace) => {
                trace.detach()?;
                trace.drain(|_| Ok::<(), anyhow::Error>(()))?;
                Ok(trace.functions().len())
            }
        }
    }
}
