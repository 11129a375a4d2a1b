//! Maps of maps: what the controller puts in, compiled programs find, by the blob's own code.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test")]

mod in_process;

use flea_layout::plan::ArenaPlan;
use flea_layout::shared::{MAP_HEADER_BYTES, RuntimeFn};
use flea_maps::{Arena, ArenaError, MapError, Update};
use flea_object::spec::{InnerMaps, MapIdx, MapKind, MapSpec};
use in_process::{Target, add, number, spec};

const OUTER_ARRAY: usize = 0;
const OUTER_HASH: usize = 1;
const TEMPLATE: MapIdx = MapIdx(2);
const FIRST: MapIdx = MapIdx(3);
const SECOND: MapIdx = MapIdx(4);
const OTHER_VALUE: MapIdx = MapIdx(5);

fn outer(kind: MapKind, init: &[(u32, MapIdx)]) -> MapSpec {
    let inner = Some(InnerMaps { template: TEMPLATE, init: init.to_vec() });
    MapSpec { inner, ..spec(kind, 4, 4, 8) }
}

fn maps() -> Vec<MapSpec> {
    vec![
        outer(MapKind::ArrayOfMaps, &[(1, FIRST)]),
        outer(MapKind::HashOfMaps, &[(7, SECOND)]),
        MapSpec { template: true, ..spec(MapKind::Hash, 8, 8, 1) },
        spec(MapKind::Hash, 8, 8, 4),
        spec(MapKind::Hash, 8, 8, 100),
        spec(MapKind::Hash, 8, 16, 4),
    ]
}

fn inner(target: &Target, outer: usize, key: u32) -> u64 {
    let key = key.to_le_bytes();
    let args = [target.base, target.map(outer), key.as_ptr() as u64];
    target.call(RuntimeFn::InnerMap, &args)
}

fn header(target: &Target, map: MapIdx) -> u64 {
    target.map(map.0 as usize)
}

#[test]
fn programs_find_what_was_put_in_and_its_elements() {
    let target = Target::new(&maps());
    assert_eq!(inner(&target, OUTER_ARRAY, 1), header(&target, FIRST));
    assert_eq!(inner(&target, OUTER_HASH, 7), header(&target, SECOND));
    for (outer, absent) in [(OUTER_ARRAY, 0), (OUTER_ARRAY, 8), (OUTER_ARRAY, u32::MAX)] {
        assert_eq!(inner(&target, outer, absent), 0);
    }
    assert_eq!(inner(&target, OUTER_HASH, 1), 0);

    let array = target.arena.array_of_maps(MapIdx(0)).unwrap();
    array.set(0, SECOND).unwrap();
    array.clear(1).unwrap();
    assert_eq!((array.get(0), array.get(1), array.len()), (Ok(Some(SECOND)), Ok(None), 8));
    assert_eq!(inner(&target, OUTER_ARRAY, 0), header(&target, SECOND));
    assert_eq!(inner(&target, OUTER_ARRAY, 1), 0);

    let hash = target.arena.hash_of_maps(MapIdx(1)).unwrap();
    hash.update(&9u32.to_le_bytes(), FIRST, Update::NoExist).unwrap();
    hash.delete(&7u32.to_le_bytes()).unwrap();
    assert_eq!(hash.lookup(&9u32.to_le_bytes()), Ok(Some(FIRST)));
    assert_eq!(hash.keys().collect::<Vec<_>>(), [9u32.to_le_bytes()]);
    assert_eq!(inner(&target, OUTER_HASH, 9), header(&target, FIRST));
    assert_eq!(inner(&target, OUTER_HASH, 7), 0);

    // The address that a lookup gave serves as a map.
    let slot = target.slot();
    let (map, key, value) = (inner(&target, OUTER_HASH, 9), [5u8; 8], 40u64.to_le_bytes());
    let args = [target.base, map, key.as_ptr() as u64, value.as_ptr() as u64, 0, slot];
    assert_eq!(target.call(RuntimeFn::MapUpdate, &args), 0);
    add(target.call(RuntimeFn::HashLookup, &[target.base, map, key.as_ptr() as u64, slot]), 2);
    let first = target.arena.hash(FIRST).unwrap();
    assert_eq!(first.lookup(&key).unwrap().map(|v| number(&v)), Some(42));
}

#[test]
fn inner_arrays_are_looked_up_within_their_own_bounds() {
    let any_length = 1 << 12;
    let array = |kind, n| MapSpec { flags: any_length, ..spec(kind, 4, 8, n) };
    let per_thread = |n| spec(MapKind::PerCpuArray, 4, 8, n);
    let maps = [
        MapSpec {
            inner: Some(InnerMaps { template: MapIdx(1), init: vec![(0, MapIdx(2))] }),
            ..spec(MapKind::ArrayOfMaps, 4, 4, 1)
        },
        MapSpec { template: true, ..array(MapKind::Array, 1) },
        array(MapKind::Array, 9),
        MapSpec {
            inner: Some(InnerMaps { template: MapIdx(4), init: vec![(0, MapIdx(5))] }),
            ..spec(MapKind::ArrayOfMaps, 4, 4, 1)
        },
        MapSpec { template: true, ..per_thread(1) },
        per_thread(3),
    ];
    let target = Target::new(&maps);
    let slot = target.slot();
    for (outer, n) in [(0, 9), (3, 3u32)] {
        let map = inner(&target, outer, 0);
        let lookup = |key: u32, slot| {
            let key = key.to_le_bytes();
            target.call(RuntimeFn::HashLookup, &[target.base, map, key.as_ptr() as u64, slot])
        };
        add(lookup(n - 1, slot), 5);
        assert_eq!(lookup(n, slot), 0);
        assert_eq!(lookup(u32::MAX, slot), 0);
    }
    assert_eq!(number(&target.arena.array(MapIdx(2)).unwrap().get(8).unwrap()), 5);
    let values = target.arena.percpu_array(MapIdx(5)).unwrap().get(2).unwrap();
    assert_eq!(values.iter().map(|v| number(v)).sum::<u64>(), 5);
    // A template has no memory of its own.
    assert_eq!(target.arena.plan().maps[1].data_size_bytes, 0);
    assert_eq!(target.arena.plan().maps[4].slot_offset, 0);
}

