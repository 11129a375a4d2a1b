//! The subcommands: find functions, attach, wait, read, print.

mod attached;
mod functions;
mod replace;
mod run;
mod tracing;
mod types;
mod walkers;

use anyhow::Result;

use crate::args::Command;

/// Runs `command`; the exit code.
pub fn run(command: Command) -> Result<u8> {
    match command {
        Command::List(args) => functions::list(&args),
        Command::Count(args) => tracing::count(&args),
        Command::Latency(args) => tracing::latency(&args),
        Command::Hist(args) => tracing::hist(&args),
        Command::Trace(args) => tracing::trace(&args),
        Command::Run(args) => run::run(&args),
        Command::Replace(args) => replace::replace(&args),
        Command::Types(args) => types::types(&args),
        Command::Ps(args) => attached::ps(&args),
        Command::Detach(args) => attached::detach(&args),
        Command::GdbScript => walkers::gdb_script(),
        Command::FramesFile(args) => walkers::frames_file(&args),
    }
}
