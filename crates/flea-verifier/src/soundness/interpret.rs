//! An interpreter that trusts nobody: each access must lie inside one live object, and the
//! machine must be as one of the verifier's states says.

use std::collections::BTreeMap;

use flea_object::helper::Helper;
use flea_object::spec::{MapIdx, MapKind, MapSpec};

use super::Numbers;
use super::meaning::{concrete, holds, sext};
use crate::facts::{Branch, Fact, Operands, Region, Verified};
use crate::number::scalar::{AluOp, Width};
use crate::op::{Atomic, Op, Operand, Place, Reg};
use crate::precision::Needs;
use crate::stack::{Byte, Half, Slot};
use crate::state::State;
use crate::tail::TAIL_CALL;
use crate::targets::TailCall;
use crate::value::{Id, PointerKind, Value};
use crate::{Context, PT_REGS_BYTES};

const MAX_STEPS: usize = 20_000;
/// No ring has room for a larger record here.
const MAX_RECORD_BYTES: u64 = 1 << 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Frame(usize),
    Ctx,
    MapValue(u32),
    MapKey(u32),
    Record,
    Cookie,
    Memory,
}

struct Object {
    kind: Kind,
    bytes: Vec<u8>,
}

struct Frame {
    regs: [u64; 11],
    return_to: Option<usize>,
    stack: u64,
    /// The helper that calls this frame's function in rounds.
    helper: Option<Rounds>,
}

/// A helper's call of a function, in rounds.
#[derive(Clone, Copy)]
struct Rounds {
    function: u64,
    context: u64,
    map: Option<u32>,
    n_done: u64,
    n_rounds: u64,
}

pub(crate) struct Interpreter<'a> {
    ops: &'a [Op],
    /// Where functions begin, by index.
    starts: Vec<usize>,
    maps: &'a [MapSpec],
    numbers: Numbers<'a>,
    objects: BTreeMap<u64, Object>,
    frames: Vec<Frame>,
    next_base: u64,
    /// Addresses of each map's values: all of an array's, two of a hash table's.
    values: Vec<Vec<u64>>,
    /// r0 of the function that returned last.
    result: u64,
}

impl<'a> Interpreter<'a> {
    pub(crate) fn new(
        ops: &'a [Op],
        maps: &'a [MapSpec],
        context: Context,
        numbers: Numbers<'a>,
    ) -> Self {
        let mut starts: Vec<usize> = ops.iter().filter_map(Op::function).chain([0]).collect();
        starts.sort_unstable();
        starts.dedup();
        let mut this = Self {
            ops,
            starts,
            maps,
            numbers,
            objects: BTreeMap::new(),
            frames: Vec::new(),
            next_base: 0x5000_0000_0000,
            values: Vec::new(),
            result: 0,
        };
        let mut regs = [0; 11];
        (regs[1], regs[2]) = this.context(context);
        for (map, spec) in (0..).zip(maps) {
            let n = match spec.kind {
                MapKind::Array | MapKind::PerCpuArray => spec.max_entries,
                MapKind::Hash | MapKind::PerCpuHash => 2,
                MapKind::ArrayOfMaps
                | MapKind::HashOfMaps
                | MapKind::RingBuf
                | MapKind::ProgArray => 0,
            };
            let size = spec.value_size_bytes as usize;
            let values = (0..n).map(|_| this.allocate(Kind::MapValue(map), size)).collect();
            this.values.push(values);
        }
        this.enter(regs, None);
        this
    }

    /// What r1 and r2 start with.
    fn context(&mut self, context: Context) -> (u64, u64) {
        match context {
            Context::Tracing { n_args, n_results, .. } => {
                let words = usize::from(n_args) + usize::from(n_results);
                (self.allocate(Kind::Ctx, 8 * words), 0)
            }
            Context::PtRegs => (self.allocate(Kind::Ctx, PT_REGS_BYTES as usize), 0),
            Context::Memory { size_bytes } => {
                (self.allocate(Kind::Memory, size_bytes as usize), u64::from(size_bytes))
            }
        }
    }

    fn below(&mut self, n: u64) -> u64 {
        ((self.numbers)() >> 3) % n
    }

