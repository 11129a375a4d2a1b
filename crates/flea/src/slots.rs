//! What stands in the program arrays of an object, and who may come there.

use std::collections::{BTreeMap, BTreeSet};

use flea_object::{
    insn::PSEUDO_MAP,
    spec::{MapIdx, MapKind, Object as Spec, Program as ProgramSpec, ProgramKind, ProgramSlot},
};

use crate::error::ProgramArrayError;

/// What stands in the program arrays of an object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Slots(BTreeMap<(MapIdx, u32), usize>);

impl Slots {
    /// Those that an object is loaded with.
    pub(crate) fn of(spec: &Spec) -> Result<Self, ProgramArrayError> {
        let mut slots = Self::default();
        for &ProgramSlot { map, index, program } in &spec.program_slots {
            slots.put(spec, (map, index), Some(program))?;
        }
        // Also arrays that are empty have callers.
        slots.check_kinds(spec)?;
        Ok(slots)
    }

    pub(crate) fn at(&self, map: MapIdx, index: u32) -> Option<usize> {
        self.0.get(&(map, index)).copied()
    }

    /// All of them.
    pub(crate) fn all(&self) -> &BTreeMap<(MapIdx, u32), usize> {
        &self.0
    }

    /// Whether `program` stands somewhere.
    pub(crate) fn hold(&self, program: usize) -> bool {
        self.0.values().any(|held| *held == program)
    }

    /// Puts `program`, or nothing, into one place.
    pub(crate) fn put(
        &mut self,
        spec: &Spec,
        (map, index): (MapIdx, u32),
        program: Option<usize>,
    ) -> Result<(), ProgramArrayError> {
        let array = spec.maps.get(map.0 as usize).filter(|m| m.kind == MapKind::ProgArray);
        let array = array.ok_or(ProgramArrayError::NoSuchArray { map })?;
        if index >= array.max_entries {
            let (map, max_entries) = (array.name.clone(), array.max_entries);
            return Err(ProgramArrayError::OutOfRange { map, index, max_entries });
        }
        match program {
            Some(program) if program >= spec.programs.len() => {
                return Err(ProgramArrayError::NoSuchProgram { map: array.name.clone(), program });
            }
            Some(program) => self.0.insert((map, index), program),
            None => self.0.remove(&(map, index)),
        };
        self.check_kinds(spec)
    }

    /// All that use an array are of one kind (Linux: `bpf_prog_map_compatible`): a target runs
    /// where its caller does, with the same context.
    fn check_kinds(&self, spec: &Spec) -> Result<(), ProgramArrayError> {
        let mut kinds: BTreeMap<MapIdx, (usize, ProgramKind)> = BTreeMap::new();
        let held = self.0.iter().map(|((map, _), program)| (*map, *program));
        let callers = spec.programs.iter().enumerate();
        let callers = callers.flat_map(|(i, p)| arrays_of(spec, p).map(move |map| (map, i)));
        for (map, program) in held.chain(callers) {
            let kind = spec.programs[program].kind;
            let (other, other_kind) = *kinds.entry(map).or_insert((program, kind));
            if kind != other_kind {
                let name = |program: usize| spec.programs[program].name.clone();
                return Err(ProgramArrayError::Kind {
                    map: spec.maps[map.0 as usize].name.clone(),
                    program: name(program),
                    kind,
                    other: name(other),
                    other_kind,
                });
            }
        }
        Ok(())
    }

    /// The programs that may come to `map` by tail calls, or make one through it.
    pub(crate) fn users(&self, spec: &Spec, map: MapIdx) -> BTreeSet<usize> {
        let mut users = BTreeSet::new();
        let mut maps = vec![map];
        let mut seen = BTreeSet::from([map]);
        while let Some(map) = maps.pop() {
            for (i, program) in spec.programs.iter().enumerate() {
                if !arrays_of(spec, program).any(|array| array == map) || !users.insert(i) {
                    continue;
                }
                // And those that come to it.
                let holding =
                    self.0.iter().filter(|(_, held)| **held == i).map(|((map, _), _)| *map);
                maps.extend(holding.filter(|map| seen.insert(*map)));
            }
        }
        users
    }
}

