//! BTF: the type information that clang leaves in `.BTF` (Documentation/bpf/btf.rst, 6.18).
//! Reads all kinds, keeps what maps and messages need. Offsets and type ids in it are
//! untrusted: every one is checked when it is followed. `.BTF.ext` is in [`crate::btf_ext`].

const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;
/// A chain of typedefs, arrays and qualifiers longer than this is a loop.
const MAX_DEPTH: u32 = 32;
const POINTER_BYTES: u32 = 8;

/// Why type information cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
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
pub(crate) struct Btf<'a> {
    /// By type id; the first is void.
    types: Vec<Type<'a>>,
    strings: &'a [u8],
}

/// One type.
#[derive(Clone, Debug)]
pub(crate) struct Type<'a> {
    pub name: &'a str,
    pub kind: Kind<'a>,
}

/// What a type is. Ids and sizes are as the file says.
#[derive(Clone, Debug)]
pub(crate) enum Kind<'a> {
    Void,
    /// int, float, enum, enum64: something with a size.
    Scalar {
        size_bytes: u32,
    },
    Ptr {
        to: u32,
    },
    Array {
        of: u32,
        n_elements: u32,
    },
    Struct {
        size_bytes: u32,
        members: Vec<Member<'a>>,
    },
    /// typedef, const, volatile, restrict, type tag: another type under another name.
    Alias {
        of: u32,
    },
    Var {
        of: u32,
    },
    DataSec {
        vars: Vec<u32>,
    },
    /// Declarations, functions and whatever else has no size.
    Other,
}

/// One member of a structure.
#[derive(Clone, Debug)]
pub(crate) struct Member<'a> {
    pub name: &'a str,
    pub type_id: u32,
}

impl<'a> Btf<'a> {
    /// Reads a `.BTF` section.
    pub(crate) fn parse(section: &'a [u8]) -> Result<Self, BtfError> {
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

    /// The string at `offset` of the string section.
    pub(crate) fn string(&self, offset: u32) -> Result<&'a str, BtfError> {
        let bad = BtfError::BadString { offset };
        let start = self.strings.get(offset as usize..).ok_or_else(|| bad.clone())?;
        let end = start.iter().position(|&b| b == 0).ok_or_else(|| bad.clone())?;
        std::str::from_utf8(&start[..end]).map_err(|_| bad)
    }