    fn allocate(&mut self, kind: Kind, size: usize) -> u64 {
        // Far apart: a stray access finds nothing.
        self.next_base += 1 << 32;
        let words = (0..size.div_ceil(8)).flat_map(|_| (self.numbers)().to_le_bytes());
        let bytes = words.take(size).collect();
        self.objects.insert(self.next_base, Object { kind, bytes });
        self.next_base
    }

    fn enter(&mut self, mut regs: [u64; 11], return_to: Option<usize>) {
        let stack = self.allocate(Kind::Frame(self.frames.len()), 512);
        for reg in [0, 6, 7, 8, 9] {
            regs[reg] = (self.numbers)();
        }
        regs[10] = stack + 512;
        self.frames.push(Frame { regs, return_to, stack, helper: None });
    }

    fn object(&mut self, address: u64, size: usize) -> Result<(u64, &mut Object), String> {
        let found = self.objects.range_mut(..=address).next_back();
        match found {
            Some((base, o)) if address - base + size as u64 <= o.bytes.len() as u64 => {
                Ok((*base, o))
            }
            _ => Err(format!("stray access of {size} bytes at {address:#x}")),
        }
    }

    fn read(&mut self, address: u64, size: usize) -> Result<(Kind, u64), String> {
        let (base, o) = self.object(address, size)?;
        let at = (address - base) as usize;
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&o.bytes[at..at + size]);
        Ok((o.kind, u64::from_le_bytes(bytes)))
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<Kind, String> {
        let (base, o) = self.object(address, bytes.len())?;
        let at = (address - base) as usize;
        o.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(o.kind)
    }

    fn regs(&mut self) -> &mut [u64; 11] {
        &mut self.frames.last_mut().expect("a frame until the end").regs
    }

    fn get(&mut self, operand: Operand) -> u64 {
        match operand {
            Operand::Reg(r) => self.regs()[r.index()],
            Operand::Imm(imm) => i64::from(imm) as u64,
        }
    }

    fn set(&mut self, reg: Reg, x: u64) {
        self.regs()[reg.index()] = x;
    }

    pub(crate) fn run(
        &mut self,
        beliefs: &[Vec<(State, Needs)>],
        verified: &Verified,
    ) -> Result<u64, String> {
        let mut idx = 0;
        for _ in 0..MAX_STEPS {
            if !beliefs[idx].iter().any(|(state, needs)| self.agrees(state, needs)) {
                let n = beliefs[idx].len();
                let regs = *self.regs();
                return Err(format!("insn {idx}: none of {n} states describes {regs:x?}"));
            }
            // Fewer instructions than u32 counts.
            let operands = verified.operands(idx as u32);
            let next = self
                .check_number(idx, operands)
                .and_then(|()| self.step(idx, verified))
                .map_err(|e| format!("insn {idx}: {e}"))?;
            let Some(next) = next else { return Ok(self.result) };
            self.check_branch(idx, next, operands)?;
            idx = next;
        }
        Err("the program does not end".into())
    }

    /// The number that the compiler was told of is in its range.
    fn check_number(&mut self, idx: usize, said: Operands) -> Result<(), String> {
        let x = match self.ops[idx] {
            Op::Alu { width, src: src @ Operand::Reg(_), .. } => {
                let x = self.get(src);
                if width == Width::W64 { x } else { x & 0xffff_ffff }
            }
            Op::Mov { width: Width::W32, src, .. } => self.get(src),
            // What it looks up is a key where something is said of it.
            Op::CallHelper { .. } if (said.min, said.max) != (0, u64::MAX) => {
                let at = self.regs()[2];
                self.read(at, 4)?.1
            }
            _ => return Ok(()),
        };
        let inside = (said.min..=said.max).contains(&x);
        inside.then_some(()).ok_or_else(|| format!("{x:#x} was said to be in {said:?}"))
    }

    fn check_branch(&self, idx: usize, next: usize, said: Operands) -> Result<(), String> {
        let Op::If { target, .. } = self.ops[idx] else { return Ok(()) };
        let expected = match said.branch {
            Some(Branch::Jumps) => target,
            Some(Branch::Falls) => idx + 1,
            None => next,
        };
        (next == expected).then_some(()).ok_or_else(|| format!("insn {idx}: goes to {next}"))
    }

