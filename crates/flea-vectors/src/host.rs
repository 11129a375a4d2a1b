//! Helpers and maps for the interpreter: plain data structures over its made-up memory, so
//! that nothing is shared with the code that compiled programs call.

use std::collections::{BTreeMap, HashSet};
use std::ops::Bound;
use std::time::Instant;

use flea_layout::plan::ArenaPlan;
use flea_object::LOCK_BYTES;
use flea_object::helper::Helper;
use flea_object::interp::{Host, Memory, Protection};
use flea_object::spec::{MapIdx, MapKind, MapSpec};

const ENOENT: i64 = -2;
const E2BIG: i64 = -7;
const EFAULT: i64 = -14;
const EEXIST: i64 = -17;
const EINVAL: i64 = -22;
const EOPNOTSUPP: i64 = -95;

const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;
const BPF_F_LOCK: u64 = 4;
/// A ring buffer record's header.
const RECORD_HEADER_BYTES: u64 = 8;
/// What a map looks like in a register; outside all memory.
const HANDLE_BASE: u64 = 0xface_0000_0000_0000;

/// One map's elements.
enum Table {
    /// All values in one region.
    Array { base: u64, stride: u64 },
    /// A region for each value.
    Hash(BTreeMap<Vec<u8>, u64>),
    /// Bytes that are reserved or not read.
    Ring { used_bytes: u64 },
    /// A program array: a vector is one program, so it is empty.
    Programs,
    /// Which map is at which key.
    Maps(BTreeMap<Vec<u8>, u32>),
}

/// The maps of one vector.
pub(crate) struct MapsHost {
    specs: Vec<MapSpec>,
    tables: Vec<Table>,
    context: Vec<u64>,
    /// Addresses of ring buffer records that are reserved and not given back.
    records: HashSet<u64>,
    /// Address of the lock that the program holds.
    held_lock: Option<u64>,
    since: Instant,
}

impl MapsHost {
    pub(crate) fn new(
        specs: &[MapSpec],
        plan: &ArenaPlan,
        memory: &mut Memory,
        context: Vec<u64>,
    ) -> Self {
        let tables = specs.iter().zip(&plan.maps).map(|(spec, placed)| match spec.kind {
            MapKind::Array | MapKind::PerCpuArray => {
                let stride = u64::from(placed.value_stride);
                let n_bytes = usize::try_from(stride * u64::from(spec.max_entries)).unwrap_or(0);
                let mut bytes = vec![0; n_bytes];
                let init = spec.init.as_deref().unwrap_or_default();
                let n_init = init.len().min(n_bytes);
                bytes[..n_init].copy_from_slice(&init[..n_init]);
                let protection =
                    if spec.read_only { Protection::ReadOnly } else { Protection::ReadWrite };
                Table::Array { base: memory.add(bytes, protection), stride }
            }
            MapKind::Hash | MapKind::PerCpuHash => Table::Hash(BTreeMap::new()),
            MapKind::RingBuf => Table::Ring { used_bytes: 0 },
            MapKind::ProgArray => Table::Programs,
            MapKind::ArrayOfMaps | MapKind::HashOfMaps => {
                let init = spec.inner.iter().flat_map(|inner| &inner.init);
                Table::Maps(init.map(|(key, map)| (key.to_le_bytes().to_vec(), map.0)).collect())
            }
        });
        let tables = tables.collect();
        Self {
            specs: specs.to_vec(),
            tables,
            context,
            records: HashSet::new(),
            held_lock: None,
            since: Instant::now(),
        }
    }

    fn map(&self, handle: u64) -> Result<usize, String> {
        let index = usize::try_from(handle.wrapping_sub(HANDLE_BASE)).ok();
        index.filter(|i| *i < self.specs.len()).ok_or_else(|| format!("{handle:#x} is no map"))
    }

    fn key(&self, map: usize, at: u64, memory: &Memory) -> Result<Vec<u8>, String> {
        let size = u64::from(self.specs[map].key_size_bytes);
        memory.read(at, size).map(<[u8]>::to_vec).map_err(|e| e.to_string())
    }

