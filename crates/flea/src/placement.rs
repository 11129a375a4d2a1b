//! Where code goes in the target: arenas within reach of a module, and the stretches in them.
//! Plain arithmetic over the registry's state; the caller maps and writes.

use flea_symbols::addr::RemoteAddr;

use crate::registry::{CodeArena, Placed, Registry};

/// A `rel32` reaches 2 GiB; the slack leaves room for the far end of arena and module.
const REACH_BYTES: u64 = (1 << 31) - (64 << 20);
/// Entry points on a cache line of their own: see ARCHITECTURE.md, "What a hit costs".
const ALIGN: u64 = 64;
const INT3: u8 = 0xcc;

impl CodeArena {
    /// A fresh arena.
    pub(crate) fn new(base: RemoteAddr, size_bytes: u64) -> Self {
        Self { base, size_bytes, next: base, free: Vec::new(), rows: None }
    }

    /// Without its first `bytes`: they are not for code.
    pub(crate) fn behind(mut self, bytes: u64) -> Self {
        self.next = RemoteAddr(self.base.0.saturating_add(bytes));
        self
    }

    fn end(&self) -> RemoteAddr {
        RemoteAddr(self.base.0.saturating_add(self.size_bytes))
    }

    /// Whether a branch leads from any place in it to `near`, and back.
    pub(crate) fn reaches(&self, near: RemoteAddr) -> bool {
        let far = near.0.abs_diff(self.base.0).max(near.0.abs_diff(self.end().0));
        far < REACH_BYTES
    }

    /// Whether the byte at `at` is in it.
    pub(crate) fn holds(&self, at: RemoteAddr) -> bool {
        (self.base..self.end()).contains(&at)
    }

    /// The longest stretch that is free.
    pub(crate) fn room(&self) -> u64 {
        let unplaced = self.end().0.saturating_sub(self.next.0);
        self.free.iter().map(|&(_, bytes)| bytes).fold(unplaced, u64::max)
    }

    fn take(&mut self, len: u64) -> Option<RemoteAddr> {
        if let Some(i) = self.free.iter().position(|&(_, bytes)| bytes >= len) {
            let (at, bytes) = self.free[i];
            if bytes == len {
                self.free.remove(i);
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
        // Sorted, and no two touch: neighbours become one at once.
        let i = self.free.partition_point(|&(other, _)| other < at);
        let joins_next =
            self.free.get(i).is_some_and(|&(next, _)| at.0.checked_add(len) == Some(next.0));
        let bytes = if joins_next { len + self.free.remove(i).1 } else { len };
        match i.checked_sub(1).map(|before| &mut self.free[before]) {
            Some((before, n)) if before.0.checked_add(*n) == Some(at.0) => *n += bytes,
            _ => self.free.insert(i, (at, bytes)),
        }
        // What touches `next` is simply unplaced.
        if let Some(&(at, bytes)) = self.free.last()
            && at.0.checked_add(bytes) == Some(self.next.0)
        {
            self.next = at;
            self.free.pop();
        }
    }
}

/// What a stretch of `len` bytes takes in an arena.
pub(crate) fn taken(len: usize) -> u64 {
    (len as u64).next_multiple_of(ALIGN)
}

/// The same writes with those that follow each other in memory made one. What lies between two is
/// the rest of what the first one has taken, and becomes breakpoints.
pub(crate) fn runs(mut writes: Vec<(RemoteAddr, Vec<u8>)>) -> Vec<(RemoteAddr, Vec<u8>)> {
    writes.sort_unstable_by_key(|(at, _)| *at);
    let mut runs: Vec<(RemoteAddr, Vec<u8>)> = Vec::new();
    for (at, bytes) in writes {
        match runs.last_mut() {
            Some((start, run)) if start.0 + taken(run.len()) == at.0 => {
                let n_taken = usize::try_from(at.0 - start.0).expect("a run is in memory");
                run.resize(n_taken, INT3);
                run.extend(bytes);
            }
            _ => runs.push((at, bytes)),
        }
    }
    runs
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
        let home = self.code.iter_mut().find(|arena| arena.holds(placed.at));
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
        assert_eq!((a.at.0, b.at.0, c.at.0), (0x10_0000, 0x10_0040, 0x10_0080));
        r.unplace(a);
        r.unplace(b);
        assert_eq!(r.place(near, 128).unwrap().at, a.at, "neighbours were merged");
        r.unplace(Placed { at: a.at, len: 128 });
        r.unplace(c);
        assert_eq!(r, registry());
    }

    #[test]
    fn given_back_in_any_order_nothing_is_left() {
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
            let mut r = registry();
            let placed = [16, 100, 1, 64].map(|len| r.place(RemoteAddr(0x20_0000), len).unwrap());
            for i in order {
                r.unplace(placed[i]);
                assert!(r.code[0].free.is_sorted(), "{order:?}: {:?}", r.code[0].free);
            }
            assert_eq!(r, registry(), "{order:?}");
        }
    }

    #[test]
    fn what_lies_in_a_row_is_written_at_once() {
        let mut r = registry();
        let near = RemoteAddr(0x20_0000);
        let places = [40, 64, 100, 1].map(|len| r.place(near, len).unwrap());
        let write = |i: usize| (places[i].at, vec![i.to_le_bytes()[0]; places[i].len as usize]);
        let all = runs(vec![write(2), write(0), write(3), write(1)]);
        let [(at, bytes)] = all.as_slice() else { panic!("{all:?}") };
        assert_eq!(*at, places[0].at);
        for (i, place) in places.iter().enumerate() {
            let from = usize::try_from(place.at.0 - at.0).unwrap();
            assert_eq!(bytes[from..from + place.len as usize], write(i).1);
        }
        assert_eq!(bytes[40..64], [INT3; 24]);
        assert_eq!(bytes.len(), 64 + 64 + 128 + 1);
        assert_eq!(runs(vec![write(3), write(0)]), [write(0), write(3)], "with a gap between");
        assert_eq!(runs(vec![]), []);
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
