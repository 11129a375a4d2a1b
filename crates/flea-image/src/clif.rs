//! The one place that configures and calls Cranelift.

use std::sync::OnceLock;

use cranelift_codegen::binemit::Reloc as ClifReloc;
use cranelift_codegen::control::ControlPlane;
use cranelift_codegen::cursor::{Cursor, FuncCursor};
use cranelift_codegen::ir::InstBuilder;
use cranelift_codegen::ir::{
    ExternalName, Function, GlobalValue, GlobalValueData, InstructionData, Opcode,
    UserExternalName, Value, ValueDef, types,
};
use cranelift_codegen::isa::{OwnedTargetIsa, TargetIsa, lookup_by_name};
use cranelift_codegen::settings::{self, Configurable};
use cranelift_codegen::{Context, FinalizedRelocTarget};
use cranelift_frontend::FunctionBuilder;
use flea_layout::shared::RuntimeFn;

use crate::code::{Code, Reloc, RelocKind, RelocTarget, is_movabs_at};
use crate::request::{CompileError, Cpu};

const NS_ARENA: u32 = 0;
const NS_RUNTIME: u32 = 1;
const NS_VDSO: u32 = 2;
const NS_THREAD_POINTER: u32 = 3;
const NS_CONSTANT: u32 = 4;
const NS_SKELETON_FRAME: u32 = 5;
const NS_FUNCTION: u32 = 6;
const NS_COOKIE: u32 = 7;

/// The x86-64 back end. No AVX on any CPU: the upper halves of vector registers, which
/// `PreserveAll` does not save, are never touched.
pub(crate) fn isa(cpu: Cpu) -> Result<&'static dyn TargetIsa, CompileError> {
    static ISA: [OnceLock<Result<OwnedTargetIsa, String>>; 2] = [const { OnceLock::new() }; 2];
    built(ISA[usize::from(cpu.lzcnt)].get_or_init(|| build_isa(cpu, "speed")))
}

/// The same without the optimiser; see [`compile`].
fn plain_isa(cpu: Cpu) -> Result<&'static dyn TargetIsa, CompileError> {
    static ISA: [OnceLock<Result<OwnedTargetIsa, String>>; 2] = [const { OnceLock::new() }; 2];
    built(ISA[usize::from(cpu.lzcnt)].get_or_init(|| build_isa(cpu, "none")))
}

fn build_isa(cpu: Cpu, opt_level: &str) -> Result<OwnedTargetIsa, String> {
    let mut flags = settings::builder();
    let wanted = [
        ("opt_level", opt_level),
        ("preserve_frame_pointers", "true"),
        ("is_pic", "false"),
        ("unwind_info", "false"),
        ("enable_probestack", "false"),
        // `verify` below does it.
        ("enable_verifier", "false"),
    ];
    for (name, value) in wanted {
        flags.set(name, value).map_err(|e| e.to_string())?;
    }
    let mut isa = lookup_by_name("x86_64-unknown-linux-gnu").map_err(|e| e.to_string())?;
    if cpu.lzcnt {
        isa.enable("has_lzcnt").map_err(|e| e.to_string())?;
    }
    isa.finish(settings::Flags::new(flags)).map_err(|e| e.to_string())
}

fn built(
    isa: &'static Result<OwnedTargetIsa, String>,
) -> Result<&'static dyn TargetIsa, CompileError> {
    match isa {
        Ok(isa) => Ok(&**isa),
        Err(e) => Err(CompileError::CodeGenerator(e.clone())),
    }
}

/// Cranelift's own check of what we built, in debug builds.
///
/// Its verifier refuses results of `PreserveAll` functions because a *callee* of that kind
/// would restore the register over its result. We have no such callee, only calls of the
/// hand-written runtime entries; at a call the result is a definition like any other, so rax
/// is among the saved registers. That is not left to belief: `check_body` refuses a body
/// that calls without having saved rax.
fn verify(func: &Function) -> Result<(), CompileError> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let Err(errors) = cranelift_codegen::verify_function(func, isa(Cpu::default())?) else {
        return Ok(());
    };
    let ours = "Signature with `preserve_all` ABI cannot have return values";
    let real: String =
        errors.0.iter().filter(|e| e.message != ours).map(|e| format!("{e}; ")).collect();
    if real.is_empty() { Ok(()) } else { Err(CompileError::CodeGenerator(real)) }
}

