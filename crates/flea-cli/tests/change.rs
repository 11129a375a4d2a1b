//! Programs made by clang that change what functions are called with and return, which somebody
//! has allowed, on both kinds of sites of a C program.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use flea::{AttachError, Link, Map, Object, Permissions, Session};
use flea_fixtures::{Running, Tool, require};
use support::{TempFile, Tracing, ask, assert_clean, compile_bpf, flea};

/// How the target is compiled: with the prologue that is relocated, and with a nop at entry.
const BUILDS: [&[&str]; 2] =
    [&["-O2"], &["-O2", "-fno-pie", "-no-pie", "-pg", "-mfentry", "-mnop-mcount"]];

/// The program of `change/target.c` with the test's programs loaded into it.
struct Target {
    running: Running,
    session: Session,
    object: Object,
    _files: [TempFile; 2],
}

/// Compiles the target and the programs: `None`, said on stderr, where a compiler is missing.
fn compile(flags: &[&str]) -> Result<Option<[TempFile; 2]>> {
    let Some(object) = compile_bpf("change.bpf.c", "v3")? else { return Ok(None) };
    let Some(gcc) = require(Tool::Gcc) else { return Ok(None) };
    let program = TempFile::new("change-target");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/change/target.c");
    let output = Command::new(gcc)
        .args(["-g", "-Wall"])
        .args(flags)
        .arg("-o")
        .args([&program.0, &source])
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(Some([object, program]))
}

impl Target {
    fn start(flags: &[&str], permissions: Permissions) -> Result<Option<Self>> {
        let Some(files) = compile(flags)? else { return Ok(None) };
        let mut running = Running::start(&mut Command::new(&files[1].0))?;
        running.expect_line("ready")?;
        let session = Session::attach(running.pid().cast_signed())?;
        session.permit(permissions);
        let object = session.load(flea::parse_object(&std::fs::read(&files[0].0)?)?)?;
        Ok(Some(Self { running, session, object, _files: files }))
    }

    fn attach(&self, program: &str, function: &str) -> Result<Result<Link, AttachError>> {
        let program = self.object.program(program).context("it is in the object")?;
        let function = self.session.find(function)?.into_iter().next().context("it was found")?;
        Ok(program.attach(&function))
    }

    /// Attaches them one after another: the last one is the newest, and runs first.
    fn attach_all(&self, programs: &[&str], function: &str) -> Result<Vec<Link>> {
        programs.iter().map(|program| Ok(self.attach(program, function)??)).collect()
    }

    /// Attaches them as one body; the last one is the newest.
    fn attach_at_once(&self, programs: &[&str], function: &str) -> Result<Link> {
        let function = self.session.find(function)?.into_iter().next().context("it was found")?;
        let program = |name: &&str| self.object.program(name).context("it is in the object");
        let all = programs.iter().map(|name| Ok(program(name)?.on(&function, 0)));
        Ok(self.object.attach(&all.collect::<Result<Vec<_>>>()?)?)
    }

    /// The advice with which a program is refused for its access of the context at `place`.
    fn refusal(&self, program: &str, function: &str, place: &str) -> Result<String> {
        let error = self.attach(program, function)?.err().context(program.to_owned())?;
        let AttachError::Rejected { rejection, .. } = error else { anyhow::bail!("{error}") };
        let message = format!("invalid bpf_context access {place}");
        ensure!(rejection.message == message, "{program}: {}", rejection.message);
        rejection.hint.context("there is advice")
    }

    fn expect(&mut self, command: &str, answer: &str) -> Result<()> {
        self.running.send(command)?;
        self.running.expect_line(answer).with_context(|| format!("after `{command}`"))
    }

    /// Field `i` of the programs' `seen`.
    fn seen(&self, i: usize) -> Result<u64> {
        let Some(Map::Array(map)) = self.object.map(".bss") else { anyhow::bail!("no map") };
        let value = map.get(0)?;
        Ok(u64::from_le_bytes(value[8 * i..8 * i + 8].try_into().unwrap()))
    }

    fn finish(mut self) -> Result<()> {
        drop(self.object);
        assert_clean(self.running.pid())?;
        self.running.close_stdin();
        let status = self.running.wait()?;
        ensure!(status.code() == Some(7), "it ended with {status}");
        Ok(())
    }
}

const ALLOWED: Permissions = Permissions { write_target: true };
/// Fields of the programs' `seen`.
const ENTRY: usize = 0;
const EXIT_ARGUMENT: usize = 1;
const EXIT_RESULT: usize = 2;
const PROBED: usize = 3;
const RETURNED: usize = 4;
const RUNS: usize = 5;

