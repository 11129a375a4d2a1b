//! RINGBUF: the consumer. The format is in `flea-runtime/src/ringbuf.rs`.
//!
//! The consumer's position is its own; the shared one is written for producers and read
//! once, at the start. Records are copied out before anybody looks at them, as the target
//! could change them meanwhile.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use flea_layout::plan::MapPlacement;
use flea_runtime::mem::{Shared, to_usize};
use flea_runtime::ringbuf::{
    BUSY, DISCARD, HEADER_BYTES, KIND_PADDING, KIND_RECORD, header_len, record_bytes, state,
};

use crate::arena::Arena;

/// A `BPF_MAP_TYPE_RINGBUF`'s consumer.
#[derive(Debug)]
pub struct RingBuf {
    arena: Arena,
    placement: MapPlacement,
    position: u64,
    record: Vec<u8>,
    resyncs: u64,
}

/// What is at the consumer's position.
enum Next {
    /// Nothing, or nothing finished.
    Wait,
    /// Bytes to skip.
    Skip(u64),
    /// A record of this many bytes.
    Record(u32),
    /// Something that no producer writes.
    Damaged,
}

impl RingBuf {
    pub(crate) fn new(arena: Arena, placement: MapPlacement) -> Self {
        let mut ring = Self { arena, placement, position: 0, record: Vec::new(), resyncs: 0 };
        ring.position = ring.word(state::CONSUMER);
        ring
    }

    /// Hands each finished record to `each`, oldest first, and gives its room back. Returns
    /// how many there were. Ends at the first record that is still being written, and at
    /// what was the end when it began.
    pub fn poll(&mut self, mut each: impl FnMut(&[u8])) -> usize {
        let size = u64::from(self.placement.max_entries);
        let arena = self.arena.clone();
        let memory = arena.memory();
        let Some(data) = memory.part(self.placement.data_offset, size) else { return 0 };
        let end = self.word(state::PRODUCER);
        let mut n_records = 0;
        loop {
            // Each turn moves the position on by at least 8, so there are at most size / 8.
            let available = end.wrapping_sub(self.position);
            if available == 0 {
                return n_records;
            }
            if available > size || !available.is_multiple_of(8) || !self.position.is_multiple_of(8)
            {
                self.resync(data, end);
                return n_records;
            }
            match self.next(data, available) {
                Next::Wait => return n_records,
                Next::Skip(bytes) => self.release(data, bytes),
                Next::Record(len) => {
                    if !self.copy(data, len) {
                        self.resync(data, end);
                        return n_records;
                    }
                    // The room is given back first, so that `each` may be slow.
                    self.release(data, record_bytes(u64::from(len)));
                    each(&self.record);
                    n_records += 1;
                }
                Next::Damaged => {
                    self.resync(data, end);
                    return n_records;
                }
            }
        }
    }

