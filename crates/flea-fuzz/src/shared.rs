//! Shared memory that a target scribbles over, before and while the controller uses it: each call
//! ends, with a value, nothing, or an error, and no more of it than the map has room for.
//!
//! The writer has the arena's file mapped a second time, as a target has. It knows where headers,
//! states and elements are, and writes what is nearly right as well as anything else.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use flea_generate::Random;
use flea_layout::plan::ArenaPlan;
use flea_maps::{Arena, Map, Update};
use flea_object::spec::{InnerMaps, MapIdx, MapKind, MapSpec};
use memmap2::{MmapOptions, MmapRaw};

use crate::campaign::{Failure, Fuzzer, Kind, Outcome};
use crate::cpu::thread_time;
use crate::watchdog::Watchdog;

/// CPU time of the controller for one input, in a build without optimisation.
const PATIENCE: Duration = Duration::from_secs(20);
/// Calls made of one arena.
const CALLS: u64 = 40;
const RING_BYTES: u32 = 4096;
const N_PROGRAMS: u32 = 2;

/// The fuzzer.
pub struct Shared {
    watchdog: Watchdog,
    n_calls: u64,
    n_refused: u64,
    n_resyncs: u64,
}

impl Default for Shared {
    fn default() -> Self {
        Self::new()
    }
}

impl Shared {
    /// A new one.
    #[must_use]
    pub fn new() -> Self {
        Self { watchdog: Watchdog::new("shared"), n_calls: 0, n_refused: 0, n_resyncs: 0 }
    }
}

/// The target's view: words at any place of the arena.
struct Hostile {
    memory: MmapRaw,
    /// (start, bytes) of what is worth writing to.
    places: Vec<(u64, u64)>,
}

impl Hostile {
    fn new(arena: &Arena) -> Result<Self> {
        let file = std::fs::File::from(arena.fd().try_clone_to_owned()?);
        let plan = arena.plan();
        let mut options = MmapOptions::new();
        options.len(usize::try_from(plan.size_bytes)?).no_reserve_swap();
        let memory = options.map_raw(&file).context("mapping the arena a second time")?;
        let mut places = vec![(0, plan.slots_offset), (plan.slots_offset, 8 * plan.slot_stride)];
        for map in &plan.maps {
            places.push((map.data_offset, map.data_size_bytes));
            places.push((map.header_offset, 128));
        }
        let size = plan.size_bytes;
        places.retain(|&(start, bytes)| bytes >= 8 && start + bytes <= size);
        Ok(Self { memory, places })
    }

    fn scribble(&self, random: &mut Random) {
        let (start, bytes) = random.pick(&self.places);
        let at = usize::try_from(start + random.below(bytes / 8) * 8).unwrap_or(0) & !7;
        let value = match random.below(6) {
            0 => random.word(),
            1 => random.below(70),
            2 => random.below(70) << 32 | random.below(70),
            // A lock that somebody alive holds.
            3 => u64::from(std::process::id()) << 32,
            4 => random.number(),
            _ => 0,
        };
        assert!(at + 8 <= self.memory.len(), "places are inside");
        // SAFETY: inside the mapping, as asserted, which lives as long as `self`; aligned, as the
        // mapping is to pages and `at` to 8.
        let word = unsafe { self.memory.as_mut_ptr().add(at).cast::<u64>() };
        // SAFETY: as above. All that is there is accessed as atomics, by this and by flea-maps.
        unsafe { AtomicU64::from_ptr(word) }.store(value, Relaxed);
    }
}

fn spec(kind: MapKind, key: u64, value: u64, max_entries: u64) -> MapSpec {
    let number = |n: u64| u32::try_from(n).unwrap_or(1);
    MapSpec {
        name: format!("{kind:?}"),
        kind,
        key_size_bytes: number(key),
        value_size_bytes: number(value),
        max_entries: number(max_entries),
        ..MapSpec::default()
    }
}

