//! Many threads in the blob at once: nothing lost, nothing twice, nothing torn.
#![allow(missing_docs, reason = "a test")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod in_process;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use flea_layout::shared::RuntimeFn as F;
use flea_maps::MapError;
use flea_object::spec::{MapIdx, MapKind};
use in_process::{Random, Target, add, number, spec};

const THREADS: u64 = 8;
const N_THREADS: usize = 8;

#[test]
fn per_thread_counts_in_a_percpu_hash_add_up() {
    let target = Target::new(&[spec(MapKind::PerCpuHash, 8, 8, 64)]);
    const HITS: u64 = 50_000;
    thread::scope(|s| {
        for t in 0..THREADS {
            let target = &target;
            s.spawn(move || {
                let slot = target.slot();
                let mut random = Random(t + 1);
                for _ in 0..HITS {
                    let key = (random.next() % 50).to_le_bytes();
                    let mut value = target.lookup(0, &key, slot);
                    while value == 0 {
                        // The first of all threads makes it; EEXIST and EBUSY are fine.
                        target.update(0, &key, &[0; 8], 1, slot);
                        value = target.lookup(0, &key, slot);
                    }
                    add(value, 1);
                }
            });
        }
    });
    let map = target.arena.percpu_hash(MapIdx(0)).unwrap();
    let sum: u64 = map.iter().flat_map(|(_, cells)| cells).map(|c| number(&c)).sum();
    assert_eq!(map.keys().count(), 50);
    assert_eq!(sum, THREADS * HITS);
}

/// Each thread owns its keys, inserts and deletes them, and must always see its own value;
/// the controller reads all the time and must never see a torn element.
#[test]
fn threads_see_their_own_keys_whatever_others_do() {
    let target = Target::new(&[spec(MapKind::Hash, 16, 16, 100)]);
    let (done, busy) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|s| {
        let workers: Vec<_> = (0..THREADS)
            .map(|t| {
                let (target, busy) = (&target, &busy);
                s.spawn(move || own_keys(target, t, busy))
            })
            .collect();
        let reader = s.spawn(|| {
            let map = target.arena.hash(MapIdx(0)).unwrap();
            let mut n_seen = 0u64;
            let own = [0xee; 16];
            let insist = |change: &dyn Fn() -> Result<(), MapError>| loop {
                let result = change();
                if result != Err(MapError::Busy) {
                    return result;
                }
            };
            while !done.load(Relaxed) {
                insist(&|| map.update(&own, &own, flea_maps::Update::NoExist)).unwrap();
                assert_eq!(map.lookup(&own), Ok(Some(own.to_vec())));
                insist(&|| map.delete(&own)).unwrap();
                assert_eq!(map.lookup(&own), Ok(None));
                for (key, value) in &map {
                    assert_eq!(key, value);
                    n_seen += 1;
                }
            }
            n_seen
        });
        for worker in workers {
            worker.join().unwrap();
        }
        done.store(true, Relaxed);
        println!("{} elements read meanwhile", reader.join().unwrap());
    });
    println!("{} of {} changes found the bucket busy", busy.load(Relaxed), THREADS * 80_000);
    let map = target.arena.hash(MapIdx(0)).unwrap();
    assert_eq!(map.iter().count(), 0);
    // No node was lost on the way.
    for i in 0..100u128 {
        assert_eq!(target.update(0, &i.to_le_bytes(), &i.to_le_bytes(), 1, target.slot()), 0);
    }
    assert_eq!(target.update(0, &100u128.to_le_bytes(), &[0; 16], 0, target.slot()), -7);
}

fn own_keys(target: &Target, t: u64, busy: &AtomicU64) {
    let slot = target.slot();
    let insist = |change: &dyn Fn() -> i64| loop {
        match change() {
            -16 => busy.fetch_add(1, Relaxed),
            result => return result,
        };
    };
    for turn in 0..40_000u128 {
        // At most 10 elements per thread: the map is never full.
        let key = ((u128::from(t) << 64) | (turn % 10)).to_le_bytes();
        assert_eq!(target.lookup(0, &key, slot), 0);
        assert_eq!(insist(&|| target.update(0, &key, &key, 1, slot)), 0);
        let value = target.lookup(0, &key, slot) as *const [u8; 16];
        assert!(!value.is_null());
        // SAFETY: this thread's own element, which nobody else deletes.
        assert_eq!(unsafe { value.read_volatile() }, key);
        assert_eq!(insist(&|| target.delete(0, &key)), 0);
        assert_eq!(insist(&|| target.delete(0, &key)), -2);
    }
}

#[test]
fn every_record_arrives_once_and_in_its_threads_order() {
    let target = Target::new(&[spec(MapKind::RingBuf, 0, 0, 16384)]);
    const RECORDS: u64 = 20_000;
    let mut ring = target.arena.ringbuf(MapIdx(0)).unwrap();
    let done = AtomicU64::new(0);
    let mut next = [0u64; N_THREADS];
    let mut n_records = 0;
    thread::scope(|s| {
        for t in 0..THREADS {
            let (target, done) = (&target, &done);
            s.spawn(move || {
                produce(target, t, RECORDS);
                done.fetch_add(1, Relaxed);
            });
        }
        loop {
            let finished = done.load(Relaxed) == THREADS;
            let n = ring.poll(|record| check_record(record, &mut next));
            n_records += n as u64;
            if finished && n == 0 {
                break;
            }
            if n == 0 {
                thread::yield_now();
            }
        }
    });
    assert_eq!(next, [RECORDS; N_THREADS]);
    assert_eq!((n_records, ring.resyncs()), (THREADS * RECORDS, 0));
    println!("{} reservations found the ring full", ring.lost());
    let query = |flag| target.call(F::RingbufQuery, &[target.map(0), flag]);
    assert_eq!((query(0), query(1)), (0, 16384));
    assert_eq!(query(2), query(3));
}

