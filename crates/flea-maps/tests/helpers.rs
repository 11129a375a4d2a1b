//! The blob's functions, one by one: what they return, which registers they keep, how much
//! stack they use.
#![allow(missing_docs, reason = "a test")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod in_process;
#[path = "in_process/registers.rs"]
mod registers;

use std::collections::HashSet;
use std::ffi::{CStr, CString};

use flea_layout::shared::{MapHeader, RuntimeFn as F};
use flea_object::spec::{InnerMaps, MapIdx, MapKind, MapSpec};
use in_process::{Target, spec};

fn vdso_clock_gettime() -> u64 {
    let (name, symbol) = (c"linux-vdso.so.1", c"__vdso_clock_gettime");
    // SAFETY: C strings; the vDSO is always loaded.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    assert!(!handle.is_null());
    // SAFETY: as above.
    let address = unsafe { libc::dlsym(handle, symbol.as_ptr()) } as u64;
    assert_ne!(address, 0);
    address
}

#[test]
fn every_register_but_rax_is_kept_and_the_stack_use_is_small() {
    let maps = [
        spec(MapKind::Hash, 8, 8, 64),
        spec(MapKind::PerCpuHash, 8, 8, 64),
        spec(MapKind::RingBuf, 0, 0, 4096),
        MapSpec {
            inner: Some(InnerMaps { template: MapIdx(4), init: vec![(1, MapIdx(0))] }),
            ..spec(MapKind::HashOfMaps, 4, 4, 8)
        },
        MapSpec { template: true, ..spec(MapKind::Hash, 8, 8, 64) },
        MapSpec { lock_offset: Some(0), ..spec(MapKind::Array, 4, 8, 2) },
    ];
    let target = Target::new(&maps);
    let (base, slot) = (target.base, target.slot());
    let (hash, percpu, ring) = (target.map(0), target.map(1), target.map(2));
    let (outer, locked) = (target.map(3), base + target.arena.plan().maps[5].data_offset);
    let one = 1u32.to_le_bytes();
    let mut buffer = [7u64; 32];
    let at = buffer.as_mut_ptr() as u64;
    let format = c"%s %-10d %08lx|".to_bytes_with_nul();
    let record = target.call(F::RingbufReserve, &[base, ring, 16]);
    let thrown = target.call(F::RingbufReserve, &[base, ring, 16]);
    let cases: Vec<(F, Vec<u64>)> = vec![
        (F::ThreadSlot, vec![base]),
        (F::ClockNs, vec![0, 1]),
        (F::ClockNs, vec![vdso_clock_gettime(), 1]),
        (F::ClockNs, vec![vdso_clock_gettime(), 7]),
        (F::MapUpdate, vec![base, hash, at, at + 8, 0, slot]),
        (F::MapUpdate, vec![base, percpu, at, at + 8, 0, slot]),
        (F::HashLookup, vec![base, hash, at, slot]),
        (F::HashLookup, vec![base, percpu, at, slot]),
        (F::HashNext, vec![base, hash, at + 128, at + 136, 8, slot]),
        (F::HashNext, vec![base, percpu, at + 144, at + 152, 8, slot]),
        (F::InnerMap, vec![base, outer, one.as_ptr() as u64]),
        (F::SpinLock, vec![base, locked, slot]),
        (F::SpinUnlock, vec![base, locked, slot]),
        (F::MapUpdate, vec![base, target.map(5), one.as_ptr() as u64, at, 4, slot]),
        (F::MapDelete, vec![base, hash, at]),
        (F::MapDelete, vec![base, percpu, at]),
        (F::MapUpdate, vec![base, percpu, at, at + 8, 0, slot]),
        (F::RingbufReserve, vec![base, ring, 16]),
        (F::RingbufReserve, vec![base, ring, 1 << 20]),
        (F::RingbufSubmit, vec![record, 0]),
        (F::RingbufDiscard, vec![thrown, 0]),
        (F::RingbufOutput, vec![base, ring, at, 24, 0]),
        (F::RingbufQuery, vec![ring, 3]),
        (F::ProbeReadUser, vec![at + 64, 64, at]),
        (F::ProbeReadUser, vec![at + 64, 64, 8]),
        (F::ProbeReadUserStr, vec![at + 64, 64, format.as_ptr() as u64]),
        (F::ProbeReadUserStr, vec![at + 64, 64, 8]),
        (F::ProbeWriteUser, vec![at + 64, at, 64]),
        (F::ProbeWriteUser, vec![8, at, 64]),
        (F::PidTgid, vec![]),
        (F::UidGid, vec![]),
        (F::Comm, vec![at, 16]),
        (F::ProcessorId, vec![]),
        (F::Prandom, vec![slot]),
        (F::Printk, vec![base, ring, format.as_ptr() as u64, format.len() as u64, at, 3]),
    ];
    let seen: HashSet<F> = cases.iter().map(|(f, _)| *f).collect();
    assert_eq!(seen.len(), F::ALL.len());
    for (function, args) in cases {
        for misalign in [0, 8] {
            let outcome = registers::call(target.address_of(function), &args, misalign);
            println!("{function:?}: {} bytes, rax {:#x}", outcome.stack_bytes, outcome.rax);
            assert!(outcome.stack_bytes < 1024, "{function:?} uses {}", outcome.stack_bytes);
        }
    }
    // A thread that has no slot yet takes the long way.
    std::thread::scope(|s| {
        s.spawn(|| {
            let outcome = registers::call(target.address_of(F::ThreadSlot), &[base], 8);
            println!("claim: {} bytes", outcome.stack_bytes);
            assert!(outcome.rax != 0 && outcome.stack_bytes < 1024);
        });
    });
}

