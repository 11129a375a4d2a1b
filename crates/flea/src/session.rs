//! A target process and what is known of it.

use std::{
    ffi::OsString,
    sync::{Arc, Mutex, OnceLock},
};

use flea_process::{Exit, Pid, Spawned};
use flea_symbols::addr::RemoteAddr;

use crate::{
    error::{FindError, LoadError, SessionError},
    function::{self, Function},
    modules::{self, Module},
    object::Object,
    vdso,
};

/// A process that programs can be attached to. Cheap to clone; the process is let go when
/// the last clone, object and link is dropped.
#[derive(Clone)]
pub struct Session {
    inner: Arc<Inner>,
}

/// What a session's parts share.
pub(crate) struct Inner {
    pid: Pid,
    /// A command that was started, and how it stands.
    child: Mutex<Option<Child>>,
    modules: Mutex<Vec<Arc<Module>>>,
    vdso_clock: OnceLock<Option<RemoteAddr>>,
}

/// A started command.
enum Child {
    /// Waits before its first own instruction.
    Held(Spawned),
    /// Runs.
    Running(Spawned),
    /// Has ended.
    Ended(Exit),
}
