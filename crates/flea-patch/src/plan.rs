//! What is to be changed, as plain data.

use std::collections::BTreeMap;

use flea_symbols::addr::RemoteAddr;
use serde::{Deserialize, Serialize};

/// Bytes replaced at a site: the length of `jmp rel32`, `call rel32` and the long nop.
pub const PATCH_BYTES: usize = 5;
/// Bytes replaced where there is no room for those: the length of `jmp rel8`.
pub const SHORT_PATCH_BYTES: usize = 2;

/// Changes that are made together, or not at all. Taking them off again is a plan as well,
/// with `expected` and `new` exchanged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// First bytes are written in this order; no two overlap.
    pub pokes: Vec<Poke>,
}

/// One site.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Poke {
    /// First byte that changes.
    pub site: RemoteAddr,
    /// What must be there, at least the five bytes that change. Longer where the replaced
    /// instructions are longer: all of it is compared. Or the two bytes of a short change.
    pub expected: Vec<u8>,
    /// What will be there; of a short change, the first two bytes.
    pub new: [u8; PATCH_BYTES],
    /// Where a thread goes on that arrives at the site while it is being changed: code that
    /// does what the old bytes did, or what the new ones will do. It may be reached until
    /// long after the commit, also after one that failed.
    pub trap_to: RemoteAddr,
    /// Starts of replaced instructions behind the first, each with the copy where a thread
    /// goes on that stands there. Empty where the old bytes are one instruction.
    pub moves: Vec<(RemoteAddr, RemoteAddr)>,
}

/// Why a plan makes no sense, whatever the target looks like.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Too few bytes to compare.
    #[error(
        "the change at {site} expects {n_expected} bytes: {SHORT_PATCH_BYTES}, or {PATCH_BYTES} and \
         more are changed"
    )]
    TooShort {
        /// The site.
        site: RemoteAddr,
        /// Bytes expected.
        n_expected: usize,
    },
    /// Two changes touch the same bytes.
    #[error("the changes at {first} and {second} overlap")]
    Overlap {
        /// The lower one.
        first: RemoteAddr,
        /// The upper one.
        second: RemoteAddr,
    },
    /// A thread would be sent to where it must not be.
    #[error("a thread at {site} would be sent to {to}, into bytes that change")]
    IntoPatch {
        /// Where it stands.
        site: RemoteAddr,
        /// Where it would go on.
        to: RemoteAddr,
    },
    /// A move that starts outside the expected bytes.
    #[error("the change at {site} moves threads from {from}, which is not inside it")]
    MoveOutside {
        /// The site.
        site: RemoteAddr,
        /// The address.
        from: RemoteAddr,
    },
}

/// A poke as a controller hands it to a patching process.
#[derive(Serialize, Deserialize)]
struct WirePoke(u64, Vec<u8>, [u8; PATCH_BYTES], u64, Vec<(u64, u64)>);

impl Serialize for Plan {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let wire = |p: &Poke| {
            let moves = p.moves.iter().map(|(from, to)| (from.0, to.0)).collect();
            WirePoke(p.site.0, p.expected.clone(), p.new, p.trap_to.0, moves)
        };
        serializer.collect_seq(self.pokes.iter().map(wire))
    }
}

impl<'de> Deserialize<'de> for Plan {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let poke = |WirePoke(site, expected, new, trap_to, moves)| Poke {
            site: RemoteAddr(site),
            expected,
            new,
            trap_to: RemoteAddr(trap_to),
            moves: moves.into_iter().map(|(a, b)| (RemoteAddr(a), RemoteAddr(b))).collect(),
        };
        let wire = Vec::<WirePoke>::deserialize(deserializer)?;
        Ok(Self { pokes: wire.into_iter().map(poke).collect() })
    }
}

