//! A tracer that stays: it follows a process into its children and into the programs they
//! execute. Start at [`Follower`].
//!
//! # What it costs the followed
//!
//! They are traced for as long as they are followed: no debugger and no other flea can work on
//! them meanwhile (both are told who does), and each signal, birth and end of theirs stops one
//! thread for as long as the follower takes to answer. Between those they run on.
//!
//! # Who works on them
//!
//! A process has one tracer *thread*. So work on a followed process is done by the follower:
//! [`crate::seize`] hands it over where the process is one of ours.
//!
//! # Where new programs wait
//!
//! A process that has executed a program is *kept* at its first instruction, and later at a place
//! in its loader, until [`Follower::release`]: by ptrace alone, so that its parent sees no stop.
//!
//! # When the controller dies
//!
//! The follower is a process of its own ([`crate::apart`]). It finishes what it is doing, lets
//! those go that it keeps, and ends, with which the kernel lets go of all.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use flea_symbols::addr::RemoteAddr;
use nix::sys::signal::Signal;

use crate::apart::in_own_process;
use crate::hub::{How, Hub, Newcomer};
use crate::hurry::hurry;
use crate::memory::Memory;
use crate::proc::{self, Pid, Tid};
use crate::ptrace::{self, News, Stop, Whose};
use crate::seize::{SeizeError, attach};
use crate::spawn::{SpawnError, Standing, run_to};
use crate::tracer::{Task, TraceError, Tracer};
use crate::window::Parked;

/// Name of the follower's process: by it, another flea knows that waiting is no use.
pub(crate) const FOLLOWER_NAME: &str = "flea-follower";
/// How long to sleep where nothing happens. Stops and orders wake it; what does not is the end
/// of the controller.
const NAP: Duration = Duration::from_millis(50);
/// The same, where somebody waits.
const SHORT_NAP: Duration = Duration::from_millis(1);
/// How often to look whether the follower still lives, while it is waited for.
const LOOK: Duration = Duration::from_millis(50);

/// What has become of those that are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Followed {
    /// A process was forked, with a copy of its parent's memory. It runs.
    Born {
        /// Its number.
        pid: Pid,
        /// Whose memory it has a copy of.
        parent: Pid,
    },
    /// A process has executed a program, and waits before its first instruction.
    Executed {
        /// Its number.
        pid: Pid,
        /// Where it had its memory from before: itself, or who made it by vfork.
        parent: Pid,
    },
    /// A process has ended.
    Ended {
        /// Its number.
        pid: Pid,
    },
}

/// A process that is followed, with all that come of it. Dropping it lets go of them; they run
/// on.
#[derive(Debug)]
pub struct Follower {
    port: Arc<Port>,
    events: Receiver<Followed>,
    thread: Option<JoinHandle<()>>,
}

/// Where orders for a follower go.
#[derive(Debug)]
struct Port {
    /// Of this process: a forked copy of it has the list as well.
    controller: u32,
    orders: Mutex<Sender<Order>>,
    /// The follower's process, once it runs.
    follower: AtomicI32,
    held: Mutex<BTreeSet<Pid>>,
}

/// What is to be done with a followed process; `None` where it is not followed any more.
type Work<'a> = dyn FnOnce(Option<&mut Tracer>) + Send + 'a;
type Job = Box<Work<'static>>;

enum Order {
    Work(Pid, Job),
    Leave,
}

