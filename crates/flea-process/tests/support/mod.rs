//! C programs to trace: compiled once per test, killed by their number when the test ends.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use flea_process::Pid;

/// A running target. Killed and collected when dropped, also by a failing test.
pub struct Target {
    pub child: Child,
    pub first_line: String,
    out: Option<BufReader<std::process::ChildStdout>>,
}

/// Compiles `tests/targets/NAME.c`.
pub fn compile(name: &str, flags: &[&str]) -> PathBuf {
    let source = format!("{}/tests/targets/{name}.c", env!("CARGO_MANIFEST_DIR"));
    let tag: String = flags
        .iter()
        .flat_map(|f| f.chars())
        .filter(char::is_ascii_alphanumeric)
        .collect();
    let unique = format!(
        "{name}-{tag}-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    );
    let program = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(unique.replace(['(', ')'], ""));
    let status = Command::new("gcc")
        .args(["-O1", "-g", "-pthread", "-Wall", "-o"])
        .arg(&program)
        .args(flags)
        .arg(&source)
        .status()
        .expect("gcc is needed for tests");
    assert!(status.success(), "{source} does not compile");
    program
}

impl Target {
    /// Starts the program and reads the first line it prints: it is ready then.
    pub fn start(name: &str, args: &[&str]) -> Self {
        let program = compile(name, &[]);
        let mut child = Command::new(&program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("compiled just now");
        let out = child.stdout.take().expect("piped");
        let mut target = Self {
            child,
            first_line: String::new(),
            out: Some(BufReader::new(out)),
        };
        let _unused = std::fs::remove_file(&program);
        target.first_line = target.line();
        target
    }

    pub fn pid(&self) -> Pid {
        Pid::try_from(self.child.id()).expect("a pid")
    }

    /// The next line it prints.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.out
            .as_mut()
            .expect("open")
            .read_line(&mut line)
            .expect("readable");
        line.trim_end().to_owned()
    }

    /// Asks it to end, by closing its input, and returns the rest of what it prints.
    pub fn finish(mut self) -> String {
        drop(self.child.stdin.take());
        let until = Instant::now() + Duration::from_secs(20);
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                break status;
            }
            assert!(Instant::now() < until, "the target does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut text = String::new();
        self.out
            .take()
            .expect("open")
            .read_to_string(&mut text)
            .expect("readable");
        assert!(status.success(), "the target failed: {status}\n{text}");
        text
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the target at the failure: {:?}", self.child.try_wait());
        }
        let _ended = self.child.kill();
        let _collected = self.child.wait();
        if std::thread::panicking()
            && let Some(out) = &mut self.out
        {
            let mut text = String::new();
            let _partly = out.read_to_string(&mut text);
            println!("it printed: {text}");
        }
    }
}
