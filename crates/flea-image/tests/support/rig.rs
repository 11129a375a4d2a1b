//! A traced function of this process with everything around it: code pages, an arena, stubs
//! of the runtime, and a harness that sets and reads every register.

use flea_image::{
    BODY_FRAMES_OFFSET, Body, BodyRef, BodyRequest, Cpu, ProgramUse, RelocTarget, SiteKind,
    SkeletonBody, SkeletonRequest, StackCopy, call_patch, compile_body, compile_shared_body,
    link_skeleton, skip_result,
};
use flea_layout::plan::ArenaPlan;
use flea_layout::shared::{ArenaHeader, RuntimeFn, THREAD_TABLE_BYTES};
use flea_object::spec::{MapSpec, ProgramKind};
use flea_symbols::addr::RemoteAddr;
use flea_symbols::signature::{ArgWord, RetWord, Signature};
use flea_verifier::Verified;
use iced_x86::code_asm::*;

use std::mem::offset_of;

use super::Pages;
use super::programs::{int, plan, words};

pub const PAGE: usize = 4096;
/// In the code pages: the function, its image, bodies, stubs of the runtime, the harness.
pub const FUNCTION: usize = 0;
pub const IMAGE: usize = PAGE;
pub const BODIES: usize = 4 * PAGE;
pub const STUBS: usize = 8 * PAGE;
pub const HARNESS: usize = 9 * PAGE;
pub const CODE_BYTES: usize = 10 * PAGE;

/// Registers as the harness loads and stores them: 16 integer (rsp unused), 16 vector.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Registers {
    pub gpr: [u64; 16],
    pub xmm: [[u64; 2]; 16],
}

impl Registers {
    pub fn pattern() -> Self {
        Self {
            gpr: std::array::from_fn(|i| 0x1111_0000_0000_0000 * (i as u64 % 14) + i as u64),
            xmm: std::array::from_fn(|i| [0xaaaa_0000 + i as u64, 0xbbbb_0000_0000 + i as u64]),
        }
    }
}

pub fn assemble(
    at: u64,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    write(&mut a).unwrap();
    a.assemble(at).unwrap()
}

pub const GPRS: [AsmRegister64; 16] =
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
pub const XMMS: [AsmRegisterXmm; 16] = [
    xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13, xmm14,
    xmm15,
];

/// `fn(in: &Registers, out: &mut Registers, target)`: loads all registers, pushes the stack
/// words 0x64, 0xffffffff_00000065, 0x66, 0x67, calls, stores all registers.
pub fn harness(at: u64) -> Vec<u8> {
    assemble(at, |a| {
        for r in [rbx, rbp, r12, r13, r14, r15, rsi, rdx] {
            a.push(r)?;
        }
        a.sub(rsp, 8)?;
        a.push(0x67)?;
        a.push(0x66)?;
        a.mov(rax, 0xffff_ffff_0000_0065u64)?;
        a.push(rax)?;
        a.push(0x64)?;
        for (i, x) in (0..).zip(XMMS) {
            a.movdqu(x, ptr(rdi + (128 + 16 * i)))?;
        }
        for (i, r) in (0..).zip(GPRS) {
            if r != rsp && r != rdi {
                a.mov(r, ptr(rdi + 8 * i))?;
            }
        }
        a.mov(rdi, ptr(rdi + 56))?;
        a.call(qword_ptr(rsp + 40))?;
        a.push(rax)?;
        a.mov(rax, ptr(rsp + 56))?;
        for (i, r) in (1..).zip(&GPRS[1..]) {
            if *r != rsp {
                a.mov(ptr(rax + 8 * i), *r)?;
            }
        }
        for (i, x) in (0..).zip(XMMS) {
            a.movdqu(ptr(rax + (128 + 16 * i)), x)?;
        }
        a.pop(rcx)?;
        a.mov(ptr(rax), rcx)?;
        a.add(rsp, 40 + 16)?;
        for r in [r15, r14, r13, r12, rbp, rbx] {
            a.pop(r)?;
        }
        a.ret()
    })
}

/// The traced function: `rax = rdi + rsi + stack[0] + stack[3]; rdx = 7; xmm0 += xmm1;
/// r10 = rsp % 16`.
pub fn function(at: u64, kind: SiteKind) -> (Vec<u8>, usize) {
    let bytes = assemble(at, |a| {
        if kind == SiteKind::Nops {
            a.db(&[0x0f, 0x1f, 0x44, 0x00, 0x00])?;
        }
        a.lea(rax, ptr(rdi + rsi))?;
        a.add(rax, ptr(rsp + 8))?;
        a.add(rax, ptr(rsp + 32))?;
        a.mov(edx, 7)?;
        a.addsd(xmm0, xmm1)?;
        a.mov(r10, rsp)?;
        a.and(r10, 15)?;
        a.ret()
    });
    // lea (4 bytes), add (5 bytes)
    (bytes, if kind == SiteKind::Nops { 5 } else { 9 })
}