/// Bodies of their own each; more than four are not copied into the skeleton, but called.
#[test]
fn arguments_are_changed_one_program_after_another() -> Result<()> {
    for flags in BUILDS {
        let Some(mut target) = Target::start(flags, ALLOWED)? else { return Ok(()) };
        target.expect("add 1 2", "add saw 1 2 returned 3")?;
        let links = target.attach_all(&["looks_back", "ten_more", "twice"], "add")?;
        target.expect("add 1 2", "add saw 12 2 returned 14")?;
        assert_eq!((target.seen(EXIT_ARGUMENT)?, target.seen(EXIT_RESULT)?), (12, 14));
        let more = target.attach_all(&["absolute", "second_is_seven", "probe", "looks"], "add")?;
        target.expect("add -205 2", "add saw 220 7 returned 227")?;
        assert_eq!(target.seen(PROBED)?.cast_signed(), -205);
        assert_eq!(target.seen(ENTRY)?.cast_signed(), -205, "it is in front of the frame");
        assert_eq!(target.seen(EXIT_ARGUMENT)?, 220);
        drop(more);
        target.expect("add 1 2", "add saw 12 2 returned 14")?;
        assert_eq!(target.seen(RUNS)?, 3);
        drop(links);
        target.expect("add 1 2", "add saw 1 2 returned 3")?;
        assert_eq!((target.object.missed(), target.seen(RUNS)?), (0, 3));
        target.finish()?;
    }
    Ok(())
}

/// All in one body, where programs that change nothing keep their place among the others.
#[test]
fn programs_attached_in_one_go_keep_their_order() -> Result<()> {
    for flags in BUILDS {
        let Some(mut target) = Target::start(flags, ALLOWED)? else { return Ok(()) };
        let link = target.attach_at_once(
            &[
                "return_probe",
                "result_plus_one",
                "looks_back",
                "probe",
                "ten_more",
                "looks",
                "twice",
            ],
            "add",
        )?;
        target.expect("add 4 3", "add saw 118 0 returned 5000")?;
        assert_eq!((target.seen(ENTRY)?, target.seen(PROBED)?), (8, 18));
        // looks_back is newer than what adds one, and the return probe is last.
        assert_eq!((target.seen(EXIT_ARGUMENT)?, target.seen(EXIT_RESULT)?), (118, 118));
        assert_eq!(target.seen(RETURNED)?, 119);
        link.detach()?;
        target.expect("add 4 3", "add saw 4 3 returned 7")?;
        target.finish()?;
    }
    Ok(())
}

#[test]
fn results_are_changed_one_program_after_another() -> Result<()> {
    for flags in BUILDS {
        let Some(mut target) = Target::start(flags, ALLOWED)? else { return Ok(()) };
        let links =
            target.attach_all(&["looks_back", "result_negated", "result_plus_one"], "add")?;
        target.expect("add 1 2", "add saw 1 2 returned -4")?;
        assert_eq!(target.seen(EXIT_RESULT)?.cast_signed(), -4);
        let newest = target.attach_all(&["return_probe"], "add")?;
        target.expect("add 1 2", "add saw 1 2 returned -5001")?;
        assert_eq!((target.seen(RETURNED)?, target.seen(RUNS)?), (3, 2));
        drop(newest);
        let session = target.attach_all(&["both"], "add")?;
        // 1000 + 2, and at exit the argument once more; plus one, negated.
        target.expect("add 1 2", "add saw 1000 2 returned -2003")?;
        drop((session, links));
        target.expect("add 1 2", "add saw 1 2 returned 3")?;

        let links = [("narrow_result", "narrow"), ("first_of_two", "pair")];
        let links = links.map(|(program, function)| target.attach(program, function));
        target.expect("narrow 1", "narrow 200")?;
        target.expect("pair 1 2", "pair 33 1")?;
        drop(links);
        target.expect("narrow 1", "narrow 2")?;
        target.expect("pair 1 2", "pair 2 1")?;
        target.finish()?;
    }
    Ok(())
}

/// A function that is skipped for what a program has made of its argument; its exit programs
/// change what its caller gets instead.
#[test]
fn skipped_for_a_changed_argument() -> Result<()> {
    for flags in BUILDS {
        let Some(mut target) = Target::start(flags, ALLOWED)? else { return Ok(()) };
        target.expect("add 1 2", "add saw 1 2 returned 3")?;
        let links = target.attach_all(&["result_plus_one", "never_here", "ten_more"], "add")?;
        target.expect("add 3 2", "add saw 1 2 returned 4243")?;
        assert_eq!(target.seen(ENTRY)?, 13);
        target.expect("add 4 2", "add saw 14 2 returned 17")?;
        drop(links);
        target.finish()?;
    }
    Ok(())
}

