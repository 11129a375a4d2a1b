//! Prints what a call of each of the runtime's functions costs here, in ns.
#![allow(clippy::unwrap_used, reason = "an example")]

#[path = "../tests/in_process/mod.rs"]
mod in_process;

use std::time::Instant;

use flea_layout::shared::RuntimeFn as F;
use flea_object::spec::{MapIdx, MapKind};
use in_process::{Target, spec};

fn main() {
    let maps = [
        spec(MapKind::Hash, 8, 8, 1024),
        spec(MapKind::RingBuf, 0, 0, 1 << 20),
        spec(MapKind::PerCpuHash, 8, 8, 1024),
    ];
    let target = Target::new(&maps);
    let slot = target.slot();
    let key = 5u64.to_le_bytes();
    let at = key.as_ptr() as u64;
    for map in [0, 2] {
        for i in 0..500u64 {
            target.update(map, &i.to_le_bytes(), &key, 0, slot);
        }
    }
    let mut out = [0u64; 8];
    let to = out.as_mut_ptr() as u64;
    let base = target.base;
    let cases = [
        ("ringbuf_query (almost nothing)", F::RingbufQuery, vec![target.map(1), 1]),
        ("thread_slot", F::ThreadSlot, vec![base]),
        ("hash_lookup, hit", F::HashLookup, vec![base, target.map(0), at, slot]),
        ("hash_lookup, per-CPU", F::HashLookup, vec![base, target.map(2), at, slot]),
        ("map_update, existing", F::MapUpdate, vec![base, target.map(0), at, at, 0, slot]),
        ("ringbuf_output, 8 bytes", F::RingbufOutput, vec![base, target.map(1), at, 8, 0]),
        ("clock_ns by system call", F::ClockNs, vec![0, 1]),
        ("pid_tgid", F::PidTgid, vec![]),
        ("processor_id", F::ProcessorId, vec![]),
        ("prandom", F::Prandom, vec![slot]),
        ("probe_read_user, 8 bytes", F::ProbeReadUser, vec![to, 8, at]),
        ("probe_read_user, bad address", F::ProbeReadUser, vec![to, 8, 8]),
        ("comm", F::Comm, vec![to, 16]),
    ];
    let mut ring = target.arena.ringbuf(MapIdx(1)).unwrap();
    for (name, function, args) in cases {
        let mut best = f64::MAX;
        for _ in 0..20 {
            let begin = Instant::now();
            for _ in 0..10_000 {
                target.call(function, &args);
            }
            best = best.min(begin.elapsed().as_secs_f64() * 1e9 / 10_000.0);
            ring.poll(|_| {});
        }
        println!("{best:8.1}  {name}");
    }
}
