//! RINGBUF, the producers' side: any number of threads, processes and signal handlers, no
//! lock. The consumer is `flea-maps`' and reads what is described here.
//!
//! ```text
//!   MapHeader.state   [3] producer position   [5] records lost    [11] consumer position
//!   record            { len | BUSY 1<<31 | DISCARD 1<<30, kind } 8 bytes; data; padding to 8
//!   kind              1: a record; 2: padding up to the end of the ring
//! ```
//! Positions only grow; a byte of position p is at `p % size`. Positions and state words
//! are apart by a cache line.
//!
//! Protected: the bytes between consumer and producer position.
//! 1. A producer moves the producer position by compare-and-swap: the bytes are its own.
//!    They are zero: the consumer clears what it has read before it gives it back.
//! 2. It writes the record's header with BUSY: a header of zero means "not yet".
//! 3. Submit clears BUSY. The consumer stops at the first header that is zero or BUSY.
//!
//! A record never wraps: where it would, padding goes first. So a record may be at most half
//! as large as the ring, or it might never fit. (Linux maps the ring twice instead.)

use core::sync::atomic::{
    AtomicU64,
    Ordering::{AcqRel, Acquire, Relaxed, Release},
};

use crate::errno::Errno;
use crate::mem::{Bytes, Shared, low_half, round_up_8};

/// `state` words.
pub mod state {
    /// Where the next record begins.
    pub const PRODUCER: u64 = 3;
    /// Records that did not fit.
    pub const LOST: u64 = 5;
    /// Where the consumer is.
    pub const CONSUMER: u64 = 11;
}

/// Bytes before a record's data.
pub const HEADER_BYTES: u64 = 8;
/// The record is still being written.
pub const BUSY: u64 = 1 << 31;
/// The record is to be skipped.
pub const DISCARD: u64 = 1 << 30;
/// The bits of the length.
pub const LEN_MASK: u64 = DISCARD - 1;
/// Header's upper half: a record.
pub const KIND_RECORD: u64 = 1 << 32;
/// Header's upper half: nothing until the end of the ring.
pub const KIND_PADDING: u64 = 2 << 32;

/// Compare-and-swaps before a record counts as lost; each failure is another's success.
const TRIES: u32 = 100_000;

/// A ring buffer, for writing.
#[derive(Clone, Copy)]
pub struct Ring<'a> {
    producer: &'a AtomicU64,
    consumer: &'a AtomicU64,
    lost: &'a AtomicU64,
    data: Shared<'a>,
}

/// A reserved record: the offset of its data in the ring's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved(pub u64);

/// Bytes that a record of `len` takes in the ring.
#[must_use]
pub const fn record_bytes(len: u64) -> u64 {
    HEADER_BYTES + round_up_8(len)
}

impl<'a> Ring<'a> {
    /// The ring whose header's `state` words are `state` and whose bytes are `data`, a power
    /// of two of them.
    #[must_use]
    pub fn new(state: Shared<'a>, data: Shared<'a>) -> Option<Self> {
        if !data.size_bytes().is_power_of_two() {
            return None;
        }
        Some(Self {
            producer: state.word(state::PRODUCER * 8)?,
            consumer: state.word(state::CONSUMER * 8)?,
            lost: state.word(state::LOST * 8)?,
            data,
        })
    }

    /// Room for a record of `len` bytes; `None`, and counted as lost, where there is none.
    #[must_use]
    pub fn reserve(&self, len: u64) -> Option<Reserved> {
        let reserved = self.try_reserve(len);
        if reserved.is_none() {
            self.lost.fetch_add(1, Relaxed);
        }
        reserved
    }

    fn try_reserve(&self, len: u64) -> Option<Reserved> {
        let size = self.data.size_bytes();
        if len > LEN_MASK || record_bytes(len) > size / 2 {
            return None;
        }
        let need = record_bytes(len);
        let mut position = self.producer.load(Relaxed);
        for _ in 0..TRIES {
            let consumer = self.consumer.load(Acquire);
            let at = position & (size - 1);
            let padding = if need > size - at { size - at } else { 0 };
            let next = position.wrapping_add(padding + need);
            if next.wrapping_sub(consumer) > size {
                return None;
            }
            match self.producer.compare_exchange_weak(position, next, AcqRel, Relaxed) {
                Ok(_) => return self.begin(at, padding, len),
                Err(now) => position = now,
            }
        }
        None
    }

    /// Step 2.
    fn begin(&self, at: u64, padding: u64, len: u64) -> Option<Reserved> {
        let mut header = at;
        if padding > 0 {
            let skip = KIND_PADDING | (padding - HEADER_BYTES);
            self.data.word(at)?.store(skip, Release);
            header = 0;
        }
        self.data.word(header)?.store(KIND_RECORD | BUSY | len, Release);
        Some(Reserved(header + HEADER_BYTES))
    }

    /// The address of a reserved record's data.
    #[must_use]
    pub fn address(&self, record: Reserved) -> u64 {
        self.data.address(record.0)
    }

    /// Writes one whole record.
    ///
    /// # Errors
    /// EAGAIN: no room, as in Linux.
    pub fn output(&self, bytes: Bytes<'_>) -> Result<(), Errno> {
        let record = self.reserve(bytes.len()).ok_or(Errno::EAGAIN)?;
        self.data.store(record.0, bytes).ok_or(Errno::EINVAL)?;
        let header = self.data.word(record.0 - HEADER_BYTES).ok_or(Errno::EINVAL)?;
        finish(header, 0);
        Ok(())
    }
}

/// Step 3: gives the record with this header to the consumer, with `DISCARD` to be skipped.
pub fn finish(header: &AtomicU64, extra: u64) {
    let word = header.load(Relaxed);
    header.store((word & !BUSY) | extra, Release);
}

/// `bpf_ringbuf_query`; `size_bytes` is the ring's.
#[must_use]
pub fn query(state: Shared<'_>, size_bytes: u32, flags: u64) -> Option<u64> {
    const AVAIL_DATA: u64 = 0;
    const RING_SIZE: u64 = 1;
    const CONS_POS: u64 = 2;
    const PROD_POS: u64 = 3;
    let producer = state.word(state::PRODUCER * 8)?.load(Acquire);
    let consumer = state.word(state::CONSUMER * 8)?.load(Acquire);
    Some(match flags {
        AVAIL_DATA => producer.wrapping_sub(consumer),
        RING_SIZE => u64::from(size_bytes),
        CONS_POS => consumer,
        PROD_POS => producer,
        _ => 0,
    })
}

/// The length in a header.
#[must_use]
pub fn header_len(header: u64) -> u32 {
    low_half(header & LEN_MASK)
}
