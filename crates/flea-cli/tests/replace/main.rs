//! Live patching of real processes: what calls return changes at once and back, whatever the
//! program is linked with and whoever else is attached, and what is refused changes nothing.
#![allow(clippy::unwrap_used, reason = "a test")]

mod patched;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::time::Duration;

use anyhow::{Result, ensure};
use flea_fixtures::{Running, Tool};
use nix::sys::signal::Signal;
use patched::{Dir, Patched};
use serde_json::Value;
use support::{Tracing, assert_clean, assert_original_code, flea};

/// What `flea` says and how it ends.
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

fn run(words: &[&str]) -> Result<Said> {
    let output = flea().args(words).output()?;
    Ok(Said {
        code: output.status.code(),
        out: String::from_utf8(output.stdout)?,
        err: String::from_utf8(output.stderr)?,
    })
}

/// Replaces; the `PID.N` of each.
fn replace(target: &Patched, object: &str, functions: &[&str]) -> Result<Vec<String>> {
    let pid = target.pid().to_string();
    let mut words = vec!["replace", "--json", "-p", &pid, object];
    words.extend(functions);
    let said = run(&words)?;
    ensure!(said.code == Some(0), "{}", said.err);
    let records = said.out.lines().map(serde_json::from_str::<Value>);
    let ids = records.map(|r| Ok(r?["id"].as_str().unwrap_or_default().to_owned()));
    ids.collect()
}

fn detach(id: &str) -> Result<()> {
    let said = run(&["detach", id])?;
    ensure!(said.code == Some(0), "{}", said.err);
    Ok(())
}

/// The refusal of a replacement, which must have changed nothing.
fn refused(target: &mut Patched, words: &[&str]) -> Result<String> {
    let before = target.maps()?;
    let pid = target.pid().to_string();
    let said = run(&[&["replace", "-p", &pid], words].concat())?;
    ensure!(said.code == Some(1), "{words:?}: {:?}, {}", said.code, said.out);
    ensure!(said.out.is_empty(), "{}", said.out);
    ensure!(said.err.trim_end().ends_with("nothing was changed"), "{}", said.err);
    target.expect("ask 3", "31")?;
    ensure!(target.maps()? == before, "{words:?}: the mappings have changed");
    assert_clean(target.pid())?;
    Ok(said.err)
}

/// Uses libc (with functions that it selects by the processor), variables, constants and
/// pointers of its own, and what is private to the program: 1000 + 3 + 10 * x + its calls.
const USES_EVERYTHING: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
extern int scaled(int);
extern volatile int scale;
static const char *const words[] = {"abc", "def"};
static char kept[5000];
static __attribute__((aligned(64))) int calls[3] = {0, 0, 7};
int answer(int x)
{
    char text[64], *copy = malloc(64);
    if (!copy || calls[2] != 7 || scale != 10)
        abort();
    __atomic_add_fetch(&calls[0], 1, __ATOMIC_RELAXED);
    memset(text, 0, sizeof text);
    strcpy(text, words[x & 1]);
    memcpy(copy, text, strlen(text) + 1);
    int result = 1000 + (int)strlen(copy) + scaled(x);
    if (strcmp(copy, words[x & 1]) || memchr(kept, 1, sizeof kept) || snprintf(text, 64, "%d", x) < 1)
        abort();
    free(copy);
    return result;
}
"#;

fn constant(result: i32) -> String {
    format!("int answer(int x) {{ return {result} + x; }}")
}

#[test]
fn calls_change_at_once_and_back() -> Result<()> {
    let builds: [(Tool, &[&str]); 6] = [
        (Tool::Gcc, &["-O2"]),
        (Tool::Gcc, &["-O0", "-no-pie", "-fno-pie"]),
        (Tool::Gcc, &["-O2", "-static"]),
        (Tool::Gcc, &["-O2", "-fpatchable-function-entry=5", "-Wl,-z,now"]),
        (Tool::MuslGcc, &["-O2", "-static"]),
        (Tool::MuslGcc, &["-O2"]),
    ];
    for (tool, flags) in builds {
        let Some(dir) = Dir::new(tool, flags)? else { continue };
        let object = dir.object("fix", USES_EVERYTHING, &["-O2"])?;
        let mut target = dir.start(2)?;
        target.expect("ask 3", "31")?;
        let before = target.maps()?;
        for _ in 0..2 {
            let ids = replace(&target, &object, &["answer"])?;
            target.expect("ask 3", "1033")?;
            target.expect("calls 1000", "1013000")?;
            assert_original_code(target.pid(), "/nothing").unwrap_err();
            detach(&ids[0])?;
            target.expect("ask 3", "31")?;
            target.expect("calls 1000", "11000")?;
            target.settle(&before)?;
            assert_clean(target.pid())?;
        }
        target.finish()?;
    }
    Ok(())
}