    fn step(&mut self, idx: usize, verified: &Verified) -> Result<Option<usize>, String> {
        let fact = verified.facts()[idx];
        if fact == Fact::Unreachable {
            return Err("said to be unreachable".into());
        }
        match self.ops[idx] {
            Op::Alu { op, width, dst, src } => {
                let (a, b) = (self.get(Operand::Reg(dst)), self.get(src));
                self.set(dst, concrete(op, bits(width), a, b));
            }
            Op::Neg { width, dst } => {
                let a = self.get(Operand::Reg(dst));
                self.set(dst, concrete(AluOp::Sub, bits(width), 0, a));
            }
            Op::Mov { width, dst, src } => {
                let x = self.get(src);
                self.set(dst, if width == Width::W64 { x } else { x & 0xffff_ffff });
            }
            Op::MovSx { width, bits: n, dst, src } => {
                let x = sext(self.get(Operand::Reg(src)), n) as u64;
                self.set(dst, if width == Width::W64 { x } else { x & 0xffff_ffff });
            }
            Op::Swap { bits, dst } => {
                let x = self.get(Operand::Reg(dst));
                self.set(dst, x.swap_bytes() >> (64 - bits));
            }
            Op::Trunc { bits, dst } => {
                let x = self.get(Operand::Reg(dst));
                self.set(dst, x << (64 - bits) >> (64 - bits));
            }
            Op::Const { dst, value } => {
                self.set(dst, value);
                return Ok(Some(idx + 2));
            }
            Op::MapAddress { dst, map } => {
                self.set(dst, map_handle(map));
                return Ok(Some(idx + 2));
            }
            Op::MapValueAddress { dst, map, off } => {
                let base = self.values_of(map).next().ok_or("no such value")?;
                self.set(dst, base + u64::from(off));
                return Ok(Some(idx + 2));
            }
            Op::FunctionAddress { dst, target } => {
                self.set(dst, function_handle(target));
                return Ok(Some(idx + 2));
            }
            Op::SecondHalf => return Err("half an instruction".into()),
            Op::Load { dst, place, sign_extend } => {
                let x = match fact {
                    Fact::Access(Region::Target) => self.anything(place),
                    _ => {
                        let size = place.size.bytes() as usize;
                        let (kind, x) = self.read(self.address(place), size)?;
                        agree(kind, fact)?;
                        x
                    }
                };
                let n = 8 * place.size.bytes();
                self.set(dst, if sign_extend { sext(x, n) as u64 } else { x });
            }
            Op::Store { place, src } => {
                let x = self.get(src).to_le_bytes();
                let size = place.size.bytes() as usize;
                let kind = self.write(self.address(place), &x[..size])?;
                agree(kind, fact)?;
                self.writable(kind)?;
            }
            Op::Atomic { op, fetch, place, src } => self.atomic(op, fetch, place, src, fact)?,
            Op::Goto { target } => return Ok(Some(target)),
            Op::If { cond, width, dst, src, target } => {
                let (a, b) = (self.get(Operand::Reg(dst)), self.get(src));
                let jumps = holds(cond, bits(width), a, b);
                return Ok(Some(if jumps { target } else { idx + 1 }));
            }
            op @ Op::CallHelper { id } if op.takes_callback() => {
                return self.start_rounds(id, idx, verified).map(Some);
            }
            Op::CallHelper { id: TAIL_CALL } => {
                if self.tail_call(fact)? {
                    // The target's stack is another one, and its result any.
                    self.regs()[0] = (self.numbers)();
                    return self.leave();
                }
            }
            Op::CallHelper { id } => self.helper(id, fact)?,
            Op::CallPointer { callee } => {
                let to = self.get(Operand::Reg(callee));
                let to = callee_at(to, idx, verified)?;
                let regs = *self.regs();
                self.enter(regs, Some(idx + 1));
                return Ok(Some(to));
            }
            Op::CallLocal { target } => {
                let regs = *self.regs();
                self.enter(regs, Some(idx + 1));
                return Ok(Some(target));
            }
            Op::Exit => return self.leave(),
        }
        Ok(Some(idx + 1))
    }

