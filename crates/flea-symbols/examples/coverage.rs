//! Prints which share of the functions of real binaries can be attached to, and why not the
//! rest: `cargo run -p flea-symbols --example coverage -- [-v] FILE...`
//!
//! Separate debug files are found by build id under /usr/lib/debug.

use std::collections::BTreeMap;
use std::time::Instant;

use flea_symbols::signature::{Absent, Signature, SignatureSource, StackWords};
use flea_symbols::{FunctionKind, Module, Refusal, SiteKind};

fn main() {
    let mut verbose = false;
    for path in std::env::args().skip(1) {
        if path == "-v" {
            verbose = true;
            continue;
        }
        if let Err(error) = report(&path, verbose) {
            println!("{path}: {error}");
        }
    }
}

fn report(path: &str, verbose: bool) -> Result<(), Box<dyn std::error::Error>> {
    let start = Instant::now();
    let bytes = std::fs::read(path)?;
    let debug = debug_file(&Module::parse(&bytes, None)?);
    let module = Module::parse(&bytes, debug.as_deref())?;
    let (mut nops, mut relocated, mut not_functions, mut pushed) = (0_u32, 0_u32, 0_u32, 0_u32);
    let mut refused: BTreeMap<&'static str, u32> = BTreeMap::new();
    for function in module.functions() {
        // Resolvers and split-off parts are not functions of the program.
        if function.kind == FunctionKind::Ifunc || function.is_cold_part() {
            not_functions += 1;
            continue;
        }
        match module.site(function) {
            Ok(site) if site.kind == SiteKind::Nop5 => nops += 1,
            Ok(_) => relocated += 1,
            Err(refusal) => {
                if matches!(&refusal, Refusal::CallInPrologue { if_pushed: Some(_), .. }) {
                    pushed += 1;
                }
                *refused.entry(refusal.reason()).or_default() += 1;
                if verbose {
                    println!("    {} {}: {refusal}", function.address, function.display_name());
                }
            }
        }
    }
    let attachable = nops + relocated;
    let total = attachable + refused.values().sum::<u32>();
    let percent = |part: u32| 100.0 * f64::from(part) / f64::from(total.max(1));
    println!(
        "{path}: {attachable} of {total} functions attachable ({:.2} %; {:.2} % where images may \
         push return addresses), {nops} at nops; {not_functions} ifunc resolvers and cold parts; {} ms{}",
        percent(attachable),
        percent(attachable + pushed),
        start.elapsed().as_millis(),
        if debug.is_some() { "; with its debug file" } else { "" },
    );
    report_signatures(&module, verbose);
    for (reason, count) in refused {
        println!("  {count:6}  {reason}");
    }
    Ok(())
}

/// How many functions DWARF describes, and for how many of all the stack words are proved.
fn report_signatures(module: &Module<'_>, verbose: bool) {
    let start = Instant::now();
    let (mut total, mut dwarf, mut proved) = (0, 0, 0);
    let mut reasons: BTreeMap<String, u32> = BTreeMap::new();
    for function in module.functions() {
        if function.kind == FunctionKind::Ifunc || function.is_cold_part() {
            continue;
        }
        total += 1;
        let signature = module.signature(function);
        let proof = module.stack_words_proof(function);
        proved += u32::from(matches!(proof, StackWords::Proved(_)));
        dwarf += u32::from(signature.source == SignatureSource::Dwarf);
        let why = unknown(&signature);
        if verbose && why.iter().any(|why| why != "no debug information") {
            println!("    {}", signature.declaration(&function.display_name()));
            why.iter().for_each(|why| println!("        {why}"));
        }
        for why in why {
            *reasons.entry(why).or_default() += 1;
        }
        if let (StackWords::Known(known), StackWords::Proved(read)) = (signature.stack_words, proof)
            && verbose
            && read != known
        {
            println!("    {}: {known} stack words, {read} read", function.display_name());
        }
    }
    println!(
        "  signatures: {dwarf} of {total} from DWARF; stack words of {proved} proved from code; {} ms",
        start.elapsed().as_millis()
    );
    for (reason, count) in reasons {
        println!("  {count:6}  {reason}");
    }
}

/// What a signature leaves open, and why.
fn unknown(signature: &Signature) -> Vec<String> {
    let guessed = signature.doubt.iter().map(ToString::to_string);
    let params = signature.params.iter().filter_map(|param| param.absent.as_ref());
    // Names would make every reason another one.
    let reason = |what: &str, absent: &Absent| match absent {
        Absent::Behind(_) => format!("{what} comes behind one whose place is not known"),
        _ => format!("{what}: {absent}"),
    };
    guessed
        .chain(params.map(|absent| reason("a parameter", absent)))
        .chain(signature.ret.absent.iter().map(|absent| reason("a result", absent)))
        .collect()
}

fn debug_file(module: &Module<'_>) -> Option<Vec<u8>> {
    let id = module.build_id()?;
    let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let (head, tail) = hex.split_at_checked(2)?;
    std::fs::read(format!("/usr/lib/debug/.build-id/{head}/{tail}.debug")).ok()
}
