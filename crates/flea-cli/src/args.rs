//! What can be typed: the words and flags of DESIGN's command list. Knows nothing of
//! processes; `main` hands the parsed values on.

use std::{ffi::OsString, path::PathBuf};

use clap::{Args, Parser, Subcommand};

/// Attach verified eBPF programs to any function of a live process.
#[derive(Debug, Parser)]
#[command(name = "flea", version, about, after_help = AFTER_HELP)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const AFTER_HELP: &str = "\
PATTERN is [MODULE:]FUNCTION, with * and ?. Without MODULE it means the main executable, and
any loaded module where nothing there matches.

  flea count -p $(pidof redis-server) 'libc.so.6:malloc'
  flea latency -- git status
  flea trace -p 4242 'parse_*' --json

Exit codes: 0 done, 1 the request cannot be served, 2 usage; with `-- COMMAND` the command's
own code once it has run.";

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Where it can attach, how, and the signature
    List(Functions),
    /// Calls per function
    Count(Functions),
    /// Histogram of the time from entry to exit
    Latency(Functions),
    /// Histogram of an argument, the result or the duration
    Hist(Hist),
    /// A line per call: time, thread, arguments, result, duration
    Trace(Functions),
    /// Run an eBPF object made by `clang -target bpf`
    Run(Run),
    /// Live patching: functions of a shared object take the place of the target's
    Replace(Replace),
    /// Print a C header of the target's types, to compile programs against
    Types(Types),
    /// What is attached in which process
    Ps(Ps),
    /// Take it off
    Detach(Detach),
    /// Print a script that lets gdb walk through functions traced at their exit
    GdbScript,
    /// Make the file by which `perf record --call-graph dwarf` walks through them
    FramesFile(FramesFile),
}

/// `flea frames-file`.
#[derive(Debug, Args)]
pub struct FramesFile {
    /// Where; if not there, set FLEA_FRAMES_FILE to it when tracing
    #[arg(value_name = "PATH", default_value = flea::frames_file::DEFAULT_PATH)]
    pub path: PathBuf,
}

/// Which process.
#[derive(Debug, Args)]
pub struct Target {
    /// A running process
    #[arg(short, long, value_name = "PID")]
    pub pid: Option<i32>,
    /// Start this command and trace it from its first instruction
    #[arg(last = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// Flags that every command has.
#[derive(Debug, Args)]
pub struct Common {
    /// A line of JSON per record
    #[arg(long)]
    pub json: bool,
    /// Write results to a file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// How long to trace.
#[derive(Debug, Args)]
pub struct Span {
    /// Stop after this many seconds (default: until Ctrl-C or the target's end)
    #[arg(short, long, value_name = "SECONDS", value_parser = seconds)]
    pub duration: Option<std::time::Duration>,
    /// Also trace the processes that the target starts, and the programs they execute
    #[arg(short, long)]
    pub follow: bool,
}

/// Whether to wait for libraries.
#[derive(Debug, Args)]
pub struct Wait {
    /// What no loaded module has is waited for: it is attached to when the target has loaded a
    /// library that has it (looked for 50 times a second: the first calls may be missed)
    #[arg(long)]
    pub pending: bool,
}

/// Commands over functions.
#[derive(Debug, Args)]
pub struct Functions {
    /// [MODULE:]FUNCTION, with * and ?
    #[arg(value_name = "PATTERN", required = true)]
    pub patterns: Vec<String>,
    #[command(flatten)]
    /// Which process.
    pub target: Target,
    #[command(flatten)]
    /// Output.
    pub common: Common,
    #[command(flatten)]
    /// Duration.
    pub span: Span,
    #[command(flatten)]
    /// What is not there yet.
    pub wait: Wait,
}

/// `flea hist`.
#[derive(Debug, Args)]
pub struct Hist {
    /// [MODULE:]FUNCTION
    #[arg(value_name = "FUNCTION")]
    pub function: String,
    /// argN, a parameter's name, retval or duration
    #[arg(value_name = "EXPR")]
    pub expr: String,
    #[command(flatten)]
    /// Which process.
    pub target: Target,
    #[command(flatten)]
    /// Output.
    pub common: Common,
    #[command(flatten)]
    /// Duration.
    pub span: Span,
    #[command(flatten)]
    /// What is not there yet.
    pub wait: Wait,
}

/// `flea run`.
#[derive(Debug, Args)]
pub struct Run {
    /// The object: FILE.bpf.o
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Print the verifier's whole log: every instruction it visits, and what is known there
    #[arg(short, long)]
    pub verbose: bool,
    /// Let programs write to the target's memory (bpf_probe_write_user), and change what functions
    /// are called with and return (stores to the context). Nothing checks what they write: it can
    /// crash the target, corrupt its data, or make it do anything that it may
    #[arg(long)]
    pub allow_write: bool,
    #[command(flatten)]
    /// Which process.
    pub target: Target,
    #[command(flatten)]
    /// Output.
    pub common: Common,
    #[command(flatten)]
    /// Duration.
    pub span: Span,
}

/// `flea replace`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_REPLACE_HELP)]
pub struct Replace {
    /// A shared object: gcc -shared -fPIC -O2 -g fix.c -o fix.so
    #[arg(value_name = "OBJECT")]
    pub object: PathBuf,
    /// [MODULE:]FUNCTION to replace, and its replacement where that has another name
    #[arg(value_name = "FUNCTION[=SYMBOL]", required = true)]
    pub functions: Vec<String>,
    /// Do not compare the signatures, where there is no debug information to do so
    #[arg(long)]
    pub unchecked_signature: bool,
    #[command(flatten)]
    /// Which process.
    pub target: Target,
    #[command(flatten)]
    /// Output.
    pub common: Common,
    /// Undo it after this many seconds (default: it stays, also when flea has ended)
    #[arg(short, long, value_name = "SECONDS", value_parser = seconds)]
    pub duration: Option<std::time::Duration>,
}

const AFTER_REPLACE_HELP: &str = "\
Calls that begin from then on go to the replacement; those inside the original end there. All
functions are replaced or none. What the object imports are the target's own functions and
variables, also those that it does not export. Constructors, thread-local variables and
exception handling are refused. Calls that the compiler has inlined are not replaced.