    fn lookup(&self, map: usize, key: &[u8]) -> u64 {
        match &self.tables[map] {
            Table::Array { base, stride } => {
                let index = u64::from(u32::from_le_bytes(*key.first_chunk().unwrap_or(&[0xff; 4])));
                let inside = index < u64::from(self.specs[map].max_entries);
                if inside { base + index * stride } else { 0 }
            }
            Table::Hash(elements) => elements.get(key).copied().unwrap_or(0),
            Table::Maps(maps) => maps.get(key).map_or(0, |map| HANDLE_BASE + u64::from(*map)),
            Table::Ring { .. } | Table::Programs => 0,
        }
    }

    fn update(
        &mut self,
        map: usize,
        key: Vec<u8>,
        value: &[u8],
        flags: u64,
        memory: &mut Memory,
    ) -> Result<i64, String> {
        let lock = self.specs[map].lock_offset;
        let (flags, locked) = (flags & !BPF_F_LOCK, flags & BPF_F_LOCK != 0);
        if flags > BPF_EXIST || (locked && lock.is_none()) {
            return Ok(EINVAL);
        }
        let found = self.lookup(map, &key);
        match (&mut self.tables[map], found) {
            (Table::Array { .. }, 0) => return Ok(E2BIG),
            (Table::Array { .. }, _) if flags == BPF_NOEXIST => return Ok(EEXIST),
            (Table::Hash(_), 0) if flags == BPF_EXIST => return Ok(ENOENT),
            (Table::Hash(elements), 0) => {
                if elements.len() as u64 >= u64::from(self.specs[map].max_entries) {
                    return Ok(E2BIG);
                }
                let mut value = value.to_vec();
                if let Some(lock) = lock_bytes(&mut value, lock) {
                    lock.fill(0);
                }
                elements.insert(key, memory.add(value, Protection::ReadWrite));
                return Ok(0);
            }
            (Table::Hash(_), _) if flags == BPF_NOEXIST => return Ok(EEXIST),
            (Table::Ring { .. } | Table::Programs | Table::Maps(_), _) => return Ok(EINVAL),
            _ => {}
        }
        let place = memory.write(found, value.len() as u64).map_err(|e| e.to_string())?;
        let mut value = value.to_vec();
        if let (Some(to), Some(from)) = (lock_bytes(&mut value, lock), lock_bytes(place, lock)) {
            to.copy_from_slice(from);
        }
        place.copy_from_slice(&value);
        Ok(0)
    }

    /// There is one thread: nobody waits.
    fn lock(&mut self, helper: Helper, at: u64, memory: &Memory) -> Result<u64, String> {
        memory.load(at, LOCK_BYTES).map_err(|e| e.to_string())?;
        let (before, after) = match helper {
            Helper::SpinLock => (None, Some(at)),
            _ => (Some(at), None),
        };
        if self.held_lock != before {
            return Err(format!("{} of {at:#x} with {:x?} held", helper.name(), self.held_lock));
        }
        self.held_lock = after;
        Ok(0)
    }

    /// The element's memory stays: a program may still hold its address, as in Linux.
    fn delete(&mut self, map: usize, key: &[u8]) -> i64 {
        match &mut self.tables[map] {
            Table::Hash(elements) => {
                if elements.remove(key).is_some() {
                    0
                } else {
                    ENOENT
                }
            }
            Table::Array { .. } | Table::Ring { .. } | Table::Programs | Table::Maps(_) => EINVAL,
        }
    }

    fn reserve(&mut self, map: usize, size: u64, memory: &mut Memory) -> u64 {
        let room = u64::from(self.specs[map].max_entries);
        let Table::Ring { used_bytes } = &mut self.tables[map] else { return 0 };
        let takes = size.saturating_add(RECORD_HEADER_BYTES).div_ceil(8).saturating_mul(8);
        // A record takes at most half the ring.
        if takes > room / 2 || used_bytes.saturating_add(takes) > room {
            return 0;
        }
        *used_bytes += takes;
        let n_bytes = usize::try_from(size).unwrap_or(0);
        let at = memory.add(vec![0; n_bytes], Protection::ReadWrite);
        self.records.insert(at);
        at
    }

    fn query(&self, map: usize, flags: u64) -> u64 {
        let Table::Ring { used_bytes } = &self.tables[map] else { return 0 };
        match flags {
            0 | 3 => *used_bytes,
            1 => u64::from(self.specs[map].max_entries),
            _ => 0,
        }
    }

