//! `flea ps` and `flea detach`: over what any `flea` has left or is keeping in any process.

use anyhow::{Context as _, Result, bail};
use flea::attached::{self, AttachedBody};

use crate::{
    args::{Detach, Ps},
    output::{Output, basename},
    plain,
    record::Record,
};

/// `flea ps`
pub fn ps(args: &Ps) -> Result<u8> {
    let mut output = Output::open(&args.common)?;
    let (bodies, unreadable) = match args.pid {
        Some(pid) => (attached::in_process(pid)?, Vec::new()),
        None => attached::everywhere(),
    };
    if !bodies.is_empty() {
        output.line(format!("{:<14} {:<30} {:<28} {}", "ID", "FUNCTION", "PROGRAMS", "BY"))?;
    }
    for body in &bodies {
        let id = id(body);
        let programs: Vec<String> =
            body.programs.iter().map(|(kind, name)| format!("{kind}/{name}")).collect();
        output.line(format!(
            "{id:<14} {:<30} {:<28} {}{}{}{}",
            plain::name(&format!("{}:{}", basename(&body.module), body.function)),
            plain::name(&programs.join(",")),
            body.controller,
            if body.controller_alive { "" } else { " (gone)" },
            if body.writes_target { " writes" } else { "" },
            changes(body),
        ))?;
        output.record(&Record::Attached {
            id,
            pid: body.pid,
            module: &body.module,
            function: &body.function,
            programs,
            writes_target: body.writes_target,
            changes: &body.changes,
            controller: body.controller,
            controller_alive: body.controller_alive,
            since: body.since,
        })?;
    }
    for error in unreadable {
        eprintln!("flea: {}", plain::text(&error.to_string()));
    }
    output.flush()?;
    Ok(0)
}

/// `flea detach`
pub fn detach(args: &Detach) -> Result<u8> {
    let mut output = Output::open(&args.common)?;
    let bodies = if args.all {
        let (bodies, unreadable) = attached::everywhere();
        for error in unreadable {
            eprintln!("flea: {}", plain::text(&error.to_string()));
        }
        bodies
    } else {
        args.ids.iter().map(|id| named(id)).collect::<Result<Vec<_>>>()?.concat()
    };
    for (pid, ids) in by_process(&bodies) {
        attached::detach(pid, &ids)
            .with_context(|| format!("process {pid}: nothing was detached"))?;
    }
    output.line(format!("detached {}", bodies.len()))?;
    output.flush()?;
    Ok(0)
}

/// ` changes rdi,rax`, or nothing.
fn changes(body: &AttachedBody) -> String {
    let all = body.changes.join(",");
    if all.is_empty() { all } else { format!(" changes {all}") }
}

fn id(body: &AttachedBody) -> String {
    format!("{}.{}", body.pid, body.id)
}

/// What `PID.N` or `PID` means now.
fn named(text: &str) -> Result<Vec<AttachedBody>> {
    let (pid, number) = match text.split_once('.') {
        Some((pid, number)) => (pid, Some(number)),
        None => (text, None),
    };
    let pid: i32 = pid.parse().with_context(|| format!("`{text}` is neither PID.N nor PID"))?;
    let bodies = attached::in_process(pid)?;
    let found: Vec<AttachedBody> =
        bodies.into_iter().filter(|b| number.is_none() || id(b) == text).collect();
    if found.is_empty() {
        bail!("{text}: nothing like that is attached; `flea ps` lists what is");
    }
    Ok(found)
}

fn by_process(bodies: &[AttachedBody]) -> std::collections::BTreeMap<i32, Vec<u32>> {
    let mut grouped = std::collections::BTreeMap::<i32, Vec<u32>>::new();
    for body in bodies {
        grouped.entry(body.pid).or_default().push(body.id);
    }
    grouped
}
