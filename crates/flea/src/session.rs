//! A target process and what is known of it.

use std::{
    path::{Path, PathBuf},
    process::{ChildStderr, ChildStdin, ChildStdout, Command},
    sync::{Arc, Mutex, MutexGuard, OnceLock},
};

use flea_process::{Exit, Memory, MemoryError, Pid, Spawned, Watch};
use flea_symbols::addr::{RemoteAddr, Svma};
use flea_verifier::Permissions;

use crate::{
    error::{FindError, LoadError, SessionError},
    function::{self, Function},
    modules::{self, Module},
    object::Object,
    patch::{Patch, PatchError},
    types::{self, TypesError},
    vdso,
};

/// A process that programs can be attached to. Cheap to clone. Dropping it does nothing to
/// the process; links take their programs off when they are dropped.
///
/// ```
/// // Of a program that is started, the first call is seen as well.
/// use flea::{Exit, Session, builtin::Count};
/// use std::process::Command;
///
/// let session = Session::spawn(Command::new("true"))?;
/// let mut count = Count::start(&session, &session.find("libc.so.6:exit")?)?;
/// session.resume()?;
/// assert_eq!(session.wait()?, Some(Exit::Code(0)));
/// count.detach()?;
/// assert_eq!(count.read(), [1]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Session {
    inner: Arc<Inner>,
}

/// What a session's parts share.
pub(crate) struct Inner {
    pid: Pid,
    watch: Watch,
    /// Its memory, which is no more once it executes another program.
    memory: Option<Memory>,
    child: Mutex<Option<Child>>,
    modules: Mutex<Vec<Arc<Module>>>,
    vdso_clock: OnceLock<Option<RemoteAddr>>,
    permissions: Mutex<Permissions>,
}

/// A started command.
struct Child {
    spawned: Spawned,
    state: ChildState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ChildState {
    /// Waits before its first own instruction.
    Held,
    Running,
    Ended(Exit),
}

impl Session {
    /// A session with a running process. Nothing is done to it yet.
    ///
    /// ```
    /// use flea::{Session, builtin::{Expr, Histograms}};
    /// use std::io::{BufRead as _, BufReader, Write as _};
    /// use std::process::{Command, Stdio};
    ///
    /// let mut cat = Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    /// let (mut to_cat, from_cat) = (cat.stdin.take().unwrap(), cat.stdout.take().unwrap());
    /// let mut from_cat = BufReader::new(from_cat).lines();
    /// writeln!(to_cat, "it runs")?;
    /// assert_eq!(from_cat.next().unwrap()?, "it runs");
    ///
    /// let session = Session::attach(cat.id().cast_signed())?;
    /// let write = &session.find("libc.so.6:write")?[0];
    /// let mut sizes = Histograms::of(&session, write, &Expr::Arg(2))?;
    /// writeln!(to_cat, "it is traced")?;
    /// assert_eq!(from_cat.next().unwrap()?, "it is traced");
    /// sizes.detach()?;
    /// assert_eq!(sizes.read()[0].sum, "it is traced\n".len() as i128);
    /// drop(to_cat);
    /// assert!(cat.wait()?.success());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// No such process, a kernel thread, a 32-bit program, or no right to trace it.
    pub fn attach(pid: Pid) -> Result<Self, SessionError> {
        flea_process::check_traceable(pid)?;
        let session = Self::new(pid, None);
        // Seizing stops nothing, and tells now what a later attach would fail for.
        flea_process::seize(pid, |_| ())?;
        session.refresh()?;
        Ok(session)
    }

    /// Starts `command`. It waits where its shared libraries have
    /// been loaded and none of its own code, constructors included, has run;
    /// [`Session::resume`] lets it go on.
    ///
    /// # Errors
    /// The command cannot be executed, or it ended before it got there.
    pub fn spawn(command: Command) -> Result<Self, SessionError> {
        let mut spawned = flea_process::spawn(command)?;
        let pid = spawned.pid();
        if let Err(error) = flea_process::check_traceable(pid)
            .map_err(SessionError::from)
            .and_then(|_| run_to_start(&mut spawned))
        {
            // It has not run; its parent ends it.
            let _ = spawned.child_mut().kill();
            let _ = spawned.child_mut().wait();
            return Err(error);
        }
        let session = Self::new(pid, Some(Child { spawned, state: ChildState::Held }));
        session.refresh()?;
        Ok(session)
    }

