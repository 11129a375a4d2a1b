//! CO-RE relocations ("compile once, run everywhere"): instructions whose constant depends on
//! the layout of the target's types. The program has its own picture of a type, which need not
//! be complete; a relocation names a place in that picture, and gets what the target's type of
//! the same name has there. Rules as in Linux (tools/lib/bpf/relo_core.c, 6.18).
//!
//! Start at [`relocate`]. A relocation's place is found in `spec`; which types count as the
//! same is in `compat`, which number results in `value`, how an instruction takes it in
//! `patch`.
//!
//! What the target does not have *poisons* its instruction: it becomes a call of a helper that
//! does not exist. Dead code may keep it (`if (bpf_core_field_exists(...))`); for live code the
//! verifier refuses the program, and [`Relocated::poisoned`] says why.

mod compat;
mod patch;
mod spec;
#[cfg(test)]
mod tests;
mod value;

use std::sync::Arc;

use crate::insn::Insn;
use crate::types::{TypeId, Types, essential_name};

use spec::Spec;
use value::Outcome;

pub use patch::POISON;
#[cfg(test)]
pub(crate) use tests::any_types;

/// Steps from the outermost type to a field; more are damage. Linux's number.
pub(crate) const MAX_STEPS: usize = 64;

/// An instruction whose constant depends on the target's types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreRelocation {
    /// Index into the program's instructions.
    pub insn_idx: u32,
    /// What it asks for.
    pub kind: CoreKind,
    /// The type that it is about, in the object's own types.
    pub root: TypeId,
    /// The names under which the target may have it: of a typedef, then that type's own.
    pub names: Arc<[String]>,
    /// The way to a field, as indices of members and elements; the index of an enumerator.
    pub path: Vec<u32>,
}

/// What a relocation asks for (`enum bpf_core_relo_kind`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum CoreKind {
    /// A field's offset in bytes.
    FieldByteOffset = 0,
    /// A field's size in bytes.
    FieldByteSize = 1,
    /// Whether there is such a field.
    FieldExists = 2,
    /// Whether a field is signed.
    FieldSigned = 3,
    /// By how much a bit-field's word is shifted left, and
    FieldLshiftU64 = 4,
    /// then right.
    FieldRshiftU64 = 5,
    /// The type's number in the object.
    TypeIdLocal = 6,
    /// The type's number in the target.
    TypeIdTarget = 7,
    /// Whether there is such a type.
    TypeExists = 8,
    /// A type's size.
    TypeSize = 9,
    /// Whether there is such an enumerator.
    EnumvalExists = 10,
    /// An enumerator's value.
    EnumvalValue = 11,
    /// Whether there is a type with at least these members.
    TypeMatches = 12,
}

/// Why a program cannot be relocated. Its text names the field; nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("instruction {insn_idx}: {what}: {fault}")]
pub struct CoreError {
    /// The instruction.
    pub insn_idx: u32,
    /// What it refers to, e.g. `field 'struct task.pid'`.
    pub what: String,
    /// What is wrong.
    pub fault: CoreFault,
}

/// What can be wrong with a relocation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CoreFault {
    /// Several types of the target have the name, and not the same answer.
    #[error(
        "the target has several types '{name}', and it is not the same in all of them; compile against the right one's own header, without preserve_access_index"
    )]
    Ambiguous {
        /// The name.
        name: String,
    },
    /// The object's own types do not have such a place.
    #[error("the object's own types have no such thing: {0}")]
    Damaged(&'static str),
    /// A bit-field that no single load reads.
    #[error("the target's bit-field is in more than eight bytes, which no load reads at once")]
    WideBitField,
    /// A number that its instruction has no room for.
    #[error("{value} does not fit into the instruction")]
    TooLarge {
        /// The number.
        value: u64,
    },
    /// The instruction does not hold what the object's own types say.
    #[error("the instruction holds {found} where the object's own types say {stated}")]
    Unexpected {
        /// In the instruction.
        found: i64,
        /// By the object's types.
        stated: u64,
    },
    /// An instruction that no relocation is for.
    #[error("the instruction (opcode {opcode:#x}) has no constant that could be relocated")]
    BadInstruction {
        /// Its opcode.
        opcode: u8,
    },
}

/// Instructions that fit one target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relocated {
    /// As many as before.
    pub insns: Vec<Insn>,
    /// Instructions that became calls of [`POISON`], and why; sorted.
    pub poisoned: Vec<(u32, String)>,
}

impl CoreKind {
    const ALL: [Self; 13] = [
        Self::FieldByteOffset,
        Self::FieldByteSize,
        Self::FieldExists,
        Self::FieldSigned,
        Self::FieldLshiftU64,
        Self::FieldRshiftU64,
        Self::TypeIdLocal,
        Self::TypeIdTarget,
        Self::TypeExists,
        Self::TypeSize,
        Self::EnumvalExists,
        Self::EnumvalValue,
        Self::TypeMatches,
    ];

