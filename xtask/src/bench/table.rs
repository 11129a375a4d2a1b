//! The bench's results as text for people and as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Error, Result};
use serde_json::{Value, json};

use super::attach::{Bulk, Pause, Stall, Stalls};
use super::goals::Goal;
use super::multi::Multi;
use super::rows::{Hit, Times};
use super::verify::{Cost, Verification};

/// The chain of an error in one line.
fn reason(error: &Error) -> String {
    format!("{error:#}").replace('\n', "; ")
}

fn hit_line(times: &Times) -> String {
    let n_insns = times.n_insns.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let exact = match times.exact {
        Some(true) => "exact",
        Some(false) => "WRONG",
        None => "-",
    };
    format!(
        "{:9.2} {:9.2} {:9.2} {:9.2} {n_insns:>7} {exact:>7}",
        times.ns, times.added_ns, times.ratio, times.median_ratio
    )
}

/// The cost of a hit, a line per row.
pub fn hits(hits: &[Hit], n_rounds: usize) -> String {
    let mut text = format!(
        "one call, one thread; lower quartiles of {n_rounds} interleaved rounds\n\
         {:36} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7}\n",
        "", "ns", "added ns", "x by hand", "x median", "insns", "count"
    );
    for hit in hits {
        let line = match &hit.outcome {
            Ok(times) => hit_line(times),
            Err(e) => format!("not measured: {}", reason(e)),
        };
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{:36} {line}", hit.row.label);
    }
    text
}

/// What is wanted of the costs, a line per goal.
pub fn goals(goals: &[Goal]) -> String {
    let mut text = format!(
        "from the same rounds\n{:36} {:>9} {:>9} {:>9}\n",
        "", "quartile", "median", "wanted"
    );
    let number = |n: Option<f64>| n.map_or_else(|| "-".to_owned(), |n| format!("{n:.2}"));
    for goal in goals {
        let Goal { label, value, median, wanted } = *goal;
        let (value, median) = (number(value), number(median));
        let wanted = wanted.map_or_else(String::new, |wanted| format!("<= {wanted}"));
        let _ = writeln!(text, "{label:36} {value:>9} {median:>9} {wanted:>9}");
    }
    text
}

/// Attaching to many functions, a line per size.
pub fn attaches(bulks: &[Bulk]) -> String {
    let mut text = format!(
        "flea count on many functions at once, the command's own start and end included\n\
         {:>10} {:>12} {:>12}\n",
        "functions", "attach ms", "detach ms"
    );
    for bulk in bulks {
        let line = match &bulk.outcome {
            Ok(times) => format!(
                "{:12.2} {:12.2}",
                times.attach.as_secs_f64() * 1e3,
                times.detach.as_secs_f64() * 1e3
            ),
            Err(e) => format!("not measured: {}", reason(e)),
        };
        let _ = writeln!(text, "{:>10} {line}", bulk.n_functions);
    }
    text
}

/// Ten thousand functions at once beside the kernel's link, a line each.
pub fn multi(all: &Result<Vec<Result<Multi>>>) -> String {
    let mut text = format!(
        "10 000 functions at once, medians; images included, reading symbols not\n\
         {:<20} {:>12} {:>12}\n",
        "", "on ms", "off ms"
    );
    let _ = match all {
        Err(e) => writeln!(text, "not measured: {}", reason(e)),
        Ok(rows) => rows.iter().try_for_each(|row| match row {
            Ok(Multi { what, on_ms, off_ms }) => {
                writeln!(text, "{what:<20} {on_ms:12.2} {off_ms:12.2}")
            }
            Err(e) => writeln!(text, "not measured: {}", reason(e)),
        }),
    };
    text
}

/// The same as JSON.
pub fn multi_json(all: &Result<Vec<Result<Multi>>>) -> Value {
    let row = |row: &Result<Multi>| match row {
        Ok(Multi { what, on_ms, off_ms }) => {
            json!({ "what": what, "on_ms": on_ms, "off_ms": off_ms })
        }
        Err(e) => json!({ "error": reason(e) }),
    };
    match all {
        Ok(rows) => rows.iter().map(row).collect(),
        Err(e) => json!({ "error": reason(e) }),
    }
}

/// The longest pause, in a line.
pub fn pause(pause: &Result<Pause>) -> String {
    let line = match pause {
        Ok(pause) => format!(
            "{} ns while attaching and detaching, {} ns while nothing happens",
            pause.attach_ns, pause.idle_ns
        ),
        Err(e) => format!("not measured: {}", reason(e)),
    };
    format!("longest pause of a busy thread (median): {line}")
}

