//! Random signatures. Start at [`source`].

use std::collections::HashSet;

use crate::rng::Rng;
use crate::types::{
    Class, Layout, LeafKind, Member, MemberShape, Part, Record, Register, Special, Type,
};

/// Words of arguments that a function takes at most.
const MAX_WORDS: usize = 120;
/// Bytes of a record that is passed by value at most.
const MAX_RECORD_BYTES: usize = 64;

/// A source language.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    C,
    Cpp,
}

/// What the sources of a build may use.
#[derive(Clone, Copy, Debug)]
pub struct Dialect {
    pub language: Language,
    /// gcc's nested functions.
    pub has_nested: bool,
    /// LLVM passes half of one in the last register, and `va_arg` takes it from the stack.
    pub has_variadic_int128: bool,
    /// See [`Record::as_clang`].
    pub as_clang: bool,
    /// Bytes of the largest vector that comes in one register.
    pub vector_bytes: usize,
}

/// How a function is declared and called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Called through the thunk that fills every register.
    Global,
    /// C++, with `this`; through the thunk.
    Method,
    /// C++, a static member function; through the thunk.
    StaticMethod,
    /// With `...`; through the thunk.
    Variadic,
    /// A local function, called directly by a caller that keeps as many values as there are
    /// registers: gcc's -fipa-ra leaves them where the function does not write.
    Local,
    /// A nested function of gcc, which finds its parent's frame through r10.
    Nested,
}

impl Form {
    /// Whether the thunk stands between caller and function.
    pub fn has_thunk(self) -> bool {
        self.is_external()
    }

    /// Whether other sources could call it, so that it has to be called as the ABI says.
    pub fn is_external(self) -> bool {
        !matches!(self, Self::Local | Self::Nested)
    }
}

/// How a parameter takes its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Value,
    Reference,
    ConstReference,
    RvalueReference,
}

/// A parameter.
#[derive(Clone, Debug)]
pub struct Param {
    pub ty: Type,
    pub mode: Mode,
}

impl Param {
    /// Whether what is passed is an address.
    pub fn is_address(&self) -> bool {
        self.mode != Mode::Value || self.ty.class == Class::ByAddress
    }

    /// Its `ctx` slots.
    pub fn n_words(&self) -> usize {
        if self.is_address() { 1 } else { self.ty.n_words() }
    }

    /// As it is declared.
    pub fn spelling(&self) -> String {
        let name = &self.ty.spelling;
        match self.mode {
            Mode::Value => name.clone(),
            Mode::Reference => format!("{name} &"),
            Mode::ConstReference => format!("{name} const &"),
            Mode::RvalueReference => format!("{name} &&"),
        }
    }
}

/// A function of the matrix.
#[derive(Clone, Debug)]
pub struct Function {
    pub index: usize,
    pub form: Form,
    pub ret: Option<Type>,
    pub params: Vec<Param>,
    /// What a call passes for `...`.
    pub varargs: Vec<Type>,
}

impl Function {
    /// Its name in the source.
    pub fn name(&self) -> String {
        format!("f_{:03}", self.index)
    }

    /// What makes it another signature, whatever the names.
    pub fn identity(&self) -> String {
        let params: Vec<String> =
            self.params.iter().map(|p| format!("{:?} {}", p.mode, p.ty.identity)).collect();
        let ret = self.ret.as_ref().map_or("void", |ty| &ty.identity);
        let dots: Vec<&str> = self.varargs.iter().map(|ty| ty.identity.as_str()).collect();
        format!("{:?} {ret}({})({})", self.form, params.join(", "), dots.join(", "))
    }

    /// All types that its declaration and its calls use.
    pub fn types(&self) -> impl Iterator<Item = &Type> {
        let params = self.params.iter().map(|p| &p.ty);
        self.ret.iter().chain(params).chain(&self.varargs)
    }
}

/// What one source holds.
#[derive(Clone, Debug)]
pub struct Source {
    /// Definitions in order.
    pub types: Vec<Type>,
    pub functions: Vec<Function>,
}

/// A source of `n_functions` functions, no signature of which is among `seen` or comes twice.
pub fn source(
    rng: &mut Rng,
    dialect: Dialect,
    n_functions: usize,
    seen: &mut HashSet<String>,
) -> Source {
    let mut types = basic_types(dialect);
    for i in 0..24 {
        let record = loop {
            let record = record(rng, dialect, &types, i).finish();
            if record.size <= MAX_RECORD_BYTES {
                break record;
            }
        };
        types.push(record);
    }
    let mut functions = Vec::new();
    while functions.len() < n_functions {
        let function = function(rng, dialect, &types, functions.len());
        if seen.insert(function.identity()) {
            functions.push(function);
        }
    }
    Source { types, functions }
}

