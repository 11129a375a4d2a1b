//! Our breakpoints in the target, and what a thread's signal mask was before it ran into one.
//!
//! # What the kernel does to a thread that runs into `int3`
//!
//! force_sig_info_to_task() (kernel/signal.c, 6.18) makes sure that a SIGTRAP which the CPU
//! itself raised is not missed: where the signal is *blocked* it is unblocked, and where it is
//! blocked or ignored the process's handler is reset to SIG_DFL. Then the thread stops for
//! its tracer, who suppresses the signal. Both changes have to be taken back:
//!
//! 1. The mask. At the stop it lacks SIGTRAP whether SIGTRAP was blocked or not, and the kernel
//!    keeps no trace of which. So masks are noted before the first breakpoint is written, and
//!    when a thread is born, and [`was_blocked`] decides: the noted mask says it if the thread
//!    has not changed its mask since; if it has, a mask that blocks every classic signal except
//!    just SIGTRAP is one made by sigfillset (glibc does so around clone, Go around fork).
//!    What remains: a thread that, between the note and the trap (about a millisecond), adds
//!    SIGTRAP and *not* everything else to its mask will find SIGTRAP unblocked.
//! 2. The disposition, kept where it is not SIG_DFL to begin with: see `sigtrap`. A handler is
//!    put back by the trapped thread itself, before it goes on; SIG_IGN when the window closes.
//!    Until then another thread that asks for it sees SIG_DFL: that cannot be helped.
//!
//! A SIGTRAP that was pending already swallows ours: the kernel queues each classic signal once.
//! That shows as a stop behind one of our breakpoints with another `si_code`. The thread goes on
//! as from a trap; the signal is queued again once the mask is back, or, where it is not blocked
//! (sent in the microsecond before the thread ran into the breakpoint), delivered. What remains:
//! where an instruction starts right behind the breakpoint, such a thread cannot be told from one
//! that stood there when its own signal came, until it has been seen elsewhere or threads have
//! been moved out; the latter is assumed.

use std::collections::BTreeMap;

use flea_symbols::addr::RemoteAddr;

use crate::proc::SignalSet;

/// One breakpoint: where it is, and where a thread goes on that runs into it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    /// The byte that is, or will be, `int3`.
    pub site: RemoteAddr,
    /// Code that does what the replaced instructions did, or what replaces them.
    pub goes_to: RemoteAddr,
    /// The byte behind it starts an instruction: a thread may stand there that has not run into
    /// the breakpoint, until threads have been moved out.
    pub starts_behind: bool,
}

impl Trap {
    /// Whether threads are to wait here until the breakpoint has gone, and then execute what it
    /// stands in front of.
    #[must_use]
    pub fn is_gate(&self) -> bool {
        self.goes_to == self.site
    }
}

/// The breakpoints of one window.
#[derive(Debug, Default)]
pub(crate) struct TrapTable {
    by_site: BTreeMap<RemoteAddr, Trap>,
    /// Nobody stands inside replaced bytes any more, or comes there but by a breakpoint.
    evacuated: bool,
    /// Every CPU has seen every breakpoint.
    synced: bool,
}

impl TrapTable {
    pub(crate) fn add(&mut self, traps: &[Trap]) {
        self.evacuated = false;
        self.synced = false;
        self.by_site.extend(traps.iter().map(|&trap| (trap.site, trap)));
    }

    pub(crate) fn clear(&mut self) {
        self.by_site.clear();
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.by_site.is_empty()
    }

    /// Where a thread goes on whose instruction pointer is right behind a breakpoint.
    pub(crate) fn target_behind(&self, pc: RemoteAddr) -> Option<RemoteAddr> {
        self.by_site.get(&pc.offset(-1)).map(|trap| trap.goes_to)
    }

    /// Whether a thread right behind a gate has certainly run into it: its bytes are the same before
    /// and after, and nobody comes from its first byte to the one behind it otherwise.
    pub(crate) fn is_certain_gate_behind(&self, pc: RemoteAddr) -> bool {
        let trap = self.by_site.get(&pc.offset(-1));
        trap.is_some_and(|trap| trap.is_gate() && !trap.starts_behind)
    }

