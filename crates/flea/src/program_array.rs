//! Program arrays: which programs `bpf_tail_call` leads to. They belong to the object, not to the
//! memory that is shared with the target: the programs at all indices are compiled into the code
//! of those that call them.

use std::collections::{BTreeMap, BTreeSet};

use flea_object::{
    insn::PSEUDO_MAP,
    spec::{MapIdx, MapKind, Object as Spec, Program as ProgramSpec, ProgramKind, ProgramSlot},
};

use crate::{
    error::ProgramArrayError,
    object::{Object, Program},
};

/// A `BPF_MAP_TYPE_PROG_ARRAY` of an [`Object`].
///
/// ```
/// use flea::{Helper, MapIdx, MapKind, MapSpec, ObjectSpec, ProgramSlot, ProgramSpec};
/// use flea::asm::{Asm, Reg::*, Size};
///
/// #[unsafe(no_mangle)]
/// #[inline(never)]
/// extern "C" fn program_array_example(x: u64) -> u64 {
///     x + 1
/// }
///
/// // `first` calls what stands at index 0; `second` counts.
/// let (mut first, mut second) = (Asm::new(), Asm::new());
/// first.map_ref(R2, MapIdx(0)).mov64_imm(R3, 0).call(Helper::TailCall).mov64_imm(R0, 0).exit();
/// second.map_value(R1, MapIdx(1), 0).mov64_imm(R2, 1).atomic_add(Size::DW, R1, 0, R2);
/// second.mov64_imm(R0, 0).exit();
/// let program = |name: &str, asm: Asm| ProgramSpec {
///     name: name.into(),
///     insns: asm.finish().unwrap(),
///     ..ProgramSpec::default()
/// };
/// let map = |name: &str, kind, value_size_bytes| MapSpec {
///     name: name.into(),
///     kind,
///     key_size_bytes: 4,
///     value_size_bytes,
///     max_entries: 1,
///     flags: 0,
///     init: None,
///     read_only: false,
/// };
/// let spec = ObjectSpec {
///     maps: vec![map("jumps", MapKind::ProgArray, 4), map("calls", MapKind::Array, 8)],
///     programs: vec![program("first", first), program("second", second)],
///     ..ObjectSpec::default()
/// };
///
/// let session = flea::Session::this_process()?;
/// let object = session.load(spec)?;
/// let function = &session.find("program_array_example")?[0];
/// let link = object.program("first").unwrap().attach(function)?;
/// program_array_example(1); // the array is empty
///
/// let jumps = object.program_array("jumps").unwrap();
/// jumps.set(0, &object.program("second").unwrap())?;
/// program_array_example(2);
/// jumps.clear(0)?;
/// program_array_example(3);
/// let Some(flea::Map::Array(calls)) = object.map("calls") else { panic!("no map") };
/// assert_eq!(calls.get(0)?, 1u64.to_le_bytes());
/// # drop(link);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct ProgramArray {
    object: Object,
    map: MapIdx,
}

impl ProgramArray {
    pub(crate) fn new(object: Object, map: MapIdx) -> Self {
        Self { object, map }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.object.maps()[self.map.0 as usize].name
    }

    /// How many programs it can hold.
    #[must_use]
    pub fn max_entries(&self) -> u32 {
        self.object.maps()[self.map.0 as usize].max_entries
    }

    /// The program at `index`.
    #[must_use]
    pub fn get(&self, index: u32) -> Option<Program> {
        let program = self.object.slots().at(self.map, index)?;
        self.object.programs().nth(program)
    }

    /// Puts `program` at `index`. What is attached and may call it is made anew: calls of the
    /// traced functions that begin from now on find it, those that run end with what was there.
    ///
    /// # Errors
    /// There is no such index, the program is another object's or of another kind than those
    /// that use the array, or what is attached cannot be made anew; everything is as it was.
    pub fn set(&self, index: u32, program: &Program) -> Result<(), ProgramArrayError> {
        if !program.is_of(&self.object) {
            let (map, program) = (self.name().to_owned(), program.name().to_owned());
            return Err(ProgramArrayError::OtherObject { map, program });
        }
        self.change(index, Some(program.index()))
    }

    /// Takes the program at `index` away, if there is one: tail calls to it miss.
    ///
    /// # Errors
    /// As for [`ProgramArray::set`].
    pub fn clear(&self, index: u32) -> Result<(), ProgramArrayError> {
        self.change(index, None)
    }

    fn change(&self, index: u32, program: Option<usize>) -> Result<(), ProgramArrayError> {
        self.object
            .change_slots(self.map, |slots, spec| slots.put(spec, (self.map, index), program))
    }
}

/// What stands in the program arrays of an object.
#[derive(Clone, Debug, Default)]
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

    fn put(
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
            flags: 0,
            init: None,
            read_only: false,
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
