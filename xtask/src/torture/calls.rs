//! Calls of one function that are known from outside, to compare counts with: when each began
//! and ended, at the widest.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

/// Calls that are kept: some seconds of a fast target.
const MAX_KEPT: usize = 400_000;
/// What clocks of two threads may differ by when somebody sets the time meanwhile.
const CLOCK_SLACK: Duration = Duration::from_micros(50);

/// The calls so far.
#[derive(Default)]
pub struct Calls(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    /// Number of the first that is kept.
    first: u64,
    calls: VecDeque<(SystemTime, Option<SystemTime>)>,
}

/// A call that has not ended.
#[derive(Clone, Copy)]
pub struct Open(u64);

/// The bounds of a count.
#[derive(Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Calls that were counted for certain.
    pub least: u64,
    /// Calls that may have been.
    pub most: u64,
}

impl Calls {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that begins now at the earliest.
    pub fn begin(&self) -> Open {
        let mut kept = self.kept();
        kept.make_room();
        kept.calls.push_back((SystemTime::now(), None));
        Open(kept.first + kept.calls.len() as u64 - 1)
    }

    /// It has ended now at the latest.
    pub fn end(&self, call: Open) {
        let mut kept = self.kept();
        let index = call.0.checked_sub(kept.first).and_then(|i| usize::try_from(i).ok());
        if let Some(call) = index.and_then(|i| kept.calls.get_mut(i)) {
            call.1 = Some(SystemTime::now());
        }
    }

    /// One that is known afterwards.
    pub fn add(&self, begun: SystemTime, ended: SystemTime) {
        let mut kept = self.kept();
        kept.make_room();
        kept.calls.push_back((begun, Some(ended)));
    }

    /// Whether all calls are known that began before `time`.
    pub fn are_known_until(&self, time: SystemTime) -> bool {
        self.kept().calls.back().is_some_and(|call| call.0 > time)
    }

    /// What a count must be that began somewhere in `start` and ended somewhere in `end`;
    /// `None` where too many calls were made since.
    pub fn bounds(
        &self,
        start: (SystemTime, SystemTime),
        end: (SystemTime, SystemTime),
    ) -> Option<Bounds> {
        let kept = self.kept();
        if kept.first > 0 && kept.calls.front().is_some_and(|call| call.0 > start.0) {
            return None;
        }
        let mut bounds = Bounds { least: 0, most: 0 };
        for &(begun, ended) in &kept.calls {
            let inside =
                begun > start.1 + CLOCK_SLACK && ended.is_some_and(|e| e + CLOCK_SLACK < end.0);
            let outside = begun > end.1 + CLOCK_SLACK
                || ended.is_some_and(|ended| ended + CLOCK_SLACK < start.0);
            bounds.least += u64::from(inside);
            bounds.most += u64::from(!outside);
        }
        Some(bounds)
    }
}

impl Kept {
    fn make_room(&mut self) {
        if self.calls.len() == MAX_KEPT {
            self.calls.pop_front();
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_count_where_they_can_only_be_inside_or_may_be() {
        let calls = Calls::default();
        let at = |s: u64| SystemTime::UNIX_EPOCH + Duration::from_secs(s);
        for (begun, ended) in [(1, 2), (9, 11), (12, 13), (14, 15), (19, 21), (30, 31)] {
            calls.add(at(begun), at(ended));
        }
        let bounds = calls.bounds((at(5), at(10)), (at(20), at(22)));
        assert_eq!(bounds, Some(Bounds { least: 2, most: 4 }));
        assert!(calls.are_known_until(at(22)) && !calls.are_known_until(at(31)));
    }
}
