//! `bpf_spin_lock`: excludes threads and the controller, waits a bounded time, and survives
//! owners that are killed or jump away.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

mod in_process;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::thread;

use flea_layout::shared::RuntimeFn;
use flea_maps::{MapError, Update};
use flea_object::spec::{MapIdx, MapKind, MapSpec};
use in_process::{Target, spec};

/// `struct { u64 a; u32 x; struct bpf_spin_lock lock; u64 b; }`
const VALUE_BYTES: u32 = 24;
const LOCK: u32 = 12;
const ARRAY: usize = 0;
const HASH: usize = 1;
const KEY: [u8; 4] = [1, 0, 0, 0];
const EBUSY: i64 = -16;
const EINVAL: i64 = -22;
const F_LOCK: u64 = 4;

fn target() -> Target {
    let locked = |kind| MapSpec { lock_offset: Some(LOCK), ..spec(kind, 4, VALUE_BYTES, 4) };
    let target = Target::new(&[
        locked(MapKind::Array),
        locked(MapKind::Hash),
        spec(MapKind::Array, 4, VALUE_BYTES, 4),
    ]);
    let hash = target.arena.hash(MapIdx(1)).unwrap();
    hash.update(&KEY, &[0; 24], Update::Any).unwrap();
    target
}

fn lock(target: &Target, value: u64, slot: u64) -> i64 {
    let args = [target.base, value + u64::from(LOCK), slot];
    target.call(RuntimeFn::SpinLock, &args).cast_signed()
}

/// On a machine that is busy with something else an owner may be kept waiting for longer than
/// those who wait for it do.
fn patiently<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
    for _ in 0..1000 {
        match attempt() {
            Some(done) => return done,
            None => thread::yield_now(),
        }
    }
    panic!("the lock is never free");
}

fn take(target: &Target, value: u64, slot: u64) {
    succeed(|| lock(target, value, slot));
}

fn succeed(mut attempt: impl FnMut() -> i64) {
    let status = patiently(|| Some(attempt()).filter(|status| *status != EBUSY));
    assert_eq!(status, 0);
}

/// The element's value, read under its lock.
fn read(target: &Target, map: usize) -> Vec<u8> {
    let result = || match map {
        ARRAY => target.arena.array(MapIdx(0)).unwrap().get_locked(1),
        _ => target.arena.hash(MapIdx(1)).unwrap().lookup_locked(&KEY).map(Option::unwrap),
    };
    patiently(|| match result() {
        Err(MapError::Busy) => None,
        value => Some(value.unwrap()),
    })
}

fn unlock(target: &Target, value: u64, slot: u64) {
    target.call(RuntimeFn::SpinUnlock, &[target.base, value + u64::from(LOCK), slot]);
}

fn word(value: u64) -> &'static AtomicU32 {
    // SAFETY: an aligned part of a value, which is mapped while the test runs.
    unsafe { AtomicU32::from_ptr((value + u64::from(LOCK)) as *mut u32) }
}

/// The words at 0 and 16 of a value go up together.
fn increment(value: u64) {
    in_process::add(value, 1);
    in_process::add(value + 16, 1);
}

fn pair(value: &[u8]) -> (u64, u64) {
    assert_eq!(value[12..16], [0; 4], "the lock is nobody's business");
    (in_process::number(&value[..8]), in_process::number(&value[16..]))
}

#[test]
fn two_threads_and_the_controller_never_see_half_a_change() {
    const ROUNDS: u64 = 20_000;
    let target = target();
    for map in [ARRAY, HASH] {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let adders = [0, 1].map(|_| {
                scope.spawn(|| {
                    let slot = target.slot();
                    let value = target.lookup(map, &KEY, slot);
                    for _ in 0..ROUNDS {
                        take(&target, value, slot);
                        increment(value);
                        unlock(&target, value, slot);
                    }
                })
            });
            let reader = scope.spawn(|| {
                let mut n = 0;
                while !stop.load(Relaxed) || n == 0 {
                    let (a, b) = pair(&read(&target, map));
                    assert_eq!(a, b);
                    n += 1;
                }
            });
            for adder in adders {
                adder.join().unwrap();
            }
            stop.store(true, Relaxed);
            reader.join().unwrap();
        });
        let value = target.lookup(map, &KEY, target.slot());
        // SAFETY: the value is mapped, and nobody writes it any more.
        let sums = [value, value + 16].map(|at| unsafe { (at as *const u64).read() });
        assert_eq!(sums, [2 * ROUNDS; 2]);
        assert_eq!(word(value).load(Relaxed) & 0x3f_ffff, 0, "it is free");
    }
}

#[test]
fn updates_under_the_lock_are_whole() {
    let target = target();
    let slot = target.slot();
    for map in [ARRAY, HASH] {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let slot = target.slot();
                let value = target.lookup(map, &KEY, slot);
                while !stop.load(Relaxed) {
                    take(&target, value, slot);
                    increment(value);
                    unlock(&target, value, slot);
                }
            });
            for n in 0..2000u64 {
                let mut bytes = [0xff; 24];
                bytes[..8].copy_from_slice(&n.to_le_bytes());
                bytes[16..].copy_from_slice(&n.to_le_bytes());
                succeed(|| target.update(map, &KEY, &bytes, F_LOCK, slot));
                let (a, b) = pair(&read(&target, map));
                assert_eq!(a, b);
                assert!(a >= n, "{a} is before {n}");
            }
            stop.store(true, Relaxed);
        });
    }
    // A map without a lock has nothing to hold.
    assert_eq!(target.update(2, &KEY, &[0; 24], F_LOCK, slot), EINVAL);
    let plain = target.arena.array(MapIdx(2)).unwrap();
    assert_eq!(plain.get_locked(0), Err(MapError::NoLock));
    assert_eq!(plain.set_locked(0, &[0; 24]), Err(MapError::NoLock));
    assert_eq!(target.update(ARRAY, &KEY, &[0; 24], F_LOCK | 3, slot), EINVAL);
}

