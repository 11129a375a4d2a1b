//! C and C++ types as this test knows them: its own account of sizes, places of members and
//! meaningful bits, which the emitted sources assert and nothing of Flea's is asked for.

use crate::rng::Rng;

/// A type.
#[derive(Clone, Debug)]
pub struct Type {
    /// How it is written before a name.
    pub spelling: String,
    /// How it is defined, for what has no name of its own in the language.
    pub definition: Option<String>,
    /// The same for the same type in another source: names of records are replaced by what is
    /// in them.
    pub identity: String,
    /// `sizeof`
    pub size: usize,
    /// `_Alignof`
    pub align: usize,
    /// What in its bytes means something; of a union, one member's.
    pub leaves: Vec<Leaf>,
    /// What decides where it is passed and returned; of a union, all members'.
    pub parts: Vec<Part>,
    /// What kind of type, in wide terms.
    pub class: Class,
    /// The largest vector in it, in bytes.
    pub vector: usize,
    /// A struct of scalars without anything special: what C++ calls plain old data.
    pub is_flat: bool,
}

/// What decides how values of a type are handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Integers, pointers, floating point, vectors.
    Scalar,
    /// A struct, union or class that may be copied bytewise.
    Record,
    /// A class that is passed by invisible reference.
    ByAddress,
}

/// Some meaningful bits.
#[derive(Clone, Copy, Debug)]
pub struct Leaf {
    pub first_bit: usize,
    pub kind: LeafKind,
}

/// A scalar in a type.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub first_bit: usize,
    pub n_bits: usize,
    /// What it should be aligned to, in bits; 1 for bit-fields.
    pub align_bits: usize,
    pub register: Register,
}

/// The kind of register that a scalar belongs into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    General,
    Vector,
    X87,
}

/// The class of an eightbyte (psABI, "Parameter Passing").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Eightbyte {
    None,
    Integer,
    Sse,
    SseUp,
    X87,
    X87Up,
    Memory,
}

/// What those bits may be.
#[derive(Clone, Copy, Debug)]
pub enum LeafKind {
    /// Any value of this many bits.
    Bits(usize),
    /// 0 or 1 in a byte.
    Bool,
    /// A float, double, long double that nothing would change in passing.
    Float(usize),
}

impl LeafKind {
    fn n_bits(self) -> usize {
        match self {
            Self::Bits(n) => n,
            Self::Bool => 8,
            Self::Float(16) => 80,
            Self::Float(bytes) => 8 * bytes,
        }
    }
}

impl Type {
    /// One that the language has.
    pub fn scalar(spelling: &str, size: usize, leaves: &[LeafKind]) -> Self {
        let stride = size / leaves.len().max(1);
        let leaves: Vec<Leaf> =
            (0..).zip(leaves).map(|(i, &kind)| Leaf { first_bit: 8 * stride * i, kind }).collect();
        let align = if leaves.len() == 2 { stride } else { size };
        let part = |leaf: &Leaf| Part {
            first_bit: leaf.first_bit,
            n_bits: 8 * stride,
            align_bits: 8 * align,
            register: match leaf.kind {
                LeafKind::Bits(_) | LeafKind::Bool => Register::General,
                LeafKind::Float(16) => Register::X87,
                LeafKind::Float(_) => Register::Vector,
            },
        };
        Self {
            parts: leaves.iter().map(part).collect(),
            spelling: spelling.to_owned(),
            definition: None,
            identity: spelling.to_owned(),
            size,
            align,
            leaves,
            class: Class::Scalar,
            vector: 0,
            is_flat: false,
        }
    }

    /// A vector of `n` elements.
    pub fn vector(name: &str, element: &str, kind: LeafKind, n: usize) -> Self {
        let size = kind.n_bits() / 8 * n;
        let mut ty = Self::scalar(name, size, &vec![kind; n]);
        ty.definition = Some(format!(
            "typedef {element} {name} __attribute__((vector_size({size}), aligned({size})));"
        ));
        ty.align = size;
        ty.vector = size;
        ty.in_vector_register()
    }

