//! The few instructions per function that run its bodies around the original.
//!
//! ```text
//! entry-only                              with session, modify or exit bodies
//!  [lea rsp, [rsp-8]]   per inline          entry bodies as on the left
//!   ...entry body...    entry body          push rbp
//!  [lea rsp, [rsp+8]]                       mov rbp, rsp
//!   call body           per called one      lea rsp, [rsp-FRAME]
//!   relocated instructions                  mov [rbp-40-8*i], rdi...    what exit bodies read
//!                                           mov [rbp-152-8*i], rbx...   saves, see `saves`
//!   jmp site + patched                      push [rbp+16+8*i]           see `stack_copy`
//!                                           session bodies, each: mov rdi, [rbp-40]... what
//!                                                               it changes, see `changes`
//!                                           mov [rbp-8], 0              modify bodies, see `skip`
//!                                           modify body, cmp, jne skipped
//!                                           call original
//!                                           mov [rsp-8], rbp            over the return address;
//!                                         returned:                     see `switch`
//!                                           mov [rbp-8], rax...         what exit bodies read
//!                                           movups [rbp-152-8*i], xmm0  saves
//!                                           exit bodies, each: mov rax, [rbp-8] if it changes that
//!                                           cmp rdi, [rbp-40]; cmove    changed ones back
//!                                           leave
//!                                           ret
//!                                         skipped:
//!                                           mov rax, [rbp-8]            or xmm0, or nothing
//!                                           jmp returned
//!                                         drained:
//!                                           mov [rsp-8], rbp
//!                                           leave
//!                                           ret
//!                                           [slow path of the copy]
//!                                           nop "flea"                  see `find_fde`
//!                                         original:
//!                                           relocated instructions
//!                                           jmp site + patched
//! ```
//!
//! Where the function is replaced, `jmp replacement` stands in front of the relocated
//! instructions: bodies run around the replacement, and only threads that stood inside the
//! replaced instructions go on in their copies.
//!
//! Nothing here changes a register or a flag that the original can see; bodies change flags
//! only, which no calling convention passes on. `push [mem]` copies stack words because it
//! needs no register. The copies are pushed before the session bodies, so that from there on
//! `rsp` is a multiple of 16: called bodies and the original find the stack as the ABI has it.
//! At entry bodies, `rsp` is a multiple of 16 where the ABI has 8 more.
//!
//! The return address that `call original` pushed is overwritten once it was used: whoever
//! wants to free the skeleton looks for it in the target's memory, and a used one on a dead
//! stack would look like a call that has not returned.

use flea_symbols::addr::RemoteAddr;
use flea_symbols::signature::{ArgWord, RetWord};
use iced_x86::code_asm::registers::gpr64::{r8, r9, r11};
use iced_x86::code_asm::{
    CodeAssembler, ptr, qword_ptr, rax, rbp, rcx, rdi, rdx, rsi, rsp, xmm0, xmm1, xmm2, xmm3, xmm4,
    xmm5, xmm6, xmm7,
};
use iced_x86::{Code, IcedError};

use super::assemble::{Assembly, Encoded, Place};
use super::find_fde::{self, FrameArena, Question};
use super::image_check::{ImageError, ImageUnderCheck, check_image};
use super::listing;
use super::relocate::{self, RelocateError};
use super::saves;
use super::stack_copy::{self, MAX_STACK_WORDS, StackCopy};
use crate::changes::Changes;
use crate::request::{BODY_FRAMES_OFFSET, Reads, Save, When};
use crate::skip::SkipResult;

mod changes;
mod skip;
mod switch;
mod template;

pub use switch::Switch;
use switch::SwitchPlaces;
pub use template::{Draft, Linker};

/// Bytes of `jmp rel32` and `call rel32`: what a site gives up at least.
pub const PATCH_BYTES: usize = 5;
/// How a body with a frame pointer begins.
const PUSH_RBP: u8 = 0x55;
/// A jump reaches this far, less what may lie between its ends.
const REACH: u64 = (1 << 31) - (1 << 16);
/// A replacement this near to its site is in reach of every skeleton that has one: those keep
/// 64 MiB of a jump's reach in hand.
const REPLACEMENT_REACH: u64 = 63 << 20;
/// Words of body frames at most.
const MAX_FRAME_WORDS: u32 = 4096;