#[test]
fn ids_name_cpu_and_time_are_the_threads() {
    let target = Target::new(&[]);
    // SAFETY: no arguments.
    let pid = unsafe { libc::getpid() };
    // SAFETY: no arguments.
    let tid = unsafe { libc::gettid() };
    let ids = target.call(F::PidTgid, &[]);
    assert_eq!(ids, (u64::from(pid.unsigned_abs()) << 32) | u64::from(tid.unsigned_abs()));
    // SAFETY: no arguments.
    let uid = unsafe { libc::getuid() };
    // SAFETY: no arguments.
    let gid = unsafe { libc::getgid() };
    assert_eq!(target.call(F::UidGid, &[]), (u64::from(gid) << 32) | u64::from(uid));
    std::thread::Builder::new()
        .name("flea-comm".into())
        .spawn(move || {
            let mut name = [0xffu8; 20];
            assert_eq!(target.call(F::Comm, &[name.as_mut_ptr() as u64, 20]), 0);
            assert_eq!(&name, b"flea-comm\0\0\0\0\0\0\0\0\0\0\0");
            assert_eq!(target.call(F::Comm, &[name.as_mut_ptr() as u64, 5]), 0);
            assert_eq!(&name[..6], b"flea\0c", "nothing past the size");
            let none = target.call(F::Comm, &[name.as_mut_ptr() as u64, 0]);
            assert_eq!(none.cast_signed(), -22);
            check_time_and_cpu(&target);
        })
        .unwrap()
        .join()
        .unwrap();
}

fn check_time_and_cpu(target: &Target) {
    let mut before = 0;
    for function in [0, vdso_clock_gettime(), 0, vdso_clock_gettime()] {
        let now = target.call(F::ClockNs, &[function, 1]);
        assert!(now > before);
        before = now;
    }
    assert_eq!(target.call(F::ClockNs, &[0, 99]), 0);
    // SAFETY: zero is a valid cpu_set_t.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: no arguments.
    let cpu = unsafe { libc::sched_getcpu() };
    // SAFETY: the set is ours.
    unsafe { libc::CPU_SET(usize::try_from(cpu).unwrap(), &mut set) };
    // SAFETY: the set is whole; this thread only.
    assert_eq!(unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) }, 0);
    assert_eq!(target.call(F::ProcessorId, &[]), u64::from(cpu.unsigned_abs()));
}

