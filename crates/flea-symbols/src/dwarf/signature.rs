//! A function's signature out of its subprogram DIE. Start at [`read`].
//!
//! `None` wherever the code may not follow what the source says: clones with other
//! parameters, languages with an ABI of their own, types that are incomplete. A wrong
//! signature would be worse than none.

use gimli::{AttributeValue, Expression, Operation, constants as dw};

use super::dies::{Die, Dies, File, is_c};
use super::types::Shape;
use super::{Dwarf, Slice, Subprogram};
use crate::addr::Svma;
use crate::signature::{
    ArgWord, Param, RetWord, Return, Signature, SignatureSource, StackWords, Type,
};
use crate::x86_64::classify::{Places, Returned, returned};

/// Names of parts and clones whose parameters the compiler has changed.
const CHANGED: [&str; 4] = ["isra", "constprop", "part", "cold"];

/// The signature of `subprogram`, whose symbol is `symbol`.
pub(crate) fn read(dwarf: &Dwarf<'_>, subprogram: &Subprogram, symbol: &str) -> Option<Signature> {
    if !subprogram.unit_has_parameters {
        return None;
    }
    if symbol.split('.').skip(1).any(|suffix| CHANGED.contains(&suffix)) {
        return None;
    }
    let dies = Dies::new(dwarf);
    let die = dies.at(File::Main, subprogram.unit, subprogram.die)?;
    if let Some((owner, _)) = dies.inherited(&die, dw::DW_AT_calling_convention)
        && dies.number(&owner, dw::DW_AT_calling_convention) != Some(1)
    {
        return None; // DW_CC_nocall (changed by LLVM), or another ABI
    }
    let root = dies.root(&die)?;
    // Link-time optimisation leaves the language to the unit that the function came from.
    let origin = dies.follow(&die, dw::DW_AT_abstract_origin);
    let language = origin
        .and_then(|origin| dies.root(&origin))
        .and_then(|root| dies.language(&root))
        .or_else(|| dies.language(&root))?;
    let reader = Reader {
        is_llvm: dies.inherited_text(&root, dw::DW_AT_producer).is_some_and(|producer| {
            ["clang", "rustc", "LLVM"].iter().any(|p| producer.contains(p))
        }),
        dies,
        entry: subprogram.address,
    };
    if is_c(language) || is_cpp(language) {
        reader.c_signature(&die, is_c(language))
    } else if language == dw::DW_LANG_Rust {
        reader.rust_signature(&die)
    } else {
        None
    }
}

/// The name that a symbol table would have.
pub(crate) fn linkage_name(dies: &Dies<'_>, subprogram: &Subprogram) -> Option<String> {
    let die = dies.at(File::Main, subprogram.unit, subprogram.die)?;
    dies.inherited_text(&die, dw::DW_AT_linkage_name).or_else(|| dies.name(&die))
}

fn is_cpp(language: gimli::DwLang) -> bool {
    matches!(
        language,
        dw::DW_LANG_C_plus_plus
            | dw::DW_LANG_C_plus_plus_03
            | dw::DW_LANG_C_plus_plus_11
            | dw::DW_LANG_C_plus_plus_14
            | dw::DW_LANG_C_plus_plus_17
            | dw::DW_LANG_C_plus_plus_20
            | dw::DW_LANG_ObjC
            | dw::DW_LANG_ObjC_plus_plus
    )
}

struct Reader<'a> {
    dies: Dies<'a>,
    is_llvm: bool,
    entry: Svma,
}

impl<'a> Reader<'a> {
    fn c_signature(&self, die: &Die<'a>, is_c: bool) -> Option<Signature> {
        let (params, variadic) = self.params(die)?;
        let (ret_type, ret_shape) = self.dies.type_of(die)?;
        let mut places = Places::default();
        let ret = match returned(&ret_shape).ok()? {
            Returned::Words(words) => Return { ty: ret_type, words },
            Returned::Memory => {
                places.skip_gpr();
                Return { ty: ret_type, words: vec![RetWord::Rax] }
            }
        };
        let prototyped = self.dies.inherited(die, dw::DW_AT_prototyped).is_some();
        let mut found = Vec::new();
        for param in &params {
            let (ty, shape) = self.dies.type_of(param)?;
            if is_c && !prototyped && matches!(shape, Shape::Float(_)) {
                return None; // an old-style definition: a float comes as a double
            }
            let words = places.next(&shape).ok()?;
            let on_stack = matches!(words.first(), Some(ArgWord::Stack(_)));
            if self.is_llvm && on_stack && shape == Shape::Integer(16) {
                return None; // its alignment differs among LLVM's versions
            }
            if !self.agrees(param, &words) {
                return None;
            }
            found.push(Param { name: self.dies.name(param), ty, words });
        }
        Some(Signature {
            params: found,
            ret,
            variadic,
            stack_words: StackWords::Known(places.stack_words()),
            stack_align_bytes: places.stack_align_bytes(),
            source: SignatureSource::Dwarf,
        })
    }

