//! BTF: the type information in `.BTF` (Documentation/bpf/btf.rst, 6.18), of eBPF objects and
//! of modules. Reads all kinds, keeps what maps, messages and signatures need. Offsets and
//! type ids in it are untrusted: every one is checked when it is followed. `.BTF.ext` is in
//! `btf_ext`. Start at [`Btf::parse`]; [`Graph`] makes [`crate::types::Types`] of it.

const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;
/// A chain of typedefs, arrays and qualifiers longer than this is a loop.
const MAX_DEPTH: u32 = 32;
const POINTER_BYTES: u32 = 8;
/// The smallest header, which is also the only one so far.
const HEADER_BYTES: u32 = 24;
/// Bits of BTF_INT_ENCODING.
const INT_SIGNED: u32 = 1;
const INT_BOOL: u32 = 4;

/// Why type information cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum BtfError {
    /// It ends in the middle of something.
    #[error("damaged BTF: {what} is cut off")]
    CutOff {
        /// What was being read.
        what: &'static str,
    },
    /// Not BTF, or a version of it that is not known.
    #[error("damaged BTF: magic {magic:04x} version {version}, expected eb9f version 1")]
    BadHeader {
        /// As found.
        magic: u16,
        /// As found.
        version: u8,
    },
    /// A kind that this build does not know.
    #[error("BTF type {type_id} has the unknown kind {kind}; a newer compiler made this object")]
    UnknownKind {
        /// Which type.
        type_id: u32,
        /// Its kind.
        kind: u32,
    },
    /// A reference to a type that is not there, or a chain without end.
    #[error("damaged BTF: type {type_id} does not exist or has no end")]
    BadType {
        /// Which.
        type_id: u32,
    },
    /// A reference to a string that is not there.
    #[error("damaged BTF: there is no string at {offset:#x}")]
    BadString {
        /// Where it should be.
        offset: u32,
    },
    /// A type without a size where one is needed.
    #[error("BTF type {type_id} has no size")]
    NoSize {
        /// Which.
        type_id: u32,
    },
}

/// All types and strings of an object.
#[derive(Clone, Debug, Default)]
pub struct Btf<'a> {
    /// By type id; the first is void.
    types: Vec<Type<'a>>,
    strings: &'a [u8],
}

/// One type.
#[derive(Clone, Debug)]
pub struct Type<'a> {
    /// Its name; empty where it has none.
    pub name: &'a str,
    /// What it is.
    pub kind: Kind<'a>,
}

/// What a type is. Ids and sizes are as the file says.
#[derive(Clone, Debug)]
pub enum Kind<'a> {
    /// Type 0. Also what compilers write where BTF has no kind for a type.
    Void,
    /// An integer, character or bool.
    Int(Int),
    /// A floating-point number, real or complex: only its name tells.
    Float {
        /// Its size.
        size_bytes: u32,
    },
    /// enum, enum64.
    Enum {
        /// Its size.
        size_bytes: u32,
        /// Marked as signed, or with a value that would be negative.
        signed: bool,
        /// Names and values, signed ones sign-extended.
        values: Vec<Enumerator<'a>>,
    },
    /// A pointer.
    Ptr {
        /// Type id of what it points at.
        to: u32,
    },
    /// An array.
    Array {
        /// Type id of its elements.
        of: u32,
        /// How many; 0 also where the source does not say.
        n_elements: u32,
    },
    /// struct, union.
    Struct {
        /// Its size.
        size_bytes: u32,
        /// In the source's order.
        members: Vec<Member<'a>>,
        /// A union.
        is_union: bool,
    },
    /// A struct or union that is declared and not defined.
    Forward {
        /// A union.
        is_union: bool,
    },
    /// Another type under another name, or with a qualifier.
    Alias {
        /// Type id of the other.
        of: u32,
        /// What it adds.
        word: Word,
    },
    /// A variable.
    Var {
        /// Type id of its value.
        of: u32,
    },
    /// A section of variables.
    DataSec {
        /// Their type ids.
        vars: Vec<u32>,
    },
    /// What a function takes and gives.
    Proto {
        /// Type id of the result.
        ret: u32,
        /// In the source's order.
        params: Vec<Member<'a>>,
    },
    /// A function, defined or declared.
    Func {
        /// Type id of its prototype.
        proto: u32,
    },
    /// An attribute of something that is declared; the type's name is its text.
    DeclTag {
        /// Type id of what it is about.
        of: u32,
        /// The number of a parameter or member; `u32::MAX` for the whole.
        component: u32,
    },
}

/// A name and its value.
pub type Enumerator<'a> = (&'a str, u64);

