//! `flea run FILE.bpf.o`: attaches every program of an object to the functions its section
//! names, prints what it writes with `bpf_printk`, and its maps at the end.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow, bail};
use flea::{
    AttachError, Attachment, Function, Map, MapError, MapIdx, MapSpec, Object, Permissions, Program,
};
use serde_json::{Value, json};

use crate::{
    args::Run,
    commands::tracing::{say_attached, summary},
    output::Output,
    plain,
    record::Record,
    report,
    target::Target,
};

/// `flea run`
pub fn run(args: &Run) -> Result<u8> {
    let path = args.file.display();
    let bytes = std::fs::read(&args.file).with_context(|| format!("cannot read {path}"))?;
    let spec = flea::parse_object(&bytes).with_context(|| format!("{path}"))?;
    let mut output = Output::open(&args.common)?;
    let mut target = Target::open(&args.target, &args.span)?;
    target.session.permit(Permissions { write_target: args.allow_write });
    let object = target.session.load(spec)?;
    let Chosen { attachments, n_left_out } = choose(&target, &object, args.verbose)
        .or_else(|e| explain(e, args.verbose, &mut output))?;
    if attachments.is_empty() {
        bail!("{path}: no program to attach (all sections begin with `?`)");
    }
    let link = object.attach(&attachments)?;
    let n_functions = link.n_functions();
    say_attached(n_functions);
    target.run(|| {
        print_lines(&object, &mut output)?;
        output.flush()
    })?;
    link.detach()?;
    print_lines(&object, &mut output)?;
    for map in object.maps() {
        print_map(&object, map, &mut output)?;
    }
    summary(&mut output, n_functions, n_left_out, object.missed(), object.lost())?;
    drop(object);
    target.finish()
}

/// What is to be attached.
#[derive(Default)]
struct Chosen {
    attachments: Vec<Attachment>,
    /// Functions that a `.multi` program's pattern names and that it cannot be attached to.
    n_left_out: usize,
}

fn choose(target: &Target, object: &Object, verbose: bool) -> Result<Chosen> {
    let mut chosen = Chosen::default();
    for program in object.programs().filter(Program::autoload) {
        let Some(pattern) = program.target() else {
            if program.is_in_program_array() {
                continue;
            }
            bail!(
                "program `{}`: its section names no function; write SEC(\"{}/FUNCTION\")",
                program.name(),
                program.kind().name()
            );
        };
        let functions = target
            .session
            .find(pattern)
            .with_context(|| format!("program `{}`", program.name()))?;
        if program.multi() {
            choose_possible(&program, &functions, verbose, &mut chosen)?;
            continue;
        }
        for function in &functions {
            check(&program, function, verbose)?;
            chosen.attachments.push(program.on(function, 0));
        }
    }
    Ok(chosen)
}

/// Those of `functions` that `program` can be attached to; says what is left out and why.
fn choose_possible(
    program: &Program,
    functions: &[Function],
    verbose: bool,
    chosen: &mut Chosen,
) -> Result<()> {
    let mut left_out: BTreeMap<&str, usize> = BTreeMap::new();
    let mut first_error = None;
    let n_before = chosen.attachments.len();
    for function in functions {
        match check(program, function, verbose) {
            Ok(()) => chosen.attachments.push(program.on(function, 0)),
            Err(error) => {
                *left_out.entry(error.reason()).or_default() += 1;
                first_error.get_or_insert(error);
            }
        }
    }
    if let (Some(error), true) = (first_error, chosen.attachments.len() == n_before) {
        return Err(error.into());
    }
    let n: usize = left_out.values().sum();
    if n > 0 {
        let reasons: Vec<String> =
            left_out.iter().map(|(reason, n)| format!("{reason}: {n}")).collect();
        eprintln!(
            "flea: program `{}`: {n} of {} functions are left out ({}); `flea list` says more",
            program.name(),
            functions.len(),
            reasons.join(", ")
        );
    }
    chosen.n_left_out += n;
    Ok(())
}