  flea replace -p 4242 fix.so parse_header
  flea replace -p 4242 fix.so libfoo.so.1:parse=fixed_parse
  flea ps -p 4242; flea detach 4242.7        what is replaced, and undoing it

With `-- COMMAND` it is for the command's life, whose exit code is returned.";

/// `flea types`.
#[derive(Debug, Args)]
#[command(
    override_usage = "flea types [OPTIONS] <BINARY|-p PID> [[MODULE:]FUNCTION|[MODULE:]TYPE]...",
    after_help = AFTER_TYPES_HELP
)]
pub struct Types {
    /// A running process
    #[arg(short, long, value_name = "PID")]
    pub pid: Option<i32>,
    /// Without -p the binary first; then functions and types (default: all types)
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// Write the header to a file instead of standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

const AFTER_TYPES_HELP: &str = "\
The header has each type once, with the sizes and offsets of the target, and what its debug
information names. Fields are relocated when a program is attached (CO-RE): one object runs on
every build of the target. C++ and Rust names are spelled for C: std::string is std__string.

  flea types /usr/bin/redis-server redisObject client > redis.h
  flea types -p 4242 processCommand -o redis.h
  flea types -p 4242 libc.so.6:fopen
  clang -g -O2 -target bpf -c program.bpf.c      with #include \"redis.h\"";

/// `flea ps`.
#[derive(Debug, Args)]
pub struct Ps {
    /// Only this process
    #[arg(short, long, value_name = "PID")]
    pub pid: Option<i32>,
    #[command(flatten)]
    /// Output.
    pub common: Common,
}

/// `flea detach`.
#[derive(Debug, Args)]
pub struct Detach {
    /// PID.N as `flea ps` prints it, or PID for everything in that process
    #[arg(value_name = "ID", required_unless_present = "all")]
    pub ids: Vec<String>,
    /// Everything, in every process that may be reached
    #[arg(long, conflicts_with = "ids")]
    pub all: bool,
    #[command(flatten)]
    /// Output.
    pub common: Common,
}

fn seconds(text: &str) -> Result<std::time::Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("`{text}` is not a number of seconds"))?;
    std::time::Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}