/// An integer type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Int {
    /// Its size.
    pub size_bytes: u32,
    /// Two's complement, by its encoding. gcc and pahole do not mark `char`.
    pub signed: bool,
    /// `_Bool`.
    pub is_bool: bool,
    /// All its bits count: it is not what old encoders made of a bit-field.
    pub is_whole: bool,
}

/// What an [`Kind::Alias`] adds to a type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// A name.
    Typedef,
    /// `volatile`
    Volatile,
    /// `const`
    Const,
    /// `restrict`
    Restrict,
    /// An attribute that compilers keep as text.
    Tag,
}

/// One member of a structure, or one parameter.
#[derive(Clone, Debug)]
pub struct Member<'a> {
    /// Its name; empty where it has none.
    pub name: &'a str,
    /// Its type. A last parameter of type 0 without a name is `...`.
    pub type_id: u32,
    /// Where it begins; 0 for a parameter.
    pub bit_offset: u32,
    /// How wide a bit-field is; 0 for others.
    pub bit_size: u32,
}

impl<'a> Btf<'a> {
    /// Reads a `.BTF` section that has one part, as every object and most modules have.
    ///
    /// # Errors
    /// [`BtfError`]: damaged, or newer than this reader.
    pub fn parse(section: &'a [u8]) -> Result<Self, BtfError> {
        let mut header = Reader::new(section, "the header");
        let (magic, version, _flags) = (header.u16()?, header.u8()?, header.u8()?);
        if (magic, version) != (MAGIC, VERSION) {
            return Err(BtfError::BadHeader { magic, version });
        }
        let header_bytes = header.u32()?;
        let (type_offset, type_bytes) = (header.u32()?, header.u32()?);
        let (string_offset, string_bytes) = (header.u32()?, header.u32()?);
        let body = part(section, header_bytes, u32::MAX, "the header")?;
        let types = part(body, type_offset, type_bytes, "the type section")?;
        let strings = part(body, string_offset, string_bytes, "the string section")?;
        let void = Type { name: "void", kind: Kind::Void };
        let mut btf = Self { types: vec![void], strings };
        let mut reader = Reader::new(types, "a type");
        while !reader.is_empty() {
            let next = btf.read_type(&mut reader)?;
            btf.types.push(next);
        }
        Ok(btf)
    }

    /// Reads a `.BTF` section of a module. Linkers know nothing of it: they put those of all
    /// objects one behind the other, each with a header and type ids of its own.
    ///
    /// # Errors
    /// As [`Btf::parse`]: all of them, or nothing.
    pub fn parse_linked(section: &'a [u8]) -> Result<Vec<Self>, BtfError> {
        let (mut found, mut rest) = (Vec::new(), section);
        loop {
            // What aligns the next.
            let n_zeros = rest.iter().take_while(|byte| **byte == 0).count();
            rest = &rest[n_zeros..];
            if rest.is_empty() {
                return Ok(found);
            }
            let (one, others) = rest
                .split_at_checked(linked_bytes(rest)?)
                .ok_or(BtfError::CutOff { what: "a part of a linked section" })?;
            found.push(Self::parse(one)?);
            rest = others;
        }
    }

    /// Every type with its id.
    pub fn types(&self) -> impl Iterator<Item = (u32, &Type<'a>)> {
        (0..).zip(&self.types)
    }

