//! One object's shared memory: made, sealed, mapped, laid out. The views on single maps are
//! in the files beside. Start with [`Arena::create`].

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

use flea_layout::plan::{ArenaPlan, MapPlacement};
use flea_layout::shared::{ARENA_MAGIC, ArenaHeader, MapHeader, ProgramState};
use flea_object::LOCK_BYTES;
use flea_object::spec::{MapIdx, MapKind, MapSpec};
use flea_runtime::hash;
use flea_runtime::map::STATE_OFFSET;
use flea_runtime::mem::{Bytes, Shared, to_usize};
use memmap2::{MmapOptions, MmapRaw};

use crate::array::{ArrayMap, PerCpuArrayMap};
use crate::error::{ArenaError, MapError};
use crate::hash::{HashMap, PerCpuHashMap, Update};
use crate::inner::{ArrayOfMaps, HashOfMaps};
use crate::ringbuf::RingBuf;

/// Largest arena: address space, not memory; a quarter of what a process has would be 32 TiB.
const MAX_ARENA_BYTES: u64 = 1 << 40;
const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

/// The maps of one object, in memory that the target has mapped too. Clones are the same
/// arena.
#[derive(Clone, Debug)]
pub struct Arena(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    fd: OwnedFd,
    memory: MmapRaw,
    plan: ArenaPlan,
}

/// A map, by its kind.
#[derive(Debug)]
pub enum Map {
    /// `BPF_MAP_TYPE_HASH`
    Hash(HashMap),
    /// `BPF_MAP_TYPE_ARRAY`
    Array(ArrayMap),
    /// `BPF_MAP_TYPE_PERCPU_HASH`
    PerCpuHash(PerCpuHashMap),
    /// `BPF_MAP_TYPE_PERCPU_ARRAY`
    PerCpuArray(PerCpuArrayMap),
    /// `BPF_MAP_TYPE_ARRAY_OF_MAPS`
    ArrayOfMaps(ArrayOfMaps),
    /// `BPF_MAP_TYPE_HASH_OF_MAPS`
    HashOfMaps(HashOfMaps),
    /// `BPF_MAP_TYPE_RINGBUF`
    RingBuf(RingBuf),
}