#[test]
fn replacements_stack_and_go_in_any_order() -> Result<()> {
    let Some(dir) = Dir::new(Tool::Gcc, &["-O2"])? else { return Ok(()) };
    let mut objects = Vec::new();
    for (i, result) in [1100, 1200, 1300].into_iter().enumerate() {
        objects.push(dir.object(&format!("fix{i}"), &constant(result), &["-O2"])?);
    }
    let mut target = dir.start(1)?;
    let before = target.maps()?;
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut ids: Vec<Option<String>> = Vec::new();
        for (i, object) in objects.iter().enumerate() {
            ids.extend(replace(&target, object, &["answer"])?.into_iter().map(Some));
            target.expect("ask 0", &(1100 + 100 * i).to_string())?;
        }
        for gone in order {
            detach(&ids[gone].take().unwrap())?;
            let newest = ids.iter().rposition(Option::is_some);
            let expected = newest.map_or(1, |i| 1100 + 100 * i);
            target.expect("ask 0", &expected.to_string())?;
        }
    }
    target.settle(&before)?;
    assert_clean(target.pid())?;
    target.finish()
}

/// Programs run around the replacement as they did around the original.
#[test]
fn programs_stay_around_a_replacement() -> Result<()> {
    let Some(dir) = Dir::new(Tool::Gcc, &["-O2"])? else { return Ok(()) };
    let object = dir.object("fix", &constant(2000), &["-O2"])?;
    let mut target = dir.start(0)?;
    let (mut count, mut results) = (
        Tracing::attach(&["count", "answer"], target.pid())?,
        Tracing::attach(&["hist", "answer", "retval"], target.pid())?,
    );
    target.expect("calls 100", "1100")?;
    let ids = replace(&target, &object, &["answer"])?;
    target.expect("calls 200", "400200")?;
    // One that comes later, and sees the replacement alone.
    let late = Tracing::attach(&["hist", "answer", "retval"], target.pid())?.stop()?;
    ensure!(late.one("histogram", "answer")?["count"] == 0);
    target.expect("calls 50", "100050")?;
    detach(&ids[0])?;
    target.expect("calls 25", "275")?;
    let counted = count.stop()?;
    ensure!(counted.one("count", "answer")?["count"] == 375, "{counted:?}");
    let seen = results.stop()?;
    let seen = seen.one("histogram", "answer")?;
    ensure!(seen["count"] == 375 && seen["sum"] == 125 * 11 + 250 * 2001, "{seen}");
    ensure!(seen["max"] == 2001 && seen["min"] == 11, "{seen}");

    // And the other way round: what was replaced is traced, and goes first.
    let ids = replace(&target, &object, &["answer"])?;
    count = Tracing::attach(&["count", "answer"], target.pid())?;
    results = Tracing::attach(&["latency", "answer"], target.pid())?;
    target.expect("calls 10", "20010")?;
    detach(&ids[0])?;
    target.expect("calls 10", "110")?;
    ensure!(count.stop()?.one("count", "answer")?["count"] == 20);
    ensure!(results.stop()?.one("histogram", "answer")?["count"] == 20);
    assert_clean(target.pid())?;
    target.finish()
}

