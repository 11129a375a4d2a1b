//! Running `flea` and checking that it refuses.

use std::process::{Command, Output};

use flea_fixtures::{Fixture, Running, build};

use crate::text::Text;

/// `flea` with these arguments.
pub fn flea(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_flea"));
    command.args(args);
    command
}

/// Runs `command`, which must end with `code`, print no result, and say every one of `parts`.
#[track_caller]
pub fn refuses(command: &mut Command, code: i32, parts: &[&str]) {
    let output = command.output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(code), "{command:?} said {said}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
    assert!(!said.contains("panicked"), "{said}");
    for part in parts {
        assert!(said.contains(part), "{command:?} said {said:?}, without {part:?}");
    }
}

/// What it wrote to its standard error.
pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A process to be left alone: it calls `spin_step` all the time.
pub struct Bystander {
    running: Running,
    text: Text,
}

impl Bystander {
    /// Starts it. `None` where there is no compiler.
    pub fn start() -> Option<Self> {
        let program = build(Fixture::Spin)?;
        let mut running = Running::start(Command::new(program).arg("1")).unwrap();
        running.expect_line("ready").unwrap();
        let text = Text::of(running.pid());
        Some(Self { running, text })
    }

    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// `flea VERB -p` this process with more arguments is refused with exit code 1.
    #[track_caller]
    pub fn refuses(&self, verb: &str, args: &[&str], parts: &[&str]) {
        let pid = self.pid().to_string();
        refuses(flea(&[verb, "-p", &pid]).args(args), 1, parts);
        self.assert_untouched();
    }

    /// It runs on, and nothing in it has changed.
    #[track_caller]
    pub fn assert_untouched(&self) {
        self.text.assert_untouched(self.pid());
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        assert!(status.contains("TracerPid:\t0\n"), "{status}");
        assert!(!status.contains("State:\tt") && !status.contains("State:\tT"), "{status}");
    }

    /// Ends it: it must have lived through all that.
    pub fn finish(mut self) {
        self.running.send("stop").unwrap();
        assert!(self.running.wait().unwrap().success());
    }
}
