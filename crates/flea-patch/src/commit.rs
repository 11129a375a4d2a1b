//! The commit: a user-space text_poke (as arch/x86/kernel/alternative.c, smp_text_poke_batch,
//! does for the kernel), with threads moved instead of stopped.
//!
//! # Order
//!
//! Protected: that a thread executes the old instructions or the new one, never a mixture.
//! By: a breakpoint on the first byte while the others change, and the proof that nobody
//! stands behind it.
//!
//! 1. Every site is compared with what is expected. From here on nothing may differ.
//! 2. *Breakpoints* on all first bytes. A thread that arrives goes on at `trap_to`.
//! 3. *Sync*: no CPU executes an old first byte any more.
//! 4. *Evacuation*: threads that stand at an inner instruction are moved to its copy; signal
//!    frames that return to one are waited for. After this, nobody is inside or comes inside:
//!    the only way in is the breakpoint.
//! 5. *Tails*: the bytes behind the breakpoint. 6. *Sync*.
//! 7. *First bytes*: from this instant, site by site, the new code runs. 8. *Sync*.
//! 9. *Drain*: no trap is on its way any more; breakpoints are forgotten.
//! 10. What was written is read back.
//!
//! Three syncs, however many sites. Until 7 everything can be taken back, by the same steps:
//! the old tails (nobody is inside, or the tails have not been touched), sync, the old first
//! bytes, sync, drain. A step that fails half-way is taken back as well.

use std::time::{Duration, Instant};

use flea_process::Trap;
use flea_symbols::addr::RemoteAddr;

use crate::plan::{Plan, PlanError, Poke};
use crate::target::Target;

const INT3: u8 = 0xcc;
/// How often to look for threads inside, and how long to let them run in between: a signal
/// handler that takes longer is given up on.
const EVACUATION_ATTEMPTS: u32 = 40;
const EVACUATION_PAUSE: Duration = Duration::from_millis(5);

/// What a commit did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Sites changed.
    pub n_sites: usize,
    /// Looks that were needed until nobody was inside.
    pub n_evacuations: u32,
    /// From the first breakpoint to the last byte: how long threads may have run into one.
    pub window: Duration,
    /// Altogether.
    pub elapsed: Duration,
}

/// Why a commit was not made. Unless it says otherwise, the text is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum CommitError<E: std::error::Error + 'static> {
    /// The plan makes no sense.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// Other bytes than expected: another tool is there, or another version of the file.
    /// Nothing has been written.
    #[error(
        "at {site} stands {found:02x?}, not {expected:02x?}: another tool may have changed it; nothing was changed"
    )]
    Mismatch {
        /// The site.
        site: RemoteAddr,
        /// Bytes expected.
        expected: Vec<u8>,
        /// Bytes there.
        found: Vec<u8>,
    },
    /// A thread stays between the replaced instructions (in a signal handler that
    /// interrupted it there). Everything has been put back.
    #[error(
        "a thread was interrupted inside the bytes at {site} by a signal handler that does not return; nothing was changed; try again"
    )]
    Busy {
        /// The site.
        site: RemoteAddr,
    },
    /// An operation on the process failed; everything has been put back.
    #[error("{step}: {source}; everything was put back")]
    Failed {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: E,
    },
    /// An operation failed, and then putting things back as well. If the process lives, it
    /// may meet a breakpoint that nobody answers.
    #[error("{step}: {source}; and putting the old bytes back failed: {undo}")]
    Broken {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        source: E,
        /// Why putting back failed.
        undo: E,
    },
    /// As [`CommitError::Busy`], but then putting things back failed.
    #[error(
        "a thread stays inside the bytes at {site}, and putting the old bytes back failed: {undo}"
    )]
    Stranded {
        /// The site.
        site: RemoteAddr,
        /// Why putting back failed.
        undo: E,
    },
    /// The bytes read back are not the ones written: somebody else patches as well.
    #[error(
        "at {site} stands {found:02x?} right after {written:02x?} was written there: somebody else is patching this process"
    )]
    ReadBack {
        /// The site.
        site: RemoteAddr,
        /// Bytes written.
        written: Vec<u8>,
        /// Bytes there.
        found: Vec<u8>,
    },
}

