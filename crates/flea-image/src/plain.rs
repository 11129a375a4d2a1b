//! A program as an ordinary C function: for conformance vectors and tests.

use cranelift_codegen::ir::{AbiParam, Function, InstBuilder, Signature, UserFuncName, types};
use cranelift_codegen::isa::CallConv;
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use flea_layout::plan::ArenaPlan;
use flea_verifier::Verified;

use crate::body::{find_slot, uses_slot};
use crate::clif::{self, Number};
use crate::code::Code;
use crate::request::{CompileError, Cpu};
use crate::translate::{Arguments, Env, Outcome, Translator, Use};

/// What a plain function works on.
#[derive(Clone, Copy, Debug)]
pub struct PlainRequest<'a> {
    /// The program and what was proved of it.
    pub verified: &'a Verified,
    /// Its maps, in an arena with a runtime; without one, helpers and maps are refused.
    pub plan: Option<&'a ArenaPlan>,
    /// `r1` is the context: it points at this many words. 0: `r1` is memory, `r2` its size.
    pub context_words: u32,
}

/// Compiles `uint64_t program(void *memory, uint64_t size_bytes)` for the System V ABI:
/// r1 and r2 in, r0 out, no helpers, no maps.
///
/// # Errors
/// [`CompileError`]; helpers and maps are refused.
pub fn compile_plain(verified: &Verified) -> Result<Code, CompileError> {
    compile_function(&PlainRequest { verified, plan: None, context_words: 0 })
}

/// As [`compile_plain`], with what `request` has besides. A thread that finds no slot gets 0,
/// and so does one that cannot get a lock.
///
/// # Errors
/// [`CompileError`]
pub fn compile_function(request: &PlainRequest<'_>) -> Result<Code, CompileError> {
    let verified = request.verified;
    let mut signature = Signature::new(CallConv::SystemV);
    signature.params = vec![AbiParam::new(types::I64); 2];
    signature.returns = vec![AbiParam::new(types::I64)];
    let mut func = Function::with_name_signature(UserFuncName::user(0, 0), signature);
    let mut context = FunctionBuilderContext::new();
    let mut b = FunctionBuilder::new(&mut func, &mut context);
    let block = b.create_block();
    b.append_block_params_for_function_params(block);
    b.switch_to_block(block);
    let (r1, r2) = (b.block_params(block)[0], b.block_params(block)[1]);
    let mut outcome = Outcome::default();
    let without_slot = b.create_block();
    let slot = request
        .plan
        .filter(|plan| uses_slot(verified, plan))
        .map(|_| find_slot(&mut b, &mut outcome, without_slot));
    let no_maps = ArenaPlan::new(&[], 0);
    let env = Env {
        plan: request.plan.unwrap_or(&no_maps),
        printk_map: None,
        function_address: Number::Known(0),
        frame_offset: 0,
        args: Arguments::plain((request.context_words > 0).then_some(r1), request.context_words),
        has_runtime: request.plan.is_some(),
        slot,
    };
    let given_up = Some(without_slot);
    let used = Use { verified, kind: None, cookie: Number::Known(0), cookie_word: 0, given_up };
    let members = Use::members(used);
    let result = Translator::new(&mut b, &env, &members, &mut outcome).program(r1, r2)?;
    b.ins().return_(&[result]);
    b.switch_to_block(without_slot);
    let nothing = b.ins().iconst(types::I64, 0);
    b.ins().return_(&[nothing]);
    b.seal_all_blocks();
    b.finalize(clif::isa(Cpu::default())?.frontend_config());
    clif::compile(func, Cpu::default())
}
