//! Shared by the tests that execute what was emitted: executable pages, a builder of
//! unverified programs. Not every test uses all of it.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "tests, each of which uses its own part"
)]

pub mod arithmetic;
pub mod mutate;
pub mod programs;
#[cfg(target_arch = "x86_64")]
pub mod random_image;
#[cfg(target_arch = "x86_64")]
pub mod rig;

use flea_object::helper::Helper;
use flea_object::insn::{Insn, PSEUDO_CALL};
use flea_object::spec::MapIdx;
use flea_verifier::Verified;
use flea_verifier::facts::{Fact, Function, Region};

/// Memory of this process that lives until the test ends.
pub struct Pages {
    address: *mut u8,
    size_bytes: usize,
}

impl Pages {
    /// Zeroed pages, readable and writable.
    pub fn new(size_bytes: usize) -> Self {
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        Self { address: address.cast(), size_bytes }
    }

    pub fn address(&self) -> u64 {
        self.address as u64
    }

    /// Writes `bytes` at `offset`; the pages must not be executable yet.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.size_bytes);
        let to = self.address.wrapping_add(offset);
        // SAFETY: the range is inside the mapping, which is writable and ours alone.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// The `u64` at `offset`.
    pub fn read(&self, offset: usize) -> u64 {
        assert!(offset + 8 <= self.size_bytes);
        let from = self.address.wrapping_add(offset).cast::<u64>();
        // SAFETY: the range is inside the mapping, which is readable; offsets are 8-aligned.
        unsafe { from.read_volatile() }
    }

    /// Makes the pages executable and no longer writable.
    pub fn executable(&self) {
        // SAFETY: the range is exactly our own mapping.
        let failed = unsafe {
            libc::mprotect(self.address.cast(), self.size_bytes, libc::PROT_READ | libc::PROT_EXEC)
        };
        assert_eq!(failed, 0);
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nothing borrows from it.
        unsafe { libc::munmap(self.address.cast(), self.size_bytes) };
    }
}

/// Says what an access or call at an instruction is.
pub type FactOf<'a> = &'a dyn Fn(usize, Insn) -> Option<Fact>;

/// A program with every access in plain memory, unless `fact_of` says otherwise.
pub fn unverified(insns: &[Insn], fact_of: FactOf<'_>) -> Verified {
    let mut starts = vec![0];
    for (i, insn) in insns.iter().enumerate() {
        if insn.opcode == 0x85 && insn.src == PSEUDO_CALL {
            starts.push(
                usize::try_from(i64::try_from(i).unwrap() + 1 + i64::from(insn.imm)).unwrap(),
            );
        }
    }
    starts.sort_unstable();
    starts.dedup();
    let mut facts = Vec::new();
    for (i, insn) in insns.iter().enumerate() {
        let after_lddw = i > 0 && insns[i - 1].opcode == 0x18 && insn.opcode == 0;
        let fact = match insn.opcode & 7 {
            _ if after_lddw => Fact::Unreachable,
            1..=3 => Fact::Access(Region::Memory),
            5 if insn.opcode == 0x85 && insn.src == PSEUDO_CALL => {
                let to =
                    usize::try_from(i64::try_from(i).unwrap() + 1 + i64::from(insn.imm)).unwrap();
                let function = starts.iter().position(|s| *s == to).unwrap();
                Fact::CallLocal { function: u32::try_from(function).unwrap() }
            }
            _ => Fact::Plain,
        };
        facts.push(fact_of(i, *insn).unwrap_or(fact));
    }
    let functions = starts
        .iter()
        .enumerate()
        .map(|(i, s)| Function {
            start_insn_idx: u32::try_from(*s).unwrap(),
            end_insn_idx: u32::try_from(*starts.get(i + 1).unwrap_or(&insns.len())).unwrap(),
            stack_bytes: 512,
        })
        .collect();
    Verified::from_parts_unverified(insns.to_vec(), facts, functions)
}

pub fn insn(opcode: u8, dst: u8, src: u8, off: i16, imm: i32) -> Insn {
    Insn { opcode, dst, src, off, imm }
}

/// `call helper`, with its fact beside it.
pub fn call(helper: Helper, map: Option<u32>) -> (Insn, Fact) {
    call_with(helper, map, [None; 5])
}

pub fn call_with(helper: Helper, map: Option<u32>, constants: [Option<u64>; 5]) -> (Insn, Fact) {
    let fact = Fact::Call { helper, map: map.map(MapIdx), constants };
    (insn(0x85, 0, 0, 0, helper as i32), fact)
}

pub fn ctx(dst: u8, slot: i16) -> (Insn, Fact) {
    let region = Region::Ctx { offset_bytes: i32::from(slot) * 8 };
    (insn(0x79, dst, 1, slot * 8, 0), Fact::Access(region))
}

pub fn plain(i: Insn) -> (Insn, Fact) {
    (i, Fact::Plain)
}

pub fn access(i: Insn, region: Region) -> (Insn, Fact) {
    (i, Fact::Access(region))
}

/// A program from instructions with their facts.
pub fn program(parts: &[(Insn, Fact)]) -> Verified {
    let insns: Vec<Insn> = parts.iter().map(|p| p.0).collect();
    let facts: Vec<Fact> = parts.iter().map(|p| p.1).collect();
    let end = u32::try_from(insns.len()).unwrap();
    let main = Function { start_insn_idx: 0, end_insn_idx: end, stack_bytes: 512 };
    Verified::from_parts_unverified(insns, facts, vec![main])
}
