//! Attaching and detaching, as one transaction on the seized target.
//!
//! Protected: a target that runs whatever it executes, and a registry that says what is there.
//! By: `PTRACE_SEIZE`, which one controller holds at a time, and this order:
//! 1. load the registry;
//! 2. place bodies and skeletons in memory that nothing enters yet;
//! 3. store the new registry, in which each changed function also has its previous bytes, and
//!    the code that is replaced is retired already: a reader who finds those bytes at the site
//!    knows that step 4 was not reached, and does it again before anything else ([`settle`]);
//! 4. swap all sites, and switch off the exit bodies that calls in flight would come back to
//!    ([`flea_patch::commit`]), which does all of that or nothing;
//! 5. store again; free what no thread can be in. When no
//!    frame of ours can be on a stack any more, unwinders get their own code back
//!    (`unwinder`).
//!
//! Compiling takes longer than all of that and happens before, without the target. What was
//! compiled depends on the registry in one way: the offset of the bodies' words in the frame.
//! It is looked at again under the seize, and where another controller was faster, compiling
//! is done once more.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Display,
    os::fd::{FromRawFd as _, OwnedFd},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use flea_image::Body;
use flea_layout::plan::ArenaPlan;
use flea_object::spec::MapSpec;
use flea_patch::Plan;
use flea_process::{Mapping, Memory, MemoryError, Pid, SeizeError, Tracer};
use flea_symbols::{Site, SiteKind as SymbolSiteKind, addr::RemoteAddr};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    change::{
        Attached, Change, FIRST_FRAME_OFFSET, arenas, pack_changes, pack_reads, retire_all,
        take_back,
    },
    compile,
    error::{AttachError, LoadError, RemoteError},
    function::Function,
    host::{self, Host},
    known_code::KnownCode,
    object::Loaded,
    own::{self, HelperError},
    placement::{runs, taken},
    prepared::Prepared,
    reclaim,
    registry::{
        BodyState, CodeArena, Controller, DataArena, FunctionState, Placed, Registry, Shared,
        SiteFile, SiteKind, Skip, StackArgs, Storage,
    },
    remote::{self, FileGoesTo, Ground},
    session::Inner,
    sites, system_calls, unload,
    unwinder::{self, Unwinder},
};

#[cfg(test)]
mod tests;

/// What a function takes that is attached to, in memory of its own: the page of text that is
/// written to, its images, its part of the registry. More than it is.
const BYTES_PER_FUNCTION: u64 = 16 << 10;
/// Code arenas that one transaction may add.
const MAX_NEW_ARENAS: usize = 64;
/// How often another controller may be faster.
pub(crate) const MAX_ATTEMPTS: usize = 16;
/// How often a library may be closed while a change is made, one time after the other.
const MAX_CLOSED: usize = 16;
/// How long a detach waits for threads to leave what was taken off.
const LEAVE_PATIENCE: Duration = Duration::from_secs(1);
/// How long it waits for threads to return from traced functions, which may take for ever: on
/// a busy machine most of them only wait for a CPU.
const RETURN_PATIENCE: Duration = Duration::from_millis(200);

/// The registry's storage in process `pid`, if there is one.
pub(crate) fn find_registry(pid: Pid) -> Result<Option<Storage>, RemoteError> {
    Ok(remote::find_registry(pid)?.map(Storage::at))
}

/// The registry of process `pid` as it is now, without seizing it; an empty one where there
/// is none.
pub(crate) fn peek(pid: Pid) -> Result<Registry, RemoteError> {
    let mut attempt = 0;
    loop {
        let Some(storage) = find_registry(pid)? else { return Ok(Registry::default()) };
        let loaded = storage.load(&Memory::open(flea_process::stand_in(pid))?);
        attempt += 1;
        // The last controller took it away before it was read: there is none now. A target that
        // moves it about by itself is not followed for ever.
        let has_moved = loaded.is_err()
            && attempt < MAX_ATTEMPTS
            && find_registry(pid)?.is_none_or(|now| now.base() != storage.base());
        if !has_moved {
            return Ok(loaded?);
        }
    }
}

