//! Loads through typed pointers into the target's data: does the type have a field there, and
//! is what it holds a pointer that can be followed in turn?
//!
//! None of this is needed for safety: such loads cannot fault, and any bits may come back. It
//! finds mistakes, in Linux's words, and keeps the types along chains of pointers.

use std::cell::Cell;

use flea_object::types::{Member, Type, TypeId, Types};

use crate::access::{Access, Request};
use crate::number::scalar::Scalar;
use crate::report::Fault;
use crate::value::{Pointer, PointerKind, Value};

/// How deep structures and arrays may be inside each other, and names be spelt: a bound for
/// graphs made of hostile debug information.
const MAX_DEPTH: u32 = 32;
/// How many members one load looks into: unions inside unions multiply.
const MAX_STEPS: u32 = 10_000;

/// What a load finds at its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    /// A pointer to this type, whole.
    Pointer(TypeId),
    /// Some other field, whole.
    Number,
    /// Some bytes of a field, or several elements of an array.
    Part,
}

/// The value with which a word of type `ty` begins: a pointer that loads can follow, if it is
/// one.
pub(crate) fn value_of(types: &Types, ty: TypeId) -> Option<Value> {
    let Type::Pointer { to } = *types.get(ty) else { return None };
    let can_be_followed =
        !matches!(types.get(to), Type::Void | Type::Opaque { .. } | Type::Function);
    can_be_followed.then(|| Value::pointer(PointerKind::Target { ty: to }))
}

/// Whether Linux would have a number where we have a pointer to `ty`: it types pointers to
/// structures only. Such a one may be computed with.
pub(crate) fn is_number_in_linux(types: &Types, ty: TypeId) -> bool {
    !matches!(types.get(ty), Type::Struct { .. })
}

/// Checks `request` through `p`, a pointer to `ty`; what is loaded, where it is known to be
/// more than a number.
pub(crate) fn load(
    types: &Types,
    ty: TypeId,
    request: Request,
    p: &Pointer,
) -> Result<Option<Value>, Fault> {
    if request.access != Access::Read {
        return Err(Fault::new("only read is supported")
            .hint("the target's memory is written with bpf_probe_write_user alone"));
    }
    // Offsets are within MAX_OFFSET: none of this overflows.
    let (min, max) = (p.off.wide.smin + request.off, p.off.wide.smax + request.off);
    let Ok(first) = u64::try_from(min) else {
        let (r, name) = (request.reg.index(), name(types, ty));
        return Err(Fault::new(format!("R{r} is ptr_{name} invalid negative access: off={min}"))
            .hint("a pointer to a member leads to that member's type, not to what is around it"));
    };
    let size = u64::from(request.size_bytes);
    if p.off.as_const().is_none() {
        let end = max.unsigned_abs().saturating_add(size);
        return inside(types, ty, first, end, &p.off).map(|()| None);
    }
    let left = Cell::new(MAX_STEPS);
    let walk = Walk { types, size, left: &left };
    let found = match types.get(ty) {
        Type::Struct { .. } => walk.at(ty, first, None, 0)?,
        // As in C, a pointer to something may be one to the first of many.
        _ => walk.element(ty, first, None, 0)?,
    };
    Ok(match found {
        Found::Pointer(to) => Some(Value::pointer(PointerKind::Target { ty: to })),
        Found::Number | Found::Part => None,
    })
}

/// An access somewhere between `first` and `end`, by an index: of what is in there it says
/// nothing, and loads numbers.
fn inside(types: &Types, ty: TypeId, first: u64, end: u64, off: &Scalar) -> Result<(), Fault> {
    let Type::Struct { name, size_bytes, members, .. } = types.get(ty) else { return Ok(()) };
    if end <= u64::from(*size_bytes) || flexible(types, members).is_some() {
        return Ok(());
    }
    let bits = off.wide.bits;
    Err(Fault::new(format!(
        "access beyond struct {name} at off {first} size {}, var_off=({:#x}; {:#x})",
        end - first,
        bits.value,
        bits.mask
    ))
    .hint("compare the index with the number of elements first"))
}

/// The array without a length at the end of a structure, if there is one.
fn flexible<'a>(types: &Types, members: &'a [Member]) -> Option<&'a Member> {
    members.last().filter(|m| matches!(types.get(m.ty), Type::Array { n_elements: 0, .. }))
}

/// One load.
#[derive(Clone, Copy)]
struct Walk<'a> {
    types: &'a Types,
    size: u64,
    /// Steps that may still be taken.
    left: &'a Cell<u32>,
}

/// The member that is looked into, for messages: they name offsets in its structure.
#[derive(Clone, Copy)]
struct Inside<'a> {
    structure: &'a str,
    member: &'a str,
    member_off: u64,
    off: u64,
}