fn function(rng: &mut Rng, dialect: Dialect, types: &[Type], index: usize) -> Function {
    let form = form(rng, dialect);
    let ret = (!rng.chance(15)).then(|| some_type(rng, types));
    let n_params = match rng.below(10) {
        0..6 => rng.below(7),
        6..9 => rng.below(13),
        _ => rng.below(21),
    };
    let mut params: Vec<Param> = Vec::new();
    // Before `...` there has to be one, of a type that a call does not widen.
    let n_params = if form == Form::Variadic { n_params.clamp(1, 7) } else { n_params };
    while params.len() < n_params {
        let param = Param { ty: some_type(rng, types), mode: mode(rng, dialect) };
        let n_words: usize = params.iter().map(Param::n_words).sum();
        if n_words + param.n_words() > MAX_WORDS {
            break;
        }
        params.push(param);
    }
    let mut varargs = Vec::new();
    if form == Form::Variadic {
        params.push(Param { ty: types[0].clone(), mode: Mode::Value });
        let mut promoted = vec!["int", "unsigned", "long", "double", "long double", "void *"];
        if dialect.has_variadic_int128 {
            promoted.push("__int128");
        }
        // Vectors that the caller aligns its stack for.
        promoted.extend(["v2d", "v4d", "v8d"]);
        let promoted: Vec<&Type> =
            types.iter().filter(|ty| promoted.contains(&ty.spelling.as_str())).collect();
        varargs = (0..rng.below(15)).map(|_| (*rng.pick(&promoted)).clone()).collect();
    }
    Function { index, form, ret, params, varargs }
}

fn form(rng: &mut Rng, dialect: Dialect) -> Form {
    let percent = rng.below(100);
    match dialect.language {
        _ if percent < 12 => Form::Local,
        _ if percent < 20 => Form::Variadic,
        Language::C if percent < 28 && dialect.has_nested => Form::Nested,
        Language::Cpp if percent < 45 => Form::Method,
        Language::Cpp if percent < 53 => Form::StaticMethod,
        _ => Form::Global,
    }
}

fn mode(rng: &mut Rng, dialect: Dialect) -> Mode {
    if dialect.language == Language::C || !rng.chance(14) {
        return Mode::Value;
    }
    *rng.pick(&[Mode::Reference, Mode::ConstReference, Mode::RvalueReference])
}

/// Half of the time a record.
fn some_type(rng: &mut Rng, types: &[Type]) -> Type {
    let wants_record = rng.chance(50);
    loop {
        let ty = rng.pick(types);
        if (ty.class == Class::Scalar) != wants_record {
            return ty.clone();
        }
    }
}

/// What the language has; the first is `int`.
fn basic_types(dialect: Dialect) -> Vec<Type> {
    use LeafKind::{Bits, Bool, Float};
    let int = |name: &str, size: usize| Type::scalar(name, size, &[Bits(8 * size)]);
    let mut types = vec![int("int", 4), int("long", 8), int("unsigned", 4)];
    for (name, size) in [
        ("char", 1),
        ("signed char", 1),
        ("unsigned char", 1),
        ("short", 2),
        ("unsigned short", 2),
        ("unsigned long", 8),
        ("long long", 8),
        ("unsigned long long", 8),
        ("__int128", 16),
        ("unsigned __int128", 16),
        ("void *", 8),
        ("const char *", 8),
        ("const double *", 8),
    ] {
        types.push(int(name, size));
    }
    let mut callback = int("callback", 8);
    callback.definition = Some("typedef int (*callback)(long, double);".to_owned());
    let mut color = int("enum color", 4);
    color.definition = Some("enum color { RED = -1, GREEN = 7 };".to_owned());
    let bool_name = if dialect.language == Language::C { "_Bool" } else { "bool" };
    types.extend([callback, color, Type::scalar(bool_name, 1, &[Bool])]);
    for (name, size) in [("float", 4), ("double", 8), ("long double", 16)] {
        types.push(Type::scalar(name, size, &[Float(size)]));
        types.push(Type::scalar(&format!("_Complex {name}"), 2 * size, &[Float(size); 2]));
    }
    types.push(int("__float128", 16).in_vector_register());
    if dialect.language == Language::Cpp {
        types.extend(cpp_types());
    }
    types.extend(vectors(dialect.vector_bytes));
    types
}

