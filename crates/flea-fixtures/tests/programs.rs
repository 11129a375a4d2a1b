//! The fixtures themselves: each builds, says what it must, and ends as it must.

use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use flea_fixtures::{
    CBuild, Fixture, Report, Running, RustBuild, Tool, build, require, spawn_waiting,
};
use nix::sys::signal::Signal;

fn report_of(fixture: Fixture, args: &[&str]) -> Result<Option<Report>> {
    let Some(program) = build(fixture) else {
        return Ok(None);
    };
    let output = Command::new(&program).args(args).output()?;
    ensure!(output.status.code() == Some(0), "{fixture:?}: {output:?}");
    Ok(Some(serde_json::from_slice(&output.stdout)?))
}

/// What `counts.c` must say for 3 threads and 80 calls, from its source by hand.
fn check_c(report: &Report) {
    let count = |name: &str| report.functions[name].count;
    assert_eq!(report.errors, 0);
    assert_eq!((report.threads, report.calls), (3, 80));
    for name in ["big", "sum_double", "str", "swap_pair", "hidden", "tail", "tail_end", "half"] {
        assert_eq!(count(name), 240, "{name}");
    }
    assert_eq!(count("add"), 240 + 30); // choose(2), every eighth
    assert_eq!(count("leaf"), 240 + 30); // choose(3)
    assert_eq!(count("down"), 240 * 6);
    let add = report.functions["add"];
    assert_eq!(add.arg0_sum, 3 * (79 * 80 / 2) + 30);
    assert_eq!(add.retval_sum, 3 * (79 * 80 / 2) + 80 * (1 + 2) + 60);
    assert_eq!(report.functions["sum_double"].retval_sum, 3 * (79 * 80 / 2) + 240);
}

#[test]
fn counts_c_in_every_build() -> Result<()> {
    for variant in CBuild::ALL {
        if let Some(report) = report_of(Fixture::CountsC(*variant), &["3", "80"])? {
            check_c(&report);
        }
    }
    Ok(())
}

#[test]
fn counts_cpp_in_every_build() -> Result<()> {
    for variant in CBuild::all_cpp() {
        let Some(report) = report_of(Fixture::CountsCpp(variant), &["2", "90"])? else {
            continue;
        };
        assert_eq!(report.errors, 0, "{variant:?}");
        assert_eq!(report.functions["may_throw(int)"].count, 180);
        // A third of 0..90 throws and returns nothing; the others return their argument.
        let returned: i64 = (0..90).filter(|n| n % 3 != 0).sum();
        assert_eq!(report.functions["may_throw(int)"].retval_sum, 2 * returned);
        assert_eq!(report.functions["Square::sides(int) const"].count, 90);
    }
    Ok(())
}

#[test]
fn counts_rust_in_every_build() -> Result<()> {
    for variant in RustBuild::ALL {
        let Some(report) = report_of(Fixture::CountsRust(*variant), &["2", "64"])? else {
            continue;
        };
        assert_eq!(report.errors, 0, "{variant:?}");
        assert_eq!(report.functions["counts::panics"].count, 128);
        assert_eq!(report.functions["counts::largest::<u64>"].count, 128);
    }
    Ok(())
}

#[test]
fn libraries_and_odd_entries() -> Result<()> {
    for fixture in [Fixture::Plt, Fixture::NoPlt, Fixture::Dlopen] {
        let Some(report) = report_of(fixture, &["2", "50"])? else {
            continue;
        };
        assert_eq!(report.errors, 0);
        assert_eq!(report.functions["lib_add"].count, 200, "{fixture:?}");
        assert_eq!(report.functions["lib_twice"].retval_sum, 2 * 49 * 50);
    }
    if let Some(report) = report_of(Fixture::Odd, &["2", "50"])? {
        assert_eq!(report.errors, 0);
        assert!(report.functions.values().all(|f| f.count == 100));
    }
    if let Some(report) = report_of(Fixture::Many(100), &["3"])? {
        assert_eq!(report.functions["many_*"].count, 300);
    }
    Ok(())
}

