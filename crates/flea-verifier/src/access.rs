//! Accesses to memory: is every byte inside its object, and may it be read or written?

use flea_object::LOCK_BYTES;
use flea_object::spec::MapSpec;
use flea_object::types::Types;

use crate::facts::Region;
use crate::number::scalar::{AluOp, Scalar, Width};
use crate::op::Reg;
use crate::report::Fault;
use crate::stack::Span;
use crate::typed;
use crate::value::{Pointer, PointerKind, Value};
use crate::{Changeable, Context};

/// How far a pointer may be moved from its object, either way (Linux: BPF_MAX_VAR_OFF).
/// Sums of two such numbers cannot overflow.
pub(crate) const MAX_OFFSET: i64 = 1 << 29;

/// Size of `struct pt_regs` on x86-64 (arch/x86/include/uapi/asm/ptrace.h): 21 registers.
pub const PT_REGS_BYTES: u32 = 168;

/// What is done to the memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    /// Reads and writes at once, and must be aligned.
    Atomic,
}

/// An access proved to be inside its object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// These bytes of that frame; whether they are written yet is not checked here.
    Stack { frame: usize, span: Span },
    /// Some bytes of `window` in that frame: the address is not one number.
    StackWindow { frame: usize, window: Span },
    /// Anything else: its content is any number.
    Other(Region),
    /// The target's data: what is loaded, where that is more than any number.
    Typed(Option<Value>),
}

/// One access to be checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request {
    /// The register with the address, for messages.
    pub(crate) reg: Reg,
    /// Added to the address.
    pub(crate) off: i64,
    pub(crate) size_bytes: u32,
    pub(crate) access: Access,
}

/// The context that a program was given, as an access finds it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Given {
    pub(crate) context: Context,
    /// The words that could be changed.
    pub(crate) changeable: Changeable,
    /// Whether they may.
    pub(crate) permitted: bool,
}

impl Given {
    /// As helpers and functions find it that a pointer to it is passed to.
    pub(crate) fn read_only(context: Context) -> Self {
        Self { context, changeable: Changeable::NONE, permitted: false }
    }
}

/// The pointer in `value`, which must be one that can be followed.
pub(crate) fn followable(reg: Reg, value: &Value) -> Result<&Pointer, Fault> {
    let r = reg.index();
    match value {
        Value::NotInit => Err(Fault::not_readable(reg)),
        Value::Scalar(_) => Err(Fault::new(format!("R{r} invalid mem access 'scalar'"))
            .hint("memory of the target is read with bpf_probe_read_user")),
        Value::Pointer(p) if p.or_null.is_some() => {
            Err(Fault::new(format!("R{r} invalid mem access '{}'", p.type_name()))
                .hint("compare the pointer with NULL first"))
        }
        Value::Pointer(p) => Ok(p),
    }
}

/// Checks `request` through `p`, in a program that was `given` a context.
pub(crate) fn check(
    request: Request,
    p: &Pointer,
    maps: &[MapSpec],
    given: Given,
    types: Option<&Types>,
) -> Result<Target, Fault> {
    let bad = || {
        let r = request.reg.index();
        Fault::new(format!("R{r} invalid mem access '{}'", p.type_name()))
    };
    match p.kind {
        PointerKind::Stack { frame } => check_stack(request, p, frame),
        PointerKind::Ctx => check_ctx(request, p, given),
        PointerKind::Map(_) | PointerKind::Function(_) => Err(bad()),
        PointerKind::MapKey(map) => {
            if request.access != Access::Read {
                let r = request.reg.index();
                return Err(Fault::new(format!("write to change key R{r} not allowed")));
            }
            let limit = maps.get(map.0 as usize).ok_or_else(bad)?.key_size_bytes;
            check_bounds(request, p, limit, &format!("map key, key_size={limit}"))?;
            Ok(Target::Other(Region::MapKey))
        }
        PointerKind::MapValue(map) | PointerKind::LockValue { map, .. } => {
            let spec = maps.get(map.0 as usize).ok_or_else(bad)?;
            if spec.read_only && request.access != Access::Read {
                let text = format!(
                    "write into map forbidden, value_size={} off={} size={}",
                    spec.value_size_bytes, request.off, request.size_bytes
                );
                return Err(Fault::new(text));
            }
            let name = format!("map value, value_size={}", spec.value_size_bytes);
            check_bounds(request, p, spec.value_size_bytes, &name)?;
            if let Some(lock) = spec.lock_offset {
                check_apart(request, p, lock)?;
            }
            Ok(Target::Other(Region::MapValue { map }))
        }
        PointerKind::Record { size_bytes, .. } => {
            check_bounds(request, p, size_bytes, &format!("memory, mem_size={size_bytes}"))?;
            Ok(Target::Other(Region::RingbufRecord))
        }
        PointerKind::Cookie => {
            check_bounds(request, p, 8, "memory, mem_size=8")?;
            Ok(Target::Other(Region::SessionCookie))
        }
        PointerKind::Memory { size_bytes } => {
            check_bounds(request, p, size_bytes, &format!("memory, mem_size={size_bytes}"))?;
            Ok(Target::Other(Region::Memory))
        }
        PointerKind::Target { ty } => {
            let types = types.ok_or_else(bad)?;
            typed::load(types, ty, request, p).map(Target::Typed)
        }
        PointerKind::Argument { size_bytes, align_bytes } => {
            check_bounds(request, p, size_bytes, &format!("memory, mem_size={size_bytes}"))?;
            if request.access == Access::Atomic && request.size_bytes > align_bytes {
                let text = format!("misaligned value access size {}", request.size_bytes);
                return Err(Fault::new(text).hint("its type says that it may not be aligned"));
            }
            Ok(Target::Other(Region::Memory))
        }
    }
}

