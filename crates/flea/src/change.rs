//! What a change of the attached bodies means for code and sites: computed over the registry,
//! carried out by `transaction`. Touches no process.

use std::collections::HashSet;

use flea_image::{
    BodyRef, Changes, FrameArena, Linker, Reads, Skeleton, SkeletonBody, SkeletonRequest,
    SkipResult, StackCopy,
};
use flea_layout::shared::RuntimeFn;
use flea_patch::Poke;
use flea_symbols::{
    addr::RemoteAddr,
    signature::{ArgWord, RetWord},
};

use crate::{
    error::AttachError,
    known_code::KnownCode,
    registry::{
        BodyState, CodeArena, FunctionState, Placed, Question, Registry, ReplacementState, Retired,
        Shared, SiteKind, Skip, StackArgs, Switch,
    },
};

/// First body frame, in bytes below the skeleton's rbp: behind result and argument words.
pub(crate) const FIRST_FRAME_OFFSET: u32 = flea_image::BODY_FRAMES_OFFSET;
/// More bodies than this are called, not copied into the skeleton: it would only grow.
const MAX_INLINE_BODIES: usize = 4;

/// What has a number of its own in the registry.
#[derive(Clone, Copy)]
pub(crate) enum Attached<'a> {
    Body(&'a BodyState),
    Replacement(&'a ReplacementState),
}

/// A change in the making: the registry as it will be, and what has to be written for it.
pub(crate) struct Change {
    pub(crate) registry: Registry,
    /// New code, in memory that nothing enters yet.
    pub(crate) writes: Vec<(RemoteAddr, Vec<u8>)>,
    /// Sites to swap.
    pub(crate) pokes: Vec<Poke>,
    /// Code that is not entered once the sites are swapped.
    pub(crate) retired: Vec<Retired>,
    /// Bytes of code placed earlier, as read from the target.
    known_code: KnownCode,
    linker: Linker,
}

impl Change {
    /// Starts from what is there. `known_code` has the bytes of every body in `registry` that
    /// the change may copy.
    pub(crate) fn new(registry: Registry, known_code: impl Into<KnownCode>) -> Self {
        Self {
            registry,
            writes: Vec::new(),
            pokes: Vec::new(),
            retired: Vec::new(),
            known_code: known_code.into(),
            linker: Linker::default(),
        }
    }

    /// Places `bytes` within reach of `near`.
    pub(crate) fn place(
        &mut self,
        near: RemoteAddr,
        bytes: Vec<u8>,
    ) -> Result<Placed, AttachError> {
        let len = u32::try_from(bytes.len()).expect("an image is far below 4 GiB");
        let placed =
            self.registry.place(near, len).ok_or(AttachError::NoRoom { near, bytes: len })?;
        self.known_code.insert(placed.at, bytes.clone());
        self.writes.push((placed.at, bytes));
        Ok(placed)
    }

    /// Takes the bodies and replacements that `gone` picks off every function.
    pub(crate) fn remove(
        &mut self,
        gone: impl Fn(Attached<'_>) -> bool,
    ) -> Result<Vec<u32>, AttachError> {
        let mut removed = Vec::new();
        let mut functions = std::mem::take(&mut self.registry.functions);
        for f in &mut functions {
            let body_goes = f.bodies.iter().any(|body| gone(Attached::Body(body)));
            let mut others = f.replacements.iter();
            if !body_goes && !others.any(|one| gone(Attached::Replacement(one))) {
                continue;
            }
            let arenas = arenas(f);
            let (out, stay): (Vec<_>, Vec<_>) =
                f.bodies.drain(..).partition(|body| gone(Attached::Body(body)));
            f.bodies = stay;
            f.replacements.retain(|one| {
                let goes = gone(Attached::Replacement(one));
                removed.extend(goes.then_some(one.id));
                !goes
            });
            for body in out {
                removed.push(body.id);
                let plain = |code| Retired::plain(code, vec![body.arena]);
                self.retired.extend(body.placed().map(plain));
            }
            self.relink(f, arenas)?;
        }
        self.registry.functions = functions;
        Ok(removed)
    }

    /// Does what was announced of the functions at these sites, where the bytes of before still
    /// stand.
    pub(crate) fn begin_again(
        &mut self,
        unfinished: &HashSet<RemoteAddr>,
    ) -> Result<(), AttachError> {
        let mut functions = std::mem::take(&mut self.registry.functions);
        for f in functions.iter_mut().filter(|f| unfinished.contains(&f.site)) {
            f.patched = f.previous;
            let arenas = arenas(f);
            self.relink(f, arenas)?;
        }
        self.registry.functions = functions;
        Ok(())
    }

    /// Makes skeletons that nobody enters any more jump over exit bodies that are attached no
    /// longer. In those that are entered there are none: each change makes them anew.
    ///
    /// Nothing is switched off by attaching: what those that are inside the original were
    /// promised at their entry still holds when they leave it.
    ///
    /// If there are more than `most`, none is: whether that is.
    pub(crate) fn switch_off(&mut self, most: usize) -> bool {
        let attached = self.registry.body_ids();
        let retired = self.registry.retired.iter().chain(&self.retired);
        let switches = retired.flat_map(|retired| &retired.switches);
        let off = switches.filter(|switch| !attached.contains(&switch.body));
        if off.clone().nth(most).is_some() {
            return false;
        }
        let pokes = off.map(|s| Poke {
            site: s.at,
            expected: s.expected.to_vec(),
            new: s.new,
            trap_to: s.trap_to,
            moves: Vec::new(),
        });
        self.pokes.extend(pokes);
        true
    }

    /// Makes the site of `f` enter exactly `f.bodies` and the newest of `f.replacements`. Once
    /// per change: a site has one poke.
    ///
    /// `arenas` are those that its present skeleton works on.
    pub(crate) fn relink(
        &mut self,
        f: &mut FunctionState,
        arenas: Vec<RemoteAddr>,
    ) -> Result<(), AttachError> {
        let was_original = f.patched[..] == f.original[..5];
        let before = f.patched;
        if let Some(code) = f.skeleton {
            self.retired.push(Retired {
                code,
                calls_original: f.calls_original,
                returns_to: f.returns_to.take(),
                calls: std::mem::take(&mut f.calls),
                arenas,
                switches: std::mem::take(&mut f.switches),
            });
        }
        // By the bytes: who announced that there is to be none may have died before it was done.
        let old_entry = jump_target(f.site, before);
        let behind = f.site.offset(f.original.len().try_into().expect("a few bytes"));
        let mut moves = Vec::new();

        if !f.is_in_use() {
            f.patched = f.original[..5].try_into().expect("a site has at least 5 bytes");
            f.skeleton = None;
            f.calls_original = false;
        } else if let Some(patch) = self.direct_call(f) {
            f.patched = patch;
            f.skeleton = None;
            f.calls_original = false;
            moves = inner_boundaries(f).map(|at| (at, behind)).collect();
        } else {
            let skeleton = self.place_skeleton(f)?;
            f.patched = skeleton.site_patch;
            f.switches = switches(f, &skeleton);
            f.returns_to = skeleton.returns_to;
            f.calls_original = skeleton.returns_to.is_some();
            moves.extend(skeleton.moves.into_iter().filter(|(old, _)| *old != f.site));
        }
        f.previous = before;
        let expected = if was_original { f.original.clone() } else { before.to_vec() };
        // A thread that runs into the int3 must not miss a program that stays attached: the
        // new skeleton runs them all, and where there is none the old one still does.
        let trap_to = f.skeleton.map(|s| s.at).or(old_entry).unwrap_or(behind);
        if !was_original {
            moves.clear();
        }
        // In this order, so that an open door always leads to a jump, also if we die in between:
        // opened behind it, closed before it.
        let door = door_poke(f, was_original, trap_to, &moves);
        let (closed, opened) = if was_original { (None, door) } else { (door, None) };
        self.pokes.extend(closed);
        self.pokes.push(Poke { site: f.site, expected, new: f.patched, trap_to, moves });
        self.pokes.extend(opened);
        Ok(())
    }

    /// The simplest case: nops that can be a call of the one body.
    fn direct_call(&self, f: &FunctionState) -> Option<[u8; 5]> {
        let [body] = f.bodies.as_slice() else { return None };
        // The called body returns behind the five bytes: an instruction must begin there.
        let mut ends = inner_boundaries(f);
        let five = f.site.offset(5);
        if f.finds_frames.is_some()
            || !f.replacements.is_empty()
            || f.door.is_some()
            || f.kind != SiteKind::Nop
            || body.session.or(body.modify).or(body.exit).is_some()
            || !(f.original.len() == 5 || ends.any(|end| end == five))
        {
            return None;
        }
        flea_image::call_patch(f.site, body.entry?.at)
    }

    fn place_skeleton(&mut self, f: &mut FunctionState) -> Result<Skeleton, AttachError> {
        let reads: Vec<Reads> = f.bodies.iter().map(|b| unpack_reads(b.reads)).collect();
        let bodies: Vec<SkeletonBody<'_>> = f
            .bodies
            .iter()
            .zip(&reads)
            .map(|(b, r)| skeleton_body(&self.known_code, f, b, r))
            .collect();
        let arenas = f.finds_frames.map_or_else(Vec::new, |_| self.frame_arenas());
        let question = match f.finds_frames {
            Some(Question::Object) => flea_image::Question::Object,
            Some(Question::Row) | None => flea_image::Question::Row,
        };
        f.calls = bodies.iter().flat_map(called).collect();
        let stack_copy = self.stack_copy(f.stack).ok_or_else(|| {
            let message = "this build's runtime is not in the target".to_owned();
            let source = flea_image::LinkError::Encode { image_address: f.site, message };
            AttachError::Link { function: f.name.clone(), source }
        })?;
        let failed = |source| AttachError::Link { function: f.name.clone(), source };
        let near = self.draft_address(f.site);
        let request = SkeletonRequest {
            site: f.site,
            replaced: &f.original,
            kind: match f.kind {
                SiteKind::Nop => flea_image::SiteKind::Nops,
                SiteKind::Relocated => flea_image::SiteKind::Relocated,
            },
            image_address: near.ok_or(AttachError::NoRoom { near: f.site, bytes: 0 })?,
            bodies: &bodies,
            skip: f.skip.map(SkipResult::from),
            stack_copy,
            stack_align_bytes: f.stack.align_bytes,
            replacement: f.replacements.first().map(|newest| newest.entry),
        };
        let draft = self.linker.draft(&request, question, &arenas).map_err(failed)?;
        let len = u32::try_from(draft.n_bytes()).expect("a skeleton is far below 4 GiB");
        let placed = self
            .registry
            .place(f.site, len)
            .ok_or(AttachError::NoRoom { near: f.site, bytes: len })?;
        let skeleton = draft.at(placed.at).map_err(failed)?;
        self.writes.push((placed.at, skeleton.bytes.clone()));
        f.skeleton = Some(placed);
        Ok(skeleton)
    }

    /// `None` where this build has no runtime in the target to read the stack with.
    fn stack_copy(&self, stack: StackArgs) -> Option<StackCopy> {
        let n_words = stack.n_words;
        if !stack.may_be_fewer {
            return Some(StackCopy::Exactly(n_words));
        }
        let into = flea_runtime::offset_of(RuntimeFn::ProbeReadUser);
        let probe_read_user = self.registry.own_runtime()?.offset(into.into());
        Some(StackCopy::UpTo { n_words, probe_read_user })
    }

    /// The arenas that have rows.
    fn frame_arenas(&self) -> Vec<FrameArena> {
        let arenas = self.registry.code.iter().filter_map(|arena| {
            let end = RemoteAddr(arena.base.0 + arena.size_bytes);
            Some(FrameArena { start: arena.base, end, rows: arena.rows?.at })
        });
        arenas.collect()
    }

    /// Where code for `site` goes, or not far from there.
    fn draft_address(&self, site: RemoteAddr) -> Option<RemoteAddr> {
        let arenas = self.registry.code.iter().filter(|arena| arena.reaches(site));
        arenas.map(|arena| arena.next).min_by_key(|next| next.0.abs_diff(site.0))
    }
}

/// Where a jump leads that stands at `site`.
fn jump_target(site: RemoteAddr, bytes: [u8; 5]) -> Option<RemoteAddr> {
    const JMP_REL32: u8 = 0xe9;
    let [JMP_REL32, distance @ ..] = bytes else { return None };
    Some(site.offset(5 + i64::from(i32::from_le_bytes(distance))))
}

/// What opens or closes the door of `f`, where it has one and that is to change.
fn door_poke(
    f: &FunctionState,
    was_original: bool,
    trap_to: RemoteAddr,
    moves: &[(RemoteAddr, RemoteAddr)],
) -> Option<Poke> {
    let (site, closed, open) = f.door()?;
    let is_original = f.patched[..] == f.original[..5];
    let (expected, new) = match (was_original, is_original) {
        (true, false) => (closed, open),
        (false, true) => (open, closed),
        _ => return None,
    };
    let inside = |from: RemoteAddr| from > site && from < site.offset(2);
    Some(Poke {
        site,
        expected: expected.to_vec(),
        new: [new[0], new[1], 0, 0, 0],
        trap_to,
        moves: moves.iter().copied().filter(|(from, _)| inside(*from)).collect(),
    })
}

fn skeleton_body<'a>(
    known_code: &'a KnownCode,
    f: &FunctionState,
    b: &'a BodyState,
    reads: &'a Reads,
) -> SkeletonBody<'a> {
    let refer = |placed: Option<Placed>| {
        placed.map(|p| match known_code.get(p) {
            Some(bytes) if f.bodies.len() <= MAX_INLINE_BODIES => BodyRef::Inline(bytes),
            _ => BodyRef::Call(p.at),
        })
    };
    SkeletonBody {
        entry: refer(b.entry),
        session: refer(b.session),
        modify: refer(b.modify),
        exit: refer(b.exit),
        reads,
        saves: &b.saves,
        changes: unpack_changes(b.changes),
        frame_offset: b.frame_offset,
        frame_words: b.frame_words,
    }
}

