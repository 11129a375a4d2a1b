//! What changes of a registry do to code and sites, without a process.

use std::collections::HashMap;

use super::*;
use crate::registry::{CodeArena, Controller};

const SITE: RemoteAddr = RemoteAddr(0x40_1000);
const CODE: RemoteAddr = RemoteAddr(0x50_0000);
const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];
/// push rbp; mov rbp, rsp; pop rbp; ret
const BODY: [u8; 6] = [0x55, 0x48, 0x89, 0xe5, 0x5d, 0xc3];

#[derive(Clone, Copy)]
enum When {
    Entry,
    Exit,
}

fn function(kind: SiteKind, original: &[u8], insn_lens: &[u8]) -> FunctionState {
    let first = original[..5].try_into().unwrap();
    FunctionState {
        module: "/m".into(),
        name: "f".into(),
        address: SITE,
        file: None,
        site: SITE,
        door: None,
        kind,
        original: original.to_vec(),
        insn_lens: insn_lens.to_vec(),
        patched: first,
        previous: first,
        skeleton: None,
        skip: None,
        stack: StackArgs::NONE,
        calls_original: false,
        finds_frames: None,
        returns_to: None,
        calls: vec![],
        switches: vec![],
        bodies: vec![],
        replacements: vec![],
    }
}

fn nops() -> FunctionState {
    function(SiteKind::Nop, &NOP5, &[5])
}

/// push rbp; mov rbp, rsp; push rbx
fn prologue() -> FunctionState {
    function(SiteKind::Relocated, &[0x55, 0x48, 0x89, 0xe5, 0x53], &[1, 3, 1])
}

fn registry(f: FunctionState) -> Registry {
    let code = vec![CodeArena::new(CODE, 0x10000)];
    Registry { code, functions: vec![f.into()], ..Registry::default() }
}

/// The registry behind a change, the sites swapped.
fn done(change: Change) -> Registry {
    let mut registry = change.registry;
    registry.retired.extend(change.retired);
    registry.committed(true);
    registry
}

/// One more body on the only function.
fn add(registry: Registry, known: &mut HashMap<RemoteAddr, Vec<u8>>, when: When) -> Change {
    let mut change = Change::new(registry, known.clone());
    let placed = change.place(SITE, BODY.to_vec()).unwrap();
    known.insert(placed.at, BODY.to_vec());
    let id = change.registry.next_id;
    change.registry.next_id += 1;
    let mut f = change.registry.functions.remove(0);
    let before = arenas(&f);
    let body = BodyState {
        id,
        owner: Controller { pid: 1, started: 1 },
        since: 0,
        arena: RemoteAddr(0x60_0000 + 0x1000 * u64::from(id)),
        programs: vec![],
        writes_target: false,
        changes: 0,
        entry: matches!(when, When::Entry).then_some(placed),
        session: None,
        modify: None,
        exit: matches!(when, When::Exit).then_some(placed),
        frame_offset: FIRST_FRAME_OFFSET,
        frame_words: 0,
        reads: 0,
        saves: vec![],
    };
    f.bodies.insert(0, body);
    change.relink(&mut f, before).unwrap();
    change.registry.functions.push(f);
    assert!(change.switch_off(usize::MAX));
    change
}

fn remove(registry: Registry, known: &HashMap<RemoteAddr, Vec<u8>>, id: u32) -> (Change, Vec<u32>) {
    let mut change = Change::new(registry, known.clone());
    let removed = change.remove(numbered(id)).unwrap();
    assert!(change.switch_off(usize::MAX));
    (change, removed)
}

fn numbered(id: u32) -> impl Fn(Attached<'_>) -> bool {
    move |attached| match attached {
        Attached::Body(body) => body.id == id,
        Attached::Replacement(one) => one.id == id,
    }
}

#[test]
fn one_entry_body_on_nops_is_called_directly() {
    let mut known = HashMap::new();
    let change = add(registry(nops()), &mut known, When::Entry);
    let poke = &change.pokes[0];
    assert_eq!((poke.site, &poke.expected[..]), (SITE, &NOP5[..]));
    assert_eq!(poke.new[0], 0xe8, "a call");
    let f = &change.registry.functions[0];
    assert_eq!((f.skeleton, f.previous, f.patched), (None, NOP5, poke.new));
    assert_eq!(change.retired, []);

    let (change, removed) = remove(done(change), &known, 0);
    assert_eq!(removed, [0]);
    assert_eq!((change.pokes[0].new, change.pokes[0].trap_to), (NOP5, SITE.offset(5)));
    assert_eq!(change.registry.functions.len(), 1, "until the site is swapped");
    let code: Vec<_> = change.retired.iter().map(|r| (r.code.at, r.calls_original)).collect();
    assert_eq!(code, [(CODE, false)]);
    assert_eq!(done(change).functions, []);
}