/// Those of this process.
static PORTS: Mutex<Vec<Arc<Port>>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Follower {
    /// Begins to follow process `pid`. What it has forked before is not followed.
    ///
    /// # Errors
    /// As for [`crate::seize`].
    pub fn start(pid: Pid) -> Result<Self, SeizeError> {
        proc::check_traceable(pid)?;
        let (orders, inbox) = channel();
        let (news, events) = channel();
        let (ready, started) = channel();
        let port = Arc::new(Port {
            controller: std::process::id(),
            orders: Mutex::new(orders),
            follower: AtomicI32::new(0),
            held: Mutex::default(),
        });
        let shared = Arc::clone(&port);
        let thread = std::thread::spawn(move || {
            let controller = nix::unistd::getpid();
            let failed = ready.clone();
            let ran = in_own_process(move || {
                let seized = prepare(pid, &shared);
                let (tracer, outcome) = match seized {
                    Ok(tracer) => (Some(tracer), Ok(())),
                    Err(error) => (None, Err(error)),
                };
                // Where nobody waits for it, the controller's thread is no more.
                let _ = ready.send(outcome);
                if let Some(tracer) = tracer {
                    Following { hub: Hub::default(), port: shared, news, inbox, controller }
                        .run(tracer);
                }
            });
            if let Err(reason) = ran {
                let _ = failed.send(Err(SeizeError::Thread { reason }));
            }
        });
        let follower = Self { port, events, thread: Some(thread) };
        let gone = || Err(SeizeError::Gone { pid });
        started.recv().unwrap_or_else(|_| gone())?;
        lock(&PORTS).push(Arc::clone(&follower.port));
        Ok(follower)
    }

    /// The next thing that has happened, waited for.
    #[must_use]
    pub fn next_within(&self, wait: Duration) -> Option<Followed> {
        self.events.recv_timeout(wait).ok()
    }

    /// Whether nobody is followed any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        lock(&self.port.held).is_empty() || self.port.is_dead()
    }

    /// Those that are followed.
    #[must_use]
    pub fn held(&self) -> Vec<Pid> {
        lock(&self.port.held).iter().copied().collect()
    }

    /// Lets a process that waits after an exec run until it is about to execute the instruction
    /// at `addr` and `is_it` says yes; there it waits again.
    ///
    /// # Errors
    /// It ends before, or does not get there.
    pub fn run_until(
        &self,
        pid: Pid,
        addr: RemoteAddr,
        is_it: impl FnMut(&Memory) -> bool + Send,
    ) -> Result<(), SpawnError> {
        crate::seize(pid, move |tracer| run_to(tracer, addr, is_it, Standing::Kept))?
    }

    /// Lets a process run that waits after an exec. One that has ended needs it no more.
    pub fn release(&self, pid: Pid) {
        let Some(port) = port_of(pid) else { return };
        let _gone = port.work(pid, Tracer::let_kept_go);
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        lock(&PORTS).retain(|port| !Arc::ptr_eq(port, &self.port));
        // Where nobody takes it, the follower has ended.
        let _ = lock(&self.port.orders).send(Order::Leave);
        self.port.wake();
        if let Some(thread) = self.thread.take() {
            // It has ended by a panic at worst, which was printed.
            let _ = thread.join();
        }
    }
}

/// The follower of this process that holds `pid`.
pub(crate) fn port_of(pid: Pid) -> Option<Handle> {
    let ports = lock(&PORTS);
    let ours = |port: &&Arc<Port>| port.controller == std::process::id();
    let holds = |port: &&Arc<Port>| lock(&port.held).contains(&pid);
    ports.iter().filter(ours).find(holds).map(|port| Handle(Arc::clone(port)))
}

/// A follower that work can be handed to.
pub(crate) struct Handle(Arc<Port>);

