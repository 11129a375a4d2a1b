//! Code that was placed in the target, as far as a change may copy it into skeletons.

use std::collections::HashMap;

use flea_symbols::addr::RemoteAddr;

use crate::{
    error::RemoteError,
    host::Bytes,
    registry::{BodyState, CodeArena, Placed, Registry},
};

/// Bytes by where they are.
#[derive(Default)]
pub(crate) struct KnownCode {
    /// What was read of each arena: one stretch with all bodies in it.
    stretches: Vec<(RemoteAddr, Vec<u8>)>,
    /// What is new.
    placed: HashMap<RemoteAddr, Vec<u8>>,
}

impl KnownCode {
    /// Reads the bodies of `registry`. An arena's are next to each other, so they are read in one
    /// go where that is possible: ten thousand reads take longer than what lies between them.
    pub(crate) fn read(registry: &Registry, memory: &impl Bytes) -> Result<Self, RemoteError> {
        let mut known = Self::default();
        for arena in &registry.code {
            let Some((start, end)) = extent(registry, arena) else { continue };
            let n_bytes = usize::try_from(end - start).expect("the size of an arena is bounded");
            let mut bytes = vec![0; n_bytes];
            match memory.read(RemoteAddr(start), &mut bytes) {
                Ok(()) => known.stretches.push((RemoteAddr(start), bytes)),
                Err(_) => known.read_each(registry, arena, memory)?,
            }
        }
        Ok(known)
    }

    fn read_each(
        &mut self,
        registry: &Registry,
        arena: &CodeArena,
        memory: &impl Bytes,
    ) -> Result<(), RemoteError> {
        for placed in bodies_in(registry, arena) {
            let mut bytes = vec![0; placed.len as usize];
            memory.read(placed.at, &mut bytes)?;
            self.insert(placed.at, bytes);
        }
        Ok(())
    }

    pub(crate) fn insert(&mut self, at: RemoteAddr, bytes: Vec<u8>) {
        self.placed.insert(at, bytes);
    }

    pub(crate) fn get(&self, placed: Placed) -> Option<&[u8]> {
        if let Some(new) = self.placed.get(&placed.at) {
            return Some(new);
        }
        self.stretches.iter().find_map(|(start, bytes)| {
            let from = usize::try_from(placed.at.0.checked_sub(start.0)?).ok()?;
            bytes.get(from..from.checked_add(placed.len as usize)?)
        })
    }
}

fn bodies_in<'a>(
    registry: &'a Registry,
    arena: &'a CodeArena,
) -> impl Iterator<Item = Placed> + 'a {
    let bodies = registry.functions.iter().flat_map(|f| &f.bodies);
    bodies.flat_map(BodyState::placed).filter(|placed| arena.holds(placed.at))
}

/// From the first body in `arena` to the end of the last one.
fn extent(registry: &Registry, arena: &CodeArena) -> Option<(u64, u64)> {
    bodies_in(registry, arena).fold(None, |extent, placed| {
        let (start, end) = (placed.at.0, placed.at.0 + u64::from(placed.len));
        let (lowest, highest) = extent.unwrap_or((start, end));
        Some((lowest.min(start), highest.max(end)))
    })
}

impl From<HashMap<RemoteAddr, Vec<u8>>> for KnownCode {
    fn from(placed: HashMap<RemoteAddr, Vec<u8>>) -> Self {
        Self { stretches: Vec::new(), placed }
    }
}
