//! The lower part of a file: what was made, and what runs of it did.

use std::fmt::Write;

use flea_image::{Code, RelocKind, Saved, Skeleton, UnwindRule, listing};
use flea_symbols::addr::RemoteAddr;
use flea_symbols::signature::{ArgWord, RetWord};

use crate::case::Case;
use crate::made::{Made, Places, make, sides};
use crate::support::random_image::{IMAGE, SITE, address_of};

const BODIES: RemoteAddr = RemoteAddr(0x50_0000);
const ARGUMENTS: [&str; 6] = ["rdi", "rsi", "rdx", "rcx", "r8", "r9"];

/// Everything that does not depend on where the test runs.
pub fn picture(case: &Case) -> String {
    let places = Places { site: SITE, image: IMAGE, bodies: BODIES, address_of: &address_of };
    let made = make(case, &places);
    let mut out = String::new();
    layout(&mut out, case, &made).unwrap();
    for (i, (_, body)) in made.bodies.iter().enumerate() {
        for (side, code) in sides(body) {
            let Some(code) = code else { continue };
            let _ = write!(out, "\ncontroller {i}, {side} body:\n{}", indented(&code.listing()));
            relocations(&mut out, code);
        }
    }
    match &made.skeleton {
        None => out.push_str("\nno skeleton: the site calls the body\n"),
        Some(skeleton) => skeleton_of(&mut out, skeleton),
    }
    out
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

/// The frame from the highest address down.
fn layout(out: &mut String, case: &Case, made: &Made) -> std::fmt::Result {
    let bodies = || made.bodies.iter();
    let needs_frame =
        |b: &flea_image::Body| b.session.is_some() || b.modify.is_some() || b.exit.is_some();
    if !bodies().any(|(_, body)| needs_frame(body)) {
        return writeln!(out, "layout: no frame");
    }
    writeln!(out, "layout:")?;
    for i in (0..case.stack_words).rev() {
        writeln!(out, "  [rbp + {:3}]  the caller's stack word {i}", 16 + 8 * i)?;
    }
    writeln!(out, "  [rbp +   8]  return address")?;
    writeln!(out, "  [rbp +   0]  the caller's rbp")?;
    let mut words: Vec<(u32, String)> = vec![];
    for (_, body) in bodies() {
        words.extend(body.reads.results.iter().filter_map(|word| result(*word)));
        words.extend(body.reads.args.iter().filter_map(|word| argument(*word)));
    }
    if bodies().any(|(_, body)| body.modify.is_some()) {
        words.push((8, "0, or the value that skips the function".into()));
    }
    for (i, (offset, body)) in bodies().enumerate() {
        for word in 0..body.frame_words {
            let save = body
                .saves
                .iter()
                .find(|s| (s.word + 1 - s.what.n_words()..=s.word).contains(&word));
            let what = match save {
                None => "session cookie".to_owned(),
                Some(save) => {
                    format!("{} word {}, {:?}", saved(save.what), save.word - word, save.when)
                }
            };
            words.push((offset + 8 * word, format!("controller {i}: {what}")));
        }
    }
    words.sort();
    words.dedup();
    for (below_rbp, what) in words {
        writeln!(out, "  [rbp - {below_rbp:3}]  {what}")?;
    }
    if case.stack_words > 0 {
        writeln!(out, "  [rsp...   ]  copies of {} stack words", case.stack_words)?;
    }
    Ok(())
}

fn result(word: RetWord) -> Option<(u32, String)> {
    let (at, name) = match word {
        RetWord::Rax => (8, "rax"),
        RetWord::Rdx => (16, "rdx"),
        RetWord::Xmm0 => (24, "xmm0"),
        RetWord::Xmm1 => (32, "xmm1"),
        RetWord::XmmWord { .. } | RetWord::X87 { .. } => return None,
    };
    Some((at, format!("result {name}")))
}

fn argument(word: ArgWord) -> Option<(u32, String)> {
    match word {
        ArgWord::Gpr(i) => {
            Some((40 + 8 * u32::from(i), format!("argument {}", ARGUMENTS[usize::from(i)])))
        }
        ArgWord::Xmm(i) => Some((88 + 8 * u32::from(i), format!("argument xmm{i}"))),
        ArgWord::XmmWord { .. } | ArgWord::Stack(_) => None,
    }
}

fn saved(what: Saved) -> String {
    match what {
        Saved::Gpr(reg) => format!("general register {reg}"),
        Saved::Vector { reg, .. } => format!("vector register {reg}"),
        Saved::X87 { reg } => format!("st{reg}"),
    }
}

fn relocations(out: &mut String, code: &Code) {
    for reloc in &code.relocs {
        let kind = match reloc.kind {
            RelocKind::Abs8 => "8 bytes",
            RelocKind::ThreadPointer => "load",
            RelocKind::SkeletonFrame => "copy",
        };
        let _ = writeln!(out, "  relocation at {:04x}: {kind} of {:?}", reloc.offset, reloc.target);
    }
}

fn skeleton_of(out: &mut String, skeleton: &Skeleton) {
    let text = listing(&skeleton.bytes, skeleton.address);
    let _ = write!(out, "\nskeleton:\n{}", indented(&text));
    out.push_str("\nunwind:\n");
    for row in &skeleton.rows {
        let rule = match row.rule {
            UnwindRule::Entry => "CFA = rsp + 8",
            UnwindRule::Frame => "CFA = rbp + 16, rbp at CFA - 16",
            UnwindRule::Original => "as the original's row",
        };
        let _ = writeln!(out, "  {:04x}  {rule}", row.offset);
    }
    out.push_str("\nmoves:\n");
    let offset = |at: RemoteAddr| at.0 - skeleton.address.0;
    for (old, new) in &skeleton.moves {
        let _ = writeln!(out, "  {old} -> {:04x}", offset(*new));
    }
    let _ = writeln!(out, "  the original begins at {:04x}", offset(skeleton.original_entry));
    if let Some(at) = skeleton.returns_to {
        let _ = writeln!(out, "  the original returns to {:04x}", offset(at));
    }
    for switch in &skeleton.switches {
        let new = listing(&switch.new, RemoteAddr(switch.at.0));
        let (_, jump) = new.trim_end().split_once("  ").unwrap_or_default();
        let at = offset(switch.at);
        let _ = writeln!(out, "  controller {} is switched off at {at:04x}: {jump}", switch.body);
    }
}