    /// A session with the process that calls this: its own functions can be traced. The work
    /// on its code is done by a forked child that lives for some milliseconds.
    ///
    /// ```
    /// use flea::{Session, builtin::Count};
    ///
    /// #[unsafe(no_mangle)]
    /// #[inline(never)]
    /// extern "C" fn own_example(x: u64) -> u64 {
    ///     x * 2
    /// }
    ///
    /// let session = Session::this_process()?;
    /// let mut count = Count::start(&session, &session.find("own_example")?)?;
    /// let threads = [1, 2].map(|x| std::thread::spawn(move || own_example(x)));
    /// assert_eq!(threads.map(|t| t.join().unwrap()), [2, 4]);
    /// count.detach()?;
    /// assert_eq!(count.read(), [2]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As for [`Session::attach`].
    pub fn this_process() -> Result<Self, SessionError> {
        let session = Self::new(std::process::id().cast_signed(), None);
        session.refresh()?;
        Ok(session)
    }

    fn new(pid: Pid, child: Option<Child>) -> Self {
        Self {
            inner: Arc::new(Inner {
                pid,
                watch: Watch::new(pid),
                memory: Memory::open(pid).ok(),
                child: Mutex::new(child),
                modules: Mutex::default(),
                vdso_clock: OnceLock::new(),
                permissions: Mutex::default(),
            }),
        }
    }

    /// The process.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.inner.pid
    }

    /// A session with a process that waits at the start of a program that it has executed; `known`
    /// are modules whose files need not be read again.
    pub(crate) fn of_executed(pid: Pid, known: &[Arc<Module>]) -> Result<Self, SessionError> {
        let session = Self::new(pid, None);
        *lock(&session.inner.modules) = modules::list_knowing(pid, known)?;
        Ok(session)
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    pub(crate) fn modules(&self) -> Vec<Arc<Module>> {
        lock(&self.inner.modules).clone()
    }

    /// Reads again which modules are loaded: after the target has loaded a library.
    ///
    /// # Errors
    /// The process has ended, or its main executable cannot be read.
    pub fn refresh(&self) -> Result<(), SessionError> {
        let modules = modules::list(self.inner.pid)?;
        if let Some(main) = modules.iter().find(|m| m.is_main()) {
            main.with_symbols(|_| ())?;
        }
        *lock(&self.inner.modules) = modules;
        Ok(())
    }

    /// Reads again which modules are loaded, if those are others than before; whether they are.
    ///
    /// # Errors
    /// The process has ended, or executed another program.
    pub fn refresh_changed(&self) -> Result<bool, SessionError> {
        if self.inner.has_lost_its_memory() {
            return Err(flea_process::TraceError::Execed { pid: self.pid() }.into());
        }
        let known = self.modules();
        let now = modules::list_again(self.pid(), &known)?;
        let is_same = |(a, b): (&Arc<Module>, &Arc<Module>)| Arc::ptr_eq(a, b);
        if now.len() == known.len() && now.iter().zip(&known).all(is_same) {
            return Ok(false);
        }
        *lock(&self.inner.modules) = now;
        Ok(true)
    }

    /// The functions that `pattern` (`[MODULE:]FUNCTION`, with `*` and `?`) names. Without a
    /// module it means the main executable, and any loaded module where nothing there
    /// matches. A module is named by its path as the target sees it, or by its file's name,
    /// with or without what follows `.so`.
    ///
    /// # Errors
    /// Nothing matches: the error offers the nearest names.
    pub fn find(&self, pattern: &str) -> Result<Vec<Function>, FindError> {
        let modules = lock(&self.inner.modules).clone();
        function::find(self.inner.pid, &modules, pattern)
    }

    /// A C header of types of the target, for programs to be compiled against: those of the
    /// functions and types `names` (`[MODULE:]NAME`), and all that they lead to. All are of one
    /// module: the main executable where none is named, or another that has them.
    ///
    /// # Errors
    /// No debug information, or none that has the names.
    pub fn types_header(&self, names: &[String]) -> Result<String, TypesError> {
        let modules = lock(&self.inner.modules).clone();
        types::of_modules(&modules, names)
    }

    /// Allows the programs of objects that are loaded from now on what no program may by itself:
    /// to write to the target's memory, and to change what functions are called with and return.
    /// What was allowed before is replaced. The verifier does not see what such a program does
    /// to the target: that is on whoever allows it.
    ///
    /// ```
    /// # mod parts { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/parts/counter.rs")); }
    /// use flea::{Permissions, Session};
    ///
    /// let session = Session::this_process()?;
    /// session.permit(Permissions { write_target: true });
    /// let object = session.load(parts::counter())?;
    /// # drop(object);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn permit(&self, permissions: Permissions) {
        *lock(&self.inner.permissions) = permissions;
    }

