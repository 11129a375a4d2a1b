//! Program arrays: which programs `bpf_tail_call` leads to. They belong to the object, not to the
//! memory that is shared with the target: the programs at all indices are compiled into the code
//! of those that call them.

use std::sync::{PoisonError, RwLockReadGuard};

use flea_object::spec::{MapIdx, MapKind, Object as Spec};

use crate::{
    error::{AttachError, ProgramArrayError},
    object::{Attachment, Object, Program},
    rebuild::{self, Rebuild},
    session::lock,
    slots::Slots,
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
///     ..MapSpec::default()
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

/// What one [`Link`](crate::Link) has attached: a body for each function, in the order in which the
/// attachments first name it.
pub(crate) struct Attached {
    ids: Vec<u32>,
    attachments: Vec<Attachment>,
}

impl Object {
    /// Notes what was attached, where a program array might change it.
    pub(crate) fn remember(&self, ids: &[u32], attachments: &[Attachment]) {
        if self.maps().iter().any(|map| map.kind == MapKind::ProgArray) {
            let (ids, attachments) = (ids.to_vec(), attachments.to_vec());
            lock(&self.inner.links).push(Attached { ids, attachments });
        }
    }

    /// What stands in the program arrays.
    pub(crate) fn slots(&self) -> RwLockReadGuard<'_, Slots> {
        self.inner.slots.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what stands in `map`, and what is attached with it: all of that, or nothing.
    fn change_slots(
        &self,
        map: MapIdx,
        edit: impl FnOnce(&mut Slots, &Spec) -> Result<(), ProgramArrayError>,
    ) -> Result<(), ProgramArrayError> {
        let spec = &self.inner.spec;
        let mut slots = self.inner.slots.write().unwrap_or_else(PoisonError::into_inner);
        let mut changed = slots.clone();
        edit(&mut changed, spec)?;
        if changed == *slots {
            return Ok(());
        }
        // `map` itself is not what leads to `map`: before and after, the same programs do.
        let users = slots.users(spec, map);
        let made_anew = self.to_rebuild(&changed, |program| users.contains(&program));
        let outcome = made_anew.and_then(|what| rebuild::rebuild(&self.inner, &what));
        outcome.map_err(|error| {
            let map = spec.maps[map.0 as usize].name.clone();
            ProgramArrayError::Rebuild { map, error: Box::new(error) }
        })?;
        *slots = changed;
        Ok(())
    }

    /// The bodies with programs that `changes` picks, with `slots`.
    fn to_rebuild(
        &self,
        slots: &Slots,
        changes: impl Fn(usize) -> bool,
    ) -> Result<Rebuild, AttachError> {
        let mut what = Rebuild::default();
        for Attached { ids, attachments } in lock(&self.inner.links).iter() {
            if !attachments.iter().any(|a| changes(a.program)) {
                continue;
            }
            let prepared = self.prepare(attachments, slots)?;
            for (id, prepared) in ids.iter().zip(prepared) {
                if prepared.uses.iter().any(|(program, _)| changes(*program)) {
                    what.ids.push(*id);
                    what.prepared.push(prepared);
                }
            }
        }
        Ok(what)
    }

    /// The link with these bodies has taken them off.
    pub(crate) fn forget(&self, ids: &[u32]) {
        lock(&self.inner.links).retain(|link| link.ids != ids);
    }
}
