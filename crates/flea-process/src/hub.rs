//! Several processes, traced by one thread: whose stop it is.
//!
//! A tracer thread is told of the stops of all its tracees, and each [`Tracer`] knows what to
//! answer to those of one process. While one of them is worked on, the hub answers for the
//! others; what a process makes (children, other programs in its place) is noted here.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::proc::{self, Pid, Tid};
use crate::ptrace::{self, Stop, Whose};
use crate::tracer::{TraceError, Tracer};

/// A child whose parent does not announce it within that time has none any more.
const ANNOUNCE_PATIENCE: Duration = Duration::from_millis(100);
/// A child that has been announced stops as soon as it is given a CPU.
const BIRTH_PATIENCE: Duration = Duration::from_secs(1);
/// Stops of other processes answered in a row: those of the present one wait meanwhile.
const OTHERS_AT_ONCE: u32 = 64;

/// What all tracers of one thread share.
#[derive(Clone, Default)]
pub(crate) struct Hub(Rc<RefCell<Inner>>);

#[derive(Default)]
struct Inner {
    /// All but the one that is worked on.
    tracers: BTreeMap<Pid, Tracer>,
    /// Threads that stand before their first instruction, and whose parent has not said yet that
    /// they are its children.
    unclaimed: Vec<Unclaimed>,
    newcomers: Vec<Newcomer>,
}

#[derive(Clone, Copy)]
struct Unclaimed {
    tid: Tid,
    /// Who has it for a child: mostly, but not surely, the one that it has its memory from.
    parent: Option<Pid>,
    stop: Stop,
    since: Instant,
}

/// A stopped process that nobody answers for yet.
#[derive(Clone, Debug)]
pub(crate) struct Newcomer {
    pub(crate) pid: Pid,
    /// Of whose memory it has, or had before it executed a program, a copy.
    pub(crate) parent: Pid,
    pub(crate) how: How,
    /// Who has a copy of the memory that it had before, and has not shown up yet: they are told of
    /// first, for what was attached to that memory is given up when nobody has it.
    behind: BTreeSet<Tid>,
    since: Instant,
}

/// Where a newcomer stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum How {
    /// Before its first instruction, with a copy of its parent's memory.
    Forked,
    /// At the first instruction of a program that it has executed.
    Executed,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The tracers in it refer to it.
        f.debug_list().entries(self.0.borrow().tracers.keys()).finish()
    }
}

impl Hub {
    /// The next stop of a thread of `tracer`; those of others are answered.
    pub(crate) fn next_for(&self, tracer: &Tracer) -> Result<Option<(Tid, Stop)>, Errno> {
        if let Some(found) = self.take_unclaimed(|tid| tracer.expected.contains(&tid)) {
            return Ok(Some(found));
        }
        for _ in 0..OTHERS_AT_ONCE {
            let Some((tid, stop)) = ptrace::poll_stop(Whose::Any)? else { return Ok(None) };
            if tracer.is_mine(tid) {
                return Ok(Some((tid, stop)));
            }
            self.dispatch(tid, stop);
        }
        Ok(None)
    }

    /// Answers a stop of a process that is not worked on.
    pub(crate) fn dispatch(&self, tid: Tid, stop: Stop) {
        let owner = {
            let inner = self.0.borrow();
            let mut tracers = inner.tracers.iter();
            tracers.find(|(_, tracer)| tracer.is_mine(tid)).map(|(&pid, _)| pid)
        };
        let Some(mut tracer) = owner.and_then(|pid| self.take(pid)) else {
            let (parent, since) = (proc::parent(tid), Instant::now());
            let unclaimed = Unclaimed { tid, parent, stop, since };
            self.0.borrow_mut().unclaimed.push(unclaimed);
            return;
        };
        // What fails here fails again for whoever asks, and says so.
        let _failed: Result<(), TraceError> = tracer.answer(tid, stop);
        self.put(tracer);
    }

    /// Hands children over to the tracers that expect them by now. Those whose parents have died
    /// in between are newcomers.
    pub(crate) fn claim(&self) {
        loop {
            let expected = |tid: Tid| {
                let inner = self.0.borrow();
                inner.tracers.values().any(|tracer| tracer.expected.contains(&tid))
            };
            let candidates: Vec<Tid> = self.0.borrow().unclaimed.iter().map(|u| u.tid).collect();
            let Some(tid) = candidates.into_iter().find(|&tid| expected(tid)) else { break };
            if let Some((tid, stop)) = self.take_unclaimed(|other| other == tid) {
                self.dispatch(tid, stop);
            }
        }
        let mut inner = self.0.borrow_mut();
        let Inner { tracers, unclaimed, newcomers } = &mut *inner;
        unclaimed.retain(|child| {
            let is_orphan = child.since.elapsed() > ANNOUNCE_PATIENCE;
            if is_orphan {
                let parent = child.parent.filter(|parent| tracers.contains_key(parent));
                newcomers.push(Newcomer {
                    pid: child.tid,
                    parent: parent.unwrap_or(child.tid),
                    how: How::Forked,
                    behind: BTreeSet::new(),
                    since: child.since,
                });
            }
            !is_orphan
        });
    }

    /// Whether a process is one that is followed already, or is about to be: its parent has announced
    /// it too late.
    pub(crate) fn knows(&self, pid: Pid) -> bool {
        self.0.borrow().tracers.contains_key(&pid) || self.is_newcomer(pid)
    }

