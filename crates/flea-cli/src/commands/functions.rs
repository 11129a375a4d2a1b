//! `flea list`: where Flea can attach, how, and with which signature.

use anyhow::Result;
use flea::{
    Refusal, SiteKind,
    signature::{Doubt, SignatureSource},
};

use crate::{
    args::Functions,
    output::{Output, basename},
    record::Record,
    target::Target,
};

/// Prints a line per function.
pub fn list(args: &Functions) -> Result<u8> {
    let mut output = Output::open(&args.common)?;
    let target = Target::open(&args.target, &args.span)?;
    let (functions, _) = target.find(&args.patterns, false)?;
    for function in &functions {
        let name = function.name();
        let (site, reason) = match function.site() {
            Ok(site) if matches!(site.kind, SiteKind::Nop5) => ("nop5", None),
            Ok(_) => ("relocated", None),
            Err(refusal) => ("refused", Some(refusal.to_string())),
        };
        // What is at an ifunc's address is its resolver, whose signature is nobody's concern.
        let is_ifunc = matches!(function.site(), Err(Refusal::Ifunc { .. }));
        let source = function.signature().source;
        let signature_source = match source {
            _ if is_ifunc => None,
            SignatureSource::Dwarf => Some("dwarf"),
            SignatureSource::Btf => Some("btf"),
            SignatureSource::Guessed => None,
        };
        let signature = signature_source.map(|_| function.signature_text());
        // That there is no debug information is said once, by there being no signatures.
        let doubt = function.signature().doubt.as_ref();
        let doubt = doubt.filter(|doubt| !is_ifunc && **doubt != Doubt::NoDebugInfo);
        output.line(format!(
            "{} {:<9} {:>6} {}:{}{}{}{}",
            function.address(),
            site,
            function.size_bytes(),
            basename(function.module()),
            signature.as_ref().unwrap_or(&name),
            if signature_source == Some("btf") { "  [from BTF]" } else { "" },
            doubt.map(|doubt| format!("  [arguments guessed: {doubt}]")).unwrap_or_default(),
            reason.as_ref().map(|r| format!("  [{r}]")).unwrap_or_default(),
        ))?;
        output.record(&Record::Function {
            module: function.module(),
            function: &name,
            address: function.address().to_string(),
            size: function.size_bytes(),
            site,
            reason,
            signature,
            signature_source,
        })?;
    }
    output.flush()?;
    target.abandon()?;
    Ok(0)
}