impl Handle {
    /// Has the follower do `work`, and waits for it; `None` where it does not hold the process
    /// any more, or has been killed.
    ///
    /// # Panics
    /// Where `work` does.
    pub(crate) fn work<R: Send>(
        &self,
        pid: Pid,
        work: impl FnOnce(&mut Tracer) -> R + Send,
    ) -> Option<R> {
        let (done, outcome) = channel();
        let job = move |tracer: Option<&mut Tracer>| {
            let result = tracer.map(|tracer| catch_unwind(AssertUnwindSafe(|| work(tracer))));
            // Whoever wants it waits below.
            let _ = done.send(result);
        };
        let job: Box<Work<'_>> = Box::new(job);
        // SAFETY: only the lifetime is changed. The follower runs or drops the job before it ends
        // or answers, and this function does not return before either, so what the job borrows
        // outlives it; a follower that was killed does neither, and never looks at it again.
        let job: Job = unsafe { std::mem::transmute(job) };
        lock(&self.0.orders).send(Order::Work(pid, job)).ok()?;
        self.0.wake();
        loop {
            match outcome.recv_timeout(LOOK) {
                Ok(result) => {
                    return result.map(|r| r.unwrap_or_else(|panic| resume_unwind(panic)));
                }
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) if self.0.is_dead() => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Port {
    fn wake(&self) {
        let follower = self.follower.load(Ordering::Acquire);
        if follower > 0 {
            // The signal that the kernel wakes it with as well. It fails where it has ended.
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(follower), Signal::SIGCHLD);
        }
    }

    fn is_dead(&self) -> bool {
        let follower = self.follower.load(Ordering::Acquire);
        proc::status(follower).is_ok_and(|status| matches!(status.state, 'Z' | 'X'))
            || std::fs::metadata(format!("/proc/{follower}")).is_err()
    }
}

/// In the follower's process: a name, and the tracees.
fn prepare(pid: Pid, port: &Port) -> Result<Tracer, SeizeError> {
    port.follower.store(nix::unistd::gettid().as_raw(), Ordering::Release);
    let name = CString::new(FOLLOWER_NAME).expect("it has no NUL");
    let named = nix::sys::prctl::set_name(&name);
    debug_assert!(named.is_ok(), "the name is readable");
    hurry();
    let tracer = attach(pid)?;
    lock(&port.held).insert(pid);
    Ok(tracer)
}

/// The follower's process at work.
struct Following {
    hub: Hub,
    port: Arc<Port>,
    news: Sender<Followed>,
    inbox: Receiver<Order>,
    controller: nix::unistd::Pid,
}

impl Following {
    fn run(self, tracer: Tracer) {
        self.hub.put(tracer);
        loop {
            let mut is_idle = !self.answer_stops();
            self.adopt_newcomers();
            for pid in self.hub.bury() {
                self.part(pid);
            }
            match self.inbox.try_recv() {
                Ok(Order::Work(pid, job)) => {
                    self.work(pid, job);
                    is_idle = false;
                }
                Ok(Order::Leave) => break,
                Err(_) => {}
            }
            if nix::unistd::getppid() != self.controller {
                break;
            }
            if is_idle {
                ptrace::wait_for_any_stop(NAP);
            }
        }
        for mut tracer in self.hub.clear() {
            // Where this fails, the process has ended.
            let _ = tracer.let_kept_go();
        }
        for pid in self.hub.clear_newcomers() {
            let _ended = ptrace::detach(pid, 0);
        }
        lock(&self.port.held).clear();
    }

    /// Answers what has happened; whether anything has.
    fn answer_stops(&self) -> bool {
        let mut any = false;
        while let Ok(Some(news)) = ptrace::poll_news() {
            any = true;
            match news {
                News::Stop(tid, stop) => self.hub.dispatch(tid, stop),
                News::End(tid) => self.hub.forget(tid),
            }
        }
        self.hub.claim();
        any
    }

    fn work(&self, pid: Pid, job: Job) {
        // One that has executed a program has a new tracer soon.
        while self.hub.is_newcomer(pid) {
            if !self.answer_stops() {
                ptrace::wait_for_any_stop(SHORT_NAP);
            }
            self.adopt_newcomers();
        }
        let Some(mut tracer) = self.hub.take(pid) else { return job(None) };
        job(Some(&mut tracer));
        tracer.leave();
        self.hub.put(tracer);
    }

    fn adopt_newcomers(&self) {
        for newcomer in self.hub.take_newcomers() {
            if self.adopt(&newcomer).is_none() {
                // It has been killed, or nobody may look at what it has become.
                let _ended = ptrace::detach(newcomer.pid, 0);
                self.part(newcomer.pid);
            }
        }
    }

    /// Makes a tracer for a stopped process.
    fn adopt(&self, newcomer: &Newcomer) -> Option<()> {
        let &Newcomer { pid, parent, how, .. } = newcomer;
        if let Some(before) = self.hub.take(pid) {
            self.adopt_left_behind(before);
        }
        let mut tracer = Tracer::new(pid, Memory::open(pid).ok()?);
        let mask = ptrace::signal_mask(pid).ok()?;
        let parked = (how == How::Executed).then(Parked::kept);
        tracer.tasks.insert(pid, Task { mask, parked, ..Task::default() });
        lock(&self.port.held).insert(pid);
        let event = match how {
            How::Forked => Followed::Born { pid, parent },
            How::Executed => Followed::Executed { pid, parent },
        };
        // Before it runs on: its own children are told of later. Nobody listens at the end.
        let _ = self.news.send(event);
        if how == How::Forked {
            ptrace::resume(pid, 0).ok()?;
        }
        self.hub.put(tracer);
        Some(())
    }

    /// Vfork children of a program that is no more go on in its memory.
    fn adopt_left_behind(&self, mut before: Tracer) {
        for (child, task) in std::mem::take(&mut before.tasks) {
            let memory = if task.foreign { Memory::open(child).ok() } else { None };
            let Some(memory) = memory else { continue };
            let mut tracer = Tracer::new(child, memory);
            tracer.tasks.insert(child, Task { foreign: false, ..task });
            lock(&self.port.held).insert(child);
            // Nobody listens at the end.
            let _ = self.news.send(Followed::Born { pid: child, parent: before.pid });
            self.hub.put(tracer);
        }
    }

    fn part(&self, pid: Pid) {
        if lock(&self.port.held).remove(&pid) {
            // Nobody listens at the end.
            let _ = self.news.send(Followed::Ended { pid });
        }
    }
}

impl Parked {
    /// Until it is let go of.
    fn kept() -> Self {
        Self { is_kept: true, ..Self::now() }
    }
}

impl Tracer {
    /// Resumes the thread that is kept, if one is.
    pub(crate) fn let_kept_go(&mut self) -> Result<(), TraceError> {
        let kept = |task: &Task| task.parked.is_some_and(|parked| parked.is_kept);
        let kept: Vec<Tid> =
            self.tasks.iter().filter(|(_, task)| kept(task)).map(|(&tid, _)| tid).collect();
        for tid in kept {
            if let Some(task) = self.tasks.get_mut(&tid) {
                task.parked = None;
            }
            self.resume(tid, 0)?;
        }
        // What came for it meanwhile.
        self.send_postponed();
        Ok(())
    }

    /// Keeps a thread where it stands, in a stop that it can be let go from by anybody's death.
    pub(crate) fn keep(&mut self, tid: Tid, until: Instant) -> Result<(), TraceError> {
        let asked = ptrace::interrupt(tid);
        self.still_there(tid, "interrupting", asked)?;
        // It executes nothing more: the interrupt comes first.
        self.resume(tid, 0)?;
        let mut pace = self.pace();
        while Instant::now() < until {
            match self.poll(Whose::Any)? {
                Some((who, Stop::Interrupted | Stop::Group(_))) if who == tid => {
                    if let Some(task) = self.tasks.get_mut(&tid) {
                        task.parked = Some(Parked::kept());
                    }
                    return Ok(());
                }
                Some((who, Stop::Signal(signal))) if who == tid => {
                    // It is on its way to that: sent anew, it waits until the thread runs.
                    self.postponed.push((tid, signal));
                    self.resume(tid, 0)?;
                }
                Some((who, stop)) => self.answer(who, stop)?,
                None => {
                    self.check_alive()?;
                    if pace.is_slow() && ptrace::has_ended(tid) {
                        return Err(TraceError::Gone { pid: self.pid });
                    }
                    pace.rest();
                }
            }
        }
        Err(TraceError::Stuck { tid, waited_ms: 0 })
    }
}
