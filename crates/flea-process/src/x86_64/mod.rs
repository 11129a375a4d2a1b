//! What is particular to x86-64: registers at a stop, the breakpoint, the system call.

mod dead;

use flea_symbols::addr::RemoteAddr;

pub(crate) use dead::is_dead_behind;

/// The breakpoint instruction. A thread that runs into it stands one byte behind it.
pub(crate) const INT3: u8 = 0xcc;
/// The system call instruction.
pub(crate) const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// A signal frame holds the segment selectors of user code as one word: cs, gs, fs, ss. It
/// follows rsp, rip and eflags, so it finds the context that a handler interrupted.
pub const SIGNAL_FRAME_SEGMENTS: u64 = 0x002b_0000_0000_0033;
/// Words from [`SIGNAL_FRAME_SEGMENTS`] back to the saved stack pointer.
pub(crate) const SIGNAL_FRAME_RSP_WORDS_BACK: usize = 3;

/// Not in libc's list.
pub(crate) const SYS_IO_PGETEVENTS: i64 = 333;

/// System calls that make processes: a thread in one of them may be copying the text.
pub(crate) fn is_fork(number: u64) -> bool {
    [libc::SYS_clone, libc::SYS_fork, libc::SYS_vfork, libc::SYS_clone3]
        .iter()
        .any(|&n| u64::try_from(n) == Ok(number))
}

/// How well a thread that sleeps in this system call serves for running another one in it.
/// 0: the kernel begins it again with nothing lost, not even time. 1: we do, and know of its time
/// what the scheduler tells. 2: it may have done a part of what it was asked, and then returns with
/// that, as for a signal: nobody can begin the rest for it.
pub(crate) fn disturbance(number: u64) -> u32 {
    const EXACT: [libc::c_long; 21] = [
        libc::SYS_futex,
        libc::SYS_nanosleep,
        libc::SYS_clock_nanosleep,
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_select,
        libc::SYS_pselect6,
        libc::SYS_pause,
        libc::SYS_read,
        libc::SYS_accept,
        libc::SYS_accept4,
        libc::SYS_wait4,
        libc::SYS_waitid,
        libc::SYS_restart_syscall,
        libc::SYS_rt_sigsuspend,
        libc::SYS_flock,
        libc::SYS_fcntl,
        libc::SYS_msgrcv,
        libc::SYS_msgsnd,
        libc::SYS_mq_timedreceive,
        libc::SYS_mq_timedsend,
    ];
    const IN_PARTS: [libc::c_long; 14] = [
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_sendmmsg,
        libc::SYS_recvmmsg,
        libc::SYS_sendfile,
        libc::SYS_splice,
        libc::SYS_tee,
        libc::SYS_vmsplice,
        libc::SYS_copy_file_range,
        libc::SYS_io_uring_enter,
        libc::SYS_io_getevents,
        SYS_IO_PGETEVENTS,
    ];
    let is_in = |list: &[libc::c_long]| list.iter().any(|&n| u64::try_from(n) == Ok(number));
    match () {
        () if is_in(&EXACT) => 0,
        () if is_in(&IN_PARTS) => 2,
        () => 1,
    }
}

/// Of a system call's arguments, those that a timeout may be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Argument {
    Third,
    Fourth,
    Fifth,
    Sixth,
}

/// Everything from here up may belong to the function that the stack pointer is of.
pub(crate) fn red_zone_end(sp: RemoteAddr) -> RemoteAddr {
    RemoteAddr(sp.0.wrapping_sub(128))
}

/// The general registers of a stopped thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers {
    raw: libc::user_regs_struct,
}

impl Registers {
    pub(crate) fn from_raw(raw: libc::user_regs_struct) -> Self {
        Self { raw }
    }

    pub(crate) fn raw(&self) -> &libc::user_regs_struct {
        &self.raw
    }

