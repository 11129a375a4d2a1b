//! Linking many skeletons of one kind: the first is assembled, the others are copies of it.
//!
//! Protected: that a copy is, byte for byte, what assembling would have made. By: everything that
//! goes into a skeleton is either part of what has to be equal ([`Key`]), or one of these, whose
//! places in the bytes are known and whose length never changes:
//! - numbers that bodies load (`movabs reg, imm64`): cookies and addresses;
//! - displacements from the skeleton to the traced function's own code and data, which all change
//!   by as much as the two have moved against each other.
//!
//! What has more than that in it (calls of bodies, a replacement, an unwinder's question, a call
//! among the replaced instructions) is assembled each time. Debug builds assemble always, and
//! compare.

use std::collections::HashMap;

use flea_symbols::addr::RemoteAddr;
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, OpKind};

use super::{
    BodyRef, Changer, FrameArena, LinkError, Question, SiteKind, Skeleton, SkeletonBody,
    SkeletonRequest, Switch, assemble, check_request, link_skeleton, link_unwinder_skeleton, rel32,
};
use crate::changes::Changes;
use crate::request::{Reads, Save};
use crate::skip::SkipResult;
use crate::x86_64::relocate;
use crate::x86_64::stack_copy::StackCopy;

/// Makes skeletons, and remembers those that others can be copies of.
#[derive(Default)]
pub struct Linker {
    templates: HashMap<Key, Template>,
}

/// A skeleton whose length is known and whose place is not.
pub struct Draft<'a> {
    request: SkeletonRequest<'a>,
    kind: DraftKind<'a>,
    len: usize,
}

enum DraftKind<'a> {
    Copy { template: &'a Template, numbers: Vec<u64> },
    Assembled { question: Question, arenas: &'a [FrameArena] },
}

impl Linker {
    /// The skeleton of `request`, whose address is any near to where it will be. `question` and
    /// `arenas` are as for [`link_unwinder_skeleton`].
    ///
    /// # Errors
    /// [`LinkError`]
    pub fn draft<'a>(
        &'a mut self,
        request: &SkeletonRequest<'a>,
        question: Question,
        arenas: &'a [FrameArena],
    ) -> Result<Draft<'a>, LinkError> {
        let request = *request;
        check_request(&request)?;
        if arenas.is_empty()
            && let Some((key, numbers)) = Key::of(&request)
        {
            // Looked up twice: the borrow checker does not see that the first look's result is
            // gone where there is none.
            if !self.templates.contains_key(&key)
                && let Some(template) = Template::of(&request, &numbers)?
            {
                self.templates.insert(key.clone(), template);
            }
            if let Some(template) = self.templates.get(&key) {
                let len = template.skeleton.bytes.len();
                return Ok(Draft { request, kind: DraftKind::Copy { template, numbers }, len });
            }
        }
        let len = link_unwinder_skeleton(&request, question, arenas)?.bytes.len();
        Ok(Draft { request, kind: DraftKind::Assembled { question, arenas }, len })
    }
}

impl Draft<'_> {
    /// How long it will be: the length does not depend on the place, as all far branches have
    /// four bytes to say how far.
    #[must_use]
    pub fn n_bytes(&self) -> usize {
        self.len
    }

    /// The skeleton at `address`.
    ///
    /// # Errors
    /// [`LinkError`], also where it is not as long as it was said to be: no instructions that a
    /// site consists of are, but they may have come from memory that somebody scribbled over.
    pub fn at(&self, address: RemoteAddr) -> Result<Skeleton, LinkError> {
        let request = SkeletonRequest { image_address: address, ..self.request };
        let skeleton = match &self.kind {
            DraftKind::Copy { template, numbers } => template.copy(&request, numbers)?,
            DraftKind::Assembled { question, arenas } => {
                link_unwinder_skeleton(&request, *question, arenas)?
            }
        };
        if skeleton.bytes.len() != self.len {
            let message = "its length depends on its place".to_owned();
            return Err(LinkError::Encode { image_address: address, message });
        }
        Ok(skeleton)
    }
}

/// All of a request that is not a number of a body or a place.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    replaced: Vec<u8>,
    kind: SiteKind,
    bodies: Vec<BodyKey>,
    skip: Option<SkipResult>,
    stack_copy: StackCopy,
    stack_align_bytes: u32,
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct BodyKey {
    /// Entry, session, modify, exit; zeros in the place of numbers.
    sides: [Option<Vec<u8>>; 4],
    reads: Reads,
    saves: Vec<Save>,
    changes: Changes,
    frame_words: u32,
    frame_offset: u32,
}

