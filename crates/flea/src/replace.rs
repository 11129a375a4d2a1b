//! Replacing functions, as one transaction on the seized target: as `transaction`, with a
//! shared object placed before the sites are swapped.

use std::collections::HashSet;

use flea_load::SharedObject;
use flea_process::Pid;
use flea_symbols::{Site, addr::RemoteAddr};
use serde::{Deserialize, Serialize};

use crate::{
    change::{Attached, Change, arenas},
    error::AttachError,
    function::Function,
    host,
    registry::{Controller, ReplacementState},
    remote::Ground,
    session::Inner,
    transaction::{Author, change, is_known, new_function, seized, settle, take_off, tidy},
    unload,
};

/// What is to be placed and attached.
pub(crate) struct Replace<'a> {
    pub(crate) object: &'a SharedObject,
    /// Of its imports, by index.
    pub(crate) addresses: &'a [RemoteAddr],
    /// Where it should be close to.
    pub(crate) near: RemoteAddr,
    /// It can never be taken out again.
    pub(crate) pinned: bool,
    pub(crate) named: &'a [Named<'a>],
}

/// One function and its replacement.
pub(crate) struct Named<'a> {
    pub(crate) function: &'a Function,
    pub(crate) site: &'a Site,
    /// Where in the object's memory the replacement begins.
    pub(crate) offset: u64,
    /// Its name there.
    pub(crate) symbol: &'a str,
}

/// A loaded object's base, with all bits inverted: a process that patches itself would find
/// the base in its own memory when it looks for whoever still needs the object.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Handle(u64);

impl Handle {
    fn of(base: RemoteAddr) -> Self {
        Self(!base.0)
    }
}

/// Loads the object and attaches all of its replacements, or none; the numbers of these.
pub(crate) fn attach(pid: Pid, request: &Replace<'_>) -> Result<(Handle, Vec<u32>), AttachError> {
    let author = Author::now();
    seized(pid, |tracer| {
        let mut ground = Ground::open(tracer).map_err(AttachError::Remote)?;
        let outcome = attach_on(&mut ground, request, author);
        if outcome.is_err() {
            // Where nothing else is, nothing stays. What failed first is what is told.
            let _ = host::close(ground);
        }
        outcome
    })
}

fn attach_on(
    ground: &mut Ground<'_>,
    request: &Replace<'_>,
    author: Author,
) -> Result<(Handle, Vec<u32>), AttachError> {
    settle(ground)?;
    let Replace { object, addresses, near, pinned, .. } = *request;
    let base = ground.add_object(near, object, addresses, pinned)?;
    let outcome: Result<Vec<u32>, _> = change(ground, &[], |change| {
        request.named.iter().map(|named| add(change, named, base, author)).collect()
    });
    if !is_known(&outcome) {
        return outcome.map(|ids| (Handle::of(base), ids));
    }
    // Also after a failure: then the object that nobody has entered goes at once.
    let tidied = tidy(ground).and_then(|()| {
        if outcome.is_err() {
            unload::run(ground)?;
        }
        Ok(ground.store()?)
    });
    let ids = outcome?;
    tidied.map(|()| (Handle::of(base), ids))
}

fn add(
    change: &mut Change,
    named: &Named<'_>,
    base: RemoteAddr,
    author: Author,
) -> Result<u32, AttachError> {
    let site = named.function.site_address(named.site);
    let functions = &mut change.registry.functions;
    let known = functions.iter().position(|f| f.site == site);
    let mut function = match known {
        Some(at) => functions.swap_remove(at),
        None => new_function(named.function, named.site),
    };
    let id = change.registry.next_id;
    change.registry.next_id += 1;
    let before = arenas(&function);
    let state = ReplacementState {
        id,
        owner: author.owner,
        since: author.since,
        object: base,
        name: named.symbol.to_owned(),
        entry: RemoteAddr(base.0 + named.offset),
    };
    function.replacements.insert(0, state);
    change.relink(&mut function, before)?;
    change.registry.functions.push(function);
    Ok(id)
}

/// Takes those of the replacements with these numbers off that we attached from the object
/// behind `handle`: the target may have executed another program since. A target that has
/// ended is no error.
pub(crate) fn undo(session: &Inner, handle: Handle, ids: &[u32]) -> Result<(), AttachError> {
    if session.has_ended() {
        return Ok(());
    }
    let owner = Controller::this();
    let ids: HashSet<u32> = ids.iter().copied().collect();
    let ours = |attached: Attached<'_>| match attached {
        Attached::Body(_) => false,
        Attached::Replacement(r) => {
            ids.contains(&r.id) && r.owner == owner && Handle::of(r.object).0 == handle.0
        }
    };
    match take_off(session.pid(), ours) {
        Err(_) if session.has_ended() => Ok(()),
        outcome => outcome,
    }
}
