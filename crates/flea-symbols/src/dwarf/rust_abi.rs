//! rustc's own calling convention, which is not written down: what `rustc_abi` and
//! `rustc_ty_utils::abi` do. Start at [`signature`].
//!
//! A type has one of these layouts, made from its fields:
//!
//! - a scalar: passed as C passes it;
//! - a pair of scalars: passed as two parameters; a slice, an `Option<u32>`;
//! - anything else: as an integer if it has at most eight bytes, else by its address.
//!
//! A struct with one field is what that field is, with two scalar fields it is a pair. An
//! `enum` with a tag is a pair if all variants have one scalar at one place; one without is
//! what its one variant with data is.
//!
//! DWARF has neither `extern "C"` nor `repr(C)`, which change all this. So there is a
//! candidate for each.

use super::c_abi::{self, place_all};
use super::evidence::{Candidate, Evidence};
use super::signature::{Described, Function};
use super::types::{Record, RecordKind, Shape, Variants};
use crate::signature::{
    Absent, ArgWord, Choice, Doubt, RetWord, Return, Signature, SignatureSource, StackWords,
    Unclassified,
};
use crate::x86_64::classify::{Places, Rules};

/// The versions 1.x whose layouts are known to be these.
const KNOWN_MINORS: std::ops::RangeInclusive<u32> = 84..=97;
/// Types nested deeper than this are not looked into.
const MAX_DEPTH: u32 = 32;
const GPRS: u8 = 6;

/// How rustc calls `function`.
pub(crate) fn signature(
    function: &Function<'_>,
    evidence: &Evidence<'_>,
) -> Result<Signature, Doubt> {
    let is_known = function.produced.rustc_minor.is_some_and(|m| KNOWN_MINORS.contains(&m));
    let mut candidates = Vec::new();
    for newtypes in [Newtypes::Transparent, Newtypes::Opaque] {
        candidates.push(candidate(function, &Abi { newtypes, is_known })?);
    }
    let rules = Rules::usual(function.compiler);
    if function.params.iter().map(|param| &param.shape).chain([&function.ret.1]).all(is_c_like) {
        candidates.extend(c_abi::candidate(function, rules));
    }
    // `extern "C"` functions usually are `no_mangle` as well.
    let is_mangled = function.symbol.starts_with("_R") || function.symbol.starts_with("_ZN");
    let presumed = is_mangled.then_some(0);
    evidence.choose(candidates, presumed, Choice::RustOrC).ok_or(Doubt::Contradicted)
}

/// 1.x, from DW_AT_producer.
pub(crate) fn minor_version(producer: &str) -> Option<u32> {
    let rest = producer.split("rustc version 1.").nth(1)?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// `extern "C"` functions have no other types: `enum`s with data and tuples have no layout
/// that C knows.
fn is_c_like(shape: &Shape) -> bool {
    match shape {
        Shape::Aggregate(record) => {
            record.variants.is_none() && record.fields.iter().all(|(_, field)| is_c_like(field))
        }
        _ => true,
    }
}

/// What a struct with one field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Newtypes {
    /// Its field.
    Transparent,
    /// Some bytes: `repr(C)`.
    Opaque,
}

struct Abi {
    newtypes: Newtypes,
    /// The version's layouts of types that are not scalars or slices are known.
    is_known: bool,
}

/// What a type is to rustc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// No bytes.
    Empty,
    Scalar(Scalar),
    /// The second's offset.
    Pair(Scalar, Scalar, u64),
    /// Neither: bytes.
    Memory,
}

/// An integer, a pointer, or a float, of this many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scalar {
    Int(u64),
    Float(u64),
}

impl Scalar {
    fn size(self) -> u64 {
        match self {
            Self::Int(size) | Self::Float(size) => size,
        }
    }

    fn shape(self) -> Shape {
        match self {
            Self::Int(size) => Shape::Integer(size),
            Self::Float(size) => Shape::Float(size),
        }
    }
}