/// Makes the memory of an object: in the target, and mapped here.
pub(crate) fn create_arena(
    session: &Inner,
    plan: &ArenaPlan,
    maps: &[MapSpec],
) -> Result<(flea_maps::Arena, RemoteAddr), LoadError> {
    let size_bytes = plan.size_bytes;
    let goes_to = if is_own(session.pid()) { FileGoesTo::Target } else { FileGoesTo::Controller };
    let owner = Controller::this();
    let (fd, base) = seized(session.pid(), |tracer| -> Result<_, LoadError> {
        remote::check_memory_limit(tracer.pid(), size_bytes)?;
        let mut ground = Ground::open(tracer)?;
        let added = ground.add_data_arena(size_bytes, goes_to, owner);
        if added.is_err() {
            // Where nothing else is, nothing stays. What failed first is what is told.
            let _ = host::close(ground);
        }
        Ok(added?)
    })?;
    // SAFETY: `add_data_arena` opened it in this process, and nobody else knows of it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    match flea_maps::Arena::from_fd(fd, plan, maps) {
        Ok(arena) => Ok((arena, base)),
        Err(error) => {
            release_arena(session, base);
            Err(error.into())
        }
    }
}

/// Maps the memory of an object into one more process; where it is there.
pub(crate) fn share_arena(
    session: &Inner,
    arena: &flea_maps::Arena,
) -> Result<RemoteAddr, LoadError> {
    let owner = Controller::this();
    seized(session.pid(), |tracer| -> Result<_, LoadError> {
        let mut ground = Ground::open(tracer)?;
        let shared = ground.share_data_arena(arena.plan().size_bytes, arena.fd(), owner);
        if shared.is_err() {
            // Where nothing else is, nothing stays. What failed first is what is told.
            let _ = host::close(ground);
        }
        Ok(shared?)
    })
}

/// Gives the memory of an object back. What cannot be done now (a thread is still inside a
/// traced function, the target cannot be seized) is done by the next controller that comes.
pub(crate) fn release_arena(session: &Inner, base: RemoteAddr) {
    if session.has_ended() {
        return;
    }
    let owner = Controller::this();
    let table = flea_layout::shared::THREAD_TABLE_BYTES as u64;
    let is_it = |d: &DataArena| d.mapping.0 + table == base.0 && d.owner == owner;
    // Nobody to tell: this runs when the object is dropped.
    let _ = release_arenas(session.pid(), is_it);
}

/// Takes off whatever this controller has attached in process `pid`, and gives the memory back.
pub(crate) fn leave(pid: Pid) -> Result<(), AttachError> {
    let owner = Controller::this();
    take_off(pid, |attached| match attached {
        Attached::Body(body) => body.owner == owner,
        Attached::Replacement(one) => one.owner == owner,
    })?;
    release_arenas(pid, |arena| arena.owner == owner)
}

fn release_arenas(
    pid: Pid,
    is_released: impl Fn(&DataArena) -> bool + Sync,
) -> Result<(), AttachError> {
    seized(pid, |tracer| -> Result<(), AttachError> {
        let Some(mut ground) = Ground::find(tracer)? else { return Ok(()) };
        for arena in ground.registry.data.iter_mut().filter(|arena| is_released(arena)) {
            arena.released = true;
        }
        settle(&mut ground)?;
        tidy(&mut ground)?;
        unload::run(&mut ground)?;
        host::unmap_released(&mut ground)?;
        Ok(host::close(ground)?)
    })
}