    /// The kind with Linux's number `number`.
    #[must_use]
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u32 == number)
    }

    fn is_type(self) -> bool {
        matches!(
            self,
            Self::TypeIdLocal
                | Self::TypeIdTarget
                | Self::TypeExists
                | Self::TypeSize
                | Self::TypeMatches
        )
    }

    fn is_enumerator(self) -> bool {
        matches!(self, Self::EnumvalExists | Self::EnumvalValue)
    }
}

impl CoreRelocation {
    /// Whether the relocation names a place in `local`, the object's own types.
    ///
    /// # Errors
    /// [`CoreError`]: it does not.
    pub fn check(&self, local: &Types) -> Result<(), CoreError> {
        self.local_spec(local).map(drop)
    }

    fn local_spec(&self, local: &Types) -> Result<Spec, CoreError> {
        Spec::parse(local, self).map_err(|what| self.error(local, CoreFault::Damaged(what)))
    }

    fn error(&self, local: &Types, fault: CoreFault) -> CoreError {
        CoreError { insn_idx: self.insn_idx, what: spec::spelled(local, self), fault }
    }

    /// The first of its names that `target` knows, and its types there of the same kind.
    fn candidates(&self, local: &Types, target: &Types) -> (&str, Vec<TypeId>) {
        let known = self.names.iter().map(|name| (name.as_str(), target.named(name)));
        let known = known.filter(|(_, ids)| !ids.is_empty());
        for (name, ids) in known {
            let is_same = |id: &TypeId| compat::is_same_kind(local.get(self.root), target.get(*id));
            let found: Vec<TypeId> = ids.iter().copied().filter(is_same).collect();
            if !found.is_empty() {
                return (name, found);
            }
        }
        (self.names.first().map_or("", String::as_str), Vec::new())
    }
}

/// Writes into `insns` what `target` says about `relocations`, which name places in `local`.
///
/// # Errors
/// [`CoreError`]: the target's answer is not clear, or the object is damaged.
pub fn relocate(
    insns: &[Insn],
    relocations: &[CoreRelocation],
    local: &Types,
    target: &Types,
) -> Result<Relocated, CoreError> {
    let mut relocated = Relocated { insns: insns.to_vec(), poisoned: Vec::new() };
    for relocation in relocations {
        // The compiler has written it, and types of the object keep their numbers.
        if relocation.kind == CoreKind::TypeIdLocal {
            continue;
        }
        let error = |fault| relocation.error(local, fault);
        let outcome = resolve(relocation, local, target)?;
        let reason = patch::apply(&mut relocated.insns, relocation.insn_idx, &outcome);
        if let Some(reason) = reason.map_err(error)? {
            let what = spec::spelled(local, relocation);
            relocated.poisoned.push((relocation.insn_idx, format!("{what}: {reason}")));
        }
    }
    relocated.poisoned.sort();
    Ok(relocated)
}

/// What the target says to one relocation.
fn resolve(
    relocation: &CoreRelocation,
    local: &Types,
    target: &Types,
) -> Result<Outcome, CoreError> {
    let error = |fault| relocation.error(local, fault);
    let local_spec = relocation.local_spec(local)?;
    let (name, candidates) = relocation.candidates(local, target);
    let original = value::answer(relocation.kind, local, Some(&local_spec)).map_err(error)?;
    let mut found: Option<(Spec, value::Answer)> = None;
    for candidate in &candidates {
        let matched = spec::find(relocation.kind, local, &local_spec, target, *candidate);
        let Some(spec) = matched else { continue };
        let answer = value::answer(relocation.kind, target, Some(&spec)).map_err(error)?;
        match &found {
            Some((first, before))
                if first.bit_offset != spec.bit_offset || !answer.is_like(before) =>
            {
                return Err(error(CoreFault::Ambiguous { name: name.to_owned() }));
            }
            Some(_) => {}
            None => found = Some((spec, answer)),
        }
    }
    let answer = match found {
        Some((_, answer)) => answer,
        None => value::answer(relocation.kind, target, None).map_err(error)?,
    };
    let name = essential_name(name);
    let reason = match candidates.as_slice() {
        [] => format!("the target has no type '{name}'"),
        _ => format!("the target's '{name}' has no such field, or one of another kind"),
    };
    Ok(Outcome {
        is_adjustable: value::may_change_size(local, &original, target, &answer),
        is_offset: relocation.kind == CoreKind::FieldByteOffset,
        original,
        answer,
        reason,
    })
}