impl Key {
    /// The key of `request`, and its bodies' numbers in the order in which they are put inline.
    /// `None` where there is more in it that depends on places.
    fn of(request: &SkeletonRequest<'_>) -> Option<(Self, Vec<u64>)> {
        if request.replacement.is_some() || has_call(request) {
            return None;
        }
        let mut bodies: Vec<BodyKey> = request.bodies.iter().map(BodyKey::without_code).collect();
        let mut numbers = Vec::new();
        for side in 0..4 {
            for (key, body) in bodies.iter_mut().zip(request.bodies) {
                match [body.entry, body.session, body.modify, body.exit][side] {
                    None => {}
                    Some(BodyRef::Call(_)) => return None,
                    Some(BodyRef::Inline(bytes)) => {
                        key.sides[side] = Some(without_numbers(bytes, &mut numbers));
                    }
                }
            }
        }
        // Each field by name: what is new in a request has to be here as well.
        let SkeletonRequest {
            site: _,
            image_address: _,
            replacement: _,
            bodies: _,
            replaced,
            kind,
            skip,
            stack_copy,
            stack_align_bytes,
        } = *request;
        let replaced = replaced.to_vec();
        Some((Self { replaced, kind, bodies, skip, stack_copy, stack_align_bytes }, numbers))
    }
}

impl BodyKey {
    fn without_code(body: &SkeletonBody<'_>) -> Self {
        // As above.
        let SkeletonBody {
            entry: _,
            session: _,
            modify: _,
            exit: _,
            reads,
            saves,
            changes,
            frame_words,
            frame_offset,
        } = *body;
        let (sides, reads, saves) = (Default::default(), reads.clone(), saves.to_vec());
        Self { sides, reads, saves, changes, frame_words, frame_offset }
    }
}

/// A call among the replaced instructions pushes an address of the function's own.
fn has_call(request: &SkeletonRequest<'_>) -> bool {
    let insns = Decoder::new(64, request.replaced, DecoderOptions::NONE).into_iter();
    let is_call = |insn: Instruction| {
        matches!(insn.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
    };
    request.kind == SiteKind::Relocated && { insns }.any(is_call)
}

/// `bytes` with zeros in the place of numbers, which are added to `numbers`.
fn without_numbers(bytes: &[u8], numbers: &mut Vec<u64>) -> Vec<u8> {
    let mut plain = bytes.to_vec();
    for at in relocate::numbers(bytes) {
        if let Some(number) = plain.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
            numbers.push(u64::from_le_bytes(*number));
            *number = [0; 8];
        }
    }
    plain
}

/// A skeleton, and what in it changes from copy to copy.
struct Template {
    skeleton: Skeleton,
    site: RemoteAddr,
    /// Offsets of the bodies' numbers.
    numbers: Vec<u32>,
    /// Offsets of 32-bit displacements to what moves with the site.
    displacements: Vec<u32>,
}

impl Template {
    /// Of the skeleton of `request`, if copies can be made of it.
    fn of(request: &SkeletonRequest<'_>, values: &[u64]) -> Result<Option<Self>, LinkError> {
        let (skeleton, places) = assemble(request, Question::Row, &[])?;
        let numbers: Vec<u32> = places.iter().map(|at| at + relocate::NUMBER_OFFSET).collect();
        let Some(displacements) = displacements(&skeleton) else { return Ok(None) };
        let template = Self { site: request.site, numbers, displacements, skeleton };
        let found = template.numbers.iter().map(|at| number_at(&template.skeleton.bytes, *at));
        Ok(found.eq(values.iter().copied().map(Some)).then_some(template))
    }

    fn copy(&self, request: &SkeletonRequest<'_>, values: &[u64]) -> Result<Skeleton, LinkError> {
        check_request(request)?;
        let copy = self.patched(request, values);
        if cfg!(debug_assertions) {
            let assembled = link_skeleton(request)?;
            assert!(copy.is_none_or(|copy| copy == assembled), "a copy differs: {request:?}");
            return Ok(assembled);
        }
        // What does not reach any more is for the assembler to say.
        copy.map_or_else(|| link_skeleton(request), Ok)
    }

