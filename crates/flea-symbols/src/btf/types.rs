//! What BTF tells of a type: its bytes, and how C spells it. Start at [`Types::type_of`].
//! What it does not tell becomes [`Shape::Unknown`].

use std::cell::Cell;

use flea_object::btf::{Btf, Kind, Member, Word};

use crate::dwarf::dies::MAX_DEPTH;
use crate::dwarf::spelling::{pointer_to, qualified};
use crate::dwarf::types::{Gaps, Record, RecordKind, Shape, is_wide_bit_int, wide_bit_int};
use crate::signature::Type;

/// Nothing larger is in registers, and nothing is aligned to more.
const MAX_REGISTER_BYTES: u64 = 64;
/// A real parameter list has fewer types in it; more are damage that would take for ever.
const MAX_STEPS: u32 = 1 << 14;

/// What an array of numbers is taken for: some encoders make arrays of vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arrays {
    Arrays,
    Vectors,
}

/// Reads the types of one prototype.
pub(super) struct Types<'b, 'a> {
    btf: &'b Btf<'a>,
    arrays: Arrays,
    steps_left: Cell<u32>,
}

impl<'b, 'a> Types<'b, 'a> {
    pub(super) fn new(btf: &'b Btf<'a>, arrays: Arrays) -> Self {
        Self { btf, arrays, steps_left: Cell::new(MAX_STEPS) }
    }

    /// A result's type: only there, type 0 is `void`.
    pub(super) fn result_of(&self, id: u32) -> (Type, Shape) {
        if id == 0 { (Type::Void, Shape::Void) } else { self.type_of(id) }
    }

    /// A type as people spell it, and what its bytes are.
    pub(super) fn type_of(&self, id: u32) -> (Type, Shape) {
        let mut shape = self.passed_shape(id).unwrap_or_else(|| Shape::Unknown {
            size: self.btf.size_bytes(id).map_or(0, u64::from),
        });
        if let Shape::Aggregate(record) = &mut shape {
            // The source may have stated any alignment that its size allows. That it has not
            // is another candidate's.
            record.align = possible_align(record.size).max(record.align);
        }
        let name = self.spelling(id, 0);
        (self.c_type(id, name, &shape), shape)
    }

    fn c_type(&self, id: u32, name: String, shape: &Shape) -> Type {
        let size_bytes = u32::try_from(shape.size()).unwrap_or(u32::MAX);
        let bare = self.btf.resolve(id).ok();
        match (shape, bare.map(|ty| &ty.kind)) {
            (Shape::Integer(_), Some(Kind::Ptr { to })) => {
                Type::Pointer { name, to_char: self.is_char(*to) }
            }
            (Shape::Integer(_), Some(Kind::Enum { signed, .. })) => {
                Type::Int { name, size_bytes, signed: *signed }
            }
            (Shape::Integer(_), Some(Kind::Int(int))) => {
                // Encoders mark `char` as an encoding of its own, or not at all.
                let is_char = bare.is_some_and(|ty| matches!(ty.name, "char" | "signed char"));
                Type::Int { name, size_bytes, signed: int.signed || is_char }
            }
            (Shape::Float(_) | Shape::LongDouble, _) => Type::Float { name, size_bytes },
            (Shape::Integer(_) | Shape::Void, _) => Type::Unknown,
            _ => Type::Aggregate { name, size_bytes },
        }
    }

    fn is_char(&self, id: u32) -> bool {
        self.btf.resolve(id).is_ok_and(|ty| {
            ty.name == "char" && matches!(ty.kind, Kind::Int(int) if int.size_bytes == 1)
        })
    }

    /// C passes no arrays: what looks like one is a vector.
    fn passed_shape(&self, id: u32) -> Option<Shape> {
        match self.btf.resolve(id).ok()?.kind {
            Kind::Array { of, n_elements } => self.vector_shape(of, n_elements),
            _ => self.shape(id, 0),
        }
    }

    fn shape(&self, id: u32, depth: u32) -> Option<Shape> {
        self.steps_left.set(self.steps_left.get().checked_sub(1)?);
        if depth > MAX_DEPTH {
            return None;
        }
        let ty = self.btf.resolve(id).ok()?;
        match &ty.kind {
            Kind::Ptr { .. } => Some(Shape::Integer(8)),
            Kind::Enum { size_bytes: size @ (1 | 2 | 4 | 8), .. } => {
                Some(Shape::Integer((*size).into()))
            }
            Kind::Int(int) => {
                let size = u64::from(int.size_bytes);
                match size {
                    _ if is_wide_bit_int(ty.name, size) => Some(wide_bit_int(size)),
                    1 | 2 | 4 | 8 | 16 if int.is_whole => Some(Shape::Integer(size)),
                    _ => None,
                }
            }
            Kind::Float { size_bytes } => float_shape(ty.name, (*size_bytes).into()),
            Kind::Array { of, n_elements } => self.array_shape(*of, *n_elements, depth),
            Kind::Struct { size_bytes, members, is_union } => {
                let kind = if *is_union { RecordKind::Union } else { RecordKind::Struct };
                self.record_shape(kind, (*size_bytes).into(), members, depth)
            }
            _ => None,
        }
    }

    /// `None` for what no vector is.
    fn vector_shape(&self, of: u32, n_elements: u32) -> Option<Shape> {
        let element = match self.btf.resolve(of).ok()?.kind {
            Kind::Int(_) | Kind::Float { .. } => self.shape(of, 0)?,
            _ => return None,
        };
        let size = element.size().checked_mul(n_elements.into())?;
        let is_element = matches!(element, Shape::Integer(_) | Shape::Float(_));
        if !is_element || !size.is_power_of_two() {
            return None;
        }
        let is_lone = matches!(element, Shape::Float(_)) && n_elements == 1;
        Some(if is_lone { Shape::LoneFloatVector(size) } else { Shape::Vector(size) })
    }

