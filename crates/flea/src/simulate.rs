//! The protocol of `transaction` for the simulator (the crate flea-simulate): attaching bodies
//! that are bytes, and taking them off, on any [`Host`]. No part of the library's interface.

use flea_layout::shared::THREAD_TABLE_BYTES;
use flea_symbols::addr::RemoteAddr;

pub use crate::host::{Bytes, Host};
use crate::{
    change::{Attached, FIRST_FRAME_OFFSET, arenas},
    error::AttachError,
    host,
    registry::{
        BodyState, CodeArena, Controller, FunctionState, Placed, Registry, RegistryError, Storage,
    },
    transaction::{self, change, change_and_tidy, tidy},
};

/// Bytes of the registry's mapping.
pub const REGISTRY_BYTES: u64 = crate::registry::MAPPING_BYTES;

/// A body whose code is made already.
#[derive(Clone, Debug)]
pub struct Body {
    /// Run before the function.
    pub entry: Option<Vec<u8>>,
    /// Run behind it.
    pub exit: Option<Vec<u8>>,
    /// Who attaches it.
    pub owner: Controller,
    /// Start of the data arena's mapping that it works on.
    pub mapping: RemoteAddr,
}

/// Reads the registry whose mapping starts at `base`.
///
/// # Errors
/// It cannot be read, or is damaged.
pub fn load(memory: &impl Bytes, base: RemoteAddr) -> Result<Registry, RegistryError> {
    Storage::at(base).load(memory)
}

/// Whether what it says has been done to the target's code.
///
/// # Errors
/// It cannot be read.
pub fn is_made(memory: &impl Bytes, base: RemoteAddr) -> Result<bool, RegistryError> {
    Storage::at(base).is_made(memory)
}

/// Notes that it has.
///
/// # Errors
/// It cannot be written.
pub fn note_made(memory: &impl Bytes, base: RemoteAddr) -> Result<(), RegistryError> {
    Storage::at(base).note_made(memory)
}

/// Writes the registry whose mapping starts at `base`.
///
/// # Errors
/// It cannot be written.
pub fn store(
    memory: &impl Bytes,
    base: RemoteAddr,
    registry: &Registry,
) -> Result<(), RegistryError> {
    Storage::at(base).store(memory, registry)
}

/// The registry of a process that Flea comes to for the first time.
#[must_use]
pub fn founded(code: RemoteAddr, size_bytes: u64) -> Registry {
    Registry { code: vec![CodeArena::new(code, size_bytes)], ..Registry::default() }
}

/// An arena of code that is empty.
#[must_use]
pub fn code_arena(base: RemoteAddr, size_bytes: u64) -> CodeArena {
    CodeArena::new(base, size_bytes)
}

/// Finishes what a dead controller announced: before anything else.
///
/// # Errors
/// As for a real process.
pub fn settle<H: Host>(ground: &mut H) -> Result<(), AttachError> {
    transaction::settle(ground)
}

/// Attaches `bodies`, each to a function that is as `function` says where nothing is attached
/// yet: all of them or none. The numbers of the bodies.
///
/// # Errors
/// As for attaching to a real process.
pub fn attach<H: Host>(
    ground: &mut H,
    bodies: &[(FunctionState, Body)],
) -> Result<Vec<u32>, AttachError> {
    change_and_tidy(ground, &[], |change| {
        let mut ids = Vec::with_capacity(bodies.len());
        for (fresh, body) in bodies {
            let functions = &mut change.registry.functions;
            let known = functions.iter().position(|f| f.site == fresh.site);
            let mut function =
                known.map_or_else(|| fresh.clone(), |at| functions.remove(at).into_inner());
            let before = arenas(&function);
            let id = change.registry.next_id;
            change.registry.next_id += 1;
            let mut place = |code: &Option<Vec<u8>>| -> Result<Option<Placed>, AttachError> {
                code.clone().map(|bytes| change.place(fresh.site, bytes)).transpose()
            };
            let (entry, exit) = (place(&body.entry)?, place(&body.exit)?);
            function.bodies.insert(0, state(id, body, entry, exit));
            change.relink(&mut function, before)?;
            change.registry.functions.push(function.into());
            ids.push(id);
        }
        Ok(ids)
    })
}

fn state(id: u32, body: &Body, entry: Option<Placed>, exit: Option<Placed>) -> BodyState {
    BodyState {
        id,
        owner: body.owner,
        since: 0,
        arena: RemoteAddr(body.mapping.0 + THREAD_TABLE_BYTES as u64),
        programs: Vec::new(),
        writes_target: false,
        changes: 0,
        entry,
        session: None,
        modify: None,
        exit,
        frame_offset: FIRST_FRAME_OFFSET,
        frame_words: 0,
        reads: 0,
        saves: Vec::new(),
    }
}

/// Takes the bodies with these numbers off, and gives back what nobody can be in.
///
/// # Errors
/// As for a real process.
pub fn take_off<H: Host>(mut ground: H, ids: &[u32]) -> Result<(), AttachError> {
    let gone = |attached: Attached<'_>| match attached {
        Attached::Body(body) => ids.contains(&body.id),
        Attached::Replacement(_) => false,
    };
    change(&mut ground, &[], |change| change.remove(gone).map(drop))?;
    tidy(&mut ground)?;
    host::unmap_released(&mut ground)?;
    Ok(host::close(ground)?)
}