/// Several functions at once, by other names, in one copy of the object's variables.
#[test]
fn several_functions_are_replaced_together() -> Result<()> {
    let Some(dir) = Dir::new(Tool::Gcc, &["-O2"])? else { return Ok(()) };
    let source = r#"
        static int calls;
        int first(int x) { return 3000 + x + 100 * ++calls; }
        double second(int a, const char *b, double c, long d) { return ++calls + a * c + d + *b; }
        "#;
    let object = dir.object("fix", source, &["-O2"])?;
    let mut target = dir.start(0)?;
    target.expect("mixed", "7.5")?;
    let ids = replace(&target, &object, &["answer=first", "mixed=second"])?;
    target.expect("ask 1", "3101")?;
    target.expect("mixed", "103.5")?;
    target.expect("ask 1", "3301")?;
    let pid = target.pid().to_string();
    let listed = run(&["ps", "-p", &pid])?.out;
    ensure!(listed.contains("replace/first") && listed.contains("replace/second"), "{listed}");
    detach(&ids[0])?;
    target.expect("ask 1", "11")?;
    target.expect("mixed", "105.5")?;
    detach(&pid)?;
    target.expect("mixed", "7.5")?;
    assert_clean(target.pid())?;
    // All or none: the second one does not fit.
    let error = refused(&mut target, &[&object, "answer=first", "mixed=first"])?;
    ensure!(error.contains("double mixed(int a, const char *b, double c, long int d)"), "{error}");
    ensure!(error.contains("int first(int x)"), "{error}");
    let error = refused(&mut target, &[&object, "answer=first", "answer=first"])?;
    ensure!(error.contains("twice"), "{error}");
    target.finish()
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let Some(dir) = Dir::new(Tool::Gcc, &["-O2"])? else { return Ok(()) };
    let mut target = dir.start(1)?;
    let cases: [(&str, &[&str], &[&str]); 9] = [
        (
            "long answer(int x) { return x; }",
            &["-O2"],
            &["long int answer(int x)", "int answer(int x)"],
        ),
        ("int answer(int x, int y) { return x + y; }", &["-O2"], &["int answer(int x, int y)"]),
        ("int answer(int x, ...) { return x; }", &["-O2"], &["int answer(int x, ...)"]),
        ("int other(int x) { return x; }", &["-O2"], &["no function `answer`", "`other`"]),
        (
            "int nobody_has(int); int answer(int x) { return nobody_has(x); }",
            &["-O2"],
            &["`nobody_has`"],
        ),
        ("__thread int t; int answer(int x) { return t += x; }", &["-O2"], &["thread-local"]),
        (
            "int answer(int x) { return x; }",
            &["-nostdlib", "-Wl,--omagic"],
            &["writable and executable"],
        ),
        (
            "__attribute__((constructor)) void c(void) {} int answer(int x) { return x; }",
            &["-O2"],
            &["`c`"],
        ),
        ("int answer(int x) { return 1000 + x; }", &["-O2", "-g0"], &["--unchecked-signature"]),
    ];
    for (i, (source, flags, expected)) in cases.iter().enumerate() {
        let object = dir.object(&format!("bad{i}"), source, flags)?;
        let error = refused(&mut target, &[&object, "answer"])?;
        for part in *expected {
            ensure!(error.contains(part), "{part}: {error}");
        }
    }
    let good = dir.object("good", &constant(1000), &["-O2"])?;
    let bytes = fs::read(&good)?;
    let cut = dir.path("cut.so");
    fs::write(&cut, &bytes[..bytes.len() / 3])?;
    refused(&mut target, &[&cut, "answer"])?;
    fs::write(&cut, "no object")?;
    ensure!(refused(&mut target, &[&cut, "answer"])?.contains("not an ELF file"));
    refused(&mut target, &[&dir.path("missing.so"), "answer"])?;
    refused(&mut target, &[&good, "no_such_function"])?;
    // Without debug information it is as good as who says so.
    let bare = dir.object("bare", &constant(1000), &["-O2", "-g0"])?;
    let ids = replace(&target, &bare, &["answer", "--unchecked-signature"])?;
    target.expect("ask 1", "1001")?;
    detach(&ids[0])?;
    target.finish()
}

/// gcc keeps values in registers across calls of functions that it knows.
#[test]
fn callers_with_special_knowledge_are_not_betrayed() -> Result<()> {
    for (flags, fits) in
        [(&["-O2", "-DLEAF"][..], false), (&["-O2", "-DLEAF", "-fno-ipa-ra"], true)]
    {
        let Some(dir) = Dir::new(Tool::Gcc, flags)? else { return Ok(()) };
        let source = r#"
            #include <stdio.h>
            long leaf(long x) { char text[40]; return snprintf(text, 40, "%ld", x) * 100; }
            "#;
        let object = dir.object("fix", source, &["-O2"])?;
        let mut target = dir.start(0)?;
        target.expect("leaf", "1043")?;
        if fits {
            let ids = replace(&target, &object, &["leaf"])?;
            target.expect("leaf", "1341")?;
            detach(&ids[0])?;
            target.expect("leaf", "1043")?;
        } else {
            let error = refused(&mut target, &[&object, "leaf"])?;
            ensure!(error.contains("-fno-ipa-ra"), "{error}");
        }
        target.finish()?;
    }
    Ok(())
}