/// Attaches all of `prepared` or none; the numbers of the new bodies.
pub(crate) fn attach(object: &Loaded, prepared: &[Prepared]) -> Result<Vec<u32>, AttachError> {
    let pid = object.session.pid();
    let mut ground = look(pid, prepared)?;
    let has_frames = prepared.iter().any(|p| p.has_frame) || ground.has_frames;
    let unwinders = if has_frames { unwinder::find(&object.session)? } else { Vec::new() };
    let author = Author::now();
    for _ in 0..MAX_ATTEMPTS {
        let offsets = ground.frame_offsets;
        let bodies = compile::all(object, prepared, &offsets)?;
        let calls = system_calls::of(&bodies, prepared.iter().any(|p| p.stack.may_be_fewer));
        let outcome = seized(pid, |tracer| {
            tracer.check_system_calls(&calls).map_err(RemoteError::Seccomp)?;
            remote::check_memory_limit(pid, BYTES_PER_FUNCTION * prepared.len() as u64)?;
            let ground = Ground::open(tracer).map_err(AttachError::Remote)?;
            let now = Lay::of(&ground.registry, prepared);
            if now.frame_offsets != offsets {
                return Ok(Err(now));
            }
            attach_on(ground, object, prepared, &bodies, (&offsets, author), &unwinders).map(Ok)
        })?;
        match outcome {
            Ok(ids) => return Ok(ids),
            Err(changed) => ground = changed,
        }
    }
    Err(AttachError::Contended { attempts: MAX_ATTEMPTS })
}

/// What of the registry compiling depends on.
#[derive(Serialize, serde::Deserialize)]
struct Lay {
    /// First free frame offset on each function.
    frame_offsets: Vec<u32>,
    has_frames: bool,
}

impl Lay {
    fn of(registry: &Registry, prepared: &[Prepared]) -> Self {
        let frame_offsets = frame_offsets(registry, prepared);
        Self { frame_offsets, has_frames: registry.has_frames() }
    }
}

/// The lay of the land before compiling. Of this very process, a forked child looks at it too:
/// the registry's addresses of exit code must not stay behind in our heap, where `reclaim`
/// would take them for a thread's.
fn look(pid: Pid, prepared: &[Prepared]) -> Result<Lay, AttachError> {
    let look = || -> Result<Lay, AttachError> { Ok(Lay::of(&peek(pid)?, prepared)) };
    if is_own(pid) { Ok(own::in_child(look)?) } else { look() }
}

/// Takes those of the bodies with these numbers off that we attached and that work on `arena`:
/// the target may have executed another program since, in which the numbers are somebody
/// else's, or we may be a forked copy of who attached them. A target that has ended is no
/// error.
pub(crate) fn detach(session: &Inner, arena: RemoteAddr, ids: &[u32]) -> Result<(), AttachError> {
    if session.has_ended() {
        return Ok(());
    }
    let owner = Controller::this();
    let ids: HashSet<u32> = ids.iter().copied().collect();
    let ours = |attached: Attached<'_>| match attached {
        Attached::Body(b) => ids.contains(&b.id) && b.owner == owner && b.arena == arena,
        Attached::Replacement(_) => false,
    };
    match take_off(session.pid(), ours) {
        Err(_) if session.has_ended() => Ok(()),
        outcome => outcome,
    }
}

/// Takes the bodies and replacements with these numbers off, whoever attached them.
pub(crate) fn detach_from(pid: Pid, ids: &[u32]) -> Result<(), AttachError> {
    let ids: HashSet<u32> = ids.iter().copied().collect();
    take_off(pid, |attached| match attached {
        Attached::Body(body) => ids.contains(&body.id),
        Attached::Replacement(one) => ids.contains(&one.id),
    })
}