#[test]
fn only_maps_of_the_templates_shape_can_be_put_in() {
    let arena = Arena::create(&ArenaPlan::new(&maps(), 1), &maps()).unwrap();
    let array = arena.array_of_maps(MapIdx(0)).unwrap();
    let hash = arena.hash_of_maps(MapIdx(1)).unwrap();
    let wrong = MapError::WrongShape { index: OTHER_VALUE };
    assert_eq!(array.set(0, OTHER_VALUE), Err(wrong.clone()));
    assert_eq!(hash.update(&[0; 4], OTHER_VALUE, Update::Any), Err(wrong));
    assert_eq!(array.set(0, MapIdx(0)), Err(MapError::WrongShape { index: MapIdx(0) }));
    for index in [TEMPLATE, MapIdx(6)] {
        let error = array.set(0, index).unwrap_err();
        assert_eq!(error, MapError::NotLoaded { index, n_maps: 6 });
        assert!(error.to_string().contains("declare as many maps as will be needed"), "{error}");
    }
    assert!(matches!(array.set(8, FIRST), Err(MapError::OutOfRange { .. })));
    assert!(matches!(arena.map_at(TEMPLATE), Err(MapError::Template { .. })));

    let refused = |change: fn(&mut Vec<MapSpec>)| {
        let mut maps = maps();
        change(&mut maps);
        let result = Arena::create(&ArenaPlan::new(&maps, 1), &maps);
        assert!(matches!(result, Err(ArenaError::BadMap { .. })), "{result:?}");
    };
    refused(|maps| maps[0].inner = None);
    refused(|maps| maps[0].value_size_bytes = 8);
    refused(|maps| maps[0].inner.as_mut().unwrap().init = vec![(8, FIRST)]);
    refused(|maps| maps[0].inner.as_mut().unwrap().init = vec![(0, OTHER_VALUE)]);
    refused(|maps| maps[0].inner.as_mut().unwrap().init = vec![(0, MapIdx(77))]);
    refused(|maps| maps[0].inner.as_mut().unwrap().template = FIRST);
    refused(|maps| maps[3].inner = maps[0].inner.clone());
}

/// Whatever the target writes over the offsets and headers: a lookup gives a whole header of the
/// template's shape, or nothing, and the controller says that it is damaged.
#[test]
fn scribbled_offsets_lead_nowhere() {
    let target = Target::new(&maps());
    let array = target.arena.array_of_maps(MapIdx(0)).unwrap();
    let hash = target.arena.hash_of_maps(MapIdx(1)).unwrap();
    let value = target.base + target.arena.plan().maps[OUTER_ARRAY].data_offset;
    let write = |at: u64, value: u32| {
        // SAFETY: an address inside the arena, which stays mapped.
        unsafe { (at as *mut u32).write_volatile(value) };
    };
    let offset = |map: MapIdx| u32::try_from(header(&target, map) - target.base).unwrap();
    let last = u32::try_from(256 + 6 * MAP_HEADER_BYTES).unwrap();
    for wrong in [1, 255, 256, offset(FIRST) + 8, offset(OTHER_VALUE), last, u32::MAX] {
        write(value, wrong);
        assert_eq!(inner(&target, OUTER_ARRAY, 0), 0, "{wrong}");
        assert_eq!(array.get(0), Err(MapError::Damaged), "{wrong}");
    }
    // The template's own header has the shape, but no elements.
    write(value, offset(TEMPLATE));
    assert_eq!(array.get(0), Err(MapError::Damaged));
    let (template, key) = (inner(&target, OUTER_ARRAY, 0), [0u8; 8]);
    let args = [target.base, template, key.as_ptr() as u64, target.slot()];
    assert_eq!(target.call(RuntimeFn::HashLookup, &args), 0);

    // An inner map whose header changes its shape is no map any more.
    let value_size = header(&target, FIRST) + 8;
    assert_eq!(inner(&target, OUTER_ARRAY, 1), header(&target, FIRST));
    write(value_size, 4096);
    assert_eq!(inner(&target, OUTER_ARRAY, 1), 0);
    write(value_size, 8);
    // One whose elements would be outside the arena has none.
    let data_offset = header(&target, FIRST) + 24;
    let map = inner(&target, OUTER_ARRAY, 1);
    write(data_offset + 4, 0x7fff_0000);
    let key = [0u8; 8];
    let args = [target.base, map, key.as_ptr() as u64, target.slot()];
    assert_eq!(target.call(RuntimeFn::HashLookup, &args), 0);
    assert_eq!(hash.lookup(&7u32.to_le_bytes()), Ok(Some(SECOND)));
}

/// Programs have no helper that changes a map of maps; the runtime would refuse it too.
#[test]
fn the_runtime_changes_no_map_of_maps() {
    let target = Target::new(&maps());
    let slot = target.slot();
    for outer in [OUTER_ARRAY, OUTER_HASH] {
        assert_eq!(target.update(outer, &[1, 0, 0, 0], &[1; 4], 0, slot), -22);
        assert_eq!(target.delete(outer, &[7, 0, 0, 0]), -22);
        assert_eq!(target.lookup(outer, &[7, 0, 0, 0], slot), 0);
    }
    assert_eq!(inner(&target, OUTER_HASH, 7), header(&target, SECOND));
}