    /// The string at `offset` of the string section.
    pub(crate) fn string(&self, offset: u32) -> Result<&'a str, BtfError> {
        let bad = BtfError::BadString { offset };
        let start = self.strings.get(offset as usize..).ok_or_else(|| bad.clone())?;
        let end = start.iter().position(|&b| b == 0).ok_or_else(|| bad.clone())?;
        std::str::from_utf8(&start[..end]).map_err(|_| bad)
    }

    /// The type with this id.
    ///
    /// # Errors
    /// [`BtfError::BadType`]: there is none.
    pub fn get(&self, type_id: u32) -> Result<&Type<'a>, BtfError> {
        self.types.get(type_id as usize).ok_or(BtfError::BadType { type_id })
    }

    /// The same, with typedefs and qualifiers taken off.
    ///
    /// # Errors
    /// [`BtfError::BadType`]: it leads nowhere, or in a circle.
    pub fn resolve(&self, type_id: u32) -> Result<&Type<'a>, BtfError> {
        let mut id = type_id;
        for _ in 0..MAX_DEPTH {
            match self.get(id)? {
                Type { kind: Kind::Alias { of, .. }, .. } => id = *of,
                other => return Ok(other),
            }
        }
        Err(BtfError::BadType { type_id })
    }

    /// Bytes of a value of this type.
    ///
    /// # Errors
    /// [`BtfError`]: it has none, or is not there.
    pub fn size_bytes(&self, type_id: u32) -> Result<u32, BtfError> {
        let no_size = BtfError::NoSize { type_id };
        let (mut id, mut n_elements) = (type_id, 1u32);
        for _ in 0..MAX_DEPTH {
            let one = match self.resolve(id)?.kind {
                Kind::Int(Int { size_bytes, .. })
                | Kind::Float { size_bytes }
                | Kind::Enum { size_bytes, .. }
                | Kind::Struct { size_bytes, .. } => size_bytes,
                Kind::Ptr { .. } => POINTER_BYTES,
                Kind::Array { of, n_elements: n } => {
                    n_elements = n_elements.checked_mul(n).ok_or(no_size.clone())?;
                    id = of;
                    continue;
                }
                _ => return Err(no_size),
            };
            return one.checked_mul(n_elements).ok_or(no_size);
        }
        Err(BtfError::BadType { type_id })
    }

    /// The variables of the data section `name`: their names and types.
    pub(crate) fn data_section(&self, name: &str) -> Result<Vec<(&'a str, u32)>, BtfError> {
        let mut found = Vec::new();
        for ty in &self.types {
            let Kind::DataSec { vars } = &ty.kind else { continue };
            for &var in vars.iter().filter(|_| ty.name == name) {
                match self.get(var)? {
                    Type { name, kind: Kind::Var { of } } => found.push((*name, *of)),
                    // Functions stand in `.ksyms`.
                    _ => continue,
                }
            }
        }
        Ok(found)
    }

    fn read_type(&self, reader: &mut Reader<'a>) -> Result<Type<'a>, BtfError> {
        let type_id = u32::try_from(self.types.len()).expect("each type takes 12 bytes of a u32");
        let name = self.string(reader.u32()?)?;
        let info = reader.u32()?;
        let size_or_type = reader.u32()?;
        let (n_parts, kind, flag) = (info & 0xffff, info >> 24 & 0x1f, info >> 31 == 1);
        let alias = |word| Kind::Alias { of: size_or_type, word };
        // The numbers are BTF_KIND_* of include/uapi/linux/btf.h.
        let kind = match kind {
            1 => Kind::Int(read_int(reader, size_or_type)?),
            2 => Kind::Ptr { to: size_or_type },
            3 => {
                let (of, _index, n_elements) = (reader.u32()?, reader.u32()?, reader.u32()?);
                Kind::Array { of, n_elements }
            }
            4 | 5 => {
                let members = self.read_members(reader, n_parts, flag)?;
                Kind::Struct { size_bytes: size_or_type, members, is_union: kind == 5 }
            }
            6 => {
                let (values, signed) = self.read_enum(reader, n_parts, flag)?;
                Kind::Enum { size_bytes: size_or_type, signed, values }
            }
            7 => Kind::Forward { is_union: flag },
            8 => alias(Word::Typedef),
            9 => alias(Word::Volatile),
            10 => alias(Word::Const),
            11 => alias(Word::Restrict),
            12 => Kind::Func { proto: size_or_type },
            13 => Kind::Proto { ret: size_or_type, params: self.read_params(reader, n_parts)? },
            14 => reader.skip(4).map(|()| Kind::Var { of: size_or_type })?,
            15 => Kind::DataSec { vars: read_data_section(reader, n_parts)? },
            16 => Kind::Float { size_bytes: size_or_type },
            17 => Kind::DeclTag { of: size_or_type, component: reader.u32()? },
            18 => alias(Word::Tag),
            19 => {
                let values = self.read_enum64(reader, n_parts)?;
                Kind::Enum { size_bytes: size_or_type, signed: flag, values }
            }
            _ => return Err(BtfError::UnknownKind { type_id, kind }),
        };
        Ok(Type { name, kind })
    }

    /// With `has_bit_fields`, the upper byte of an offset is a bit-field's width.
    fn read_members(
        &self,
        reader: &mut Reader<'a>,
        n_members: u32,
        has_bit_fields: bool,
    ) -> Result<Vec<Member<'a>>, BtfError> {
        (0..n_members)
            .map(|_| {
                let (name, type_id, offset) = (reader.u32()?, reader.u32()?, reader.u32()?);
                let name = self.string(name)?;
                let (bit_offset, bit_size) =
                    if has_bit_fields { (offset & 0x00ff_ffff, offset >> 24) } else { (offset, 0) };
                Ok(Member { name, type_id, bit_offset, bit_size })
            })
            .collect()
    }

    /// Values, and whether they are signed: they are if one has the top bit. Encoders before
    /// the flag, and gcc 12, do not say whether that is a sign; it mostly is.
    fn read_enum(
        &self,
        reader: &mut Reader<'a>,
        n_values: u32,
        flag: bool,
    ) -> Result<(Vec<Enumerator<'a>>, bool), BtfError> {
        let words = (0..n_values)
            .map(|_| Ok((self.string(reader.u32()?)?, reader.u32()?)))
            .collect::<Result<Vec<_>, BtfError>>()?;
        let signed = flag || words.iter().any(|(_, value)| value >> 31 == 1);
        let extend = |value: u32| {
            let signed_value = i64::from(value.cast_signed()).cast_unsigned();
            if signed { signed_value } else { u64::from(value) }
        };
        Ok((words.into_iter().map(|(name, value)| (name, extend(value))).collect(), signed))
    }

    fn read_enum64(
        &self,
        reader: &mut Reader<'a>,
        n_values: u32,
    ) -> Result<Vec<Enumerator<'a>>, BtfError> {
        (0..n_values)
            .map(|_| {
                let (name, low, high) = (reader.u32()?, reader.u32()?, reader.u32()?);
                Ok((self.string(name)?, u64::from(high) << 32 | u64::from(low)))
            })
            .collect()
    }

    fn read_params(
        &self,
        reader: &mut Reader<'a>,
        n_params: u32,
    ) -> Result<Vec<Member<'a>>, BtfError> {
        (0..n_params)
            .map(|_| {
                let (name, type_id) = (reader.u32()?, reader.u32()?);
                Ok(Member { name: self.string(name)?, type_id, bit_offset: 0, bit_size: 0 })
            })
            .collect()
    }
}

