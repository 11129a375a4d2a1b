//! `flea run` with programs that lead to each other: every one of them runs as often as it
//! should.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use flea_fixtures::{CBuild, Fixture, spawn_waiting};
use support::{Tracing, assert_clean, compile_bpf};

/// The array `counts`, in the order of the enumeration in `tail_calls.bpf.c`.
const COUNTS: [&str; 10] =
    ["even", "odd", "missed", "chained", "results", "around", "called", "entered", "left", "wrong"];

#[test]
fn programs_that_lead_to_each_other() -> Result<()> {
    for (isa, variant) in [("v3", CBuild::O2), ("v2", CBuild::NopMcount)] {
        let Some(object) = compile_bpf("tail_calls.bpf.c", isa)? else { return Ok(()) };
        let Some(mut target) = spawn_waiting(Fixture::CountsC(variant), 4, 120)? else {
            return Ok(());
        };
        let file = object.0.to_str().context("a path")?;
        let tracing = Tracing::attach(&["run", file], target.pid())?;
        let report = target.run_counts()?;
        let records = tracing.stop()?;
        assert_clean(target.pid())?;
        assert_eq!(report.errors, 0);
        records.assert_complete()?;

        let of_counts = records.of("map").filter(|r| r["map"] == "counts");
        let found: BTreeMap<usize, u64> = of_counts
            .map(|r| {
                (usize::try_from(r["key"].as_u64().unwrap()).unwrap(), r["value"].as_u64().unwrap())
            })
            .collect();
        let count = |what| {
            let at = COUNTS.iter().position(|name| *name == what).unwrap();
            found.get(&at).copied().unwrap_or(0)
        };
        let of = |name: &str| report.functions[name];
        let eighth = of("choose").count / 8;
        // 0, 2, and 4 by way of another program; narrow's program comes to `odd` each time.
        assert_eq!(count("even"), 3 * eighth, "{variant:?} {found:?}");
        assert_eq!(count("odd"), 2 * eighth + of("narrow").count, "{variant:?} {found:?}");
        assert_eq!((count("chained"), count("missed")), (eighth, 3 * eighth), "{found:?}");
        assert_eq!(count("around"), 34 * of("leaf").count, "{found:?}");
        assert_eq!(count("called"), of("narrow").count, "{found:?}");
        assert_eq!(count("results").cast_signed(), of("add").retval_sum, "{found:?}");
        let n_str = of("str").count;
        assert_eq!((count("entered"), count("left")), (n_str, n_str), "{found:?}");
        assert_eq!(count("wrong"), 0, "{found:?}");
        target.finish_counts()?;
    }
    Ok(())
}