    /// Rust's own ABI is not written down. Scalars, pointers and pairs with a pointer first
    /// (slices, `&str`, `&dyn`) go where C would put their words one by one; anything else is
    /// not told.
    fn rust_signature(&self, die: &Die<'a>) -> Option<Signature> {
        let (params, variadic) = self.params(die)?;
        let (ty, shape) = self.dies.type_of(die)?;
        let words = match &shape {
            Shape::Void => vec![],
            Shape::Integer(1..=8) => vec![RetWord::Rax],
            Shape::Float(4 | 8) => vec![RetWord::Xmm0],
            _ if shape.size() == 0 => vec![],
            _ if is_wide_pointer(&ty, &shape) => vec![RetWord::Rax, RetWord::Rdx],
            _ => return None,
        };
        let mut places = Places::default();
        let mut found = Vec::new();
        for param in &params {
            let (ty, shape) = self.dies.type_of(param)?;
            let words = match &shape {
                Shape::Integer(1..=8) | Shape::Float(4 | 8) => places.next(&shape).ok()?,
                _ if shape.size() == 0 => vec![],
                _ if is_wide_pointer(&ty, &shape) => {
                    vec![places.integer().ok()?, places.integer().ok()?]
                }
                _ => return None,
            };
            if !self.agrees(param, &words) {
                return None;
            }
            found.push(Param { name: self.dies.name(param), ty, words });
        }
        Some(Signature {
            params: found,
            ret: Return { ty, words },
            variadic,
            stack_words: StackWords::Known(places.stack_words()),
            stack_align_bytes: places.stack_align_bytes(),
            source: SignatureSource::Dwarf,
        })
    }

    /// The formal parameters, and whether `...` follows. `None` where the code's list is not
    /// the source's.
    fn params(&self, die: &Die<'a>) -> Option<(Vec<Die<'a>>, bool)> {
        let list = |die: &Die<'a>| {
            let (mut params, mut variadic) = (Vec::new(), false);
            for child in self.dies.children(die) {
                match child.entry.tag() {
                    dw::DW_TAG_formal_parameter => params.push(child),
                    dw::DW_TAG_unspecified_parameters => variadic = true,
                    _ => {}
                }
            }
            (params, variadic)
        };
        let (params, mut variadic) = list(die);
        for origin in [dw::DW_AT_abstract_origin, dw::DW_AT_specification] {
            if let Some(origin) = self.dies.follow(die, origin) {
                let (of_origin, dots) = list(&origin);
                if of_origin.len() != params.len() {
                    return None;
                }
                variadic |= dots;
            }
        }
        let hidden = |param: &Die<'a>| {
            self.dies.name(param).is_some_and(|name| name.starts_with("__in_chrg"))
        };
        (!params.iter().any(hidden)).then_some((params, variadic))
    }

    /// Whether DWARF's own place for the parameter at the function's first instruction, where
    /// it states a register, is the one that the ABI gives. If not, the compiler has changed
    /// the function's parameters without saying so.
    fn agrees(&self, param: &Die<'a>, words: &[ArgWord]) -> bool {
        let Some(register) = self.register_at_entry(param) else {
            // LLVM drops parameters of local functions that nobody reads.
            let has_place = param.entry.attr(dw::DW_AT_location).is_some();
            return has_place || !self.is_llvm || words.is_empty();
        };
        match words {
            [ArgWord::Gpr(n)] => GPR_NUMBERS.get(usize::from(*n)) == Some(&register),
            [ArgWord::Xmm(n)] => u16::from(*n) + 17 == register,
            [] | [ArgWord::Stack(_)] => false,
            _ => true,
        }
    }

    fn register_at_entry(&self, param: &Die<'a>) -> Option<u16> {
        let dwarf = self.dies.dwarf_of(param.file)?;
        let expression: Expression<Slice<'a>> = match param.entry.attr_value(dw::DW_AT_location)? {
            AttributeValue::Exprloc(expression) => expression,
            value => {
                let mut list = dwarf.attr_locations(&param.unit, value).ok()??;
                loop {
                    let entry = list.next().ok()??;
                    if (entry.range.begin..entry.range.end).contains(&self.entry.0) {
                        break entry.data;
                    }
                }
            }
        };
        let mut operations = expression.operations(param.unit.encoding());
        match (operations.next().ok()??, operations.next().ok()?) {
            (Operation::Register { register }, None) => Some(register.0),
            _ => None,
        }
    }
}

/// DWARF's numbers of rdi, rsi, rdx, rcx, r8, r9 (psABI, "DWARF Register Number Mapping").
const GPR_NUMBERS: [u16; 6] = [5, 4, 1, 2, 8, 9];

/// `&str`, `&[T]`, `&dyn Trait`: a pointer and a word.
fn is_wide_pointer(ty: &Type, shape: &Shape) -> bool {
    let Type::Aggregate { name, size_bytes: 16 } = ty else { return false };
    let Shape::Aggregate(record) = shape else { return false };
    let words = record.fields.iter().all(|(_, field)| matches!(field, Shape::Integer(8)));
    name.starts_with('&') && record.fields.len() == 2 && words
}