/// Tests look functions up by the names in the report: they must be the demangler's.
#[test]
fn reported_names_are_symbols() -> Result<()> {
    let Some(nm) = require(Tool::Nm) else {
        return Ok(());
    };
    let fixtures = [
        Fixture::CountsC(CBuild::O3),
        Fixture::CountsC(CBuild::Static),
        Fixture::CountsC(CBuild::OnlyDynsym),
        Fixture::CountsCpp(CBuild::O2),
        Fixture::CountsRust(RustBuild::Debug),
        Fixture::CountsRust(RustBuild::Release),
        Fixture::Odd,
    ];
    for fixture in fixtures {
        let Some(report) = report_of(fixture, &["1", "64"])? else {
            continue;
        };
        let program = build(fixture).context("it was built above")?;
        let dynamic = fixture == Fixture::CountsC(CBuild::OnlyDynsym);
        let args: &[&str] = if dynamic { &["-C", "-D"] } else { &["-C"] };
        let output = Command::new(&nm).args(args).arg(&program).output()?;
        let symbols = String::from_utf8(output.stdout)?;
        for name in report.functions.keys() {
            // A local function has no name once .symtab is gone.
            let expected = !(dynamic && name == "hidden");
            let ours = |line: &str| line.get(19..) == Some(name);
            assert_eq!(symbols.lines().any(ours), expected, "{name} in {fixture:?}");
        }
    }
    Ok(())
}

/// What the entries of `add` begin with, as the variants promise.
#[test]
fn entries_are_what_the_variants_promise() -> Result<()> {
    let Some(gdb) = require(Tool::Gdb) else {
        return Ok(());
    };
    let cases: &[(CBuild, &[&str])] = &[
        (CBuild::NopMcount, &["0x0f", "0x1f", "0x44", "0x00", "0x00"]),
        (CBuild::Patchable5, &["0x90"; 5]),
        (CBuild::Patchable16Before5, &["0x90"; 11]),
        (CBuild::ClangPatchable5, &["0x0f", "0x1f", "0x44", "0x00", "0x08"]),
        (CBuild::CfProtection, &["0xf3", "0x0f", "0x1e", "0xfa"]),
        (CBuild::CfProtectionPatchable5, &["0xf3", "0x0f", "0x1e", "0xfa", "0x90", "0x90"]),
    ];
    for (variant, expected) in cases {
        let Some(program) = build(Fixture::CountsC(*variant)) else {
            continue;
        };
        let examine = format!("x/{}bx add", expected.len());
        let output = Command::new(&gdb).args(["-batch", "-ex", &examine]).arg(&program).output()?;
        let text = String::from_utf8(output.stdout)?;
        let bytes: Vec<&str> = text.split_whitespace().filter(|w| w.len() == 4).collect();
        assert_eq!(&bytes, expected, "{variant:?}: {text}");
    }
    Ok(())
}

#[test]
fn waits_runs_and_exits_with_seven() -> Result<()> {
    let fixtures =
        [Fixture::CountsC(CBuild::O2), Fixture::CountsRust(RustBuild::Release), Fixture::Many(100)];
    for fixture in fixtures {
        let Some(mut target) = spawn_waiting(fixture, 3, 80)? else {
            continue;
        };
        let report = target.run_counts()?;
        assert_eq!(report.errors, 0);
        if fixture == Fixture::CountsC(CBuild::O2) {
            check_c(&report);
        }
        target.finish_counts()?;
    }
    Ok(())
}

fn start(fixture: Fixture, args: &[&str]) -> Result<Option<Running>> {
    let Some(program) = build(fixture) else {
        return Ok(None);
    };
    let mut running = Running::start(Command::new(program).args(args))?;
    running.expect_line("ready")?;
    Ok(Some(running))
}

