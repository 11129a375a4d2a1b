//! Signal handlers in the middle of everything, owners that die with a lock, and a target
//! that scribbles over all of the arena.
#![allow(missing_docs, reason = "a test")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod in_process;

use std::io::Read as _;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use flea_layout::plan::ArenaPlan;
use flea_layout::shared::RuntimeFn as F;
use flea_maps::{Arena, ArenaError, MapError, Update};
use flea_object::spec::{MapIdx, MapKind, MapSpec};
use in_process::{Random, Target, spec};

static IN_HANDLER: AtomicPtr<Target> = AtomicPtr::new(std::ptr::null_mut());
static HANDLED: AtomicU64 = AtomicU64::new(0);
static REFUSED: AtomicU64 = AtomicU64::new(0);

extern "C" fn handler(_signal: i32) {
    // SAFETY: set before the timer starts, cleared after it ends.
    let Some(target) = (unsafe { IN_HANDLER.load(Relaxed).as_ref() }) else { return };
    let slot = target.slot();
    let n = HANDLED.fetch_add(1, Relaxed);
    for key in 0..4u64 {
        let key = key.to_le_bytes();
        let results = [target.update(0, &key, &n.to_le_bytes(), 0, slot), target.delete(0, &key)];
        for result in results {
            assert!([0, -2, -7, -16].contains(&result), "{result}");
            REFUSED.fetch_add(u64::from(result == -16), Relaxed);
        }
    }
    target.call(
        F::RingbufOutput,
        &[target.base, target.map(1), n.to_le_bytes().as_ptr() as u64, 8, 0],
    );
}

#[test]
fn a_signal_handler_may_interrupt_anything() {
    // One element and so one bucket: handlers hit the very lock that is held.
    let maps = [spec(MapKind::Hash, 8, 8, 1), spec(MapKind::RingBuf, 0, 0, 4096)];
    let target = Box::new(Target::new(&maps));
    let slot = target.slot();
    IN_HANDLER.store(std::ptr::from_ref(&*target).cast_mut(), Relaxed);
    let mut timer = std::ptr::null_mut();
    // SAFETY: zero is a valid sigevent, completed below.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = libc::SIGUSR1;
    // SAFETY: no arguments.
    event.sigev_notify_thread_id = unsafe { libc::gettid() };
    let act = handler as extern "C" fn(i32) as libc::sighandler_t;
    // SAFETY: the handler calls only the blob.
    unsafe { libc::signal(libc::SIGUSR1, act) };
    // SAFETY: both are ours.
    let made = unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
    assert_eq!(made, 0);
    let every = libc::timespec { tv_sec: 0, tv_nsec: 50_000 };
    let spec = libc::itimerspec { it_interval: every, it_value: every };
    // SAFETY: our timer.
    assert_eq!(unsafe { libc::timer_settime(timer, 0, &raw const spec, std::ptr::null_mut()) }, 0);
    let mut ring = target.arena.ringbuf(MapIdx(1)).unwrap();
    let begin = Instant::now();
    let mut n_records = 0;
    while begin.elapsed() < Duration::from_secs(2) {
        for _ in 0..100 {
            let result = target.update(0, &[1; 8], &[2; 8], 0, slot);
            assert!([0, -7].contains(&result), "no handler keeps the lock: {result}");
            assert!([0, -2].contains(&target.delete(0, &[1; 8])));
            let record = target.call(F::RingbufReserve, &[target.base, target.map(1), 8]);
            if record != 0 {
                target.call(F::RingbufDiscard, &[record, 0]);
            }
        }
        n_records += ring.poll(|r| assert_eq!(r.len(), 8));
    }
    // SAFETY: our timer.
    assert_eq!(unsafe { libc::timer_delete(timer) }, 0);
    IN_HANDLER.store(std::ptr::null_mut(), Relaxed);
    println!(
        "{} handlers, {n_records} records, {} refused",
        HANDLED.load(Relaxed),
        REFUSED.load(Relaxed)
    );
    assert!(HANDLED.load(Relaxed) > 1000 && n_records > 0);
    assert_eq!(ring.resyncs(), 0);
    assert_eq!(target.slot(), slot);
}