pub(crate) fn take_off(
    pid: Pid,
    gone: impl Fn(Attached<'_>) -> bool + Sync,
) -> Result<(), AttachError> {
    seized(pid, |tracer| {
        let Some(mut ground) = Ground::find(tracer).map_err(AttachError::Remote)? else {
            return Ok(());
        };
        settle(&mut ground)?;
        change_settled(&mut ground, &[], |change| change.remove(&gone).map(drop))?;
        let since = Instant::now();
        loop {
            tidy(&mut ground)?;
            unload::run(&mut ground)?;
            let retired = &ground.registry.retired;
            let patience = match retired.iter().any(|r| !r.calls_original) {
                true => LEAVE_PATIENCE,
                false => RETURN_PATIENCE,
            };
            let is_waiting = !retired.is_empty() || unload::is_waiting(&ground.registry);
            if !is_waiting || since.elapsed() >= patience {
                break;
            }
            let pause = (since.elapsed() / 4).max(Duration::from_millis(1));
            ground.tracer.wait_a_moment(pause).map_err(RemoteError::from)?;
        }
        host::unmap_released(&mut ground)?;
        Ok(host::close(ground)?)
    })
}

/// Seizes `pid` for the time that `f` takes. On this very process a forked child does it.
pub(crate) fn seized<R, E>(
    pid: Pid,
    f: impl FnOnce(&mut Tracer) -> Result<R, E> + Send,
) -> Result<R, E>
where
    R: Send + Serialize + DeserializeOwned,
    E: From<SeizeError> + From<HelperError> + Display + Send,
{
    let work = || flea_process::seize(pid, f)?;
    if is_own(pid) { Ok(own::in_child(work)?) } else { work() }
}

/// Whether that is this very process.
pub(crate) fn is_own(pid: Pid) -> bool {
    pid.cast_unsigned() == std::process::id()
}

/// First free frame offset on each function.
fn frame_offsets(registry: &Registry, prepared: &[Prepared]) -> Vec<u32> {
    let by_site: HashMap<RemoteAddr, &FunctionState> =
        registry.functions.iter().map(|f| (f.site, &**f)).collect();
    let end = |f: &FunctionState| {
        let ends = f.bodies.iter().map(|b| b.frame_offset + 8 * b.frame_words);
        ends.max().unwrap_or(FIRST_FRAME_OFFSET).max(FIRST_FRAME_OFFSET)
    };
    prepared
        .iter()
        .map(|p| by_site.get(&p.site_address()).map_or(FIRST_FRAME_OFFSET, |f| end(f)))
        .collect()
}

fn attach_on(
    mut ground: Ground<'_>,
    object: &Loaded,
    prepared: &[Prepared],
    bodies: &[Arc<Body>],
    (offsets, author): (&[u32], Author),
    unwinders: &[Unwinder],
) -> Result<Vec<u32>, AttachError> {
    settle(&mut ground)?;
    let damaged = |what: &str| {
        AttachError::Remote(RemoteError::Registry(ground.storage.damaged(what.into())))
    };
    // The tracer outlives a controller that is killed while it waits for its turn. Whoever was
    // first found that the owner of this memory is dead, and took it away.
    if !has_arena(&ground.registry, object.base, author.owner) {
        return Err(damaged("the memory that these programs work on has gone"));
    }
    let runtime = ground.registry.own_runtime().ok_or_else(|| damaged("no runtime"))?;
    make_room(&mut ground, prepared, bodies);
    change_and_tidy(&mut ground, unwinders, |change| {
        // Taken out by site and put back at the end: ten thousand of them are looked up.
        let mut functions: BTreeMap<RemoteAddr, Shared<FunctionState>> =
            change.registry.functions.drain(..).map(|f| (f.site, f)).collect();
        let mut ids = Vec::with_capacity(prepared.len());
        for ((p, body), offset) in prepared.iter().zip(bodies).zip(offsets) {
            let site = p.site_address();
            let mut function =
                functions.remove(&site).unwrap_or_else(|| new_function(&p.function, &p.site));
            let new = NewBody { body, offset: *offset, runtime, author };
            ids.push(add_body(change, object, p, &mut function, &new)?);
            functions.insert(site, function);
        }
        change.registry.functions = functions.into_values().collect();
        Ok(ids)
    })
}

/// Whether the memory of `owner`'s object at `base` is there: the same address may be another's.
fn has_arena(registry: &Registry, base: RemoteAddr, owner: Controller) -> bool {
    let table = flea_layout::shared::THREAD_TABLE_BYTES as u64;
    let is_it = |d: &DataArena| d.mapping.0 + table == base.0 && d.owner == owner && !d.released;
    registry.data.iter().any(is_it)
}

/// Steps 2 to 5, and whatever came of it is written down.
pub(crate) fn change_and_tidy<H: Host, R>(
    ground: &mut H,
    unwinders: &[Unwinder],
    edit: impl FnMut(&mut Change) -> Result<R, AttachError>,
) -> Result<R, AttachError> {
    let outcome = change_settled(ground, unwinders, edit);
    if !is_known(&outcome) {
        return outcome;
    }
    // Also after a failure: unwinders may have been told of frames that do not come.
    let tidied = tidy(ground).and_then(|()| Ok(ground.store()?));
    let result = outcome?;
    tidied.map(|()| result)
}

/// Whether what a change came to says which code is still entered. Where a commit could neither be
/// made nor be taken back, `settle` has to find out: what was to be retired may be entered.
pub(crate) fn is_known<R>(outcome: &Result<R, AttachError>) -> bool {
    !matches!(outcome, Err(AttachError::Commit(error)) if !error.is_undone())
}

/// Maps the memory for many functions at once, where it is clear that there is not enough: else
/// the change would be begun again for each arena. What goes wrong here goes wrong again when a
/// body is placed, and is told then.
fn make_room(ground: &mut Ground<'_>, prepared: &[Prepared], bodies: &[Arc<Body>]) {
    let Some(first) = prepared.first() else { return };
    let near = first.site_address();
    let wanted: u64 = bodies.iter().map(|body| room_for(body)).sum();
    let reached = ground.registry.code.iter().filter(|arena| arena.reaches(near));
    if reached.map(CodeArena::room).max().is_none_or(|room| room < wanted) {
        let _ = ground.add_code_arena_of(near, wanted);
    }
}

/// What a body and its skeleton take, or somewhat more.
fn room_for(body: &Body) -> u64 {
    /// Of a skeleton, besides its copies of bodies.
    const SKELETON_BYTES: usize = 192;
    let codes = [&body.entry, &body.session, &body.modify, &body.exit].into_iter().flatten();
    let lens: Vec<usize> = codes.map(|code| code.bytes.len()).collect();
    let bodies: u64 = lens.iter().map(|len| taken(*len)).sum();
    bodies + taken(lens.iter().sum::<usize>() + SKELETON_BYTES)
}

/// Step 5: frees what no thread can be in, and leaves unwinders alone once no frame is left
/// that they have to be told of.
pub(crate) fn tidy<H: Host>(ground: &mut H) -> Result<(), AttachError> {
    reclaim::run(ground)?;
    let registry = ground.registry();
    if registry.has_frames() || !registry.functions.iter().any(|f| f.finds_frames.is_some()) {
        return Ok(());
    }
    change_once(ground, Change::leave_unwinders)?;
    Ok(reclaim::run(ground)?)
}

/// As [`change`]. Done once more where a library has been closed since [`settle`]: what was
/// attached there has gone with it.
fn change_settled<H: Host, R>(
    ground: &mut H,
    unwinders: &[Unwinder],
    mut edit: impl FnMut(&mut Change) -> Result<R, AttachError>,
) -> Result<R, AttachError> {
    for _ in 0..MAX_CLOSED {
        let outcome = change(ground, unwinders, &mut edit);
        if !matches!(&outcome, Err(AttachError::Commit(error)) if error.is_found_changed()) {
            return outcome;
        }
        let n_functions = ground.registry().functions.len();
        settle(ground)?;
        if ground.registry().functions.len() == n_functions {
            return outcome;
        }
    }
    change(ground, unwinders, edit)
}

/// Steps 2 to 5 for one change of the registry; on failure everything is as before, but that
/// `unwinders` may have been told of frames.
pub(crate) fn change<H: Host, R>(
    ground: &mut H,
    unwinders: &[Unwinder],
    mut edit: impl FnMut(&mut Change) -> Result<R, AttachError>,
) -> Result<R, AttachError> {
    for _ in 0..MAX_NEW_ARENAS {
        let outcome = match unwinder::all_told(ground.registry(), unwinders) {
            true => change_once(ground, &mut edit),
            false => change_once(ground, |change| change.tell_unwinders(unwinders))
                .and_then(|()| change_once(ground, &mut edit)),
        };
        match outcome {
            Err(AttachError::NoRoom { near, .. }) => ground.add_code_arena(near)?,
            outcome => return outcome,
        }
    }
    let near = ground.registry().code.first().map_or(RemoteAddr(0), |arena| arena.base);
    Err(AttachError::NoRoom { near, bytes: 0 })
}

fn change_once<H: Host, R>(
    ground: &mut H,
    edit: impl FnOnce(&mut Change) -> Result<R, AttachError>,
) -> Result<R, AttachError> {
    let known_code = KnownCode::read(ground.registry(), ground)?;
    let mut change = Change::new(ground.registry().clone(), known_code);
    let result = edit(&mut change)?;
    change.switch_off();
    carry_out(ground, change)?;
    Ok(result)
}

fn carry_out<H: Host>(ground: &mut H, change: Change) -> Result<(), AttachError> {
    let (before, was_made) = (ground.registry().clone(), ground.is_made());
    let plan = match announce(ground, change) {
        Ok(plan) => plan,
        Err(error) => {
            // Nobody is to take what is still entered for retired.
            *ground.registry_mut() = before;
            ground.set_made(was_made);
            return Err(error);
        }
    };
    if let Err(error) = ground.commit(&plan) {
        if error.is_undone() {
            let announced = std::mem::replace(ground.registry_mut(), before);
            take_back(ground.registry_mut(), announced);
            ground.set_made(was_made);
        }
        // Where this fails the target has ended, and the commit's reason says more; else
        // `settle` finds out from the sites' bytes. The same where not all of them are as before.
        let _ = ground.store();
        return Err(error.into());
    }
    ground.note_made()?;
    ground.registry_mut().committed();
    Ok(ground.store()?)
}

/// Steps 2 and 3: all but what the target's threads could notice. What is left is step 4.
fn announce<H: Host>(ground: &mut H, change: Change) -> Result<Plan, AttachError> {
    let Change { mut registry, writes, pokes, retired, .. } = change;
    for (at, bytes) in &runs(writes) {
        ground.write(*at, bytes).map_err(RemoteError::from)?;
    }
    // Until the sites are swapped, what is to be retired is still entered. Nobody frees it:
    // whoever comes after our death finds the sites' previous bytes first (`settle`).
    registry.retired.extend(retired);
    *ground.registry_mut() = registry;
    ground.set_made(false);
    ground.store()?;
    Ok(Plan { pokes })
}

/// Makes the registry say what is there.
///
/// - A controller that died between storing the registry and swapping the sites left functions
///   whose bytes are the previous ones, and switches that were not thrown: its code that is said
///   to be retired is still entered. What it wanted is done now.
/// - Of a library that was closed nothing is left to swap, whatever is mapped in its place, be it
///   the same library once more; else nothing attached together with a function of it could ever
///   be taken off again.
pub(crate) fn settle<H: Host>(ground: &mut H) -> Result<(), AttachError> {
    let maps = ground.maps()?;
    // A page that cannot be read just now is still there.
    let is_mapped = |site| maps.iter().any(|mapping| mapping.contains(site));
    // A copy: where this fails, nobody is to think that nothing is attached.
    let mut registry = ground.registry().clone();
    let mut unfinished = Vec::new();
    let functions = std::mem::take(&mut registry.functions);
    let places: Vec<RemoteAddr> = functions.iter().map(|f| f.site).collect();
    for (mut f, now) in functions.into_iter().zip(sites::read(ground, &places)) {
        match now {
            Err(MemoryError::Unmapped { .. }) if !is_mapped(f.site) => {
                registry.retired.extend(retire_all(f));
                continue;
            }
            Err(error) => return Err(RemoteError::from(error).into()),
            Ok(now) if now != f.patched && is_mapped_anew(ground, &f, now, &maps) => {
                registry.retired.extend(retire_all(f));
                continue;
            }
            Ok(now) if now != f.patched && now == f.previous => unfinished.push(f.site),
            Ok(_) if f.door.is_some() && close_up(ground, &mut f)? => unfinished.push(f.site),
            Ok(_) => {}
        }
        registry.functions.push(f);
    }
    let to_throw = forget_thrown(&mut registry, ground)?;
    *ground.registry_mut() = registry;
    if unfinished.is_empty() && !to_throw {
        ground.set_made(true);
        ground.registry_mut().committed();
        return Ok(());
    }
    let is_unfinished: HashSet<RemoteAddr> = unfinished.iter().copied().collect();
    change(ground, &[], |change| {
        // Only now: where this fails, whoever comes next has to find it as it was announced.
        for f in &mut change.registry.functions {
            if is_unfinished.contains(&f.site) {
                f.patched = f.previous;
            }
        }
        unfinished.iter().try_for_each(|site| change.relink_site(*site))
    })
}

/// Whether the module of `f`, where `now` stands instead of our jump, is not the one that was
/// patched: something else is mapped there, or the same file for the second time. The latter has
/// the bytes of a site whose author died before he swapped it; but had he, that was noted, or there
/// were others than the file's before.
fn is_mapped_anew<H: Host>(ground: &H, f: &FunctionState, now: [u8; 5], maps: &[Mapping]) -> bool {
    let there = maps.iter().find(|mapping| mapping.contains(f.site));
    let there = there.map(|mapping| SiteFile::at(f.site, mapping));
    let is_another = f.file.is_some() && f.file != there;
    is_another || now[..] == f.original[..5] && (ground.is_made() || now != f.previous)
}

/// Drops the switches that were thrown; whether there are others that should have been.
fn forget_thrown<H: Host>(registry: &mut Registry, ground: &H) -> Result<bool, RemoteError> {
    let attached = registry.body_ids();
    let (mut to_throw, mut failed) = (false, None);
    for retired in &mut registry.retired {
        retired.switches.retain(|switch| {
            let mut now = [0; 5];
            if attached.contains(&switch.body) {
                return true;
            }
            if let Err(error) = ground.read(switch.at, &mut now) {
                // Taken for one that was not, it would be thrown again.
                failed.get_or_insert(error);
            }
            let thrown = now == switch.new;
            to_throw |= !thrown;
            !thrown
        });
    }
    failed.map_or(Ok(to_throw), |error| Err(error.into()))
}

/// A controller that died between the two writes that open or close a function's door left
/// bytes behind it that nobody gets to: they are put back. Whether that was so.
fn close_up<H: Host>(ground: &H, f: &mut FunctionState) -> Result<bool, AttachError> {
    let Some((door, closed, _)) = f.door() else { return Ok(false) };
    let mut now = [0; 2];
    ground.read(door, &mut now).map_err(RemoteError::from)?;
    if now == closed && f.patched[..] != f.original[..5] {
        ground.write(f.site, &f.original[..5]).map_err(RemoteError::from)?;
        f.previous.copy_from_slice(&f.original[..5]);
        return Ok(true);
    }
    Ok(false)
}

/// Who attaches, and when: the same for all bodies of one transaction. Never the forked helper
/// of a process that traces itself.
#[derive(Clone, Copy)]
pub(crate) struct Author {
    pub(crate) owner: Controller,
    pub(crate) since: u64,
}

impl Author {
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self { owner: Controller::this(), since: since.map_or(0, |since| since.as_secs()) }
    }
}