#[test]
fn no_copy_of_a_value_touches_the_lock() {
    let target = target();
    let slot = target.slot();
    let array = target.arena.array(MapIdx(0)).unwrap();
    let hash = target.arena.hash(MapIdx(1)).unwrap();
    for map in [ARRAY, HASH] {
        let value = target.lookup(map, &KEY, slot);
        assert_eq!(lock(&target, value, slot), 0);
        let held = word(value).load(Relaxed);
        assert_ne!(held & 0x3f_ffff, 0);
        assert_eq!(target.update(map, &KEY, &[0xee; 24], 0, slot), 0);
        match map {
            ARRAY => array.set(1, &[0xdd; 24]).unwrap(),
            _ => hash.update(&KEY, &[0xdd; 24], Update::Exist).unwrap(),
        }
        assert_eq!(word(value).load(Relaxed), held);
        let mut seen = match map {
            ARRAY => vec![array.get(1).unwrap(), array.iter().nth(1).unwrap()],
            _ => vec![hash.lookup(&KEY).unwrap().unwrap(), hash.iter().next().unwrap().1],
        };
        seen.dedup();
        let mut expected = vec![0xdd; 24];
        expected[12..16].fill(0);
        assert_eq!(seen, [expected]);
        // Held all the time: the controller gives up, and the next one at once.
        if map == ARRAY {
            assert_eq!(array.get_locked(1), Err(MapError::Busy));
        }
        unlock(&target, value, slot);
        assert_eq!(word(value).load(Relaxed) & 0x3f_ffff, 0);
    }
    // A deleted element's lock may still be held: its next life leaves it alone.
    let value = target.lookup(HASH, &KEY, slot);
    assert_eq!(lock(&target, value, slot), 0);
    hash.delete(&KEY).unwrap();
    hash.update(&[9; 4], &[7; 24], Update::Any).unwrap();
    assert_eq!(target.lookup(HASH, &[9; 4], slot), value, "the same node");
    unlock(&target, value, slot);
    assert_eq!(lock(&target, value, slot), 0);
    unlock(&target, value, slot);
}

#[test]
fn waiting_ends_and_later_waiters_do_not_wait() {
    let target = target();
    let value = target.lookup(ARRAY, &KEY, 0);
    let slot = target.slot();
    assert_eq!(lock(&target, value, slot), 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            let other = target.slot();
            assert_eq!(lock(&target, value, other), EBUSY);
            assert_eq!(word(value).load(Relaxed) >> 31, 1, "it is marked");
            // Were each of these to wait for the whole time, the test would run for minutes.
            for _ in 0..1000 {
                assert_eq!(lock(&target, value, other), EBUSY);
            }
            // It is not this thread's to release.
            unlock(&target, value, other);
            assert_eq!(lock(&target, value, other), EBUSY);
        });
    });
    unlock(&target, value, slot);
    assert_eq!(word(value).load(Relaxed) >> 31, 0, "the mark is gone");
    thread::scope(|scope| {
        scope.spawn(|| {
            let other = target.slot();
            assert_eq!(lock(&target, value, other), 0);
            unlock(&target, value, other);
        });
    });
}

/// The guard keeps a program that locks from running above another on the same thread, so a
/// lock that the thread's own slot holds was left by a handler that jumped away.
#[test]
fn a_lock_that_was_left_is_taken_again_by_its_thread() {
    let target = target();
    let slot = target.slot();
    let value = target.lookup(ARRAY, &KEY, slot);
    assert_eq!(lock(&target, value, slot), 0);
    let before = word(value).load(Relaxed);
    assert_eq!(lock(&target, value, slot), 0);
    assert_ne!(word(value).load(Relaxed), before, "it was taken anew");
    unlock(&target, value, slot);
    assert_eq!(word(value).load(Relaxed) & 0x3f_ffff, 0);
}

#[test]
fn a_dead_owners_lock_passes_on() {
    let target = target();
    let value = target.lookup(ARRAY, &KEY, 0);
    // SAFETY: the child calls nothing but the blob and _exit.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let taken = lock(&target, value, target.slot());
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(taken != 0)) };
    }
    let mut status = 0;
    // SAFETY: our own child.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert_eq!(status, 0);
    assert_eq!(word(value).load(Relaxed) & 0x3f_ffff, pid.cast_unsigned());
    let slot = target.slot();
    let mut tries = 0;
    while lock(&target, value, slot) != 0 {
        tries += 1;
        thread::sleep(std::time::Duration::from_millis(50));
        assert!(tries < 400, "never");
    }
    assert!(tries > 0, "a living owner in another namespace looks dead as well: it gets time");
    unlock(&target, value, slot);
}

#[test]
fn addresses_outside_the_arena_are_no_locks() {
    let target = target();
    let slot = target.slot();
    let end = target.base + target.arena.plan().size_bytes;
    for at in [0, target.base.wrapping_sub(4), end, target.base + 2] {
        assert_eq!(
            target.call(RuntimeFn::SpinLock, &[target.base, at, slot]).cast_signed(),
            EINVAL
        );
        target.call(RuntimeFn::SpinUnlock, &[target.base, at, slot]);
    }
}