    /// Records that found no room.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.word(state::LOST)
    }

    /// Times that the ring's memory was found damaged by the target; what was in it then was
    /// thrown away.
    #[must_use]
    pub fn resyncs(&self) -> u64 {
        self.resyncs
    }

    /// Whether there is a record, or room for one, that its producer has not finished. For
    /// microseconds that is ordinary. Where it lasts, the producer was killed in between (a
    /// forked child, say), or is stopped: nothing behind it can be read.
    #[must_use]
    pub fn is_blocked(&self) -> bool {
        self.blocked().is_some()
    }

    /// How many bytes have been read, and how many have been reserved for records, since the
    /// ring began.
    #[must_use]
    pub fn positions(&self) -> (u64, u64) {
        (self.position, self.word(state::PRODUCER))
    }

    /// Gives up the record that [`RingBuf::is_blocked`] is about, if there still is one:
    /// skips it, or, where not even its size was written yet, whatever is still empty. Should
    /// its producer live after all, what it writes later may garble another record.
    pub fn skip_blocked(&mut self) {
        let arena = self.arena.clone();
        let size = u64::from(self.placement.max_entries);
        let data = arena.memory().part(self.placement.data_offset, size);
        let (Some(data), Some((header, end))) = (data, self.blocked()) else { return };
        let in_ring = size - (self.position & (size - 1));
        let most = in_ring.min(end.wrapping_sub(self.position));
        let bytes = match header {
            0 => self.empty_bytes(data, most),
            _ => record_bytes(u64::from(header_len(header))),
        };
        if bytes <= most {
            self.release(data, bytes);
        } else {
            self.resync(data, end);
        }
    }

    /// From the consumer's position to the next header, `most` at most: a record without one
    /// has no data either.
    fn empty_bytes(&self, data: Shared<'_>, most: u64) -> u64 {
        let at = self.position & (data.size_bytes() - 1);
        let is_empty =
            |offset: &u64| data.word(at + offset).is_some_and(|word| word.load(Acquire) == 0);
        let n_words = (0..most).step_by(8).take_while(is_empty).count() as u64;
        (n_words * 8).min(most)
    }

    /// The header of the unfinished record at the consumer's position, and the end.
    fn blocked(&self) -> Option<(u64, u64)> {
        let end = self.word(state::PRODUCER);
        let size = u64::from(self.placement.max_entries);
        let data = self.arena.memory().part(self.placement.data_offset, size)?;
        let header = data.word(self.position & (size - 1))?.load(Acquire);
        let unfinished = header == 0 || header & BUSY != 0;
        (end != self.position && unfinished).then_some((header, end))
    }

    fn next(&self, data: Shared<'_>, available: u64) -> Next {
        let at = self.position & (data.size_bytes() - 1);
        let Some(header) = data.word(at) else { return Next::Damaged };
        let header = header.load(Acquire);
        if header == 0 || header & BUSY != 0 {
            return Next::Wait;
        }
        let len = header_len(header);
        let bytes = record_bytes(u64::from(len));
        let in_ring = data.size_bytes() - at;
        if bytes > available || bytes > in_ring {
            return Next::Damaged;
        }
        match header >> 32 << 32 {
            KIND_PADDING => Next::Skip(bytes),
            KIND_RECORD if header & DISCARD != 0 => Next::Skip(bytes),
            KIND_RECORD => Next::Record(len),
            _ => Next::Damaged,
        }
    }

    fn copy(&mut self, data: Shared<'_>, len: u32) -> bool {
        let at = (self.position & (data.size_bytes() - 1)) + HEADER_BYTES;
        self.record.clear();
        self.record.resize(to_usize(u64::from(len)), 0);
        data.load(at, &mut self.record).is_some()
    }

    /// Clears what was read, then lets producers have it.
    fn release(&mut self, data: Shared<'_>, bytes: u64) {
        let cleared = data.zero(self.position & (data.size_bytes() - 1), bytes);
        debug_assert!(cleared.is_some(), "`next` has checked that it is inside");
        self.set_position(self.position.wrapping_add(bytes));
    }

    /// Throws everything away and goes on at the producers' position.
    fn resync(&mut self, data: Shared<'_>, end: u64) {
        self.resyncs += 1;
        let cleared = data.zero(0, data.size_bytes());
        debug_assert!(cleared.is_some(), "all of it is inside");
        self.set_position(end);
    }

    fn set_position(&mut self, position: u64) {
        self.position = position;
        let state = self.arena.state(&self.placement);
        if let Some(word) = state.and_then(|s| s.word(state::CONSUMER * 8)) {
            word.store(position, Release);
        }
    }

    fn word(&self, index: u64) -> u64 {
        let state = self.arena.state(&self.placement);
        let word = state.and_then(|s| s.word(index * 8));
        // Positions are read with Acquire; for the count it costs nothing.
        word.map_or(0, |w| if index == state::LOST { w.load(Relaxed) } else { w.load(Acquire) })
    }
}