/// Compiles a finished CLIF function.
///
/// A body is instructions and nothing else: it is put into skeletons instruction by
/// instruction. But Cranelift keeps constants that are no 32-bit immediate in a pool behind
/// the code. The constants that we have are therefore symbols ([`symbol`]), which are opaque;
/// where the optimiser made new ones (a shift left and right becomes a mask), the function is
/// compiled once more without it and with every
/// constant hidden.
pub(crate) fn compile(func: Function, cpu: Cpu) -> Result<Code, CompileError> {
    verify(&func)?;
    let optimised = compile_for(func.clone(), isa(cpu)?)?;
    if !has_constant_pool(&optimised.bytes) {
        return Ok(optimised);
    }
    let mut func = func;
    hide_constants(&mut func);
    let plain = compile_for(func, plain_isa(cpu)?)?;
    if has_constant_pool(&plain.bytes) {
        return Err(CompileError::CodeGenerator("a constant pool behind the code".into()));
    }
    Ok(plain)
}

/// Puts a symbol in the place of every constant: any operand that may be in memory could come
/// from the pool, however small the constant is.
fn hide_constants(func: &mut Function) {
    let mut cursor = FuncCursor::new(func);
    while cursor.next_block().is_some() {
        while let Some(inst) = cursor.next_inst() {
            let InstructionData::UnaryImm { opcode: Opcode::Iconst, imm } =
                cursor.func.dfg.insts[inst]
            else {
                continue;
            };
            let ty = cursor.func.dfg.value_type(cursor.func.dfg.first_result(inst));
            let global = global_of(cursor.func, RelocTarget::Constant(imm.bits().cast_unsigned()));
            if ty == types::I64 {
                cursor.func.dfg.insts[inst] = InstructionData::UnaryGlobalValue {
                    opcode: Opcode::SymbolValue,
                    global_value: global,
                };
            } else {
                let opaque = cursor.ins().symbol_value(types::I64, global);
                cursor.func.dfg.insts[inst] =
                    InstructionData::Unary { opcode: Opcode::Ireduce, arg: opaque };
            }
        }
    }
}

/// Does any instruction refer to its own neighbourhood? Only the pool is there to refer to.
fn has_constant_pool(bytes: &[u8]) -> bool {
    iced_x86::Decoder::new(64, bytes, iced_x86::DecoderOptions::NONE)
        .iter()
        .take_while(|insn| !insn.is_invalid())
        .any(|insn| insn.is_ip_rel_memory_operand())
}

fn compile_for(func: Function, isa: &dyn TargetIsa) -> Result<Code, CompileError> {
    let mut context = Context::for_function(func);
    context
        .compile(isa, &mut ControlPlane::default())
        .map_err(|e| CompileError::CodeGenerator(e.inner.to_string()))?;
    let compiled =
        context.compiled_code().ok_or_else(|| CompileError::CodeGenerator("no code".into()))?;
    let bytes = compiled.code_buffer().to_vec();
    let mut relocs = Vec::new();
    for r in compiled.buffer.relocs() {
        let target = match &r.target {
            FinalizedRelocTarget::ExternalName(name) => target_of(&context.func, name, r.addend),
            FinalizedRelocTarget::Func(_) => None,
        };
        let fits = r.kind == ClifReloc::Abs8 && is_movabs_at(&bytes, r.offset as usize);
        let (Some(target), true) = (target, fits) else {
            return Err(CompileError::CodeGenerator(format!("unexpected relocation {r:?}")));
        };
        let kind = match target {
            RelocTarget::ThreadPointer => RelocKind::ThreadPointer,
            RelocTarget::SkeletonFrame => RelocKind::SkeletonFrame,
            _ => RelocKind::Abs8,
        };
        relocs.push(Reloc { offset: r.offset, kind, target });
    }
    relocs.sort_by_key(|r| r.offset);
    Ok(Code { bytes, relocs })
}

fn target_of(func: &Function, name: &ExternalName, addend: i64) -> Option<RelocTarget> {
    let ExternalName::User(name) = name else { return None };
    let name = &func.params.user_named_funcs()[*name];
    match name.namespace {
        NS_ARENA => Some(RelocTarget::Arena { addend }),
        NS_RUNTIME if addend == 0 => {
            RuntimeFn::ALL.get(name.index as usize).map(|f| RelocTarget::Runtime(*f))
        }
        NS_VDSO if addend == 0 => Some(RelocTarget::VdsoClockGettime),
        NS_THREAD_POINTER if addend == 0 => Some(RelocTarget::ThreadPointer),
        NS_SKELETON_FRAME if addend == 0 => Some(RelocTarget::SkeletonFrame),
        NS_CONSTANT => Some(RelocTarget::Constant(addend.cast_unsigned())),
        NS_FUNCTION if addend == 0 => Some(RelocTarget::FunctionAddress),
        NS_COOKIE if addend == 0 => Some(RelocTarget::Cookie { program: name.index }),
        _ => None,
    }
}

