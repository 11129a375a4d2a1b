//! The helper functions a program may call, with Linux's numbers (include/uapi/linux/bpf.h).

/// Tail calls that one run may make (Linux: `MAX_TAIL_CALL_CNT`); further ones miss.
pub const MAX_TAIL_CALLS: u32 = 33;

macro_rules! helpers {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// A helper that this build implements.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u32)]
        pub enum Helper { $($(#[$doc])* $name = $number,)* }

        impl Helper {
            /// All of them, by number.
            pub const ALL: &'static [Helper] = &[$(Helper::$name,)*];

            /// The helper with Linux's number `id`.
            #[must_use]
            pub const fn from_id(id: i32) -> Option<Self> {
                match id { $($number => Some(Self::$name),)* _ => None }
            }

            /// Its C name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }
    };
}

helpers! {
    /// `void *bpf_map_lookup_elem(map, key)`
    MapLookupElem = 1, "bpf_map_lookup_elem";
    /// `long bpf_map_update_elem(map, key, value, flags)`
    MapUpdateElem = 2, "bpf_map_update_elem";
    /// `long bpf_map_delete_elem(map, key)`
    MapDeleteElem = 3, "bpf_map_delete_elem";
    /// `long bpf_probe_read(dst, size, src)`: there is one kind of memory here, and this and the
    /// kernel's forms read it as `bpf_probe_read_user` does.
    ProbeRead = 4, "bpf_probe_read";
    /// `u64 bpf_ktime_get_ns()`: CLOCK_MONOTONIC
    KtimeGetNs = 5, "bpf_ktime_get_ns";
    /// `long bpf_trace_printk(fmt, fmt_size, a, b, c)`
    TracePrintk = 6, "bpf_trace_printk";
    /// `u32 bpf_get_prandom_u32()`
    GetPrandomU32 = 7, "bpf_get_prandom_u32";
    /// `u32 bpf_get_smp_processor_id()`
    GetSmpProcessorId = 8, "bpf_get_smp_processor_id";
    /// `long bpf_tail_call(ctx, prog_array, index)`: does not come back where a program stands
    /// at `index`.
    TailCall = 12, "bpf_tail_call";
    /// `u64 bpf_get_current_pid_tgid()`: tgid << 32 | tid
    GetCurrentPidTgid = 14, "bpf_get_current_pid_tgid";
    /// `u64 bpf_get_current_uid_gid()`: gid << 32 | uid
    GetCurrentUidGid = 15, "bpf_get_current_uid_gid";
    /// `long bpf_get_current_comm(buf, size)`
    GetCurrentComm = 16, "bpf_get_current_comm";
    /// `long bpf_probe_write_user(dst, src, size)`: only where it has been allowed.
    ProbeWriteUser = 36, "bpf_probe_write_user";
    /// `long bpf_probe_read_str(dst, size, src)`: as `bpf_probe_read_user_str`.
    ProbeReadStr = 45, "bpf_probe_read_str";
    /// `long bpf_spin_lock(lock)`
    SpinLock = 93, "bpf_spin_lock";
    /// `long bpf_spin_unlock(lock)`
    SpinUnlock = 94, "bpf_spin_unlock";
    /// `long bpf_probe_read_user(dst, size, src)`
    ProbeReadUser = 112, "bpf_probe_read_user";
    /// `long bpf_probe_read_kernel(dst, size, src)`: as `bpf_probe_read_user`.
    ProbeReadKernel = 113, "bpf_probe_read_kernel";
    /// `long bpf_probe_read_user_str(dst, size, src)`
    ProbeReadUserStr = 114, "bpf_probe_read_user_str";
    /// `long bpf_probe_read_kernel_str(dst, size, src)`: as `bpf_probe_read_user_str`.
    ProbeReadKernelStr = 115, "bpf_probe_read_kernel_str";
    /// `u64 bpf_ktime_get_boot_ns()`: CLOCK_BOOTTIME
    KtimeGetBootNs = 125, "bpf_ktime_get_boot_ns";
    /// `long bpf_ringbuf_output(map, data, size, flags)`
    RingbufOutput = 130, "bpf_ringbuf_output";
    /// `void *bpf_ringbuf_reserve(map, size, flags)`
    RingbufReserve = 131, "bpf_ringbuf_reserve";
    /// `void bpf_ringbuf_submit(data, flags)`
    RingbufSubmit = 132, "bpf_ringbuf_submit";
    /// `void bpf_ringbuf_discard(data, flags)`
    RingbufDiscard = 133, "bpf_ringbuf_discard";
    /// `u64 bpf_ringbuf_query(map, flags)`
    RingbufQuery = 134, "bpf_ringbuf_query";
    /// `long bpf_for_each_map_elem(map, callback, callback_ctx, flags)`
    ForEachMapElem = 164, "bpf_for_each_map_elem";
    /// `u64 bpf_get_func_ip(ctx)`
    GetFuncIp = 173, "bpf_get_func_ip";
    /// `u64 bpf_get_attach_cookie(ctx)`
    GetAttachCookie = 174, "bpf_get_attach_cookie";
    /// `long bpf_trace_vprintk(fmt, fmt_size, data, data_len)`
    TraceVprintk = 177, "bpf_trace_vprintk";
    /// `long bpf_loop(nr_loops, callback, callback_ctx, flags)`
    Loop = 181, "bpf_loop";
    /// `long bpf_get_func_arg(ctx, n, value)`
    GetFuncArg = 183, "bpf_get_func_arg";
    /// `long bpf_get_func_ret(ctx, value)`
    GetFuncRet = 184, "bpf_get_func_ret";
    /// `long bpf_get_func_arg_cnt(ctx)`
    GetFuncArgCnt = 185, "bpf_get_func_arg_cnt";
    /// kfunc `bool bpf_session_is_return(ctx)`; numbered by us, outside Linux's helpers.
    SessionIsReturn = 0x7f00_0001, "bpf_session_is_return";
    /// kfunc `u64 *bpf_session_cookie(ctx)`; numbered by us.
    SessionCookie = 0x7f00_0002, "bpf_session_cookie";
    /// `int bpf_fls64(x)`: the number of the highest set bit, from 1; 0 where none is. No
    /// instruction of eBPF counts zeros. For the built-in programs: no name in an object file
    /// leads here.
    Fls64 = 0x7f00_0003, "bpf_fls64";
    /// kfunc `void *bpf_rdonly_cast(obj, type_id)`, `bpf_core_cast`: `obj` as a typed pointer.
    RdonlyCast = 0x7f00_0010, "bpf_rdonly_cast";
}

impl Helper {
    /// Whether it calls a function of the program, in r2, with r3 as its context.
    #[must_use]
    pub const fn takes_callback(self) -> bool {
        matches!(self, Self::Loop | Self::ForEachMapElem)
    }
}
