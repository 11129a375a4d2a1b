//! The commit: a user-space text_poke (as arch/x86/kernel/alternative.c, smp_text_poke_batch,
//! does for the kernel), with threads moved instead of stopped.
//!
//! # Order
//!
//! Protected: that a thread executes the old instructions or the new one, never a mixture.
//! By: a breakpoint on the first byte while the others change, and the proof that nobody
//! stands behind it.
//!
//! 1. Every site is compared with what is expected. From here on nothing may differ: where the
//!    target's loader has a *gate*, it is shut first, and they are compared again (see `gate`).
//! 2. *Breakpoints* on all first bytes. A thread that arrives goes on at `trap_to`.
//! 3. *Sync*: no CPU executes an old first byte any more.
//! 4. *Evacuation*: threads that stand at an inner instruction are moved to its copy; signal
//!    frames that return to one are waited for. After this, nobody is inside or comes inside:
//!    the only way in is the breakpoint.
//! 5. *Tails*: the bytes behind the breakpoint. 6. *Sync*.
//! 7. *First bytes*: from this instant, site by site, the new code runs. 8. *Sync*.
//!    Before it, what was written is read back.
//! 9. The gate is opened. *Drain*: no trap is on its way any more; breakpoints are forgotten.
//!
//! # Batches
//!
//! Steps 2 to 8 are done for as many sites at a time as [`Target::sites_at_once`] says. Ten
//! thousand sites take tens of milliseconds to write, and a thread that runs into a breakpoint
//! waits for, or is slow in, no more than its own batch. A batch has three syncs, so that the
//! whole takes little longer than it would in one. The gate stays shut for all of them: a library
//! that came back between two batches would have the changes of one of them only, and what one
//! batch wrote may be what the file has.
//!
//! Where a thread stays in a handler that interrupted it inside a site, the batch is taken back
//! and tried again, each time with more patience: breakpoints that stay while one waits would
//! hold up everybody else.
//!
//! # All or nothing
//!
//! A batch that fails is taken back, and then those before it, the last one first. A site at
//! which the new first byte has not been written has nobody inside; one at which it may have
//! been gets its breakpoint again, and whoever stands inside new instructions (a plan that
//! restores a function) is waited for. A site that cannot be written, its memory gone, does not
//! keep the others from being put back.

use std::ops::Range;
use std::time::{Duration, Instant};

use flea_process::Trap;
use flea_symbols::addr::RemoteAddr;

use crate::error::{COMPARING, CommitError};
use crate::gate::{Barrier, Gate};
use crate::plan::{Plan, Poke};
use crate::target::Target;

pub(crate) const INT3: u8 = 0xcc;
/// How often a batch is begun, and before that, how often to look whether a handler has
/// interrupted a thread inside one.
const ATTEMPTS: u32 = 9;
/// How long handlers may run between two attempts.
const PAUSE_OUTSIDE: Duration = Duration::from_millis(5);
/// How long they may run while breakpoints are there, between two looks. The n-th attempt has
/// 2^n looks: a handler that takes longer than a quarter of a second is given up on.
const PAUSE_INSIDE: Duration = Duration::from_micros(500);
/// The n-th attempt has so many times 2^n looks at whether the loader is at work: two seconds in
/// all.
const LOOKS_AT_LOADER: u32 = 4;
const EVACUATING: &str = "moving threads out of the replaced bytes";
const SHUTTING: &str = "waiting for the loader";

/// What a commit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Sites changed.
    pub n_sites: usize,
    /// Batches that they were changed in.
    pub n_batches: usize,
    /// Looks that were needed until nobody was inside.
    pub n_evacuations: u32,
    /// From the first breakpoint of a batch to its last byte, of the batch that took longest: how
    /// long threads may have run into one.
    pub window: Duration,
    /// Altogether.
    pub elapsed: Duration,
}

/// As [`commit_behind`], for a process that has no gate.
pub fn commit<T: Target>(target: &mut T, plan: &Plan) -> Result<Report, CommitError<T::Error>> {
    commit_behind(target, plan, None)
}

