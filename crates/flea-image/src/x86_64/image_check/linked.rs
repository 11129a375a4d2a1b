//! The image that a skeleton is, with what its request says of its surroundings.

use flea_symbols::addr::RemoteAddr;
use flea_symbols::signature::{ArgWord, RetWord};

use super::value::Source;
use super::{FrameWord, Holds, ImageUnderCheck, InlineChanges, KnownCall, Moved, Runs, Trusted};
use crate::changes::Changes;
use crate::request::{BODY_FRAMES_OFFSET, Reads, Saved, When};
use crate::skip::SkipResult;
use crate::x86_64::find_fde::Question;
use crate::x86_64::skeleton::{BodyRef, Changer, Skeleton, SkeletonBody, SkeletonRequest, Switch};
use crate::x86_64::stack_copy::StackCopy;

/// rdi, rsi, rdx, rcx, r8, r9 by hardware number.
const ARGUMENTS: [u8; 6] = [7, 6, 2, 1, 8, 9];
const N_VECTOR_ARGUMENTS: u8 = 8;

impl<'a> ImageUnderCheck<'a> {
    /// `skeleton` as `request` wanted it, answering what it is `asked` for our
    /// frames. Whatever 64-bit constants are in its bodies count as
    /// memory and runtime; whoever knows better puts ranges in their place.
    #[must_use]
    pub fn of(
        request: &SkeletonRequest<'a>,
        asked: Option<Question>,
        skeleton: &'a Skeleton,
    ) -> Self {
        let first_moved = skeleton.moves.first().map(|(_, to)| *to);
        Self {
            bytes: &skeleton.bytes,
            address: skeleton.address,
            original: skeleton.original_entry,
            moved: Moved {
                at: first_moved.unwrap_or(skeleton.original_entry),
                site: request.site,
                replaced: request.replaced,
                goes_on: RemoteAddr(request.site.0 + request.replaced.len() as u64),
            },
            stack_words: request.stack_copy.n_words(),
            stack_align_bytes: request.stack_align_bytes,
            probe_read_user: match request.stack_copy {
                StackCopy::UpTo { probe_read_user, .. } => Some(probe_read_user),
                StackCopy::Exactly(_) => None,
            },
            calls: calls(request.bodies),
            frame: picture().into_iter().chain(request.bodies.iter().flat_map(saved)).collect(),
            frame_bytes: frame_bytes(request.bodies),
            changers: skeleton.changers.iter().map(changer).collect(),
            given_back: given_back(request.bodies),
            memory: Trusted::Immediates,
            runtime: Trusted::Immediates,
            switches: skeleton.switches.iter().map(switch).collect(),
            skip: skip(request),
            answer_bytes: asked.map(|question| match question {
                // struct dwarf_eh_bases; struct dl_find_object without its reserved words.
                Question::Row => 24,
                Question::Object => 40,
            }),
            replacement: request.replacement,
        }
    }
}