impl Arena {
    /// Makes a new arena in a memfd and lays `maps` out in it; `plan` was made from them.
    ///
    /// # Errors
    /// [`ArenaError`]: maps that make no sense, or a system call that failed.
    pub fn create(plan: &ArenaPlan, maps: &[MapSpec]) -> Result<Self, ArenaError> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"flea-maps".as_ptr(), flags) };
        if fd < 0 {
            return Err(ArenaError::last("create"));
        }
        // SAFETY: the kernel has just made it, for us alone.
        Self::from_fd(unsafe { OwnedFd::from_raw_fd(fd) }, plan, maps)
    }

    /// Lays `maps` out in an empty memfd that somebody else has made (with
    /// MFD_ALLOW_SEALING), e.g. the target on our behalf. It gets the plan's size and is
    /// sealed, so that the target cannot cut it short under us.
    ///
    /// # Errors
    /// As [`Arena::create`]; also a file that is not empty and not of the plan's size.
    pub fn from_fd(fd: OwnedFd, plan: &ArenaPlan, maps: &[MapSpec]) -> Result<Self, ArenaError> {
        check(plan, maps)?;
        let file = File::from(fd);
        if file.metadata().map_err(ArenaError::system("stat"))?.len() == 0 {
            file.set_len(plan.size_bytes).map_err(ArenaError::system("size"))?;
        }
        let arena = Self::map(file.into(), plan)?;
        arena.initialise(maps).ok_or(ArenaError::WrongPlan)?;
        Ok(arena)
    }

    /// Opens an arena that [`Arena::create`] or [`Arena::from_fd`] of some process has laid
    /// out by the same plan.
    ///
    /// # Errors
    /// As [`Arena::from_fd`], and [`ArenaError::NotAnArena`].
    pub fn open(fd: OwnedFd, plan: &ArenaPlan) -> Result<Self, ArenaError> {
        let arena = Self::map(fd, plan)?;
        let word = |at: usize| arena.memory().word(at as u64).map(|w| w.load(Acquire));
        if word(offset_of!(ArenaHeader, magic)) != Some(ARENA_MAGIC)
            || word(offset_of!(ArenaHeader, size_bytes)) != Some(plan.size_bytes)
        {
            return Err(ArenaError::NotAnArena);
        }
        Ok(arena)
    }

    /// The memory's file, for the target to map.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }

    /// Where everything is.
    #[must_use]
    pub fn plan(&self) -> &ArenaPlan {
        &self.0.plan
    }

    /// Slots that threads have or had: as many values has each element of a per-CPU map.
    #[must_use]
    pub fn used_slots(&self) -> u32 {
        let used = self.memory().half(offset_of!(ArenaHeader, used_slots) as u64);
        used.map_or(0, |u| u.load(Acquire)).min(self.plan().n_slots)
    }

    /// Hits that ran no program, as all slots were taken by living threads.
    #[must_use]
    pub fn no_slot(&self) -> u64 {
        let count = self.memory().word(offset_of!(ArenaHeader, no_slot) as u64);
        count.map_or(0, |n| n.load(Relaxed))
    }

    /// Runs of program `index` that were skipped because it was running already on the same
    /// thread, over all threads; 0 for a program that is not there.
    #[must_use]
    pub fn program_misses(&self, index: u32) -> u64 {
        if index >= self.plan().n_programs {
            return 0;
        }
        let at = self.plan().program_state_offset(index) + offset_of!(ProgramState, misses) as u64;
        let slots = (0..self.used_slots()).filter_map(|slot| {
            let misses = self.memory().word(self.slot_offset(slot) + at)?;
            Some(misses.load(Relaxed))
        });
        slots.fold(0, u64::wrapping_add)
    }

    /// A map, whatever its kind.
    ///
    /// # Errors
    /// [`MapError::NoSuchMap`], [`MapError::Template`]; [`MapError::HoldsPrograms`] of a program
    /// array, which has no elements here
    pub fn map_at(&self, index: MapIdx) -> Result<Map, MapError> {
        let placement = self.placement(index)?;
        Ok(match placement.kind {
            MapKind::Hash => Map::Hash(self.hash(index)?),
            MapKind::Array => Map::Array(self.array(index)?),
            MapKind::PerCpuHash => Map::PerCpuHash(self.percpu_hash(index)?),
            MapKind::PerCpuArray => Map::PerCpuArray(self.percpu_array(index)?),
            MapKind::ArrayOfMaps => Map::ArrayOfMaps(self.array_of_maps(index)?),
            MapKind::HashOfMaps => Map::HashOfMaps(self.hash_of_maps(index)?),
            MapKind::RingBuf => Map::RingBuf(self.ringbuf(index)?),
            MapKind::ProgArray => return Err(MapError::HoldsPrograms { index }),
        })
    }

    /// An ARRAY.
    ///
    /// # Errors
    /// [`MapError::NoSuchMap`], [`MapError::WrongKind`]
    pub fn array(&self, index: MapIdx) -> Result<ArrayMap, MapError> {
        Ok(ArrayMap::new(self.clone(), self.placement_of(index, MapKind::Array)?))
    }

    /// A PERCPU_ARRAY.
    ///
    /// # Errors
    /// [`MapError::NoSuchMap`], [`MapError::WrongKind`]
    pub fn percpu_array(&self, index: MapIdx) -> Result<PerCpuArrayMap, MapError> {
        Ok(PerCpuArrayMap::new(self.clone(), self.placement_of(index, MapKind::PerCpuArray)?))
    }

    /// A HASH.
    ///
    /// # Errors
    /// [`MapError::NoSuchMap`], [`MapError::WrongKind`]
    pub fn hash(&self, index: MapIdx) -> Result<HashMap, MapError> {
        Ok(HashMap::new(self.clone(), self.placement_of(index, MapKind::Hash)?))
    }

    /// A PERCPU_HASH.
    ///
    /// # Errors
    /// [`MapError::NoSuchMap`], [`MapError::WrongKind`]
    pub fn percpu_hash(&self, index: MapIdx) -> Result<PerCpuHashMap, MapError> {
        Ok(PerCpuHashMap::new(self.clone(), self.placement_of(index, MapKind::PerCpuHash)?))
    }

    /// An ARRAY_OF_MAPS.
    ///
    /// # Errors
    /// [`MapError::NoSuchMap`], [`MapError::WrongKind`]
    pub fn array_of_maps(&self, index: MapIdx) -> Result<ArrayOfMaps, MapError> {
        Ok(ArrayOfMaps::new(self.clone(), self.placement_of(index, MapKind::ArrayOfMaps)?))
    }

    /// A HASH_OF_MAPS.
    ///
    /// # Errors
    /// [`MapError::NoSuchMap`], [`MapError::WrongKind`]
    pub fn hash_of_maps(&self, index: MapIdx) -> Result<HashOfMaps, MapError> {
        Ok(HashOfMaps::new(self.clone(), self.placement_of(index, MapKind::HashOfMaps)?))
    }

    /// A RINGBUF's consumer. There may be one at a time: two would each see some records.
    ///
    /// # Errors
    /// [`MapError::NoSuchMap`], [`MapError::WrongKind`]
    pub fn ringbuf(&self, index: MapIdx) -> Result<RingBuf, MapError> {
        Ok(RingBuf::new(self.clone(), self.placement_of(index, MapKind::RingBuf)?))
    }

    pub(crate) fn memory(&self) -> Shared<'_> {
        let memory = &self.0.memory;
        // SAFETY: mapped until `Inner` is dropped, which outlives the borrow; page-aligned;
        // sealed against shrinking; nobody makes references into it.
        unsafe { Shared::new(memory.as_mut_ptr(), memory.len() as u64) }
    }

    /// A map's `state` words.
    pub(crate) fn state(&self, map: &MapPlacement) -> Option<Shared<'_>> {
        let size = (size_of::<MapHeader>() as u64) - STATE_OFFSET;
        self.memory().part(map.header_offset + STATE_OFFSET, size)
    }

    pub(crate) fn slot_offset(&self, slot: u32) -> u64 {
        self.plan().slots_offset + u64::from(slot) * self.plan().slot_stride
    }

    /// Slots whose values count: those in use, and the first, where the controller's own
    /// updates go.
    pub(crate) fn readable_slots(&self) -> u32 {
        self.used_slots().max(1)
    }

    fn placement(&self, index: MapIdx) -> Result<&MapPlacement, MapError> {
        let maps = &self.plan().maps;
        let found = maps.get(to_usize(u64::from(index.0)));
        let found = found.ok_or(MapError::NoSuchMap { index, n_maps: maps.len() })?;
        if found.template { Err(MapError::Template { index }) } else { Ok(found) }
    }

    fn placement_of(&self, index: MapIdx, wanted: MapKind) -> Result<MapPlacement, MapError> {
        let placement = *self.placement(index)?;
        if placement.kind == wanted {
            Ok(placement)
        } else {
            Err(MapError::WrongKind { index, wanted, found: placement.kind })
        }
    }

    fn map(fd: OwnedFd, plan: &ArenaPlan) -> Result<Self, ArenaError> {
        if plan.size_bytes > MAX_ARENA_BYTES {
            let (size_bytes, limit_bytes) = (plan.size_bytes, MAX_ARENA_BYTES);
            return Err(ArenaError::TooLarge { size_bytes, limit_bytes });
        }
        seal(&fd)?;
        let file = File::from(fd);
        // The size is looked at after the seal: from now on it stays.
        let found_bytes = file.metadata().map_err(ArenaError::system("stat"))?.len();
        if found_bytes != plan.size_bytes {
            return Err(ArenaError::WrongSize { expected_bytes: plan.size_bytes, found_bytes });
        }
        let mut options = MmapOptions::new();
        options.len(to_usize(plan.size_bytes)).no_reserve_swap();
        let memory = options.map_raw(&file).map_err(ArenaError::system("map"))?;
        Ok(Self(Arc::new(Inner { fd: file.into(), memory, plan: plan.clone() })))
    }

    /// Writes the headers and first values; the magic number last. Zeros are right for
    /// everything else: empty hash maps, empty rings, free slots.
    fn initialise(&self, maps: &[MapSpec]) -> Option<()> {
        let (memory, plan) = (self.memory(), self.plan());
        let word = |at: usize, value: u64| {
            memory.word(at as u64)?.store(value, Relaxed);
            Some(())
        };
        let half = |at: usize, value: u32| {
            memory.half(at as u64)?.store(value, Relaxed);
            Some(())
        };
        word(offset_of!(ArenaHeader, size_bytes), plan.size_bytes)?;
        word(offset_of!(ArenaHeader, slots_offset), plan.slots_offset)?;
        word(offset_of!(ArenaHeader, slot_stride), plan.slot_stride)?;
        half(offset_of!(ArenaHeader, n_slots), plan.n_slots)?;
        half(offset_of!(ArenaHeader, n_programs), plan.n_programs)?;
        half(offset_of!(ArenaHeader, n_maps), u32::try_from(maps.len()).ok()?)?;
        for (spec, placement) in maps.iter().zip(&plan.maps) {
            self.initialise_map(spec, placement)?;
        }
        for (index, spec) in (0..).zip(maps) {
            for &(slot, map) in spec.inner.iter().flat_map(|inner| &inner.init) {
                self.put_inner_map(MapIdx(index), slot, map)?;
            }
        }
        memory.word(offset_of!(ArenaHeader, magic) as u64)?.store(ARENA_MAGIC, Release);
        Some(())
    }

    fn put_inner_map(&self, outer: MapIdx, slot: u32, map: MapIdx) -> Option<()> {
        match self.map_at(outer).ok()? {
            Map::ArrayOfMaps(maps) => maps.set(slot, map).ok(),
            Map::HashOfMaps(maps) => maps.update(&slot.to_le_bytes(), map, Update::Any).ok(),
            _ => None,
        }
    }

    fn initialise_map(&self, spec: &MapSpec, placement: &MapPlacement) -> Option<()> {
        let header = self.memory().part(placement.header_offset, size_of::<MapHeader>() as u64)?;
        for (at, value) in [
            (offset_of!(MapHeader, kind), placement.kind as u32),
            (offset_of!(MapHeader, key_size_bytes), placement.key_size_bytes),
            (offset_of!(MapHeader, value_size_bytes), placement.value_size_bytes),
            (offset_of!(MapHeader, value_stride), placement.value_stride),
            // A template has no memory: whoever looks into it finds no element.
            (
                offset_of!(MapHeader, max_entries),
                if placement.template { 0 } else { placement.max_entries },
            ),
            (offset_of!(MapHeader, flags), spec.flags),
            (
                offset_of!(MapHeader, lock_offset_plus_1),
                placement.lock_offset.map_or(0, |offset| offset + 1),
            ),
        ] {
            header.half(at as u64)?.store(value, Relaxed);
        }
        let data = header.word(offset_of!(MapHeader, data_offset) as u64)?;
        data.store(placement.data_offset, Relaxed);
        let slot = header.word(offset_of!(MapHeader, slot_offset) as u64)?;
        slot.store(placement.slot_offset, Relaxed);
        if let Some(template) = placement.inner {
            let template = self.plan().maps.get(to_usize(u64::from(template.0)))?;
            let word = header.word(offset_of!(MapHeader, template_offset) as u64)?;
            word.store(template.header_offset, Relaxed);
        }
        if matches!(placement.kind, MapKind::Hash | MapKind::PerCpuHash | MapKind::HashOfMaps) {
            let seed = header.word(STATE_OFFSET + hash::state::SEED * 8)?;
            seed.store(random_seed(), Relaxed);
        }
        if let Some(init) = &spec.init {
            self.memory().store(placement.data_offset, Bytes::from(init.as_slice()))?;
        }
        Some(())
    }
}