#[test]
fn two_bodies_share_a_skeleton_that_goes_with_the_second() {
    let mut known = HashMap::new();
    let first = add(registry(nops()), &mut known, When::Entry);
    let direct = first.pokes[0].new;
    let both = add(done(first), &mut known, When::Entry);
    let skeleton = both.registry.functions[0].skeleton.unwrap();
    let poke = &both.pokes[0];
    assert_eq!((&poke.expected[..], poke.new[0]), (&direct[..], 0xe9));
    assert_eq!(poke.trap_to, skeleton.at, "nobody misses a program meanwhile");
    let ids: Vec<u32> = both.registry.functions[0].bodies.iter().map(|b| b.id).collect();
    assert_eq!(ids, [1, 0], "the newest runs first");

    let (change, removed) = remove(done(both), &known, 1);
    assert_eq!(removed, [1]);
    assert_eq!(change.pokes[0].new, direct, "the other controller's body is called again");
    assert_eq!(change.pokes[0].trap_to, skeleton.at);
    assert_eq!(change.registry.functions[0].bodies.len(), 1);
    let retired: Vec<_> = change.retired.iter().map(|r| r.code).collect();
    assert!(retired.contains(&skeleton));
    assert_eq!(retired.len(), 2, "the skeleton and the body");
    let of_skeleton = change.retired.iter().find(|r| r.code == skeleton).unwrap();
    assert_eq!(of_skeleton.arenas.len(), 2, "it works on both arenas for as long as it lives");
}

#[test]
fn an_exit_body_outlives_its_removal() {
    let mut known = HashMap::new();
    let change = add(registry(prologue()), &mut known, When::Exit);
    let f = change.registry.functions[0].clone();
    assert!(f.calls_original);
    let back = f.returns_to.unwrap();
    let skeleton = f.skeleton.unwrap();
    assert!(skeleton.at < back && back < skeleton.at.offset(skeleton.len.into()));
    // Threads between the replaced instructions go on in their copies.
    let from: Vec<_> = change.pokes[0].moves.iter().map(|(old, _)| *old).collect();
    assert_eq!(from, [SITE.offset(1), SITE.offset(4)]);

    let (change, _) = remove(done(change), &known, 0);
    assert_eq!(change.pokes[0].new, f.original[..5]);
    let retired = change.retired.iter().find(|r| r.returns_to == Some(back)).unwrap();
    assert!(retired.calls_original && retired.code == skeleton);
    assert_eq!(change.pokes[0].moves, [], "only first bytes are swapped");
    // Who comes back finds a jump over it, and the overwriting of the return address there.
    let switch = &change.pokes[1];
    let overwrite = [0x48, 0x89, 0x6c, 0x24, 0xf8];
    assert_eq!((switch.site, &switch.expected[..], switch.new[0]), (back, &overwrite[..], 0xe9));
    let (_, bytes) = change_writes(&f, &known);
    let drained = usize::try_from(switch.trap_to.0 - skeleton.at.0).unwrap();
    assert_eq!(bytes[drained..][..7], [0x48, 0x89, 0x6c, 0x24, 0xf8, 0xc9, 0xc3]);
    assert_eq!(jump_target(back, switch.new), switch.trap_to);
    assert_eq!(change.pokes.len(), 2);
    assert!(done(change).retired.iter().all(|r| r.switches.is_empty()), "it has been thrown");
}

/// The code of the skeleton that `f` has, made once more.
fn change_writes(f: &FunctionState, known: &HashMap<RemoteAddr, Vec<u8>>) -> (RemoteAddr, Vec<u8>) {
    let mut again = Change::new(registry(f.clone()), known.clone());
    again.registry.code[0].next = f.skeleton.unwrap().at;
    again.place_skeleton(&mut f.clone()).unwrap();
    again.writes.pop().unwrap()
}

fn jump_target(at: RemoteAddr, jump: [u8; 5]) -> RemoteAddr {
    let distance = i32::from_le_bytes(jump[1..].try_into().unwrap());
    at.offset(5 + i64::from(distance))
}

