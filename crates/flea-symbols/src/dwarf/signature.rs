//! A function's signature out of its subprogram DIE. Start at [`read`].
//!
//! Where the code may not follow what the source says (clones with other parameters,
//! languages with an ABI of their own, types that are incomplete), only what DWARF states of
//! each parameter is told, and the reason for the rest. A wrong place would be worse than
//! none.

use gimli::constants as dw;

use super::dies::{Die, Dies, File, is_c};
use super::evidence::Evidence;
use super::place::{self, Place};
use super::types::Shape;
use super::{Dwarf, Subprogram, c_abi, rust_abi};
use crate::signature::{
    Absent, ArgWord, Doubt, Param, RetWord, Return, Signature, SignatureSource, StackWords, Type,
};
use crate::x86_64::classify::{Compiler, Returned, Rules, returned};
use crate::x86_64::live_in::LiveIn;

/// Clones whose parameters gcc has changed.
const CHANGED: [&str; 3] = ["isra", "constprop", "part"];
/// Of these, those whose result may be dropped or made elsewhere.
const OTHER_RESULT: [&str; 2] = ["isra", "part"];
/// Parts of functions, and of coroutines: they have the parameters of the whole only by name.
const PARTS: [&str; 5] = ["cold", "actor", "resume", "destroy", "cleanup"];
/// The first LLVM that marks functions whose parameters or result it has changed.
const LLVM_THAT_MARKS: u32 = 15;
const CC_NORMAL: u64 = 1;
const CC_NOCALL: u64 = 3;
/// DW_CC_LLVM_X86_64SysV: stated where it is the default as well.
const CC_SYSV: u64 = 0xc2;

/// What a function's code tells.
pub(crate) struct Code {
    pub(crate) live: LiveIn,
    pub(crate) stack_words: StackWords,
}

/// A function as DWARF describes it.
pub(crate) struct Function<'f> {
    pub(crate) params: Vec<Described>,
    pub(crate) variadic: bool,
    pub(crate) ret: (Type, Shape),
    pub(crate) compiler: Compiler,
    pub(crate) produced: Produced,
    pub(crate) symbol: &'f str,
    /// As the code has it.
    pub(crate) stack_words: StackWords,
    /// It may have a convention of its own, which LLVM gives to optimized functions that only
    /// their module calls.
    pub(crate) is_private: bool,
}

impl Function<'_> {
    /// The words of a result in memory: rax has its address, but not where LLVM knows all
    /// callers.
    pub(crate) fn result_in_memory(&self) -> (Vec<RetWord>, Option<Absent>) {
        if self.is_private {
            return (Vec::new(), Some(Absent::AddressNotReturned));
        }
        (vec![RetWord::Rax], None)
    }
}

/// What DW_AT_producer says besides the compiler.
pub(crate) struct Produced {
    /// How wide the vector registers are.
    pub(crate) vector_bytes: Option<u64>,
    /// 1.x of rustc.
    pub(crate) rustc_minor: Option<u32>,
}

/// A parameter as DWARF describes it.
pub(crate) struct Described {
    pub(crate) name: Option<String>,
    pub(crate) ty: Type,
    pub(crate) shape: Shape,
    pub(crate) place: Place,
}

impl Described {
    pub(crate) fn with(&self, words: Vec<ArgWord>) -> Param {
        Param { name: self.name.clone(), ty: self.ty.clone(), words, absent: None }
    }

    pub(crate) fn without(&self, absent: Absent) -> Param {
        let absent = Some(absent);
        Param { name: self.name.clone(), ty: self.ty.clone(), words: Vec::new(), absent }
    }

    /// Where DWARF states it to be, where that is a place of an argument.
    pub(crate) fn located(&self) -> Option<Param> {
        if self.shape.size() == 0 && !matches!(self.shape, Shape::Unknown { .. }) {
            return Some(self.with(Vec::new()));
        }
        Some(self.with(self.place.words(self.shape.size())?))
    }

    /// What an explanation calls it.
    pub(crate) fn label(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.ty.name().to_owned())
    }
}