/// The skeleton's switches, each with whose it is.
fn switches(f: &FunctionState, skeleton: &Skeleton) -> Vec<Switch> {
    let switch = |s: &flea_image::Switch| {
        let body = &f.bodies[s.body];
        let calls = body.exit.map(|exit| exit.at).filter(|at| f.calls.contains(at));
        let flea_image::Switch { at, expected, new, trap_to, .. } = *s;
        Switch { body: body.id, arena: body.arena, calls, at, expected, new, trap_to }
    };
    skeleton.switches.iter().map(switch).collect()
}

/// The bodies that are not copied.
fn called(body: &SkeletonBody<'_>) -> Vec<RemoteAddr> {
    let at = |side| match side {
        Some(BodyRef::Call(at)) => Some(at),
        _ => None,
    };
    [body.entry, body.session, body.modify, body.exit].into_iter().filter_map(at).collect()
}

impl From<SkipResult> for Skip {
    fn from(skip: SkipResult) -> Self {
        match skip {
            SkipResult::Nowhere => Self::Nowhere,
            SkipResult::Rax => Self::Rax,
            SkipResult::Xmm0 => Self::Xmm0,
        }
    }
}

impl From<Skip> for SkipResult {
    fn from(skip: Skip) -> Self {
        match skip {
            Skip::Nowhere => Self::Nowhere,
            Skip::Rax => Self::Rax,
            Skip::Xmm0 => Self::Xmm0,
        }
    }
}

