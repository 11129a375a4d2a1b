//! What a walk notes down for the compiler at each instruction that it visits: the ranges of
//! [`crate::facts::Operands`], which says why they hold on every path.

use flea_object::helper::Helper;
use flea_object::spec::{MapIdx, MapKind};

use crate::facts::Branch;
use crate::machine::{Flow, Machine};
use crate::number::scalar::{AluOp, Width};
use crate::op::{Op, Operand, Reg};
use crate::stack::Span;
use crate::state::State;
use crate::value::{Pointer, PointerKind, Value};

impl Machine<'_> {
    /// Before `idx` is executed: the second operand, where the compiler makes use of it.
    pub(crate) fn note_operand(&mut self, idx: usize, state: &State) {
        let (width, src) = match self.ops[idx] {
            Op::Alu {
                op: AluOp::Div | AluOp::Sdiv | AluOp::Mod | AluOp::Smod,
                width,
                src: Operand::Reg(src),
                ..
            } => (width, src),
            // All bits of the source count: are the upper ones 0?
            Op::Mov { width: Width::W32, src: Operand::Reg(src), .. } => (Width::W64, src),
            _ => return,
        };
        let range = state.reg(src).as_scalar().map(|set| match width {
            Width::W64 => (set.wide.umin, set.wide.umax),
            Width::W32 => (set.low.umin, set.low.umax),
        });
        // What the compiler cannot use is not said, so that paths need not be parted by it.
        let half = u64::from(u32::MAX);
        let is_move = matches!(self.ops[idx], Op::Mov { .. });
        let by_construction = is_move && self.upper.is_zero(idx, src);
        let range = match range {
            Some(_) if by_construction => Some((0, half)),
            Some((_, max)) if is_move && max > half => None,
            other => other,
        };
        if range.is_some_and(|range| range != (0, u64::MAX)) && !by_construction {
            self.trail.need(src);
        }
        self.facts.number(idx, range);
    }

    /// Behind `idx`: which way a conditional jump has gone.
    pub(crate) fn note_branch(&mut self, idx: usize, flow: &Flow) {
        let Op::If { target, .. } = self.ops[idx] else { return };
        let (jumps, falls) = match flow {
            Flow::Both { .. } => (true, true),
            // A jump to the next instruction goes both ways.
            Flow::To(to) => (*to == target, *to == idx + 1),
            Flow::End => (false, false),
        };
        if jumps {
            self.facts.branch(idx, Branch::Jumps);
        }
        if falls {
            self.facts.branch(idx, Branch::Falls);
        }
    }

    /// The range of the key that a lookup in an array reads, where it is on the stack.
    pub(crate) fn lookup_key(&mut self, helper: Helper, state: &State) -> Option<(u64, u64)> {
        let Value::Pointer(Pointer { kind: PointerKind::Map(map), .. }) = state.reg(Reg::arg(0))
        else {
            return None;
        };
        if helper != Helper::MapLookupElem || !self.is_array(*map) {
            return None;
        }
        let Value::Pointer(Pointer { kind: PointerKind::Stack { frame }, off, or_null: None }) =
            state.reg(Reg::arg(1))
        else {
            return None;
        };
        let span = Span::new(off.as_const()?.cast_signed(), 4)?;
        // Two slots may share it, whose bytes are not one number.
        if off.as_const()? % 4 != 0 {
            return None;
        }
        let key = state.frame_at(*frame).stack.load(span).ok()?;
        // Whether the element exists is decided by it.
        self.trail.need_stack(*frame, span);
        key.as_scalar().map(|set| (set.low.umin, set.low.umax))
    }

    /// Whether `map` is an array that has an element with every key up to `key_max`.
    pub(crate) fn has_element(&self, map: MapIdx, key_max: Option<u64>) -> bool {
        let n = self.maps.get(map.0 as usize).map_or(0, |spec| u64::from(spec.max_entries));
        self.is_array(map) && key_max.is_some_and(|max| max < n)
    }

    fn is_array(&self, map: MapIdx) -> bool {
        // The maps that a template stands for may have fewer elements than it says.
        self.maps.get(map.0 as usize).is_some_and(|spec| {
            matches!(spec.kind, MapKind::Array | MapKind::PerCpuArray) && !spec.template
        })
    }
}