    /// One scalar for a vector register.
    pub fn in_vector_register(mut self) -> Self {
        let (n_bits, align_bits) = (8 * self.size, 8 * self.align);
        self.parts = vec![Part { first_bit: 0, n_bits, align_bits, register: Register::Vector }];
        self
    }

    /// A one for each bit that means something.
    pub fn mask(&self) -> Vec<u8> {
        let mut mask = vec![0; self.size];
        for leaf in &self.leaves {
            for bit in leaf.first_bit..leaf.first_bit + leaf.kind.n_bits() {
                mask[bit / 8] |= 1 << (bit % 8);
            }
        }
        mask
    }

    /// A random value; its padding is random too.
    pub fn value(&self, rng: &mut Rng) -> Vec<u8> {
        let mut bytes = rng.bytes(self.size);
        for leaf in &self.leaves {
            let at = leaf.first_bit / 8;
            match leaf.kind {
                LeafKind::Bits(_) => {}
                LeafKind::Bool => bytes[at] &= 1,
                LeafKind::Float(4) => bytes[at + 3] = bytes[at + 3] & 0xbf | 0x20,
                LeafKind::Float(8) => bytes[at + 7] = bytes[at + 7] & 0xbf | 0x20,
                LeafKind::Float(_) => {
                    bytes[at + 7] |= 0x80;
                    bytes[at + 9] = bytes[at + 9] & 0xbf | 0x20;
                }
            }
        }
        bytes
    }

    /// How many eightbytes it has.
    pub fn n_words(&self) -> usize {
        self.size.div_ceil(8)
    }

    /// The classes of its eightbytes; `None` for what is in memory, whatever is free.
    pub fn classes(&self) -> Option<Vec<Eightbyte>> {
        use Eightbyte::{Memory, None as Nothing, Sse, SseUp, X87, X87Up};
        if self.class == Class::ByAddress {
            return None;
        }
        let mut classes = vec![Nothing; self.n_words()];
        for part in &self.parts {
            if !part.first_bit.is_multiple_of(part.align_bits) {
                return None;
            }
            let first = part.first_bit / 64;
            let last = (part.first_bit + part.n_bits - 1) / 64;
            for (i, class) in classes[first..=last].iter_mut().enumerate() {
                *class = merged(*class, part.register.class(i));
            }
        }
        for i in 0..classes.len() {
            let before = i.checked_sub(1).map(|i| classes[i]);
            match classes[i] {
                X87Up if before != Some(X87) => return None,
                SseUp if !matches!(before, Some(Sse | SseUp)) => classes[i] = Sse,
                _ => {}
            }
        }
        let one_vector =
            classes.first() == Some(&Sse) && classes[1..].iter().all(|class| *class == SseUp);
        let fits = classes.len() <= 2 || one_vector;
        (fits && !classes.contains(&Memory)).then_some(classes)
    }

    /// Whether a result of this type is in memory that the caller provides.
    pub fn is_returned_in_memory(&self) -> bool {
        // Two x87 registers take a complex one, and no other type.
        self.spelling != "_Complex long double" && self.classes().is_none()
    }
}

impl Register {
    /// The class of the n-th eightbyte of a scalar for such a register.
    fn class(self, n: usize) -> Eightbyte {
        match (self, n) {
            (Self::General, _) => Eightbyte::Integer,
            (Self::Vector, 0) => Eightbyte::Sse,
            (Self::Vector, _) => Eightbyte::SseUp,
            (Self::X87, 0) => Eightbyte::X87,
            (Self::X87, _) => Eightbyte::X87Up,
        }
    }
}

fn merged(a: Eightbyte, b: Eightbyte) -> Eightbyte {
    use Eightbyte::{Integer, Memory, None as Nothing, Sse, X87, X87Up};
    match (a, b) {
        _ if a == b => a,
        (Nothing, other) | (other, Nothing) => other,
        (Memory, _) | (_, Memory) => Memory,
        (Integer, _) | (_, Integer) => Integer,
        (X87 | X87Up, _) | (_, X87 | X87Up) => Memory,
        _ => Sse,
    }
}