#[test]
fn a_dead_owners_lock_is_given_up_after_a_second() {
    let target = Target::new(&[spec(MapKind::Hash, 8, 8, 1)]);
    let slot = target.slot();
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let dead = child.id();
    child.wait().unwrap();
    // The only bucket's lock, as a thread that died in between leaves it.
    let lock = target.base + target.arena.plan().maps[0].data_offset + 4;
    // SAFETY: inside the arena.
    unsafe { (lock as *mut u32).write_volatile((5 << 22) | dead) };
    let map = target.arena.hash(MapIdx(0)).unwrap();
    let begin = Instant::now();
    assert_eq!(target.update(0, &[1; 8], &[2; 8], 0, slot), -16);
    assert_eq!(map.update(&[1; 8], &[2; 8], Update::Any), Err(MapError::Busy));
    assert!(begin.elapsed() < Duration::from_millis(500), "waiting is bounded");
    assert_eq!(target.lookup(0, &[1; 8], slot), 0, "readers never wait");
    while target.update(0, &[1; 8], &[2; 8], 0, slot) == -16 {
        assert!(begin.elapsed() < Duration::from_secs(5));
        thread::sleep(Duration::from_millis(20));
    }
    assert!(begin.elapsed() >= Duration::from_secs(1));
    assert_eq!(map.lookup(&[1; 8]), Ok(Some(vec![2; 8])));
}

#[test]
fn a_living_owners_lock_is_respected() {
    let target = Target::new(&[spec(MapKind::Hash, 8, 8, 1)]);
    let slot = target.slot();
    let lock = target.base + target.arena.plan().maps[0].data_offset + 4;
    // SAFETY: inside the arena. The owner is this process's parent.
    unsafe { (lock as *mut u32).write_volatile(std::os::unix::process::parent_id()) };
    let begin = Instant::now();
    assert_eq!(target.delete(0, &[1; 8]), -16);
    assert!(begin.elapsed() < Duration::from_millis(500), "waiting is bounded");
    thread::sleep(Duration::from_millis(1100));
    assert_eq!(target.update(0, &[1; 8], &[2; 8], 0, slot), -16);
    // A dead thread whose slot passed to a living one: the lock may be the latter's.
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let dead = child.id();
    child.wait().unwrap();
    let pid = u64::from(std::process::id());
    thread::scope(|s| {
        s.spawn(|| {
            let owner = target.slot() as *mut u64;
            // SAFETY: the slot's first word.
            unsafe { owner.write_volatile((pid << 32) | u64::from(dead)) };
        });
    });
    // SAFETY: as above.
    unsafe { (lock as *mut u32).write_volatile(dead) };
    assert_eq!(target.delete(0, &[1; 8]), -16);
    thread::sleep(Duration::from_millis(1100));
    assert_eq!(target.delete(0, &[1; 8]), -16);
    // Its own lock: a handler that interrupted the owner is told at once.
    // SAFETY: as above.
    let me = unsafe { libc::gettid() }.unsigned_abs();
    // SAFETY: as above.
    unsafe { (lock as *mut u32).write_volatile(me) };
    let begin = Instant::now();
    assert_eq!(target.delete(0, &[1; 8]), -16);
    assert!(begin.elapsed() < Duration::from_millis(5));
}

fn one_of_each() -> Vec<MapSpec> {
    vec![
        spec(MapKind::Hash, 7, 20, 50),
        spec(MapKind::PerCpuHash, 4, 8, 50),
        spec(MapKind::Array, 4, 12, 50),
        spec(MapKind::PerCpuArray, 4, 8, 50),
        spec(MapKind::RingBuf, 0, 0, 4096),
    ]
}

