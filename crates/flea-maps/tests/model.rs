//! Hash maps against std's: random operations by program and controller in turn.
#![allow(missing_docs, reason = "a test")]
#![allow(clippy::unwrap_used, reason = "helpers of tests are tests")]

mod in_process;

use std::collections::HashMap;

use flea_maps::{MapError, Update};
use flea_object::spec::{MapIdx, MapKind};
use in_process::{Target, number, spec};
use proptest::prelude::*;

#[derive(Clone, Copy, Debug)]
enum Side {
    Program,
    Controller,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Update(u8, u64, Update),
    Delete(u8),
    Lookup(u8),
}

fn op() -> impl Strategy<Value = (Side, Op)> {
    let side = prop_oneof![Just(Side::Program), Just(Side::Controller)];
    let mode = prop_oneof![Just(Update::Any), Just(Update::NoExist), Just(Update::Exist)];
    let key = 0u8..40;
    let op = prop_oneof![
        4 => (key.clone(), any::<u64>(), mode).prop_map(|(k, v, m)| Op::Update(k, v, m)),
        2 => key.clone().prop_map(Op::Delete),
        2 => key.prop_map(Op::Lookup),
    ];
    (side, op)
}

fn expected(model: &mut HashMap<u8, u64>, max: usize, op: Op) -> i64 {
    match op {
        Op::Update(k, _, Update::NoExist) if model.contains_key(&k) => -17,
        Op::Update(k, _, Update::Exist) if !model.contains_key(&k) => -2,
        Op::Update(k, _, _) if !model.contains_key(&k) && model.len() == max => -7,
        Op::Update(k, v, _) => {
            model.insert(k, v);
            0
        }
        Op::Delete(k) => model.remove(&k).map_or(-2, |_| 0),
        Op::Lookup(_) => 0,
    }
}

fn errno(result: Result<(), MapError>) -> i64 {
    match result {
        Ok(()) => 0,
        Err(MapError::NotFound) => -2,
        Err(MapError::Full { .. }) => -7,
        Err(MapError::Exists) => -17,
        Err(other) => panic!("{other}"),
    }
}

/// Keys of 5 bytes: not whole words. Values of 12.
fn key_bytes(k: u8) -> [u8; 5] {
    [k, 1, 2, 3, k ^ 0xff]
}

fn run_hash(ops: &[(Side, Op)]) {
    let target = Target::new(&[spec(MapKind::Hash, 5, 12, 24)]);
    let slot = target.slot();
    let map = target.arena.hash(MapIdx(0)).unwrap();
    let mut model = HashMap::new();
    for &(side, op) in ops {
        let want = expected(&mut model, 24, op);
        let got = match (side, op) {
            (Side::Program, Op::Update(k, v, m)) => {
                let mut value = v.to_le_bytes().to_vec();
                value.extend([9; 4]);
                target.update(0, &key_bytes(k), &value, m as u64, slot)
            }
            (Side::Controller, Op::Update(k, v, m)) => {
                let mut value = v.to_le_bytes().to_vec();
                value.extend([9; 4]);
                errno(map.update(&key_bytes(k), &value, m))
            }
            (Side::Program, Op::Delete(k)) => target.delete(0, &key_bytes(k)),
            (Side::Controller, Op::Delete(k)) => errno(map.delete(&key_bytes(k))),
            (Side::Program, Op::Lookup(k)) => {
                let address = target.lookup(0, &key_bytes(k), slot);
                // SAFETY: 0 or a value.
                let found = (address != 0).then(|| unsafe { *(address as *const u64) });
                assert_eq!(found, model.get(&k).copied());
                0
            }
            (Side::Controller, Op::Lookup(k)) => {
                let found = map.lookup(&key_bytes(k)).unwrap();
                assert_eq!(found.map(|v| number(&v[..8])), model.get(&k).copied());
                0
            }
        };
        assert_eq!(got, want, "{side:?} {op:?}");
    }
    let mut all: Vec<_> = map.iter().map(|(k, v)| (k[0], number(&v[..8]))).collect();
    let mut want: Vec<_> = model.into_iter().collect();
    all.sort_unstable();
    want.sort_unstable();
    assert_eq!(all, want);
}