fn cpp_types() -> Vec<Type> {
    let defined = |name: &str, size: usize, n_words: usize, definition: &str| {
        let mut ty = Type::scalar(name, size, &vec![LeafKind::Bits(8 * size / n_words); n_words]);
        ty.align = size / n_words;
        ty.definition = Some(definition.to_owned());
        ty
    };
    let mut pair = defined(
        "pair_of",
        16,
        1,
        "template <class A, class B> struct pair { A first; B second; };\n\
         typedef pair<long, double> pair_of;",
    );
    (pair.align, pair.class) = (8, Class::Record);
    let (n_bits, align_bits) = (64, 64);
    pair.parts = vec![
        Part { n_bits, align_bits, ..pair.parts[0] },
        Part { first_bit: 64, n_bits, align_bits, register: Register::Vector },
    ];
    vec![
        defined("small", 1, 1, "enum class small : unsigned char { ONE = 1 };"),
        defined("large", 8, 1, "enum class large : long long { ONE = 1 };"),
        defined("char16_t", 2, 1, ""),
        defined("wchar_t", 4, 1, ""),
        defined("to_member", 8, 1, "struct host;\ntypedef int host::*to_member;"),
        defined("to_method", 16, 2, "typedef int (host::*to_method)(int);"),
        pair,
    ]
}

fn vectors(largest: usize) -> Vec<Type> {
    use LeafKind::{Bits, Float};
    let mut types = vec![Type::vector("v2f", "float", Float(4), 2)];
    for size in [16, 32, 64].into_iter().filter(|size| *size <= largest) {
        types.push(Type::vector(&format!("v{}f", size / 4), "float", Float(4), size / 4));
        types.push(Type::vector(&format!("v{}d", size / 8), "double", Float(8), size / 8));
        types.push(Type::vector(&format!("v{}i", size / 4), "int", Bits(32), size / 4));
    }
    types
}

fn record(rng: &mut Rng, dialect: Dialect, types: &[Type], index: usize) -> Record {
    let is_cpp = dialect.language == Language::Cpp;
    let is_union = rng.chance(15);
    let n_members = if rng.chance(4) && !is_union { 0 } else { 1 + rng.below(5) };
    let layout = match rng.below(100) {
        _ if n_members == 0 => Layout::Plain,
        0..10 => Layout::Packed,
        10..14 => Layout::Aligned(16),
        14..18 => Layout::Aligned(32),
        _ => Layout::Plain,
    };
    let mut special = Special::None;
    let mut base = None;
    if is_cpp && !is_union && layout != Layout::Packed {
        special = special_of(rng);
        base = rng.chance(15).then(|| base_of(rng, types)).flatten();
    }
    let small = rng.chance(60);
    let members = (0..n_members).map(|_| member(rng, types, layout, small, is_union)).collect();
    Record {
        name: format!("r{index}"),
        is_union,
        layout,
        special,
        base,
        members,
        is_cpp,
        as_clang: dialect.as_clang,
    }
}

fn special_of(rng: &mut Rng) -> Special {
    match rng.below(100) {
        0..6 => Special::Destructor,
        6..10 => Special::DestructorOutside,
        10..14 => Special::Copy,
        14..17 => Special::Virtual,
        17..25 => Special::DefaultedInside,
        _ => Special::None,
    }
}

/// A plain struct: C++ puts members of a derived class into the tail of any other kind.
fn base_of(rng: &mut Rng, types: &[Type]) -> Option<Type> {
    let plain: Vec<&Type> = types.iter().filter(|ty| ty.is_flat).collect();
    (!plain.is_empty()).then(|| (*rng.pick(&plain)).clone())
}

/// A member; `small` ones make records that fit registers.
fn member(rng: &mut Rng, types: &[Type], layout: Layout, small: bool, in_union: bool) -> Member {
    if rng.chance(15) && !in_union {
        let units = ["int", "unsigned", "long", "unsigned long", "unsigned char", "short"];
        let units: Vec<&Type> =
            types.iter().filter(|ty| units.contains(&ty.spelling.as_str())).collect();
        let ty = (*rng.pick(&units)).clone();
        let n_bits = 1 + rng.below(8 * ty.size);
        return Member { ty, shape: MemberShape::BitField(n_bits) };
    }
    let ty = loop {
        let ty = rng.pick(types);
        // gcc itself loses half of a union of `__float128` and a wider vector.
        let fits = (!small || ty.size <= 8) && !(in_union && ty.spelling == "__float128");
        // Members with copying of their own would make a union's copying deleted, and gcc
        // does not pack classes.
        let is_plain = match ty.class {
            Class::Scalar => true,
            Class::Record => layout != Layout::Packed || ty.is_flat,
            Class::ByAddress => layout != Layout::Packed && !in_union,
        };
        if fits && is_plain && ty.size > 0 {
            break ty.clone();
        }
    };
    let is_short = !small || ty.size <= 4;
    if rng.chance(20) && is_short && ty.size <= 16 {
        let n = 1 + rng.below(if small { 3 } else { 4 });
        // `void (*)()` and `int host::*` are typedefs or end in `*`: an array needs no more.
        return Member { ty, shape: MemberShape::Array(n) };
    }
    Member { ty, shape: MemberShape::Plain }
}