/// What [`place_body`] places.
#[derive(Clone, Copy)]
pub(crate) struct NewBody<'a> {
    pub(crate) body: &'a Body,
    /// First word of its frame.
    pub(crate) offset: u32,
    /// Where the runtime blob is.
    pub(crate) runtime: RemoteAddr,
    pub(crate) author: Author,
}

/// Places a body and makes `function` enter it.
fn add_body(
    change: &mut Change,
    object: &Loaded,
    p: &Prepared,
    function: &mut FunctionState,
    new: &NewBody<'_>,
) -> Result<u32, AttachError> {
    let arenas = arenas(function);
    let id = change.registry.next_id;
    change.registry.next_id += 1;
    let state = place_body(change, object, p, function, (id, new))?;
    function.bodies.insert(0, state);
    change.relink(function, arenas)?;
    Ok(id)
}

/// Places the body that is to have number `id`, and makes `function` ready for it.
pub(crate) fn place_body(
    change: &mut Change,
    object: &Loaded,
    p: &Prepared,
    function: &mut FunctionState,
    (id, new): (u32, &NewBody<'_>),
) -> Result<BodyState, AttachError> {
    let NewBody { body, runtime, author, .. } = *new;
    let mut place = |code: &Option<flea_image::Code>| -> Result<Option<Placed>, AttachError> {
        let Some(code) = code else { return Ok(None) };
        let bytes = code.resolve(|target| object.resolve(runtime, p, target));
        change.place(function.site, bytes).map(Some)
    };
    let (entry, session) = (place(&body.entry)?, place(&body.session)?);
    let (modify, exit) = (place(&body.modify)?, place(&body.exit)?);
    if modify.is_some() {
        function.skip = p.skip().map(Skip::from);
    }
    function.stack = function.stack.join(p.stack);
    Ok(BodyState {
        id,
        owner: author.owner,
        since: author.since,
        arena: object.base,
        programs: p.uses.iter().map(|(index, _)| program_label(object, *index)).collect(),
        writes_target: p.uses.iter().any(|(index, _)| object.writes_target(*index)),
        entry,
        session,
        modify,
        exit,
        frame_offset: new.offset,
        frame_words: body.frame_words,
        reads: pack_reads(&body.reads),
        changes: pack_changes(body.changes),
        saves: body.saves.clone(),
    })
}

fn program_label(object: &Loaded, index: usize) -> (String, String) {
    let program = &object.spec.programs[index];
    (program.kind.name().to_owned(), program.name.clone())
}

/// A function that nothing is attached to yet.
pub(crate) fn new_function(function: &Function, site: &Site) -> Shared<FunctionState> {
    let original = site.original.clone();
    let first: [u8; 5] = original[..5].try_into().expect("a site has at least five bytes");
    let mut insn_lens = Vec::new();
    for (i, &start) in site.boundaries.iter().enumerate() {
        let end = site.boundaries.get(i + 1).copied();
        let end = end.unwrap_or_else(|| u8::try_from(original.len()).unwrap_or(u8::MAX));
        insn_lens.push(end - start);
    }
    Shared::from(FunctionState {
        module: function.module().to_owned(),
        name: function.name(),
        address: function.address(),
        file: function.owner().file_at(function.site_address(site)),
        site: function.site_address(site),
        door: site.door.map(|door| function.remote(door)),
        kind: match site.kind {
            SymbolSiteKind::Nop5 => SiteKind::Nop,
            SymbolSiteKind::Relocated => SiteKind::Relocated,
        },
        original,
        insn_lens,
        patched: first,
        previous: first,
        skeleton: None,
        skip: None,
        stack: StackArgs::NONE,
        calls_original: false,
        finds_frames: None,
        returns_to: None,
        calls: Vec::new(),
        switches: Vec::new(),
        bodies: Vec::new(),
        replacements: Vec::new(),
    })
}
