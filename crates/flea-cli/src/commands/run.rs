//! `flea run FILE.bpf.o`: attaches every program of an object to the functions its section
//! names, prints what it writes with `bpf_printk`, and its maps at the end.

use anyhow::{Context as _, Result, bail};
use flea::{Attachment, Map, MapSpec, Object};
use serde_json::{Value, json};

use crate::{
    args::Run,
    commands::tracing::{say_attached, summary},
    output::Output,
    record::Record,
    target::Target,
};

/// `flea run`
pub fn run(args: &Run) -> Result<u8> {
    let path = args.file.display();
    let bytes = std::fs::read(&args.file).with_context(|| format!("cannot read {path}"))?;
    let spec = flea::parse_object(&bytes).with_context(|| format!("{path}"))?;
    let mut output = Output::open(&args.common)?;
    let mut target = Target::open(&args.target, &args.span)?;
    let object = target.session.load(spec)?;
    let attachments = attachments(&target, &object)?;
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
    summary(&mut output, n_functions, 0, object.missed(), object.lost())?;
    drop(object);
    target.finish()
}

fn attachments(target: &Target, object: &Object) -> Result<Vec<Attachment>> {
    let mut attachments = Vec::new();
    for program in object.programs().filter(flea::Program::autoload) {
        let Some(pattern) = program.target() else {
            bail!(
                "program `{}`: its section names no function; write SEC(\"fentry/FUNCTION\")",
                program.name()
            );
        };
        let functions = target
            .session
            .find(pattern)
            .with_context(|| format!("program `{}`", program.name()))?;
        for function in &functions {
            if let Err(error) = program.check(function) {
                if let flea::AttachError::Rejected { rejection, .. } = &error {
                    for line in &rejection.log {
                        eprintln!("{line}");
                    }
                    if let Some(hint) = &rejection.hint {
                        eprintln!("hint: {hint}");
                    }
                }
                bail!("{error}; nothing was changed");
            }
            attachments.push(program.on(function, 0));
        }
    }
    Ok(attachments)
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
        Some(Map::RingBuf(_)) | None => {}
    }
    Ok(())
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
