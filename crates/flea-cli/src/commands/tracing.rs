//! `flea count`, `latency`, `hist`, `trace`: attach, let the target run, take off, print.

use anyhow::{Result, bail};
use flea::{
    Function,
    builtin::{Call, Count, Expr, Histograms, Refused, Trace, Word},
};
use serde_json::{Value, json};

use crate::{
    args::{Functions, Hist},
    output::{Output, basename, nanoseconds},
    plain,
    record::Record,
    target::Target,
};

/// Reasons shown one by one; the rest is counted.
const MAX_REASONS: usize = 5;

/// `flea count`
pub fn count(args: &Functions) -> Result<u8> {
    let mut output = Output::open(&args.common)?;
    let mut target = Target::open(&args.target, &args.span)?;
    let functions = target.find(&args.patterns)?;
    let mut count = Count::start(&target.session, &functions)?;
    report_start(count.functions(), count.refused())?;
    target.run(|| Ok(()))?;
    count.detach()?;
    let mut rows: Vec<_> = count.functions().iter().zip(count.read()).collect();
    rows.sort_by_key(|row| std::cmp::Reverse(row.1));
    for (function, n) in rows {
        let name = function.name();
        output.record(&Record::Count { module: function.module(), function: &name, count: n })?;
        if n > 0 || args.patterns.len() + count.functions().len() <= 20 {
            output.line(format!("{n:>14}  {}:{name}", basename(function.module())))?;
        }
    }
    let (missed, lost) = (count.missed(), count.lost());
    summary(&mut output, count.functions().len(), count.refused().len(), missed, lost)?;
    drop(count);
    target.finish()
}

/// `flea latency`
pub fn latency(args: &Functions) -> Result<u8> {
    let mut output = Output::open(&args.common)?;
    let mut target = Target::open(&args.target, &args.span)?;
    let functions = target.find(&args.patterns)?;
    let histograms = Histograms::of_duration(&target.session, &functions)?;
    print_histograms(histograms, &mut target, &mut output)?;
    target.finish()
}

/// `flea hist`
pub fn hist(args: &Hist) -> Result<u8> {
    let mut output = Output::open(&args.common)?;
    let mut target = Target::open(&args.target, &args.span)?;
    let functions = target.find(std::slice::from_ref(&args.function))?;
    let [function] = functions.as_slice() else {
        let names: Vec<_> = functions.iter().take(MAX_REASONS).map(Function::name).collect();
        bail!(
            "`{}` means {} functions ({}, ...); name one",
            args.function,
            functions.len(),
            names.join(", ")
        );
    };
    let histograms = Histograms::of(&target.session, function, &Expr::parse(&args.expr))?;
    print_histograms(histograms, &mut target, &mut output)?;
    target.finish()
}

fn print_histograms(
    mut histograms: Histograms,
    target: &mut Target,
    output: &mut Output,
) -> Result<()> {
    report_start(histograms.functions(), histograms.refused())?;
    target.run(|| Ok(()))?;
    histograms.detach()?;
    let read = histograms.read();
    let many = read.len() > 10;
    for (function, histogram) in histograms.functions().iter().zip(&read) {
        if output.is_json() || histogram.count > 0 || !many {
            let value = histograms.value();
            output.histogram(function.module(), &function.name(), value, histogram)?;
        }
    }
    let (missed, lost) = (histograms.missed(), histograms.lost());
    summary(output, histograms.functions().len(), histograms.refused().len(), missed, lost)
}

/// `flea trace`
pub fn trace(args: &Functions) -> Result<u8> {
    let mut output = Output::open(&args.common)?;
    let mut target = Target::open(&args.target, &args.span)?;
    let functions = target.find(&args.patterns)?;
    let mut trace = Trace::start(&target.session, &functions)?;
    report_start(trace.functions(), trace.refused())?;
    target.run(|| {
        trace.poll(|call| print_call(&mut output, &call))?;
        output.flush()
    })?;
    trace.detach()?;
    trace.drain(|call| print_call(&mut output, &call))?;
    if trace.n_open() > 0 {
        eprintln!("flea: {} calls were entered and have not returned", trace.n_open());
    }
    let (missed, lost) = (trace.missed(), trace.lost());
    summary(&mut output, trace.functions().len(), trace.refused().len(), missed, lost)?;
    drop(trace);
    target.finish()
}