/// How many bytes the first part of `section` has, by its header.
fn linked_bytes(section: &[u8]) -> Result<usize, BtfError> {
    let mut header = Reader::new(section, "the header");
    let (magic, version, _flags) = (header.u16()?, header.u8()?, header.u8()?);
    if (magic, version) != (MAGIC, VERSION) {
        return Err(BtfError::BadHeader { magic, version });
    }
    let header_bytes = header.u32()?.max(HEADER_BYTES) as usize;
    let types = header.u32()? as usize + header.u32()? as usize;
    let strings = header.u32()? as usize + header.u32()? as usize;
    Ok(header_bytes + types.max(strings))
}

fn read_int(reader: &mut Reader<'_>, size_bytes: u32) -> Result<Int, BtfError> {
    let word = reader.u32()?;
    let (encoding, offset, n_bits) = (word >> 24 & 0xf, word >> 16 & 0xff, word & 0xff);
    let is_bool = encoding & INT_BOOL != 0;
    let all_bits = size_bytes.checked_mul(8) == Some(n_bits);
    Ok(Int {
        size_bytes,
        signed: encoding & INT_SIGNED != 0,
        is_bool,
        is_whole: offset == 0 && (all_bits || is_bool),
    })
}

fn read_data_section(reader: &mut Reader<'_>, n_vars: u32) -> Result<Vec<u32>, BtfError> {
    (0..n_vars)
        .map(|_| {
            let (type_id, _offset, _size) = (reader.u32()?, reader.u32()?, reader.u32()?);
            // Offsets are the linker's business: clang leaves zeros here, symbols know them.
            Ok(type_id)
        })
        .collect()
}

/// `len` bytes at `offset`; all that follow where `len` is `u32::MAX`.
pub(crate) fn part<'a>(
    bytes: &'a [u8],
    offset: u32,
    len: u32,
    what: &'static str,
) -> Result<&'a [u8], BtfError> {
    let rest = bytes.get(offset as usize..).ok_or(BtfError::CutOff { what })?;
    if len == u32::MAX {
        return Ok(rest);
    }
    rest.get(..len as usize).ok_or(BtfError::CutOff { what })
}

/// Takes little-endian numbers off the front of a slice.
#[derive(Clone, Debug)]
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn take(&mut self, n_bytes: u32) -> Result<&'a [u8], BtfError> {
        let (taken, rest) = self
            .rest
            .split_at_checked(n_bytes as usize)
            .ok_or(BtfError::CutOff { what: self.what })?;
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, BtfError> {
        let b = self.take(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, BtfError> {
        let b = self.take(2)?;
        Ok(u16::from_le_bytes([b[0], b[1]]))
    }

    pub(crate) fn u8(&mut self) -> Result<u8, BtfError> {
        Ok(self.take(1)?[0])
    }

    pub(crate) fn skip(&mut self, n_bytes: u32) -> Result<(), BtfError> {
        self.take(n_bytes).map(|_| ())
    }
}

mod graph;
#[cfg(test)]
mod tests;

pub use graph::Graph;
