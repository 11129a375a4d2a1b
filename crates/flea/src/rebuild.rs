//! What is attached is made anew: the same programs, with other programs in the program arrays
//! that they call through. As everywhere, new code is placed, the sites are swapped, and the old
//! code is retired (`transaction`, steps 1 to 5).
//!
//! A body keeps its number and its place among the others, so whoever attached it can take it
//! off as before. It may get other words of the frame: each skeleton has a frame of its own, and
//! calls that are inside the original come back to the old one, which runs the old exit body.

use std::collections::BTreeMap;

use flea_image::Body;
use flea_symbols::addr::RemoteAddr;
use serde::{Deserialize, Serialize};

use crate::{
    change::{Change, FIRST_FRAME_OFFSET, arenas},
    compile,
    error::{AttachError, RemoteError},
    object::Loaded,
    own,
    prepared::Prepared,
    registry::{BodyState, Controller, FunctionState, Registry, Retired},
    remote::Ground,
    system_calls,
    transaction::{self, Author, MAX_ATTEMPTS, NewBody, seized},
    unwinder::{self, Unwinder},
};

/// Bodies that are to be made anew: their numbers, and what they are now.
#[derive(Default)]
pub(crate) struct Rebuild {
    pub(crate) ids: Vec<u32>,
    pub(crate) prepared: Vec<Prepared>,
}

/// What of the registry compiling depends on.
#[derive(PartialEq, Eq, Serialize, Deserialize)]
struct Lay {
    /// Where the frame words of each body can begin, behind those of the others on its function.
    /// Bodies that have been taken off are not here.
    free_offsets: BTreeMap<u32, u32>,
    has_frames: bool,
}

/// Makes them all anew, or leaves them all as they are. Those that have been taken off are left
/// out; of a target that has ended, all.
///
/// # Errors
/// As for attaching.
pub(crate) fn rebuild(object: &Loaded, what: &Rebuild) -> Result<(), AttachError> {
    if what.ids.is_empty() || object.session.has_ended() {
        return Ok(());
    }
    match rebuild_living(object, what) {
        Err(_) if object.session.has_ended() => Ok(()),
        outcome => outcome,
    }
}

fn rebuild_living(object: &Loaded, what: &Rebuild) -> Result<(), AttachError> {
    let pid = object.session.pid();
    let owner = Controller::this();
    let ours = |body: &BodyState| {
        body.owner == owner && body.arena == object.base && what.ids.contains(&body.id)
    };
    let look = || -> Result<Lay, AttachError> { Ok(Lay::of(&transaction::peek(pid)?, ours)) };
    // Of this very process a child looks at it, as for attaching.
    let mut lay = if transaction::is_own(pid) { own::in_child(look)? } else { look()? };
    let needs_frames = what.prepared.iter().any(|p| p.has_frame);
    for _ in 0..MAX_ATTEMPTS {
        let has_frames = needs_frames || lay.has_frames;
        let unwinders = if has_frames { unwinder::find(&object.session)? } else { Vec::new() };
        let offset = |id| lay.free_offsets.get(id).copied().unwrap_or(FIRST_FRAME_OFFSET);
        let offsets: Vec<u32> = what.ids.iter().map(offset).collect();
        let bodies = compile::all(object, &what.prepared, &offsets)?;
        let may_be_fewer = what.prepared.iter().any(|p| p.stack.may_be_fewer);
        let calls = system_calls::of(&bodies, may_be_fewer);
        let news = what.ids.iter().zip(&what.prepared).zip(bodies.iter().zip(&offsets));
        let news: BTreeMap<u32, New<'_>> = news
            .filter(|((id, _), _)| lay.free_offsets.contains_key(id))
            .map(|((id, prepared), (body, offset))| (*id, New { prepared, body, offset: *offset }))
            .collect();
        let outcome = seized(pid, |tracer| {
            tracer.check_system_calls(&calls).map_err(RemoteError::Seccomp)?;
            let ground = Ground::open(tracer).map_err(AttachError::Remote)?;
            let now = Lay::of(&ground.registry, ours);
            if now != lay {
                return Ok(Some(now));
            }
            rebuild_on(ground, object, &news, &unwinders).map(|()| None)
        })?;
        match outcome {
            None => return Ok(()),
            Some(changed) => lay = changed,
        }
    }
    Err(AttachError::Contended { attempts: MAX_ATTEMPTS })
}

impl Lay {
    fn of(registry: &Registry, ours: impl Fn(&BodyState) -> bool) -> Self {
        let mut free_offsets = BTreeMap::new();
        for function in &registry.functions {
            for body in function.bodies.iter().filter(|body| ours(body)) {
                let others = function.bodies.iter().filter(|other| other.id != body.id);
                let ends = others.map(|other| other.frame_offset + 8 * other.frame_words);
                free_offsets.insert(body.id, ends.fold(FIRST_FRAME_OFFSET, u32::max));
            }
        }
        Self { free_offsets, has_frames: registry.has_frames() }
    }
}

/// What a body becomes.
struct New<'a> {
    prepared: &'a Prepared,
    body: &'a Body,
    offset: u32,
}

fn rebuild_on(
    mut ground: Ground<'_>,
    object: &Loaded,
    news: &BTreeMap<u32, New<'_>>,
    unwinders: &[Unwinder],
) -> Result<(), AttachError> {
    transaction::settle(&mut ground)?;
    let runtime = ground.registry.own_runtime().ok_or_else(|| {
        AttachError::Remote(RemoteError::Registry(ground.storage.damaged("no runtime".to_owned())))
    })?;
    transaction::change_and_tidy(&mut ground, unwinders, |change| {
        let mut functions = std::mem::take(&mut change.registry.functions);
        let is_meant = |f: &FunctionState| f.bodies.iter().any(|b| news.contains_key(&b.id));
        for function in functions.iter_mut().filter(|f| is_meant(f)) {
            replace_bodies(change, object, function, (runtime, news))?;
        }
        change.registry.functions = functions;
        Ok(())
    })
}

/// Puts the new bodies of one function in the places of the old ones.
fn replace_bodies(
    change: &mut Change,
    object: &Loaded,
    function: &mut FunctionState,
    (runtime, news): (RemoteAddr, &BTreeMap<u32, New<'_>>),
) -> Result<(), AttachError> {
    let arenas_before = arenas(function);
    let mut is_replaced = false;
    for i in 0..function.bodies.len() {
        let old = function.bodies[i].clone();
        let Some(New { prepared, body, offset }) = news.get(&old.id) else { continue };
        let author = Author { owner: old.owner, since: old.since };
        let new = NewBody { body, offset: *offset, runtime, author };
        function.bodies[i] =
            transaction::place_body(change, object, prepared, function, (old.id, &new))?;
        change.retired.extend(old.placed().map(|code| Retired::plain(code, vec![old.arena])));
        is_replaced = true;
    }
    if is_replaced { change.relink(function, arenas_before) } else { Ok(()) }
}