/// Every reader and writer of the controller, while a thread writes words of all kinds (any,
/// small, near to right ones) everywhere, headers and chains above all.
#[test]
fn a_target_that_scribbles_harms_itself_alone() {
    let maps = one_of_each();
    let target = Target::new(&maps);
    let stop = AtomicBool::new(false);
    thread::scope(|s| {
        for seed in 1..3 {
            let (target, stop) = (&target, &stop);
            s.spawn(move || scribble(target, stop, seed));
        }
        let reader = s.spawn(|| {
            let begin = Instant::now();
            let mut turns = 0u64;
            while begin.elapsed() < Duration::from_secs(4) {
                use_everything(&target.arena, turns);
                turns += 1;
            }
            turns
        });
        let turns = reader.join();
        stop.store(true, Relaxed);
        println!("{} turns", turns.unwrap());
    });
}

fn scribble(target: &Target, stop: &AtomicBool, seed: u64) {
    let plan = target.arena.plan();
    let mut random = Random(seed);
    for turn in 0u64.. {
        if stop.load(Relaxed) {
            return;
        }
        if turn % 1000 == 0 {
            // The readers shall get somewhere on a small machine, too.
            thread::sleep(Duration::from_micros(200));
        }
        let roll = random.next();
        let (start, len) = match roll % 4 {
            0 => (0, plan.slots_offset),
            1 => (plan.slots_offset, 8 * plan.slot_stride),
            _ => {
                let map = plan.maps[usize::try_from(roll >> 8).unwrap() % plan.maps.len()];
                (map.data_offset, map.data_size_bytes.max(8))
            }
        };
        let at = target.base + start + random.next() % (len / 8) * 8;
        let value = match random.next() % 5 {
            0 => random.next(),
            1 => random.next() % 64,
            2 => (random.next() % 64) << 32 | (random.next() % 64),
            3 => 1 << (random.next() % 64),
            _ => 0,
        };
        // SAFETY: inside the arena, which is mapped here.
        unsafe { (at as *mut u64).write_volatile(value) };
    }
}

fn use_everything(arena: &Arena, turn: u64) {
    let key = &turn.to_le_bytes()[..7];
    let hash = arena.hash(MapIdx(0)).unwrap();
    let _ = hash.update(key, &[1; 20], Update::Any);
    let _ = hash.lookup(key);
    assert!(hash.iter().count() <= 50);
    let _ = hash.delete(key);
    let percpu = arena.percpu_hash(MapIdx(1)).unwrap();
    let _ = percpu.update(&key[..4], &[1; 8], Update::Any);
    let _ = percpu.lookup(&key[..4]);
    if turn.is_multiple_of(64) {
        assert!(percpu.iter().count() <= 50);
    }
    assert!(percpu.keys().count() <= 50);
    let _ = percpu.delete(&key[..4]);
    let array = arena.array(MapIdx(2)).unwrap();
    assert_eq!(array.iter().count(), 50);
    array.set(3, &[1; 12]).unwrap();
    let values = arena.percpu_array(MapIdx(3)).unwrap().get(49).unwrap();
    assert!(values.len() <= 1024);
    let mut ring = arena.ringbuf(MapIdx(4)).unwrap();
    let n = ring.poll(|record| assert!(record.len() <= 4096));
    assert!(n <= 4096 / 8);
    let _ = (ring.lost(), ring.resyncs(), arena.no_slot(), arena.used_slots());
    let _ = (arena.program_misses(0), arena.program_misses(1));
}

/// Found by `cargo xtask fuzz --only shared`: counting on from the largest number panicked.
#[test]
fn a_count_of_elements_that_cannot_be_is_a_full_map() {
    let target = Target::new(&[spec(MapKind::Hash, 8, 8, 4)]);
    let state = target.arena.plan().maps[0].header_offset + flea_runtime::map::STATE_OFFSET;
    let used = target.base + state + flea_runtime::hash::state::USED * 8;
    // SAFETY: inside the arena, which is mapped here.
    unsafe { (used as *mut u64).write_volatile(u64::MAX) };
    let map = target.arena.hash(MapIdx(0)).unwrap();
    assert_eq!(map.update(&[1; 8], &[2; 8], Update::Any), Err(MapError::Full { max_entries: 4 }));
    assert!(map.iter().count() <= 4);
}