impl<'a> Walk<'a> {
    /// What is at `off` in a value of type `ty`.
    fn at(
        self,
        ty: TypeId,
        off: u64,
        inside: Option<Inside<'a>>,
        depth: u32,
    ) -> Result<Found, Fault> {
        self.left.set(self.left.get().saturating_sub(1));
        if depth > MAX_DEPTH || self.left.get() == 0 {
            return Err(Fault::new(format!(
                "type '{}' is nested too deeply",
                name(self.types, ty)
            )));
        }
        match self.types.get(ty) {
            Type::Struct { name, size_bytes, members, .. } => {
                self.in_struct(name, u64::from(*size_bytes), members, off, depth)
            }
            Type::Array { of, .. } => self.element(*of, off, inside, depth + 1),
            Type::Pointer { to } => self.pointer(*to, off, inside),
            Type::Int { .. } | Type::Float { .. } | Type::Enum { .. } => {
                let whole = off == 0 && self.types.size_bytes(ty) == Some(self.size);
                Ok(if whole { Found::Number } else { Found::Part })
            }
            Type::Void | Type::Opaque { .. } | Type::Function => {
                let name = name(self.types, ty);
                Err(Fault::new(format!("Type '{name}' is not a struct")))
            }
        }
    }

    /// What is at `off` in many values of type `ty`, one after another.
    fn element(
        self,
        ty: TypeId,
        off: u64,
        inside: Option<Inside<'a>>,
        depth: u32,
    ) -> Result<Found, Fault> {
        let one =
            self.types.size_bytes(ty).filter(|one| *one > 0).ok_or_else(|| {
                Fault::new(format!("Type '{}' has no size", name(self.types, ty)))
            })?;
        let at = off % one;
        self.at(ty, at, inside.map(|i| Inside { member_off: i.off - at, ..i }), depth)
    }

    fn pointer(self, to: TypeId, off: u64, inside: Option<Inside<'a>>) -> Result<Found, Fault> {
        if off == 0 && self.size == 8 {
            let to = Some(to).filter(|to| {
                !matches!(self.types.get(*to), Type::Void | Type::Opaque { .. } | Type::Function)
            });
            return Ok(to.map_or(Found::Number, Found::Pointer));
        }
        let size = self.size;
        let text = match inside {
            Some(Inside { structure, member, member_off, off }) => format!(
                "cannot access ptr member {member} with moff {member_off} in struct {structure} \
                 with off {off} size {size}"
            ),
            None => format!("cannot access ptr with off {off} size {size}"),
        };
        Err(Fault::new(text).hint("a pointer is loaded whole: 8 bytes from its first one"))
    }

    fn in_struct(
        self,
        structure: &'a str,
        size_bytes: u64,
        members: &'a [Member],
        off: u64,
        depth: u32,
    ) -> Result<Found, Fault> {
        let mut found = Vec::new();
        let mut fault = None;
        for (n, m) in members.iter().enumerate() {
            let is_last = n + 1 == members.len();
            match self.in_member(structure, (m, is_last), off, depth) {
                Some(Ok(what)) => found.push(what),
                Some(Err(e)) => fault = fault.or(Some(e)),
                None => {}
            }
        }
        if let Some(what) = agreed(&found) {
            return Ok(what);
        }
        let size = self.size;
        if off + size > size_bytes && flexible(self.types, members).is_none() {
            let text = format!("access beyond struct {structure} at off {off} size {size}");
            return Err(Fault::new(text));
        }
        Err(fault.unwrap_or_else(|| {
            Fault::new(format!("struct {structure} doesn't have field at offset {off}"))
        }))
    }