/// Two pages, the second not readable; returns the address of the border.
fn cliff() -> u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let null = std::ptr::null_mut();
    // SAFETY: a new mapping.
    let at = unsafe { libc::mmap(null, 8192, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    let border = at as u64 + 4096;
    // SAFETY: our own page.
    assert_eq!(unsafe { libc::mprotect(border as *mut _, 4096, libc::PROT_NONE) }, 0);
    border
}

fn put(at: u64, bytes: &[u8]) {
    // SAFETY: inside the cliff's first page.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
}

#[test]
fn reads_of_memory_that_is_not_there_fail_and_clear() {
    let target = Target::new(&[]);
    let border = cliff();
    let mut out = [0x77u8; 16];
    let to = out.as_mut_ptr() as u64;
    let read = |from, size: u64| target.call(F::ProbeReadUser, &[to, size, from]).cast_signed();
    put(border - 8, b"12345678");
    assert_eq!(read(border - 8, 8), 0);
    assert_eq!(out, *b"12345678wwwwwwww");
    for bad in [border - 4, border, 0, 8, u64::MAX - 3, 0xffff_8000_0000_0000, 1 << 63] {
        out.fill(0x77);
        assert_eq!(read(bad, 8), -14, "{bad:#x}");
        assert_eq!(out, *b"\0\0\0\0\0\0\0\0wwwwwwww");
    }
    assert_eq!(read(0, 0), 0);
}

#[test]
fn strings_end_at_nul_at_the_buffers_end_or_fail() {
    let target = Target::new(&[]);
    let border = cliff();
    let mut out = [0x77u8; 300];
    let to = out.as_mut_ptr() as u64;
    let read = |from, size: u64| target.call(F::ProbeReadUserStr, &[to, size, from]).cast_signed();
    put(border - 6, b"hello\0");
    assert_eq!(read(border - 6, 300), 6);
    assert_eq!(&out[..8], b"hello\0ww", "what follows the NUL stays");
    assert_eq!(read(border - 6, 3), 3);
    assert_eq!(&out[..4], b"he\0l");
    assert_eq!(read(border - 6, 6), 6);
    assert_eq!(read(border - 6, 0), 0);
    assert_eq!(read(border - 1, 1), 1);
    put(border - 250, &[b'x'; 250]);
    assert_eq!(read(border - 250, 250), 250, "cut just before the border");
    assert_eq!(out[249], 0);
    assert_eq!(read(border - 250, 251), -14);
    assert!(out[..251].iter().all(|b| *b == 0));
    put(border - 1, &[0]);
    assert_eq!(read(border - 250, 300), 250);
}

/// What the blob prints.
fn printed(target: &Target, format: &CStr, args: &[u64]) -> Result<String, i64> {
    let bytes = format.to_bytes_with_nul();
    let (at, len) = (bytes.as_ptr() as u64, bytes.len() as u64);
    let n = args.len() as u64;
    let all = [target.base, target.map(0), at, len, args.as_ptr() as u64, n];
    let result = target.call(F::Printk, &all).cast_signed();
    let mut lines = Vec::new();
    let mut ring = target.arena.ringbuf(MapIdx(0)).unwrap();
    ring.poll(|line| lines.push(String::from_utf8_lossy(line).into_owned()));
    if result < 0 {
        assert!(lines.is_empty());
        Err(result)
    } else {
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].len() as i64, result);
        Ok(lines.remove(0))
    }
}

/// What libc's snprintf prints.
fn printed_by_c(format: &CStr, args: &[u64]) -> String {
    let a = |i: usize| args.get(i).copied().unwrap_or(0);
    let mut buffer = [0u8; 1024];
    let to = buffer.as_mut_ptr().cast();
    // SAFETY: at most three arguments are used by the formats below.
    unsafe { libc::snprintf(to, 1024, format.as_ptr(), a(0), a(1), a(2)) };
    CStr::from_bytes_until_nul(&buffer).unwrap().to_string_lossy().into_owned()
}

#[test]
fn printk_formats_as_c_does() {
    let target = Target::new(&[spec(MapKind::RingBuf, 0, 0, 4096)]);
    let word = CString::new("a word").unwrap();
    let s = word.as_ptr() as u64;
    let numbers = [0, 1, 42, 0x7fff_ffff, 0x8000_0000, u64::MAX, 1 << 63, 0xdead_beef_1234];
    for format in [
        c"%d",
        c"%i",
        c"%u",
        c"%x",
        c"%X",
        c"%lx",
        c"%llx",
        c"%lu",
        c"%ld",
        c"%lld",
        c"%llu",
        c"%5d|",
        c"%-5d|",
        c"%05d|",
        c"%+d",
        c"% d",
        c"%#x",
        c"%#lX",
        c"%016lx",
        c"%-20ld|",
        c"%hd",
        c"%hhu",
        c"%o",
        c"%3x%3x%3x",
        c"a%%b%db",
        c"%30ld|%-30lx|%d",
        c"%zu",
    ] {
        for n in numbers {
            let args = [n, 7, n];
            assert_eq!(
                printed(&target, format, &args),
                Ok(printed_by_c(format, &args)),
                "{format:?} of {n:#x}"
            );
        }
    }
    for format in [c"<%s>", c"<%10s>", c"<%-10s>", c"<%3s>", c"%s %ld", c"%s=%s", c"%600s|"] {
        let mut want = printed_by_c(format, &[s, s, 3]);
        want.truncate(512);
        assert_eq!(printed(&target, format, &[s, s, 3]), Ok(want), "{format:?}");
    }
    assert_eq!(printed(&target, c"%c%3c%-3c|", &[65, 66, 67]), Ok("A  BC  |".into()));
    assert_eq!(printed(&target, c"%p", &[0x1234]), Ok("0x1234".into()));
    assert_eq!(printed(&target, c"<%s>%d", &[8, 5]), Ok("<>5".into()), "a bad string is empty");
    assert_eq!(printed(&target, c"%pus", &[s]), Ok("a word".into()));
    for bad in [c"%f", c"%", c"%5", c"%d %d", c"%n", c"%.3d"] {
        assert_eq!(printed(&target, bad, &[1]), Err(-22), "{bad:?}");
    }
    assert_eq!(printed(&target, c"", &[]), Ok(String::new()));
}