    /// What the target has at an address that nobody has proved: 0 where nothing is.
    fn anything(&mut self, place: Place) -> u64 {
        let x = if (self.numbers)().is_multiple_of(4) { 0 } else { (self.numbers)() };
        x & (u64::MAX >> (64 - 8 * place.size.bytes()))
    }

    fn leave(&mut self) -> Result<Option<usize>, String> {
        let Some(frame) = self.frames.pop() else { return Ok(None) };
        self.objects.remove(&frame.stack);
        self.result = frame.regs[0];
        let Some(to) = frame.return_to else { return Ok(None) };
        if let Some(mut rounds) = frame.helper {
            if frame.regs[0] > 1 {
                return Err(format!("a callback returns {:#x}", frame.regs[0]));
            }
            rounds.n_done += 1;
            if frame.regs[0] == 1 {
                rounds.n_rounds = rounds.n_done;
            }
            return self.next_round(rounds, to).map(Some);
        }
        let scramble = (self.numbers)();
        self.regs()[0] = frame.regs[0];
        self.regs()[1..=5].fill(scramble);
        Ok(Some(to))
    }

    fn start_rounds(&mut self, id: i32, idx: usize, verified: &Verified) -> Result<usize, String> {
        let Fact::Call { map, .. } = verified.facts()[idx] else {
            return Err("no call fact".into());
        };
        let [_, first, function, context, flags, ..] = *self.regs();
        let is_loop = id == Helper::Loop as i32;
        if flags != 0 || (is_loop && first > 1 << 23) {
            let errno: i64 = if flags != 0 { -22 } else { -7 };
            return Ok(self.finish_rounds(errno as u64, idx + 1));
        }
        let n_rounds = match map {
            None => first,
            Some(MapIdx(map)) if map_handle(map) != first => return Err("another map".into()),
            Some(MapIdx(map)) => {
                let most = self.values[map as usize].len() as u64;
                let is_array = self.maps[map as usize].key_size_bytes == 4;
                if is_array { most } else { self.below(most + 1) }
            }
        };
        let map = map.map(|map| map.0);
        let rounds = Rounds { function, context, map, n_done: 0, n_rounds };
        if n_rounds > 0 {
            callee_at(function, idx, verified)?;
        }
        self.next_round(rounds, idx + 1)
    }

    fn next_round(&mut self, rounds: Rounds, return_to: usize) -> Result<usize, String> {
        if rounds.n_done == rounds.n_rounds {
            return Ok(self.finish_rounds(rounds.n_done, return_to));
        }
        let scramble = (self.numbers)();
        let args = match rounds.map {
            None => [rounds.n_done, rounds.context, scramble, scramble, scramble],
            Some(map) => {
                let key_bytes = self.maps[map as usize].key_size_bytes as usize;
                let key = self.allocate(Kind::MapKey(map), key_bytes);
                let value = self.values[map as usize].get(rounds.n_done as usize);
                let value = *value.ok_or("no such value")?;
                [map_handle(map), key, value, rounds.context, scramble]
            }
        };
        // The caller's registers stay as they are until the helper is done.
        let mut regs = *self.regs();
        regs[1..=5].copy_from_slice(&args);
        self.enter(regs, Some(return_to));
        self.frames.last_mut().expect("just entered").helper = Some(rounds);
        Ok(rounds.function.wrapping_sub(function_handle(0)) as usize)
    }

    fn finish_rounds(&mut self, result: u64, to: usize) -> usize {
        let scramble = (self.numbers)();
        self.regs()[1..=5].fill(scramble);
        self.regs()[0] = result;
        to
    }

    fn address(&self, place: Place) -> u64 {
        let frame = self.frames.last().expect("a frame until the end");
        frame.regs[place.base.index()].wrapping_add_signed(i64::from(place.off))
    }