impl ArenaError {
    fn last(action: &'static str) -> Self {
        Self::System { action, source: io::Error::last_os_error() }
    }

    fn system(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { action, source }
    }
}

/// Seals the file's size, or finds that it is sealed.
fn seal(fd: &OwnedFd) -> Result<(), ArenaError> {
    // SAFETY: takes a number; fails harmlessly on a file that has no seals.
    let _ = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_ADD_SEALS, SEALS) };
    // SAFETY: takes nothing.
    let seals = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & SEALS != SEALS {
        return Err(ArenaError::NotSealable);
    }
    Ok(())
}

/// A seed that the keys' author cannot know; any is right where the kernel has none to give.
fn random_seed() -> u64 {
    let mut seed = [0u8; 8];
    // SAFETY: writes at most 8 bytes to `seed`.
    let _ = unsafe { libc::getrandom(seed.as_mut_ptr().cast(), seed.len(), libc::GRND_NONBLOCK) };
    u64::from_le_bytes(seed)
}

/// Whether each map makes sense for its kind, and the plan is theirs.
fn check(plan: &ArenaPlan, maps: &[MapSpec]) -> Result<(), ArenaError> {
    for (index, spec) in maps.iter().enumerate() {
        if let Err(reason) = check_map(spec).and_then(|()| check_inner(spec, maps)) {
            let (name, kind) = (spec.name.clone(), spec.kind);
            return Err(ArenaError::BadMap { index, name, kind, reason });
        }
    }
    if *plan != ArenaPlan::new(maps, plan.n_programs) {
        return Err(ArenaError::WrongPlan);
    }
    Ok(())
}