/// Two controllers at exit, and calls inside that were entered when there was one.
#[test]
fn only_those_that_go_are_switched_off() {
    let mut known = HashMap::new();
    let one = done(add(registry(prologue()), &mut known, When::Exit));
    let alone = one.functions[0].switches[0].clone();
    assert_eq!((alone.body, alone.at), (0, one.functions[0].returns_to.unwrap()));
    let change = add(one, &mut known, When::Exit);
    assert_eq!(change.pokes.len(), 1, "who is inside meets what was there at its entry");
    let two = done(change);
    assert_eq!(two.retired[0].switches, std::slice::from_ref(&alone));
    let both = two.functions[0].switches.clone();
    assert_eq!(both.iter().map(|s| s.body).collect::<Vec<_>>(), [1, 0], "newest first");
    assert!(both.iter().all(|s| s.expected == NOP5 && s.trap_to == s.at.offset(5)));
    assert_eq!(jump_target(both[0].at, both[0].new), both[1].at, "the other one's turn");

    let (change, _) = remove(two, &known, 0);
    let at: Vec<_> = change.pokes[1..].iter().map(|p| (p.site, p.new)).collect();
    assert_eq!(at, [(alone.at, alone.new), (both[1].at, both[1].new)]);
    assert_eq!(flea_patch::Plan { pokes: change.pokes.clone() }.check(), Ok(()));
    let now = done(change);
    let left: Vec<_> = now.retired.iter().flat_map(|r| &r.switches).collect();
    assert_eq!(left, [&both[0]], "controller 1 is still to be run by those inside");

    // Once nobody runs in them, only what is not switched off needs its memory.
    let mut retired = now.retired.clone();
    retired.iter_mut().for_each(Retired::is_only_returned_to);
    let arenas: Vec<_> = retired.iter().flat_map(|r| &r.arenas).collect();
    assert_eq!(arenas, [&both[0].arena]);
}

/// All that go at once, where threads that arrive meanwhile must not be sent into bytes that
/// change as well.
#[test]
fn several_go_at_once() {
    let mut known = HashMap::new();
    let mut now = registry(prologue());
    for _ in 0..3 {
        now = done(add(now, &mut known, When::Exit));
    }
    let mut change = Change::new(now, known);
    change.remove(|_| true).unwrap();
    assert!(change.switch_off(usize::MAX));
    // The site; three, two and one in the skeletons of three, two and one.
    assert_eq!(change.pokes.len(), 1 + 3 + 2 + 1);
    assert_eq!(flea_patch::Plan { pokes: change.pokes.clone() }.check(), Ok(()));
}

/// Five nops before the entry, `endbr64` and two more: the door is opened with the first
/// body and closed with the last one; in between only the jump before it changes.
#[test]
fn a_door_is_opened_once_and_closed_once() {
    let bytes = [[0x90; 5].as_slice(), &[0xf3, 0x0f, 0x1e, 0xfa], &[0x90; 2]].concat();
    let mut f = function(SiteKind::Nop, &bytes, &[1, 1, 1, 1, 1, 4, 1, 1]);
    let door = SITE.offset(9);
    f.door = Some(door);
    let mut known = HashMap::new();
    let one = add(registry(f), &mut known, When::Entry);
    let [area, opened] = one.pokes.as_slice() else { panic!("{:?}", one.pokes) };
    assert_eq!((area.site, area.new[0], area.expected.len()), (SITE, 0xe9, 11));
    assert_eq!((opened.site, &opened.expected[..]), (door, &[0x90; 2][..]));
    assert_eq!(opened.new[..2], [0xeb, 0x100u16.wrapping_sub(11).to_le_bytes()[0]]);
    let from: Vec<_> = opened.moves.iter().map(|(from, _)| *from).collect();
    assert_eq!(from, [door.offset(1)], "a thread may stand between the nops");
    assert_eq!(flea_patch::Plan { pokes: one.pokes.clone() }.check(), Ok(()));

    let two = add(done(one), &mut known, When::Exit);
    assert_eq!(two.pokes.len(), 1);
    let (one, _) = remove(done(two), &known, 0);
    assert_eq!(one.pokes.len(), 1);
    let (none, _) = remove(done(one), &known, 1);
    let [closed, area, ..] = none.pokes.as_slice() else { panic!("{:?}", none.pokes) };
    assert_eq!((area.new, closed.site), ([0x90; 5], door));
    assert_eq!((closed.expected[0], &closed.new[..2]), (0xeb, &[0x90; 2][..]));
    assert!(closed.moves.is_empty());
}