    /// `None` where a displacement does not reach.
    fn patched(&self, request: &SkeletonRequest<'_>, values: &[u64]) -> Option<Skeleton> {
        let (site, address) = (request.site, request.image_address);
        let moved = address.0.wrapping_sub(self.skeleton.address.0);
        let site_moved = site.0.wrapping_sub(self.site.0);
        let further = site_moved.wrapping_sub(moved).cast_signed();
        let mut bytes = self.skeleton.bytes.clone();
        for (at, value) in self.numbers.iter().zip(values) {
            bytes.get_mut(*at as usize..)?.first_chunk_mut().map(|n| *n = value.to_le_bytes())?;
        }
        for at in &self.displacements {
            let field: &mut [u8; 4] = bytes.get_mut(*at as usize..)?.first_chunk_mut()?;
            let distance = i64::from(i32::from_le_bytes(*field)).checked_add(further)?;
            *field = i32::try_from(distance).ok()?.to_le_bytes();
        }
        let to = |at: RemoteAddr| RemoteAddr(at.0.wrapping_add(moved));
        let from = |at: RemoteAddr| RemoteAddr(at.0.wrapping_add(site_moved));
        let Skeleton {
            bytes: _,
            site_patch: _,
            address: _,
            original_entry,
            returns_to,
            switches,
            changers,
            moves,
            rows,
        } = &self.skeleton;
        let changer = |c: &Changer| Changer { from: to(c.from), to: to(c.to), ..*c };
        let switch = |s: &Switch| Switch { at: to(s.at), trap_to: to(s.trap_to), ..*s };
        Some(Skeleton {
            bytes,
            site_patch: rel32(0xe9, site, address)?,
            original_entry: to(*original_entry),
            returns_to: returns_to.map(to),
            switches: switches.iter().map(switch).collect(),
            changers: changers.iter().map(changer).collect(),
            moves: moves.iter().map(|(old, new)| (from(*old), to(*new))).collect(),
            rows: rows.clone(),
            address,
        })
    }
}

fn number_at(bytes: &[u8], at: u32) -> Option<u64> {
    bytes.get(at as usize..)?.first_chunk().map(|number| u64::from_le_bytes(*number))
}

