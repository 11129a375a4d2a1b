//! A program as an ordinary C function: for the conformance vectors and tests.

use cranelift_codegen::ir::{AbiParam, Function, InstBuilder, Signature, UserFuncName, types};
use cranelift_codegen::isa::CallConv;
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use flea_layout::plan::ArenaPlan;
use flea_verifier::Verified;

use crate::clif;
use crate::code::Code;
use crate::request::CompileError;
use crate::translate::{Arguments, Env, Outcome, Translator, Use};

/// Compiles `uint64_t program(void *memory, uint64_t size_bytes)` for the System V ABI:
/// r1 and r2 in, r0 out, no helpers, no maps.
///
/// # Errors
/// [`CompileError`]; helpers and maps are refused.
pub fn compile_plain(verified: &Verified) -> Result<Code, CompileError> {
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
    let plan = ArenaPlan::new(&[], 0);
    let env = Env {
        plan: &plan,
        printk_map: None,
        function_address: 0,
        frame_offset: 0,
        args: Arguments::none(),
        slot: None,
    };
    let used = Use { verified, kind: None, cookie: 0, cookie_word: 0 };
    let mut outcome = Outcome::default();
    let result = Translator::new(&mut b, &env, &used, &mut outcome).program(r1, r2)?;
    b.ins().return_(&[result]);
    b.seal_all_blocks();
    b.finalize(clif::isa()?.frontend_config());
    clif::compile(func)
}