/// The value of `target`: a `movabs` with a relocation.
///
/// Not colocated: a colocated symbol would become `lea reg, [rip + x]`, which ties the code to
/// a place within 2 GiB of the arena.
pub(crate) fn symbol(b: &mut FunctionBuilder<'_>, target: RelocTarget) -> Value {
    let global = global_of(b.func, target);
    b.ins().symbol_value(types::I64, global)
}

fn global_of(func: &mut Function, target: RelocTarget) -> GlobalValue {
    let (name, addend) = match target {
        RelocTarget::Arena { addend } => (UserExternalName::new(NS_ARENA, 0), addend),
        RelocTarget::Runtime(f) => (UserExternalName::new(NS_RUNTIME, runtime_index(f)), 0),
        RelocTarget::VdsoClockGettime => (UserExternalName::new(NS_VDSO, 0), 0),
        RelocTarget::ThreadPointer => (UserExternalName::new(NS_THREAD_POINTER, 0), 0),
        RelocTarget::SkeletonFrame => (UserExternalName::new(NS_SKELETON_FRAME, 0), 0),
        RelocTarget::Constant(value) => {
            (UserExternalName::new(NS_CONSTANT, 0), value.cast_signed())
        }
        RelocTarget::FunctionAddress => (UserExternalName::new(NS_FUNCTION, 0), 0),
        RelocTarget::Cookie { program } => (UserExternalName::new(NS_COOKIE, program), 0),
    };
    let name = func.declare_imported_user_function(name);
    let data = GlobalValueData::Symbol {
        name: ExternalName::user(name),
        offset: addend.into(),
        colocated: false,
        tls: false,
    };
    existing(func, &data).unwrap_or_else(|| func.create_global_value(data))
}

/// A 64-bit constant that never lands in a constant pool.
pub(crate) fn constant(b: &mut FunctionBuilder<'_>, value: i64) -> Value {
    if i32::try_from(value).is_ok() {
        return b.ins().iconst(types::I64, value);
    }
    symbol(b, RelocTarget::Constant(value.cast_unsigned()))
}

/// A number that is one function's alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Number {
    /// As it is: it can be folded into what is computed from it.
    Known(u64),
    /// Left open: functions that share the code have different ones.
    Open(RelocTarget),
}

/// The value of `number`.
pub(crate) fn number(b: &mut FunctionBuilder<'_>, number: Number) -> Value {
    match number {
        Number::Known(value) => constant(b, value.cast_signed()),
        Number::Open(target) => symbol(b, target),
    }
}

/// `condition ? a : b`. A conditional move has no immediate operand, so Cranelift would take
/// constants, however small, from its pool.
pub(crate) fn select(b: &mut FunctionBuilder<'_>, condition: Value, x: Value, y: Value) -> Value {
    let (x, y) = (in_register(b, x), in_register(b, y));
    b.ins().select(condition, x, y)
}

fn in_register(b: &mut FunctionBuilder<'_>, value: Value) -> Value {
    let Some(bits) = known_constant(b, value) else { return value };
    let ty = b.func.dfg.value_type(value);
    let opaque = symbol(b, RelocTarget::Constant(bits));
    if ty == types::I64 { opaque } else { b.ins().ireduce(ty, opaque) }
}

/// The bits of a value that is a constant right here.
pub(crate) fn known_constant(b: &FunctionBuilder<'_>, value: Value) -> Option<u64> {
    let ValueDef::Result(inst, _) = b.func.dfg.value_def(value) else { return None };
    match b.func.dfg.insts[inst] {
        InstructionData::UnaryImm { opcode: Opcode::Iconst, imm } => {
            Some(imm.bits().cast_unsigned())
        }
        _ => None,
    }
}

/// The same symbol twice is one global value, so that equal addresses are one value.
fn existing(func: &Function, wanted: &GlobalValueData) -> Option<GlobalValue> {
    let GlobalValueData::Symbol { name: wanted_name, offset: wanted_offset, .. } = wanted else {
        return None;
    };
    func.global_values.iter().find_map(|(global, data)| match data {
        GlobalValueData::Symbol { name, offset, .. }
            if name == wanted_name && offset == wanted_offset =>
        {
            Some(global)
        }
        _ => None,
    })
}

/// The number under which a runtime function goes in an external name.
pub(crate) fn runtime_index(f: RuntimeFn) -> u32 {
    RuntimeFn::ALL
        .iter()
        .position(|g| *g == f)
        .and_then(|i| u32::try_from(i).ok())
        .unwrap_or(u32::MAX)
}