/// A member of a record.
#[derive(Clone, Debug)]
pub struct Member {
    pub ty: Type,
    pub shape: MemberShape,
}

/// How often or how much of its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberShape {
    Plain,
    Array(usize),
    BitField(usize),
}

impl Member {
    fn text(&self, name: &str) -> String {
        let spelling = &self.ty.spelling;
        match self.shape {
            MemberShape::Plain => format!("{spelling} {name};"),
            MemberShape::Array(n) => format!("{spelling} {name}[{n}];"),
            MemberShape::BitField(bits) => format!("{spelling} {name} : {bits};"),
        }
    }

    fn identity(&self) -> String {
        format!("{}{:?}", self.ty.identity, self.shape)
    }
}

/// What else a record's definition says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Plain,
    Packed,
    /// `aligned(n)`
    Aligned(usize),
}

/// What C++ adds to a class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    None,
    /// All of copying defaulted inside the class: passed as its members are.
    DefaultedInside,
    /// A destructor of its own.
    Destructor,
    /// A destructor that is defaulted outside the class, which makes it one of its own.
    DestructorOutside,
    /// A copy constructor of its own.
    Copy,
    /// A virtual function.
    Virtual,
}

impl Special {
    fn is_by_address(self) -> bool {
        !matches!(self, Self::None | Self::DefaultedInside)
    }

    fn text(self, name: &str) -> String {
        match self {
            Self::None => String::new(),
            Self::DefaultedInside => {
                format!(
                    " {name}() = default; {name}(const {name} &) = default; ~{name}() = default;"
                )
            }
            Self::Destructor => format!(" ~{name}() {{ matrix_destroyed++; }}"),
            Self::DestructorOutside => format!(" {name}() = default; ~{name}();"),
            Self::Copy => format!(
                " {name}() {{}} {name}(const {name} &o) \
                 {{ __builtin_memcpy((void *)this, &o, sizeof *this); }}"
            ),
            Self::Virtual => format!(" virtual int ask_{name}() {{ return 1; }}"),
        }
    }
}

/// A struct, union or class in the making.
#[derive(Clone, Debug)]
pub struct Record {
    pub name: String,
    pub is_union: bool,
    pub layout: Layout,
    pub special: Special,
    /// C++: derived from this one.
    pub base: Option<Type>,
    pub members: Vec<Member>,
    pub is_cpp: bool,
    /// As clang classifies: a record out of its alignment makes what it is in go to memory,
    /// whatever it consists of, and an array that is too large for two registers is left out.
    pub as_clang: bool,
}

/// Where the next member goes.
struct Cursor {
    bit: usize,
    size: usize,
    align: usize,
    leaves: Vec<Leaf>,
    parts: Vec<Part>,
}

impl Record {
    /// Lays it out (System V ABI, "Aggregates and Unions" and "Bit-Fields").
    pub fn finish(self) -> Type {
        let mut at = Cursor { bit: 0, size: 0, align: 1, leaves: Vec::new(), parts: Vec::new() };
        if self.special == Special::Virtual {
            // The pointer to the table of virtual functions is nobody's value.
            (at.bit, at.align) = (64, 8);
        }
        if let Some(base) = self.base.as_ref().filter(|base| !base.leaves.is_empty()) {
            self.place(&mut at, &Member { ty: base.clone(), shape: MemberShape::Plain });
        }
        for member in &self.members {
            if self.is_union {
                // One member is active: the one with most of what means something.
                let leaves = std::mem::take(&mut at.leaves);
                at.bit = 0;
                self.place(&mut at, member);
                let n_bits = |l: &[Leaf]| l.iter().map(|leaf| leaf.kind.n_bits()).sum::<usize>();
                if n_bits(&leaves) >= n_bits(&at.leaves) {
                    at.leaves = leaves;
                }
            } else {
                self.place(&mut at, member);
            }
        }
        if let Layout::Aligned(n) = self.layout {
            at.align = at.align.max(n);
        }
        let mut size = at.size.max(at.bit.div_ceil(8)).next_multiple_of(at.align);
        if size == 0 && self.is_cpp {
            size = 1;
        }
        self.described(size, at)
    }

