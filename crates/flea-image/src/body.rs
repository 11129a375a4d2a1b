//! Builds the bodies: slot lookup, recursion guards, and the programs one after another.
//!
//! ```text
//!   entry:   tp = fs:[0]                                 only if something needs the slot
//!            entry = arena - 64 KiB + ((tp >> 8) & 0xfff0)
//!            if entry.thread_pointer == tp: slot = entry.slot
//!            else (cold): slot = flea_thread_slot(arena); if 0: arena.no_slot += 1, return
//!   program: if state.active > rsp: state.misses += 1    only if guarded, see `guard`
//!            else: state.active = rsp; ... ; state.active = 0
//!            `slot.locking` in the place of `state.active` where the program takes locks; if it
//!            cannot get one: state.misses += 1, and the program ends there
//!   fmod_ret: if r0 != 0: the function's result = r0, return       the rest is skipped as well
//! ```

use std::borrow::Cow;
use std::mem::offset_of;

use cranelift_codegen::ir::condcodes::IntCC;
use cranelift_codegen::ir::{
    AbiParam, Block, Function, InstBuilder, Signature, UserFuncName, Value, types,
};
use cranelift_codegen::isa::CallConv;
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext};
use flea_layout::plan::ArenaPlan;
use flea_layout::shared::{
    ProgramState, RuntimeFn, SlotHeader, THREAD_TABLE_BYTES, THREAD_TABLE_ENTRIES,
    THREAD_TABLE_SHIFT, ThreadEntry,
};
use flea_object::helper::Helper;
use flea_object::insn::PSEUDO_MAP_VALUE;
use flea_object::spec::{MapIdx, MapKind, ProgramKind};
use flea_verifier::Verified;
use flea_verifier::facts::Fact;

use crate::changes::{Changes, changes, is_given_back};
use crate::clif::{self, Number, symbol};
use crate::code::{Code, RelocTarget};
use crate::guard::{self, Guard};
use crate::request::{Body, BodyRequest, CompileError, ProgramUse, Reads, Saved, When};
use crate::session;
use crate::sides::{rank, runs_on};
use crate::skip::skip_result;
use crate::translate::{
    ARGUMENTS, Arguments, Env, Outcome, Parameters, Probes, Saves, Side, Translator, Use,
    call_runtime, op, proved, store_skip_value, zero_cookie,
};
use crate::x86_64::check::{check_body, check_cpu};
use crate::x86_64::slim::slim;

/// Compiles all programs of `request` into at most four bodies.
///
/// # Errors
/// [`CompileError`]: nothing usable was made.
pub fn compile_body(request: &BodyRequest<'_>) -> Result<Body, CompileError> {
    compile(&Job { request, sharing: Sharing::One })
}

/// The same, for any number of functions that differ in their addresses and cookies alone: those
/// are left open, as [`RelocTarget::FunctionAddress`] and [`RelocTarget::Cookie`], and what
/// `request` has of them is not looked at.
///
/// What is computed from a cookie (an array's element, most often) is then computed at each
/// call, which takes a few instructions; compiling takes longer than all of the rest of
/// attaching.
///
/// # Errors
/// [`CompileError`]: nothing usable was made.
pub fn compile_shared_body(request: &BodyRequest<'_>) -> Result<Body, CompileError> {
    compile(&Job { request, sharing: Sharing::Many })
}

/// What is compiled, and for how many functions.
struct Job<'a> {
    request: &'a BodyRequest<'a>,
    sharing: Sharing,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sharing {
    /// Its numbers are known.
    One,
    /// They are left open.
    Many,
}

impl Job<'_> {
    fn number(&self, known: u64, open: RelocTarget) -> Number {
        match self.sharing {
            Sharing::One => Number::Known(known),
            Sharing::Many => Number::Open(open),
        }
    }
}