/// Makes the changes of `plan`, all of them or none; each batch behind the shut gate, if there is
/// one that can be shut.
pub fn commit_behind<T: Target>(
    target: &mut T,
    plan: &Plan,
    gate: Option<Gate>,
) -> Result<Report, CommitError<T::Error>> {
    let started = Instant::now();
    plan.check()?;
    if plan.pokes.is_empty() {
        return Ok(Report::default());
    }
    let failed = |source| CommitError::Failed { step: COMPARING, source };
    compare(target, &plan.pokes).map_err(|setback| setback.into_error(Ok(())))?;
    let barrier = gate.map(|gate| Barrier::new(target, gate, plan)).transpose().map_err(failed)?;
    let mut commit = Commit {
        target,
        plan,
        barrier: barrier.flatten(),
        live: Vec::new(),
        is_armed: false,
        overwritten: None,
        report: Report::default(),
    };
    let outcome = commit.forward();
    let (mut report, overwritten) = (commit.report, commit.overwritten.take());
    if let Err(setback) = outcome {
        let undone = commit.undo();
        return Err(setback.into_error(undone));
    }
    if commit.barrier.is_some() {
        commit.end()?;
    }
    if let Some((site, written, found)) = overwritten {
        return Err(CommitError::ReadBack { site, written, found });
    }
    report.n_sites = plan.pokes.len();
    report.elapsed = started.elapsed();
    Ok(report)
}

fn trap(poke: &Poke) -> Trap {
    let behind = poke.site.offset(1);
    let starts_behind = poke.inner_moves().any(|(from, _)| from == behind);
    Trap { site: poke.site, goes_to: poke.trap_to, starts_behind }
}

/// Why it does not go on.
enum Setback<E> {
    Busy(RemoteAddr),
    /// The loader is at work; the gate.
    Loading(RemoteAddr),
    /// Other bytes are there than those expected.
    Differs {
        site: RemoteAddr,
        expected: Vec<u8>,
        found: Vec<u8>,
    },
    /// What is there is no code any more.
    Closed(RemoteAddr),
    Error(&'static str, E),
}

/// Why it does not go back.
enum Stuck<E> {
    Inside(RemoteAddr),
    Error(E),
}

impl<E: std::error::Error + 'static> Setback<E> {
    fn into_error(self, undone: Result<(), Stuck<E>>) -> CommitError<E> {
        let stuck = match (undone, self) {
            (Ok(()), setback) => return setback.into_undone(),
            (Err(Stuck::Error(undo)), Self::Error(step, source)) => {
                return CommitError::Broken { step, source, undo };
            }
            (Err(stuck), setback) => (stuck, setback.step(), setback.site()),
        };
        match stuck {
            (Stuck::Inside(site), step, _) => CommitError::Kept { step, site },
            (Stuck::Error(undo), step, site) => CommitError::Stranded { step, site, undo },
        }
    }

    fn into_undone(self) -> CommitError<E> {
        match self {
            Self::Busy(site) => CommitError::Busy { site },
            Self::Loading(_) => CommitError::Loading,
            Self::Differs { site, expected, found } => {
                CommitError::Mismatch { site, expected, found }
            }
            Self::Closed(site) => CommitError::Closed { site },
            Self::Error(step, source) => CommitError::Failed { step, source },
        }
    }

    fn step(&self) -> &'static str {
        match self {
            Self::Busy(_) => EVACUATING,
            Self::Loading(_) => SHUTTING,
            Self::Differs { .. } | Self::Closed(_) => COMPARING,
            Self::Error(step, _) => step,
        }
    }

    fn site(&self) -> RemoteAddr {
        match *self {
            Self::Busy(site) | Self::Loading(site) | Self::Closed(site) => site,
            Self::Differs { site, .. } => site,
            // Such a one has a source instead.
            Self::Error(..) => RemoteAddr(0),
        }
    }
}

/// What of a batch may have been written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The gate's breakpoint only.
    Gate,
    Breakpoints,
    Tails,
    FirstBytes,
}

/// Sites that are changed together, by their place in the plan.
#[derive(Clone)]
struct Batch {
    sites: Range<usize>,
    stage: Stage,
}

struct Commit<'a, T> {
    target: &'a mut T,
    plan: &'a Plan,
    barrier: Option<Barrier>,
    /// Batches of which something may be in the text, the newest last.
    live: Vec<Batch>,
    is_armed: bool,
    /// A site that had other bytes than those written as soon as they were: where, those written,
    /// those found.
    overwritten: Option<(RemoteAddr, Vec<u8>, Vec<u8>)>,
    report: Report,
}

fn at<E>(step: &'static str) -> impl Fn(E) -> Setback<E> {
    move |error| Setback::Error(step, error)
}