/// Where and around what a skeleton is made.
#[derive(Clone, Copy, Debug)]
pub struct SkeletonRequest<'a> {
    /// The first byte that will be overwritten.
    pub site: RemoteAddr,
    /// What is there now: whole instructions, at least [`PATCH_BYTES`].
    pub replaced: &'a [u8],
    /// What those bytes are.
    pub kind: SiteKind,
    /// Where the skeleton will be placed.
    pub image_address: RemoteAddr,
    /// Newest first.
    pub bodies: &'a [SkeletonBody<'a>],
    /// Where the value goes with which a modify body skips the original. `None` where no value
    /// can be its result: then no body may skip it, and none is asked.
    pub skip: Option<SkipResult>,
    /// What the original is to find above its return address.
    pub stack_copy: StackCopy,
    /// What the address of its first stack argument is a multiple of: 16, 32 or 64.
    pub stack_align_bytes: u32,
    /// What runs instead of the original.
    pub replacement: Option<RemoteAddr>,
}

/// What a site's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SiteKind {
    /// No-operations: they are not needed again.
    Nops,
    /// Real instructions: the skeleton runs copies of them.
    Relocated,
}

/// The bodies of one controller, ready to run.
#[derive(Clone, Debug)]
pub struct SkeletonBody<'a> {
    /// Run before the original without a frame.
    pub entry: Option<BodyRef<'a>>,
    /// Run before the original in the frame.
    pub session: Option<BodyRef<'a>>,
    /// Run behind all session bodies; the first that leaves a value skips the original and the
    /// other modify bodies.
    pub modify: Option<BodyRef<'a>>,
    /// Run after the original in the frame.
    pub exit: Option<BodyRef<'a>>,
    /// What `exit` reads.
    pub reads: &'a Reads,
    /// What is stored into these bodies' words.
    pub saves: &'a [Save],
    /// What these bodies change: `session` of the arguments, `exit` of the result.
    pub changes: Changes,
    /// Words of the frame that these bodies use.
    pub frame_words: u32,
    /// The offset that they were compiled for; checked. Bodies of several controllers need
    /// offsets that do not overlap; holes do no harm.
    pub frame_offset: u32,
}

impl SkeletonBody<'_> {
    /// Whether the original has to be called from a frame of ours.
    fn needs_frame(&self) -> bool {
        self.session.is_some() || self.modify.is_some() || self.exit.is_some()
    }
}

/// A body as the skeleton gets at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyRef<'a> {
    /// Its resolved bytes: put into the skeleton.
    Inline(&'a [u8]),
    /// Its address, within reach of the skeleton: called.
    Call(RemoteAddr),
}