fn compile(job: &Job<'_>) -> Result<Body, CompileError> {
    check_request(job.request)?;
    let request = job.request;
    let n_sessions = request.programs.iter().filter(|p| p.kind == ProgramKind::Fsession).count();
    // Session cookies first, then what the sides want saved, each knowing of those before.
    let mut saves = Saves::behind(u32::try_from(n_sessions).unwrap_or(u32::MAX));
    let saves_after = |side: &Option<(Code, Outcome)>, before: Saves| {
        side.as_ref().map_or(before, |(_, outcome)| outcome.saves.clone())
    };
    let entry = compile_side(job, Side::Entry, &saves)?;
    let changes = changes_of(request);
    for i in changes.arguments().filter(|i| is_given_back(*i, request.signature)) {
        saves.of(When::Entry, Saved::Gpr(ARGUMENTS[usize::from(i)]));
    }
    let session = compile_side(job, Side::Session, &saves)?;
    let saves = saves_after(&session, saves);
    let modify = compile_side(job, Side::Modify, &saves)?;
    let saves = saves_after(&modify, saves);
    let exit = compile_side(job, Side::Exit, &saves)?;
    let saves = saves_after(&exit, saves);
    let calls_runtime = [&entry, &session, &modify, &exit]
        .iter()
        .any(|s| s.as_ref().is_some_and(|s| s.1.calls_runtime));
    let reads = exit.as_ref().map_or_else(Reads::default, |(_, outcome)| outcome.reads.clone());
    Ok(Body {
        entry: entry.map(|s| s.0),
        session: session.map(|s| s.0),
        modify: modify.map(|s| s.0),
        exit: exit.map(|s| s.0),
        frame_words: saves.frame_words(),
        reads,
        saves: saves.into_list(),
        changes,
        calls_runtime,
    })
}

/// What the session body changes of the arguments, and the exit body of the result.
fn changes_of(request: &BodyRequest<'_>) -> Changes {
    let [session, exit] = [Side::Session, Side::Exit].map(|side| changes_on(request, side));
    Changes { args: session.args, result: exit.result }
}

/// What the stores mean that programs do on `side`.
fn changes_on(request: &BodyRequest<'_>, side: Side) -> Changes {
    let programs = request.programs.iter().filter(|p| runs_on(side, p, request));
    let changed = programs.map(|p| changes(&on_side(p, side), p.kind, request.signature));
    changed.fold(Changes::NONE, Changes::join)
}

/// The program, or the half of it that runs on this side.
fn on_side<'a>(program: &ProgramUse<'a>, side: Side) -> Cow<'a, Verified> {
    match program.kind {
        ProgramKind::Fsession => Cow::Owned(session::half(program.verified, side)),
        _ => Cow::Borrowed(program.verified),
    }
}

fn check_request(request: &BodyRequest<'_>) -> Result<(), CompileError> {
    let n_programs = request.plan.n_programs;
    for p in request.programs {
        let skips = p.kind == ProgramKind::FmodRet && p.verified.return_range() != (0..=0);
        if skips && let Err(reason) = skip_result(request.signature) {
            return Err(CompileError::Result { reason });
        }
        if p.state_index >= n_programs {
            return Err(CompileError::NoSuchState { state_index: p.state_index, n_programs });
        }
    }
    if let Some(map) = request.printk_map
        && map.0 as usize >= request.plan.maps.len()
    {
        return Err(CompileError::NoSuchMap { map, n_maps: request.plan.maps.len() });
    }
    Ok(())
}

/// A program with what one side's body needs to know of it.
struct Chosen<'a> {
    program: &'a ProgramUse<'a>,
    /// The program, or the half of it that runs on this side.
    verified: Cow<'a, Verified>,
    guard: Guard,
    takes_locks: bool,
    cookie: Number,
    cookie_word: u32,
}

