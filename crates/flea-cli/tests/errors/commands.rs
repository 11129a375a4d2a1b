//! What is typed, what is started, and the exit codes.

use std::os::unix::fs::PermissionsExt as _;

use flea_fixtures::{Fixture, build};

use crate::{
    refusal::{Bystander, flea, refuses, said},
    scratch::Scratch,
};

#[test]
fn what_is_typed_wrongly_is_exit_code_2() {
    for (args, part) in [
        (&[][..], "Usage"),
        (&["frobnicate"], "frobnicate"),
        (&["count"], "PATTERN"),
        (&["count", "main"], "name the target"),
        (&["count", "main", "-p", "1", "--", "true"], "exclude each other"),
        (&["count", "main", "-p", "0"], "positive"),
        (&["count", "main", "-p", "many"], "many"),
        (&["count", "main", "-p", "1", "--duration", "long"], "long"),
        (&["count", "main", "-p", "1", "--duration", "-1"], "-1"),
        (&["count", "main", "-p", "1", "--no-such-flag"], "--no-such-flag"),
        (&["hist", "main", "-p", "1"], "EXPR"),
        (&["run", "-p", "1"], "FILE"),
        (&["detach"], "ID"),
        (&["detach", "--all", "1"], "--all"),
    ] {
        refuses(&mut flea(args), 2, &[part]);
    }
}

#[test]
fn commands_that_cannot_be_started() {
    let scratch = Scratch::new("commands");
    let path = |name: &str| scratch.path().join(name).to_str().unwrap().to_owned();
    let plain = path("plain");
    std::fs::write(&plain, "text").unwrap();
    std::fs::set_permissions(&plain, std::fs::Permissions::from_mode(0o644)).unwrap();
    let none = path("none");
    for (command, parts) in [
        ("no-command-is-called-so", &["there is no program", "no-command-is-called-so"][..]),
        (&none, &["there is no program", "none"]),
        (&plain, &["cannot be executed", "permission denied"]),
        (scratch.path().to_str().unwrap(), &["cannot be executed"]),
    ] {
        refuses(&mut flea(&["count", "main", "--", command]), 1, parts);
    }
}

#[test]
fn a_command_that_cannot_be_traced_as_asked_does_not_run() {
    let scratch = Scratch::new("does-not-run");
    let witness = scratch.path().join("witness");
    let touch = ["--", "touch", witness.to_str().unwrap()];
    let nowhere = scratch.path().join("none/results");
    let output = ["--output", nowhere.to_str().unwrap()];
    for (args, part) in [
        (&["count", "no_such_function_at_all"][..], "no such function"),
        (&["count", "libnone.so:malloc"], "no loaded module"),
        (&["count", "libc.so.6:memcpy"], "ifunc"),
        (&["count", "libc.so.6:malloc", output[0], output[1]], "cannot write to --output"),
        (&["run", nowhere.to_str().unwrap()], "cannot read"),
    ] {
        refuses(flea(args).args(touch), 1, &[part]);
        assert!(!witness.exists(), "flea {args:?} has let the command run");
    }
}

#[test]
fn results_that_cannot_be_written() {
    let Some(target) = Bystander::start() else { return };
    let nowhere = ["spin_step", "--output", "/nonexistent/results"];
    target.refuses("count", &nowhere, &["--output /nonexistent/results", "No such file"]);
    let full = ["spin_step", "--duration", "0.1", "--output", "/dev/full"];
    for verb in ["count", "trace", "latency"] {
        target.refuses(verb, &full, &["--output /dev/full", "No space left"]);
    }
    target.refuses("list", &["*", "--output", "/dev/full"], &["--output /dev/full"]);
    target.finish();
}

#[test]
fn the_exit_code_is_the_commands_own() {
    for (script, code) in [
        ("exit 0", 0),
        ("exit 1", 1),
        ("exit 42", 42),
        ("exit 255", 255),
        ("kill -KILL $$", 128 + 9),
        ("kill -TERM $$", 128 + 15),
        ("kill -SEGV $$", 128 + 11),
        ("exec sh -c 'exit 7'", 7),
        ("echo to-stdout; echo to-stderr >&2; exit 3", 3),
    ] {
        for verb in ["count", "latency"] {
            let output = flea(&[verb, "libc.so.6:malloc", "--", "sh", "-c", script]).output();
            let output = output.unwrap();
            assert_eq!(output.status.code(), Some(code), "{verb} {script}: {}", said(&output));
            if script.starts_with("echo") {
                assert!(String::from_utf8_lossy(&output.stdout).starts_with("to-stdout\n"));
                assert!(said(&output).contains("to-stderr\n"));
            }
        }
    }
    // Only looked at, a command does not run.
    let listed = flea(&["list", "libc.so.6:malloc", "--", "sh", "-c", "exit 9"]).output().unwrap();
    assert_eq!(listed.status.code(), Some(0), "{}", said(&listed));
}

#[test]
fn a_command_that_ends_in_the_middle_of_calls() {
    let Some(program) = build(Fixture::Dies) else { return };
    let program = program.to_str().unwrap();
    for (how, code) in [("exit", 3), ("abort", 134), ("segv", 139), ("kill", 137), ("exec", 3)] {
        let args = ["count", "step", "--json", "--output", "/dev/stderr", "--", program];
        let output = flea(&args).args(["200", how]).output().unwrap();
        let said = said(&output);
        assert_eq!(output.status.code(), Some(code), "{how}: {said}");
        assert_eq!(output.stdout, b"ready\n".repeat(if how == "exec" { 2 } else { 1 }));
        assert!(said.contains(r#""type":"summary","attached":1"#), "{how}: {said}");
    }
}