/// Thread, number, then as many bytes as the number says, all alike.
fn produce(target: &Target, t: u64, n_records: u64) {
    let mut random = Random(t + 100);
    for i in 0..n_records {
        let extra = random.next() % 100;
        let mut bytes = [t.to_le_bytes(), i.to_le_bytes()].concat();
        let len = 16 + extra;
        bytes.resize(usize::try_from(len).unwrap(), u8::try_from(i % 251).unwrap());
        loop {
            if i % 3 == 0 {
                let args = [target.base, target.map(0), bytes.as_ptr() as u64, len, 0];
                if target.call(F::RingbufOutput, &args) == 0 {
                    break;
                }
            } else {
                let record = target.call(F::RingbufReserve, &[target.base, target.map(0), len]);
                if record != 0 {
                    let to = record as *mut u8;
                    // SAFETY: the record has `len` bytes.
                    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
                    if random.next().is_multiple_of(8) {
                        target.call(F::RingbufDiscard, &[record, 0]);
                        continue;
                    }
                    target.call(F::RingbufSubmit, &[record, 0]);
                    break;
                }
            }
            thread::yield_now();
        }
    }
}

fn check_record(record: &[u8], next: &mut [u64]) {
    let t = usize::try_from(number(&record[..8])).unwrap();
    let i = number(&record[8..16]);
    assert_eq!(next[t], i);
    assert!(record[16..].iter().all(|b| u64::from(*b) == i % 251));
    next[t] += 1;
}

#[test]
fn records_over_half_the_ring_and_full_rings_are_counted_as_lost() {
    let target = Target::new(&[spec(MapKind::RingBuf, 0, 0, 4096)]);
    let reserve = |len| target.call(F::RingbufReserve, &[target.base, target.map(0), len]);
    let mut ring = target.arena.ringbuf(MapIdx(0)).unwrap();
    assert_eq!(reserve(2048), 0);
    assert_eq!(reserve(u64::MAX), 0);
    assert_eq!(ring.lost(), 2);
    // Wherever the position stands, a record of half the ring fits an empty ring.
    for small in (0..4096).step_by(8) {
        let first = reserve(small % 1000);
        target.call(F::RingbufSubmit, &[first, 0]);
        let big = reserve(2040);
        assert_ne!(big, 0);
        assert_eq!(ring.poll(|_| {}), 1, "the second is still being written");
        target.call(F::RingbufSubmit, &[big, 0]);
        assert_eq!(ring.poll(|r| assert_eq!(r.len(), 2040)), 1);
    }
    let mut held = 0;
    while reserve(1000) != 0 {
        held += 1;
    }
    assert_eq!((held, ring.lost()), (4, 3));
    assert_eq!(ring.poll(|_| {}), 0);
    // Their producer died: the consumer gives them up, one by one.
    for _ in 0..held {
        assert_eq!(ring.poll(|_| {}), 0, "at most padding");
        assert!(ring.is_blocked());
        ring.skip_blocked();
    }
    assert!(!ring.is_blocked());
    assert_ne!(reserve(1000), 0);
    assert_eq!((ring.poll(|_| {}), ring.resyncs()), (0, 0));
}

/// Their producers died before they had written as much as a size.
#[test]
fn records_without_a_header_are_given_up_alone() {
    use flea_runtime::ringbuf::{BUSY, HEADER_BYTES, KIND_RECORD};
    let target = Target::new(&[spec(MapKind::RingBuf, 0, 0, 4096)]);
    let reserve = |len| target.call(F::RingbufReserve, &[target.base, target.map(0), len]);
    let submit = |record| target.call(F::RingbufSubmit, &[record, 0]);
    let mut ring = target.arena.ringbuf(MapIdx(0)).unwrap();
    for _ in 0..100 {
        // With the last of them the ring's end is passed now and then.
        for len in [24, 8, 160] {
            let record = reserve(len);
            assert_ne!(record, 0);
            add(record - HEADER_BYTES, (KIND_RECORD | BUSY | len).wrapping_neg());
        }
        let whole = reserve(40);
        submit(whole);
        let mut n_read = 0;
        while n_read == 0 {
            n_read = ring.poll(|record| assert_eq!(record.len(), 40));
            if n_read == 0 {
                assert!(ring.is_blocked());
                ring.skip_blocked();
            }
        }
        let (read, reserved) = ring.positions();
        assert_eq!((n_read, read, ring.is_blocked()), (1, reserved, false));
    }
    assert_eq!((ring.resyncs(), ring.lost()), (0, 0));
}

#[test]
fn two_controllers_share_one_arena() {
    let target = Target::new(&[spec(MapKind::Hash, 8, 8, 10)]);
    let fd = target.arena.fd().try_clone_to_owned().unwrap();
    let other = flea_maps::Arena::open(fd, target.arena.plan()).unwrap();
    let (a, b) = (target.arena.hash(MapIdx(0)).unwrap(), other.hash(MapIdx(0)).unwrap());
    a.update(&[1; 8], &[2; 8], flea_maps::Update::Any).unwrap();
    assert_eq!(b.lookup(&[1; 8]).unwrap(), Some(vec![2; 8]));
    b.delete(&[1; 8]).unwrap();
    assert_eq!(a.delete(&[1; 8]), Err(MapError::NotFound));
}