/// How bodies get into the skeleton.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Placing {
    Inline,
    Called,
    /// The site calls the only entry body.
    Direct,
}

/// One traced function with everything around it.
pub struct Rig {
    pub code: Pages,
    pub data: Pages,
    pub plan: ArenaPlan,
    pub slot_found: bool,
    /// Bodies are compiled for many functions alike.
    pub shared: bool,
}

impl Rig {
    pub fn arena(&self) -> u64 {
        self.data.address() + THREAD_TABLE_BYTES as u64
    }

    pub fn slot_address(&self) -> u64 {
        self.arena() + self.plan.slots_offset
    }

    pub fn new(maps: &[MapSpec], slot_found: bool) -> Self {
        let plan = plan(maps);
        let data = Pages::new(THREAD_TABLE_BYTES + plan.size_bytes as usize);
        let rig = Self { code: Pages::new(CODE_BYTES), data, plan, slot_found, shared: false };
        rig.write_stubs();
        rig.code.write(HARNESS, &harness(rig.code.address() + HARNESS as u64));
        rig
    }

    /// The runtime's functions, 64 bytes each: the slot or 0; a clock that ticks at each look;
    /// a memory in which each byte is the lowest one of its address, but for the first page,
    /// where nothing is.
    pub fn write_stubs(&self) {
        let no_slot = self.arena() + offset_of!(ArenaHeader, no_slot) as u64;
        let clock = self.arena() + self.plan.slots_offset - 8;
        for (i, f) in RuntimeFn::ALL.into_iter().enumerate() {
            let at = STUBS + 64 * i;
            let slot = if self.slot_found { self.slot_address() } else { 0 };
            let bytes = assemble(self.code.address() + at as u64, |a| match f {
                RuntimeFn::ThreadSlot if slot != 0 => {
                    a.mov(rax, slot)?;
                    a.ret()
                }
                // No slot: the real one counts that in the arena's header.
                RuntimeFn::ThreadSlot => {
                    a.mov(rax, no_slot)?;
                    a.inc(qword_ptr(rax))?;
                    a.mov(rax, 0u64)?;
                    a.ret()
                }
                RuntimeFn::ClockNs => {
                    a.push(rcx)?;
                    a.mov(rcx, clock)?;
                    a.add(qword_ptr(rcx), 5)?;
                    a.mov(rax, qword_ptr(rcx))?;
                    a.pop(rcx)?;
                    a.ret()
                }
                RuntimeFn::ProbeReadUser => probe_read(a),
                _ => a.ud2(),
            });
            self.code.write(at, &bytes);
        }
    }

    pub fn address_of(&self, target: RelocTarget) -> u64 {
        match target {
            RelocTarget::Arena { addend } => self.arena().wrapping_add_signed(addend),
            RelocTarget::Runtime(f) => {
                let i = RuntimeFn::ALL.iter().position(|g| *g == f).unwrap();
                self.code.address() + (STUBS + 64 * i) as u64
            }
            RelocTarget::VdsoClockGettime => 0,
            RelocTarget::FunctionAddress => self.code.address(),
            RelocTarget::Cookie { .. } => 7,
            RelocTarget::Constant(_) | RelocTarget::ThreadPointer | RelocTarget::SkeletonFrame => {
                unreachable!()
            }
        }
    }

    /// Attaches and makes the code executable.
    pub fn attach(
        &self,
        signature: &Signature,
        programs: &[(&Verified, ProgramKind)],
        kind: SiteKind,
        placing: Placing,
        stack_words: u32,
    ) {
        let function = function(self.code.address(), kind);
        self.attach_to(&function, signature, programs, kind, placing, stack_words);
    }

