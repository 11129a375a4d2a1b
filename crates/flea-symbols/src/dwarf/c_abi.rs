//! C and C++: the psABI, for each width of vector registers. Start at [`signature`].

use super::evidence::{Candidate, Evidence};
use super::signature::{Described, Function, Produced};
use super::types::Shape;
use crate::signature::{
    Absent, ArgWord, Choice, Doubt, Param, Return, Signature, SignatureSource, StackWords,
    Unclassified,
};
use crate::x86_64::classify::{
    Compiler, Copies, InferredAlign, Places, Returned, Rules, depends_on_avx, returned,
};

/// With AVX, and with AVX-512.
const WIDER_VECTOR_BYTES: [u64; 2] = [32, 64];

/// How C calls `function`.
pub(crate) fn signature(
    function: &Function<'_>,
    evidence: &Evidence<'_>,
) -> Result<Signature, Doubt> {
    let shapes = || function.params.iter().map(|param| &param.shape).chain([&function.ret.1]);
    let is_wide = shapes().any(|shape| depends_on_avx(shape, function.compiler));
    let may_be_packed = shapes().any(|shape| {
        matches!(shape, Shape::Aggregate(record) if record.align > 8 && !record.align_is_stated)
    });
    let is_unsure = shapes()
        .any(|shape| matches!(shape, Shape::Aggregate(r) if r.may_be_by_address && !r.by_address));
    let rules = all_rules(function.compiler, is_wide, may_be_packed, is_unsure);
    let candidates: Vec<Candidate> =
        rules.iter().map(|rules| candidate(function, *rules)).collect::<Result<_, Doubt>>()?;
    let width = if is_wide { vector_bytes(&function.produced, evidence) } else { Some(16) };
    let presumed = width.filter(|_| !is_unsure).and_then(|bytes| {
        rules.iter().position(|rules| {
            rules.vector_bytes == bytes && rules.inferred_align == InferredAlign::Natural
        })
    });
    let choice = if is_unsure { Choice::Copies } else { Choice::Avx };
    evidence.choose(candidates, presumed, choice).ok_or(Doubt::Contradicted)
}

/// Every combination of what is not known.
pub(crate) fn all_rules(
    compiler: Compiler,
    is_wide: bool,
    may_be_packed: bool,
    is_unsure: bool,
) -> Vec<Rules> {
    let mut found = vec![Rules::usual(compiler)];
    let mut vary = |change: &dyn Fn(Rules) -> Rules| {
        let varied: Vec<Rules> = found.iter().map(|rules| change(*rules)).collect();
        found.extend(varied);
    };
    if may_be_packed {
        vary(&|rules| Rules { inferred_align: InferredAlign::Packed, ..rules });
    }
    if is_unsure {
        vary(&|rules| Rules { copies: Copies::ByAddress, ..rules });
    }
    if is_wide {
        let narrow = found.clone();
        for vector_bytes in WIDER_VECTOR_BYTES {
            found.extend(narrow.iter().map(|rules| Rules { vector_bytes, ..*rules }));
        }
    }
    found
}

/// How wide the vector registers are that the function's code uses, as far as that is
/// recorded.
fn vector_bytes(produced: &Produced, evidence: &Evidence<'_>) -> Option<u64> {
    if evidence.live.has_legacy_sse {
        return Some(16);
    }
    // A function can have more than its unit's options, by an attribute.
    let by_code = Some(u64::from(evidence.live.avx_bytes)).filter(|bytes| *bytes > 0);
    let by_options = produced.vector_bytes;
    match (by_code, by_options) {
        (Some(code), Some(options)) => Some(code.max(options).max(32)),
        (Some(code), None) => Some(code.max(32)),
        (None, options) => options,
    }
}