    fn array_shape(&self, of: u32, n_elements: u32, depth: u32) -> Option<Shape> {
        let vector = || self.vector_shape(of, n_elements);
        if let Some(vector) =
            Some(self.arrays).filter(|a| *a == Arrays::Vectors).and_then(|_| vector())
        {
            return Some(vector);
        }
        let element = self.shape(of, depth + 1)?;
        let size = element.size().checked_mul(n_elements.into())?;
        let mut record = Record::new(RecordKind::Array, size, element.align());
        // Only what may be in registers is looked at element by element.
        let n = if size <= MAX_REGISTER_BYTES { u64::from(n_elements).min(64) } else { 0 };
        record.flexible = n_elements == 0;
        record.fields = (0..n).map(|i| (i * element.size(), element.clone())).collect();
        Some(Shape::Aggregate(record))
    }

    fn record_shape(
        &self,
        kind: RecordKind,
        size: u64,
        members: &[Member<'_>],
        depth: u32,
    ) -> Option<Shape> {
        let mut record = Record::new(kind, size, 1);
        if size > MAX_REGISTER_BYTES {
            return Some(Shape::Aggregate(record)); // in memory, whatever is in it
        }
        let mut gaps = Gaps::default();
        for member in members {
            let shape = self.shape(member.type_id, depth + 1)?;
            add_member(&mut record, &mut gaps, member, shape)?;
        }
        if size > 0 && !size.is_multiple_of(record.align) {
            record.align = possible_align(size); // packed
        }
        record.unexplained = gaps.finish(size, record.align);
        Some(Shape::Aggregate(record))
    }

    /// As the source spells the type.
    fn spelling(&self, id: u32, depth: u32) -> String {
        let Ok(ty) = self.btf.get(id) else { return "?".into() };
        if depth > MAX_DEPTH || self.steps_left.get() == 0 {
            return "...".into();
        }
        self.steps_left.set(self.steps_left.get() - 1);
        let inner = |id: u32| self.spelling(id, depth + 1);
        let tagged = |keyword: &str| match ty.name {
            "" => format!("{keyword} {{...}}"),
            name => format!("{keyword} {name}"),
        };
        match &ty.kind {
            Kind::Void => "void".into(),
            Kind::Ptr { to } => pointer_to(&inner(*to), "*"),
            Kind::Array { of, .. } => format!("{}[]", inner(*of)),
            Kind::Struct { is_union: true, .. } | Kind::Forward { is_union: true } => {
                tagged("union")
            }
            Kind::Struct { .. } | Kind::Forward { .. } => tagged("struct"),
            Kind::Enum { .. } => tagged("enum"),
            Kind::Alias { of, word: Word::Volatile } => qualified("volatile", &inner(*of)),
            Kind::Alias { of, word: Word::Const } => qualified("const", &inner(*of)),
            Kind::Alias { of, word: Word::Restrict } => format!("{} restrict", inner(*of)),
            Kind::Alias { of, word: Word::Tag } => inner(*of),
            Kind::Proto { ret, params } => {
                let spell = |param: &Member<'_>| match param.type_id {
                    0 => "...".to_owned(),
                    id => inner(id),
                };
                let params: Vec<String> = params.iter().map(spell).collect();
                let params = if params.is_empty() { "void".into() } else { params.join(", ") };
                format!("{} ()({params})", inner(*ret))
            }
            _ if ty.name.is_empty() => "?".into(),
            _ => ty.name.to_owned(),
        }
    }
}

/// The largest alignment that a type of this size can have.
fn possible_align(size: u64) -> u64 {
    1 << size.trailing_zeros().min(MAX_REGISTER_BYTES.trailing_zeros())
}

/// By the names that gcc and clang give: BTF has one kind for all formats.
fn float_shape(name: &str, size: u64) -> Option<Shape> {
    let is_complex = name.contains("omplex");
    match (size, name) {
        (4 | 8 | 16, _) if is_complex => Some(Shape::Complex(size)),
        (32, "complex long double" | "_Complex long double" | "long double _Complex") => {
            Some(Shape::ComplexLongDouble)
        }
        (32, _) if is_complex && name.contains("loat128") => Some(Shape::Complex(32)),
        (2 | 4 | 8, _) => Some(Shape::Float(size)),
        (16, "long double" | "_Float64x") => Some(Shape::LongDouble),
        (16, "_Float128" | "__float128" | "f128") => Some(Shape::Float(16)),
        _ => None,
    }
}

fn add_member(
    record: &mut Record,
    gaps: &mut Gaps,
    member: &Member<'_>,
    shape: Shape,
) -> Option<()> {
    let (bit_offset, bit_size) = (u64::from(member.bit_offset), u64::from(member.bit_size));
    let (offset, align) = (bit_offset / 8, shape.align());
    record.align = record.align.max(align);
    if bit_size > 0 {
        let bytes = (bit_offset % 8 + bit_size).div_ceil(8);
        let last = offset + bytes - 1;
        record.bit_fields.extend((offset..=last).step_by(8).chain([last]));
        gaps.add(offset, bytes, align);
        return Some(());
    }
    if bit_offset % 8 != 0 {
        return None;
    }
    gaps.add(offset, shape.size(), align);
    if let Shape::Aggregate(inner) = &shape {
        record.flexible |= inner.flexible;
        gaps.eightbytes.extend(inner.unexplained.iter().map(|at| (offset + at) / 8 * 8));
    }
    record.fields.push((offset, shape));
    Some(())
}
