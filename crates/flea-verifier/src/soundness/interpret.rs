//! An interpreter that trusts nobody: each access must lie inside one live object, and the
//! machine must be as one of the verifier's states says.

use std::collections::BTreeMap;

use flea_object::helper::Helper;
use flea_object::spec::MapIdx;

use super::generate::Random;
use crate::facts::{Fact, Region, Verified};
use crate::number::scalar::{AluOp, Width};
use crate::number::tests::{concrete, holds, sext};
use crate::op::{Atomic, Op, Operand, Place, Reg};
use crate::stack::{Byte, Slot};
use crate::state::State;
use crate::value::{Id, PointerKind, Value};

const MAX_STEPS: usize = 20_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Frame(usize),
    Ctx,
    MapValue(u32),
    MapKey(u32),
    Record,
    Cookie,
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
    args: [u64; 5],
    map: Option<u32>,
    n_done: u64,
    n_rounds: u64,
}

pub(crate) struct Interpreter<'a> {
    ops: &'a [Op],
    /// Where functions begin, by index.
    starts: Vec<usize>,
    random: Random,
    objects: BTreeMap<u64, Object>,
    frames: Vec<Frame>,
    next_base: u64,
    hash_values: Vec<u64>,
    /// r0 of the function that returned last.
    result: u64,
}

impl<'a> Interpreter<'a> {
    pub(crate) fn new(ops: &'a [Op], random: Random) -> Self {
        let mut starts: Vec<usize> = ops.iter().filter_map(Op::function).chain([0]).collect();
        starts.sort_unstable();
        starts.dedup();
        let mut this = Self {
            ops,
            starts,
            random,
            objects: BTreeMap::new(),
            frames: Vec::new(),
            next_base: 0x5000_0000_0000,
            hash_values: Vec::new(),
            result: 0,
        };
        let ctx = this.allocate(Kind::Ctx, 32);
        for slot in 0..4 {
            let n = this.random.number();
            this.write(ctx + 8 * slot, &n.to_le_bytes()).expect("the context is there");
        }
        this.allocate(Kind::MapValue(0), 64);
        this.allocate(Kind::MapValue(3), 16);
        for _ in 0..2 {
            let value = this.allocate(Kind::MapValue(1), 32);
            this.hash_values.push(value);
        }
        let mut regs = [0; 11];
        regs[1] = ctx;
        this.enter(regs, None);
        this
    }

    fn allocate(&mut self, kind: Kind, size: usize) -> u64 {
        // Far apart: a stray access finds nothing.
        self.next_base += 1 << 32;
        let bytes = (0..size).map(|_| self.random.next() as u8).collect();
        self.objects.insert(self.next_base, Object { kind, bytes });
        self.next_base
    }