/// The program arrays that a program names.
fn arrays_of<'a>(spec: &'a Spec, program: &'a ProgramSpec) -> impl Iterator<Item = MapIdx> + 'a {
    let refers = program.insns.iter().filter(|insn| insn.is_lddw() && insn.src == PSEUDO_MAP);
    let maps = refers.map(|insn| MapIdx(insn.imm.cast_unsigned()));
    let is_array =
        |map: &MapIdx| spec.maps.get(map.0 as usize).is_some_and(|m| m.kind == MapKind::ProgArray);
    maps.filter(is_array)
}

#[cfg(test)]
mod tests {
    use flea_object::{asm::Asm, asm::Reg, spec::MapSpec};

    use super::*;

    fn program(arrays: &[u32], kind: ProgramKind) -> ProgramSpec {
        let mut asm = Asm::new();
        for map in arrays {
            asm.map_ref(Reg::R2, MapIdx(*map));
        }
        asm.exit();
        let insns = asm.finish().expect("two kinds of instructions");
        ProgramSpec { name: format!("p{arrays:?}"), insns, kind, ..ProgramSpec::default() }
    }

    fn spec(programs: Vec<ProgramSpec>, slots: &[(u32, u32, usize)]) -> Spec {
        let array = MapSpec {
            name: "jumps".into(),
            kind: MapKind::ProgArray,
            key_size_bytes: 4,
            value_size_bytes: 4,
            max_entries: 3,
            ..MapSpec::default()
        };
        let slot = |&(map, index, program)| ProgramSlot { map: MapIdx(map), index, program };
        let program_slots = slots.iter().map(slot).collect();
        Spec { maps: vec![array.clone(), array], programs, program_slots, ..Spec::default() }
    }

    #[test]
    fn users_of_users_are_users() {
        let fentry = |arrays: &[u32]| program(arrays, ProgramKind::Fentry);
        // 0 calls through map 0, where 1 stands, which calls through map 1, where 2 stands.
        let spec = spec(vec![fentry(&[0]), fentry(&[1]), fentry(&[])], &[(0, 0, 1), (1, 2, 2)]);
        let slots = Slots::of(&spec).unwrap();
        assert_eq!(slots.users(&spec, MapIdx(1)), BTreeSet::from([0, 1]));
        assert_eq!(slots.users(&spec, MapIdx(0)), BTreeSet::from([0]));
        assert!(slots.hold(2) && !slots.hold(0));
    }

    #[test]
    fn an_array_is_of_one_kind() {
        let (fentry, fexit) = (ProgramKind::Fentry, ProgramKind::Fexit);
        let held = spec(vec![program(&[0], fentry), program(&[], fexit)], &[(0, 0, 1)]);
        let error = Slots::of(&held).unwrap_err().to_string();
        assert!(error.contains("fexit") && error.contains("fentry"), "{error}");
        // Two callers of an empty one.
        let callers = spec(vec![program(&[0], fentry), program(&[0], fexit)], &[]);
        assert!(matches!(Slots::of(&callers), Err(ProgramArrayError::Kind { .. })));
        let apart = spec(vec![program(&[0], fentry), program(&[1], fexit)], &[(1, 0, 1)]);
        assert!(Slots::of(&apart).is_ok());
    }

    #[test]
    fn slots_that_are_not_there() {
        let one = || vec![program(&[], ProgramKind::Fentry)];
        let outcome = |slot| Slots::of(&spec(one(), &[slot]));
        assert!(outcome((0, 2, 0)).is_ok());
        assert!(matches!(outcome((0, 3, 0)), Err(ProgramArrayError::OutOfRange { index: 3, .. })));
        assert!(matches!(outcome((2, 0, 0)), Err(ProgramArrayError::NoSuchArray { .. })));
        assert!(matches!(outcome((0, 0, 1)), Err(ProgramArrayError::NoSuchProgram { .. })));
    }
}