/// The signature of `subprogram`, whose symbol is `symbol`.
///
/// # Errors
/// Why there is none.
pub(crate) fn read(
    dwarf: &Dwarf<'_>,
    subprogram: &Subprogram,
    symbol: &str,
    code: &Code,
) -> Result<Signature, Doubt> {
    if !subprogram.unit_has_parameters {
        return Err(Doubt::NoParameters);
    }
    let has_suffix = |suffixes: &[&str]| symbol.split('.').skip(1).any(|s| suffixes.contains(&s));
    if has_suffix(&PARTS) {
        return Err(Doubt::Parameters);
    }
    let dies = Dies::new(dwarf);
    let die = dies.at(File::Main, subprogram.unit, subprogram.die).ok_or(Doubt::NoDebugInfo)?;
    let convention = dies
        .inherited(&die, dw::DW_AT_calling_convention)
        .and_then(|(owner, _)| dies.number(&owner, dw::DW_AT_calling_convention))
        .unwrap_or(CC_NORMAL);
    if !matches!(convention, CC_NORMAL | CC_NOCALL | CC_SYSV) {
        return Err(Doubt::Convention(convention));
    }
    let language = language_of(&dies, &die).ok_or(Doubt::Language)?;
    let is_rust = language == dw::DW_LANG_Rust;
    if !is_rust && !is_c(language) && !is_cpp(language) {
        return Err(Doubt::Language);
    }
    let mut reader = Reader { dies, subprogram, code };
    let function = reader.function(&die, symbol, is_c(language))?;
    if convention == CC_NOCALL || has_suffix(&CHANGED) {
        let result_changed = convention == CC_NOCALL || has_suffix(&OTHER_RESULT);
        return reader.located(&function, result_changed);
    }
    let places: Vec<Place> = function.params.iter().map(|param| param.place.clone()).collect();
    let evidence = Evidence {
        places: &places,
        live: code.live,
        stack_words: code.stack_words,
        compiler: function.compiler,
        is_private: function.is_private,
    };
    let by_convention = if is_rust {
        rust_abi::signature(&function, &evidence)
    } else {
        c_abi::signature(&function, &evidence)
    };
    match by_convention {
        Ok(signature) if may_be_changed(&function) => {
            Ok(without_what_may_be_dropped(signature, &places))
        }
        Ok(signature) => Ok(signature),
        // The compiler has changed the parameters without saying so.
        Err(Doubt::Contradicted) => reader.located(&function, true),
        Err(doubt) => Err(doubt),
    }
}

/// Whether LLVM has compiled the subprogram; `false` where nobody says.
pub(crate) fn is_compiled_by_llvm(dwarf: &Dwarf<'_>, subprogram: &Subprogram) -> bool {
    let dies = Dies::new(dwarf);
    let die = dies.at(File::Main, subprogram.unit, subprogram.die);
    let root = die.and_then(|die| dies.root(&die));
    let producer = root.and_then(|root| dies.inherited_text(&root, dw::DW_AT_producer));
    producer.is_some_and(|text| matches!(c_abi::compiler_of(&text), Compiler::Llvm(_)))
}

/// The subprogram's DIE.
pub(crate) fn die_of<'a>(dies: &Dies<'a>, subprogram: &Subprogram) -> Option<Die<'a>> {
    dies.at(File::Main, subprogram.unit, subprogram.die)
}

/// The name that a symbol table would have.
pub(crate) fn linkage_name(dies: &Dies<'_>, subprogram: &Subprogram) -> Option<String> {
    let die = dies.at(File::Main, subprogram.unit, subprogram.die)?;
    dies.inherited_text(&die, dw::DW_AT_linkage_name).or_else(|| dies.name(&die))
}

/// Link-time optimisation leaves the language to the unit that the function came from.
fn language_of<'a>(dies: &Dies<'a>, die: &Die<'a>) -> Option<gimli::DwLang> {
    let of_origin = dies
        .follow(die, dw::DW_AT_abstract_origin)
        .and_then(|origin| dies.root(&origin))
        .and_then(|root| dies.language(&root));
    of_origin.or_else(|| dies.language(&dies.root(die)?))
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

struct Reader<'r, 'a> {
    dies: Dies<'a>,
    subprogram: &'r Subprogram,
    code: &'r Code,
}

impl<'a> Reader<'_, 'a> {
    fn function<'f>(
        &mut self,
        die: &Die<'a>,
        symbol: &'f str,
        is_c: bool,
    ) -> Result<Function<'f>, Doubt> {
        let root = self.dies.root(die).ok_or(Doubt::NoDebugInfo)?;
        let producer = self.dies.inherited_text(&root, dw::DW_AT_producer).unwrap_or_default();
        let compiler = c_abi::compiler_of(&producer);
        let (params, variadic) = self.dies.params(die).ok_or(Doubt::Parameters)?;
        let places = place::Reader::new(
            &self.dies,
            die,
            self.subprogram.address,
            self.code.live.frame_bytes,
        );
        // A definition without a prototype: a float comes as a double.
        let promotes = is_c && self.dies.inherited(die, dw::DW_AT_prototyped).is_none();
        let describe = |param: &Die<'a>| {
            let (mut ty, mut shape) = self.dies.type_of(param);
            if promotes && shape == Shape::Float(4) {
                ty = Type::Float { name: "double".into(), size_bytes: 8 };
                shape = Shape::Float(8);
            }
            let place = places.place_of(param);
            Described { name: self.dies.name(param), ty, shape, place }
        };
        let params: Vec<Described> = params.iter().map(describe).collect();
        let is_optimized =
            |param: &Described| !matches!(param.place, Place::Frame(_) | Place::Unclear);
        let is_private = matches!(compiler, Compiler::Llvm(_))
            && self.dies.inherited(die, dw::DW_AT_external).is_none()
            && (params.is_empty() || params.iter().any(is_optimized));
        Ok(Function {
            params,
            is_private,
            variadic,
            ret: self.dies.type_of(die),
            compiler,
            produced: Produced {
                vector_bytes: c_abi::gcc_vector_bytes(&producer),
                rustc_minor: rust_abi::minor_version(&producer),
            },
            symbol,
            stack_words: self.code.stack_words,
        })
    }

    /// What DWARF states of each parameter alone.
    fn located(&self, function: &Function<'_>, result_changed: bool) -> Result<Signature, Doubt> {
        let place = |param: &Described| {
            param.located().unwrap_or_else(|| param.without(Absent::OptimizedOut))
        };
        let params: Vec<Param> = function.params.iter().map(place).collect();
        if !params.is_empty() && params.iter().all(|p| p.absent == Some(Absent::OptimizedOut)) {
            return Err(Doubt::Contradicted);
        }
        let rules = Rules::usual(function.compiler);
        let (ty, shape) = &function.ret;
        let (words, absent) = match returned(shape, rules) {
            _ if *shape == Shape::Void => (Vec::new(), None),
            _ if result_changed => (Vec::new(), Some(Absent::MayBeDropped)),
            Ok(Returned::Words(words)) => (words, None),
            Ok(Returned::Memory) => function.result_in_memory(),
            Err(reason) => (Vec::new(), Some(Absent::Unclassified(reason))),
        };
        let aligns = function.params.iter().zip(&params).filter_map(|(described, param)| {
            let on_stack = matches!(param.words.first(), Some(ArgWord::Stack(_)));
            u32::try_from(described.shape.align()).ok().filter(|_| on_stack)
        });
        Ok(Signature {
            stack_align_bytes: aligns.fold(16, u32::max),
            params,
            ret: Return { ty: ty.clone(), words, absent },
            variadic: function.variadic,
            stack_words: self.code.stack_words,
            source: SignatureSource::Dwarf,
            doubt: None,
        })
    }
}