    fn map_call(
        &mut self,
        helper: Helper,
        args: [u64; 5],
        memory: &mut Memory,
    ) -> Result<u64, String> {
        let map = self.map(args[0])?;
        match helper {
            Helper::MapLookupElem => Ok(self.lookup(map, &self.key(map, args[1], memory)?)),
            Helper::MapUpdateElem => {
                let key = self.key(map, args[1], memory)?;
                let size = u64::from(self.specs[map].value_size_bytes);
                let value = memory.read(args[2], size).map_err(|e| e.to_string())?.to_vec();
                self.update(map, key, &value, args[3], memory).map(i64::cast_unsigned)
            }
            Helper::MapDeleteElem => {
                let key = self.key(map, args[1], memory)?;
                Ok(self.delete(map, &key).cast_unsigned())
            }
            Helper::RingbufReserve => Ok(self.reserve(map, args[1], memory)),
            Helper::RingbufOutput => {
                let bytes = memory.read(args[1], args[2]).map_err(|e| e.to_string())?.to_vec();
                let record = self.reserve(map, bytes.len() as u64, memory);
                if record == 0 {
                    return Ok((-11i64).cast_unsigned());
                }
                self.records.remove(&record);
                Ok(0)
            }
            _ => Ok(self.query(map, args[1])),
        }
    }

    /// `n` as `u32`, as Linux declares it.
    fn argument(&self, n: u64, out: u64, memory: &mut Memory) -> Result<u64, String> {
        let n = usize::try_from(n & 0xffff_ffff).unwrap_or(usize::MAX);
        let Some(&value) = self.context.get(n) else { return Ok(EINVAL.cast_unsigned()) };
        memory.store(out, 8, value).map_err(|e| e.to_string())?;
        Ok(0)
    }
}

impl Host for MapsHost {
    fn call(&mut self, helper: i32, args: [u64; 5], memory: &mut Memory) -> Result<u64, String> {
        let helper = Helper::from_id(helper).ok_or_else(|| format!("no helper {helper}"))?;
        match helper {
            Helper::MapLookupElem
            | Helper::MapUpdateElem
            | Helper::MapDeleteElem
            | Helper::RingbufOutput
            | Helper::RingbufReserve
            | Helper::RingbufQuery => self.map_call(helper, args, memory),
            Helper::RingbufSubmit | Helper::RingbufDiscard => {
                let known = self.records.remove(&args[0]);
                known.then_some(0).ok_or_else(|| format!("{:#x} is no record", args[0]))
            }
            Helper::SpinLock | Helper::SpinUnlock => self.lock(helper, args[0], memory),
            // Any clock that goes forward: the compiled program reads it at another time.
            Helper::KtimeGetNs | Helper::KtimeGetBootNs => {
                Ok(u64::try_from(self.since.elapsed().as_nanos()).unwrap_or(u64::MAX))
            }
            Helper::GetPrandomU32 => Ok(4),
            Helper::GetSmpProcessorId => Ok(0),
            Helper::GetCurrentPidTgid => {
                let pid = u64::from(std::process::id());
                Ok(pid << 32 | nix::unistd::gettid().as_raw().cast_unsigned() as u64)
            }
            Helper::GetCurrentUidGid => {
                let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
                Ok(u64::from(gid.as_raw()) << 32 | u64::from(uid.as_raw()))
            }
            Helper::GetCurrentComm => comm(args[0], args[1], memory),
            Helper::ProbeReadUser | Helper::ProbeRead | Helper::ProbeReadKernel => {
                probe_read(args, false, memory)
            }
            Helper::ProbeReadUserStr | Helper::ProbeReadStr | Helper::ProbeReadKernelStr => {
                probe_read(args, true, memory)
            }
            Helper::RdonlyCast => Ok(args[0]),
            Helper::ProbeWriteUser => Err(format!("{} is not for vectors", helper.name())),
            Helper::Fls64 => Ok(u64::from(u64::BITS - args[0].leading_zeros())),
            Helper::GetFuncIp | Helper::GetAttachCookie => Ok(0),
            Helper::GetFuncArgCnt => Ok(self.context.len() as u64),
            Helper::GetFuncArg => self.argument(args[1], args[2], memory),
            Helper::GetFuncRet => Ok(EOPNOTSUPP.cast_unsigned()),
            // There is no buffer to print into: as a session without one answers.
            Helper::TracePrintk | Helper::TraceVprintk => Ok(EINVAL.cast_unsigned()),
            Helper::Loop | Helper::ForEachMapElem => {
                Err(format!("{} is the interpreter's own", helper.name()))
            }
            Helper::TailCall => Err("the interpreter makes tail calls itself".to_owned()),
            Helper::SessionIsReturn | Helper::SessionCookie => {
                Err(format!("{} belongs to fsession programs", helper.name()))
            }
        }
    }