/// Called bodies, in the order in which they are to run.
fn calls(bodies: &[SkeletonBody<'_>]) -> Vec<KnownCall> {
    let mut calls = Vec::new();
    for runs in [Runs::AtEntry, Runs::InFrame, Runs::Modifies, Runs::AtExit] {
        for body in bodies {
            let (side, reads) = match runs {
                Runs::AtEntry => (body.entry, Vec::new()),
                Runs::InFrame => (body.session, saved_at(body, When::Entry)),
                Runs::Modifies => (body.modify, saved_at(body, When::Entry)),
                Runs::AtExit => (body.exit, reads_at_exit(body)),
            };
            let changes = match runs {
                Runs::AtEntry | Runs::Modifies => Changes::NONE,
                Runs::InFrame => Changes { result: false, ..body.changes },
                Runs::AtExit => Changes { args: 0, ..body.changes },
            };
            if let Some(BodyRef::Call(address)) = side {
                calls.push(KnownCall { address, runs, reads, changes: words(changes) });
            }
        }
    }
    calls
}

/// Offsets below `rbp` of what is changed.
fn words(changes: Changes) -> Vec<u32> {
    let arguments = changes.arguments().map(|i| 40 + 8 * u32::from(i));
    arguments.chain(changes.result.then_some(8)).collect()
}

fn changer(changer: &Changer) -> InlineChanges {
    let Changer { from, to, changes } = *changer;
    InlineChanges { code: from.0..to.0, words: words(changes) }
}

/// What is changed by a body that saves what the caller had there.
fn given_back(bodies: &[SkeletonBody<'_>]) -> Vec<Source> {
    let changed = bodies.iter().fold(Changes::NONE, |all, body| all.join(body.changes));
    let is_saved = |source: &Source| {
        bodies.iter().any(|body| {
            let saves = (body.changes != Changes::NONE).then(|| saved(body));
            saves.into_iter().flatten().any(|word| word.holds == Holds::Argument(*source))
        })
    };
    changed.arguments().map(|i| Source::Gpr(ARGUMENTS[usize::from(i)])).filter(is_saved).collect()
}

/// The frame's picture in ARCHITECTURE.md, written down a second time on purpose.
fn picture() -> Vec<FrameWord> {
    let mut words = vec![
        FrameWord { below_rbp: 8, holds: Holds::Result(Source::Gpr(0)) },
        FrameWord { below_rbp: 16, holds: Holds::Result(Source::Gpr(2)) },
        FrameWord { below_rbp: 24, holds: Holds::Result(Source::Vector { reg: 0, word: 0 }) },
        FrameWord { below_rbp: 32, holds: Holds::Result(Source::Vector { reg: 1, word: 0 }) },
    ];
    let integers = (0u32..).zip(ARGUMENTS).map(|(i, register)| (40 + 8 * i, Source::Gpr(register)));
    let vectors = (0..N_VECTOR_ARGUMENTS)
        .map(|reg| (88 + 8 * u32::from(reg), Source::Vector { reg, word: 0 }));
    words.extend(
        integers
            .chain(vectors)
            .map(|(below_rbp, source)| FrameWord { below_rbp, holds: Holds::Argument(source) }),
    );
    words
}

/// The words of `body` that the skeleton stores for it.
fn saved<'a>(body: &'a SkeletonBody<'_>) -> impl Iterator<Item = FrameWord> + 'a {
    body.saves.iter().flat_map(|save| {
        let holds = |source| match save.when {
            When::Entry => Holds::Argument(source),
            When::Exit => Holds::Result(source),
        };
        let lowest = body.frame_offset + 8 * save.word;
        let n_words = u8::try_from(save.what.n_words()).unwrap_or(u8::MAX);
        (0..n_words).map(move |word| {
            let source = match save.what {
                Saved::Gpr(reg) => Source::Gpr(reg),
                Saved::Vector { reg, .. } => Source::Vector { reg, word },
                Saved::X87 { reg } => Source::X87 { reg, word },
            };
            FrameWord { below_rbp: lowest - 8 * u32::from(word), holds: holds(source) }
        })
    })
}

fn saved_at(body: &SkeletonBody<'_>, when: When) -> Vec<u32> {
    let wanted = saved(body).filter(|word| match word.holds {
        Holds::Argument(_) => true,
        Holds::Result(_) => when == When::Exit,
    });
    wanted.map(|word| word.below_rbp).collect()
}

fn reads_at_exit(body: &SkeletonBody<'_>) -> Vec<u32> {
    let mut all = offsets(body.reads);
    all.extend(saved_at(body, When::Exit));
    all
}

/// From where to where a switch jumps.
fn switch(switch: &Switch) -> (RemoteAddr, RemoteAddr) {
    let [_, distance @ ..] = switch.new;
    let behind = switch.at.offset(5);
    (switch.at, behind.offset(i32::from_le_bytes(distance).into()))
}

/// What a modify body's decision may change.
fn skip(request: &SkeletonRequest<'_>) -> Option<Vec<Source>> {
    request.bodies.iter().find(|body| body.modify.is_some())?;
    Some(match request.skip? {
        SkipResult::Nowhere => vec![],
        SkipResult::Rax => vec![Source::Gpr(0)],
        SkipResult::Xmm0 => vec![Source::Vector { reg: 0, word: 0 }],
    })
}

fn offsets(reads: &Reads) -> Vec<u32> {
    let arguments = reads.args.iter().filter_map(|word| match *word {
        ArgWord::Gpr(i) => Some(40 + 8 * u32::from(i)),
        ArgWord::Xmm(i) => Some(88 + 8 * u32::from(i)),
        ArgWord::XmmWord { .. } | ArgWord::Stack(_) => None,
    });
    let results = reads.results.iter().filter_map(|word| match *word {
        RetWord::Rax => Some(8),
        RetWord::Rdx => Some(16),
        RetWord::Xmm0 => Some(24),
        RetWord::Xmm1 => Some(32),
        RetWord::XmmWord { .. } | RetWord::X87 { .. } => None,
    });
    arguments.chain(results).collect()
}

fn frame_bytes(bodies: &[SkeletonBody<'_>]) -> u32 {
    let ends = bodies
        .iter()
        .filter(|b| b.frame_words > 0)
        .map(|b| b.frame_offset + 8 * (b.frame_words - 1));
    ends.max().unwrap_or(0).max(BODY_FRAMES_OFFSET - 8)
}