/// What to tell of a program that cannot be attached: of a refusal the way there, unless all of
/// the log was printed, and the report.
fn explain<T>(error: anyhow::Error, verbose: bool, output: &mut Output) -> Result<T> {
    let error = error.downcast::<AttachError>()?;
    if let AttachError::Rejected { program, function, rejection } = &error {
        if !verbose {
            report::log(rejection).iter().for_each(|line| eprintln!("{}", plain::text(line)));
        }
        eprintln!("{}", plain::text(&report::text(rejection)));
        output.record(&Record::Rejected { program, function, rejection })?;
        output.flush()?;
    }
    Err(anyhow!("{error}; nothing was changed"))
}

/// Whether `program` can be attached to `function`; prints the verifier's log if asked to.
fn check(program: &Program, function: &Function, verbose: bool) -> Result<(), AttachError> {
    let mut is_first = true;
    let mut line = |line: &str| {
        if std::mem::take(&mut is_first) {
            eprintln!("flea: verifying program `{}` on {}", program.name(), function.name());
        }
        eprintln!("{}", plain::text(line));
    };
    let outcome = match verbose {
        true => program.check_logged(function, &mut line),
        false => program.check(function),
    };
    outcome.map(drop)
}

fn print_lines(object: &Object, output: &mut Output) -> Result<()> {
    let mut outcome = Ok(());
    object.printk(|line| {
        if outcome.is_ok() {
            outcome = output
                .line(line)
                .and_then(|()| output.record(&Record::Printk { message: line.to_owned() }));
        }
    });
    outcome
}

/// Every element that is not all zeros: what programs have put there.
fn print_map(object: &Object, spec: &MapSpec, output: &mut Output) -> Result<()> {
    if spec.read_only {
        return Ok(());
    }
    let element = |output: &mut Output, key: Value, values: &[Vec<u8>], per_thread: bool| {
        if values.iter().flatten().all(|&byte| byte == 0) {
            return Ok(());
        }
        let value = if per_thread {
            Value::Array(values.iter().map(|v| number(v)).collect())
        } else {
            values.first().map_or(Value::Null, |v| number(v))
        };
        output.line(format!("{}[{key}] = {value}", spec.name))?;
        output.record(&Record::Map { map: &spec.name, key, value })
    };
    match object.map(&spec.name) {
        Some(Map::Array(map)) => {
            for (index, value) in map.iter().enumerate() {
                element(output, json!(index), &[value], false)?;
            }
        }
        Some(Map::PerCpuArray(map)) => {
            for index in 0..map.len() {
                element(output, json!(index), &map.get(index)?, true)?;
            }
        }
        Some(Map::Hash(map)) => {
            for (key, value) in map.iter() {
                element(output, number(&key), &[value], false)?;
            }
        }
        Some(Map::PerCpuHash(map)) => {
            for (key, values) in map.iter() {
                element(output, number(&key), &values, true)?;
            }
        }
        Some(Map::ArrayOfMaps(map)) => {
            for index in 0..map.len() {
                print_inner_map(object, spec, json!(index), map.get(index), output)?;
            }
        }
        Some(Map::HashOfMaps(map)) => {
            for key in map.keys() {
                print_inner_map(object, spec, number(&key), map.lookup(&key), output)?;
            }
        }
        Some(Map::RingBuf(_)) | None => {}
    }
    Ok(())
}

/// Which map is there; what is in it stands under its own name.
fn print_inner_map(
    object: &Object,
    spec: &MapSpec,
    key: Value,
    inner: Result<Option<MapIdx>, MapError>,
    output: &mut Output,
) -> Result<()> {
    let inner = inner.with_context(|| format!("map `{}`", spec.name))?;
    let Some(inner) = inner.and_then(|index| object.maps().get(index.0 as usize)) else {
        return Ok(());
    };
    output.line(format!("{}[{key}] = {}", spec.name, inner.name))?;
    output.record(&Record::Map { map: &spec.name, key, value: json!(inner.name) })
}

/// Up to eight bytes are a number, little-endian; more are hex.
fn number(bytes: &[u8]) -> Value {
    if bytes.len() <= 8 {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        return json!(u64::from_le_bytes(word));
    }
    json!(bytes.iter().map(|b| format!("{b:02x}")).collect::<String>())
}