/// Makes the changes of `plan`, all of them or none.
pub fn commit<T: Target>(target: &mut T, plan: &Plan) -> Result<Report, CommitError<T::Error>> {
    let started = Instant::now();
    plan.check()?;
    compare(target, plan)?;
    if plan.pokes.is_empty() {
        return Ok(Report::default());
    }
    let traps: Vec<Trap> =
        plan.pokes.iter().map(|poke| Trap { site: poke.site, goes_to: poke.trap_to }).collect();
    target.arm(&traps).map_err(|source| CommitError::Failed { step: "arming", source })?;
    let mut commit = Commit { target, plan, opened: Instant::now(), n_evacuations: 0 };
    let outcome = commit.forward();
    let window = commit.opened.elapsed();
    let n_evacuations = commit.n_evacuations;
    match outcome {
        Ok(()) => {}
        Err(Setback::Busy(site)) => {
            return Err(match commit.undo() {
                Ok(()) => CommitError::Busy { site },
                Err(undo) => CommitError::Stranded { site, undo },
            });
        }
        Err(Setback::Error(step, source)) => {
            return Err(match commit.undo() {
                Ok(()) => CommitError::Failed { step, source },
                Err(undo) => CommitError::Broken { step, source, undo },
            });
        }
    }
    read_back(target, plan)?;
    let n_sites = plan.pokes.len();
    Ok(Report { n_sites, n_evacuations, window, elapsed: started.elapsed() })
}

enum Setback<E> {
    Busy(RemoteAddr),
    Error(&'static str, E),
}

struct Commit<'a, T> {
    target: &'a mut T,
    plan: &'a Plan,
    opened: Instant,
    n_evacuations: u32,
}

impl<T: Target> Commit<'_, T> {
    /// Steps 2 to 9.
    fn forward(&mut self) -> Result<(), Setback<T::Error>> {
        let at = |step| move |error| Setback::Error(step, error);
        self.write(|_| INT3.into()).map_err(at("setting breakpoints"))?;
        self.target.sync_core().map_err(at("synchronising after the breakpoints"))?;
        self.evacuate()?;
        self.write(|poke| Part { skip: 1, bytes: poke.new_bytes()[1..].to_vec() })
            .map_err(at("writing tails"))?;
        self.target.sync_core().map_err(at("synchronising after the tails"))?;
        self.write(|poke| poke.new[0].into()).map_err(at("writing first bytes"))?;
        self.close().map_err(at("closing the window"))
    }

    /// The way back, from wherever `forward` has got to. New first bytes may be there
    /// already: then those sites get their breakpoint again before their tail changes.
    fn undo(&mut self) -> Result<(), T::Error> {
        self.write(|_| INT3.into())?;
        self.target.sync_core()?;
        self.write(|poke| Part { skip: 1, bytes: poke.old()[1..].to_vec() })?;
        self.target.sync_core()?;
        self.write(|poke| poke.old()[0].into())?;
        self.close()
    }

    fn close(&mut self) -> Result<(), T::Error> {
        self.target.sync_core()?;
        self.target.drain()?;
        self.target.disarm()
    }

    fn write(&mut self, part: impl Fn(&Poke) -> Part) -> Result<(), T::Error> {
        for poke in &self.plan.pokes {
            let Part { skip, bytes } = part(poke);
            self.target.write_text(poke.site.offset(skip), &bytes)?;
        }
        Ok(())
    }

    fn evacuate(&mut self) -> Result<(), Setback<T::Error>> {
        let moves: Vec<_> = self.plan.pokes.iter().flat_map(Poke::inner_moves).collect();
        if moves.is_empty() {
            return Ok(());
        }
        let at = |error| Setback::Error("moving threads out of the replaced bytes", error);
        loop {
            let inside = self.target.evacuate(&moves).map_err(at)?;
            self.n_evacuations += 1;
            let Some(&word) = inside.first() else {
                return Ok(());
            };
            if self.n_evacuations >= EVACUATION_ATTEMPTS {
                return Err(Setback::Busy(self.site_around(word)));
            }
            self.target.wait_a_moment(EVACUATION_PAUSE).map_err(at)?;
        }
    }

    fn site_around(&self, addr: RemoteAddr) -> RemoteAddr {
        let inside =
            |poke: &&Poke| addr >= poke.site && addr.0 - poke.site.0 < poke.n_bytes() as u64;
        self.plan.pokes.iter().find(inside).map_or(addr, |poke| poke.site)
    }
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

fn compare<T: Target>(target: &mut T, plan: &Plan) -> Result<(), CommitError<T::Error>> {
    for poke in &plan.pokes {
        let mut found = vec![0; poke.expected.len()];
        target
            .read(poke.site, &mut found)
            .map_err(|source| CommitError::Failed { step: "comparing", source })?;
        if found != poke.expected {
            let expected = poke.expected.clone();
            return Err(CommitError::Mismatch { site: poke.site, expected, found });
        }
    }
    Ok(())
}

fn read_back<T: Target>(target: &mut T, plan: &Plan) -> Result<(), CommitError<T::Error>> {
    for poke in &plan.pokes {
        let mut found = vec![0; poke.n_bytes()];
        // Unmapped by now: the library has been closed, and its bytes do not matter.
        if target.read(poke.site, &mut found).is_ok() && found != poke.new_bytes() {
            let written = poke.new_bytes().to_vec();
            return Err(CommitError::ReadBack { site: poke.site, written, found });
        }
    }
    Ok(())
}
