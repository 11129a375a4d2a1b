//! Compiles a program and calls it, in this very process: an arena for its maps, the runtime's
//! code beside it, as a target has them.

use std::os::fd::AsRawFd as _;
use std::ptr::null_mut;

use flea_image::{PlainRequest, RelocTarget, compile_function};
use flea_layout::plan::ArenaPlan;
use flea_layout::shared::{RuntimeFn, THREAD_TABLE_BYTES};
use flea_maps::Arena;
use flea_object::spec::MapSpec;
use flea_runtime::{BLOB, offset_of};
use flea_verifier::Verified;
use libc::{MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED};
use libc::{PROT_EXEC, PROT_READ, PROT_WRITE};

/// `memory` for r1 and r2, or else `context` for r1.
pub(crate) fn run(
    verified: &Verified,
    maps: &[MapSpec],
    memory: Option<Vec<u8>>,
    context: Vec<u64>,
) -> Result<u64, String> {
    let plan = ArenaPlan::new(maps, 1);
    let context_words =
        if memory.is_some() { 0 } else { u32::try_from(context.len()).unwrap_or(0) };
    let request = PlainRequest { verified, plan: Some(&plan), context_words };
    let code = compile_function(&request).map_err(|e| e.to_string())?;
    let arena = Arena::create(&plan, maps).map_err(|e| e.to_string())?;
    let data = map_arena(&arena)?;
    let runtime = Pages::executable(BLOB)?;
    let bytes = code.resolve(|target| match target {
        RelocTarget::Arena { addend } => {
            (data.address + THREAD_TABLE_BYTES as u64).wrapping_add_signed(addend)
        }
        RelocTarget::Runtime(function) => address_of(&runtime, function),
        // Without a vDSO's address the runtime makes system calls.
        RelocTarget::VdsoClockGettime
        | RelocTarget::Constant(_)
        | RelocTarget::FunctionAddress
        | RelocTarget::Cookie { .. }
        | RelocTarget::ThreadPointer
        | RelocTarget::SkeletonFrame => 0,
    });
    let program = Pages::executable(&bytes)?;
    let mut memory = memory;
    let (r1, r2) = match &mut memory {
        Some(bytes) if bytes.is_empty() => (0, 0),
        Some(bytes) => (bytes.as_mut_ptr() as u64, bytes.len() as u64),
        None => (context.as_ptr() as u64, 0),
    };
    // SAFETY: the pages hold a function of this very type. What it touches was proved by the
    // verifier, or it runs in a process that is there for nothing else (`worker`).
    let function: extern "sysv64" fn(u64, u64) -> u64 =
        unsafe { std::mem::transmute::<u64, _>(program.address) };
    Ok(function(r1, r2))
}

fn address_of(runtime: &Pages, function: RuntimeFn) -> u64 {
    runtime.address + u64::from(offset_of(function))
}

/// A mapping of ours, unmapped with the value.
struct Pages {
    address: u64,
    size_bytes: usize,
}

impl Pages {
    fn new(size_bytes: usize) -> Result<Self, String> {
        let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let at =
            unsafe { libc::mmap(null_mut(), size_bytes, PROT_READ | PROT_WRITE, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(format!("mmap: {}", std::io::Error::last_os_error()));
        }
        Ok(Self { address: at as u64, size_bytes })
    }

    fn executable(bytes: &[u8]) -> Result<Self, String> {
        let pages = Self::new(bytes.len().max(1))?;
        let at = pages.address as *mut u8;
        // SAFETY: as long as the mapping, which is new.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len()) };
        // SAFETY: our own mapping.
        let failed = unsafe { libc::mprotect(at.cast(), pages.size_bytes, PROT_READ | PROT_EXEC) };
        if failed != 0 {
            return Err(format!("mprotect: {}", std::io::Error::last_os_error()));
        }
        Ok(pages)
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nothing refers to any more.
        unsafe { libc::munmap(self.address as *mut libc::c_void, self.size_bytes) };
    }
}

/// Thread table and arena, one behind the other.
fn map_arena(arena: &Arena) -> Result<Pages, String> {
    let size = usize::try_from(arena.plan().size_bytes).map_err(|e| e.to_string())?;
    let pages = Pages::new(THREAD_TABLE_BYTES + size)?;
    let at = (pages.address + THREAD_TABLE_BYTES as u64) as *mut libc::c_void;
    let flags = MAP_SHARED | MAP_FIXED | MAP_NORESERVE;
    let fd = arena.fd().as_raw_fd();
    // SAFETY: replaces the end of our own new mapping.
    let base = unsafe { libc::mmap(at, size, PROT_READ | PROT_WRITE, flags, fd, 0) };
    if base == libc::MAP_FAILED {
        return Err(format!("mmap: {}", std::io::Error::last_os_error()));
    }
    Ok(pages)
}