impl Poke {
    /// How many bytes change.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.expected.len().min(PATCH_BYTES)
    }

    /// The bytes that change, as they are expected to be.
    pub(crate) fn old(&self) -> &[u8] {
        &self.expected[..self.n_bytes()]
    }

    /// What will be there.
    pub(crate) fn new_bytes(&self) -> &[u8] {
        &self.new[..self.n_bytes()]
    }

    /// Where a thread may stand inside the new bytes: nowhere if they are one jump or call.
    pub(crate) fn inside_new(&self) -> impl Iterator<Item = RemoteAddr> {
        const CALL_REL32: u8 = 0xe8;
        const JMP_REL32: u8 = 0xe9;
        const JMP_REL8: u8 = 0xeb;
        let is_one = match self.n_bytes() {
            SHORT_PATCH_BYTES => self.new[0] == JMP_REL8,
            _ => matches!(self.new[0], CALL_REL32 | JMP_REL32),
        };
        let end = if is_one { self.site.0 } else { self.end() };
        (self.site.0.saturating_add(1)..end).map(RemoteAddr)
    }

    pub(crate) fn contains(&self, addr: RemoteAddr) -> bool {
        addr >= self.site && addr.0 < self.end()
    }

    /// One past the bytes that change.
    fn end(&self) -> u64 {
        self.site.0.saturating_add(self.n_bytes() as u64)
    }

    /// Moves that matter: threads behind the bytes that change stay where they are.
    pub(crate) fn inner_moves(&self) -> impl Iterator<Item = (RemoteAddr, RemoteAddr)> {
        let (site, end) = (self.site.0, self.end());
        let inside = move |from: RemoteAddr| from.0 > site && from.0 < end;
        self.moves.iter().copied().filter(move |&(from, _)| inside(from))
    }
}

impl Plan {
    /// Whether the plan makes sense in itself.
    pub fn check(&self) -> Result<(), PlanError> {
        // Each with the end of what changes there.
        let mut sites = BTreeMap::new();
        for poke in &self.pokes {
            let site = poke.site;
            if !matches!(poke.expected.len(), SHORT_PATCH_BYTES | PATCH_BYTES..) {
                return Err(PlanError::TooShort { site, n_expected: poke.expected.len() });
            }
            if sites.insert(site, poke.end()).is_some() {
                return Err(PlanError::Overlap { first: site, second: site });
            }
            let end = site.0.saturating_add(poke.expected.len() as u64);
            for &(from, _) in &poke.moves {
                if from <= site || from.0 >= end {
                    return Err(PlanError::MoveOutside { site, from });
                }
            }
        }
        for ((&first, &end), &second) in sites.iter().zip(sites.keys().skip(1)) {
            if second.0 < end {
                return Err(PlanError::Overlap { first, second });
            }
        }
        let changes =
            |to: RemoteAddr| sites.range(..=to).next_back().is_some_and(|(_, &end)| to.0 < end);
        for poke in &self.pokes {
            let inner = poke.inner_moves();
            for (site, to) in inner.chain([(poke.site, poke.trap_to)]) {
                if changes(to) {
                    return Err(PlanError::IntoPatch { site, to });
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poke(site: u64) -> Poke {
        let at = RemoteAddr;
        let moves = vec![(at(site + 1), at(0x9001))];
        Poke { site: at(site), expected: vec![0x90; 6], new: [0; 5], trap_to: at(0x9000), moves }
    }

    #[test]
    fn nonsense_is_refused() {
        let check = |pokes: &[Poke]| Plan { pokes: pokes.to_vec() }.check();
        assert_eq!(check(&[poke(0x1000), poke(0x1005)]), Ok(()));
        assert!(matches!(check(&[poke(16), poke(20)]), Err(PlanError::Overlap { .. })));
        assert!(matches!(check(&[poke(16), poke(16)]), Err(PlanError::Overlap { .. })));
        let mut short = poke(16);
        short.expected.truncate(4);
        assert!(matches!(check(&[short]), Err(PlanError::TooShort { n_expected: 4, .. })));
        let mut door = poke(16);
        door.expected.truncate(2);
        assert_eq!(check(&[door.clone(), poke(18)]), Ok(()));
        assert!(matches!(check(&[door, poke(17)]), Err(PlanError::Overlap { .. })));
        let mut outside = poke(16);
        outside.moves.push((RemoteAddr(22), RemoteAddr(0x9000)));
        assert!(matches!(check(&[outside]), Err(PlanError::MoveOutside { .. })));
        let mut home = poke(16);
        home.trap_to = RemoteAddr(20);
        assert!(matches!(check(&[home]), Err(PlanError::IntoPatch { .. })));
        let mut behind = poke(16);
        behind.trap_to = RemoteAddr(21);
        assert_eq!(check(&[behind]), Ok(()));
    }
}