fn memfd(flags: u32) -> OwnedFd {
    // SAFETY: a C string.
    let fd = unsafe { libc::memfd_create(c"test".as_ptr(), flags) };
    assert!(fd >= 0);
    // SAFETY: just made.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[test]
fn memory_that_could_be_cut_short_is_refused() {
    let maps = one_of_each();
    let plan = ArenaPlan::new(&maps, 1);
    let unsealable = Arena::from_fd(memfd(0), &plan, &maps);
    assert!(matches!(unsealable, Err(ArenaError::NotSealable)));
    let fd = memfd(libc::MFD_ALLOW_SEALING);
    std::fs::File::from(fd.try_clone().unwrap()).set_len(4096).unwrap();
    let wrong = Arena::from_fd(fd, &plan, &maps);
    assert!(matches!(wrong, Err(ArenaError::WrongSize { found_bytes: 4096, .. })));
    let fd = memfd(libc::MFD_ALLOW_SEALING);
    let file = std::fs::File::from(fd.try_clone().unwrap());
    let arena = Arena::from_fd(fd, &plan, &maps).unwrap();
    file.set_len(4096).unwrap_err();
    assert_eq!(file.metadata().unwrap().len(), arena.plan().size_bytes);
    let empty = memfd(libc::MFD_ALLOW_SEALING);
    std::fs::File::from(empty.try_clone().unwrap()).set_len(plan.size_bytes).unwrap();
    assert!(matches!(Arena::open(empty, &plan), Err(ArenaError::NotAnArena)));
}

#[test]
fn maps_that_make_no_sense_are_refused() {
    let bad = |spec: MapSpec| {
        let maps = [spec];
        let result = Arena::create(&ArenaPlan::new(&maps, 1), &maps);
        assert!(
            matches!(result, Err(ArenaError::BadMap { .. } | ArenaError::TooLarge { .. })),
            "{result:?}"
        );
    };
    bad(spec(MapKind::Hash, 0, 8, 8));
    bad(spec(MapKind::Hash, 8, 0, 8));
    bad(spec(MapKind::Hash, 8, 8, 0));
    bad(spec(MapKind::Hash, u32::MAX, u32::MAX, u32::MAX));
    bad(spec(MapKind::PerCpuHash, 8, 1 << 30, 1 << 30));
    bad(spec(MapKind::Array, 4, 1 << 30, u32::MAX));
    bad(spec(MapKind::PerCpuArray, 4, 1 << 30, u32::MAX));
    bad(spec(MapKind::Array, 8, 8, 8));
    bad(spec(MapKind::RingBuf, 0, 0, 4095));
    bad(spec(MapKind::RingBuf, 0, 0, 2048));
    bad(spec(MapKind::RingBuf, 0, 0, 0));
    let init = Some(vec![0; 9]);
    bad(MapSpec { init: init.clone(), ..spec(MapKind::Array, 4, 8, 1) });
    bad(MapSpec { init, ..spec(MapKind::Hash, 4, 9, 1) });
    let maps = one_of_each();
    let other = ArenaPlan::new(&maps[1..], 1);
    assert!(matches!(Arena::create(&other, &maps), Err(ArenaError::WrongPlan)));
}

#[test]
fn first_values_are_there_and_the_file_has_its_name() {
    let init = Some(b"hello, world".to_vec());
    let maps = [MapSpec { init, ..spec(MapKind::Array, 4, 16, 1) }];
    let arena = Arena::create(&ArenaPlan::new(&maps, 1), &maps).unwrap();
    assert_eq!(arena.array(MapIdx(0)).unwrap().get(0).unwrap(), b"hello, world\0\0\0\0");
    assert!(matches!(arena.array(MapIdx(1)), Err(MapError::NoSuchMap { .. })));
    assert!(matches!(arena.hash(MapIdx(0)), Err(MapError::WrongKind { .. })));
    let fd = std::os::fd::AsRawFd::as_raw_fd(&arena.fd());
    let name = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
    assert!(name.to_str().unwrap().contains("memfd:flea-maps"));
    let mut magic = [0; 8];
    let mut file = std::fs::File::open(format!("/proc/self/fd/{fd}")).unwrap();
    file.read_exact(&mut magic).unwrap();
    assert_eq!(&magic, b"fleaarna");
}