/// Bytes of the object that `p` points into, where it has a size of its own.
pub(crate) fn object_bytes(p: &Pointer, maps: &[MapSpec]) -> Option<u32> {
    match p.kind {
        PointerKind::MapValue(map) | PointerKind::LockValue { map, .. } => {
            maps.get(map.0 as usize).map(|m| m.value_size_bytes)
        }
        PointerKind::Record { size_bytes, .. }
        | PointerKind::Memory { size_bytes }
        | PointerKind::Argument { size_bytes, .. } => Some(size_bytes),
        PointerKind::Cookie => Some(8),
        _ => None,
    }
}

/// Checks that `size_bytes` bytes at every offset that `p` may have are inside `limit` bytes.
fn check_bounds(request: Request, p: &Pointer, limit: u32, name: &str) -> Result<(), Fault> {
    let Request { reg, off, size_bytes, access } = request;
    let r = reg.index();
    // Offsets are within MAX_OFFSET: none of this overflows.
    let (min, max) = (p.off.wide.smin + off, p.off.wide.smax + off);
    let end = max + i64::from(size_bytes);
    if min < 0 || end > i64::from(limit) {
        if p.off.as_const().is_some() {
            let text = format!("invalid access to {name} off={min} size={size_bytes}");
            return Err(Fault::new(text));
        }
        if min < 0 {
            let text = format!(
                "R{r} min value is negative, either use unsigned index or do a if (index >=0) check."
            );
            return Err(Fault::new(text));
        }
        let text = format!("R{r} max value is outside of the allowed memory range");
        return Err(Fault::new(text).hint(format!(
            "it reaches byte {end} of {limit}: compare the index with the number of elements first"
        )));
    }
    if access == Access::Atomic {
        check_aligned(&p.off, off, size_bytes)?;
    }
    Ok(())
}

/// Checks that no byte of the lock at `lock` is among those accessed.
fn check_apart(request: Request, p: &Pointer, lock: u32) -> Result<(), Fault> {
    let (min, max) = (p.off.wide.smin + request.off, p.off.wide.smax + request.off);
    let (start, end) = (i64::from(lock), i64::from(lock) + i64::from(LOCK_BYTES));
    if min < end && max + i64::from(request.size_bytes) > start {
        return Err(Fault::new("bpf_spin_lock cannot be accessed directly by load/store")
            .hint(format!("bytes {start} to {} of the value are its lock", end - 1)));
    }
    Ok(())
}

/// Objects start at multiples of 8, so an offset's alignment is the address's.
pub(crate) fn check_aligned(var: &Scalar, off: i64, size_bytes: u32) -> Result<(), Fault> {
    let sum = Scalar::alu(AluOp::Add, Width::W64, var, &Scalar::constant(off.cast_unsigned()));
    let low = u64::from(size_bytes) - 1;
    if (sum.wide.bits.value | sum.wide.bits.mask) & low != 0 {
        let text = format!("misaligned value access off {off} size {size_bytes}");
        return Err(Fault::new(text).hint("an atomic operation needs an aligned address"));
    }
    Ok(())
}