/// [`Reads`] as the bits of [`BodyState::reads`].
pub(crate) fn pack_reads(reads: &Reads) -> u32 {
    let args = reads.args.iter().map(|word| match *word {
        ArgWord::Gpr(i) => 1 << i,
        ArgWord::Xmm(i) => 1 << (8 + i),
        ArgWord::XmmWord { .. } | ArgWord::Stack(_) => 0,
    });
    let results = reads.results.iter().map(|word| match word {
        RetWord::Rax => 1 << 16,
        RetWord::Rdx => 1 << 17,
        RetWord::Xmm0 => 1 << 18,
        RetWord::Xmm1 => 1 << 19,
        RetWord::XmmWord { .. } | RetWord::X87 { .. } => 0,
    });
    args.chain(results).fold(0, |bits, bit| bits | bit)
}

/// [`Changes`] as the bits of [`BodyState::changes`].
pub(crate) fn pack_changes(changes: Changes) -> u32 {
    u32::from(changes.args) | u32::from(changes.result) << 16
}

pub(crate) fn unpack_changes(bits: u32) -> Changes {
    let [args, _, result, _] = bits.to_le_bytes();
    Changes { args, result: result & 1 != 0 }
}

fn unpack_reads(bits: u32) -> Reads {
    let gprs = (0..6).filter(|i| bits >> i & 1 != 0).map(ArgWord::Gpr);
    let xmms = (0..8).filter(|i| bits >> (8 + i) & 1 != 0).map(ArgWord::Xmm);
    let results = [RetWord::Rax, RetWord::Rdx, RetWord::Xmm0, RetWord::Xmm1];
    Reads {
        args: gprs.chain(xmms).collect(),
        results: (16..).zip(results).filter(|(i, _)| bits >> i & 1 != 0).map(|(_, r)| r).collect(),
    }
}