fn candidate(function: &Function<'_>, abi: &Abi) -> Result<Candidate, Doubt> {
    let mut places = Places::new(Rules::usual(function.compiler));
    let (ty, shape) = &function.ret;
    let words = abi.result(shape).map_err(|reason| Doubt::Result {
        ty: ty.name().to_owned(),
        reason: Absent::Unclassified(reason),
    })?;
    let (words, absent) = match words {
        Some(words) => (words, None),
        None => {
            places.skip_gpr();
            function.result_in_memory()
        }
    };
    let hidden_gprs = if places.gprs() > 0 { 1 } else { 0 };
    let params =
        place_all(&function.params, |param: &Described| abi.words(&param.shape, &mut places));
    // `#[track_caller]` functions have one more, the caller's location.
    let spare_gprs = if places.gprs() < GPRS { 1 << places.gprs() } else { 0 };
    let on_stack = places.stack_words() + u32::from(places.gprs() == GPRS);
    let all_placed = params.iter().all(|param| param.absent.is_none());
    let signature = Signature {
        params,
        ret: Return { ty: ty.clone(), words, absent },
        variadic: function.variadic,
        stack_words: if all_placed { StackWords::Known(on_stack) } else { function.stack_words },
        stack_align_bytes: places.stack_align_bytes(),
        source: SignatureSource::Dwarf,
        doubt: None,
    };
    Ok(Candidate { signature, hidden_gprs, spare_gprs })
}

impl Abi {
    /// Where a parameter is.
    fn words(&self, shape: &Shape, places: &mut Places) -> Result<Vec<ArgWord>, Unclassified> {
        match self.layout(shape, 0)? {
            Layout::Empty => Ok(Vec::new()),
            Layout::Scalar(scalar) => places.next(&scalar.shape()),
            Layout::Pair(first, second, _) => {
                let mut words = places.next(&first.shape())?;
                words.extend(places.next(&second.shape())?);
                Ok(words)
            }
            Layout::Memory => Ok(vec![places.integer()?]),
        }
    }

    /// Where the result is; `None` in memory that the caller provides.
    fn result(&self, shape: &Shape) -> Result<Option<Vec<RetWord>>, Unclassified> {
        let mut gprs = [RetWord::Rax, RetWord::Rdx].into_iter();
        let mut xmms = [RetWord::Xmm0, RetWord::Xmm1].into_iter();
        let mut take = |scalar: Scalar| match scalar {
            Scalar::Int(16) => gprs.next().into_iter().chain(gprs.next()).collect(),
            Scalar::Int(_) => gprs.next().into_iter().collect(),
            Scalar::Float(16) => {
                let upper = RetWord::XmmWord { reg: 0, word: 1 };
                xmms.next().into_iter().chain([upper]).collect()
            }
            Scalar::Float(_) => xmms.next().into_iter().collect::<Vec<RetWord>>(),
        };
        Ok(match self.layout(shape, 0)? {
            Layout::Empty => Some(Vec::new()),
            Layout::Scalar(scalar) => Some(take(scalar)),
            Layout::Pair(first, second, _) if first.size() <= 8 && second.size() <= 8 => {
                let mut words = take(first);
                words.extend(take(second));
                Some(words)
            }
            Layout::Pair(..) => return Err(Unclassified::RustAbi),
            Layout::Memory if shape.size() <= 8 => Some(vec![RetWord::Rax]),
            Layout::Memory => None,
        })
    }

    fn layout(&self, shape: &Shape, depth: u32) -> Result<Layout, Unclassified> {
        match shape {
            Shape::Void => Ok(Layout::Empty),
            Shape::Integer(size @ (1 | 2 | 4 | 8 | 16)) => Ok(Layout::Scalar(Scalar::Int(*size))),
            Shape::Float(size) => Ok(Layout::Scalar(Scalar::Float(*size))),
            Shape::Aggregate(record) if record.size == 0 => Ok(Layout::Empty),
            Shape::Aggregate(_) if depth > MAX_DEPTH => Err(Unclassified::RustAbi),
            Shape::Aggregate(record) => {
                let layout = self.record(record, depth)?;
                let is_wide_pointer =
                    matches!(layout, Layout::Pair(Scalar::Int(8), Scalar::Int(8), _))
                        && record.fields.len() == 2;
                if self.is_known || is_wide_pointer {
                    Ok(layout)
                } else {
                    Err(Unclassified::RustAbi)
                }
            }
            _ => Err(Unclassified::RustAbi), // SIMD
        }
    }

    fn record(&self, record: &Record, depth: u32) -> Result<Layout, Unclassified> {
        match (&record.variants, record.kind) {
            (Some(variants), _) => self.variants(record, variants, depth),
            (None, RecordKind::Array) => Ok(Layout::Memory),
            (None, RecordKind::Union) => self.union(record, depth),
            (None, RecordKind::Struct) => self.fields(record, record, depth),
        }
    }

    /// The fields of a struct, or of a variant of `whole`.
    fn fields(&self, whole: &Record, of: &Record, depth: u32) -> Result<Layout, Unclassified> {
        let fields = self.non_empty(of, depth)?;
        Ok(match fields.as_slice() {
            [] => Layout::Memory,
            [(0, field, size)] if *size == whole.size => match (field, self.newtypes) {
                (Layout::Scalar(_), Newtypes::Opaque) => Layout::Memory,
                _ => *field,
            },
            [(a, Layout::Scalar(first), _), (b, Layout::Scalar(second), _)] => {
                pair(whole, (*a, *first), (*b, *second))
            }
            _ => Layout::Memory,
        })
    }