    /// The type with this id.
    pub(crate) fn get(&self, type_id: u32) -> Result<&Type<'a>, BtfError> {
        self.types.get(type_id as usize).ok_or(BtfError::BadType { type_id })
    }

    /// The same, with typedefs and qualifiers taken off.
    pub(crate) fn resolve(&self, type_id: u32) -> Result<&Type<'a>, BtfError> {
        let mut id = type_id;
        for _ in 0..MAX_DEPTH {
            match self.get(id)? {
                Type { kind: Kind::Alias { of }, .. } => id = *of,
                other => return Ok(other),
            }
        }
        Err(BtfError::BadType { type_id })
    }

    /// Bytes of a value of this type.
    pub(crate) fn size_bytes(&self, type_id: u32) -> Result<u32, BtfError> {
        let no_size = BtfError::NoSize { type_id };
        let (mut id, mut n_elements) = (type_id, 1u32);
        for _ in 0..MAX_DEPTH {
            let one = match self.resolve(id)?.kind {
                Kind::Scalar { size_bytes } | Kind::Struct { size_bytes, .. } => size_bytes,
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
        let (n_parts, kind) = (info & 0xffff, info >> 24 & 0x1f);
        let scalar = Kind::Scalar { size_bytes: size_or_type };
        // The numbers are BTF_KIND_* of include/uapi/linux/btf.h.
        let kind = match kind {
            1 => reader.skip(4).map(|()| scalar)?,
            2 => Kind::Ptr { to: size_or_type },
            3 => {
                let (of, _index, n_elements) = (reader.u32()?, reader.u32()?, reader.u32()?);
                Kind::Array { of, n_elements }
            }
            4 | 5 => {
                let members = self.read_members(reader, n_parts)?;
                Kind::Struct { size_bytes: size_or_type, members }
            }
            6 => reader.skip(n_parts * 8).map(|()| scalar)?,
            8..=11 | 18 => Kind::Alias { of: size_or_type },
            14 => reader.skip(4).map(|()| Kind::Var { of: size_or_type })?,
            15 => Kind::DataSec { vars: read_data_section(reader, n_parts)? },
            16 => scalar,
            19 => reader.skip(n_parts * 12).map(|()| scalar)?,
            // Forward declarations and functions; prototypes; declaration tags.
            7 | 12 => Kind::Other,
            13 => reader.skip(n_parts * 8).map(|()| Kind::Other)?,
            17 => reader.skip(4).map(|()| Kind::Other)?,
            _ => return Err(BtfError::UnknownKind { type_id, kind }),
        };
        Ok(Type { name, kind })
    }

    fn read_members(
        &self,
        reader: &mut Reader<'a>,
        n_members: u32,
    ) -> Result<Vec<Member<'a>>, BtfError> {
        (0..n_members)
            .map(|_| {
                let (name, type_id, _offset) = (reader.u32()?, reader.u32()?, reader.u32()?);
                Ok(Member { name: self.string(name)?, type_id })
            })
            .collect()
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A `.BTF` section with these words as types and this string section.
    fn section(types: &[u32], strings: &[u8]) -> Vec<u8> {
        let type_bytes = u32::try_from(types.len() * 4).unwrap();
        let string_bytes = u32::try_from(strings.len()).unwrap();
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, type_bytes, type_bytes, string_bytes].iter().chain(types) {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(strings);
        bytes
    }

    const fn info(kind: u32, n_parts: u32) -> u32 {
        kind << 24 | n_parts
    }

    #[test]
    fn sizes() {
        #[rustfmt::skip]
        let types = [
            1, info(1, 0), 4, 32,          // 1: int
            0, info(3, 0), 0, 1, 1, 6,     // 2: int[6]
            0, info(10, 0), 2,             // 3: const int[6]
            0, info(3, 0), 0, 3, 1, 2,     // 4: (const int[6])[2]
            0, info(2, 0), 99,             // 5: pointer to nowhere
            0, info(8, 0), 7,              // 6: typedef of 7
            0, info(8, 0), 6,              // 7: typedef of 6
            0, info(3, 0), 0, 8, 1, 1,     // 8: array of itself
            0, info(3, 0), 0, 4, 1, 1 << 31, // 9: too large
            0, info(12, 0), 0,             // 10: a function
        ];
        let bytes = section(&types, b"\0int\0");
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.get(1).unwrap().name, "int");
        let sizes: Vec<_> = (1..=5).map(|id| btf.size_bytes(id).unwrap()).collect();
        assert_eq!(sizes, [4, 24, 24, 48, 8]);
        assert_eq!(btf.size_bytes(6), Err(BtfError::BadType { type_id: 6 }));
        assert_eq!(btf.size_bytes(8), Err(BtfError::BadType { type_id: 8 }));
        for id in [9, 10, 0] {
            assert_eq!(btf.size_bytes(id), Err(BtfError::NoSize { type_id: id }));
        }
        assert_eq!(btf.size_bytes(99), Err(BtfError::BadType { type_id: 99 }));
    }

    #[test]
    fn damaged_sections() {
        let check = |bytes: &[u8], expect: BtfError| {
            assert_eq!(Btf::parse(bytes).map(|_| ()), Err(expect));
        };
        check(b"", BtfError::CutOff { what: "the header" });
        check(&[0; 24], BtfError::BadHeader { magic: 0, version: 0 });
        check(
            &section(&[0, info(31, 0), 0], b"\0"),
            BtfError::UnknownKind { type_id: 1, kind: 31 },
        );
        check(&section(&[0, info(4, 9), 0], b"\0"), BtfError::CutOff { what: "a type" });
        check(&section(&[7, info(8, 0), 0], b"\0"), BtfError::BadString { offset: 7 });
        check(&section(&[0, info(8, 0), 0], b"a"), BtfError::BadString { offset: 0 });
        let good = section(&[0, info(8, 0), 0], b"\0");
        for len in 0..good.len() {
            assert!(Btf::parse(&good[..len]).is_err(), "{len}");
        }
    }
}