    /// Whether a process stands still until those born before it have been told of.
    pub(crate) fn is_newcomer(&self, pid: Pid) -> bool {
        self.0.borrow().newcomers.iter().any(|newcomer| newcomer.pid == pid)
    }

    fn take_unclaimed(&self, is_it: impl Fn(Tid) -> bool) -> Option<(Tid, Stop)> {
        let mut inner = self.0.borrow_mut();
        let at = inner.unclaimed.iter().position(|unclaimed| is_it(unclaimed.tid))?;
        let Unclaimed { tid, stop, .. } = inner.unclaimed.swap_remove(at);
        Some((tid, stop))
    }

    /// Notes a process that is stopped and that nobody answers for. `behind` are children that its
    /// parent expects.
    pub(crate) fn announce(&self, pid: Pid, parent: Pid, how: How, behind: &BTreeSet<Tid>) {
        let behind = if how == How::Executed { behind.clone() } else { BTreeSet::new() };
        let newcomer = Newcomer { pid, parent, how, behind, since: Instant::now() };
        self.0.borrow_mut().newcomers.push(newcomer);
    }

    /// Those that can be answered for now, each behind whoever was born before it.
    pub(crate) fn take_newcomers(&self) -> Vec<Newcomer> {
        let mut inner = self.0.borrow_mut();
        let Inner { tracers, newcomers, .. } = &mut *inner;
        let is_ready = |newcomer: &Newcomer| {
            let tracer = tracers.get(&newcomer.parent);
            newcomer.since.elapsed() > BIRTH_PATIENCE
                || tracer.is_none_or(|tracer| tracer.expected.is_disjoint(&newcomer.behind))
        };
        let (mut ready, wait) = newcomers.drain(..).partition::<Vec<_>, _>(is_ready);
        *newcomers = wait;
        // Who has executed a program stands still: children told of since were born before.
        ready.sort_by_key(|newcomer| newcomer.how);
        ready
    }

    /// The tracer of a process, to be worked on.
    pub(crate) fn take(&self, pid: Pid) -> Option<Tracer> {
        self.0.borrow_mut().tracers.remove(&pid)
    }

    pub(crate) fn put(&self, mut tracer: Tracer) {
        tracer.hub = Some(self.clone());
        // The follower's process has seen to that.
        tracer.hears_stops = true;
        self.0.borrow_mut().tracers.insert(tracer.pid, tracer);
    }

    /// A thread has ended, and has been collected.
    pub(crate) fn forget(&self, tid: Tid) {
        let mut inner = self.0.borrow_mut();
        for tracer in inner.tracers.values_mut() {
            tracer.tasks.remove(&tid);
            tracer.expected.remove(&tid);
            tracer.held.remove(&tid);
        }
        inner.unclaimed.retain(|unclaimed| unclaimed.tid != tid);
        inner.newcomers.retain(|newcomer| newcomer.pid != tid);
    }

    /// Takes out the tracers of processes that have ended; their numbers.
    pub(crate) fn bury(&self) -> Vec<Pid> {
        let mut inner = self.0.borrow_mut();
        // Its children are handed over first.
        let gone = |tracer: &Tracer| {
            let is_parent = |child: &Unclaimed| child.parent == Some(tracer.pid);
            tracer.tasks.is_empty()
                && tracer.expected.is_empty()
                && tracer.held.is_empty()
                && !inner.unclaimed.iter().any(is_parent)
        };
        let ended: Vec<Pid> =
            inner.tracers.iter().filter(|(_, t)| gone(t)).map(|(&pid, _)| pid).collect();
        let dead: Vec<Option<Tracer>> = ended.iter().map(|pid| inner.tracers.remove(pid)).collect();
        // A tracer that is dropped looks into the hub once more.
        drop(inner);
        drop(dead);
        ended
    }

    /// Takes out all tracers.
    pub(crate) fn clear(&self) -> Vec<Tracer> {
        std::mem::take(&mut self.0.borrow_mut().tracers).into_values().collect()
    }

    /// Takes out all who stand still for want of a tracer.
    pub(crate) fn clear_newcomers(&self) -> Vec<Pid> {
        let mut inner = self.0.borrow_mut();
        let newcomers = std::mem::take(&mut inner.newcomers).into_iter().map(|n| n.pid);
        newcomers.chain(std::mem::take(&mut inner.unclaimed).into_iter().map(|u| u.tid)).collect()
    }
}

impl Tracer {
    /// Whether a thread is one of the process, or a child of it that it has to answer for.
    fn is_mine(&self, tid: Tid) -> bool {
        self.tasks.contains_key(&tid)
            || self.expected.contains(&tid)
            || self.held.contains(&tid)
            || proc::thread_status(self.pid, tid).is_ok()
    }

    /// Parts with a child that has memory of its own and is stopped: for ever, or with the hub.
    pub(crate) fn part_with(&mut self, child: Pid, how: How) -> Result<(), TraceError> {
        if let Some(hub) = &self.hub {
            hub.announce(child, self.pid, how, &self.expected);
            return Ok(());
        }
        let detached = ptrace::detach(child, 0);
        self.still_there(child, "letting go of a child", detached).map(drop)
    }
}