    fn atomic(
        &mut self,
        op: Atomic,
        fetch: bool,
        place: Place,
        src: Reg,
        fact: Fact,
    ) -> Result<(), String> {
        let size = place.size.bytes() as usize;
        let address = self.address(place);
        if !address.is_multiple_of(size as u64) {
            return Err("crooked atomic".into());
        }
        let (kind, old) = self.read(address, size)?;
        agree(kind, fact)?;
        let keep = |x: u64| if size == 8 { x } else { x & 0xffff_ffff };
        let (x, expected) = (keep(self.get(Operand::Reg(src))), keep(self.regs()[0]));
        let new = match op {
            Atomic::Add => old.wrapping_add(x),
            Atomic::Or => old | x,
            Atomic::And => old & x,
            Atomic::Xor => old ^ x,
            Atomic::Xchg => x,
            Atomic::Cmpxchg if old == expected => x,
            Atomic::Cmpxchg => old,
        };
        let kind = self.write(address, &new.to_le_bytes()[..size])?;
        self.writable(kind)?;
        if op == Atomic::Cmpxchg {
            self.set(Reg::R0, old);
        } else if fetch {
            self.set(src, old);
        }
        Ok(())
    }

    fn helper(&mut self, id: i32, fact: Fact) -> Result<(), String> {
        let helper = Helper::from_id(id).ok_or("unknown helper")?;
        let args: [u64; 5] = std::array::from_fn(|n| self.regs()[n + 1]);
        let Fact::Call { map, constants, .. } = fact else { return Err("no call fact".into()) };
        for (known, arg) in constants.iter().zip(args) {
            if known.is_some_and(|k| k != arg) {
                return Err(format!("argument {arg:#x} was said to be {known:x?}"));
            }
        }
        if map.is_some_and(|m| args[0] != map_handle(m.0)) {
            return Err("another map".into());
        }
        let result = self.answer(helper, args, map)?;
        let scramble = (self.numbers)();
        self.regs()[1..=5].fill(scramble);
        self.regs()[0] = result;
        Ok(())
    }

    fn answer(
        &mut self,
        helper: Helper,
        args: [u64; 5],
        map: Option<MapIdx>,
    ) -> Result<u64, String> {
        match helper {
            Helper::MapLookupElem => self.lookup(spec_of(map)?, args[1]),
            Helper::MapUpdateElem | Helper::MapDeleteElem => {
                let map = spec_of(map)?;
                let spec = &self.maps[map];
                let (key, value) = (spec.key_size_bytes as usize, spec.value_size_bytes as usize);
                self.readable(args[1], key)?;
                if helper == Helper::MapUpdateElem {
                    self.readable(args[2], value)?;
                    self.disturb(map);
                }
                Ok((self.numbers)())
            }
            Helper::RingbufOutput => {
                let size = usize::try_from(args[2]).map_err(|e| e.to_string())?;
                self.readable(args[1], size)?;
                Ok((self.numbers)())
            }
            Helper::RingbufReserve if args[1] <= MAX_RECORD_BYTES && self.below(3) > 0 => {
                Ok(self.allocate(Kind::Record, args[1] as usize))
            }
            Helper::RingbufReserve => Ok(0),
            Helper::RingbufSubmit | Helper::RingbufDiscard => {
                let freed = self.objects.remove(&args[0]);
                if !freed.is_some_and(|o| o.kind == Kind::Record) {
                    return Err("not a record".into());
                }
                Ok((self.numbers)())
            }
            Helper::ProbeReadUser
            | Helper::ProbeRead
            | Helper::ProbeReadKernel
            | Helper::ProbeReadUserStr
            | Helper::ProbeReadStr
            | Helper::ProbeReadKernelStr => {
                for i in 0..args[1] {
                    let byte = (self.numbers)() as u8;
                    self.write(args[0] + i, &[byte])?;
                }
                Ok(match (helper, self.below(2)) {
                    (_, 0) => -14i64 as u64,
                    (Helper::ProbeReadUser | Helper::ProbeRead | Helper::ProbeReadKernel, _) => 0,
                    _ => self.below(args[1] + 1),
                })
            }
            _ => Ok((self.numbers)()),
        }
    }

    fn lookup(&mut self, map: usize, key: u64) -> Result<u64, String> {
        let spec = &self.maps[map];
        let size = spec.key_size_bytes as usize;
        let inner = spec.inner.as_ref().map(|inner| inner.template);
        self.readable(key, size)?;
        if let Some(MapIdx(template)) = inner {
            // Some map like the template, or none.
            return Ok(if self.below(3) > 0 { map_handle(template) } else { 0 });
        }
        let n = match spec.kind {
            MapKind::Array | MapKind::PerCpuArray => self.read(key, 4)?.1,
            _ => self.below(3),
        };
        let value = usize::try_from(n).ok().and_then(|n| self.values[map].get(n));
        Ok(value.copied().unwrap_or(0))
    }