    /// Loads an object: its maps come to life in memory that this process and the target
    /// share.
    ///
    /// # Errors
    /// Memory in the target cannot be set up.
    pub fn load(&self, object: flea_object::spec::Object) -> Result<Object, LoadError> {
        Object::load(&self.inner, object)
    }

    /// Reads a shared object whose functions are to replace some of the target's. Nothing is
    /// done to the target yet.
    ///
    /// # Errors
    /// The file cannot be read, or is none that can be loaded into a running process.
    pub fn load_shared_object(&self, path: impl AsRef<Path>) -> Result<Patch, PatchError> {
        Patch::load(&self.inner, path.as_ref())
    }

    /// The pipes of a started command (stdin, stdout, stderr), where it was given some; once.
    #[must_use]
    pub fn take_pipes(&self) -> (Option<ChildStdin>, Option<ChildStdout>, Option<ChildStderr>) {
        let mut child = lock(&self.inner.child);
        let Some(child) = child.as_mut() else { return (None, None, None) };
        let process = child.spawned.child_mut();
        (process.stdin.take(), process.stdout.take(), process.stderr.take())
    }

    /// Lets a started command run; does nothing for others.
    ///
    /// # Errors
    /// It cannot be signalled.
    pub fn resume(&self) -> Result<(), SessionError> {
        if let Some(child) = lock(&self.inner.child).as_mut()
            && child.state == ChildState::Held
        {
            child.spawned.release()?;
            child.state = ChildState::Running;
        }
        Ok(())
    }

    /// How a started command ended, if it has; `None` for a process that was not started
    /// here.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn try_wait(&self) -> Result<Option<Exit>, SessionError> {
        let mut child = lock(&self.inner.child);
        let Some(child) = child.as_mut() else { return Ok(None) };
        if let ChildState::Ended(exit) = child.state {
            return Ok(Some(exit));
        }
        let exit = child.spawned.try_wait()?;
        if let Some(exit) = exit {
            child.state = ChildState::Ended(exit);
        }
        Ok(exit)
    }

    /// Waits until a started command has ended, and says how; `None` at once for a process
    /// that was not started here.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn wait(&self) -> Result<Option<Exit>, SessionError> {
        let mut child = lock(&self.inner.child);
        let Some(child) = child.as_mut() else { return Ok(None) };
        if let ChildState::Ended(exit) = child.state {
            return Ok(Some(exit));
        }
        let exit = child.spawned.wait()?;
        child.state = ChildState::Ended(exit);
        Ok(Some(exit))
    }

    /// Ends a command that was started and never resumed. Nothing of it has run.
    ///
    /// # Errors
    /// It cannot be ended.
    pub fn abandon(&self) -> Result<(), SessionError> {
        if let Some(child) = lock(&self.inner.child).as_mut()
            && child.state == ChildState::Held
        {
            let process = child.spawned.child_mut();
            process.kill().and_then(|()| process.wait()).map_err(SessionError::Abandon)?;
            child.state = ChildState::Ended(Exit::Signal(libc::SIGKILL));
        }
        Ok(())
    }

    /// How a process that was not started here has ended; `None` while it runs, and where the
    /// system does not tell (before Linux 6.15, once its parent has waited for it).
    #[must_use]
    pub fn ended_how(&self) -> Option<Exit> {
        self.inner.watch.exit()
    }

    /// The path of its program, as it sees it; empty where that is not known.
    #[must_use]
    pub fn program(&self) -> String {
        let modules = self.modules();
        modules.iter().find(|m| m.is_main()).map_or_else(String::new, |m| m.path().to_owned())
    }

    /// The program that the process has executed since, by which it lost all that was attached;
    /// `None` where it has not, and where it has ended.
    #[must_use]
    pub fn executed(&self) -> Option<PathBuf> {
        if self.inner.has_lost_its_memory() { flea_process::exe(self.pid()).ok() } else { None }
    }

    /// Whether the process still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        flea_process::check_traceable(self.pid()).is_ok()
    }
}

impl Inner {
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// What programs may do that are loaded now.
    pub(crate) fn permissions(&self) -> Permissions {
        *lock(&self.permissions)
    }

    /// Whether the process has ended, or executed another program, which nothing of this session
    /// is in.
    pub(crate) fn has_ended(&self) -> bool {
        flea_process::check_traceable(self.pid).is_err() || self.has_lost_its_memory()
    }