    /// Offset, layout and size of the fields that have bytes, by offset.
    fn non_empty(
        &self,
        record: &Record,
        depth: u32,
    ) -> Result<Vec<(u64, Layout, u64)>, Unclassified> {
        let mut found = Vec::new();
        for (offset, shape) in &record.fields {
            if shape.size() > 0 {
                found.push((*offset, self.layout(shape, depth + 1)?, shape.size()));
            }
        }
        found.sort_by_key(|(offset, ..)| *offset);
        Ok(found)
    }

    fn union(&self, record: &Record, depth: u32) -> Result<Layout, Unclassified> {
        let fields = self.non_empty(record, depth)?;
        let Some((_, first, size)) = fields.first() else { return Ok(Layout::Memory) };
        let same = fields.iter().all(|(at, layout, _)| *at == 0 && layout == first);
        let is_whole = *size == record.size && self.newtypes == Newtypes::Transparent;
        Ok(if same && is_whole { *first } else { Layout::Memory })
    }

    fn variants(
        &self,
        whole: &Record,
        variants: &Variants,
        depth: u32,
    ) -> Result<Layout, Unclassified> {
        let mut arms = Vec::new();
        for arm in &variants.arms {
            let Shape::Aggregate(data) = arm.data.as_ref() else {
                return Err(Unclassified::RustAbi);
            };
            arms.push((arm.has_value, data));
        }
        let Some((tag_at, tag)) = &variants.tag else {
            return self.only_variant(whole, &arms, depth);
        };
        if let Some((_, dataful)) = arms.iter().find(|(has_value, _)| !has_value) {
            // The tag is a value that the data never has. Elsewhere there may be no data.
            for (_, other) in arms.iter().filter(|(has_value, _)| *has_value) {
                if !self.non_empty(other, depth)?.is_empty() {
                    return Ok(Layout::Memory);
                }
            }
            return self.niche(whole, dataful, depth);
        }
        let Shape::Integer(tag_size) = **tag else { return Err(Unclassified::RustAbi) };
        self.tagged(whole, (*tag_at, Scalar::Int(tag_size)), &arms, depth)
    }

    /// Without a tag, only one variant can exist: the others hold a `!`.
    fn only_variant(
        &self,
        whole: &Record,
        arms: &[(bool, &Record)],
        depth: u32,
    ) -> Result<Layout, Unclassified> {
        let mut only = None;
        for (_, data) in arms {
            if !self.non_empty(data, depth)?.is_empty() && only.replace(data).is_some() {
                return Err(Unclassified::RustAbi);
            }
        }
        only.map_or(Ok(Layout::Memory), |data| self.niche(whole, data, depth))
    }

    /// A variant with data whose type has values to spare: as a struct, and `repr(C)` has no
    /// say, since an `enum` is no newtype.
    fn niche(&self, whole: &Record, data: &Record, depth: u32) -> Result<Layout, Unclassified> {
        let transparent = Self { newtypes: Newtypes::Transparent, ..*self };
        transparent.fields(whole, data, depth)
    }

    fn tagged(
        &self,
        whole: &Record,
        tag: (u64, Scalar),
        arms: &[(bool, &Record)],
        depth: u32,
    ) -> Result<Layout, Unclassified> {
        let mut common: Option<(u64, Scalar)> = None;
        for (_, data) in arms {
            let here = match self.non_empty(data, depth)?.as_slice() {
                [] => continue,
                [(at, Layout::Scalar(scalar), _)] => (*at, *scalar),
                _ => return Ok(Layout::Memory),
            };
            if *common.get_or_insert(here) != here {
                return Ok(Layout::Memory);
            }
        }
        Ok(match common {
            Some(data) => pair(whole, tag, data),
            None if tag.1.size() == whole.size => Layout::Scalar(tag.1),
            None => Layout::Memory,
        })
    }
}

/// Two scalars are a pair where nothing but them decides the layout.
fn pair(whole: &Record, first: (u64, Scalar), second: (u64, Scalar)) -> Layout {
    let (a, b) = (first.1.size().max(1), second.1.size().max(1));
    let align = a.max(b);
    let offset = a.next_multiple_of(b);
    let size = (offset + b).next_multiple_of(align);
    let is_plain = (first.0, second.0, size, align) == (0, offset, whole.size, whole.align);
    if is_plain { Layout::Pair(first.1, second.1, offset) } else { Layout::Memory }
}
