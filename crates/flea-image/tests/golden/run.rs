//! Executes a case in this process: registers in, registers and maps out.

use std::fmt::Write;

use flea_image::call_patch;
use flea_object::spec::{MapKind, ProgramKind};
use flea_symbols::addr::RemoteAddr;

use crate::case::Case;
use crate::made::{Places, make};
use crate::support::rig::{BODIES, FUNCTION, IMAGE, Registers, Rig};

/// The general registers by hardware number.
const GPRS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

/// A line per run. Without an fmod_ret program or a changed result, the caller has to find every register as if
/// nobody traced the function.
pub fn runs(case: &Case) -> String {
    let traced = attached(case);
    let bare = Rig::new(&[], true);
    bare.code.write(FUNCTION, &case.site.function(bare.code.address()).0);
    bare.code.executable();
    let may_differ = case
        .controllers
        .iter()
        .any(|c| c.programs.iter().any(|(kind, _)| *kind == ProgramKind::FmodRet));
    let mut out = String::new();
    for run in &case.runs {
        let input = registers(run);
        let (output, untraced) = (traced.call(&input), bare.call(&input));
        let mut differ = differences(&output, &untraced);
        // What an unwinder is asked in front of the original may change it.
        differ.retain(|register| !(case.is_unwinder && register == "r11"));
        // What programs have changed of the arguments is between them and the function.
        let is_result = |differ: &[String]| case.allows_write && differ == ["rax"];
        let may_differ = may_differ || is_result(&differ);
        assert!(may_differ || differ.is_empty(), "{run:?} changes {differ:?}");
        let shown: Vec<String> =
            run.iter().map(|(register, number)| format!("{register}={number:#x}")).collect();
        let _ = write!(out, "  {} -> rax={:#x}", shown.join(" "), output.gpr[0]);
        let _ = write!(out, " xmm0={:#x}", output.xmm[0][0]);
        if !differ.is_empty() {
            let _ = write!(out, ", unlike untraced: {}", differ.join(" "));
        }
        let maps = case.maps.iter().enumerate();
        for (i, map) in maps.filter(|(_, map)| map.kind != MapKind::ProgArray) {
            let _ = write!(out, "; map {i}:{}", words(&traced, i, map.kind, map.value_size_bytes));
        }
        out.push('\n');
    }
    out
}

/// The case's function with its programs.
fn attached(case: &Case) -> Rig {
    let rig = Rig::new(&case.maps, true);
    let base = RemoteAddr(rig.code.address());
    let at = |offset: usize| base.offset(i64::try_from(offset).unwrap());
    let places = Places {
        site: at(FUNCTION),
        image: at(IMAGE),
        bodies: at(BODIES),
        address_of: &|target| rig.address_of(target),
    };
    let made = make(case, &places);
    let offset = |address: RemoteAddr| usize::try_from(address.0 - base.0).unwrap();
    for (address, bytes) in &made.called {
        rig.code.write(offset(*address), bytes);
    }
    rig.code.write(FUNCTION, &case.site.function(base.0).0);
    let patch = match &made.skeleton {
        Some(skeleton) => {
            rig.code.write(IMAGE, &skeleton.bytes);
            skeleton.site_patch
        }
        None => call_patch(places.site, made.called[0].0).unwrap(),
    };
    rig.code.write(FUNCTION, &patch);
    rig.code.executable();
    rig
}

/// The rig's pattern in all registers but the named ones.
fn registers(run: &[(String, u64)]) -> Registers {
    let mut registers = Registers::pattern();
    for (name, number) in run {
        match (GPRS.iter().position(|g| g == name), name.strip_prefix("xmm")) {
            (Some(i), _) => registers.gpr[i] = *number,
            (None, Some(i)) => registers.xmm[i.parse::<usize>().unwrap()][0] = *number,
            _ => panic!("register {name}"),
        }
    }
    registers
}

fn differences(a: &Registers, b: &Registers) -> Vec<String> {
    let general = (0..16).filter(|i| a.gpr[*i] != b.gpr[*i]).map(|i| GPRS[i].to_owned());
    let vectors = (0..16).filter(|i| a.xmm[*i] != b.xmm[*i]).map(|i| format!("xmm{i}"));
    general.chain(vectors).collect()
}

/// The words of the map's first value, up to the last that is not 0.
fn words(rig: &Rig, map: usize, kind: MapKind, value_size_bytes: u32) -> String {
    let word = |i: usize| match kind {
        MapKind::PerCpuArray => rig.slot_word(rig.plan.maps[map].slot_offset + 8 * i as u64),
        _ => rig.array(map, i),
    };
    let mut words: Vec<u64> = (0..value_size_bytes as usize / 8).map(word).collect();
    while words.len() > 1 && words.last() == Some(&0) {
        words.pop();
    }
    words.iter().map(|w| format!(" {w:#x}")).collect()
}