/// Why there is no skeleton. Nothing has been changed anywhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Fewer bytes than a jump needs.
    #[error("{n_bytes} bytes at {site} are too few for a jump")]
    SiteTooSmall {
        /// The site.
        site: RemoteAddr,
        /// Its bytes.
        n_bytes: usize,
    },
    /// A site said to be nops is not.
    #[error("the bytes at {site} are not no-operations: {found:02x?}")]
    NotNops {
        /// The site.
        site: RemoteAddr,
        /// Its bytes.
        found: Vec<u8>,
    },
    /// The skeleton's place is out of a jump's reach.
    #[error("{to} cannot be reached from {from}: more than 2 GiB")]
    OutOfReach {
        /// From.
        from: RemoteAddr,
        /// To.
        to: RemoteAddr,
    },
    /// More stack words than an exit skeleton copies.
    #[error("{stack_words} stack words are more than {max}")]
    TooManyStackWords {
        /// Wanted.
        stack_words: u32,
        /// The bound.
        max: u32,
    },
    /// An alignment that no calling convention knows.
    #[error("stack arguments aligned to {align_bytes} bytes, not to 16, 32 or 64")]
    StackAlignment {
        /// Wanted.
        align_bytes: u32,
    },
    /// Two bodies would use the same words of the frame, or one a word outside it.
    #[error("a body's frame words at offset {found} overlap others: free from {free_from} on")]
    FrameOffset {
        /// The lowest offset that is free.
        free_from: u32,
        /// Where the body has them.
        found: u32,
    },
    /// More frame words than a skeleton has.
    #[error("{frame_words} frame words are more than {max}")]
    TooManyFrameWords {
        /// Wanted.
        frame_words: u32,
        /// The bound.
        max: u32,
    },
    /// A save of no register, or to words that its body does not have.
    #[error("cannot save {save:?} into the {frame_words} words of its body")]
    NoSuchSave {
        /// The save.
        save: Save,
        /// The body's words.
        frame_words: u32,
    },
    /// Changes by a body that is not there.
    #[error("no body is there that could make these changes: {0:?}")]
    NobodyChanges(Changes),
    /// An argument register is changed that the caller may count on.
    #[error("nothing saves what the caller passes in {0:?}, which is changed")]
    NotGivenBack(ArgWord),
    /// An argument register outside 6 integer and 8 vector ones.
    #[error("no such argument register: {0:?}")]
    NoSuchRegister(ArgWord),
    /// The replaced instructions cannot be moved.
    #[error("the instructions at {site} cannot be moved: {source}")]
    Site {
        /// The site.
        site: RemoteAddr,
        /// Why.
        source: RelocateError,
    },
    /// A body cannot be put inline.
    #[error("a body cannot be put inline: {0}")]
    Inline(RelocateError),
    /// The encoder refused, e.g. because a moved `lea reg, [rip + x]` does not reach.
    #[error("cannot encode at {image_address}: {message}")]
    Encode {
        /// Where the skeleton was to go.
        image_address: RemoteAddr,
        /// The encoder's words.
        message: String,
    },
    /// What was made does not keep its promises: a fault in Flea. Debug builds alone look.
    #[error("the skeleton breaks a rule of images: {0}")]
    Check(ImageError),
}

/// Rule by which an unwinder finds the caller, from `offset` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnwindRow {
    /// From the skeleton's start.
    pub offset: u32,
    /// The rule.
    pub rule: UnwindRule,
}

/// How the canonical frame address (the caller's rsp after the return) is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnwindRule {
    /// `rsp + 8`, no register saved. Inside an inline or called entry body: not exact.
    Entry,
    /// `rbp + 16`, return address at -8, rbp at -16. Also inside inline bodies, except for
    /// their own first and last instructions.
    Frame,
    /// The traced function's own row at the instruction of which this is the copy.
    Original,
}

/// A function's skeleton, for one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skeleton {
    /// Machine code for [`SkeletonRequest::image_address`].
    pub bytes: Vec<u8>,
    /// `jmp skeleton`, to be written at the site.
    pub site_patch: [u8; PATCH_BYTES],
    /// Runs the original without any body: the relocated instructions, then the rest. Where it
    /// is replaced, the replacement.
    pub original_entry: RemoteAddr,
    /// Where the original returns to, if bodies run around it. While a call is inside the
    /// original, and only then, this word is on its stack.
    pub returns_to: Option<RemoteAddr>,
    /// How exit bodies are jumped over once they are taken off: one for each that does anything.
    pub switches: Vec<Switch>,
    /// Each replaced instruction's address, and where a thread standing there goes on.
    pub moves: Vec<(RemoteAddr, RemoteAddr)>,
    /// Code of bodies in it that change words of the frame.
    pub changers: Vec<Changer>,
    /// Rows by ascending offset.
    pub rows: Vec<UnwindRow>,
    /// [`SkeletonRequest::image_address`].
    pub address: RemoteAddr,
}

/// The code of a body, in a skeleton, that may change words of the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changer {
    /// Where it begins.
    pub from: RemoteAddr,
    /// What is behind it.
    pub to: RemoteAddr,
    /// What it changes.
    pub changes: Changes,
}

impl Skeleton {
    /// One line per instruction.
    #[must_use]
    pub fn listing(&self) -> String {
        listing::listing(&self.bytes, self.address)
    }
}

/// `call body_address` at `site`: for a nop site whose only body is an entry body, the fastest
/// form. `None` if out of reach.
#[must_use]
pub fn call_patch(site: RemoteAddr, body_address: RemoteAddr) -> Option<[u8; PATCH_BYTES]> {
    rel32(0xe8, site, body_address)
}

/// Makes the skeleton.
///
/// # Errors
/// [`LinkError`]
pub fn link_skeleton(request: &SkeletonRequest<'_>) -> Result<Skeleton, LinkError> {
    link_unwinder_skeleton(request, Question::Row, &[])
}

