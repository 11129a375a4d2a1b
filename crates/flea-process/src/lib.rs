//! A live process: /proc, its memory, ptrace without stopping it, system calls inside it.
//!
//! Start at [`seize`]: it runs a closure on a tracer thread that has seized every thread of
//! the target, and lets go of all of them when the closure returns. [`Tracer`] is what the
//! closure gets. [`spawn`] starts a process that waits before its first instruction.
//!
//! **Invariant**: the target never sees a signal, an `EINTR` or a changed signal mask because
//! of this crate. **Invariant**: nothing here knows what a function, an image or a program
//! is; who decides which bytes to write is `flea-patch`.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("flea-process knows Linux on x86-64 only");

mod apart;
mod batch;
mod cgroup;
mod files;
mod follow;
mod frozen;
mod gap;
mod handover;
mod hub;
mod hurry;
mod maps;
mod memory;
mod proc;
mod ptrace;
mod remote;
mod restart;
mod seccomp;
mod seize;
mod sigtrap;
mod sleep;
mod spawn;
mod survey;
mod sync;
mod text_log;
mod thread;
mod tracer;
mod traps;
mod watch;
mod window;
mod x86_64;

pub use cgroup::{MemoryLeft, memory_left};
pub use files::{open_new_memfd, open_regular};
pub use follow::{Followed, Follower};
pub use frozen::FrozenThread;
pub use gap::{GapError, find_gap};
pub use handover::{HANDOVER_BYTES, HandOverError, hand_over};
pub use maps::{Mapping, Perms, parse_maps};
pub use memory::{Memory, MemoryError};
pub use nix::errno::Errno;
pub use proc::{
    AuxVector, Pid, ProcError, SignalSet, Status, Tid, Whereabouts, auxv, check_traceable, comm,
    exe, maps, may_use_shadow_stack, module_file_path, stand_in, status, thread_status, threads,
    whereabouts,
};
pub use remote::{Borrowed, MapRequest, RemoteError};
pub use seccomp::{SeccompMode, SystemCall, Verdict};
pub use seize::{SeizeError, TRACER_THREAD_NAME, seize};
pub use spawn::{Exit, SpawnError, Spawned, spawn};
pub use survey::{Holder, StackWord};
pub use tracer::{TraceError, Tracer, TracerCounts};
pub use traps::Trap;
pub use watch::Watch;
pub use x86_64::{Registers, SIGNAL_FRAME_SEGMENTS};