    /// What is at `off` of a structure if that is in `member`; `None` where it is not.
    fn in_member(
        self,
        structure: &'a str,
        (member, is_last): (&'a Member, bool),
        off: u64,
        depth: u32,
    ) -> Option<Result<Found, Fault>> {
        let begin = member.bit_offset / 8;
        if let Some(bits) = member.bit_size {
            // Compilers load the bytes around a bit-field and shift.
            let end = member.bit_offset.saturating_add(u64::from(bits)).div_ceil(8);
            return (off < end && begin < off + self.size).then_some(Ok(Found::Part));
        }
        let at = off.checked_sub(begin)?;
        let inside = Inside { structure, member: &member.name, member_off: begin, off };
        if let Type::Array { of, n_elements: 0 } = *self.types.get(member.ty) {
            // Elsewhere than at the end it only marks a place.
            if !is_last {
                return None;
            }
            return Some(self.element(of, at, Some(inside), depth + 1));
        }
        let size_bytes = self.types.size_bytes(member.ty).filter(|size| at < *size)?;
        let found = self.at(member.ty, at, Some(inside), depth + 1);
        if found.is_ok() && at + self.size > size_bytes {
            return Some(Err(Fault::new(format!(
                "access beyond the end of member {} (mend:{}) in struct {structure} with off \
                 {off} size {}",
                member.name,
                begin.saturating_add(size_bytes),
                self.size
            ))));
        }
        Some(found)
    }
}

/// What several members at one place (a union's) make of a load: whole fields come before parts
/// of others, and where they are of different types it is a number.
fn agreed(found: &[Found]) -> Option<Found> {
    let mut wholes = found.iter().filter(|f| **f != Found::Part);
    match wholes.next() {
        Some(first) if wholes.all(|f| f == first) => Some(*first),
        Some(_) => Some(Found::Number),
        None => found.first().copied(),
    }
}

/// A type's name: `foo`, `int *`, `char[16]`.
pub(crate) fn name(types: &Types, ty: TypeId) -> String {
    spelt(types, ty, 0)
}

fn spelt(types: &Types, ty: TypeId, depth: u32) -> String {
    let or_anonymous = |name: &str| if name.is_empty() { "(anon)".into() } else { name.to_owned() };
    match types.get(ty) {
        _ if depth > MAX_DEPTH => "...".into(),
        Type::Void => "void".into(),
        Type::Function => "function".into(),
        Type::Int { name, .. }
        | Type::Float { name, .. }
        | Type::Enum { name, .. }
        | Type::Struct { name, .. }
        | Type::Opaque { name } => or_anonymous(name),
        Type::Pointer { to } => format!("{} *", spelt(types, *to, depth + 1)),
        Type::Array { of, n_elements } => {
            format!("{}[{n_elements}]", spelt(types, *of, depth + 1))
        }
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "random numbers are cut to size on purpose")]
mod tests {
    use super::*;
    use crate::op::Reg;
    use flea_generate::Random;

    /// A graph as no compiler makes it: structures inside themselves, members anywhere.
    fn hostile(random: &mut Random) -> (Types, Vec<TypeId>) {
        let mut types = Types::default();
        let ids: Vec<TypeId> = (0..12).map(|_| types.add(Type::Void)).collect();
        for id in &ids {
            let number = |random: &mut Random| match random.below(3) {
                0 => random.number(),
                1 => 8 * random.below(16),
                _ => random.below(64),
            };
            let name = String::from("t");
            let size_bytes = number(random) as u32;
            let ty = match random.below(8) {
                0 => Type::Int { name, size_bytes, signed: true, is_bool: false },
                1 => Type::Pointer { to: random.pick(&ids) },
                2 | 3 => Type::Array { of: random.pick(&ids), n_elements: random.below(4) as u32 },
                4 => Type::Opaque { name },
                _ => {
                    let members = (0..random.below(9)).map(|_| Member {
                        name: "m".into(),
                        ty: random.pick(&ids),
                        bit_offset: number(random),
                        bit_size: (random.below(4) == 0).then(|| number(random) as u32),
                    });
                    let members = members.collect();
                    Type::Struct { name, is_union: false, size_bytes, members }
                }
            };
            types.set(*id, ty);
        }
        (types, ids)
    }

    #[test]
    fn any_graph_gives_an_answer() {
        let (mut n_found, mut n_refused) = (0, 0);
        for seed in 0..400 {
            let random = &mut Random::new(seed);
            let (types, ids) = hostile(random);
            for _ in 0..20 {
                let ty = random.pick(&ids);
                let off = match random.below(3) {
                    0 => Scalar::signed(random.below(90) as i64, 90 + random.below(90) as i64),
                    _ => Scalar::constant(random.below(90)),
                };
                let p = Pointer { kind: PointerKind::Target { ty }, off, or_null: None };
                let request = Request {
                    reg: Reg::R0,
                    off: random.below(40) as i64 - 8,
                    size_bytes: random.pick(&[1, 2, 4, 8]),
                    access: Access::Read,
                };
                match load(&types, ty, request, &p) {
                    Ok(_) => n_found += 1,
                    Err(_) => n_refused += 1,
                }
                let _ = (name(&types, ty), value_of(&types, ty));
            }
        }
        assert!(n_found > 500 && n_refused > 500, "{n_found} found, {n_refused} refused");
    }

    /// Unions inside unions, as many as can be: a bound, not a time.
    #[test]
    fn what_multiplies_is_cut_off() {
        let mut types = Types::default();
        let mut inner = types.add(Type::Int {
            name: "u8".into(),
            size_bytes: 1,
            signed: false,
            is_bool: false,
        });
        for _ in 0..30 {
            let member = Member { name: "m".into(), ty: inner, bit_offset: 0, bit_size: None };
            let members = vec![member; 4];
            let name = "u".to_owned();
            inner = types.add(Type::Struct { name, is_union: true, size_bytes: 1, members });
        }
        let kind = PointerKind::Target { ty: inner };
        let p = Pointer { kind, off: Scalar::constant(0), or_null: None };
        let request = Request { reg: Reg::R0, off: 0, size_bytes: 1, access: Access::Read };
        // Cut off or not, what was found until then is a byte.
        assert_eq!(load(&types, inner, request, &p), Ok(None));
    }
}
