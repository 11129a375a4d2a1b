//! `flea count`, `latency`, `hist`, `trace`: attach, let the target run, take off, print.

use std::collections::HashMap;

use anyhow::{Result, bail};
use flea::{
    Function,
    builtin::{Call, Count, Expr, Histogram, Histograms, Trace, Word},
};
use serde_json::{Value, json};

use crate::{
    args::{Functions, Hist},
    family::{Family, Probe, Totals},
    output::{Output, basename, n_functions, nanoseconds},
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
    let family =
        Family::of_functions(&target, &args.patterns, args.wait.pending, |session, functions| {
            Ok(Count::start(session, functions)?)
        })?;
    let mut rows: Rows<u64> = Rows::default();
    let (totals, all_off) = measure(family, &mut target, |count| {
        let read = count.read();
        rows.add(count.functions(), read, |sum, n| *sum = sum.wrapping_add(n));
        Ok(())
    })?;
    let mut rows = rows.0;
    rows.sort_by_key(|row| std::cmp::Reverse(row.value));
    let n_rows = rows.len();
    for Row { module, name, value: n, .. } in &rows {
        output.record(&Record::Count { module, function: name, count: *n })?;
        if *n > 0 || args.patterns.len() + n_rows <= 20 {
            output.line(format!("{n:>14}  {}:{name}", basename(module)))?;
        }
    }
    summary(&mut output, totals)?;
    all_off?;
    target.finish()
}

/// `flea latency`
pub fn latency(args: &Functions) -> Result<u8> {
    let mut output = Output::open(&args.common)?;
    let mut target = Target::open(&args.target, &args.span)?;
    let family =
        Family::of_functions(&target, &args.patterns, args.wait.pending, |session, functions| {
            Ok(Histograms::of_duration(session, functions)?)
        })?;
    print_histograms(family, &mut target, &mut output)?;
    target.finish()
}

/// `flea hist`
pub fn hist(args: &Hist) -> Result<u8> {
    let mut output = Output::open(&args.common)?;
    let mut target = Target::open(&args.target, &args.span)?;
    let expr = Expr::parse(&args.expr);
    let patterns = std::slice::from_ref(&args.function);
    let family =
        Family::of_functions(&target, patterns, args.wait.pending, |session, functions| {
            let [function] = functions else {
                let names: Vec<_> =
                    functions.iter().take(MAX_REASONS).map(Function::name).collect();
                bail!(
                    "`{}` means {} functions ({}, ...); name one",
                    args.function,
                    functions.len(),
                    names.join(", ")
                );
            };
            Ok(Histograms::of(session, function, &expr)?)
        })?;
    print_histograms(family, &mut target, &mut output)?;
    target.finish()
}

fn print_histograms(
    family: Family<'_, Histograms>,
    target: &mut Target,
    output: &mut Output,
) -> Result<()> {
    let mut rows: Rows<(String, Histogram)> = Rows::default();
    let (totals, all_off) = measure(family, target, |histograms| {
        let value = histograms.value();
        let read = histograms.read().into_iter().map(|one| (value.to_owned(), one)).collect();
        rows.add(histograms.functions(), read, |sum, one| {
            sum.0 = one.0;
            sum.1.merge(&one.1);
        });
        Ok(())
    })?;
    let many = rows.0.len() > 10;
    for Row { module, name, value: (value, histogram), .. } in &rows.0 {
        if output.is_json() || histogram.count > 0 || !many {
            output.histogram(module, name, value, histogram)?;
        }
    }
    summary(output, totals)?;
    all_off
}