#[test]
fn what_nobody_asked_for_stays() {
    let mut known = HashMap::new();
    let before = done(add(registry(prologue()), &mut known, When::Entry));
    let (change, removed) = remove(before.clone(), &known, 77);
    assert_eq!(removed, [0; 0]);
    assert_eq!(change.pokes, []);
    assert_eq!(done(change), before);
}

#[test]
fn everything_is_free_again_in_the_end() {
    let mut known = HashMap::new();
    let mut now = registry(prologue());
    for when in [When::Entry, When::Exit, When::Entry] {
        now = done(add(now, &mut known, when));
    }
    for id in [1, 0, 2] {
        now = done(remove(now, &known, id).0);
    }
    assert_eq!(now.functions, []);
    for retired in std::mem::take(&mut now.retired) {
        now.unplace(retired.code);
    }
    assert_eq!(now.code, [CodeArena::new(CODE, 0x10000)]);
}

/// A library that was closed takes its sites with it; their code is given back as usual.
#[test]
fn an_unmapped_function_retires_all_of_its_code() {
    let mut known = HashMap::new();
    let one = add(registry(prologue()), &mut known, When::Exit);
    let mut now = done(add(done(one), &mut known, When::Entry));
    let f = now.functions.remove(0);
    now.retired.extend(retire_all(f));
    for retired in std::mem::take(&mut now.retired) {
        now.unplace(retired.code);
    }
    assert_eq!(now.code, [CodeArena::new(CODE, 0x10000)]);
}

/// One more replacement on the only function.
fn replace(registry: Registry, known: &HashMap<RemoteAddr, Vec<u8>>, entry: u64) -> Change {
    let mut change = Change::new(registry, known.clone());
    let id = change.registry.next_id;
    change.registry.next_id += 1;
    let mut f = change.registry.functions.remove(0);
    let before = arenas(&f);
    let one = ReplacementState {
        id,
        owner: Controller { pid: 1, started: 1 },
        since: 0,
        object: RemoteAddr(entry & !0xfff),
        name: "f".into(),
        entry: RemoteAddr(entry),
    };
    f.replacements.insert(0, one);
    change.relink(&mut f, before).unwrap();
    change.registry.functions.push(f);
    change
}

/// Where the code of the only function's skeleton leads first: `jmp rel32`.
fn enters(change: &Change) -> u64 {
    let f = &change.registry.functions[0];
    let at = f.skeleton.unwrap().at;
    let (_, bytes) = change.writes.iter().find(|(to, _)| *to == at).unwrap();
    assert_eq!(bytes[0], 0xe9);
    let distance = i32::from_le_bytes(bytes[1..5].try_into().unwrap());
    at.offset(i64::from(distance) + 5).0
}

#[test]
fn the_newest_replacement_is_entered_whichever_goes() {
    let known = HashMap::new();
    for f in [nops(), prologue()] {
        let original = f.original.clone();
        let mut now = registry(f);
        for entry in [0x70_0010, 0x71_0020, 0x72_0030] {
            let change = replace(now, &known, entry);
            assert_eq!(enters(&change), entry);
            now = done(change);
        }
        let (change, removed) = remove(now, &known, 1);
        assert_eq!((removed, enters(&change)), (vec![1], 0x72_0030));
        let (change, _) = remove(done(change), &known, 2);
        assert_eq!(enters(&change), 0x70_0010);
        // The old skeleton may be on its way into either object until it is freed.
        let leads_to: Vec<_> = change.retired.iter().map(|r| r.arenas.clone()).collect();
        assert_eq!(leads_to, [[RemoteAddr(0x70_0000), RemoteAddr(0x72_0000)]]);
        let (change, _) = remove(done(change), &known, 0);
        assert_eq!(change.pokes[0].new, original[..5]);
        assert_eq!(done(change).functions, []);
    }
}

#[test]
fn bodies_stay_around_a_replacement_and_go_without_it() {
    let mut known = HashMap::new();
    let now = done(add(registry(nops()), &mut known, When::Entry));
    let both = replace(now, &known, 0x70_0010);
    assert_eq!(both.pokes[0].new[0], 0xe9, "a call of the body would return to the original");
    let (change, _) = remove(done(both), &known, 0);
    assert_eq!(enters(&change), 0x70_0010);
}

#[test]
fn reads_survive_their_packing() {
    let reads = Reads {
        args: vec![ArgWord::Gpr(0), ArgWord::Gpr(5), ArgWord::Xmm(7)],
        results: vec![RetWord::Rax, RetWord::Xmm1],
    };
    assert_eq!(unpack_reads(pack_reads(&reads)), reads);
}
