//! Slots: one per living thread, reused after death, taken anew after fork.
#![allow(missing_docs, reason = "a test")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod in_process;

use std::collections::HashSet;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use flea_object::spec::{MapIdx, MapKind};
use in_process::{Target, add, number, spec};

#[test]
fn threads_that_live_at_once_have_different_slots() {
    let target = Target::new(&[spec(MapKind::PerCpuArray, 4, 8, 2)]);
    let n = 100;
    let barrier = Barrier::new(n);
    let slots: HashSet<u64> = thread::scope(|s| {
        let threads: Vec<_> = (0..n)
            .map(|_| {
                s.spawn(|| {
                    let slot = target.slot();
                    assert_eq!(slot, target.slot());
                    let placement = target.arena.plan().maps[0];
                    add(slot + placement.slot_offset + 8, 5);
                    barrier.wait();
                    slot
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(slots.len(), n);
    assert_eq!(target.arena.used_slots(), 100);
    let values = target.arena.percpu_array(MapIdx(0)).unwrap().get(1).unwrap();
    assert_eq!(values.iter().map(|v| number(v)).sum::<u64>(), 500);
    assert_eq!(target.arena.no_slot(), 0);
}

/// An arena with 16 slots: their values are 300 MiB each, never touched.
fn small() -> Target {
    let target = Target::new(&[spec(MapKind::PerCpuArray, 4, 300 << 20, 1)]);
    assert_eq!(target.arena.plan().n_slots, 16);
    target
}

#[test]
fn dead_threads_slots_are_reused_after_a_rest_and_keep_their_counts() {
    let target = small();
    let placement = target.arena.plan().maps[0];
    let hit = |target: &Target| {
        let slot = target.slot();
        if slot != 0 {
            add(slot + placement.slot_offset, 1);
            // Its program was running when it died.
            add(slot + 64, 1);
        }
        slot
    };
    let barrier = Barrier::new(17);
    thread::scope(|s| {
        for _ in 0..16 {
            s.spawn(|| {
                assert_ne!(hit(&target), 0);
                barrier.wait();
                barrier.wait();
            });
        }
        barrier.wait();
        for _ in 0..20 {
            assert_eq!(hit(&target), 0, "all owners live");
        }
        barrier.wait();
    });
    assert_eq!(target.arena.no_slot(), 20);
    let begin = Instant::now();
    while hit(&target) == 0 {
        assert!(begin.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(10));
    }
    assert!(begin.elapsed() >= Duration::from_millis(950), "a rest of a second");
    // The new owner's own mark alone: the dead one's was cleared.
    // SAFETY: the slot's first program state.
    assert_eq!(unsafe { *((target.slot() + 64) as *const u64) }, 1);
    assert_eq!(counted(&target), 17);
}

/// Without reading whole values of 300 MiB.
fn counted(target: &Target) -> u64 {
    let plan = target.arena.plan();
    (0..16u64)
        .map(|slot| {
            let at = plan.slots_offset + slot * plan.slot_stride + plan.maps[0].slot_offset;
            // SAFETY: inside the arena.
            unsafe { ((target.base + at) as *const u64).read_volatile() }
        })
        .sum()
}

/// Runs `child` in a forked child and returns its exit status.
fn in_child(child: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child calls nothing but the blob and _exit.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0);
    if pid == 0 {
        let code = child();
        // SAFETY: ends the child.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: our own child.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert!(libc::WIFEXITED(status), "status {status:#x}");
    libc::WEXITSTATUS(status)
}

#[test]
fn forked_children_take_slots_of_their_own_and_leave_them() {
    let target = small();
    let own = target.slot();
    for _ in 0..100 {
        let code = in_child(|| {
            // A child that finds none free looks again at its next hit.
            for _ in 0..8 {
                let slot = target.slot();
                if slot != 0 {
                    return if slot == own { 1 } else { 0 };
                }
            }
            2
        });
        assert_eq!(code, 0);
    }
    assert_eq!(target.slot(), own);
    assert_eq!(target.arena.used_slots(), 16);
}

#[test]
fn misses_are_summed_over_slots() {
    let target = Target::new(&[]);
    let slot = target.slot();
    add(slot + 64 + 16 + 8, 3);
    thread::scope(|s| {
        s.spawn(|| add(target.slot() + 64 + 16 + 8, 4));
    });
    assert_eq!(target.arena.program_misses(1), 7);
    assert_eq!(target.arena.program_misses(0), 0);
    assert_eq!(target.arena.program_misses(2), 0);
}