fn compile_side(
    job: &Job<'_>,
    side: Side,
    saves: &Saves,
) -> Result<Option<(Code, Outcome)>, CompileError> {
    let request = job.request;
    let mut n_sessions = 0;
    let mut chosen = Vec::new();
    for (index, program) in (0..).zip(request.programs) {
        let cookie_word = n_sessions;
        n_sessions += u32::from(program.kind == ProgramKind::Fsession);
        if runs_on(side, program, request) {
            let verified = on_side(program, side);
            let guard = guard::of_program(&verified, request.plan);
            let takes_locks = guard::takes_locks(&verified, request.plan);
            let cookie = job.number(program.cookie, RelocTarget::Cookie { program: index });
            chosen.push(Chosen { program, verified, guard, takes_locks, cookie, cookie_word });
        }
    }
    if chosen.is_empty() {
        return Ok(None);
    }
    chosen.sort_by_key(|c| rank(c.program.kind));
    // A guarded program's own stores would hide another's unmerged ones from the check below.
    if chosen.iter().any(|c| c.guard == Guard::Needed) {
        guard_all_writers(&mut chosen);
    }
    let made = build(job, side, &chosen, saves)?;
    let unproved = chosen.iter().any(|c| c.guard == Guard::UnlessMerged);
    if !unproved || guard::writes_are_single_instructions(&made.0.bytes) {
        return Ok(Some(made));
    }
    guard_all_writers(&mut chosen);
    build(job, side, &chosen, saves).map(Some)
}