/// Of each kind one, of any shape; a lock in some values.
fn maps(random: &mut Random) -> Vec<MapSpec> {
    let mut value = |from: u64| from + random.below(40);
    let (hash, array, percpu_hash, percpu) = (value(4), value(4), value(1), value(1));
    let mut sized = |most: u64| 1 + random.below(most);
    let inner = Some(InnerMaps { template: MapIdx(0), init: vec![] });
    let template = MapSpec { template: true, ..spec(MapKind::Array, 4, 8, 4) };
    let mut maps = vec![
        template,
        spec(MapKind::Hash, sized(24), hash, sized(40)),
        spec(MapKind::Array, 4, array, sized(40)),
        spec(MapKind::PerCpuHash, sized(24), percpu_hash, sized(10)),
        spec(MapKind::PerCpuArray, 4, percpu, sized(10)),
        spec(MapKind::RingBuf, 0, 0, RING_BYTES.into()),
        spec(MapKind::Array, 4, 8, 4),
        MapSpec { inner: inner.clone(), ..spec(MapKind::ArrayOfMaps, 4, 4, sized(8)) },
        MapSpec { inner, ..spec(MapKind::HashOfMaps, sized(12), 4, sized(8)) },
    ];
    for at in [1, 2] {
        if random.chance(50) {
            maps[at].lock_offset = Some(0);
        }
    }
    maps
}

fn key(random: &mut Random, spec: &MapSpec) -> Vec<u8> {
    let n = usize::try_from(spec.key_size_bytes).unwrap_or(0);
    // Few different ones, so that they meet.
    let byte = random.byte() % 12;
    vec![byte; n]
}

fn mode(random: &mut Random) -> Update {
    random.pick(&[Update::Any, Update::NoExist, Update::Exist])
}

/// One call. Whether it found or changed something; `Err` what no map may say.
fn call(random: &mut Random, map: Map, spec: &MapSpec) -> Result<bool, String> {
    let most = usize::try_from(spec.max_entries).unwrap_or(0);
    let bounded = |n: usize| if n <= most { Ok(true) } else { Err(format!("{n} of {most}")) };
    let value = vec![random.byte(); usize::try_from(spec.value_size_bytes).unwrap_or(0)];
    let index = u32::try_from(random.below(50)).unwrap_or(0);
    let key = key(random, spec);
    let inner = MapIdx(6);
    let which = random.below(6);
    Ok(match (map, which) {
        (Map::Hash(map), 0) => map.update(&key, &value, mode(random)).is_ok(),
        (Map::Hash(map), 1) => map.delete(&key).is_ok(),
        (Map::Hash(map), 2) => map.lookup_locked(&key).is_ok(),
        (Map::Hash(map), 3) => map.update_locked(&key, &value, mode(random)).is_ok(),
        (Map::Hash(map), 4) => return bounded(map.iter().count()),
        (Map::Hash(map), _) => map.lookup(&key).is_ok(),
        (Map::PerCpuHash(map), 0 | 1) => map.update(&key, &value, mode(random)).is_ok(),
        (Map::PerCpuHash(map), 2) => map.delete(&key).is_ok(),
        (Map::PerCpuHash(map), 3) => return bounded(map.keys().count()),
        (Map::PerCpuHash(map), 4) => return bounded(map.iter().count()),
        (Map::PerCpuHash(map), _) => map.lookup(&key).is_ok(),
        (Map::Array(map), 0) => map.set(index, &value).is_ok(),
        (Map::Array(map), 1) => map.get_locked(index).is_ok(),
        (Map::Array(map), 2) => map.set_locked(index, &value).is_ok(),
        (Map::Array(map), 3) => return bounded(map.iter().count()),
        (Map::Array(map), _) => map.get(index).is_ok(),
        (Map::PerCpuArray(map), 0) => map.set(index, &value).is_ok(),
        (Map::PerCpuArray(map), _) => map.get(index).is_ok(),
        (Map::ArrayOfMaps(map), 0) => map.set(index, inner).is_ok(),
        (Map::ArrayOfMaps(map), 1) => map.clear(index).is_ok(),
        (Map::ArrayOfMaps(map), _) => map.get(index).is_ok(),
        (Map::HashOfMaps(map), 0) => map.update(&key, inner, mode(random)).is_ok(),
        (Map::HashOfMaps(map), 1) => map.delete(&key).is_ok(),
        (Map::HashOfMaps(map), 2) => return bounded(map.keys().count()),
        (Map::HashOfMaps(map), _) => map.lookup(&key).is_ok(),
        (Map::RingBuf(_), _) => false,
    })
}

