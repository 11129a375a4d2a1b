//! fmod_ret programs made by clang, in programs of other people and in the counting fixture.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use flea::{AttachError, Function, Map, Object, Session};
use flea_fixtures::{CBuild, Fixture, Running, spawn_waiting};
use support::{TempFile, Tracing, ask, assert_clean, compile_bpf, flea};

fn compile() -> Result<Option<TempFile>> {
    compile_bpf("modify_return.bpf.c", "v3")
}

/// malloc finds no memory, says ENOMEM, and the program says so as it does on a full machine.
#[test]
fn a_program_runs_out_of_memory() -> Result<()> {
    let Some(object) = compile()? else { return Ok(()) };
    let dd = ["dd", "if=/dev/zero", "of=/dev/null", "bs=300M", "count=1"];
    let bare = Command::new(dd[0]).args(&dd[1..]).stderr(Stdio::null()).status()?;
    ensure!(bare.success(), "{bare}");
    let output = flea().arg("run").arg(&object.0).arg("--").args(dd).env("LC_ALL", "C").output()?;
    let said = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("dd: memory exhausted by input buffer of size 314572800"), "{said}");
    Ok(())
}

/// A fixture's process with the test's programs loaded into it.
struct Target {
    running: Running,
    session: Session,
    object: Object,
}

impl Target {
    fn start(variant: CBuild) -> Result<Option<Self>> {
        let Some(file) = compile()? else { return Ok(None) };
        let Some(running) = spawn_waiting(Fixture::CountsC(variant), 4, 100)? else {
            return Ok(None);
        };
        let session = Session::attach(running.pid().cast_signed())?;
        let object = session.load(flea::parse_object(&std::fs::read(&file.0)?)?)?;
        Ok(Some(Self { running, session, object }))
    }

    fn function(&self, name: &str) -> Result<Function> {
        self.session.find(name)?.into_iter().next().context("it was found")
    }

    fn attach(&self, program: &str, function: &str) -> Result<Result<flea::Link, AttachError>> {
        let program = self.object.program(program).context("it is in the object")?;
        Ok(program.attach(&self.function(function)?))
    }

    fn n_counted(&self) -> Result<u64> {
        let Some(Map::PerCpuArray(calls)) = self.object.map("calls") else {
            anyhow::bail!("no map");
        };
        let values = calls.get(0)?;
        Ok(values.iter().map(|v| u64::from_le_bytes(v[..8].try_into().unwrap())).sum())
    }

    fn finish(mut self) -> Result<()> {
        drop(self.object);
        assert_clean(self.running.pid())?;
        self.running.finish_counts()
    }
}

/// The callers in the fixture compare results, and sum them up.
#[test]
fn skipped_functions_of_a_c_program() -> Result<()> {
    for variant in [CBuild::O0, CBuild::O2, CBuild::NopMcount] {
        let Some(mut target) = Target::start(variant)? else { return Ok(()) };
        let links = [("skip_double", "sum_double"), ("skip", "narrow"), ("skip", "leaf")]
            .map(|(program, function)| target.attach(program, function));
        let links = links.into_iter().collect::<Result<Result<Vec<_>, _>, _>>()??;
        let report = target.running.run_counts();
        drop(links);
        let report = report?;
        let sum = |name: &str| (report.functions[name].retval_sum, report.functions[name].count);
        let (doubles, n_doubles) = sum("sum_double");
        assert_eq!(doubles, 7 * i64::try_from(n_doubles)?, "{variant:?}");
        let (narrow, n_narrow) = sum("narrow");
        assert_eq!(narrow, i64::try_from(n_narrow)?, "{variant:?}");
        // All results of these two are wrong to the caller but those that happen to be so.
        assert!(report.errors > 0 && report.errors <= n_doubles + n_narrow, "{variant:?}");
        target.running.send("end")?;
        assert_eq!(target.running.wait()?.code(), Some(3), "{variant:?}: wrong results");
    }
    Ok(())
}

#[test]
fn results_that_no_program_can_return() -> Result<()> {
    let Some(mut target) = Target::start(CBuild::O2)? else { return Ok(()) };
    let unfit = [
        ("half", "in an x87 register"),
        ("swap_pair", "more than the one word"),
        ("rotate_huge", "a struct in memory"),
    ];
    for (function, reason) in unfit {
        let error = target.attach("skip", function)?.err().context("it is refused")?;
        assert!(matches!(error, AttachError::Skip { .. }), "{error}");
        let said = error.to_string();
        assert!(said.contains(reason) && said.contains("always returns 0"), "{said}");
    }
    // One that always returns 0 watches.
    let links = unfit.map(|(function, _)| target.attach("only_count", function));
    let links = links.into_iter().collect::<Result<Result<Vec<_>, _>, _>>()??;
    let rows = ask(&["ps", "-p", &target.running.pid().to_string()])?;
    assert_eq!(rows.of("attached").count(), 3);
    assert!(rows.of("attached").all(|row| row.to_string().contains("fmod_ret")), "{rows:?}");
    let report = target.running.run_counts()?;
    drop(links);
    let expected: u64 = unfit.iter().map(|(name, _)| report.functions[*name].count).sum();
    assert_eq!((report.errors, target.n_counted()?), (0, expected));
    target.finish()
}

/// Others at the same function see the value that the caller gets, and count the call.
#[test]
fn others_see_the_skipped_call() -> Result<()> {
    let Some(mut target) = Target::start(CBuild::O2)? else { return Ok(()) };
    let pid = target.running.pid();
    let before = Tracing::attach(&["hist", "down", "retval"], pid)?;
    let link = target.attach("skip", "down")??;
    let after = Tracing::attach(&["count", "down"], pid)?;
    let report = target.running.run_counts()?;
    link.detach()?;
    assert!(report.errors >= 400, "all results were wrong: {}", report.errors);
    let (before, after) = (before.stop()?, after.stop()?);
    let histogram = before.one("histogram", "down")?;
    // Nothing recurses, and every result is the program's.
    assert_eq!((histogram["count"].as_u64(), histogram["sum"].as_u64()), (Some(400), Some(400)));
    assert_eq!(after.one("count", "down")?["count"].as_u64(), Some(400));
    Ok(())
}