#[test]
fn random_numbers_differ() {
    let target = Target::new(&[]);
    let slot = target.slot();
    let seen: HashSet<u64> = (0..1000).map(|_| target.call(F::Prandom, &[slot])).collect();
    assert!(seen.len() > 990);
    assert!(seen.iter().all(|n| *n <= u64::from(u32::MAX)));
}

/// What a walk over map 0 finds, each key deleted as it comes where `deleting`.
fn walk(target: &Target, deleting: bool) -> Vec<(u64, u64)> {
    let (slot, mut cursor, mut key) = (target.slot(), 0u64, [0u8; 8]);
    let mut found = Vec::new();
    loop {
        let (at, key_at) = ((&raw mut cursor) as u64, key.as_mut_ptr() as u64);
        let args = [target.base, target.map(0), at, key_at, 8, slot];
        let value = target.call(F::HashNext, &args);
        if value == 0 {
            return found;
        }
        // SAFETY: the address of a value of 8 bytes, from the runtime.
        found.push((u64::from_le_bytes(key), unsafe { (value as *const u64).read() }));
        assert!(found.len() <= 1000, "a walk ends");
        if deleting {
            assert_eq!(target.delete(0, &key), 0);
        }
    }
}

#[test]
fn a_walk_finds_every_element_once() {
    for kind in [MapKind::Hash, MapKind::PerCpuHash] {
        let target = Target::new(&[spec(kind, 8, 8, 64)]);
        let slot = target.slot();
        assert_eq!(walk(&target, false), []);
        for n in 0..40u64 {
            assert_eq!(target.update(0, &n.to_le_bytes(), &(n * 7).to_le_bytes(), 0, slot), 0);
        }
        for n in (0..40u64).step_by(3) {
            assert_eq!(target.delete(0, &n.to_le_bytes()), 0);
        }
        let expected: Vec<(u64, u64)> =
            (0..40).filter(|n| n % 3 != 0).map(|n| (n, n * 7)).collect();
        for deleting in [false, true] {
            let mut found = walk(&target, deleting);
            found.sort_unstable();
            assert_eq!(found, expected, "{kind:?}");
        }
        assert_eq!(walk(&target, false), [], "{kind:?}");
    }
}

/// The program has room for keys of the size that it was compiled for.
#[test]
fn a_walk_writes_no_more_than_a_key() {
    let target = Target::new(&[spec(MapKind::Hash, 8, 8, 64)]);
    let slot = target.slot();
    assert_eq!(target.update(0, &[1; 8], &[2; 8], 0, slot), 0);
    let at = target.map(0) + std::mem::offset_of!(MapHeader, key_size_bytes) as u64;
    for scribbled in [0u32, 1, 9, 16, 512, u32::MAX] {
        // SAFETY: a word of the map's header, in our own arena.
        unsafe { (at as *mut u32).write(scribbled) };
        let (mut cursor, mut key) = (0u64, [0x55u8; 1024]);
        let (cursor_at, key_at) = ((&raw mut cursor) as u64, key.as_mut_ptr() as u64);
        let args = [target.base, target.map(0), cursor_at, key_at, 8, slot];
        assert_eq!(target.call(F::HashNext, &args), 0, "{scribbled}");
        assert_eq!(key, [0x55; 1024], "{scribbled}");
    }
}
