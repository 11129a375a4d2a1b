//! What the rest of the controller relies on in a registry that was read from a target. The
//! target can write there what it likes; after this check it harms itself alone.

use flea_image::BODY_FRAMES_OFFSET;
use flea_layout::shared::THREAD_TABLE_BYTES;
use flea_symbols::addr::RemoteAddr;

use super::{BodyState, CodeArena, FunctionState, LoadedObject, Placed, Registry, Switch};

const PAGE: u64 = 4096;
/// User space ends far below.
const END_OF_ADDRESSES: u64 = 1 << 57;
/// Of all arenas together: what a controller is prepared to read back.
const MAX_CODE_BYTES: u64 = 2 << 30;
/// A site is a few instructions of at most 15 bytes.
const SITE_BYTES: std::ops::RangeInclusive<usize> = 5..=64;
/// Six argument registers, and the result.
const ALL_CHANGES: u32 = 0x1_003f;
/// Far more than a skeleton has room for.
const MAX_FRAME_BYTES: u32 = 1 << 20;
/// Numbers are given out one by one: nobody gets here honestly.
const MAX_ID: u32 = u32::MAX / 2;

/// The first thing found wrong.
pub(super) fn check(registry: &Registry) -> Result<(), String> {
    let mut code_bytes = 0u64;
    for arena in &registry.code {
        check_arena(arena)?;
        arena.rows.map_or(Ok(()), |rows| check_placed(registry, rows))?;
        code_bytes = code_bytes.saturating_add(arena.size_bytes);
    }
    if code_bytes > MAX_CODE_BYTES {
        return Err(format!("{code_bytes} bytes of code"));
    }
    for arena in &registry.data {
        end(arena.mapping, arena.size_bytes)?;
        if arena.size_bytes < THREAD_TABLE_BYTES as u64 {
            return Err(format!("a data arena of {} bytes", arena.size_bytes));
        }
    }
    for object in &registry.objects {
        let aligned = [object.base.0, object.size_bytes].iter().all(|n| n.is_multiple_of(PAGE));
        if end(object.base, object.size_bytes).is_err() || !aligned {
            return Err(format!("an object of {} bytes at {}", object.size_bytes, object.base));
        }
    }
    for runtime in &registry.runtimes {
        check_placed(registry, runtime.code)?;
    }
    if registry.next_id > MAX_ID {
        return Err(format!("{} bodies were attached", registry.next_id));
    }
    for function in &registry.functions {
        check_function(registry, function)?;
    }
    for retired in &registry.retired {
        check_placed(registry, retired.code)?;
        check_switches(registry, &retired.switches)?;
    }
    // Each stretch is in some arena, but a thousand may be the same one.
    let placed_bytes = placed(registry).fold(0u64, |sum, p| sum.saturating_add(p.len.into()));
    if placed_bytes > code_bytes {
        return Err(format!("{placed_bytes} bytes of images in {code_bytes} bytes of code"));
    }
    Ok(())
}

/// All stretches of code that something is said to be in.
fn placed(registry: &Registry) -> impl Iterator<Item = Placed> + '_ {
    let functions = registry
        .functions
        .iter()
        .flat_map(|f| f.bodies.iter().flat_map(BodyState::placed).chain(f.skeleton));
    let rows = registry.code.iter().filter_map(|arena| arena.rows);
    let runtimes = registry.runtimes.iter().map(|runtime| runtime.code);
    functions.chain(rows).chain(runtimes).chain(registry.retired.iter().map(|r| r.code))
}

fn check_arena(arena: &CodeArena) -> Result<(), String> {
    let end_of_arena = end(arena.base, arena.size_bytes)?;
    if !(arena.base..=end_of_arena).contains(&arena.next) {
        return Err(format!("code arena {} is full up to {}", arena.base, arena.next));
    }
    let mut free_from = arena.base;
    for &(at, bytes) in &arena.free {
        let behind = end(at, bytes)?;
        if at < free_from || behind > arena.next {
            return Err(format!("free stretch {at} of code arena {}", arena.base));
        }
        free_from = behind;
    }
    Ok(())
}

fn check_function(registry: &Registry, f: &FunctionState) -> Result<(), String> {
    let n_bytes = f.original.len();
    end(f.site, n_bytes as u64)?;
    let lens: usize = f.insn_lens.iter().copied().map(usize::from).sum();
    if !SITE_BYTES.contains(&n_bytes) || lens != n_bytes || f.insn_lens.contains(&0) {
        return Err(format!("site {} has {n_bytes} bytes of {:?}", f.site, f.insn_lens));
    }
    let has_room = |door: RemoteAddr| door.0 >= f.site.0 + 5 && f.door().is_some();
    if f.door.is_some_and(|door| !has_room(door)) {
        return Err(format!("the door to {} is at {:?}", f.site, f.door));
    }
    if f.stack.may_be_fewer && registry.runtimes.is_empty() {
        return Err(format!("no runtime to read the stack arguments of {} with", f.site));
    }
    f.skeleton.map_or(Ok(()), |p| check_placed(registry, p))?;
    check_switches(registry, &f.switches)?;
    for one in &f.replacements {
        let home = registry.objects.iter().find(|object| object.base == one.object);
        let inside = |object: &LoadedObject| {
            one.entry.0.checked_sub(object.base.0).is_some_and(|into| into < object.size_bytes)
        };
        if !home.is_some_and(inside) {
            return Err(format!("replacement {} at {} is in no object", one.id, one.entry));
        }
    }
    for body in &f.bodies {
        for p in body.placed() {
            check_placed(registry, p)?;
        }
        let (offset, n_words) = (body.frame_offset, body.frame_words);
        if !(BODY_FRAMES_OFFSET..=MAX_FRAME_BYTES).contains(&offset)
            || n_words > MAX_FRAME_BYTES / 8
        {
            return Err(format!("body {} has {n_words} words at {offset}", body.id));
        }
        if body.changes & !ALL_CHANGES != 0 {
            return Err(format!("body {} changes {:#x}", body.id, body.changes));
        }
        if let Some(save) = body.saves.iter().find(|save| !save.fits(n_words)) {
            return Err(format!("body {} has {n_words} words and saves {save:?}", body.id));
        }
    }
    Ok(())
}

fn check_switches(registry: &Registry, switches: &[Switch]) -> Result<(), String> {
    for switch in switches {
        let len = u32::try_from(switch.new.len()).unwrap_or(u32::MAX);
        check_placed(registry, Placed { at: switch.at, len })?;
        check_placed(registry, Placed { at: switch.trap_to, len: 1 })?;
    }
    Ok(())
}

fn check_placed(registry: &Registry, p: Placed) -> Result<(), String> {
    let behind = end(p.at, p.len.into())?;
    let inside = |arena: &CodeArena| arena.base <= p.at && behind <= arena.next;
    if registry.code.iter().any(inside) { Ok(()) } else { Err(format!("no code at {}", p.at)) }
}

fn end(at: RemoteAddr, n_bytes: u64) -> Result<RemoteAddr, String> {
    let end = at.0.checked_add(n_bytes).filter(|end| *end < END_OF_ADDRESSES);
    end.map(RemoteAddr).ok_or_else(|| format!("{n_bytes} bytes at {at}"))
}
