//! A refused program, for people: the one place that turns a [`Rejection`]'s facts into text.
//!
//! ```text
//! R0 max value is outside of the allowed memory range
//!   at insn 9 in on_call, prog.c:33: return table[i];
//!      9: r0 = *(u64 *)(r0 +0)
//!   where it came from:
//!      insn 2, prog.c:31: u32 i = ctx[0];
//!          R1 is loaded from memory: any number
//!   to change: the offset may be 0 to 120 and fits up to 56: ...
//! ```

use std::fmt::Write as _;

use flea::rejection::{Event, Known, Line, Place, Rejection, What};

/// Lines of the log that go before a report unless all of it is asked for.
const LOG_LINES: usize = 16;

/// The end of the way to the fault, as Linux's log has it, without the message.
pub fn log(rejection: &Rejection) -> &[String] {
    let steps = rejection.log.split_last().map_or(&[][..], |(_message, steps)| steps);
    &steps[steps.len().saturating_sub(LOG_LINES)..]
}

/// The report, several lines without the last one's end.
pub fn text(rejection: &Rejection) -> String {
    let mut out = rejection.message.clone();
    if let Some(place) = &rejection.place {
        let _ = write!(out, "\n  at insn {}", place.insn_idx);
        if let Some(function) = &place.function {
            let _ = write!(out, " in {function}");
        }
        if let Some(line) = &place.line {
            let _ = write!(out, ", {}:{}: {}", line.file, line.number, line.text);
        }
        let _ = write!(out, "\n     {}: {}", place.insn_idx, place.insn);
    }
    if !rejection.story.is_empty() {
        out += "\n  where it came from:";
        let mut before = None;
        for event in &rejection.story {
            tell(event, &mut before, &mut out);
        }
    }
    if let Some(hint) = &rejection.hint {
        let _ = write!(out, "\n  to change: {hint}");
    }
    out
}

/// One event; `before` is the line of the one before.
fn tell<'e>(event: &'e Event, before: &mut Option<&'e Line>, out: &mut String) {
    let Event { place, what, reg, known } = event;
    let Place { insn_idx, insn, line, .. } = place;
    if line.is_some() && line.as_ref() != *before {
        *before = line.as_ref();
        if let Some(line) = line {
            let file = line.file.rsplit('/').next().unwrap_or(&line.file);
            let _ = write!(out, "\n     {file}:{}: {}", line.number, line.text);
        }
    }
    if matches!(what, What::Given | What::NeverWritten) {
        let reg = reg.unwrap_or_default();
        let _ = write!(out, "\n       R{reg} {}", happened(what));
    } else {
        let _ = write!(out, "\n       {insn_idx}: {insn}\n          {}", who(*reg, what));
    }
    if *known != Known::Unset {
        let _ = write!(out, ": {}", words(known));
    }
}

fn who(reg: Option<u8>, what: &What) -> String {
    let who = reg.map_or_else(|| "the stack".to_owned(), |reg| format!("R{reg}"));
    format!("{who} {}", happened(what))
}

fn happened(what: &What) -> String {
    match what {
        What::Given => "is what it is called with".into(),
        What::NeverWritten => "is written by no instruction on this path".into(),
        What::Set => "is set".into(),
        What::Loaded => "is loaded".into(),
        What::Spilled => "keeps it".into(),
        What::Copied => "is a copy".into(),
        What::Computed => "is computed".into(),
        What::Returned { by } => format!("is the result of {by}"),
        What::Filled { by } => format!("is written by {by}"),
        What::Clobbered { by } => format!("is left unset by the call of {by}"),
        What::Passed => "is handed over".into(),
        What::Acquired => "must be given back".into(),
        What::Compared { with_reg, with, jumps } => {
            let way = if *jumps { "jumps" } else { "does not jump" };
            match with_reg {
                Some(reg) => {
                    format!("is compared with R{reg} ({}); this path {way}", words(with))
                }
                None => format!("is compared with {}; this path {way}", words(with)),
            }
        }
    }
}

/// What is known of a value.
fn words(known: &Known) -> String {
    match known {
        Known::Unset => "nothing".into(),
        Known::Number { smin, smax, umin, umax } => number(*smin, *smax, *umin, *umax),
        Known::Pointer { kind, or_null, map, size_bytes, min_offset, max_offset } => {
            let mut text = (*kind).to_owned();
            if let Some(map) = map {
                let _ = write!(text, " of {map}");
            }
            if let Some(size) = size_bytes {
                let _ = write!(text, ", {size} bytes");
            }
            match (*min_offset, *max_offset) {
                (0, 0) => {}
                (min, max) if min == max => {
                    let _ = write!(text, ", at byte {min}");
                }
                (min, max) => {
                    let _ = write!(text, ", at byte {min} to {max}");
                }
            }
            if *or_null { text + ", or NULL" } else { text }
        }
    }
}

fn number(smin: i64, smax: i64, umin: u64, umax: u64) -> String {
    const ALL_32: u64 = u32::MAX as u64;
    // Past this, a bound is an accident of arithmetic and nobody's intention.
    const LARGE: u64 = 1 << 62;
    match (umin, umax) {
        _ if smin == smax => smin.to_string(),
        (0, u64::MAX) if (smin, smax) == (i64::MIN, i64::MAX) => "any number".into(),
        (0, ALL_32) => "any number of 32 bits".into(),
        (0, u64::MAX) => format!("{smin} to {smax}"),
        (0, umax) if umax > LARGE && smin.unsigned_abs() > LARGE => "almost any number".into(),
        (umin, umax) if smin < 0 && smax >= 0 => {
            format!("{umin} to {umax}, as a signed number {smin} to {smax}")
        }
        _ if smin < 0 => format!("{smin} to {smax}"),
        (umin, umax) => format!("{umin} to {umax}"),
    }
}

#[cfg(test)]
mod tests;
