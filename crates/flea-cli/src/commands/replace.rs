//! `flea replace OBJECT FUNCTION[=SYMBOL]...`: live patching. Unlike what the tracing commands
//! attach, a replacement in a running process outlives the command.

use std::fmt::Display;

use anyhow::{Context as _, Error, Result, anyhow, bail};
use flea::Function;

use crate::{
    args::{self, Replace},
    output::{Output, basename, n_functions},
    record::Record,
    target::Target,
};

/// Names shown where one was expected.
const MAX_NAMES: usize = 5;

/// `flea replace`
pub fn replace(args: &Replace) -> Result<u8> {
    let mut output = Output::open(&args.common)?;
    let span = args::Span { duration: args.duration, follow: false };
    let mut target = Target::open(&args.target, &span)?;
    let mut patch = target.session.load_shared_object(&args.object).map_err(unchanged)?;
    if args.unchecked_signature {
        patch = patch.unchecked_signature();
    }
    let pairs = args
        .functions
        .iter()
        .map(|text| pair(&target, text))
        .collect::<Result<Vec<(Function, String)>>>()
        .map_err(unchanged)?;
    let borrowed: Vec<_> = pairs.iter().map(|(f, symbol)| (f, symbol.as_str())).collect();
    let replacement = patch.replace_all(&borrowed).map_err(unchanged)?;
    let ids = print(&target, args, &pairs, replacement.ids(), &mut output)?;
    let replaced = n_functions(ids.len());
    if args.target.pid.is_some() && args.duration.is_none() {
        replacement.keep();
        eprintln!("flea: replaced {replaced}; undo with: flea detach {}", ids.join(" "));
        return Ok(0);
    }
    eprintln!("flea: replaced {replaced}");
    target.run(|| Ok(()))?;
    replacement.detach()?;
    target.finish()
}

fn unchanged(error: impl Display) -> Error {
    anyhow!("{error}; nothing was changed")
}

/// Prints a line per function; their ids as `flea ps` has them.
fn print(
    target: &Target,
    args: &Replace,
    pairs: &[(Function, String)],
    ids: &[u32],
    output: &mut Output,
) -> Result<Vec<String>> {
    let pid = target.session.pid();
    let ids: Vec<String> = ids.iter().map(|id| format!("{pid}.{id}")).collect();
    for ((function, symbol), id) in pairs.iter().zip(&ids) {
        let name = function.name();
        output.line(format!(
            "{id:<14} {}:{name} replaced by {symbol} of {}",
            basename(function.module()),
            args.object.display(),
        ))?;
        output.record(&Record::Replaced {
            id: id.clone(),
            pid,
            module: function.module(),
            function: &name,
            symbol,
            object: args.object.display().to_string(),
        })?;
    }
    output.flush()?;
    Ok(ids)
}

/// The one function that `text` names, and its replacement's name.
fn pair(target: &Target, text: &str) -> Result<(Function, String)> {
    let (pattern, symbol) = split(text);
    let (mut functions, _) = target.find(&[pattern.to_owned()], false)?;
    if functions.len() > 1 {
        let names: Vec<_> = functions
            .iter()
            .take(MAX_NAMES)
            .map(|f| format!("{}:{}", basename(f.module()), f.name()))
            .collect();
        bail!(
            "`{pattern}` means {} functions ({}, ...); name one",
            functions.len(),
            names.join(", ")
        );
    }
    let function = functions.pop().context("a pattern that matches nothing is an error")?;
    let symbol = symbol.map_or_else(|| function.linkage_name().to_owned(), str::to_owned);
    Ok((function, symbol))
}

/// `FUNCTION=SYMBOL`. Not every `=` is one of ours: `operator==`, `operator=(const T&)`.
fn split(text: &str) -> (&str, Option<&str>) {
    let is_symbol = |text: &str| {
        text.starts_with(|c: char| c.is_alphabetic() || c == '_')
            && text.chars().all(|c| c.is_alphanumeric() || "_$.".contains(c))
    };
    match text.rsplit_once('=') {
        Some((function, symbol)) if is_symbol(symbol) => (function, Some(symbol)),
        _ => (text, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_the_symbol_begins() {
        for (text, expected) in [
            ("f", ("f", None)),
            ("f=g", ("f", Some("g"))),
            ("lib.so:f=_ZN1A1gEv", ("lib.so:f", Some("_ZN1A1gEv"))),
            ("A::operator==", ("A::operator==", None)),
            ("A::operator===same", ("A::operator==", Some("same"))),
            ("A::operator=(A const&)", ("A::operator=(A const&)", None)),
            ("f=", ("f=", None)),
        ] {
            assert_eq!(split(text), expected);
        }
    }
}