    /// An update has changed some value.
    fn disturb(&mut self, map: usize) {
        if let Some(&value) = self.values[map].first() {
            let x = (self.numbers)().to_le_bytes();
            let n = (self.maps[map].value_size_bytes as usize).min(8);
            self.write(value, &x[..n]).expect("values live as long as their map");
        }
    }

    /// All bytes are there to be read by a helper.
    fn readable(&mut self, address: u64, size: usize) -> Result<(), String> {
        if size == 0 { Ok(()) } else { self.object(address, size).map(|_| ()) }
    }

    fn writable(&self, kind: Kind) -> Result<(), String> {
        let refused = match kind {
            Kind::Ctx | Kind::MapKey(_) => true,
            Kind::MapValue(map) => self.maps[map as usize].read_only,
            Kind::Frame(_) | Kind::Record | Kind::Cookie | Kind::Memory => false,
        };
        if refused { Err(format!("write to {kind:?}")) } else { Ok(()) }
    }

    /// Whether there is a program at the index: by chance.
    fn tail_call(&mut self, fact: Fact) -> Result<bool, String> {
        let [ctx, map, index]: [u64; 3] = std::array::from_fn(|n| self.regs()[n + 1]);
        let call = TailCall::of(0, fact).ok_or("no tail call's fact")?;
        if !self.bases(|kind| kind == Kind::Ctx).any(|base| base == ctx) {
            return Err("not the context".into());
        }
        if map != map_handle(call.map.0) || call.index.is_some_and(|known| known != index as u32) {
            return Err(format!("{map:#x} at {index} was said to be {call:?}"));
        }
        let scramble = (self.numbers)();
        self.regs()[0..=5].fill(scramble);
        Ok(self.below(2) == 0)
    }

    fn values_of(&self, map: u32) -> impl Iterator<Item = u64> + '_ {
        self.bases(move |k| k == Kind::MapValue(map))
    }

    fn bases(&self, wanted: impl Fn(Kind) -> bool) -> impl Iterator<Item = u64> {
        self.objects.iter().filter(move |(_, o)| wanted(o.kind)).map(|(base, _)| *base)
    }

    /// `state` describes the machine.
    fn agrees(&self, state: &State, needs: &Needs) -> bool {
        if state.depth() + 1 != self.frames.len() {
            return false;
        }
        let mut ids = BTreeMap::new();
        self.frames.iter().enumerate().all(|(depth, frame)| {
            let believed = state.frame_at(depth);
            let needed = needs.frame(depth);
            let regs = believed.registers().iter().zip(frame.regs).enumerate();
            let regs = regs.into_iter().all(|(i, (v, x))| {
                let any_number = matches!(v, Value::Scalar(_)) && !needed.has_reg(i);
                any_number || self.value_agrees(v, x, &mut ids)
            });
            regs && (0..believed.stack.n_slots()).all(|i| {
                if !needed.has_slot(i) && !believed.stack.slot(i).is_pointer() {
                    return true;
                }
                let memory = &self.objects[&frame.stack].bytes[512 - 8 * (i + 1)..][..8];
                self.slot_agrees(believed.stack.slot(i), memory, &mut ids)
            })
        })
    }

    fn slot_agrees(&self, slot: &Slot, memory: &[u8], ids: &mut BTreeMap<Id, Linked>) -> bool {
        match slot {
            Slot::Spill(v) => {
                let x = u64::from_le_bytes(memory.try_into().expect("8 bytes"));
                self.value_agrees(v, x, ids)
            }
            Slot::Bytes(bytes) => bytes_agree(bytes, memory),
            Slot::Halves(halves) => halves.iter().zip(memory.chunks(4)).all(|(half, m)| {
                let x = u32::from_le_bytes(m.try_into().expect("4 bytes"));
                match half {
                    Half::Number(v) => self.value_agrees(v, u64::from(x), ids),
                    Half::Bytes(bytes) => bytes_agree(bytes, m),
                }
            }),
        }
    }

    fn value_agrees(&self, value: &Value, x: u64, ids: &mut BTreeMap<Id, Linked>) -> bool {
        match value {
            Value::NotInit => true,
            Value::Scalar(n) => {
                n.set.contains(x)
                    && n.id.is_none_or(|id| ids.entry(id).or_default().agrees(n.part, n.delta, x))
            }
            Value::Pointer(p) => {
                if p.or_null.is_some() && x == 0 {
                    return true;
                }
                let at = |base: u64| p.off.contains(x.wrapping_sub(base));
                match p.kind {
                    PointerKind::Stack { frame } => {
                        self.frames.get(frame).is_some_and(|f| at(f.stack + 512))
                    }
                    PointerKind::Map(MapIdx(map)) => x == map_handle(map),
                    PointerKind::MapValue(MapIdx(map))
                    | PointerKind::LockValue { map: MapIdx(map), .. } => {
                        self.values_of(map).any(at)
                    }
                    PointerKind::MapKey(MapIdx(map)) => {
                        self.bases(|k| k == Kind::MapKey(map)).any(at)
                    }
                    PointerKind::Function(function) => {
                        self.starts.get(function).is_some_and(|start| x == function_handle(*start))
                    }
                    PointerKind::Ctx => self.bases(|k| k == Kind::Ctx).any(at),
                    PointerKind::Record { .. } => self.bases(|k| k == Kind::Record).any(at),
                    PointerKind::Cookie => self.bases(|k| k == Kind::Cookie).any(at),
                    PointerKind::Memory { .. } => self.bases(|k| k == Kind::Memory).any(at),
                    // No generated program has global functions.
                    PointerKind::Argument { .. } => false,
                    PointerKind::Target { .. } => true,
                }
            }
        }
    }
}