fn run_percpu(ops: &[(Side, Op)]) {
    let target = Target::new(&[spec(MapKind::PerCpuHash, 5, 8, 24)]);
    let slot = target.slot();
    let other = std::thread::scope(|s| s.spawn(|| target.slot()).join().unwrap());
    assert_ne!(slot, other);
    let map = target.arena.percpu_hash(MapIdx(0)).unwrap();
    let mut model = HashMap::new();
    for (turn, &(side, op)) in ops.iter().enumerate() {
        let want = expected(&mut model, 24, op);
        // The cells of two slots; each counts only what its element has seen.
        let slot = if turn % 2 == 0 { slot } else { other };
        match (side, op) {
            (Side::Program, Op::Update(k, v, m)) => {
                let key = key_bytes(k);
                let before = map.lookup(&key).unwrap();
                assert_eq!(target.update(0, &key, &v.to_le_bytes(), m as u64, slot), want);
                if want == 0 {
                    let cells = map.lookup(&key).unwrap().unwrap();
                    let own = usize::from(slot == other);
                    assert_eq!(number(&cells[own]), v);
                    let rest = before.map_or(0, |b| number(&b[1 - own]));
                    assert_eq!(number(&cells[1 - own]), rest, "new cells are zero");
                    model.insert(k, v.wrapping_add(rest));
                }
            }
            (Side::Controller, Op::Update(k, v, m)) => {
                assert_eq!(errno(map.update(&key_bytes(k), &v.to_le_bytes(), m)), want);
            }
            (Side::Program, Op::Delete(k)) => assert_eq!(target.delete(0, &key_bytes(k)), want),
            (Side::Controller, Op::Delete(k)) => {
                assert_eq!(errno(map.delete(&key_bytes(k))), want);
            }
            (_, Op::Lookup(k)) => {
                if let Some(sum) = model.get_mut(&k) {
                    in_process::add(target.lookup(0, &key_bytes(k), slot), 3);
                    *sum = sum.wrapping_add(3);
                } else {
                    assert_eq!(target.lookup(0, &key_bytes(k), slot), 0);
                }
            }
        }
    }
    let sum = |cells: &[Vec<u8>]| cells.iter().map(|c| number(c)).fold(0, u64::wrapping_add);
    let mut all: Vec<_> = map.iter().map(|(k, v)| (k[0], sum(&v))).collect();
    let mut want: Vec<_> = model.into_iter().collect();
    all.sort_unstable();
    want.sort_unstable();
    assert_eq!(all, want);
    let mut keys: Vec<u8> = map.keys().map(|k| k[0]).collect();
    keys.sort_unstable();
    assert_eq!(keys, want.iter().map(|(k, _)| *k).collect::<Vec<_>>());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200) })]

    #[test]
    fn a_hash_behaves_as_stds(ops in proptest::collection::vec(op(), 0..300)) {
        run_hash(&ops);
    }

    #[test]
    fn a_percpu_hash_behaves_as_stds(ops in proptest::collection::vec(op(), 0..300)) {
        run_percpu(&ops);
    }
}

#[test]
fn flags_that_mean_nothing_are_refused() {
    let target = Target::new(&[spec(MapKind::Hash, 4, 8, 8), spec(MapKind::Array, 4, 8, 8)]);
    let slot = target.slot();
    for map in [0, 1] {
        assert_eq!(target.update(map, &[0; 4], &[0; 8], 3, slot), -22);
        assert_eq!(target.update(map, &[0; 4], &[0; 8], 4, slot), -22);
    }
    assert_eq!(target.delete(1, &[0; 4]), -22);
    assert_eq!(target.update(1, &8u32.to_le_bytes(), &[0; 8], 0, slot), -7);
    assert_eq!(target.update(1, &7u32.to_le_bytes(), &[0; 8], 1, slot), -17);
    assert_eq!(target.update(1, &7u32.to_le_bytes(), &[5; 8], 2, slot), 0);
    assert_eq!(target.arena.array(MapIdx(1)).unwrap().get(7).unwrap(), [5; 8]);
}