fn check_map(spec: &MapSpec) -> Result<(), &'static str> {
    const MAX_VALUE_BYTES: u32 = 1 << 30;
    const MAX_KEY_BYTES: u32 = 1 << 16;
    if spec.max_entries == 0 {
        return Err("max_entries is 0");
    }
    if spec.kind == MapKind::RingBuf {
        let size = spec.max_entries;
        let right = size.is_power_of_two() && (4096..1 << 30).contains(&size);
        return right.then_some(()).ok_or("its size is no power of two from 4096 to 512 MiB");
    }
    if spec.value_size_bytes == 0 || spec.value_size_bytes > MAX_VALUE_BYTES {
        return Err("its value's size is 0 or over 1 GiB");
    }
    match spec.kind {
        MapKind::Array | MapKind::PerCpuArray | MapKind::ArrayOfMaps | MapKind::ProgArray
            if spec.key_size_bytes != 4 =>
        {
            return Err("the key of an array has 4 bytes");
        }
        MapKind::Hash | MapKind::PerCpuHash | MapKind::HashOfMaps
            if spec.key_size_bytes == 0 || spec.key_size_bytes > MAX_KEY_BYTES =>
        {
            return Err("its key's size is 0 or over 64 KiB");
        }
        MapKind::Hash | MapKind::PerCpuHash | MapKind::HashOfMaps
            if spec.max_entries > hash::MAX_ENTRIES =>
        {
            return Err("max_entries is over 2^30");
        }
        _ => {}
    }
    if let Some(lock) = spec.lock_offset {
        let end = lock.checked_add(LOCK_BYTES);
        let inside = end.is_some_and(|end| end <= spec.value_size_bytes);
        if !inside
            || !lock.is_multiple_of(LOCK_BYTES)
            || !matches!(spec.kind, MapKind::Array | MapKind::Hash)
        {
            return Err(
                "its values' lock is not inside, not aligned, or in another kind than Array and Hash",
            );
        }
    }
    match &spec.init {
        Some(_) if spec.kind != MapKind::Array => Err("only an array has first values"),
        Some(init) if init.len() as u64 > u64::from(spec.value_size_bytes) => {
            Err("its first value is longer than a value")
        }
        _ => Ok(()),
    }
}