fn guard_all_writers(chosen: &mut [Chosen<'_>]) {
    for c in chosen {
        if c.guard == Guard::UnlessMerged {
            c.guard = Guard::Needed;
        }
    }
}

fn build(
    job: &Job<'_>,
    side: Side,
    chosen: &[Chosen<'_>],
    saves: &Saves,
) -> Result<(Code, Outcome), CompileError> {
    let request = job.request;
    let probes = match chosen.iter().any(|c| c.program.kind == ProgramKind::Uprobe) {
        true => Probes::Some,
        false => Probes::None,
    };
    let parameters = Parameters::of(side, request.signature, probes);
    let mut signature = Signature::new(CallConv::PreserveAll);
    signature.params = parameters.types().map(AbiParam::new).collect();
    let mut func = Function::with_name_signature(UserFuncName::user(0, 0), signature);
    let mut context = FunctionBuilderContext::new();
    let mut b = FunctionBuilder::new(&mut func, &mut context);
    let block = b.create_block();
    b.append_block_params_for_function_params(block);
    b.switch_to_block(block);
    let params = b.block_params(block).to_vec();
    let args = Arguments::new(&mut b, side, request.signature, parameters.split(&params));
    let args = args.changed_by(changes_on(request, side));
    if side == Side::Session {
        for c in chosen.iter().filter(|c| c.program.kind == ProgramKind::Fsession) {
            zero_cookie(&mut b, &args, request.frame_offset, c.cookie_word);
        }
    }
    let mut outcome = Outcome::new(saves.clone());
    let end = b.create_block();
    let slot = chosen
        .iter()
        .any(|c| c.guard == Guard::Needed || uses_slot(&c.verified, request.plan))
        .then(|| find_slot(&mut b, &mut outcome, end));
    let env = Env {
        plan: request.plan,
        printk_map: request.printk_map,
        function_address: job.number(request.function_address.0, RelocTarget::FunctionAddress),
        frame_offset: request.frame_offset,
        args,
        has_runtime: true,
        slot,
    };
    for c in chosen {
        emit_program(&mut b, &env, c, &mut outcome, end)?;
    }
    b.ins().jump(end, &[]);
    b.switch_to_block(end);
    b.ins().return_(&[]);
    b.seal_all_blocks();
    b.finalize(clif::isa(request.cpu)?.frontend_config());
    let code = slim(clif::compile(func, request.cpu)?);
    // The compiler is not trusted with a register that a production process relies on.
    check_body(&code.bytes)?;
    check_cpu(&code.bytes, request.cpu)?;
    Ok((code, outcome))
}

/// Does the program, or what its tail calls lead to, itself name its thread's slot?
pub(crate) fn uses_slot(verified: &Verified, plan: &ArenaPlan) -> bool {
    let per_thread = |map: MapIdx| {
        let kind = plan.maps.get(map.0 as usize).map(|m| m.kind);
        matches!(kind, Some(MapKind::PerCpuArray | MapKind::PerCpuHash))
    };
    let members = verified.members();
    let mut facts = members.flat_map(|member| member.facts().iter().zip(member.insns()));
    facts.any(|(fact, insn)| match *fact {
        Fact::Call {
            helper:
                Helper::GetPrandomU32
                | Helper::MapUpdateElem
                | Helper::SpinLock
                | Helper::SpinUnlock,
            ..
        } => true,
        Fact::Call {
            helper: Helper::MapLookupElem | Helper::ForEachMapElem,
            map: Some(map),
            ..
        } => {
            let kind = plan.maps.get(map.0 as usize).map(|m| m.kind);
            !kind.is_some_and(|kind| kind == MapKind::Array || kind.holds_maps())
        }
        Fact::Plain if insn.opcode == op::LDDW && insn.src == PSEUDO_MAP_VALUE => {
            per_thread(MapIdx(insn.imm.cast_unsigned()))
        }
        _ => false,
    })
}

/// Emits the slot lookup; threads without one go to `end`, counted by the runtime.
///
/// A hit needs a slot as well: where `fs:0` is 0 (Go's own threads), the free home entry looks
/// like a hit.
pub(crate) fn find_slot(b: &mut FunctionBuilder<'_>, outcome: &mut Outcome, end: Block) -> Value {
    outcome.calls_runtime = true;
    let cold = b.create_block();
    let found = b.create_block();
    b.set_cold_block(cold);
    let slot = b.append_block_param(found, types::I64);

    let tp = symbol(b, RelocTarget::ThreadPointer);
    // An entry is 16 bytes, so the shift is 4 less and the mask 4 bits further left.
    let entry_shift = size_of::<ThreadEntry>().trailing_zeros();
    let mask = (THREAD_TABLE_ENTRIES - 1) << entry_shift;
    let index = b.ins().ushr_imm_s(tp, i64::from(THREAD_TABLE_SHIFT - entry_shift));
    let index = b.ins().band_imm_u(index, offset(mask));
    let table = symbol(b, RelocTarget::Arena { addend: -offset(THREAD_TABLE_BYTES) });
    let entry = b.ins().iadd(table, index);
    let slot_at = field(offset_of!(ThreadEntry, slot));
    let owner_at = field(offset_of!(ThreadEntry, thread_pointer));
    let home = b.ins().load(types::I64, proved(), entry, slot_at);
    // Right before its only use, so that it becomes the comparison's memory operand.
    let owner = b.ins().load(types::I64, proved(), entry, owner_at);
    let hit = b.ins().icmp(IntCC::Equal, owner, tp);
    let own = b.create_block();
    b.ins().brif(hit, own, &[], cold, &[]);

    b.switch_to_block(own);
    b.ins().brif(home, found, &[home.into()], cold, &[]);

    b.switch_to_block(cold);
    let arena = symbol(b, RelocTarget::Arena { addend: 0 });
    let claimed = call_runtime(b, RuntimeFn::ThreadSlot, &[arena]);
    b.ins().brif(claimed, found, &[claimed.into()], end, &[]);

    b.switch_to_block(found);
    slot
}

fn emit_program(
    b: &mut FunctionBuilder<'_>,
    env: &Env<'_>,
    chosen: &Chosen<'_>,
    outcome: &mut Outcome,
    end: Block,
) -> Result<(), CompileError> {
    let program = chosen.program;
    let guarded = match (chosen.guard, env.slot) {
        (Guard::Needed, Some(slot)) => Some(slot),
        _ => None,
    };
    let after = b.create_block();
    let run = guarded.map(|slot| {
        let at = env.plan_offset(program.state_index);
        let state = b.ins().iadd_imm_s(slot, at);
        let run = Run::new(slot, state, chosen.takes_locks);
        run.enter(b, after);
        run
    });
    let given_up = run.filter(|_| chosen.takes_locks).map(|run| (run, b.create_block()));
    let members = Use::members(Use {
        verified: &chosen.verified,
        kind: Some(program.kind),
        cookie: chosen.cookie,
        cookie_word: chosen.cookie_word,
        given_up: given_up.map(|(_, block)| block),
    });
    // The context pointer is never used as a number.
    let ctx = b.ins().iconst(types::I64, 0);
    let mut translator = Translator::new(b, env, &members, outcome);
    let skips = env.args.side == Side::Modify && program.verified.return_range() != (0..=0);
    let r0 = if skips {
        Some(translator.program(ctx, ctx)?)
    } else {
        translator.program_without_result(ctx, ctx)?;
        None
    };
    if let Some(run) = run {
        run.leave(b);
    }
    match r0 {
        Some(r0) => skip_unless_zero(b, env, r0, after, end),
        None => {
            b.ins().jump(after, &[]);
        }
    }
    if let Some((run, block)) = given_up {
        run.give_up(b, block, after);
    }
    b.switch_to_block(after);
    Ok(())
}

/// `if r0 != 0 { result = r0; goto end }; goto after`
fn skip_unless_zero(
    b: &mut FunctionBuilder<'_>,
    env: &Env<'_>,
    r0: Value,
    after: Block,
    end: Block,
) {
    let skips = b.create_block();
    b.set_cold_block(skips);
    b.ins().brif(r0, skips, &[], after, &[]);
    b.switch_to_block(skips);
    store_skip_value(b, &env.args, r0);
    b.ins().jump(end, &[]);
}

/// One guarded run of a program.
#[derive(Clone, Copy)]
struct Run {
    /// The program's [`ProgramState`].
    state: Value,
    /// Where the guard's mark is: address and offset.
    active: (Value, i32),
}

impl Run {
    fn new(slot: Value, state: Value, takes_locks: bool) -> Self {
        let active = if takes_locks {
            (slot, field(offset_of!(SlotHeader, locking)))
        } else {
            (state, field(offset_of!(ProgramState, active)))
        };
        Self { state, active }
    }

    /// `if state.active > rsp { state.misses += 1; goto after }; state.active = rsp`
    ///
    /// A run that this one has interrupted is further up the stack. One that is not was left
    /// half done by a signal handler that jumped away (siglongjmp), or is on another stack; if it
    /// counted, the program would never run again on this thread.
    fn enter(self, b: &mut FunctionBuilder<'_>, after: Block) {
        let (busy, free) = (b.create_block(), b.create_block());
        b.set_cold_block(busy);
        let (base, at) = self.active;
        let active = b.ins().load(types::I64, proved(), base, at);
        let here = b.ins().get_stack_pointer(types::I64);
        let is_above = b.ins().icmp(IntCC::UnsignedGreaterThan, active, here);
        b.ins().brif(is_above, busy, &[], free, &[]);

        b.switch_to_block(busy);
        self.count_miss(b);
        b.ins().jump(after, &[]);

        b.switch_to_block(free);
        b.ins().store(proved(), here, base, at);
        b.ins().sequence_point();
    }

    fn count_miss(self, b: &mut FunctionBuilder<'_>) {
        let misses_at = field(offset_of!(ProgramState, misses));
        let misses = b.ins().load(types::I64, proved(), self.state, misses_at);
        let misses = b.ins().iadd_imm_s(misses, 1);
        b.ins().store(proved(), misses, self.state, misses_at);
    }

    /// What `block` does, where a run goes that cannot get a lock.
    fn give_up(self, b: &mut FunctionBuilder<'_>, block: Block, after: Block) {
        b.set_cold_block(block);
        b.switch_to_block(block);
        self.count_miss(b);
        self.leave(b);
        b.ins().jump(after, &[]);
    }

    fn leave(self, b: &mut FunctionBuilder<'_>) {
        let zero = b.ins().iconst(types::I64, 0);
        // Without this barrier (no machine code) Cranelift might find `active = rsp` dead.
        b.ins().sequence_point();
        let (base, at) = self.active;
        b.ins().store(proved(), zero, base, at);
    }
}

fn offset(bytes: usize) -> i64 {
    i64::try_from(bytes).expect("offsets in shared structures are small")
}

fn field(bytes: usize) -> i32 {
    i32::try_from(bytes).expect("offsets in shared structures are small")
}