#[test]
fn guard_leaves_nothing_behind() -> Result<()> {
    let Some(target) = start(Fixture::Spin, &["1"])? else {
        return Ok(());
    };
    let proc = format!("/proc/{}", target.pid());
    assert!(std::path::Path::new(&proc).exists());
    drop(target);
    assert!(!std::path::Path::new(&proc).exists());
    Ok(())
}

/// The shell's child goes with the shell.
#[test]
fn guard_of_a_group_takes_the_children_along() -> Result<()> {
    let script = "sleep 1000 & echo $!; wait";
    let mut shell = Running::start_group(Command::new("sh").args(["-c", script]))?;
    let proc = format!("/proc/{}/stat", shell.line()?);
    assert!(std::path::Path::new(&proc).exists());
    drop(shell);
    // Its new parent reaps it at some time: until then it is a zombie.
    let begun = Instant::now();
    while std::fs::read_to_string(&proc).is_ok_and(|stat| !stat.contains(") Z ")) {
        ensure!(begun.elapsed() < Duration::from_secs(30), "the child lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A test that is killed closes the pipes, and the program ends by itself.
#[test]
fn end_of_input_ends_a_waiting_program() -> Result<()> {
    let Some(mut target) = spawn_waiting(Fixture::CountsC(CBuild::O2), 1, 1)? else {
        return Ok(());
    };
    target.close_stdin();
    assert_eq!(target.wait()?.code(), Some(9));
    Ok(())
}

#[test]
fn undisturbed_when_left_alone() -> Result<()> {
    let Some(mut target) = start(Fixture::Disturb, &[])? else {
        return Ok(());
    };
    std::thread::sleep(Duration::from_millis(100));
    target.send("gap")?;
    assert!(target.line()?.starts_with("gap "));
    target.send("check")?;
    let lines = target.rest()?;
    assert_eq!(lines.last().map(String::as_str), Some("undisturbed"), "{lines:?}");
    assert_eq!(target.wait()?.code(), Some(0));
    Ok(())
}

/// The file `name` of every thread.
fn of_tasks(target: &Running, name: &str) -> Result<Vec<String>> {
    std::fs::read_dir(format!("/proc/{}/task", target.pid()))?
        .map(|task| Ok(std::fs::read_to_string(task?.path().join(name))?))
        .collect()
}

fn until(what: &str, holds: impl Fn() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !holds()? {
        ensure!(begun.elapsed() < Duration::from_secs(30), "not {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Waits until no signal is on its way and the threads sleep inside the calls that the test
/// interrupts: one that is only on its way there reports nothing, and one that has not run
/// since the signal would take the wake-up of `check` instead.
fn settle(target: &Running) -> Result<()> {
    // Numbers of x86-64; first and fourth argument where they tell calls apart.
    let is_main_read = |call: &[&str]| call.starts_with(&["0", "0x0"]);
    let is_epoll_forever = |call: &[&str]| call[0] == "232" && call[4] == "0xffffffff";
    let is_semop = |call: &[&str]| matches!(call[0], "65" | "220");
    until("asleep in their calls", || {
        let calls = of_tasks(target, "syscall")?;
        let calls: Vec<Vec<&str>> = calls
            .iter()
            .map(|call| call.split_whitespace().collect::<Vec<_>>())
            .filter(|call| call.len() > 4) // a running thread has no call
            .collect();
        let any = |is: &dyn Fn(&[&str]) -> bool| calls.iter().any(|call| is(call));
        let all = any(&is_main_read) && any(&is_epoll_forever) && any(&is_semop);
        let pending = of_tasks(target, "status")?;
        Ok(all && pending.iter().all(|text| text.contains("ShdPnd:\t0000000000000000")))
    })
}

/// The findings after `signals` were sent.
fn findings_after(signals: &[Signal]) -> Result<Option<String>> {
    let Some(mut target) = start(Fixture::Disturb, &[])? else {
        return Ok(None);
    };
    settle(&target)?;
    for signal in signals {
        target.signal(*signal)?;
        if *signal == Signal::SIGSTOP {
            until("stopped", || {
                let threads = of_tasks(&target, "status")?;
                Ok(threads.iter().all(|text| text.contains("State:\tT")))
            })?;
        } else {
            settle(&target)?;
        }
    }
    target.send("check")?;
    let lines = target.rest()?;
    assert_eq!(target.wait()?.code(), Some(1), "{lines:?}");
    Ok(Some(lines.join("\n")))
}

#[test]
fn disturb_notices_a_signal_and_an_interrupted_wait() -> Result<()> {
    if let Some(text) = findings_after(&[Signal::SIGUSR1])? {
        // Which wait it interrupts, and whether any, is the kernel's choice: a thread in
        // sigtimedwait may take it, and the main thread's read is then restarted unseen.
        assert!(text.contains("signal: 10 arrived 1 times"), "{text}");
    }
    // A stop alone interrupts epoll_wait and semop on Linux (signal(7)): what a tracer
    // that stops a thread does to it.
    if let Some(text) = findings_after(&[Signal::SIGSTOP, Signal::SIGCONT])? {
        assert!(text.contains("epoll_wait: EINTR"), "{text}");
        assert!(text.contains("semop: EINTR"), "{text}");
    }
    Ok(())
}

#[test]
fn dies_in_each_way() -> Result<()> {
    type End = (Option<i32>, Option<i32>);
    let cases: [(&str, End); 4] = [
        ("exit", (Some(3), None)),
        ("kill", (None, Some(9))),
        ("abort", (None, Some(6))),
        ("exec", (Some(3), None)),
    ];
    for (way, expected) in cases {
        let Some(mut target) = start(Fixture::Dies, &["20", way])? else {
            return Ok(());
        };
        let status = target.wait()?;
        assert_eq!((status.code(), status.signal()), expected, "{way}");
    }
    Ok(())
}

#[test]
fn spin_counts_in_every_mode() -> Result<()> {
    for mode in ["", "churn", "fork"] {
        let Some(mut target) = start(Fixture::Spin, &["2", mode])? else {
            return Ok(());
        };
        let begun = Instant::now();
        let mut n_calls = 0;
        while n_calls == 0 {
            ensure!(begun.elapsed() < Duration::from_secs(30), "spin {mode:?} makes no calls");
            target.send("now")?;
            let report: Report = serde_json::from_str(&target.line()?)?;
            n_calls = report.functions["spin_step"].count;
            std::thread::sleep(Duration::from_millis(5));
        }
        target.send("stop")?;
        let report: Report = serde_json::from_str(&target.line()?)?;
        assert!(report.functions["spin_step"].count >= n_calls);
        assert_eq!(target.wait()?.code(), Some(0));
    }
    Ok(())
}

#[test]
fn bench_loop_answers() -> Result<()> {
    let Some(mut target) = start(Fixture::BenchLoop, &[])? else {
        return Ok(());
    };
    for name in ["f0", "f31", "p0", "hand", "hand_thread", "hand_lock", "hand_empty"] {
        target.send(&format!("round {name} 1000"))?;
        let line = target.line()?;
        let ns = line.strip_prefix(&format!("round {name} ")).with_context(|| line.clone())?;
        assert!(ns.parse::<f64>()? > 0.0);
    }
    target.send("counter")?;
    target.expect_line("counter 1000 1000 1000")?;
    target.send("round f32 1")?;
    target.expect_line("error no such function")?;
    target.send("quit")?;
    assert_eq!(target.wait()?.code(), Some(0));
    Ok(())
}

/// Two builders at once: one builds, both get the same file.
#[test]
fn parallel_builds_agree() {
    let paths: Vec<_> = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..4).map(|_| scope.spawn(|| build(Fixture::Many(7)))).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    assert!(paths.windows(2).all(|pair| pair[0] == pair[1]));
}