/// Whether a map of maps and what it holds at the start fit together.
fn check_inner(spec: &MapSpec, maps: &[MapSpec]) -> Result<(), &'static str> {
    const MAP_VALUE_BYTES: u32 = 4;
    let map = |index: MapIdx| maps.get(to_usize(u64::from(index.0)));
    let Some(inner) = &spec.inner else {
        let alone = !spec.kind.holds_maps();
        return alone.then_some(()).ok_or("it does not say which maps it holds");
    };
    if !spec.kind.holds_maps() || spec.template || spec.value_size_bytes != MAP_VALUE_BYTES {
        return Err("only ArrayOfMaps and HashOfMaps hold maps, as values of 4 bytes");
    }
    let template = map(inner.template).filter(|t| t.template && !t.kind.holds_maps());
    let template = template.ok_or("what it names is no template")?.shape();
    if !inner.init.is_empty() && spec.key_size_bytes != 4 {
        return Err("its keys have no 4 bytes, as those have of maps that it holds at the start");
    }
    for &(slot, held) in &inner.init {
        let fits = map(held).is_some_and(|m| !m.template && m.shape().fits(template));
        if !fits {
            return Err("a map that it holds at the start is not as its template");
        }
        let outside = spec.kind == MapKind::ArrayOfMaps && slot >= spec.max_entries;
        if outside || inner.init.len() as u64 > u64::from(spec.max_entries) {
            return Err("a map that it holds at the start has no place");
        }
    }
    Ok(())
}