/// What has an id, as far as the numbers linked to it have told.
#[derive(Default)]
struct Linked {
    whole: Option<u64>,
    lower: Option<u64>,
}

impl Linked {
    /// `x` is that plus `delta`, or the lower half of the sum.
    fn agrees(&mut self, part: Width, delta: u64, x: u64) -> bool {
        let base = x.wrapping_sub(delta);
        let lower = *self.lower.get_or_insert(base & 0xffff_ffff) == base & 0xffff_ffff;
        lower && (part == Width::W32 || *self.whole.get_or_insert(base) == base)
    }
}

fn bytes_agree(believed: &[Byte], memory: &[u8]) -> bool {
    believed.iter().zip(memory).all(|(b, m)| *b != Byte::Zero || *m == 0)
}

fn agree(kind: Kind, fact: Fact) -> Result<(), String> {
    let said = match fact {
        Fact::Access(Region::Stack) => matches!(kind, Kind::Frame(_)),
        Fact::Access(Region::Ctx { .. }) => kind == Kind::Ctx,
        Fact::Access(Region::MapValue { map }) => kind == Kind::MapValue(map.0),
        Fact::Access(Region::MapKey) => matches!(kind, Kind::MapKey(_)),
        Fact::Access(Region::RingbufRecord) => kind == Kind::Record,
        Fact::Access(Region::SessionCookie) => kind == Kind::Cookie,
        Fact::Access(Region::Memory) => kind == Kind::Memory,
        _ => false,
    };
    if said { Ok(()) } else { Err(format!("{kind:?} was said to be {fact:?}")) }
}

fn spec_of(map: Option<MapIdx>) -> Result<usize, String> {
    map.map(|map| map.0 as usize).ok_or_else(|| "a map that was not named".into())
}

fn map_handle(map: u32) -> u64 {
    0x1111_0000_0000 + u64::from(map)
}

/// Far from all memory, and from maps.
fn function_handle(start: usize) -> u64 {
    0x2222_0000_0000 + start as u64
}

/// The function that `value` stands for, which must be one that was said to be called.
fn callee_at(value: u64, idx: usize, verified: &Verified) -> Result<usize, String> {
    let said = verified.callees(idx as u32);
    let mut starts = said.map(|f| verified.functions()[f as usize].start_insn_idx as usize);
    let found = starts.find(|start| function_handle(*start) == value);
    found.ok_or_else(|| format!("{value:#x} was not said to be called"))
}

fn bits(width: Width) -> u32 {
    if width == Width::W64 { 64 } else { 32 }
}