/// `flea trace`
pub fn trace(args: &Functions) -> Result<u8> {
    let mut output = Output::open(&args.common)?;
    let mut target = Target::open(&args.target, &args.span)?;
    let mut family =
        Family::of_functions(&target, &args.patterns, args.wait.pending, |session, functions| {
            Ok(Trace::start(session, functions)?)
        })?;
    report_start(&family)?;
    let mut n_open = 0;
    let mut finish = |trace: &mut Trace, output: &mut Output| -> Result<()> {
        trace.drain(|call| print_call(output, &call))?;
        n_open += trace.n_open();
        Ok(())
    };
    target.run_meeting(|met| {
        if let Some((following, event)) = met {
            return family.meet(following, event, |trace| finish(trace, &mut output));
        }
        family.look()?;
        for trace in family.probes() {
            trace.poll(|call| print_call(&mut output, &call))?;
        }
        output.flush()
    })?;
    let (totals, all_off) = family.close(target.following(), |trace| finish(trace, &mut output))?;
    if n_open > 0 {
        eprintln!("flea: {n_open} calls were entered and have not returned");
    }
    summary(&mut output, totals)?;
    all_off?;
    target.finish()
}

/// Lets the target run, and hands what each program had to `add`. The results are those of
/// [`Family::close`].
fn measure<P: Probe>(
    mut family: Family<'_, P>,
    target: &mut Target,
    mut add: impl FnMut(&mut P) -> Result<()>,
) -> Result<(Totals, Result<()>)> {
    report_start(&family)?;
    target.run_meeting(|met| match met {
        Some((following, event)) => family.meet(following, event, &mut add),
        None => family.look(),
    })?;
    family.close(target.following(), add)
}

/// What was measured of a function, in whichever program it was.
struct Row<T> {
    module: String,
    name: String,
    /// Which of those that bear the name in their module.
    number: usize,
    value: T,
}

/// One for each function, in the order in which they were met.
struct Rows<T>(Vec<Row<T>>);

impl<T> Default for Rows<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T: Default> Rows<T> {
    /// Adds what one program had.
    fn add(&mut self, functions: &[Function], values: Vec<T>, add: impl Fn(&mut T, T)) {
        let key = |row: &Row<T>| (row.module.clone(), row.name.clone(), row.number);
        let mut known: HashMap<_, usize> =
            self.0.iter().enumerate().map(|(at, row)| (key(row), at)).collect();
        let mut numbers: HashMap<(String, String), usize> = HashMap::new();
        for (function, value) in functions.iter().zip(values) {
            let (module, name) = (function.module().to_owned(), function.name());
            let number = numbers.entry((module.clone(), name.clone())).or_default();
            *number += 1;
            let at = *known.entry((module.clone(), name.clone(), *number)).or_insert(self.0.len());
            if at == self.0.len() {
                self.0.push(Row { module, name, number: *number, value: T::default() });
            }
            add(&mut self.0[at].value, value);
        }
    }
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

/// Says what was attached to; fails where that is nothing, unless it is only waited for.
fn report_start(family: &Family<'_, impl Probe>) -> Result<()> {
    let Some(probe) = family.first() else {
        say_attached(0);
        return Ok(());
    };
    let (n_attached, n_refused) = (probe.n_attached(), probe.n_refused());
    let reasons = probe.reasons(MAX_REASONS);
    if let (0, Some(reason)) = (n_attached, reasons.first()) {
        let more = match n_refused - 1 {
            0 => String::new(),
            n => format!(" (and {n} more functions were refused; see `flea list`)"),
        };
        bail!("{reason}{more}; nothing was changed");
    }
    for reason in &reasons {
        eprintln!("flea: not attached: {}", plain::text(reason));
    }
    if let Some(more @ 1..) = n_refused.checked_sub(MAX_REASONS) {
        eprintln!("flea: not attached: {more} more; `flea list` says why");
    }
    say_attached(n_attached);
    Ok(())
}

/// Says, on standard error, that everything is in place: scripts wait for this line.
pub fn say_attached(n_attached: usize) {
    eprintln!("flea: attached to {}", n_functions(n_attached));
}

/// The last line of every tracing command.
pub fn summary(output: &mut Output, totals: Totals) -> Result<()> {
    let Totals { attached, refused, missed, lost } = totals;
    output.record(&Record::Summary { attached, refused, missed, lost })?;
    if missed > 0 || lost > 0 {
        eprintln!(
            "flea: {missed} program runs were skipped, {lost} records were lost for want of room"
        );
    }
    output.flush()
}
