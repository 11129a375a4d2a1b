//! What a change of the attached bodies means for code and sites: computed over the registry,
//! carried out by `transaction`. Touches no process.

use std::collections::HashMap;

use flea_image::{
    BodyRef, FrameArena, Reads, Skeleton, SkeletonBody, SkeletonRequest, SkipResult, StackCopy,
};
use flea_layout::shared::RuntimeFn;
use flea_patch::Poke;
use flea_symbols::{
    addr::RemoteAddr,
    signature::{ArgWord, RetWord},
};

use crate::{
    error::AttachError,
    registry::{
        BodyState, FunctionState, Placed, Question, Registry, Retired, SiteKind, Skip, StackArgs,
        Switch,
    },
};

/// First body frame, in bytes below the skeleton's rbp: behind result and argument words.
pub(crate) const FIRST_FRAME_OFFSET: u32 = flea_image::BODY_FRAMES_OFFSET;
/// More bodies than this are called, not copied into the skeleton: it would only grow.
const MAX_INLINE_BODIES: usize = 4;

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
    known_code: HashMap<RemoteAddr, Vec<u8>>,
}

impl Change {
    /// Starts from what is there. `known_code` has the bytes of every body in `registry` that
    /// the change may copy.
    pub(crate) fn new(registry: Registry, known_code: HashMap<RemoteAddr, Vec<u8>>) -> Self {
        Self { registry, writes: Vec::new(), pokes: Vec::new(), retired: Vec::new(), known_code }
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

    /// Takes the bodies that `gone` picks off every function.
    pub(crate) fn remove_bodies(
        &mut self,
        gone: impl Fn(&BodyState) -> bool,
    ) -> Result<Vec<u32>, AttachError> {
        let mut removed = Vec::new();
        let mut functions = std::mem::take(&mut self.registry.functions);
        for f in &mut functions {
            let arenas = arenas(f);
            let (out, stay): (Vec<_>, Vec<_>) = f.bodies.drain(..).partition(&gone);
            f.bodies = stay;
            if out.is_empty() {
                continue;
            }
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

    /// Makes skeletons that nobody enters any more jump over exit bodies that are attached no
    /// longer. In those that are entered there are none: each change makes them anew.
    ///
    /// Nothing is switched off by attaching: what those that are inside the original were
    /// promised at their entry still holds when they leave it.
    pub(crate) fn switch_off(&mut self) {
        let attached = self.registry.body_ids();
        let retired = self.registry.retired.iter().chain(&self.retired);
        let switches = retired.flat_map(|retired| &retired.switches);
        let pokes = switches.filter(|switch| !attached.contains(&switch.body)).map(|s| Poke {
            site: s.at,
            expected: s.expected.to_vec(),
            new: s.new,
            trap_to: s.trap_to,
            moves: Vec::new(),
        });
        self.pokes.extend(pokes);
    }

    /// Makes the site of `f` enter exactly `f.bodies`. Once per change: a site has one poke.
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
        let old_entry = f.skeleton.map(|s| s.at);
        let behind = f.site.offset(f.original.len().try_into().expect("a few bytes"));
        let mut moves = Vec::new();

        if f.bodies.is_empty() && f.finds_frames.is_none() {
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
        let stack_copy = self.stack_copy(f.stack);
        let link = |at| {
            let request = SkeletonRequest {
                site: f.site,
                replaced: &f.original,
                kind: match f.kind {
                    SiteKind::Nop => flea_image::SiteKind::Nops,
                    SiteKind::Relocated => flea_image::SiteKind::Relocated,
                },
                image_address: at,
                bodies: &bodies,
                skip: f.skip.map(SkipResult::from),
                stack_copy,
                stack_align_bytes: f.stack.align_bytes,
            };
            flea_image::link_unwinder_skeleton(&request, question, &arenas)
                .map_err(|source| AttachError::Link { function: f.name.clone(), source })
        };
        // The length does not depend on the place (all far branches are rel32), so a first
        // link near the site tells it.
        let near = self.draft_address(f.site);
        let draft = link(near.ok_or(AttachError::NoRoom { near: f.site, bytes: 0 })?)?;
        let len = u32::try_from(draft.bytes.len()).expect("a skeleton is far below 4 GiB");
        let placed = self
            .registry
            .place(f.site, len)
            .ok_or(AttachError::NoRoom { near: f.site, bytes: len })?;
        let skeleton = link(placed.at)?;
        if skeleton.bytes.len() != draft.bytes.len() {
            // Instructions whose length depends on the place: none that a site consists of,
            // but these bytes may have come from a registry that was scribbled over.
            let message = "its length depends on its place".to_owned();
            let source = flea_image::LinkError::Encode { image_address: placed.at, message };
            return Err(AttachError::Link { function: f.name.clone(), source });
        }
        self.writes.push((placed.at, skeleton.bytes.clone()));
        f.skeleton = Some(placed);
        Ok(skeleton)
    }

    fn stack_copy(&self, stack: StackArgs) -> StackCopy {
        if !stack.may_be_fewer {
            return StackCopy::Exactly(stack.n_words);
        }
        let runtime = self.registry.runtime.expect("a registry with such a function has one");
        let into = flea_runtime::offset_of(RuntimeFn::ProbeReadUser);
        StackCopy::UpTo { n_words: stack.n_words, probe_read_user: runtime.offset(into.into()) }
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
    known_code: &'a HashMap<RemoteAddr, Vec<u8>>,
    f: &FunctionState,
    b: &'a BodyState,
    reads: &'a Reads,
) -> SkeletonBody<'a> {
    let refer = |placed: Option<Placed>| {
        placed.map(|p| match known_code.get(&p.at) {
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
pub(crate) fn retire_all(f: FunctionState) -> Vec<Retired> {
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

/// The data arenas that a function's bodies work on.
pub(crate) fn arenas(f: &FunctionState) -> Vec<RemoteAddr> {
    let mut arenas: Vec<_> = f.bodies.iter().map(|b| b.arena).collect();
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
mod tests {
    use super::*;
    use crate::registry::{CodeArena, Controller};

    const SITE: RemoteAddr = RemoteAddr(0x40_1000);
    const CODE: RemoteAddr = RemoteAddr(0x50_0000);
    const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];
    /// push rbp; mov rbp, rsp; pop rbp; ret
    const BODY: [u8; 6] = [0x55, 0x48, 0x89, 0xe5, 0x5d, 0xc3];

    #[derive(Clone, Copy)]
    enum When {
        Entry,
        Exit,
    }

    fn function(kind: SiteKind, original: &[u8], insn_lens: &[u8]) -> FunctionState {
        let first = original[..5].try_into().unwrap();
        FunctionState {
            module: "/m".into(),
            name: "f".into(),
            address: SITE,
            site: SITE,
            door: None,
            kind,
            original: original.to_vec(),
            insn_lens: insn_lens.to_vec(),
            patched: first,
            previous: first,
            skeleton: None,
            skip: None,
            stack: StackArgs::NONE,
            calls_original: false,
            finds_frames: None,
            returns_to: None,
            calls: vec![],
            switches: vec![],
            bodies: vec![],
        }
    }

    fn nops() -> FunctionState {
        function(SiteKind::Nop, &NOP5, &[5])
    }

    /// push rbp; mov rbp, rsp; push rbx
    fn prologue() -> FunctionState {
        function(SiteKind::Relocated, &[0x55, 0x48, 0x89, 0xe5, 0x53], &[1, 3, 1])
    }

    fn registry(f: FunctionState) -> Registry {
        let code = vec![CodeArena::new(CODE, 0x10000)];
        Registry { code, functions: vec![f], ..Registry::default() }
    }

    /// The registry behind a change, the sites swapped.
    fn done(change: Change) -> Registry {
        let mut registry = change.registry;
        registry.retired.extend(change.retired);
        registry.committed();
        registry
    }

    /// One more body on the only function.
    fn add(registry: Registry, known: &mut HashMap<RemoteAddr, Vec<u8>>, when: When) -> Change {
        let mut change = Change::new(registry, known.clone());
        let placed = change.place(SITE, BODY.to_vec()).unwrap();
        known.insert(placed.at, BODY.to_vec());
        let id = change.registry.next_id;
        change.registry.next_id += 1;
        let mut f = change.registry.functions.remove(0);
        let before = arenas(&f);
        let body = BodyState {
            id,
            owner: Controller { pid: 1, started: 1 },
            since: 0,
            arena: RemoteAddr(0x60_0000 + 0x1000 * u64::from(id)),
            programs: vec![],
            entry: matches!(when, When::Entry).then_some(placed),
            session: None,
            modify: None,
            exit: matches!(when, When::Exit).then_some(placed),
            frame_offset: FIRST_FRAME_OFFSET,
            frame_words: 0,
            reads: 0,
            saves: vec![],
        };
        f.bodies.insert(0, body);
        change.relink(&mut f, before).unwrap();
        change.registry.functions.push(f);
        change.switch_off();
        change
    }

    fn remove(
        registry: Registry,
        known: &HashMap<RemoteAddr, Vec<u8>>,
        id: u32,
    ) -> (Change, Vec<u32>) {
        let mut change = Change::new(registry, known.clone());
        let removed = change.remove_bodies(|b| b.id == id).unwrap();
        change.switch_off();
        (change, removed)
    }

    #[test]
    fn one_entry_body_on_nops_is_called_directly() {
        let mut known = HashMap::new();
        let change = add(registry(nops()), &mut known, When::Entry);
        let poke = &change.pokes[0];
        assert_eq!((poke.site, &poke.expected[..]), (SITE, &NOP5[..]));
        assert_eq!(poke.new[0], 0xe8, "a call");
        let f = &change.registry.functions[0];
        assert_eq!((f.skeleton, f.previous, f.patched), (None, NOP5, poke.new));
        assert_eq!(change.retired, []);

        let (change, removed) = remove(done(change), &known, 0);
        assert_eq!(removed, [0]);
        assert_eq!((change.pokes[0].new, change.pokes[0].trap_to), (NOP5, SITE.offset(5)));
        assert_eq!(change.registry.functions.len(), 1, "until the site is swapped");
        let code: Vec<_> = change.retired.iter().map(|r| (r.code.at, r.calls_original)).collect();
        assert_eq!(code, [(CODE, false)]);
        assert_eq!(done(change).functions, []);
    }

    #[test]
    fn two_bodies_share_a_skeleton_that_goes_with_the_second() {
        let mut known = HashMap::new();
        let first = add(registry(nops()), &mut known, When::Entry);
        let direct = first.pokes[0].new;
        let both = add(done(first), &mut known, When::Entry);
        let skeleton = both.registry.functions[0].skeleton.unwrap();
        let poke = &both.pokes[0];
        assert_eq!((&poke.expected[..], poke.new[0]), (&direct[..], 0xe9));
        assert_eq!(poke.trap_to, skeleton.at, "nobody misses a program meanwhile");
        let ids: Vec<u32> = both.registry.functions[0].bodies.iter().map(|b| b.id).collect();
        assert_eq!(ids, [1, 0], "the newest runs first");

        let (change, removed) = remove(done(both), &known, 1);
        assert_eq!(removed, [1]);
        assert_eq!(change.pokes[0].new, direct, "the other controller's body is called again");
        assert_eq!(change.pokes[0].trap_to, skeleton.at);
        assert_eq!(change.registry.functions[0].bodies.len(), 1);
        let retired: Vec<_> = change.retired.iter().map(|r| r.code).collect();
        assert!(retired.contains(&skeleton));
        assert_eq!(retired.len(), 2, "the skeleton and the body");
        let of_skeleton = change.retired.iter().find(|r| r.code == skeleton).unwrap();
        assert_eq!(of_skeleton.arenas.len(), 2, "it works on both arenas for as long as it lives");
    }

    #[test]
    fn an_exit_body_outlives_its_removal() {
        let mut known = HashMap::new();
        let change = add(registry(prologue()), &mut known, When::Exit);
        let f = change.registry.functions[0].clone();
        assert!(f.calls_original);
        let back = f.returns_to.unwrap();
        let skeleton = f.skeleton.unwrap();
        assert!(skeleton.at < back && back < skeleton.at.offset(skeleton.len.into()));
        // Threads between the replaced instructions go on in their copies.
        let from: Vec<_> = change.pokes[0].moves.iter().map(|(old, _)| *old).collect();
        assert_eq!(from, [SITE.offset(1), SITE.offset(4)]);

        let (change, _) = remove(done(change), &known, 0);
        assert_eq!(change.pokes[0].new, f.original[..5]);
        let retired = change.retired.iter().find(|r| r.returns_to == Some(back)).unwrap();
        assert!(retired.calls_original && retired.code == skeleton);
        assert_eq!(change.pokes[0].moves, [], "only first bytes are swapped");
        // Who comes back finds a jump over it, and the overwriting of the return address there.
        let switch = &change.pokes[1];
        let overwrite = [0x48, 0x89, 0x6c, 0x24, 0xf8];
        assert_eq!(
            (switch.site, &switch.expected[..], switch.new[0]),
            (back, &overwrite[..], 0xe9)
        );
        let (_, bytes) = change_writes(&f, &known);
        let drained = usize::try_from(switch.trap_to.0 - skeleton.at.0).unwrap();
        assert_eq!(bytes[drained..][..7], [0x48, 0x89, 0x6c, 0x24, 0xf8, 0xc9, 0xc3]);
        assert_eq!(jump_target(back, switch.new), switch.trap_to);
        assert_eq!(change.pokes.len(), 2);
        assert!(done(change).retired.iter().all(|r| r.switches.is_empty()), "it has been thrown");
    }

    /// The code of the skeleton that `f` has, made once more.
    fn change_writes(
        f: &FunctionState,
        known: &HashMap<RemoteAddr, Vec<u8>>,
    ) -> (RemoteAddr, Vec<u8>) {
        let mut again = Change::new(registry(f.clone()), known.clone());
        again.registry.code[0].next = f.skeleton.unwrap().at;
        again.place_skeleton(&mut f.clone()).unwrap();
        again.writes.pop().unwrap()
    }

    fn jump_target(at: RemoteAddr, jump: [u8; 5]) -> RemoteAddr {
        let distance = i32::from_le_bytes(jump[1..].try_into().unwrap());
        at.offset(5 + i64::from(distance))
    }

    /// Two controllers at exit, and calls inside that were entered when there was one.
    #[test]
    fn only_those_that_go_are_switched_off() {
        let mut known = HashMap::new();
        let one = done(add(registry(prologue()), &mut known, When::Exit));
        let alone = one.functions[0].switches[0].clone();
        assert_eq!((alone.body, alone.at), (0, one.functions[0].returns_to.unwrap()));
        let change = add(one, &mut known, When::Exit);
        assert_eq!(change.pokes.len(), 1, "who is inside meets what was there at its entry");
        let two = done(change);
        assert_eq!(two.retired[0].switches, std::slice::from_ref(&alone));
        let both = two.functions[0].switches.clone();
        assert_eq!(both.iter().map(|s| s.body).collect::<Vec<_>>(), [1, 0], "newest first");
        assert!(both.iter().all(|s| s.expected == NOP5 && s.trap_to == s.at.offset(5)));
        assert_eq!(jump_target(both[0].at, both[0].new), both[1].at, "the other one's turn");

        let (change, _) = remove(two, &known, 0);
        let at: Vec<_> = change.pokes[1..].iter().map(|p| (p.site, p.new)).collect();
        assert_eq!(at, [(alone.at, alone.new), (both[1].at, both[1].new)]);
        assert_eq!(flea_patch::Plan { pokes: change.pokes.clone() }.check(), Ok(()));
        let now = done(change);
        let left: Vec<_> = now.retired.iter().flat_map(|r| &r.switches).collect();
        assert_eq!(left, [&both[0]], "controller 1 is still to be run by those inside");

        // Once nobody runs in them, only what is not switched off needs its memory.
        let mut retired = now.retired.clone();
        retired.iter_mut().for_each(Retired::is_only_returned_to);
        let arenas: Vec<_> = retired.iter().flat_map(|r| &r.arenas).collect();
        assert_eq!(arenas, [&both[0].arena]);
    }

    /// All that go at once, where threads that arrive meanwhile must not be sent into bytes that
    /// change as well.
    #[test]
    fn several_go_at_once() {
        let mut known = HashMap::new();
        let mut now = registry(prologue());
        for _ in 0..3 {
            now = done(add(now, &mut known, When::Exit));
        }
        let mut change = Change::new(now, known);
        change.remove_bodies(|_| true).unwrap();
        change.switch_off();
        // The site; three, two and one in the skeletons of three, two and one.
        assert_eq!(change.pokes.len(), 1 + 3 + 2 + 1);
        assert_eq!(flea_patch::Plan { pokes: change.pokes.clone() }.check(), Ok(()));
    }

    /// Five nops before the entry, `endbr64` and two more: the door is opened with the first
    /// body and closed with the last one; in between only the jump before it changes.
    #[test]
    fn a_door_is_opened_once_and_closed_once() {
        let bytes = [[0x90; 5].as_slice(), &[0xf3, 0x0f, 0x1e, 0xfa], &[0x90; 2]].concat();
        let mut f = function(SiteKind::Nop, &bytes, &[1, 1, 1, 1, 1, 4, 1, 1]);
        let door = SITE.offset(9);
        f.door = Some(door);
        let mut known = HashMap::new();
        let one = add(registry(f), &mut known, When::Entry);
        let [area, opened] = one.pokes.as_slice() else { panic!("{:?}", one.pokes) };
        assert_eq!((area.site, area.new[0], area.expected.len()), (SITE, 0xe9, 11));
        assert_eq!((opened.site, &opened.expected[..]), (door, &[0x90; 2][..]));
        assert_eq!(opened.new[..2], [0xeb, 0x100u16.wrapping_sub(11).to_le_bytes()[0]]);
        let from: Vec<_> = opened.moves.iter().map(|(from, _)| *from).collect();
        assert_eq!(from, [door.offset(1)], "a thread may stand between the nops");
        assert_eq!(flea_patch::Plan { pokes: one.pokes.clone() }.check(), Ok(()));

        let two = add(done(one), &mut known, When::Exit);
        assert_eq!(two.pokes.len(), 1);
        let (one, _) = remove(done(two), &known, 0);
        assert_eq!(one.pokes.len(), 1);
        let (none, _) = remove(done(one), &known, 1);
        let [closed, area, ..] = none.pokes.as_slice() else { panic!("{:?}", none.pokes) };
        assert_eq!((area.new, closed.site), ([0x90; 5], door));
        assert_eq!((closed.expected[0], &closed.new[..2]), (0xeb, &[0x90; 2][..]));
        assert!(closed.moves.is_empty());
    }

    #[test]
    fn what_nobody_asked_for_stays() {
        let mut known = HashMap::new();
        let before = done(add(registry(prologue()), &mut known, When::Entry));
        let (change, removed) = remove(before.clone(), &known, 77);
        assert_eq!(removed, [0; 0]);
        assert_eq!(change.pokes, []);
        assert_eq!(done(change), before);
    }

    #[test]
    fn everything_is_free_again_in_the_end() {
        let mut known = HashMap::new();
        let mut now = registry(prologue());
        for when in [When::Entry, When::Exit, When::Entry] {
            now = done(add(now, &mut known, when));
        }
        for id in [1, 0, 2] {
            now = done(remove(now, &known, id).0);
        }
        assert_eq!(now.functions, []);
        for retired in std::mem::take(&mut now.retired) {
            now.unplace(retired.code);
        }
        assert_eq!(now.code, [CodeArena::new(CODE, 0x10000)]);
    }

    /// A library that was closed takes its sites with it; their code is given back as usual.
    #[test]
    fn an_unmapped_function_retires_all_of_its_code() {
        let mut known = HashMap::new();
        let one = add(registry(prologue()), &mut known, When::Exit);
        let mut now = done(add(done(one), &mut known, When::Entry));
        let f = now.functions.remove(0);
        now.retired.extend(retire_all(f));
        for retired in std::mem::take(&mut now.retired) {
            now.unplace(retired.code);
        }
        assert_eq!(now.code, [CodeArena::new(CODE, 0x10000)]);
    }

    #[test]
    fn reads_survive_their_packing() {
        let reads = Reads {
            args: vec![ArgWord::Gpr(0), ArgWord::Gpr(5), ArgWord::Xmm(7)],
            results: vec![RetWord::Rax, RetWord::Xmm1],
        };
        assert_eq!(unpack_reads(pack_reads(&reads)), reads);
    }
}
