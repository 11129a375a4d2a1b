//! Which of a function's bodies a program goes into, and in which order programs run there.

use flea_object::helper::Helper;
use flea_object::spec::ProgramKind;
use flea_symbols::signature::{ArgWord, Signature};
use flea_verifier::Verified;
use flea_verifier::facts::{Fact, Region};

use crate::changes::changes;
use crate::request::{BodyRequest, ProgramUse};
use crate::translate::{Side, is_saved_at_entry};

/// Whether `verified`, or what its tail calls lead to, attached as `kind` to a function with this signature, needs the skeleton's
/// frame: every kind that runs at exit, and those entry programs that change arguments, or read
/// what no parameter of an entry body can show. What needs a frame needs the function's stack words to be known.
#[must_use]
pub fn needs_frame(kind: ProgramKind, verified: &Verified, signature: &Signature) -> bool {
    match kind {
        ProgramKind::Fentry | ProgramKind::Uprobe
            if changes(verified, kind, signature).args != 0 =>
        {
            true
        }
        ProgramKind::Fentry => verified.members().any(|v| reads_wide_words(v, signature)),
        ProgramKind::Uprobe => verified.members().any(reads_saved_registers),
        ProgramKind::Fexit
        | ProgramKind::Fsession
        | ProgramKind::FmodRet
        | ProgramKind::Uretprobe => true,
    }
}

fn reads_saved_registers(verified: &Verified) -> bool {
    verified.facts().iter().any(|fact| match *fact {
        Fact::Access(Region::Ctx { offset_bytes }) => is_saved_at_entry(offset_bytes),
        _ => false,
    })
}

/// Does it read a third or later word of a vector register? A 16-byte parameter is the widest
/// that baseline code has.
fn reads_wide_words(verified: &Verified, signature: &Signature) -> bool {
    let wide: Vec<bool> = signature
        .arg_words()
        .map(|word| matches!(word, ArgWord::XmmWord { word: 2.., .. }))
        .collect();
    if !wide.contains(&true) {
        return false;
    }
    let is_wide = |slot: u64| usize::try_from(slot).ok().and_then(|i| wide.get(i)) == Some(&true);
    verified.facts().iter().any(|fact| match *fact {
        Fact::Access(Region::Ctx { offset_bytes }) => {
            u64::try_from(offset_bytes).is_ok_and(|offset| is_wide(offset / 8))
        }
        // Linux declares `u32 n`; one that is not known may be any of them.
        Fact::Call { helper: Helper::GetFuncArg, constants, .. } => {
            constants[1].is_none_or(|n| is_wide(n & 0xffff_ffff))
        }
        _ => false,
    })
}

/// Whether a program is part of the body on `side`.
pub(crate) fn runs_on(side: Side, program: &ProgramUse<'_>, request: &BodyRequest<'_>) -> bool {
    match program.kind {
        ProgramKind::Fentry | ProgramKind::Uprobe => {
            let signature = request.signature;
            // Those behind one that changes arguments are to find what it left.
            let framed = needs_frame(program.kind, program.verified, signature)
                || request.programs.iter().any(|p| changes_arguments(p, signature));
            side == if framed { Side::Session } else { Side::Entry }
        }
        ProgramKind::Fexit | ProgramKind::Uretprobe => side == Side::Exit,
        ProgramKind::Fsession => matches!(side, Side::Session | Side::Exit),
        ProgramKind::FmodRet => side == Side::Modify,
    }
}

/// Whether it is an entry program that changes what its function is called with.
fn changes_arguments(program: &ProgramUse<'_>, signature: &Signature) -> bool {
    matches!(program.kind, ProgramKind::Fentry | ProgramKind::Uprobe)
        && changes(program.verified, program.kind, signature).args != 0
}

/// Kinds run in this order on one side; within a kind the newest is first.
pub(crate) fn rank(kind: ProgramKind) -> u8 {
    match kind {
        ProgramKind::Fentry => 0,
        ProgramKind::Uprobe => 1,
        // Of one rank: Linux keeps the exit sides of both in one list.
        ProgramKind::Fexit | ProgramKind::Fsession => 2,
        ProgramKind::FmodRet => 3,
        ProgramKind::Uretprobe => 4,
    }
}