/// What is replaced stays so when the controller is killed, and anybody can undo it.
#[test]
fn a_killed_controller_leaves_it_working() -> Result<()> {
    let Some(dir) = Dir::new(Tool::Gcc, &["-O2"])? else { return Ok(()) };
    let object = dir.object("fix", USES_EVERYTHING, &["-O2"])?;
    let mut target = dir.start(2)?;
    let before = target.maps()?;
    let pid = target.pid().to_string();
    let mut controller = Running::start(flea().args([
        "replace",
        "-p",
        &pid,
        &object,
        "answer",
        "--duration",
        "1000",
    ]))?;
    let said = controller.stderr_line_within(Duration::from_secs(60))?;
    ensure!(said == "flea: replaced 1 function", "{said}");
    target.expect("ask 3", "1033")?;
    controller.signal(Signal::SIGKILL)?;
    controller.wait()?;
    target.expect("calls 100", "101300")?;
    let listed = run(&["ps", "-p", &pid])?.out;
    ensure!(listed.contains("replace/answer") && listed.contains("(gone)"), "{listed}");
    detach(&pid)?;
    target.expect("ask 3", "31")?;
    target.settle(&before)?;
    assert_clean(target.pid())?;
    target.finish()
}

#[test]
fn for_a_time_or_for_a_commands_life() -> Result<()> {
    let Some(dir) = Dir::new(Tool::Gcc, &["-O2"])? else { return Ok(()) };
    let object = dir.object("fix", &constant(1000), &["-O2"])?;
    let mut target = dir.start(1)?;
    let pid = target.pid().to_string();
    let said = run(&["replace", "-p", &pid, &object, "answer", "--duration", "0.1"])?;
    ensure!(said.code == Some(0), "{}", said.err);
    target.expect("ask 3", "31")?;
    assert_clean(target.pid())?;
    target.finish()?;

    let program = dir.path("target");
    let mut running =
        Running::start_group(flea().args(["replace", &object, "answer", "--", &program, "1"]))?;
    // The line about what is replaced comes first.
    let first = running.line()?;
    ensure!(first.contains("answer replaced by answer of"), "{first}");
    running.expect_line("ready")?;
    running.close_stdin();
    ensure!(running.wait()?.code() == Some(7), "the command's own exit code");
    Ok(())
}

/// A call that sleeps inside the replacement for as long as it likes, and a callback of the
/// object's that the program has kept: the object stays for them, and goes after them.
#[test]
fn the_object_stays_for_who_needs_it() -> Result<()> {
    let Some(dir) = Dir::new(Tool::Gcc, &["-O2"])? else { return Ok(()) };
    let source = r#"
        extern void nap(void);
        extern void keep(const char *(*)(void));
        static const char *speak(void) { return "spoken"; }
        int answer(int x)
        {
            if (x == -1)
                nap();
            if (x == -2)
                keep(speak);
            return 1000 + x;
        }
        "#;
    let object = dir.object("fix", source, &["-O2"])?;
    let mut target = dir.start(1)?;
    // The C library keeps the stacks of threads that have ended.
    target.expect("sleep", "asleep")?;
    target.expect("wake", "-9")?;
    let before = target.maps()?;
    let ids = replace(&target, &object, &["answer"])?;
    target.expect("sleep", "asleep")?;
    detach(&ids[0])?;
    target.expect("ask 3", "31")?;
    ensure!(target.new_mappings(&before)?.iter().any(|m| m.contains("r-xp")));
    target.expect("wake", "999")?;
    // The next change finds it unused.
    detach(&replace(&target, &object, &["answer"])?[0])?;
    target.settle(&before)?;

    let ids = replace(&target, &object, &["answer"])?;
    target.expect("ask -2", "998")?;
    detach(&ids[0])?;
    target.expect("ask 3", "31")?;
    target.expect("kept", "spoken")?;
    detach(&replace(&target, &object, &["answer"])?[0])?;
    target.expect("kept", "spoken")?;
    target.expect("forget", "forgotten")?;
    detach(&replace(&target, &object, &["answer"])?[0])?;
    target.settle(&before)?;
    assert_clean(target.pid())?;
    target.finish()
}