/// As [`link_skeleton`], for a function that unwinders ask `question`: it answers for the exit
/// skeletons in `arenas` before the original is asked. There need not be any bodies.
///
/// # Errors
/// [`LinkError`]
pub fn link_unwinder_skeleton(
    request: &SkeletonRequest<'_>,
    question: Question,
    arenas: &[FrameArena],
) -> Result<Skeleton, LinkError> {
    let (skeleton, _) = assemble(request, question, arenas)?;
    // Ten thousand of these are made in one attach, so a release build does without; the tests
    // show that what is made here is right whatever goes in.
    if cfg!(debug_assertions) {
        let asked = (!arenas.is_empty()).then_some(question);
        check_image(&ImageUnderCheck::of(request, asked, &skeleton)).map_err(LinkError::Check)?;
    }
    Ok(skeleton)
}

/// The skeleton, and where in it the numbers of inlined bodies are: entry, session, modify and
/// exit bodies one after another.
fn assemble(
    request: &SkeletonRequest<'_>,
    question: Question,
    arenas: &[FrameArena],
) -> Result<(Skeleton, Vec<u32>), LinkError> {
    check_request(request)?;
    let mut emitter = Emitter {
        asm: Assembly::default(),
        request,
        rows: vec![],
        returns_to: None,
        switches: vec![],
        numbers: vec![],
        changers: vec![],
    };
    let has_frame = request.bodies.iter().any(SkeletonBody::needs_frame);
    emitter.row(UnwindRule::Entry);
    emitter.entry_bodies()?;
    if has_frame {
        emitter.framed()?;
    }
    emitter.row(UnwindRule::Original);
    let original = emitter.asm.here();
    find_fde::emit(&mut emitter.asm, question, arenas).map_err(|e| emitter.failed(&e))?;
    emitter.replacement()?;
    let moves = emitter.original()?;
    emitter.finish(original, &moves)
}

fn check_request(request: &SkeletonRequest<'_>) -> Result<(), LinkError> {
    let site = request.site;
    if request.replaced.len() < PATCH_BYTES {
        return Err(LinkError::SiteTooSmall { site, n_bytes: request.replaced.len() });
    }
    let stack_words = request.stack_copy.n_words();
    if stack_words > MAX_STACK_WORDS {
        return Err(LinkError::TooManyStackWords { stack_words, max: MAX_STACK_WORDS });
    }
    if !matches!(request.stack_align_bytes, 16 | 32 | 64) {
        return Err(LinkError::StackAlignment { align_bytes: request.stack_align_bytes });
    }
    if site.0.abs_diff(request.image_address.0) > REACH {
        return Err(LinkError::OutOfReach { from: site, to: request.image_address });
    }
    check_frame_words(request.bodies)?;
    for body in request.bodies {
        let frame_words = body.frame_words;
        if let Some(&save) = body.saves.iter().find(|save| !save.fits(frame_words)) {
            return Err(LinkError::NoSuchSave { save, frame_words });
        }
        changes::check(body)?;
        for side in [body.entry, body.session, body.modify, body.exit].into_iter().flatten() {
            if let BodyRef::Call(to) = side
                && to.0.abs_diff(request.image_address.0) > REACH
            {
                return Err(LinkError::OutOfReach { from: request.image_address, to });
            }
        }
    }
    Ok(())
}

/// No two bodies share a word, whatever holes detached ones have left between them.
fn check_frame_words(bodies: &[SkeletonBody<'_>]) -> Result<(), LinkError> {
    let mut ranges: Vec<(u32, u32)> = bodies
        .iter()
        .filter(|b| b.frame_words > 0)
        .map(|b| (b.frame_offset, b.frame_words))
        .collect();
    ranges.sort_unstable();
    let mut free_from = BODY_FRAMES_OFFSET;
    for (offset, n_words) in ranges {
        let end = n_words.checked_mul(8).and_then(|n| offset.checked_add(n)).unwrap_or(u32::MAX);
        if end > BODY_FRAMES_OFFSET + 8 * MAX_FRAME_WORDS {
            return Err(LinkError::TooManyFrameWords {
                frame_words: n_words,
                max: MAX_FRAME_WORDS,
            });
        }
        if offset < free_from || !offset.is_multiple_of(8) {
            return Err(LinkError::FrameOffset { free_from, found: offset });
        }
        free_from = end;
    }
    Ok(())
}

struct Emitter<'a> {
    asm: Assembly,
    request: &'a SkeletonRequest<'a>,
    rows: Vec<(Place, UnwindRule)>,
    returns_to: Option<Place>,
    switches: Vec<SwitchPlaces>,
    /// Where inlined bodies load numbers.
    numbers: Vec<Place>,
    changers: Vec<(Place, Place, Changes)>,
}

