//! How much memory a thread takes at most: an allocator that counts.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator with a counter for each thread. To be a program's `#[global_allocator]`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counting;

fn add(size: usize, sign: isize) {
    let size = sign * isize::try_from(size).unwrap_or(isize::MAX);
    // A thread that is about to end has no counters any more.
    let _ = HELD.try_with(|held| {
        let now = held.get().wrapping_add(size);
        held.set(now);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now)));
    });
}

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size(), 1);
        // SAFETY: as the caller says.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size(), 1);
        // SAFETY: as the caller says.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        add(size, 1);
        add(layout.size(), -1);
        // SAFETY: as the caller says.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        add(layout.size(), -1);
        // SAFETY: as the caller says.
        unsafe { System.dealloc(at, layout) }
    }
}

/// What `work` gives, and how many bytes this thread held at most meanwhile, beyond those before.
/// `None` where [`Counting`] is not the allocator.
pub fn peak_bytes<T>(work: impl FnOnce() -> T) -> Option<(T, usize)> {
    let before = HELD.get();
    PEAK.set(before);
    drop(std::hint::black_box(Vec::<u8>::with_capacity(64)));
    if PEAK.get() == before {
        return None;
    }
    PEAK.set(before);
    let result = work();
    Some((result, usize::try_from(PEAK.get() - before).unwrap_or(0)))
}
