//! Machine code as text, for golden tests and for people.

use std::fmt::Write;

use flea_symbols::addr::RemoteAddr;
use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};

use crate::code::{Code, RelocKind, RelocTarget};

/// One line per instruction: offset from `start`, then AT&T syntax. Targets of jumps inside
/// are printed as offsets too.
#[must_use]
pub fn listing(bytes: &[u8], start: RemoteAddr) -> String {
    render(bytes, start, |_| None)
}

impl Code {
    /// The unresolved code with what each relocation will put in.
    #[must_use]
    pub fn listing(&self) -> String {
        render(&self.bytes, RemoteAddr(0), |range| {
            let reloc = self.relocs.iter().find(|r| range.contains(&(r.offset as usize)))?;
            Some(match (reloc.kind, reloc.target) {
                (RelocKind::ThreadPointer, _) => "thread pointer".into(),
                (RelocKind::SkeletonFrame, _) => "the skeleton's rbp".into(),
                (_, RelocTarget::Arena { addend }) if addend < 0 => {
                    format!("arena - {:#x}", -addend)
                }
                (_, RelocTarget::Arena { addend }) => format!("arena + {addend:#x}"),
                (_, RelocTarget::Runtime(f)) => f.symbol().into(),
                (_, other) => format!("{other:?}"),
            })
        })
    }
}

fn render(
    bytes: &[u8],
    start: RemoteAddr,
    note: impl Fn(std::ops::Range<usize>) -> Option<String>,
) -> String {
    let mut formatter = GasFormatter::new();
    let mut out = String::new();
    let mut text = String::new();
    let end = start.0.wrapping_add(bytes.len() as u64);
    for insn in &mut Decoder::with_ip(64, bytes, start.0, DecoderOptions::NONE) {
        text.clear();
        let target = insn.near_branch_target();
        if (start.0..end).contains(&target)
            && insn.is_jmp_short_or_near() | insn.is_jcc_short_or_near()
        {
            let _ = write!(text, "{:?} +{:#x}", insn.mnemonic(), target - start.0);
            text.make_ascii_lowercase();
        } else {
            formatter.format(&insn, &mut text);
        }
        let at = insn.ip().wrapping_sub(start.0);
        let _ = write!(out, "{at:04x}  {text}");
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        if let Some(note) = note(at..at.saturating_add(insn.len())) {
            let _ = write!(out, "    # {note}");
        }
        out.push('\n');
    }
    out
}