/// Which kinds of words exit bodies read and others change, over all controllers.
fn all_reads(bodies: &[SkeletonBody<'_>]) -> Reads {
    let mut all = Reads::default();
    for body in bodies.iter().filter(|b| b.exit.is_some()) {
        body.reads.args.iter().for_each(|w| all.add_arg(*w));
        body.reads.results.iter().for_each(|w| all.add_result(*w));
    }
    for changes in bodies.iter().map(|body| body.changes) {
        changes.arguments().for_each(|i| all.add_arg(ArgWord::Gpr(i)));
        if changes.result {
            all.add_result(RetWord::Rax);
        }
    }
    all
}

impl Emitter<'_> {
    fn row(&mut self, rule: UnwindRule) {
        self.rows.push((self.asm.here(), rule));
    }

    fn failed(&self, error: &IcedError) -> LinkError {
        LinkError::Encode { image_address: self.request.image_address, message: error.to_string() }
    }

    /// Appends what `write` assembles.
    fn code(
        &mut self,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<(), LinkError> {
        let insns = CodeAssembler::new(64)
            .and_then(|mut a| write(&mut a).map(|()| a.take_instructions()))
            .map_err(|e| self.failed(&e))?;
        insns.into_iter().for_each(|insn| self.asm.push(insn));
        Ok(())
    }

    fn entry_bodies(&mut self) -> Result<(), LinkError> {
        for body in self.request.bodies {
            match body.entry {
                Some(BodyRef::Inline(bytes)) if bytes.first() == Some(&PUSH_RBP) => {
                    // It may read stack words by its frame pointer, and expects its return
                    // address between its frame and ours.
                    self.code(|a| a.lea(rsp, ptr(rsp - 8)))?;
                    self.inline(bytes)?;
                    self.code(|a| a.lea(rsp, ptr(rsp + 8)))?;
                }
                Some(BodyRef::Inline(bytes)) => self.inline(bytes)?,
                Some(BodyRef::Call(address)) => self.branch(Code::Call_rel32_64, address.0)?,
                None => {}
            }
        }
        Ok(())
    }

    fn inline(&mut self, bytes: &[u8]) -> Result<(), LinkError> {
        let numbers = relocate::inline_body(&mut self.asm, bytes).map_err(LinkError::Inline)?;
        self.numbers.extend(numbers);
        Ok(())
    }

    /// Everything from `push rbp` to `ret`.
    fn framed(&mut self) -> Result<(), LinkError> {
        let request = self.request;
        let reads = all_reads(request.bodies);
        let frame_bytes = frame_bytes(request);
        self.code(|a| {
            a.push(rbp)?;
            a.mov(rbp, rsp)
        })?;
        self.row(UnwindRule::Frame);
        self.code(|a| a.lea(rsp, ptr(rsp - frame_bytes)))?;
        for word in &reads.args {
            self.save_argument(*word)?;
        }
        self.saves(When::Entry)?;
        let copied = stack_copy::emit(&mut self.asm, request.stack_copy);
        let slow = copied.map_err(|e| self.failed(&e))?;
        for body in request.bodies {
            let changes = Changes { result: false, ..body.changes };
            self.changing_body(body.session, changes)?;
            self.changed_arguments(changes)?;
        }
        let skips = self.modify_bodies()?;
        // `call original` with the original behind the end, whose place is known only then.
        let call_at = self.asm.here();
        self.branch(Code::Call_rel32_64, call_at.address())?;
        self.returns_to = Some(self.asm.here());
        self.code(|a| a.mov(qword_ptr(rsp - 8), rbp))?;
        let returned = self.asm.here();
        for word in &reads.results {
            self.save_result(*word)?;
        }
        self.saves(When::Exit)?;
        let drained = self.exit_bodies()?;
        self.give_back()?;
        self.code(|a| {
            a.leave()?;
            a.ret()
        })?;
        self.skipped(&skips, returned)?;
        self.drained(drained)?;
        if let Some(slow) = slow {
            stack_copy::emit_slow(&mut self.asm, &slow).map_err(|e| self.failed(&e))?;
        }
        let marker = relocate::decode(&find_fde::MARKER, 0).map_err(LinkError::Inline)?;
        marker.into_iter().for_each(|insn| self.asm.push(insn));
        let original = self.asm.here().address();
        self.asm.retarget(call_at, original);
        Ok(())
    }

    fn framed_body(&mut self, body: Option<BodyRef<'_>>) -> Result<(), LinkError> {
        match body {
            Some(BodyRef::Inline(bytes)) => self.inline(bytes),
            Some(BodyRef::Call(address)) => self.branch(Code::Call_rel32_64, address.0),
            None => Ok(()),
        }
    }

    /// A body that may store to the frame's words for `changes`.
    fn changing_body(
        &mut self,
        body: Option<BodyRef<'_>>,
        changes: Changes,
    ) -> Result<(), LinkError> {
        let from = self.asm.here();
        self.framed_body(body)?;
        if changes != Changes::NONE && matches!(body, Some(BodyRef::Inline(_))) {
            self.changers.push((from, self.asm.here(), changes));
        }
        Ok(())
    }

    /// What bodies asked for beyond argument and result words.
    fn saves(&mut self, when: When) -> Result<(), LinkError> {
        for body in self.request.bodies {
            for &save in body.saves.iter().filter(|save| save.when == when) {
                self.code(|a| saves::emit(a, save, body.frame_offset))?;
            }
        }
        Ok(())
    }

    fn save_argument(&mut self, word: ArgWord) -> Result<(), LinkError> {
        let gprs = [rdi, rsi, rdx, rcx, r8, r9];
        let xmms = [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7];
        let no_such = LinkError::NoSuchRegister(word);
        match word {
            ArgWord::Gpr(i) => {
                let register = *gprs.get(usize::from(i)).ok_or(no_such)?;
                self.code(|a| a.mov(qword_ptr(rbp - (40 + 8 * u32::from(i))), register))
            }
            ArgWord::Xmm(i) => {
                let register = *xmms.get(usize::from(i)).ok_or(no_such)?;
                self.code(|a| a.movq(qword_ptr(rbp - (88 + 8 * u32::from(i))), register))
            }
            ArgWord::XmmWord { .. } | ArgWord::Stack(_) => Ok(()),
        }
    }

    fn save_result(&mut self, word: RetWord) -> Result<(), LinkError> {
        self.code(|a| match word {
            RetWord::Rax => a.mov(qword_ptr(rbp - 8), rax),
            RetWord::Rdx => a.mov(qword_ptr(rbp - 16), rdx),
            RetWord::Xmm0 => a.movq(qword_ptr(rbp - 24), xmm0),
            RetWord::Xmm1 => a.movq(qword_ptr(rbp - 32), xmm1),
            RetWord::XmmWord { .. } | RetWord::X87 { .. } => Ok(()),
        })
    }

    /// What is entered in the original's place. A module further away than a jump reaches may
    /// be served by the same object: then through `r11`, which nobody passes anything in. The
    /// choice depends on the site alone, so that the skeleton's length does not on its place.
    fn replacement(&mut self) -> Result<(), LinkError> {
        let Some(to) = self.request.replacement else { return Ok(()) };
        if to.0.abs_diff(self.request.site.0) < REPLACEMENT_REACH {
            self.branch(Code::Jmp_rel32_64, to.0)
        } else {
            self.code(|a| {
                a.mov(r11, to.0)?;
                a.jmp(r11)
            })
        }
    }

    /// The relocated instructions and the jump back. Returns each replaced instruction's old
    /// address with its new place.
    fn original(&mut self) -> Result<Vec<(u64, Place)>, LinkError> {
        let SkeletonRequest { site, replaced, kind, .. } = *self.request;
        let moves = match kind {
            SiteKind::Relocated => relocate::copy(&mut self.asm, replaced, site.0)
                .map_err(|source| LinkError::Site { site, source })?,
            SiteKind::Nops => {
                let insns = relocate::decode(replaced, site.0)
                    .map_err(|source| LinkError::Site { site, source })?;
                let behind = site.0 + replaced.len() as u64;
                if !insns.iter().all(|insn| is_nop(insn) || is_jump_to(insn, behind)) {
                    return Err(LinkError::NotNops { site, found: replaced.to_vec() });
                }
                insns.iter().map(|insn| (insn.ip(), self.asm.here())).collect()
            }
        };
        self.branch(Code::Jmp_rel32_64, site.0 + replaced.len() as u64)?;
        Ok(moves)
    }

    fn branch(&mut self, code: Code, target: u64) -> Result<(), LinkError> {
        self.asm.branch(code, target).map_err(|e| self.failed(&e))
    }

    fn finish(
        &self,
        original: Place,
        moves: &[(u64, Place)],
    ) -> Result<(Skeleton, Vec<u32>), LinkError> {
        let address = self.request.image_address;
        let encoded = self.asm.encode(address).map_err(|e| self.failed(&e))?;
        let offset = |place| self.offset(&encoded, place);
        let at = |place| Ok(address.offset(i64::from(offset(place)?)));
        let site = self.request.site;
        let numbers = self.numbers.iter().map(|place| offset(*place)).collect::<Result<_, _>>()?;
        let site_patch =
            rel32(0xe9, site, address).ok_or(LinkError::OutOfReach { from: site, to: address })?;
        let skeleton = Skeleton {
            site_patch,
            original_entry: at(original)?,
            returns_to: self.returns_to.map(at).transpose()?,
            switches: self.switches(&encoded)?,
            changers: self
                .changers
                .iter()
                .map(|&(from, to, changes)| Ok(Changer { from: at(from)?, to: at(to)?, changes }))
                .collect::<Result<_, LinkError>>()?,
            moves: moves
                .iter()
                .map(|(old, place)| Ok((RemoteAddr(*old), at(*place)?)))
                .collect::<Result<_, LinkError>>()?,
            rows: self
                .rows
                .iter()
                .map(|(place, rule)| Ok(UnwindRow { offset: offset(*place)?, rule: *rule }))
                .collect::<Result<_, LinkError>>()?,
            bytes: encoded.bytes,
            address,
        };
        Ok((skeleton, numbers))
    }

    fn offset(&self, encoded: &Encoded, place: Place) -> Result<u32, LinkError> {
        encoded.offset(place).ok_or_else(|| LinkError::Encode {
            image_address: self.request.image_address,
            message: "a moved branch does not reach its target".into(),
        })
    }
}

/// Bytes below rbp before the copied stack words, such that `rsp` is aligned as the caller's
/// was once those are pushed: the canonical frame address, `rbp + 16`, is a multiple of
/// `stack_align_bytes`.
fn frame_bytes(request: &SkeletonRequest<'_>) -> u32 {
    let used = request
        .bodies
        .iter()
        .filter(|b| b.frame_words > 0)
        .map(|b| b.frame_offset + 8 * (b.frame_words - 1))
        .max()
        // The lowest argument word.
        .unwrap_or(BODY_FRAMES_OFFSET - 8);
    let others = 16 + 8 * request.stack_copy.n_words();
    (used + others).next_multiple_of(request.stack_align_bytes) - others
}

fn is_nop(insn: &iced_x86::Instruction) -> bool {
    // `endbr64` stands between nops before and behind an entry; nothing jumps to its copy.
    matches!(insn.mnemonic(), iced_x86::Mnemonic::Nop | iced_x86::Mnemonic::Endbr64)
        || (insn.mnemonic() == iced_x86::Mnemonic::Xchg && insn.len() == 1)
}

/// XRay's sled is a jump over a nop.
fn is_jump_to(insn: &iced_x86::Instruction, target: u64) -> bool {
    insn.code() == Code::Jmp_rel8_64 && insn.near_branch_target() == target
}

fn rel32(opcode: u8, from: RemoteAddr, to: RemoteAddr) -> Option<[u8; PATCH_BYTES]> {
    let distance = to.0.wrapping_sub(from.0.wrapping_add(PATCH_BYTES as u64)).cast_signed();
    let d = i32::try_from(distance).ok()?.to_le_bytes();
    Some([opcode, d[0], d[1], d[2], d[3]])
}