    fn enter(&mut self, mut regs: [u64; 11], return_to: Option<usize>) {
        let stack = self.allocate(Kind::Frame(self.frames.len()), 512);
        for reg in [0, 6, 7, 8, 9] {
            regs[reg] = self.random.next();
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
        beliefs: &[Vec<State>],
        verified: &Verified,
    ) -> Result<u64, String> {
        let mut idx = 0;
        for _ in 0..MAX_STEPS {
            if !beliefs[idx].iter().any(|s| self.agrees(s)) {
                let n = beliefs[idx].len();
                let regs = *self.regs();
                return Err(format!("insn {idx}: none of {n} states describes {regs:x?}"));
            }
            match self.step(idx, verified).map_err(|e| format!("insn {idx}: {e}"))? {
                Some(next) => idx = next,
                None => return Ok(self.result),
            }
        }
        Err("the program does not end".into())
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
                let (kind, x) = self.read(self.address(place), place.size.bytes() as usize)?;
                agree(kind, fact)?;
                let n = 8 * place.size.bytes();
                self.set(dst, if sign_extend { sext(x, n) as u64 } else { x });
            }
            Op::Store { place, src } => {
                let x = self.get(src).to_le_bytes();
                let size = place.size.bytes() as usize;
                let kind = self.write(self.address(place), &x[..size])?;
                agree(kind, fact)?;
                if matches!(kind, Kind::Ctx | Kind::MapValue(3) | Kind::MapKey(_)) {
                    return Err(format!("write to {kind:?}"));
                }
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
            Op::CallHelper { id } => self.helper(id, fact)?,
            Op::CallPointer { callee } => {
                let to = self.get(Operand::Reg(callee));
                let to = self.callee(to, idx, verified)?;
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
        let scramble = self.random.next();
        self.regs()[0] = frame.regs[0];
        self.regs()[1..=5].fill(scramble);
        Ok(Some(to))
    }

    /// The function that `value` stands for, which must be one that was said to be called.
    fn callee(&self, value: u64, idx: usize, verified: &Verified) -> Result<usize, String> {
        let said = verified.callees(idx as u32);
        let mut starts = said.map(|f| verified.functions()[f as usize].start_insn_idx as usize);
        let found = starts.find(|start| function_handle(*start) == value);
        found.ok_or_else(|| format!("{value:#x} was not said to be called"))
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
        let map = map.map(|map| map.0);
        if !is_loop && map.map(map_handle) != Some(first) {
            return Err("another map".into());
        }
        let elements = match map {
            Some(1) => self.random.below(5),
            _ => 1,
        };
        let n_rounds = if is_loop { first } else { elements };
        let args = [0, context, 0, 0, 0];
        let rounds = Rounds { function, args, map, n_done: 0, n_rounds };
        if n_rounds > 0 {
            self.callee(function, idx, verified)?;
        }
        self.next_round(rounds, idx + 1)
    }

    fn next_round(&mut self, mut rounds: Rounds, return_to: usize) -> Result<usize, String> {
        if rounds.n_done == rounds.n_rounds {
            return Ok(self.finish_rounds(rounds.n_done, return_to));
        }
        let context = rounds.args[1];
        let scramble = self.random.next();
        let args = match rounds.map {
            None => [rounds.n_done, context, scramble, scramble, scramble],
            Some(map) => {
                let key = self.allocate(Kind::MapKey(map), if map == 1 { 8 } else { 4 });
                let n = self.random.below(2) as usize;
                let value = self.values_of(map).nth(n % self.values_of(map).count().max(1));
                [map_handle(map), key, value.ok_or("no such value")?, context, scramble]
            }
        };
        // The caller's registers stay as they are until the helper is done.
        let mut regs = *self.regs();
        regs[1..=5].copy_from_slice(&args);
        self.enter(regs, Some(return_to));
        let start = rounds.function.wrapping_sub(function_handle(0)) as usize;
        rounds.args[1] = context;
        self.frames.last_mut().expect("just entered").helper = Some(rounds);
        Ok(start)
    }

    fn finish_rounds(&mut self, result: u64, to: usize) -> usize {
        let scramble = self.random.next();
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
        self.write(address, &new.to_le_bytes()[..size])?;
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
        let result = match helper {
            Helper::MapLookupElem => {
                self.read(args[1], 8)?;
                let n = self.random.below(3) as usize;
                self.hash_values.get(n).copied().unwrap_or(0)
            }
            Helper::RingbufReserve if self.random.below(3) > 0 => {
                self.allocate(Kind::Record, args[1] as usize)
            }
            Helper::RingbufReserve => 0,
            Helper::RingbufSubmit | Helper::RingbufDiscard => {
                let freed = self.objects.remove(&args[0]);
                if !freed.is_some_and(|o| o.kind == Kind::Record) {
                    return Err("not a record".into());
                }
                self.random.next()
            }
            Helper::ProbeReadUser | Helper::ProbeReadUserStr => {
                for i in 0..args[1] {
                    let byte = self.random.next() as u8;
                    self.write(args[0] + i, &[byte])?;
                }
                match (helper, self.random.below(2)) {
                    (_, 0) => -14i64 as u64,
                    (Helper::ProbeReadUser, _) => 0,
                    _ => self.random.below(args[1] + 1),
                }
            }
            _ => self.random.next(),
        };
        let scramble = self.random.next();
        self.regs()[1..=5].fill(scramble);
        self.regs()[0] = result;
        Ok(())
    }

    fn values_of(&self, map: u32) -> impl Iterator<Item = u64> + '_ {
        self.bases(move |k| k == Kind::MapValue(map))
    }

    fn bases(&self, wanted: impl Fn(Kind) -> bool) -> impl Iterator<Item = u64> {
        self.objects.iter().filter(move |(_, o)| wanted(o.kind)).map(|(base, _)| *base)
    }

    /// `state` describes the machine.
    fn agrees(&self, state: &State) -> bool {
        if state.depth() + 1 != self.frames.len() {
            return false;
        }
        let mut ids = BTreeMap::new();
        self.frames.iter().enumerate().all(|(depth, frame)| {
            let believed = state.frame_at(depth);
            let regs = believed.registers().iter().zip(frame.regs);
            let regs = regs.into_iter().all(|(v, x)| self.value_agrees(v, x, &mut ids));
            regs && (0..believed.stack.n_slots()).all(|i| {
                let memory = &self.objects[&frame.stack].bytes[512 - 8 * (i + 1)..][..8];
                self.slot_agrees(believed.stack.slot(i), memory, &mut ids)
            })
        })
    }

    fn slot_agrees(&self, slot: &Slot, memory: &[u8], ids: &mut BTreeMap<Id, u64>) -> bool {
        match slot {
            Slot::Spill(v) => {
                let x = u64::from_le_bytes(memory.try_into().expect("8 bytes"));
                self.value_agrees(v, x, ids)
            }
            Slot::Bytes(bytes) => {
                bytes.iter().zip(memory).all(|(b, m)| *b != Byte::Zero || *m == 0)
            }
        }
    }

    fn value_agrees(&self, value: &Value, x: u64, ids: &mut BTreeMap<Id, u64>) -> bool {
        let mut same = |id: Option<Id>| id.is_none_or(|id| *ids.entry(id).or_insert(x) == x);
        match value {
            Value::NotInit => true,
            Value::Scalar(n) => n.set.contains(x) && same(n.id),
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
                    PointerKind::MapValue(MapIdx(map)) => self.values_of(map).any(at),
                    PointerKind::MapKey(MapIdx(map)) => {
                        self.bases(|k| k == Kind::MapKey(map)).any(at)
                    }
                    PointerKind::Function(function) => {
                        self.starts.get(function).is_some_and(|start| x == function_handle(*start))
                    }
                    PointerKind::Ctx => self.bases(|k| k == Kind::Ctx).any(at),
                    PointerKind::Record { .. } => self.bases(|k| k == Kind::Record).any(at),
                    PointerKind::Cookie => self.bases(|k| k == Kind::Cookie).any(at),
                    PointerKind::Memory { .. } => false,
                }
            }
        }
    }
}

fn agree(kind: Kind, fact: Fact) -> Result<(), String> {
    let said = match fact {
        Fact::Access(Region::Stack) => matches!(kind, Kind::Frame(_)),
        Fact::Access(Region::Ctx { .. }) => kind == Kind::Ctx,
        Fact::Access(Region::MapValue { map }) => kind == Kind::MapValue(map.0),
        Fact::Access(Region::MapKey) => matches!(kind, Kind::MapKey(_)),
        Fact::Access(Region::RingbufRecord) => kind == Kind::Record,
        Fact::Access(Region::SessionCookie) => kind == Kind::Cookie,
        _ => false,
    };
    if said { Ok(()) } else { Err(format!("{kind:?} was said to be {fact:?}")) }
}

fn map_handle(map: u32) -> u64 {
    0x1111_0000_0000 + u64::from(map)
}

/// Far from all memory, and from maps.
fn function_handle(start: usize) -> u64 {
    0x2222_0000_0000 + start as u64
}

fn bits(width: Width) -> u32 {
    if width == Width::W64 { 64 } else { 32 }
}