    fn place(&self, at: &mut Cursor, member: &Member) {
        let ty = &member.ty;
        let packed = self.layout == Layout::Packed;
        let align = if packed { 1 } else { ty.align };
        if let MemberShape::BitField(n_bits) = member.shape {
            let unit = 8 * ty.size;
            if !packed && at.bit / unit != (at.bit + n_bits - 1) / unit {
                at.bit = at.bit.next_multiple_of(unit);
            }
            at.leaves.push(Leaf { first_bit: at.bit, kind: LeafKind::Bits(n_bits) });
            let (first_bit, register) = (at.bit, Register::General);
            at.parts.push(Part { first_bit, n_bits, align_bits: 1, register });
            at.bit += n_bits;
        } else {
            let n = if let MemberShape::Array(n) = member.shape { n } else { 1 };
            at.bit = at.bit.next_multiple_of(8 * align);
            for _ in 0..n {
                let first = at.bit;
                let (n_bits, align_bits) = (8 * ty.size, 8 * ty.align);
                if self.as_clang && !first.is_multiple_of(align_bits) {
                    let register = Register::General;
                    at.parts.push(Part { first_bit: first, n_bits, align_bits, register });
                }
                let leaves = ty.leaves.iter();
                at.leaves.extend(leaves.map(|l| Leaf { first_bit: l.first_bit + first, ..*l }));
                if !(self.as_clang && n > 1 && n * ty.size > 16) {
                    let parts = ty.parts.iter();
                    at.parts.extend(parts.map(|p| Part { first_bit: p.first_bit + first, ..*p }));
                }
                at.bit += 8 * ty.size;
            }
        }
        at.align = at.align.max(align);
        at.size = at.size.max(at.bit.div_ceil(8));
    }

    fn described(self, size: usize, at: Cursor) -> Type {
        let keyword = if self.is_union { "union" } else { "struct" };
        let spelling =
            if self.is_cpp { self.name.clone() } else { format!("{keyword} {}", self.name) };
        let attributes = match self.layout {
            Layout::Plain => String::new(),
            Layout::Packed => " __attribute__((packed))".to_owned(),
            Layout::Aligned(n) => format!(" __attribute__((aligned({n})))"),
        };
        let members: Vec<String> =
            self.members.iter().enumerate().map(|(i, m)| m.text(&format!("m{i}"))).collect();
        let base = self.base.as_ref().map(|b| format!(" : {}", b.spelling)).unwrap_or_default();
        let mut definition = format!(
            "{keyword}{attributes} {}{base} {{ {}{} }};",
            self.name,
            members.join(" "),
            self.special.text(&self.name),
        );
        if self.special == Special::DestructorOutside {
            definition += &format!(" {0}::~{0}() = default;", self.name);
        }
        let identities: Vec<String> = self.members.iter().map(Member::identity).collect();
        let inherited = self.base.as_ref().map(|b| b.identity.clone()).unwrap_or_default();
        let by_address = self.special.is_by_address()
            || self.members.iter().any(|m| m.ty.class == Class::ByAddress);
        let is_flat = !self.is_union
            && self.layout == Layout::Plain
            && self.base.is_none()
            && self.special == Special::None
            && self.members.iter().all(|m| m.ty.class == Class::Scalar);
        let inside = self.members.iter().map(|m| &m.ty).chain(&self.base);
        let vector = inside.map(|ty| ty.vector).max().unwrap_or(0);
        Type {
            identity: format!(
                "{keyword}{attributes}:{inherited}{{{}}}{:?}",
                identities.join(","),
                self.special
            ),
            spelling,
            definition: Some(definition),
            size,
            align: at.align,
            leaves: at.leaves,
            parts: at.parts,
            class: if by_address { Class::ByAddress } else { Class::Record },
            vector,
            is_flat,
        }
    }
}
