//! Reads a ring buffer whose producers may never finish what they began: a thread that was
//! killed, or a signal handler that jumped away, leaves a record behind that nobody submits,
//! and nothing behind it can be read.

use std::time::{Duration, Instant};

use flea_maps::RingBuf;

/// A record takes microseconds. One that is still unfinished after this is given up.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks at the last records.
const PAUSE: Duration = Duration::from_millis(10);

/// A ring buffer's reader.
pub(super) struct Reader {
    ring: RingBuf,
    blocked: Option<Blocked>,
    n_given_up: u64,
}

/// The last time that the reader met an unfinished record which was not known to be old.
#[derive(Clone, Copy)]
struct Blocked {
    since: Instant,
    /// Records before this position had all begun by then.
    end: u64,
}

impl Reader {
    pub(super) fn new(ring: RingBuf) -> Self {
        Self { ring, blocked: None, n_given_up: 0 }
    }

    /// Records given up.
    pub(super) fn n_given_up(&self) -> u64 {
        self.n_given_up
    }

    /// Hands what is finished to `each`.
    pub(super) fn poll(&mut self, each: &mut dyn FnMut(&[u8])) {
        self.ring.poll(&mut *each);
        // Each turn moves the position on.
        while self.ring.is_blocked() {
            let (position, end) = self.ring.positions();
            let since = match self.blocked {
                Some(blocked) if position < blocked.end => blocked.since,
                _ => self.blocked.insert(Blocked { since: Instant::now(), end }).since,
            };
            if since.elapsed() < PATIENCE {
                return;
            }
            self.ring.skip_blocked();
            self.n_given_up += 1;
            self.ring.poll(&mut *each);
        }
    }

    /// Hands everything that is left to `each`, when no new records begin.
    pub(super) fn drain(&mut self, each: &mut dyn FnMut(&[u8])) {
        let began = Instant::now();
        self.poll(each);
        // What blocks now may be newer than what did last: twice the patience, and some time.
        while self.ring.is_blocked() && began.elapsed() < 3 * PATIENCE {
            std::thread::sleep(PAUSE);
            self.poll(each);
        }
    }
}
