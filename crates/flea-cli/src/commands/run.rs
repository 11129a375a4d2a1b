//! `flea run FILE.bpf.o`: attaches every program of an object to the functions its section
//! names, prints what it writes with `bpf_printk`, and its maps at the end.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow, bail};
use flea::{
    AttachError, Attachment, Function, Link, Map, MapError, MapIdx, MapSpec, Object, Permissions,
    Program, Session,
};
use serde_json::{Value, json};

use crate::{
    args::Run,
    commands::tracing::{say_attached, summary},
    family::{Family, Probe, Totals},
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
    let chosen = choose(&target.session, &object, args.verbose)
        .or_else(|e| explain(e, args.verbose, &mut output))?;
    if chosen.attachments.is_empty() {
        bail!("{path}: no program to attach (all sections begin with `?`)");
    }
    let running = Running::start(object.clone(), &chosen)?;
    say_attached(running.n_attached());
    let mut family = Family::of_object(&target, running, |session| again(&object, session));
    target.run_meeting(|met| {
        if let Some((following, event)) = met {
            return family.meet(following, event, |_| Ok(()));
        }
        print_lines(&object, &mut output)?;
        output.flush()
    })?;
    let (totals, all_off) = family.close(target.following(), |_| Ok(()))?;
    print_lines(&object, &mut output)?;
    for map in object.maps() {
        print_map(&object, map, &mut output)?;
    }
    // All of them work on the same maps.
    let (missed, lost) = (object.missed(), object.lost());
    summary(&mut output, Totals { missed, lost, ..totals })?;
    drop(object);
    all_off?;
    target.finish()
}

/// The object's programs on one program's functions.
struct Running {
    /// Its memory in that process is taken back behind the programs.
    _object: Object,
    link: Option<Link>,
    n_attached: usize,
    n_left_out: usize,
}

impl Running {
    fn start(object: Object, chosen: &Chosen) -> Result<Self> {
        let link = object.attach(&chosen.attachments)?;
        let (n_attached, n_left_out) = (link.n_functions(), chosen.n_left_out);
        Ok(Self { _object: object, link: Some(link), n_attached, n_left_out })
    }
}

impl Probe for Running {
    fn n_attached(&self) -> usize {
        self.n_attached
    }
    fn n_refused(&self) -> usize {
        self.n_left_out
    }
    fn reasons(&self, _most: usize) -> Vec<String> {
        Vec::new()
    }
    fn missed(&self) -> u64 {
        0
    }
    fn lost(&self) -> u64 {
        0
    }
    fn detach(&mut self) -> Result<(), AttachError> {
        self.link.take().map_or(Ok(()), Link::detach)
    }
}

/// Attaches the same object to a program that is met later: those of its programs whose functions
/// are there.
fn again(object: &Object, session: &Session) -> Result<Option<Running>> {
    let found = |program: Program| {
        let pattern = program.target().filter(|_| program.autoload())?;
        session.find(pattern).ok()
    };
    let functions: Vec<_> = object.programs().map(found).collect();
    if functions.iter().all(Option::is_none) {
        return Ok(None);
    }
    let shared = object.share_with(session)?;
    let mut chosen = Chosen::default();
    for (program, functions) in shared.programs().zip(functions) {
        if let Some(functions) = functions {
            choose_among(&program, &functions, false, &mut chosen)?;
        }
    }
    Running::start(shared, &chosen).map(Some)
}

/// What is to be attached.
#[derive(Default)]
struct Chosen {
    attachments: Vec<Attachment>,
    /// Functions that a `.multi` program's pattern names and that it cannot be attached to.
    n_left_out: usize,
}

fn choose(session: &Session, object: &Object, verbose: bool) -> Result<Chosen> {
    let mut chosen = Chosen::default();
    for program in object.programs().filter(Program::autoload) {
        choose_for(session, &program, verbose, &mut chosen)?;
    }
    Ok(chosen)
}

fn choose_for(
    session: &Session,
    program: &Program,
    verbose: bool,
    chosen: &mut Chosen,
) -> Result<()> {
    let Some(pattern) = program.target() else {
        if program.is_in_program_array() {
            return Ok(());
        }
        bail!(
            "program `{}`: its section names no function; write SEC(\"{}/FUNCTION\")",
            program.name(),
            program.kind().name()
        );
    };
    let functions =
        session.find(pattern).with_context(|| format!("program `{}`", program.name()))?;
    choose_among(program, &functions, verbose, chosen)
}

fn choose_among(
    program: &Program,
    functions: &[Function],
    verbose: bool,
    chosen: &mut Chosen,
) -> Result<()> {
    if program.multi() {
        return choose_possible(program, functions, verbose, chosen);
    }
    for function in functions {
        check(program, function, verbose)?;
        chosen.attachments.push(program.on(function, 0));
    }
    Ok(())
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