    /// As [`Rig::attach`], to a function of the test's own: its bytes, and how many of them are
    /// replaced.
    pub fn attach_to(
        &self,
        (function, n_replaced): &(Vec<u8>, usize),
        signature: &Signature,
        programs: &[(&Verified, ProgramKind)],
        kind: SiteKind,
        placing: Placing,
        stack_words: u32,
    ) -> Body {
        let programs: Vec<ProgramUse<'_>> = (0u32..)
            .zip(programs)
            .map(|(i, p)| ProgramUse { verified: p.0, kind: p.1, cookie: 7, state_index: i })
            .collect();
        let site = RemoteAddr(self.code.address());
        let compile = if self.shared { compile_shared_body } else { compile_body };
        let body = compile(&BodyRequest {
            signature,
            programs: &programs,
            maps: &[],
            plan: &self.plan,
            function_address: site,
            frame_offset: BODY_FRAMES_OFFSET,
            printk_map: None,
            cpu: Cpu { lzcnt: std::arch::is_x86_feature_detected!("lzcnt") },
        })
        .unwrap();
        let resolved = [&body.entry, &body.session, &body.modify, &body.exit]
            .map(|c| c.as_ref().map(|c| c.resolve(|t| self.address_of(t))));
        let at = |i: usize| RemoteAddr(self.code.address() + (BODIES + PAGE * i) as u64);
        let mut refs = [None; 4];
        for (i, bytes) in resolved.iter().enumerate() {
            let Some(bytes) = bytes else { continue };
            self.code.write(BODIES + PAGE * i, bytes);
            refs[i] = Some(match placing {
                Placing::Inline => BodyRef::Inline(bytes),
                Placing::Called | Placing::Direct => BodyRef::Call(at(i)),
            });
        }
        let skeleton = link_skeleton(&SkeletonRequest {
            site,
            replaced: &function[..*n_replaced],
            kind,
            image_address: RemoteAddr(self.code.address() + IMAGE as u64),
            bodies: &[SkeletonBody {
                entry: refs[0],
                session: refs[1],
                modify: refs[2],
                exit: refs[3],
                reads: &body.reads,
                saves: &body.saves,
                changes: body.changes,
                frame_words: body.frame_words,
                frame_offset: BODY_FRAMES_OFFSET,
            }],
            skip: skip_result(signature).ok(),
            stack_copy: StackCopy::Exactly(stack_words),
            stack_align_bytes: 16,
            replacement: None,
        })
        .unwrap();
        self.code.write(FUNCTION, function);
        self.code.write(IMAGE, &skeleton.bytes);
        let patch = match placing {
            Placing::Direct => call_patch(site, at(0)).unwrap(),
            _ => skeleton.site_patch,
        };
        self.code.write(FUNCTION, &patch);
        self.code.executable();
        body
    }

    pub fn call(&self, input: &Registers) -> Registers {
        let mut output = Registers { gpr: [0; 16], xmm: [[0; 2]; 16] };
        // SAFETY: the harness has this very type and keeps what the ABI says.
        let harness: extern "sysv64" fn(*const Registers, *mut Registers, u64) =
            unsafe { std::mem::transmute(self.code.address() + HARNESS as u64) };
        harness(input, &raw mut output, self.code.address());
        output
    }

    pub fn array(&self, map: usize, word: usize) -> u64 {
        let at = THREAD_TABLE_BYTES + self.plan.maps[map].data_offset as usize;
        self.data.read(at + 8 * word)
    }

    pub fn slot_word(&self, offset: u64) -> u64 {
        self.data.read(THREAD_TABLE_BYTES + (self.plan.slots_offset + offset) as usize)
    }
}

/// `(to: rdi, size_bytes: rsi, from: rdx) -> 0 or -EFAULT`
fn probe_read(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    let (mut next, mut mapped) = (a.create_label(), a.create_label());
    let changed = [rdi, rsi, rdx];
    changed.into_iter().try_for_each(|r| a.push(r))?;
    a.xor(eax, eax)?;
    a.cmp(rdx, PAGE as i32)?;
    a.jae(next)?;
    a.mov(rax, -14i64)?;
    a.set_label(&mut next)?;
    a.mov(byte_ptr(rdi), dl)?;
    a.test(rax, rax)?;
    a.je(mapped)?;
    a.mov(byte_ptr(rdi), 0)?;
    a.set_label(&mut mapped)?;
    a.inc(rdi)?;
    a.inc(rdx)?;
    a.dec(rsi)?;
    a.jne(next)?;
    changed.into_iter().rev().try_for_each(|r| a.pop(r))?;
    a.ret()
}

/// What the function does to the registers when nobody traces it.
pub fn untraced(kind: SiteKind, input: &Registers) -> Registers {
    let rig = Rig::new(&[], true);
    rig.code.write(FUNCTION, &function(rig.code.address(), kind).0);
    rig.code.executable();
    rig.call(input)
}

/// Two integers, a vector register, two stack words of which one is an `int`.
pub fn signature() -> Signature {
    let args =
        [ArgWord::Gpr(0), ArgWord::Gpr(5), ArgWord::Xmm(7), ArgWord::Stack(0), ArgWord::Stack(1)];
    let mut s = words(args.into_iter(), &[RetWord::Rax]);
    s.params[4].ty = int(4);
    s
}
