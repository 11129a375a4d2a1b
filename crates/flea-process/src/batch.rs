//! How many sites to change at a time.
//!
//! While breakpoints are there, threads wait. How long is the sum of what a batch costs whatever
//! its size (interrupting threads, having CPUs refetch) and of the writes. On an idle machine the
//! first is some tenths of a millisecond; on a busy one, or beside a thousand threads, it may be a
//! hundred times that, and small batches would make it the only thing that anybody waits for. So a
//! batch is as large as makes the writes take as long as the rest did last time.

use std::time::{Duration, Instant};

/// Three writes each, about a microsecond every one.
const FEWEST: usize = 128;
const MOST: usize = 4096;

/// What is known of the batch that is being changed and of the one before.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    began: Option<Instant>,
    n_sites: usize,
    writing: Duration,
    next: usize,
}

impl Batch {
    /// Sites to change next.
    pub(crate) fn size(&self) -> usize {
        self.next.max(FEWEST)
    }

    pub(crate) fn begin(&mut self, n_sites: usize) {
        self.began = Some(Instant::now());
        self.n_sites = n_sites;
        self.writing = Duration::ZERO;
    }

    pub(crate) fn note_writing(&mut self, time: Duration) {
        self.writing += time;
    }

    pub(crate) fn end(&mut self) {
        if let Some(began) = self.began.take() {
            self.next = balanced(self.n_sites, self.writing, began.elapsed());
        }
    }
}

/// How many sites take as long to write as the rest of this batch did, which may be twice as many
/// as there were at most: one slow moment is not the rule.
fn balanced(n_sites: usize, writing: Duration, all: Duration) -> usize {
    let rest = all.saturating_sub(writing).as_nanos();
    let each = (writing.as_nanos() / n_sites.max(1) as u128).max(1);
    let n_sites = n_sites.max(FEWEST);
    usize::try_from(rest / each).unwrap_or(MOST).clamp(FEWEST, MOST.min(2 * n_sites))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_take_as_long_as_the_rest() {
        let ms = Duration::from_millis;
        assert_eq!(balanced(1000, ms(2), ms(3)), 500, "half as long as the writes");
        assert_eq!(balanced(1000, ms(2), ms(50)), 2000, "at most twice as many");
        assert_eq!(balanced(4000, ms(2), ms(50)), MOST);
        assert_eq!(balanced(1, ms(0), ms(0)), FEWEST);
        assert_eq!(balanced(1000, ms(2), ms(2)), FEWEST);
    }
}