/// Offsets of the displacements in `skeleton` that lead out of it. `None` where it holds data (the
/// encoder's way to what is out of reach), or another form of displacement than of 32 bits.
fn displacements(skeleton: &Skeleton) -> Option<Vec<u32>> {
    let start = skeleton.address.0;
    let inside = start..start + skeleton.bytes.len() as u64;
    let mut decoder = Decoder::with_ip(64, &skeleton.bytes, start, DecoderOptions::NONE);
    let mut found = Vec::new();
    while decoder.can_decode() {
        let insn = decoder.decode();
        if insn.is_invalid() {
            return None;
        }
        let offsets = decoder.get_constant_offsets(&insn);
        let (target, field) = if insn.is_ip_rel_memory_operand() {
            if inside.contains(&insn.ip_rel_memory_address()) {
                return None;
            }
            let size = offsets.displacement_size();
            (insn.ip_rel_memory_address(), (size == 4).then(|| offsets.displacement_offset())?)
        } else if insn.op0_kind() == OpKind::NearBranch64 {
            if inside.contains(&insn.near_branch64()) {
                continue;
            }
            let size = offsets.immediate_size();
            (insn.near_branch64(), (size == 4).then(|| offsets.immediate_offset())?)
        } else {
            continue;
        };
        let at = usize::try_from(insn.ip() - start).ok()? + field;
        let distance = i32::from_le_bytes(*skeleton.bytes.get(at..)?.first_chunk()?);
        if insn.next_ip().wrapping_add_signed(distance.into()) != target {
            return None;
        }
        found.push(u32::try_from(at).ok()?);
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::{BODY_FRAMES_OFFSET, When};

    /// `push rbp; mov rbp, rsp; push rax; movabs rax, NUMBER; mov rax, [rax]; pop rax; pop rbp;
    /// ret`
    fn body(number: u64) -> Vec<u8> {
        let mut bytes = vec![0x55, 0x48, 0x89, 0xe5, 0x50, 0x48, 0xb8];
        bytes.extend(number.to_le_bytes());
        bytes.extend([0x48, 0x8b, 0x00, 0x58, 0x5d, 0xc3]);
        bytes
    }

    /// Links two skeletons of one kind, for two functions with bodies of their own, and compares
    /// the second with what is assembled for it.
    fn second_is_a_copy(kind: SiteKind, replaced: &[u8]) -> bool {
        let (site, image) = (RemoteAddr(0x40_1000), RemoteAddr(0x60_0000));
        let (reads, saves) = (Reads::default(), []);
        let mut linker = Linker::default();
        let mut is_copy = false;
        for i in 0..2 {
            let (entry, exit) = (body(u64::MAX - i), body(0x1234_5678_0000 * i));
            let bodies = [SkeletonBody {
                entry: Some(BodyRef::Inline(&entry)),
                session: None,
                modify: None,
                exit: Some(BodyRef::Inline(&exit)),
                reads: &reads,
                saves: &saves,
                changes: Changes::NONE,
                frame_words: 1,
                frame_offset: BODY_FRAMES_OFFSET,
            }];
            let request = SkeletonRequest {
                site: site.offset(0x35 * i.cast_signed()),
                replaced,
                kind,
                image_address: image,
                bodies: &bodies,
                skip: None,
                stack_copy: StackCopy::Exactly(2),
                stack_align_bytes: 16,
                replacement: None,
            };
            let at = image.offset(0x140 * i.cast_signed());
            let draft = linker.draft(&request, Question::Row, &[]).unwrap();
            let made = draft.at(at).unwrap();
            let assembled = link_skeleton(&SkeletonRequest { image_address: at, ..request });
            assert_eq!(Ok(&made), assembled.as_ref());
            if let DraftKind::Copy { template, numbers } = &draft.kind {
                let request = SkeletonRequest { image_address: at, ..request };
                assert_eq!(template.patched(&request, numbers), Some(made));
                is_copy = i > 0;
            }
        }
        assert!(linker.templates.len() <= 1, "one kind");
        is_copy
    }

    #[test]
    fn a_copy_is_what_assembling_makes() {
        let nops = [0x0f, 0x1f, 0x44, 0, 0];
        assert!(second_is_a_copy(SiteKind::Nops, &nops));
        // push rbp; mov rbp, rsp; push rbx
        assert!(second_is_a_copy(SiteKind::Relocated, &[0x55, 0x48, 0x89, 0xe5, 0x53]));
        // 1: test edi, edi; je +0x20 (outside); dec edi; jne 1b
        let branches = [0x85, 0xff, 0x74, 0x20, 0xff, 0xcf, 0x75, 0xf8];
        assert!(second_is_a_copy(SiteKind::Relocated, &branches));
        // cmp qword [rip + 0x10], 0; movabs rax, ...: a number of the function's own.
        let own = [0x48, 0x83, 0x3d, 0x10, 0, 0, 0, 0, 0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8];
        assert!(second_is_a_copy(SiteKind::Relocated, &own));
        // call +0x100: its return address is pushed.
        assert!(!second_is_a_copy(SiteKind::Relocated, &[0xe8, 0, 1, 0, 0]));
    }

    #[test]
    fn what_depends_on_a_place_is_no_copy() {
        let entry = body(1);
        let (reads, saves) = (Reads::default(), []);
        let with = |entry| SkeletonBody {
            entry: Some(entry),
            session: None,
            modify: None,
            exit: None,
            reads: &reads,
            saves: &saves,
            changes: Changes::NONE,
            frame_words: 0,
            frame_offset: BODY_FRAMES_OFFSET,
        };
        let (inline, called) =
            ([with(BodyRef::Inline(&entry))], [with(BodyRef::Call(RemoteAddr(16)))]);
        let request = |bodies, replacement| SkeletonRequest {
            site: RemoteAddr(0x40_1000),
            replaced: &[0x90; 5],
            kind: SiteKind::Nops,
            image_address: RemoteAddr(0x60_0000),
            bodies,
            skip: None,
            stack_copy: StackCopy::Exactly(0),
            stack_align_bytes: 16,
            replacement,
        };
        assert!(Key::of(&request(&inline, None)).is_some());
        assert!(Key::of(&request(&called, None)).is_none());
        assert!(Key::of(&request(&inline, Some(RemoteAddr(0x50_0000)))).is_none());
    }

    /// Different saves, reads or frames are different skeletons, whatever else is equal.
    #[test]
    fn the_key_holds_what_is_linked() {
        let exit = body(1);
        let key = |reads: &Reads, saves: &[Save], frame_offset| {
            let bodies = [SkeletonBody {
                entry: None,
                session: None,
                modify: None,
                exit: Some(BodyRef::Inline(&exit)),
                reads,
                saves,
                changes: Changes::NONE,
                frame_words: 2,
                frame_offset,
            }];
            let request = SkeletonRequest {
                site: RemoteAddr(0x40_1000),
                replaced: &[0x90; 5],
                kind: SiteKind::Nops,
                image_address: RemoteAddr(0x60_0000),
                bodies: &bodies,
                skip: None,
                stack_copy: StackCopy::Exactly(0),
                stack_align_bytes: 16,
                replacement: None,
            };
            Key::of(&request).unwrap().0
        };
        let (none, mut rax) = (Reads::default(), Reads::default());
        rax.add_result(flea_symbols::signature::RetWord::Rax);
        let save = Save { when: When::Exit, what: crate::request::Saved::Gpr(3), word: 1 };
        let plain = key(&none, &[], BODY_FRAMES_OFFSET);
        assert!(plain == key(&none, &[], BODY_FRAMES_OFFSET));
        assert!(plain != key(&rax, &[], BODY_FRAMES_OFFSET));
        assert!(plain != key(&none, &[save], BODY_FRAMES_OFFSET));
        assert!(plain != key(&none, &[], BODY_FRAMES_OFFSET + 8));
    }
}