    fn has_lost_its_memory(&self) -> bool {
        // Nothing need be mapped there: what counts is what kind of error it is.
        let gone = |memory: &Memory| {
            matches!(memory.read(RemoteAddr(0), &mut [0]), Err(MemoryError::Gone { .. }))
        };
        self.memory.as_ref().is_some_and(gone)
    }

    /// What is loaded now.
    pub(crate) fn loaded_modules(&self) -> Result<Vec<Arc<Module>>, flea_process::ProcError> {
        let known = lock(&self.modules).clone();
        modules::list_again(self.pid, &known)
    }

    pub(crate) fn vdso_clock_gettime(&self) -> Option<RemoteAddr> {
        *self.vdso_clock.get_or_init(|| vdso::clock_gettime(self.pid))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // A command that was started for this session and never let run is of no use to
        // anybody, and would stay stopped for ever.
        if let Some(mut child) = lock(&self.child).take()
            && child.state == ChildState::Held
        {
            let process = child.spawned.child_mut();
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// `r_state` in the loader's `struct r_debug` (<link.h>).
const R_STATE_OFFSET: i64 = 24;
/// `RT_CONSISTENT`
const CONSISTENT: u8 = 0;

/// Where a fresh process is to wait.
pub(crate) enum Start {
    /// Where its loader tells debuggers that libraries are loaded and relocated, and no constructor
    /// has run (`_dl_debug_state`); its `_r_debug`, where that is known.
    Loader(RemoteAddr, Option<RemoteAddr>),
    /// At its entry point: its loader is none that does.
    Entry(RemoteAddr),
    /// At its entry point, where a program without a loader stands already.
    Here(RemoteAddr),
}

impl Start {
    pub(crate) fn of(pid: Pid) -> Result<Self, SessionError> {
        let auxv = flea_process::auxv(pid)?;
        let loader = auxv.base.filter(|base| base.0 != 0);
        if let Some(loader) = loader
            && let Some((notify, r_debug)) = loader_hook(pid, loader)?
        {
            return Ok(Self::Loader(notify, r_debug));
        }
        let entry = auxv.entry.unwrap_or(RemoteAddr(0));
        Ok(if loader.is_some() { Self::Entry(entry) } else { Self::Here(entry) })
    }

    pub(crate) fn address(&self) -> RemoteAddr {
        let (Self::Loader(at, _) | Self::Entry(at) | Self::Here(at)) = *self;
        at
    }

    /// Whether a process that comes there is ready.
    pub(crate) fn is_ready(&self) -> impl FnMut(&Memory) -> bool + Send + use<> {
        let r_debug = match self {
            // musl does not export `_r_debug`; it calls the hook once, when all is loaded.
            Self::Loader(_, r_debug) => *r_debug,
            Self::Entry(_) | Self::Here(_) => None,
        };
        move |memory: &Memory| {
            r_debug.is_none_or(|at| {
                let mut state = [0xff];
                memory.read(at.offset(R_STATE_OFFSET), &mut state).is_ok() && state[0] == CONSISTENT
            })
        }
    }
}

/// Runs a fresh process to where it is to wait.
fn run_to_start(spawned: &mut Spawned) -> Result<(), SessionError> {
    let start = Start::of(spawned.pid())?;
    match start {
        Start::Here(_) => Ok(()),
        _ => Ok(spawned.run_until(start.address(), start.is_ready())?),
    }
}

/// Addresses of `_dl_debug_state` and `_r_debug` in the loader at `base`.
fn loader_hook(
    pid: Pid,
    base: RemoteAddr,
) -> Result<Option<(RemoteAddr, Option<RemoteAddr>)>, SessionError> {
    use object::{Object as _, ObjectSymbol as _};
    let maps = flea_process::maps(pid)?;
    let Some(mapping) = maps.iter().find(|m| m.start == base) else { return Ok(None) };
    let path = flea_process::module_file_path(pid, mapping)?;
    let Ok(bytes) = std::fs::read(path) else { return Ok(None) };
    let Ok(file) = object::File::parse(&*bytes) else { return Ok(None) };
    let find = |name: &str| {
        let symbol = file.dynamic_symbols().find(|s| s.name() == Ok(name))?;
        Some(RemoteAddr(base.0.wrapping_add(Svma(symbol.address()).0)))
    };
    Ok(find("_dl_debug_state").map(|notify| (notify, find("_r_debug"))))
}
