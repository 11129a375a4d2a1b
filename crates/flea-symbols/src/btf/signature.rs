//! A function's signature out of its BTF prototype. Start at [`read`].
//!
//! BTF leaves out what decides some places: whether an array is a vector, alignments that the
//! source states, who compiled it. Each possibility is a candidate, and what they do not agree
//! about is not told, as with DWARF (`dwarf/evidence.rs`).

use flea_object::btf::{Btf, Kind, Member};

use super::Context;
use super::types::{Arrays, Types};
use crate::dwarf::c_abi;
use crate::dwarf::evidence::{Candidate, Evidence};
use crate::dwarf::place::Place;
use crate::dwarf::signature::{Code, Described, Function, Produced};
use crate::dwarf::types::Shape;
use crate::signature::{Choice, Doubt, Signature, SignatureSource};
use crate::x86_64::classify::{Compiler, depends_on_avx};

/// The signature of a function with the prototype `proto`.
///
/// # Errors
/// Why there is none.
pub(super) fn read(
    btf: &Btf<'_>,
    proto: u32,
    context: &Context,
    code: &Code,
) -> Result<Signature, Doubt> {
    let mut candidates = Vec::new();
    let mut may_hide_pointer = false;
    for arrays in [Arrays::Arrays, Arrays::Vectors] {
        for compiler in &context.compilers {
            let function = describe(btf, proto, arrays, *compiler, code)?;
            let has_record = shapes(&function).any(|shape| matches!(shape, Shape::Aggregate(_)));
            if has_record && context.has_other_languages {
                return Err(Doubt::MixedLanguages);
            }
            may_hide_pointer = function.ret.1 == Shape::Void && !has_record;
            candidates.extend(candidates_of(&function)?);
        }
    }
    let n_params = candidates.first().map_or(0, |first| first.signature.params.len());
    // gcc writes `void` for what it cannot describe. The register of a hidden pointer to such
    // a result would be read, as LLVM reads only what it was given. (gcc may also store what
    // pads a struct, but here is none.)
    let compiler = if may_hide_pointer { Compiler::Llvm(0) } else { Compiler::Gcc };
    let evidence = Evidence {
        places: &vec![Place::Nowhere; n_params],
        live: code.live,
        stack_words: code.stack_words,
        compiler,
        is_private: false,
    };
    let chosen = evidence.choose(candidates, None, Choice::Btf).ok_or(Doubt::Contradicted)?;
    Ok(Signature { source: SignatureSource::Btf, ..chosen })
}

fn shapes<'f>(function: &'f Function<'_>) -> impl Iterator<Item = &'f Shape> {
    function.params.iter().map(|param| &param.shape).chain([&function.ret.1])
}

/// As the C ABI's code wants it.
fn describe(
    btf: &Btf<'_>,
    proto: u32,
    arrays: Arrays,
    compiler: Compiler,
    code: &Code,
) -> Result<Function<'static>, Doubt> {
    let Ok(Kind::Proto { ret, params }) = btf.get(proto).map(|ty| &ty.kind) else {
        return Err(Doubt::Parameters);
    };
    let types = Types::new(btf, arrays);
    let is_dots = |last: &&Member<'_>| last.type_id == 0 && last.name.is_empty();
    let variadic = params.last().filter(is_dots).is_some();
    let named = &params[..params.len() - usize::from(variadic)];
    let describe = |param: &Member<'_>| {
        let (ty, shape) = types.type_of(param.type_id);
        let name = Some(param.name.to_owned()).filter(|name| !name.is_empty());
        Described { name, ty, shape, place: Place::Nowhere }
    };
    // gcc writes type 0 for what it cannot describe. Where a parameter has it, a result that
    // looks like `void` may be such a thing, too.
    let is_unsure = *ret == 0 && named.iter().any(|param| param.type_id == 0);
    let ret = if is_unsure { types.type_of(*ret) } else { types.result_of(*ret) };
    Ok(Function {
        params: named.iter().map(describe).collect(),
        variadic,
        ret,
        compiler,
        produced: Produced { vector_bytes: None, rustc_minor: None },
        symbol: "",
        stack_words: code.stack_words,
        is_private: false,
    })
}

fn candidates_of(function: &Function<'_>) -> Result<Vec<Candidate>, Doubt> {
    let is_wide = shapes(function).any(|shape| depends_on_avx(shape, function.compiler));
    let may_be_packed = shapes(function).any(|shape| matches!(shape, Shape::Aggregate(_)));
    let rules = c_abi::all_rules(function.compiler, is_wide, may_be_packed, false);
    rules.into_iter().map(|rules| c_abi::candidate(function, rules)).collect()
}