/// All code of a function that nobody can enter any more: its module has been unmapped.
pub(crate) fn retire_all(f: Shared<FunctionState>) -> Vec<Retired> {
    let f = f.into_inner();
    let arenas = arenas(&f);
    let calls_original = f.calls_original;
    let skeleton = f.skeleton.map(|code| Retired {
        code,
        calls_original,
        returns_to: f.returns_to,
        calls: f.calls,
        arenas,
        switches: f.switches,
    });
    let bodies = f
        .bodies
        .into_iter()
        .flat_map(|b| b.placed().map(move |code| Retired::plain(code, vec![b.arena])));
    skeleton.into_iter().chain(bodies).collect()
}

/// What was announced has been taken back, and `registry` is what was before. Threads that came to
/// a site meanwhile went on in the new code, and may be in it for as long as the function takes: it
/// is retired.
pub(crate) fn take_back(registry: &mut Registry, announced: Registry) {
    let functions = registry.functions.iter();
    let old = functions.flat_map(|f| f.bodies.iter().flat_map(BodyState::placed).chain(f.skeleton));
    let old: HashSet<RemoteAddr> = old.map(|code| code.at).collect();
    let codes = announced.functions.into_iter().flat_map(retire_all);
    let retired: Vec<_> = codes.filter(|retired| !old.contains(&retired.code.at)).collect();
    registry.retired.extend(retired);
    registry.next_id = announced.next_id;
    for (arena, announced) in registry.code.iter_mut().zip(announced.code) {
        let rows = announced.rows.filter(|_| arena.rows.is_none());
        registry.retired.extend(rows.map(|rows| Retired::plain(rows, Vec::new())));
        *arena = CodeArena { rows: arena.rows, ..announced };
    }
}

/// The memory that a function's skeleton works on or leads to: data arenas, and objects with
/// replacements.
pub(crate) fn arenas(f: &FunctionState) -> Vec<RemoteAddr> {
    let bodies = f.bodies.iter().map(|b| b.arena);
    let mut arenas: Vec<_> = bodies.chain(f.replacements.iter().map(|r| r.object)).collect();
    arenas.sort_unstable();
    arenas.dedup();
    arenas
}

/// Addresses of the replaced instructions after the first.
fn inner_boundaries(f: &FunctionState) -> impl Iterator<Item = RemoteAddr> + '_ {
    let lens = f.insn_lens.split_last().map_or(&[][..], |(_, but_last)| but_last);
    lens.iter().scan(f.site, |at, &len| {
        *at = at.offset(i64::from(len));
        Some(*at)
    })
}

#[cfg(test)]
mod tests;