fn check_ctx(request: Request, p: &Pointer, given: Given) -> Result<Target, Fault> {
    let Request { reg, off, size_bytes, access } = request;
    // Pointer arithmetic keeps the context's offset constant; see `crate::pointer`.
    let at = p.off.wide.smin + off;
    if access == Access::Atomic {
        let text = format!("BPF_ATOMIC stores into R{} ctx is not allowed", reg.index());
        return Err(Fault::new(text));
    }
    let size = i64::from(size_bytes);
    // As raw_tp_prog_is_valid_access and kprobe_prog_is_valid_access: a naturally aligned part of
    // any word.
    let (n_bytes, fits) = match given.context {
        Context::Tracing { n_args, n_results, .. } => {
            let n_words = u32::from(n_args) + u32::from(n_results);
            (8 * n_words, at % size.max(1) == 0)
        }
        Context::PtRegs => (PT_REGS_BYTES, at % size.max(1) == 0),
        Context::Memory { .. } => (0, false),
    };
    let changes = given.changeable.has(at, size_bytes);
    let allowed = access == Access::Read || (given.permitted && changes);
    let fits =
        fits && allowed && p.off.as_const().is_some() && at >= 0 && at + size <= i64::from(n_bytes);
    let Some(offset_bytes) = i32::try_from(at).ok().filter(|_| fits) else {
        let text = format!("invalid bpf_context access off={at} size={size_bytes}");
        let can = match (access, given.permitted, changes) {
            (Access::Read, ..) | (_, false, false) => CanChange::Nothing,
            (_, false, true) => CanChange::IfAllowed,
            (_, true, _) => CanChange::Words(given.changeable),
        };
        return Err(Fault::new(text).hint(ctx_hint(given.context, n_bytes, can)));
    };
    Ok(Target::Other(Region::Ctx { offset_bytes }))
}

/// What is to be said of changes to the context.
#[derive(Clone, Copy)]
enum CanChange {
    Nothing,
    /// What was tried, if somebody lets it.
    IfAllowed,
    Words(Changeable),
}

fn ctx_hint(context: Context, n_bytes: u32, can: CanChange) -> String {
    let are_registers = context == Context::PtRegs;
    let shape = if are_registers {
        format!("the context is struct pt_regs here, {n_bytes} bytes to be read aligned")
    } else {
        format!("the context is {} words of 8 bytes here, to be read aligned", n_bytes / 8)
    };
    match can {
        CanChange::Nothing => format!("{shape} and not written"),
        CanChange::IfAllowed => format!(
            "{shape}; to change what a function is called with or returns can crash the target: \
             allow it with `flea run --allow-write`"
        ),
        CanChange::Words(Changeable::NONE) => {
            format!("{shape}; programs of this kind can change nothing on this function")
        }
        CanChange::Words(words) => format!(
            "{shape}; what can be changed on this function is {}{}, from its lowest byte on",
            if are_registers { "" } else { "word " },
            words.names(are_registers)
        ),
    }
}

/// A load, store or atomic on the stack.
fn check_stack(request: Request, p: &Pointer, frame: usize) -> Result<Target, Fault> {
    let window = stack_window(request, p)?;
    let off = request.off;
    let sum = Scalar::alu(AluOp::Add, Width::W64, &p.off, &Scalar::constant(off.cast_unsigned()));
    let bits = sum.wide.bits;
    // What is spilled is followed by whole slots, so no access may lie across two.
    if (bits.value | bits.mask) & (u64::from(request.size_bytes.max(1)) - 1) != 0 {
        let at = match p.off.as_const() {
            Some(_) => (p.off.wide.smin + off).to_string(),
            None => format!("({:#x}; {:#x})", bits.value, bits.mask),
        };
        let text = format!("misaligned stack access off {at} size {}", request.size_bytes);
        return Err(Fault::new(text));
    }
    Ok(match p.off.as_const() {
        Some(_) => Target::Stack { frame, span: window },
        None => Target::StackWindow { frame, window },
    })
}

/// The bytes of the stack that an access may touch: all of them where its address is one number.
/// For helpers too, so any alignment.
pub(crate) fn stack_window(request: Request, p: &Pointer) -> Result<Span, Fault> {
    let Request { reg, off, size_bytes, access } = request;
    let r = reg.index();
    // Offsets are within MAX_OFFSET: none of this overflows.
    let (min, max) = (p.off.wide.smin + off, p.off.wide.smax + off);
    let window = u32::try_from(max - min)
        .ok()
        .and_then(|moves| moves.checked_add(size_bytes))
        .and_then(|window_bytes| Span::new(min, window_bytes));
    window.ok_or_else(|| {
        let what = match access {
            Access::Read => "read from",
            Access::Write | Access::Atomic => "write to",
        };
        if p.off.as_const().is_some() {
            let text = format!("invalid {what} stack R{r} off={min} size={size_bytes}");
            return Fault::new(text).hint("a function's stack is the 512 bytes below r10");
        }
        let bits = p.off.wide.bits;
        Fault::new(format!(
            "invalid variable-offset {what} stack R{r} var_off=({:#x}; {:#x}) off={off} \
             size={size_bytes}",
            bits.value, bits.mask
        ))
        .hint(format!(
            "it reaches from {min} to {}, and the stack is the 512 bytes below r10: compare the \
             index with the array's length first",
            max + i64::from(size_bytes)
        ))
    })
}