fn print_call(output: &mut Output, call: &Call<'_>) -> Result<()> {
    let name = call.function.name();
    if !output.is_json() {
        let args: Vec<_> =
            call.args.iter().map(|(name, value)| format!("{name}={}", text(value))).collect();
        let bare = name.split('(').next().unwrap_or(&name);
        let retval = call.retval.as_ref().map(|r| format!(" = {}", text(r))).unwrap_or_default();
        return output.line(format!(
            "{}.{:09} {:>7} {bare}({}){retval} <{}>",
            call.time_ns / 1_000_000_000,
            call.time_ns % 1_000_000_000,
            call.tid,
            args.join(", "),
            nanoseconds(call.duration_ns.into()),
        ));
    }
    output.record(&Record::Call {
        time_ns: call.time_ns,
        pid: call.pid,
        tid: call.tid,
        module: call.function.module(),
        function: &name,
        args: call.args.iter().map(|(name, value)| (name.clone(), json_value(value))).collect(),
        retval: call.retval.as_ref().map(json_value),
        duration_ns: call.duration_ns,
    })
}

fn text(value: &Word) -> String {
    match value {
        Word::Signed(v) => v.to_string(),
        Word::Unsigned(v) => v.to_string(),
        Word::Pointer(0) => "NULL".to_owned(),
        Word::Pointer(v) => format!("{v:#x}"),
        Word::Float(v) => v.to_string(),
        Word::Text { pointer: 0, .. } => "NULL".to_owned(),
        Word::Text { bytes, .. } => format!("{:?}", String::from_utf8_lossy(bytes)),
        Word::Words(words) => {
            let words: Vec<_> = words.iter().map(|w| format!("{w:#x}")).collect();
            format!("{{{}}}", words.join(", "))
        }
    }
}

fn json_value(value: &Word) -> Value {
    match value {
        Word::Signed(v) => json!(v),
        Word::Unsigned(v) => json!(v),
        Word::Pointer(v) => json!(format!("{v:#x}")),
        Word::Float(v) => json!(v),
        Word::Text { pointer: 0, .. } => Value::Null,
        Word::Text { bytes, .. } => json!(String::from_utf8_lossy(bytes)),
        Word::Words(words) => json!(words.iter().map(|w| format!("{w:#x}")).collect::<Vec<_>>()),
    }
}

/// Says what was attached to; fails where that is nothing.
fn report_start(attached: &[Function], refused: &[Refused]) -> Result<()> {
    if let ([], [first, rest @ ..]) = (attached, refused) {
        let more = match rest.len() {
            0 => String::new(),
            n => format!(" (and {n} more functions were refused; see `flea list`)"),
        };
        bail!("{}{more}; nothing was changed", first.reason);
    }
    for one in refused.iter().take(MAX_REASONS) {
        eprintln!("flea: not attached: {}", plain::text(&one.reason.to_string()));
    }
    if let Some(more @ 1..) = refused.len().checked_sub(MAX_REASONS) {
        eprintln!("flea: not attached: {more} more; `flea list` says why");
    }
    say_attached(attached.len());
    Ok(())
}

/// Says, on standard error, that everything is in place: scripts wait for this line.
pub fn say_attached(n_functions: usize) {
    let plural = if n_functions == 1 { "" } else { "s" };
    eprintln!("flea: attached to {n_functions} function{plural}");
}

/// The last line of every tracing command.
pub fn summary(
    output: &mut Output,
    attached: usize,
    refused: usize,
    missed: u64,
    lost: u64,
) -> Result<()> {
    output.record(&Record::Summary { attached, refused, missed, lost })?;
    if missed > 0 || lost > 0 {
        eprintln!(
            "flea: {missed} program runs were skipped, {lost} records were lost for want of room"
        );
    }
    output.flush()
}
