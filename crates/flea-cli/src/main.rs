//! The command `flea`: parses what was typed, runs it, turns failures into messages and exit
//! codes. The work is done by the library; `commands` has one function per subcommand.

mod args;
mod commands;
mod family;
mod interrupt;
mod output;
mod plain;
mod record;
mod report;
mod target;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _, error::ErrorKind};

use crate::args::{Cli, Command, Target};

/// The request cannot be served.
const REFUSED: u8 = 1;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(target) = cli.command.target() {
        check_usage(target);
    }
    match commands::run(cli.command) {
        Ok(code) => ExitCode::from(code),
        // Whoever read our output has seen enough (`flea trace ... | head`).
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flea: {}", plain::text(&chain(&error)));
            ExitCode::from(REFUSED)
        }
    }
}

/// Exits with code 2 unless exactly one of PID and COMMAND is given.
fn check_usage(target: &Target) {
    let message = match (target.pid, target.command.is_empty()) {
        (None, true) => "name the target: -p PID, or -- COMMAND ARG...",
        (Some(_), false) => "-p PID and -- COMMAND exclude each other",
        (Some(pid), true) if pid <= 0 => "a PID is a positive number",
        _ => return,
    };
    Cli::command().error(ErrorKind::MissingRequiredArgument, message).exit()
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

/// An error and its causes in one line, without those that repeat their parent.
fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if text.contains(&cause) {
            continue;
        }
        if !text.is_empty() {
            text += ": ";
        }
        text += &cause;
    }
    text
}

impl Command {
    fn target(&self) -> Option<&Target> {
        match self {
            Self::List(a) | Self::Count(a) | Self::Latency(a) | Self::Trace(a) => Some(&a.target),
            Self::Hist(a) => Some(&a.target),
            Self::Run(a) => Some(&a.target),
            Self::Replace(a) => Some(&a.target),
            Self::Types(_)
            | Self::Ps(_)
            | Self::Detach(_)
            | Self::GdbScript
            | Self::FramesFile(_) => None,
        }
    }
}
