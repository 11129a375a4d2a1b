//! How urgently the tracer is served by the scheduler.
//!
//! A thread of the target that stands at a breakpoint, or has lent itself for a system call,
//! waits for the tracer, and on a busy machine the tracer waits for a CPU: four milliseconds each
//! time where the others use their slices up. All of this is no more than a wish: what the
//! system refuses is not asked for again, and everything works without.

use std::mem::MaybeUninit;
use std::ptr;
use std::time::{Duration, Instant};

/// A slice that short has a thread that wakes up served before those with longer ones (since
/// Linux 6.12, and without any right).
const SLICE_NS: u64 = 100_000;
/// Above the target's threads if those are real-time threads of low priority, below the kernel's
/// interrupt threads.
const PRIORITY: u32 = 10;

/// What takes longer than this is no longer urgent: nothing of ours may keep a CPU from the rest of
/// the machine.
const AT_MOST: Duration = Duration::from_millis(10);

#[expect(clippy::cast_possible_truncation, reason = "56 bytes")]
const SIZE: u32 = size_of::<libc::sched_attr>() as u32;

/// The scheduling of the tracer's thread.
#[derive(Debug, Default)]
pub(crate) struct Urgency {
    /// Reasons to hurry.
    n_reasons: u32,
    /// Until when it is served first; `None` where it is not.
    until: Option<Instant>,
    is_refused: bool,
}

impl Urgency {
    /// Threads of the target wait from now on.
    pub(crate) fn press(&mut self) {
        self.n_reasons += 1;
        if self.n_reasons == 1 && !self.is_refused {
            self.is_refused = !is_ordinary() || !set(libc::SCHED_FIFO, PRIORITY, 0);
            self.until = (!self.is_refused).then(|| Instant::now() + AT_MOST);
        }
    }

    /// To be called now and then: gives way where it took too long.
    pub(crate) fn relax(&mut self) {
        if self.until.is_some_and(|until| Instant::now() > until) {
            self.give_way();
        }
    }

    fn give_way(&mut self) {
        if self.until.take().is_some() {
            set(libc::SCHED_OTHER, 0, SLICE_NS);
        }
    }

    /// One reason less to hurry.
    pub(crate) fn ease(&mut self) {
        self.n_reasons = self.n_reasons.saturating_sub(1);
        if self.n_reasons == 0 {
            self.give_way();
        }
    }
}

/// What the tracer thread asks for itself once: to be served before the threads that wait for
/// it, and to be woken when it said.
pub(crate) fn hurry() {
    // SAFETY: both calls take numbers only, and concern this thread alone. Without the right
    // to the first it is refused; it is no more than a wish.
    let _refused = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
    // SAFETY: as above.
    let _refused = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1, 0, 0, 0) };
    if is_ordinary() {
        set(libc::SCHED_OTHER, 0, SLICE_NS);
    }
}

/// This thread, and whatever it starts meanwhile, is served before others that want a CPU; it has
/// what it had before when this is dropped. For one that waits for a tracer most of the time: on a
/// busy machine each of the threads and processes on the way there and back would wait for its turn.
pub(crate) struct Hurried {
    before: Option<libc::sched_attr>,
}

impl Hurried {
    pub(crate) fn begin() -> Self {
        let before = attributes().filter(|_| is_ordinary());
        if before.is_some() {
            // SAFETY: it takes numbers only, and concerns this thread alone. Without the right to
            // it, it is refused; it is no more than a wish.
            let _refused = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -20) };
            set(libc::SCHED_OTHER, 0, SLICE_NS);
        }
        Self { before }
    }
}

impl Drop for Hurried {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let restored = set_attributes(before);
            debug_assert!(restored, "it has less than now, which needs no right");
        }
    }
}

/// Nobody has chosen a policy for us, by chrt(1) perhaps.
fn is_ordinary() -> bool {
    policy() == libc::SCHED_OTHER
}

fn policy() -> i32 {
    // SAFETY: it takes a number only.
    unsafe { libc::sched_getscheduler(0) }
}

/// Sets the policy of this thread, its niceness as it is. Whether the system did.
fn set(policy: i32, priority: u32, slice_ns: u64) -> bool {
    // SAFETY: it takes numbers only.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    set_attributes(&libc::sched_attr {
        size: SIZE,
        sched_policy: policy.cast_unsigned(),
        sched_flags: 0,
        sched_nice: nice,
        sched_priority: priority,
        sched_runtime: slice_ns,
        sched_deadline: 0,
        sched_period: 0,
    })
}

fn set_attributes(attr: &libc::sched_attr) -> bool {
    // SAFETY: the structure lives for the call, and has its size in itself.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, ptr::from_ref(attr), 0) == 0 }
}

/// How this thread is scheduled.
fn attributes() -> Option<libc::sched_attr> {
    let mut attr = MaybeUninit::<libc::sched_attr>::zeroed();
    // SAFETY: the system writes as many bytes as it is told that there are.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, attr.as_mut_ptr(), SIZE, 0) };
    // SAFETY: all of its fields are numbers, for which zero is a value as well.
    (got == 0).then(|| unsafe { attr.assume_init() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hurried_and_back() {
        let shown = || attributes().map(|a| (a.sched_policy, a.sched_nice, a.sched_runtime));
        let before = shown();
        assert!(before.is_some());
        let hurried = Hurried::begin();
        let (_, _, slice_ns) = shown().unwrap();
        assert!(slice_ns == SLICE_NS || before == shown(), "{slice_ns}");
        let child = std::thread::spawn(move || attributes().map(|a| a.sched_nice));
        assert_eq!(child.join().unwrap(), shown().map(|(_, nice, _)| nice));
        drop(hurried);
        assert_eq!(shown(), before);
    }

    #[test]
    fn urgent_and_back() {
        let before = policy();
        let mut urgency = Urgency::default();
        urgency.press();
        urgency.press();
        let urgent = if urgency.is_refused { before } else { libc::SCHED_FIFO };
        assert_eq!(policy(), urgent);
        urgency.ease();
        assert_eq!(policy(), urgent, "there is one more reason");
        urgency.ease();
        assert_eq!(policy(), before);
        urgency.press();
        std::thread::sleep(AT_MOST);
        assert_eq!(policy(), urgent);
        urgency.relax();
        assert_eq!(policy(), before, "it took too long");
        urgency.ease();
        assert_eq!(policy(), before);
    }
}
