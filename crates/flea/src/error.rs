//! What can go wrong, an enum per operation. Messages say what was tried, what was left as
//! it was, and what to do next.

use std::sync::Arc;

use flea_object::spec::{MapIdx, ProgramKind};
use flea_process::{ProcError, SeizeError, SpawnError};
use flea_symbols::{PatternError, Refusal, addr::RemoteAddr};
use flea_verifier::Rejection;

use crate::{modules::OpenError, own::HelperError, registry::RegistryError};

/// The programs that run in a frame of ours between a function and its caller.
const FRAMED: &str = "an exit program (or an entry program that changes arguments, or reads more)";
/// Those that do not.
const UNFRAMED: &str = "an entry program (fentry, `flea count`) can be attached";

/// A target that cannot be worked with.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// It is not there, or not what Flea can trace.
    #[error(transparent)]
    Process(#[from] ProcError),
    /// The command could not be started.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// It may not be traced, or is by somebody else.
    #[error(transparent)]
    Seize(#[from] SeizeError),
    /// It is not the program any more that the session is with.
    #[error(transparent)]
    Trace(#[from] flea_process::TraceError),
    /// A started command could not be ended.
    #[error("the command that was started cannot be ended: {0}")]
    Abandon(#[source] std::io::Error),
    /// Its main executable cannot be read.
    #[error(transparent)]
    Module(#[from] Arc<OpenError>),
}

/// No function for a pattern.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Not a pattern.
    #[error("`{pattern}`: {source}")]
    Pattern {
        /// What was given.
        pattern: String,
        /// What is wrong with it.
        source: PatternError,
    },
    /// No such module.
    #[error("`{pattern}`: no loaded module has that name; loaded are: {}", .loaded.join(", "))]
    NoSuchModule {
        /// What was given.
        pattern: String,
        /// The modules there are.
        loaded: Vec<String>,
    },
    /// No such function.
    #[error("`{pattern}`: no such function{}", suggestion(.nearest))]
    NoSuchFunction {
        /// What was given.
        pattern: String,
        /// Names like it.
        nearest: Vec<String>,
    },
    /// The module cannot be read.
    #[error(transparent)]
    Open(#[from] Arc<OpenError>),
    /// The process is gone.
    #[error(transparent)]
    Process(#[from] ProcError),
}

fn suggestion(nearest: &[String]) -> String {
    if nearest.is_empty() {
        return "; `flea list` with a pattern like '*name*' shows what there is".to_owned();
    }
    format!("; did you mean {}?", nearest.join(", "))
}

/// An object that could not be loaded. The target is as it was.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Not an object Flea can use.
    #[error(transparent)]
    Object(#[from] flea_object::ObjectError),
    /// A program array holds what it cannot.
    #[error(transparent)]
    ProgramArray(#[from] ProgramArrayError),
    /// Its maps could not be laid out.
    #[error("maps: {0}")]
    Arena(#[from] flea_maps::ArenaError),
    /// The target could not be seized.
    #[error(transparent)]
    Seize(#[from] SeizeError),
    /// Working on this very process failed.
    #[error(transparent)]
    Helper(#[from] HelperError),
    /// Setting up memory in the target failed.
    #[error(transparent)]
    Remote(#[from] RemoteError),
}

/// A program array that was not changed. What is attached is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ProgramArrayError {
    /// The map is none.
    #[error("map {} is no program array", .map.0)]
    NoSuchArray {
        /// Its number.
        map: MapIdx,
    },
    /// There is no such program.
    #[error("program array {map}: there is no program {program} in its object")]
    NoSuchProgram {
        /// The array.
        map: String,
        /// The number.
        program: usize,
    },
    /// The index is past its end.
    #[error("program array {map} has {max_entries} elements: there is no index {index}")]
    OutOfRange {
        /// The array.
        map: String,
        /// What was asked for.
        index: u32,
        /// How many there are.
        max_entries: u32,
    },
    /// The program was loaded with other maps.
    #[error("program array {map}: program {program} belongs to another object; load both together")]
    OtherObject {
        /// The array.
        map: String,
        /// The program.
        program: String,
    },
    /// Programs of two kinds would use one array.
    #[error(
        "program array {map}: program {program} is an {} program and {other} an {} program; all \
         that stand in an array or call through it are of one kind",
        .kind.name(),
        .other_kind.name()
    )]
    Kind {
        /// The array.
        map: String,
        /// The program.
        program: String,
        /// Its kind.
        kind: ProgramKind,
        /// Another one.
        other: String,
        /// Its kind.
        other_kind: ProgramKind,
    },
    /// What is attached could not be made anew.
    #[error("program array {map}: {error}; the array and what is attached are as before")]
    Rebuild {
        /// The array.
        map: String,
        /// Why.
        error: Box<AttachError>,
    },
}

/// Setting up memory in the target failed.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// A system call made in the target.
    #[error("setting up memory in the target: {0}; nothing was attached")]
    Call(#[from] flea_process::RemoteError),
    /// What is to be attached would not live with the target's seccomp filters.
    #[error("{0}; nothing was attached")]
    Seccomp(#[source] flea_process::RemoteError),
    /// The target's control group has no room for memory of ours.
    #[error(
        "process {pid} is {left} bytes from the memory limit of its control group {}, where the \
         kernel kills, and {needed} may be needed: raise that limit; nothing was attached",
        .group.display()
    )]
    MemoryLimit {
        /// The process.
        pid: flea_process::Pid,
        /// What it has left.
        left: u64,
        /// What may be needed.
        needed: u64,
        /// The group.
        group: std::path::PathBuf,
    },
    /// Tracing it.
    #[error(transparent)]
    Trace(#[from] flea_process::TraceError),
    /// The target's memory.
    #[error(transparent)]
    Memory(#[from] flea_process::MemoryError),
    /// The address space is full near a module.
    #[error("no free address space of {bytes} bytes within 2 GiB of {near}")]
    NoGap {
        /// The module.
        near: RemoteAddr,
        /// What was wanted.
        bytes: u64,
    },
    /// A shared object cannot be where there is room for it.
    #[error(transparent)]
    Object(#[from] flea_load::LinkError),
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Memory layout.
    #[error(transparent)]
    Process(#[from] ProcError),
    /// Something local.
    #[error("{what}: {source}")]
    Local {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// A program that was not attached. The target runs as before.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The function's entry cannot be patched safely.
    #[error("{function}: {refusal}")]
    Refused {
        /// The function.
        function: String,
        /// Why.
        refusal: Refusal,
    },
    /// A program with a frame needs to know the stack arguments.
    #[error(
        "{function}: {} needs to know how many stack arguments it takes, and neither debug \
         information nor its code tell; {}",
        FRAMED,
        UNFRAMED
    )]
    StackArguments {
        /// The function.
        function: String,
    },
    /// Exceptions could not pass through the frame of an exit program.
    #[error(
        "{module} has an exception unwinder that cannot be told of the frames that exit programs \
         (fexit, fsession, `flea latency`) have ({reason}): an exception would end the process, \
         so nothing was attached; entry programs (fentry, `flea count`) can be"
    )]
    Unwinder {
        /// The module.
        module: String,
        /// What stands in the way.
        reason: String,
    },
    /// The function would notice a program's frame.
    #[error(
        "{function}: {} needs a frame between the function and its caller, and this one uses its \
         return address (as vfork, setjmp and dlsym do); {}",
        FRAMED,
        UNFRAMED
    )]
    ReturnAddress {
        /// The function.
        function: String,
    },
    /// An fmod_ret program may skip the function, which cannot be skipped.
    #[error(
        "{function}: program {program} may return something other than 0 and so skip the \
         function, but {reason}; a program that always returns 0, or one of another kind, can be \
         attached"
    )]
    Skip {
        /// The function.
        function: String,
        /// The program.
        program: String,
        /// Why not.
        reason: String,
    },
    /// The types of the function's module give no clear answer to a CO-RE relocation.
    #[error("program {program} on {function}: CO-RE relocation of {source}")]
    Core {
        /// The program.
        program: String,
        /// The function.
        function: String,
        /// Why.
        source: flea_object::core_relo::CoreError,
    },
    /// The verifier refused the program.
    #[error("program {program} on {function}: {rejection}")]
    Rejected {
        /// The program.
        program: String,
        /// The function.
        function: String,
        /// The report.
        rejection: Box<Rejection>,
    },
    /// The compiler refused it.
    #[error("program on {function}: {source}")]
    Compile {
        /// The function.
        function: String,
        /// Why.
        source: flea_image::CompileError,
    },
    /// The skeleton could not be made.
    #[error("{function}: {source}")]
    Link {
        /// The function.
        function: String,
        /// Why.
        source: flea_image::LinkError,
    },
    /// No room for code.
    #[error("no room for {bytes} bytes of code near {near}")]
    NoRoom {
        /// The site.
        near: RemoteAddr,
        /// What was wanted.
        bytes: u32,
    },
    /// Others changed the same functions again and again meanwhile.
    #[error("other controllers changed these functions {attempts} times meanwhile; try again")]
    Contended {
        /// How often it was tried.
        attempts: usize,
    },
    /// Already attached by this very object.
    #[error("{function}: program {program} is attached to it already")]
    Twice {
        /// The function.
        function: String,
        /// The program.
        program: String,
    },
    /// The same in one list.
    #[error("{function}: program {program} is to be attached to it twice; nothing was attached")]
    NamedTwice {
        /// The function.
        function: String,
        /// The program.
        program: String,
    },
    /// An empty list.
    #[error("program {program}: no function to attach it to was given")]
    NoFunctions {
        /// The program.
        program: String,
    },
    /// The target could not be seized.
    #[error(transparent)]
    Seize(#[from] SeizeError),
    /// Working on this very process failed.
    #[error(transparent)]
    Helper(#[from] HelperError),
    /// Memory in the target.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// The sites could not be swapped; all are as they were.
    #[error(transparent)]
    Commit(#[from] flea_patch::CommitError<flea_process::TraceError>),
    /// A program's target in its section name.
    #[error(transparent)]
    Find(#[from] FindError),
}

impl AttachError {
    /// A few words for the kind of reason, for counts.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Refused { refusal, .. } => refusal.reason(),
            Self::StackArguments { .. } => "stack arguments not known",
            Self::ReturnAddress { .. } => "uses its return address",
            Self::Unwinder { .. } => "unwinder cannot be told",
            Self::Skip { .. } => "cannot be skipped",
            Self::Core { .. } => "the target's types do not fit",
            Self::Rejected { .. } => "program not accepted for its signature",
            Self::Compile { .. } => "program cannot be compiled",
            Self::Link { .. } => "image cannot be made",
            Self::NoRoom { .. } => "no room for code",
            Self::Twice { .. } | Self::NamedTwice { .. } => "attached already",
            Self::Find(_) | Self::NoFunctions { .. } => "no such function",
            Self::Contended { .. }
            | Self::Seize(_)
            | Self::Helper(_)
            | Self::Remote(_)
            | Self::Commit(_) => "the process cannot be changed",
        }
    }
}

impl From<RegistryError> for AttachError {
    fn from(error: RegistryError) -> Self {
        Self::Remote(RemoteError::Registry(error))
    }
}