/// What a consumer does, over and over.
fn consume(random: &mut Random, ring: &mut flea_maps::RingBuf) -> Result<bool, String> {
    let mut longest = 0;
    let n = ring.poll(|record| longest = longest.max(record.len()));
    let size = usize::try_from(RING_BYTES).unwrap_or(0);
    if n > size / 8 || longest > size {
        return Err(format!("{n} records, the longest of {longest} bytes"));
    }
    if ring.is_blocked() && random.chance(50) {
        ring.skip_blocked();
    }
    let _ = (ring.lost(), ring.positions());
    Ok(n > 0)
}

/// What came of an input.
struct Tried {
    n_refused: u64,
    n_resyncs: u64,
}

fn exercise(
    random: &mut Random,
    arena: &Arena,
    maps: &[MapSpec],
    hostile: &Hostile,
) -> Result<Tried, String> {
    let mut ring = arena.ringbuf(MapIdx(5)).map_err(|e| e.to_string())?;
    let mut n_refused = 0;
    for _ in 0..CALLS {
        for _ in 0..random.below(8) {
            hostile.scribble(random);
        }
        let at = 1 + random.index(maps.len() - 1);
        let index = MapIdx(u32::try_from(at).unwrap_or(0));
        let done = match maps[at].kind {
            MapKind::RingBuf => consume(random, &mut ring)?,
            _ => call(random, arena.map_at(index).map_err(|e| e.to_string())?, &maps[at])
                .map_err(|seen| format!("{}: {seen}", maps[at].name))?,
        };
        n_refused += u64::from(!done);
        if arena.used_slots() > arena.plan().n_slots {
            return Err(format!("{} slots are used", arena.used_slots()));
        }
        let _ = (arena.no_slot(), arena.program_misses(0), arena.program_misses(N_PROGRAMS));
    }
    Ok(Tried { n_refused, n_resyncs: ring.resyncs() })
}

/// `seed`'s arena and calls, in every other case with a writer that does not wait for them.
fn judge(seed: u64) -> Result<Result<Tried, String>> {
    let mut random = Random::new(seed);
    let maps = maps(&mut random);
    let arena = Arena::create(&ArenaPlan::new(&maps, N_PROGRAMS), &maps)?;
    let hostile = Hostile::new(&arena)?;
    let stop = AtomicBool::new(false);
    let run = |random: &mut Random| {
        let run = || exercise(random, &arena, &maps, &hostile);
        catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err("panicked".to_owned()))
    };
    Ok(if seed.is_multiple_of(2) {
        run(&mut random)
    } else {
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut random = Random::new(!seed);
                while !stop.load(Relaxed) {
                    hostile.scribble(&mut random);
                }
            });
            let tried = run(&mut random);
            stop.store(true, Relaxed);
            tried
        })
    })
}

impl Fuzzer for Shared {
    fn name(&self) -> &'static str {
        "shared"
    }

    fn judge(&mut self, seed: u64) -> Result<Outcome> {
        let begun = thread_time();
        let tried = self.watchdog.watch(seed, || judge(seed))?;
        let took = thread_time().saturating_sub(begun);
        let failed = |seen| {
            let input = format!("Shared::judge({seed})");
            Outcome::Failed(Failure { kind: Kind::Misbehaviour, seen, input })
        };
        Ok(match tried {
            Err(seen) => failed(seen),
            Ok(_) if took > PATIENCE => failed(format!("{} s of CPU time", took.as_secs())),
            Ok(tried) => {
                self.n_calls += CALLS;
                self.n_refused += tried.n_refused;
                self.n_resyncs += tried.n_resyncs;
                Outcome::Accepted
            }
        })
    }

    fn summary(&self) -> String {
        format!(
            "{} calls, of which {} found nothing or were refused; {} rings found damaged\n",
            self.n_calls, self.n_refused, self.n_resyncs
        )
    }
}