/// gcc compiles `kept` so that it goes on using rdi and r8, which `third` leaves alone.
#[test]
fn a_callers_registers_are_given_back() -> Result<()> {
    for flags in BUILDS {
        let Some(mut target) = Target::start(flags, ALLOWED)? else { return Ok(()) };
        target.expect("kept 5", "kept 5 7 2")?;
        let links = target.attach_all(&["everything"], "third")?;
        target.expect("kept 5", "kept 5 7 10")?;
        let probe = target.attach_all(&["every_register"], "third")?;
        // The older fentry program has the last word on the second argument.
        target.expect("kept 5", "kept 5 7 10")?;
        drop(links);
        target.expect("kept 5", "kept 5 7 20")?;
        drop(probe);
        target.expect("kept 5", "kept 5 7 2")?;
        target.finish()?;
    }
    Ok(())
}

#[test]
fn functions_with_words_that_cannot_be_changed() -> Result<()> {
    for flags in BUILDS {
        let Some(mut target) = Target::start(flags, ALLOWED)? else { return Ok(()) };
        let links = [("sixth", "sum"), ("behind_a_double", "mixed")];
        let links = links.map(|(program, function)| target.attach(program, function));
        let links = links.into_iter().collect::<Result<Result<Vec<_>, _>, _>>()??;
        target.expect("sum", "sum 645")?;
        target.expect("mixed", "mixed 40.5")?;
        drop(links);
        target.expect("sum", "sum 45")?;
        let refused = [
            ("on_the_stack", "sum", "off=48 size=8", "word 0, 1, 2, 3, 4, 5"),
            ("a_double", "mixed", "off=0 size=8", "word 1,"),
            ("a_double_result", "mixed", "off=16 size=8", "can change nothing"),
            ("second_of_two", "pair", "off=24 size=8", "word 2,"),
            ("in_memory", "big", "off=8 size=8", "can change nothing"),
            ("argument_at_exit", "add", "off=0 size=8", "word 2,"),
            ("argument_of_fmod_ret", "add", "off=0 size=8", "can change nothing"),
            ("program_counter", "add", "off=128 size=8", "r9, r8, cx, dx, si, di"),
        ];
        for (program, function, place, advice) in refused {
            let hint = target.refusal(program, function, place)?;
            assert!(hint.contains(advice), "{program}: {hint}");
        }
        target.finish()?;
    }
    Ok(())
}

#[test]
fn changing_needs_leave() -> Result<()> {
    let nothing = Permissions::default();
    let Some(mut target) = Target::start(BUILDS[0], nothing)? else { return Ok(()) };
    let refused = [
        ("ten_more", "add", "off=0 size=8"),
        ("probe", "add", "off=104 size=8"),
        ("result_negated", "add", "off=16 size=8"),
        ("return_probe", "add", "off=80 size=8"),
        ("both", "add", "off=0 size=8"),
    ];
    for (program, function, place) in refused {
        let hint = target.refusal(program, function, place)?;
        assert!(hint.contains("flea run --allow-write"), "{program}: {hint}");
    }
    // What would not be allowed anyway.
    let hint = target.refusal("argument_of_fmod_ret", "add", "off=0 size=8")?;
    assert!(!hint.contains("--allow-write"), "{hint}");
    target.expect("add 1 2", "add saw 1 2 returned 3")?;
    target.finish()
}

#[test]
fn the_command_says_who_changes_what() -> Result<()> {
    let Some([object, program]) = compile(BUILDS[1])? else { return Ok(()) };
    let mut target = Running::start(&mut Command::new(&program.0))?;
    target.expect_line("ready")?;
    let (file, pid) = (object.0.to_str().context("a path")?, target.pid());
    let pid_word = pid.to_string();
    let refused = flea().args(["run", file, "-p", &pid_word]).output()?;
    let said = String::from_utf8(refused.stderr)?;
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(said.contains("invalid bpf_context access off="), "{said}");
    assert!(said.contains("--allow-write"), "{said}");
    assert_clean(pid)?;

    let tracing = Tracing::attach(&["run", file, "--allow-write"], pid)?;
    let attached = ask(&["ps", "-p", &pid_word])?;
    assert_eq!(attached.one("attached", "sum")?["changes"], serde_json::json!(["r9"]));
    assert_eq!(attached.one("attached", "narrow")?["changes"], serde_json::json!(["rax"]));
    assert_eq!(attached.one("attached", "sum")?["writes_target"], false);
    let shown = String::from_utf8(flea().args(["ps", "-p", &pid_word]).output()?.stdout)?;
    assert!(shown.contains(" changes r9") && shown.contains(" changes rax"), "{shown}");
    let mut expect = |command: &str, answer: &str| -> Result<()> {
        target.send(command)?;
        target.expect_line(answer)
    };
    expect("sum", "sum 645")?;
    expect("narrow 1", "narrow 200")?;
    tracing.stop()?;
    expect("sum", "sum 45")?;
    expect("narrow 1", "narrow 2")?;
    assert_clean(pid)?;
    target.close_stdin();
    assert_eq!(target.wait()?.code(), Some(7));
    Ok(())
}