    pub(crate) fn note_synced(&mut self) {
        self.synced = true;
    }

    /// Whether a thread seen at `pc` gets behind a breakpoint from now on only by running into
    /// it. (Unless a signal's handler returns there; `evacuate` waits for those.)
    pub(crate) fn is_outside(&self, pc: RemoteAddr) -> bool {
        self.synced && self.target_behind(pc).is_none()
    }

    pub(crate) fn note_evacuated(&mut self) {
        self.evacuated = true;
    }

    /// Whether a thread right behind a breakpoint has certainly run into it.
    pub(crate) fn leads_behind(&self, pc: RemoteAddr) -> bool {
        let trap = self.by_site.get(&pc.offset(-1));
        trap.is_some_and(|trap| self.evacuated || !trap.starts_behind)
    }
}

/// Whether a thread blocked SIGTRAP before the kernel forced one on it. `noted` is its mask
/// when we last knew it, `now` the one at the stop.
pub(crate) fn was_blocked(noted: SignalSet, now: SignalSet) -> bool {
    let unchanged = noted.without(libc::SIGTRAP) == now.without(libc::SIGTRAP);
    if unchanged { noted.contains(libc::SIGTRAP) } else { is_filled_but_for_sigtrap(now) }
}

fn is_filled_but_for_sigtrap(mask: SignalSet) -> bool {
    const UNBLOCKABLE: [i32; 3] = [libc::SIGKILL, libc::SIGSTOP, libc::SIGTRAP];
    (1..32).all(|signal| mask.contains(signal) != UNBLOCKABLE.contains(&signal))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_before_the_trap() {
        let none = SignalSet(0);
        let filled = SignalSet::ALL.without(libc::SIGKILL).without(libc::SIGSTOP);
        let some = none.with(libc::SIGUSR1);
        assert!(!was_blocked(none, none), "never blocked");
        assert!(was_blocked(filled, filled.without(libc::SIGTRAP)), "blocked all along");
        assert!(was_blocked(some.with(libc::SIGTRAP), some), "blocked by itself");
        assert!(!was_blocked(filled, none), "a new thread that has taken its own mask");
        assert!(!was_blocked(filled, some), "the same with a mask of its own");
        assert!(was_blocked(none, filled.without(libc::SIGTRAP)), "filled since");
    }

    #[test]
    fn only_right_behind() {
        let mut table = TrapTable::default();
        let trap = Trap { site: RemoteAddr(16), goes_to: RemoteAddr(99), starts_behind: true };
        table.add(&[trap]);
        assert_eq!(table.target_behind(RemoteAddr(17)), Some(RemoteAddr(99)));
        assert_eq!(table.target_behind(RemoteAddr(16)), None);
        assert!(!table.leads_behind(RemoteAddr(17)), "perhaps it was there before");
        assert!(!table.is_outside(RemoteAddr(50)), "a CPU may not have seen it yet");
        table.note_synced();
        assert!(table.is_outside(RemoteAddr(50)));
        assert!(!table.is_outside(RemoteAddr(17)));
        table.note_evacuated();
        assert!(table.leads_behind(RemoteAddr(17)), "only the breakpoint leads there now");
        assert!(!table.leads_behind(RemoteAddr(16)));
        table.add(&[Trap { site: RemoteAddr(32), starts_behind: false, ..trap }]);
        assert!(!table.leads_behind(RemoteAddr(17)), "a wider window needs another evacuation");
        assert!(table.leads_behind(RemoteAddr(33)), "in the middle of an instruction");
        let gate = Trap { site: RemoteAddr(48), goes_to: RemoteAddr(48), starts_behind: false };
        table.add(&[gate, Trap { site: RemoteAddr(64), goes_to: RemoteAddr(64), ..trap }]);
        assert!(table.is_certain_gate_behind(RemoteAddr(49)));
        assert!(!table.is_certain_gate_behind(RemoteAddr(65)), "it may fall behind itself");
        assert!(!table.is_certain_gate_behind(RemoteAddr(33)), "no gate");
        table.clear();
        assert!(table.is_empty());
    }
}
