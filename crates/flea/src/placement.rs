//! Where code goes in the target: arenas within reach of a module, and the stretches in them.
//! Plain arithmetic over the registry's state; the caller maps and writes.

use flea_symbols::addr::RemoteAddr;

use crate::registry::{CodeArena, Placed, Registry};

/// A `rel32` reaches 2 GiB; the slack leaves room for the far end of arena and module.
const REACH_BYTES: u64 = (1 << 31) - (64 << 20);
/// Entry points on a 16-byte line, as compilers align functions.
const ALIGN: u64 = 16;

impl CodeArena {
    /// A fresh arena.
    pub(crate) fn new(base: RemoteAddr, size_bytes: u64) -> Self {
        Self { base, size_bytes, next: base, free: Vec::new(), rows: None }
    }

    fn end(&self) -> RemoteAddr {
        RemoteAddr(self.base.0.saturating_add(self.size_bytes))
    }

    /// Whether a branch leads from any place in it to `near`, and back.
    pub(crate) fn reaches(&self, near: RemoteAddr) -> bool {
        let far = near.0.abs_diff(self.base.0).max(near.0.abs_diff(self.end().0));
        far < REACH_BYTES
    }

    fn take(&mut self, len: u64) -> Option<RemoteAddr> {
        if let Some(i) = self.free.iter().position(|&(_, bytes)| bytes >= len) {
            let (at, bytes) = self.free[i];
            if bytes == len {
                self.free.swap_remove(i);
            } else {
                self.free[i] = (RemoteAddr(at.0 + len), bytes - len);
            }
            return Some(at);
        }
        let at = self.next;
        let end = at.0.checked_add(len)?;
        (end <= self.end().0).then(|| {
            self.next = RemoteAddr(end);
            at
        })
    }

    fn give_back(&mut self, at: RemoteAddr, len: u64) {
        self.free.push((at, len));
        self.free.sort_unstable();
        // Neighbours become one, and what touches `next` is simply unplaced.
        let mut merged: Vec<(RemoteAddr, u64)> = Vec::with_capacity(self.free.len());
        for &(at, bytes) in &self.free {
            match merged.last_mut() {
                Some((last, n)) if last.0 + *n == at.0 => *n += bytes,
                _ => merged.push((at, bytes)),
            }
        }
        if let Some(&(at, bytes)) = merged.last()
            && at.0 + bytes == self.next.0
        {
            self.next = at;
            merged.pop();
        }
        self.free = merged;
    }
}

impl Registry {
    /// Room for `len` bytes within reach of `near`, if an arena has it.
    pub(crate) fn place(&mut self, near: RemoteAddr, len: u32) -> Option<Placed> {
        let bytes = u64::from(len).next_multiple_of(ALIGN);
        self.code
            .iter_mut()
            .filter(|arena| arena.reaches(near))
            .find_map(|arena| arena.take(bytes))
            .map(|at| Placed { at, len })
    }

    /// Gives a stretch back: nobody can be in it.
    pub(crate) fn unplace(&mut self, placed: Placed) {
        let bytes = u64::from(placed.len).next_multiple_of(ALIGN);
        let home =
            self.code.iter_mut().find(|arena| arena.base <= placed.at && placed.at < arena.end());
        if let Some(arena) = home {
            arena.give_back(placed.at, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> Registry {
        Registry {
            code: vec![CodeArena::new(RemoteAddr(0x10_0000), 0x1000)],
            ..Registry::default()
        }
    }

    #[test]
    fn what_is_given_back_is_used_again() {
        let mut r = registry();
        let near = RemoteAddr(0x20_0000);
        let a = r.place(near, 40).unwrap();
        let b = r.place(near, 16).unwrap();
        let c = r.place(near, 1).unwrap();
        assert_eq!((a.at.0, b.at.0, c.at.0), (0x10_0000, 0x10_0030, 0x10_0040));
        r.unplace(a);
        r.unplace(b);
        assert_eq!(r.place(near, 64).unwrap().at, a.at, "neighbours were merged");
        r.unplace(Placed { at: a.at, len: 64 });
        r.unplace(c);
        assert_eq!(r, registry());
    }

    #[test]
    fn out_of_room_or_reach_is_none() {
        let mut r = registry();
        assert_eq!(r.place(RemoteAddr(1 << 40), 16), None);
        assert_eq!(r.place(RemoteAddr(0), 0x1001), None);
        assert!(r.place(RemoteAddr(0), 0x1000).is_some());
        assert_eq!(r.place(RemoteAddr(0), 1), None);
    }
}