impl<'a> Dies<'a> {
    /// The formal parameters, and whether `...` follows. `None` where the code's list is not
    /// the source's.
    pub(crate) fn params(&self, die: &Die<'a>) -> Option<(Vec<Die<'a>>, bool)> {
        let list = |die: &Die<'a>| {
            let (mut params, mut variadic) = (Vec::new(), false);
            for child in self.children(die) {
                match child.entry.tag() {
                    dw::DW_TAG_formal_parameter => params.push(child),
                    dw::DW_TAG_unspecified_parameters => variadic = true,
                    _ => {}
                }
            }
            (params, variadic)
        };
        let (mut params, mut variadic) = list(die);
        for origin in [dw::DW_AT_abstract_origin, dw::DW_AT_specification] {
            if let Some(origin) = self.follow(die, origin) {
                let (of_origin, dots) = list(&origin);
                if of_origin.len() != params.len() {
                    return None;
                }
                variadic |= dots;
                params = self.in_source_order(params, &of_origin);
            }
        }
        let hidden =
            |param: &Die<'a>| self.name(param).is_some_and(|name| name.starts_with("__in_chrg"));
        (!params.iter().any(hidden)).then_some((params, variadic))
    }

    /// gcc lists what it took out of a clone behind what it left.
    fn in_source_order(&self, mut params: Vec<Die<'a>>, source: &[Die<'a>]) -> Vec<Die<'a>> {
        let position = |param: &Die<'a>| {
            let origin = self.follow(param, dw::DW_AT_abstract_origin)?;
            source.iter().position(|of_source| {
                of_source.entry.offset() == origin.entry.offset()
                    && of_source.unit.header.debug_info_offset()
                        == origin.unit.header.debug_info_offset()
            })
        };
        let positions: Option<Vec<usize>> = params.iter().map(position).collect();
        if positions.is_some() {
            params.sort_by_cached_key(|param| position(param));
        }
        params
    }
}

/// Whether LLVM may have taken parameters or the result away without a word: old versions do.
fn may_be_changed(function: &Function<'_>) -> bool {
    let is_old = matches!(function.compiler, Compiler::Llvm(version) if version < LLVM_THAT_MARKS);
    is_old && function.is_private && !function.params.is_empty()
}

/// Leaves out the result, and the parameters that nothing shows to be there still: one that
/// is nowhere is there if one behind it, in a register of the same kind, is where it would
/// not be without it.
fn without_what_may_be_dropped(mut signature: Signature, places: &[Place]) -> Signature {
    let bank = |param: &Param| param.words.first().map(std::mem::discriminant);
    for i in 0..signature.params.len() {
        let (before, behind) = signature.params.split_at_mut(i + 1);
        let param = &mut before[i];
        let is_nowhere = places.get(i) == Some(&Place::Nowhere) && !param.words.is_empty();
        let mut later = behind.iter().zip(places.iter().skip(i + 1));
        let is_shown = later.any(|(other, place)| {
            bank(other) == bank(param) && matches!(place, Place::Pieces(_) | Place::Behind(_))
        });
        if is_nowhere && !is_shown {
            param.words.clear();
            param.absent = Some(Absent::OptimizedOut);
        }
    }
    if !signature.ret.words.is_empty() {
        signature.ret.words.clear();
        signature.ret.absent = Some(Absent::MayBeDropped);
    }
    signature
}