    /// The instruction pointer.
    #[must_use]
    pub fn pc(&self) -> RemoteAddr {
        RemoteAddr(self.raw.rip)
    }

    /// The stack pointer.
    #[must_use]
    pub fn sp(&self) -> RemoteAddr {
        RemoteAddr(self.raw.rsp)
    }

    /// The result register.
    #[must_use]
    pub fn result(&self) -> u64 {
        self.raw.rax
    }

    pub(crate) fn with_pc(mut self, pc: RemoteAddr) -> Self {
        self.raw.rip = pc.0;
        self
    }

    /// The number of the system call that the thread was interrupted in.
    #[must_use]
    pub fn interrupted_syscall(&self) -> Option<u64> {
        i64::try_from(self.raw.orig_rax).is_ok().then_some(self.raw.orig_rax)
    }

    /// The thread is on its way out of a system call that gave up with `EINTR`: unlike
    /// ERESTART*, which the kernel acts on itself, the program would see it. (io_pgetevents is
    /// begun again by the kernel, but with all of its timeout.) A close has closed, whatever it
    /// says: another one might hit a file that another thread has just opened.
    pub(crate) fn would_show_eintr(&self) -> bool {
        const ERESTARTNOHAND: i64 = 514;
        let Some(number) = self.interrupted_syscall().and_then(|n| i64::try_from(n).ok()) else {
            return false;
        };
        match -self.raw.rax.cast_signed() {
            ERESTARTNOHAND => number == SYS_IO_PGETEVENTS,
            errno => errno == i64::from(libc::EINTR) && number != libc::SYS_close,
        }
    }

    pub(crate) fn argument(&self, argument: Argument) -> u64 {
        match argument {
            Argument::Third => self.raw.rdx,
            Argument::Fourth => self.raw.r10,
            Argument::Fifth => self.raw.r8,
            Argument::Sixth => self.raw.r9,
        }
    }

    pub(crate) fn with_argument(mut self, argument: Argument, value: u64) -> Self {
        match argument {
            Argument::Third => self.raw.rdx = value,
            Argument::Fourth => self.raw.r10 = value,
            Argument::Fifth => self.raw.r8 = value,
            Argument::Sixth => self.raw.r9 = value,
        }
        self
    }

    /// As if the system call had not begun: the thread stands before its instruction.
    pub(crate) fn rewound(mut self) -> Self {
        self.raw.rax = self.raw.orig_rax;
        self.raw.rip -= SYSCALL.len() as u64;
        self.raw.orig_rax = u64::MAX;
        self
    }

    /// About to run system call `number`, with the instruction at `insn`. Everything else,
    /// the stack pointer above all, stays.
    pub(crate) fn calling(mut self, insn: RemoteAddr, number: u64, args: [u64; 6]) -> Self {
        self.raw.rip = insn.0;
        self.raw.rax = number;
        // No restart of an earlier system call may be applied to these registers.
        self.raw.orig_rax = u64::MAX;
        let [a, b, c, d, e, f] = args;
        self.raw.rdi = a;
        self.raw.rsi = b;
        self.raw.rdx = c;
        self.raw.r10 = d;
        self.raw.r8 = e;
        self.raw.r9 = f;
        self
    }

    /// All sixteen general registers and the instruction pointer, for searching.
    pub(crate) fn words(&self) -> [u64; 17] {
        let r = &self.raw;
        [
            r.rip, r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10,
            r.r11, r.r12, r.r13, r.r14, r.r15,
        ]
    }
}

/// Whether no thread gets to the byte behind `first` by executing the instruction that starts
/// with it: a breakpoint of ours, or a jump or call of five bytes.
pub(crate) fn never_falls_behind_itself(first: u8) -> bool {
    const INT3: u8 = 0xcc;
    const CALL_REL32: u8 = 0xe8;
    const JMP_REL32: u8 = 0xe9;
    matches!(first, INT3 | CALL_REL32 | JMP_REL32)
}