/// What the psABI says with `rules`.
pub(crate) fn candidate(function: &Function<'_>, rules: Rules) -> Result<Candidate, Doubt> {
    // LLVM has no vector registers above xmm for the named parameters of variadic functions.
    let is_llvm = matches!(rules.compiler, Compiler::Llvm(_));
    let vector_bytes = if is_llvm && function.variadic { 16 } else { rules.vector_bytes };
    let mut places = Places::new(Rules { vector_bytes, ..rules });
    let (ret_type, ret_shape) = &function.ret;
    let (words, absent) = match returned(ret_shape, rules) {
        Ok(Returned::Words(words)) => (words, None),
        Ok(Returned::Memory) => {
            places.skip_gpr();
            function.result_in_memory()
        }
        // Of clang's vectors in more registers than are read; there is no hidden pointer.
        Err(reason @ Unclassified::TooLarge) => (Vec::new(), Some(Absent::Unclassified(reason))),
        Err(reason) => {
            let (ty, reason) = (ret_type.name().to_owned(), Absent::Unclassified(reason));
            return Err(Doubt::Result { ty, reason });
        }
    };
    let hidden_gprs = if places.gprs() > 0 { 1 } else { 0 };
    let ret = Return { ty: ret_type.clone(), words, absent };
    let params = place_all(&function.params, |param| places.next(&param.shape));
    let all_placed = params.iter().all(|param| param.absent.is_none());
    let signature = Signature {
        params,
        ret,
        variadic: function.variadic,
        stack_words: if all_placed {
            StackWords::Known(places.stack_words())
        } else {
            function.stack_words
        },
        stack_align_bytes: places.stack_align_bytes(),
        source: SignatureSource::Dwarf,
        doubt: None,
    };
    Ok(Candidate { signature, hidden_gprs, spare_gprs: 0 })
}

/// Gives each parameter the words that `next` says. Behind one that has none, the others have
/// only what DWARF states for each.
pub(crate) fn place_all(
    params: &[Described],
    mut next: impl FnMut(&Described) -> Result<Vec<ArgWord>, Unclassified>,
) -> Vec<Param> {
    let mut lost: Option<String> = None;
    let place = |param: &Described| {
        let absent = match &lost {
            None => match next(param) {
                Ok(words) => return param.with(words),
                Err(reason) => Absent::Unclassified(reason),
            },
            Some(before) => Absent::Behind(before.clone()),
        };
        lost.get_or_insert_with(|| param.label());
        param.located().unwrap_or_else(|| param.without(absent))
    };
    params.iter().map(place).collect()
}

/// Which compiler, and what its options say, from DW_AT_producer.
pub(crate) fn compiler_of(producer: &str) -> Compiler {
    let number_behind = |what: &str| -> Option<u32> {
        let rest = &producer[producer.find(what)? + what.len()..];
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    if let Some(version) = number_behind("clang version ") {
        return Compiler::Llvm(version);
    }
    if let Some(minor) = number_behind("rustc version 1.") {
        return Compiler::Llvm(if minor >= RUSTC_WITH_LLVM_18 { 18 } else { 0 });
    }
    let is_llvm = ["clang", "LLVM", "rustc"].iter().any(|name| producer.contains(name));
    if is_llvm { Compiler::Llvm(0) } else { Compiler::Gcc }
}

/// The minor version of the first rustc with LLVM 18.
const RUSTC_WITH_LLVM_18: u32 = 78;

/// How wide gcc's vector registers are by the options that it records; `None` where they
/// do not say it, as behind `-march=haswell`.
pub(crate) fn gcc_vector_bytes(producer: &str) -> Option<u64> {
    let options = || producer.split_ascii_whitespace();
    let plain_march = options()
        .filter_map(|option| option.strip_prefix("-march="))
        .all(|march| march == "x86-64" || march == "x86-64-v2");
    if !producer.starts_with("GNU ") || options().next().is_none() {
        return None;
    }
    let (mut bytes, mut is_stated) = (16, plain_march);
    for option in options() {
        match option {
            "-mno-avx" | "-mno-sse" => (bytes, is_stated) = (16, true),
            "-mno-avx512f" => bytes = bytes.min(32),
            _ if option.starts_with("-mavx512") => (bytes, is_stated) = (64, true),
            "-mavx" | "-mavx2" | "-mfma" | "-mf16c" => {
                // With an architecture that is not spelled out, it may have AVX-512 as well.
                (bytes, is_stated) = (bytes.max(32), plain_march);
            }
            _ => {}
        }
    }
    is_stated.then_some(bytes)
}