    fn next_key(&self, map: u64, last: Option<&[u8]>) -> Result<Option<Vec<u8>>, String> {
        let map = self.map(map)?;
        match &self.tables[map] {
            Table::Array { .. } => {
                let index = last.and_then(|key| key.first_chunk()).map(|k| u32::from_le_bytes(*k));
                let next = index.map_or(0, |index| index.saturating_add(1));
                let inside = next < self.specs[map].max_entries;
                Ok(inside.then(|| next.to_le_bytes().to_vec()))
            }
            Table::Hash(elements) => {
                let after = last.map_or(Bound::Unbounded, Bound::Excluded);
                let mut rest = elements.range::<[u8], _>((after, Bound::Unbounded));
                Ok(rest.next().map(|(key, _)| key.clone()))
            }
            Table::Ring { .. } | Table::Maps(_) | Table::Programs => {
                Err(format!("map {map} cannot be walked over"))
            }
        }
    }

    fn map_handle(&self, map: MapIdx) -> Option<u64> {
        ((map.0 as usize) < self.specs.len()).then(|| HANDLE_BASE + u64::from(map.0))
    }

    fn map_value_address(&self, map: MapIdx) -> Option<u64> {
        match self.tables.get(map.0 as usize)? {
            Table::Array { base, .. } => Some(*base),
            Table::Hash(_) | Table::Ring { .. } | Table::Programs | Table::Maps(_) => None,
        }
    }

    fn tail_target(&self, map: u64, _: u32) -> Result<Option<usize>, String> {
        match self.tables[self.map(map)?] {
            Table::Programs => Ok(None),
            _ => Err(format!("{map:#x} is no program array")),
        }
    }
}

/// The lock's bytes in a value, where it has one.
fn lock_bytes(value: &mut [u8], lock: Option<u32>) -> Option<&mut [u8]> {
    let start = usize::try_from(lock?).ok()?;
    value.get_mut(start..start + usize::try_from(LOCK_BYTES).ok()?)
}

fn comm(out: u64, size: u64, memory: &mut Memory) -> Result<u64, String> {
    let name = std::fs::read_to_string("/proc/thread-self/comm").unwrap_or_default();
    let place = memory.write(out, size).map_err(|e| e.to_string())?;
    place.fill(0);
    let n = name.trim_end().len().min(place.len().saturating_sub(1));
    place[..n].copy_from_slice(&name.as_bytes()[..n]);
    Ok(0)
}

/// Addresses outside the interpreter's memory are bad ones: the context holds none.
fn probe_read(args: [u64; 5], string: bool, memory: &mut Memory) -> Result<u64, String> {
    let [out, size, from, ..] = args;
    let size = size & 0xffff_ffff;
    let found = if string {
        let bytes = (0..size).map_while(|i| memory.load(from.wrapping_add(i), 1).ok());
        let bytes: Vec<u8> = bytes.map(|b| b.to_le_bytes()[0]).collect();
        let end = bytes.iter().position(|b| *b == 0).map(|at| at + 1);
        match end {
            Some(end) => Some(bytes[..end].to_vec()),
            None if bytes.len() as u64 == size && size > 0 => {
                let mut cut = bytes;
                cut.pop();
                cut.push(0);
                Some(cut)
            }
            None => None,
        }
    } else {
        memory.read(from, size).ok().map(<[u8]>::to_vec)
    };
    let place = memory.write(out, size).map_err(|e| e.to_string())?;
    match found {
        Some(bytes) => {
            place[..bytes.len()].copy_from_slice(&bytes);
            Ok(if string { bytes.len() as u64 } else { 0 })
        }
        None => {
            place.fill(0);
            Ok(EFAULT.cast_unsigned())
        }
    }
}