/// The longest calls of threads that run through what is attached to, a line per size.
pub fn stalls(all: &[Stalls]) -> String {
    let mut text = format!(
        "longest call in ms, flea attaching and detaching: stopped, and with the wait for a CPU\n\
         {:>10} {:>9} {:>9} {:>11} {:>9} {:>11} {:>9}\n",
        "functions", "median", "with wait", "longest", "with wait", "idle median", "with wait"
    );
    let ms = |ns: i64| Duration::from_nanos(ns.max(0).unsigned_abs()).as_secs_f64() * 1e3;
    for one in all {
        let line = match &one.outcome {
            Ok(times) => {
                let [attach, longest, idle] = [times.attach, times.longest, times.idle]
                    .map(|Stall { stopped_ns, all_ns }| (ms(stopped_ns), ms(all_ns)));
                format!(
                    "{:9.3} {:9.3} {:11.3} {:9.3} {:11.3} {:9.3}",
                    attach.0, attach.1, longest.0, longest.1, idle.0, idle.1
                )
            }
            Err(e) => format!("not measured: {}", reason(e)),
        };
        let _ = writeln!(text, "{:>10} {line}", one.n_functions);
    }
    text
}

/// The longest calls at one size as JSON.
pub fn stalls_json(one: &Stalls) -> Value {
    let n_functions = one.n_functions;
    let stall =
        |Stall { stopped_ns, all_ns }| json!({ "stopped_ns": stopped_ns, "all_ns": all_ns });
    match &one.outcome {
        Ok(times) => json!({
            "n_functions": n_functions,
            "idle": stall(times.idle),
            "attach": stall(times.attach),
            "longest": stall(times.longest),
        }),
        Err(e) => json!({ "n_functions": n_functions, "error": reason(e) }),
    }
}

/// What verifying costs, a line per program.
pub fn verifications(all: &[Verification]) -> String {
    let mut text = format!(
        "verifying a program, median; instructions, or visits of a loop's\n\
         {:<24} {:>10} {:>12} {:>12} {:>12}\n",
        "", "insns", "ms", "wanted", "peak KiB"
    );
    for one in all {
        let wanted = one.wanted.as_secs_f64() * 1e3;
        let line = match &one.outcome {
            Ok(Cost { time, peak_bytes }) => {
                let ms = time.as_secs_f64() * 1e3;
                format!("{ms:12.2} {wanted:12.0} {:12}", peak_bytes / 1024)
            }
            Err(e) => format!("not measured: {}", reason(e)),
        };
        let _ = writeln!(text, "{:<24} {:>10} {line}", one.shape, one.n_insns);
    }
    text
}

/// One verified program as JSON.
pub fn verification_json(one: &Verification) -> Value {
    let Verification { shape, n_insns, wanted, outcome } = one;
    match outcome {
        Ok(Cost { time, peak_bytes }) => json!({
            "shape": shape,
            "n_insns": n_insns,
            "ms": time.as_secs_f64() * 1e3,
            "wanted_ms": wanted.as_secs_f64() * 1e3,
            "peak_bytes": peak_bytes,
        }),
        Err(e) => json!({ "shape": shape, "n_insns": n_insns, "error": reason(e) }),
    }
}

/// One row as JSON.
pub fn hit_json(hit: &Hit) -> Value {
    match &hit.outcome {
        Ok(times) => json!({
            "label": hit.row.label,
            "ns": times.ns,
            "added_ns": times.added_ns,
            "ratio": times.ratio,
            "median_ratio": times.median_ratio,
            "n_insns": times.n_insns,
            "exact": times.exact,
        }),
        Err(e) => json!({ "label": hit.row.label, "error": reason(e) }),
    }
}

/// One goal as JSON.
pub fn goal_json(goal: &Goal) -> Value {
    json!({
        "label": goal.label,
        "value": goal.value,
        "median": goal.median,
        "wanted": goal.wanted,
    })
}

/// One size as JSON.
pub fn attach_json(bulk: &Bulk) -> Value {
    match &bulk.outcome {
        Ok(times) => json!({
            "n_functions": bulk.n_functions,
            "attach_ms": times.attach.as_secs_f64() * 1e3,
            "detach_ms": times.detach.as_secs_f64() * 1e3,
        }),
        Err(e) => json!({ "n_functions": bulk.n_functions, "error": reason(e) }),
    }
}

/// The pause as JSON.
pub fn pause_json(pause: &Result<Pause>) -> Value {
    match pause {
        Ok(pause) => json!({ "attach_ns": pause.attach_ns, "idle_ns": pause.idle_ns }),
        Err(e) => json!({ "error": reason(e) }),
    }
}