impl<T: Target> Commit<'_, T> {
    /// Steps 2 to 9; up to the gate's opening, where there is one.
    fn forward(&mut self) -> Result<(), Setback<T::Error>> {
        self.wait_for_handlers()?;
        let n_sites = self.plan.pokes.len();
        let mut start = 0;
        while start < n_sites {
            let at_once = self.target.sites_at_once().max(1);
            let end = n_sites.min(start.saturating_add(at_once));
            self.change(&(start..end))?;
            self.report.n_batches += 1;
            start = end;
        }
        match &mut self.barrier {
            None => self.close().map_err(at("closing the window")),
            Some(barrier) => barrier.unlock(self.target).map_err(at("letting the loader go on")),
        }
    }

    /// Waits, before the first breakpoint, for handlers that interrupted a thread inside.
    fn wait_for_handlers(&mut self) -> Result<(), Setback<T::Error>> {
        let inner = self.plan.pokes.iter().flat_map(Poke::inner_moves);
        let places: Vec<RemoteAddr> = inner.map(|(from, _)| from).collect();
        if places.is_empty() {
            return Ok(());
        }
        for _ in 0..ATTEMPTS {
            if self.target.look(&places).map_err(at(EVACUATING))?.is_empty() {
                break;
            }
            self.target.wait_a_moment(PAUSE_OUTSIDE).map_err(at(EVACUATING))?;
        }
        Ok(())
    }

    /// Steps 2 to 8 for some of the sites.
    fn change(&mut self, sites: &Range<usize>) -> Result<(), Setback<T::Error>> {
        for attempt in 1.. {
            match self.attempt(sites, attempt) {
                Err(Setback::Busy(_) | Setback::Loading(_)) if attempt < ATTEMPTS => {
                    self.retreat()?
                }
                outcome => return outcome,
            }
        }
        unreachable!("the last attempt returns")
    }

    /// Takes the newest batch back and lets handlers run.
    fn retreat(&mut self) -> Result<(), Setback<T::Error>> {
        let step = "taking breakpoints back";
        let Some(batch) = self.live.pop() else { return Ok(()) };
        if let Err(stuck) = self.undo_batch(&batch) {
            // Once more, with all the others.
            self.live.push(batch);
            return Err(match stuck {
                Stuck::Error(error) => Setback::Error(step, error),
                Stuck::Inside(site) => Setback::Busy(site),
            });
        }
        if self.live.is_empty() {
            self.open_gate().map_err(at(step))?;
        }
        self.target.wait_a_moment(PAUSE_OUTSIDE).map_err(at(step))
    }

    fn attempt(&mut self, sites: &Range<usize>, attempt: u32) -> Result<(), Setback<T::Error>> {
        let mut traps: Vec<Trap> = self.plan.pokes[sites.clone()].iter().map(trap).collect();
        traps.extend(self.barrier.as_ref().map(Barrier::trap));
        self.target.arm(&traps).map_err(at("arming"))?;
        self.is_armed = true;
        self.live.push(Batch { sites: sites.clone(), stage: Stage::Gate });
        self.shut_gate(LOOKS_AT_LOADER << attempt)?;
        let opened = Instant::now();
        self.reach(Stage::Breakpoints);
        self.write(sites, |_| INT3.into()).map_err(at("setting breakpoints"))?;
        self.target.sync_core().map_err(at("synchronising after the breakpoints"))?;
        self.evacuate(sites, 1 << attempt)?;
        self.reach(Stage::Tails);
        self.write(sites, |poke| Part { skip: 1, bytes: poke.new_bytes()[1..].to_vec() })
            .map_err(at("writing tails"))?;
        self.target.sync_core().map_err(at("synchronising after the tails"))?;
        self.reach(Stage::FirstBytes);
        self.write(sites, |poke| poke.new[0].into()).map_err(at("writing first bytes"))?;
        self.read_back(sites);
        self.target.sync_core().map_err(at("synchronising after the first bytes"))?;
        self.report.window = self.report.window.max(opened.elapsed());
        self.target.release().map_err(at("letting threads go on"))
    }

    /// Keeps the loader from unmapping libraries, waits until it is doing so nowhere, and sees that
    /// all sites are still what they were. They stay that until the gate is opened.
    fn shut_gate(&mut self, looks: u32) -> Result<(), Setback<T::Error>> {
        let barrier = self.barrier.as_mut().filter(|barrier| !barrier.is_shut());
        let Some(barrier) = barrier else { return Ok(()) };
        barrier.shut(self.target).map_err(at("keeping the loader waiting"))?;
        let pokes = &self.plan.pokes;
        let places: Vec<RemoteAddr> = pokes.iter().map(|poke| poke.site).collect();
        for _ in 0..looks {
            if barrier.is_quiet(self.target).map_err(at(SHUTTING))? {
                compare(self.target, pokes)?;
                if self.target.are_executable(&places).map_err(at(SHUTTING))? {
                    return Ok(());
                }
            }
            self.target.wait_a_moment(PAUSE_INSIDE).map_err(at(SHUTTING))?;
        }
        Err(Setback::Loading(barrier.stop()))
    }

    /// Lets the loader go on, where it was kept from that.
    fn open_gate(&mut self) -> Result<(), T::Error> {
        self.barrier.as_mut().map_or(Ok(()), |barrier| barrier.open(self.target))
    }

    /// Notes the first site that does not have what has just been written.
    fn read_back(&mut self, sites: &Range<usize>) {
        for pokes in self.plan.pokes[sites.clone()].chunks(READ_AT_ONCE) {
            let parts: Vec<_> = pokes.iter().map(|poke| (poke.site, poke.n_bytes())).collect();
            for (poke, found) in pokes.iter().zip(self.target.read_each(&parts)) {
                // Where there is no gate, a library may have been closed: its bytes do not matter.
                if let Ok(found) = found
                    && found != poke.new_bytes()
                {
                    let written = poke.new_bytes().to_vec();
                    self.overwritten.get_or_insert((poke.site, written, found));
                }
            }
        }
    }

    fn reach(&mut self, stage: Stage) {
        let newest = self.live.last_mut().expect("it was pushed when its breakpoints were set");
        newest.stage = stage;
    }

    /// What is left when all is changed and the gate unlocked. From here on nothing can be taken
    /// back: a library may have been closed, and who knows what has come in its place.
    fn end(&mut self) -> Result<(), CommitError<T::Error>> {
        let step = "closing the window when all had been changed";
        let Err(source) = self.open_and_close() else { return Ok(()) };
        self.open_and_close().map_err(|undo| CommitError::Broken { step, source, undo })
    }

    fn open_and_close(&mut self) -> Result<(), T::Error> {
        self.open_gate()?;
        self.close()
    }

    fn close(&mut self) -> Result<(), T::Error> {
        self.target.drain()?;
        self.target.disarm()
    }

    /// Everything back, from wherever `forward` has got to. Goes on with what it can when some
    /// of it fails, and says what failed first.
    fn undo(&mut self) -> Result<(), Stuck<T::Error>> {
        let mut undone = Ok(());
        while let Some(batch) = self.live.pop() {
            undone = undone.and(self.undo_batch(&batch));
        }
        if let Err(error) = self.open_gate() {
            undone = undone.and(Err(Stuck::Error(error)));
        }
        match undone {
            // Whoever runs into a breakpoint that is left is still answered, as long as we live.
            Err(Stuck::Error(error)) => Err(Stuck::Error(error)),
            other if self.is_armed => self.close().map_err(Stuck::Error).and(other),
            other => other,
        }
    }

    fn undo_batch(&mut self, batch: &Batch) -> Result<(), Stuck<T::Error>> {
        let mut sites = Sites { left: batch.sites.clone().collect(), failed: None };
        let mut kept = None;
        if batch.stage == Stage::Gate {
            sites.left.clear();
        }
        if batch.stage == Stage::FirstBytes {
            self.write_each(&mut sites, |_| INT3.into());
            match self.leave_new_bytes(&sites.left) {
                Ok(stay) => {
                    kept = stay.first().map(|&site| self.plan.pokes[site].site);
                    self.keep_new(&mut sites, &stay);
                }
                Err(error) => {
                    let all = sites.left.clone();
                    self.keep_new(&mut sites, &all);
                    sites.failed.get_or_insert(error);
                }
            }
        }
        if matches!(batch.stage, Stage::Tails | Stage::FirstBytes) {
            let tail = |poke: &Poke| Part { skip: 1, bytes: poke.old()[1..].to_vec() };
            self.write_each(&mut sites, tail);
            // Without it a breakpoint is the better thing to run into.
            self.target.sync_core().map_err(Stuck::Error)?;
        }
        self.write_each(&mut sites, |poke| poke.old()[0].into());
        let released = self.target.sync_core().and_then(|()| self.target.release());
        match (sites.failed.or(released.err()), kept) {
            (Some(error), _) => Err(Stuck::Error(error)),
            (None, Some(site)) => Err(Stuck::Inside(site)),
            (None, None) => Ok(()),
        }
    }

    /// Gives up on taking these sites back: they have the new bytes again, all of them.
    fn keep_new(&mut self, sites: &mut Sites<T::Error>, kept: &[usize]) {
        let failed = sites.failed.take();
        let mut new = Sites { left: kept.to_vec(), failed };
        self.write_each(&mut new, |poke| poke.new[0].into());
        sites.failed = new.failed;
        sites.left.retain(|site| !kept.contains(site));
    }

    /// Has every CPU see the breakpoints at these sites, and waits until nobody is inside new
    /// instructions any more, where there are several. The sites at which somebody stays.
    fn leave_new_bytes(&mut self, sites: &[usize]) -> Result<Vec<usize>, T::Error> {
        self.target.sync_core()?;
        let plan = self.plan;
        let inside = sites.iter().flat_map(|&site| plan.pokes[site].inside_new());
        let stay: Vec<_> = inside.map(|addr| (addr, addr)).collect();
        if stay.is_empty() {
            return Ok(Vec::new());
        }
        let mut words = Vec::new();
        for _ in 0..1 << ATTEMPTS {
            words = self.target.evacuate(&stay)?;
            if words.is_empty() {
                break;
            }
            self.target.wait_a_moment(PAUSE_INSIDE)?;
        }
        let holds = |&&site: &&usize| words.iter().any(|&word| plan.pokes[site].contains(word));
        Ok(sites.iter().filter(holds).copied().collect())
    }

    fn write(
        &mut self,
        sites: &Range<usize>,
        part: impl Fn(&Poke) -> Part,
    ) -> Result<(), T::Error> {
        for poke in &self.plan.pokes[sites.clone()] {
            let Part { skip, bytes } = part(poke);
            self.target.write_text(poke.site.offset(skip), &bytes)?;
        }
        Ok(())
    }

    /// As `write`, but a site that cannot be written is left alone from then on, and does not
    /// keep the others from it.
    fn write_each(&mut self, sites: &mut Sites<T::Error>, part: impl Fn(&Poke) -> Part) {
        let Sites { left, failed } = sites;
        left.retain(|&site| {
            let poke = &self.plan.pokes[site];
            let Part { skip, bytes } = part(poke);
            match self.target.write_text(poke.site.offset(skip), &bytes) {
                Ok(()) => true,
                Err(error) => {
                    failed.get_or_insert(error);
                    false
                }
            }
        });
    }

    fn evacuate(&mut self, sites: &Range<usize>, looks: u32) -> Result<(), Setback<T::Error>> {
        let pokes = &self.plan.pokes[sites.clone()];
        let moves: Vec<_> = pokes.iter().flat_map(Poke::inner_moves).collect();
        if moves.is_empty() {
            return Ok(());
        }
        for look in 1.. {
            let inside = self.target.evacuate(&moves).map_err(at(EVACUATING))?;
            self.report.n_evacuations += 1;
            let Some(&word) = inside.first() else {
                break;
            };
            if look >= looks {
                return Err(Setback::Busy(self.site_around(word)));
            }
            self.target.wait_a_moment(PAUSE_INSIDE).map_err(at(EVACUATING))?;
        }
        Ok(())
    }

    fn site_around(&self, addr: RemoteAddr) -> RemoteAddr {
        self.plan.pokes.iter().find(|poke| poke.contains(addr)).map_or(addr, |poke| poke.site)
    }
}

/// Sites that are on their way back, by their place in the plan, and what failed first.
struct Sites<E> {
    left: Vec<usize>,
    failed: Option<E>,
}

/// Bytes for a part of a site.
struct Part {
    skip: i64,
    bytes: Vec<u8>,
}

impl From<u8> for Part {
    fn from(first: u8) -> Self {
        Self { skip: 0, bytes: vec![first] }
    }
}

/// Sites are compared this many at a time, so that what was read is a moment old.
const READ_AT_ONCE: usize = 1024;

fn compare<T: Target>(target: &mut T, pokes: &[Poke]) -> Result<(), Setback<T::Error>> {
    for pokes in pokes.chunks(READ_AT_ONCE) {
        let parts: Vec<_> = pokes.iter().map(|poke| (poke.site, poke.expected.len())).collect();
        for (poke, found) in pokes.iter().zip(target.read_each(&parts)) {
            let found = found.map_err(at(COMPARING))?;
            if found != poke.expected {
                if !target.are_executable(&[poke.site]).map_err(at(COMPARING))? {
                    return Err(Setback::Closed(poke.site));
                }
                let expected = poke.expected.clone();
                return Err(Setback::Differs { site: poke.site, expected, found });
            }
        }
    }
    Ok(())
}
