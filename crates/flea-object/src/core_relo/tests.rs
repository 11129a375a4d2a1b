//! Rules that compilers' own objects do not reach: clashes, damage, matching by structure.

use proptest::prelude::*;

use super::*;
use crate::insn::Insn;
use crate::opcode as op;
use crate::types::{Member, Type};

/// A graph in which types have names, and members are made as `(name, type, bit offset)`.
#[derive(Default)]
struct Graph(Types);

impl Graph {
    fn int(&mut self, size_bytes: u32, signed: bool) -> TypeId {
        let name = format!("int{size_bytes}{signed}");
        self.0.add(Type::Int { name, size_bytes, signed, is_bool: false })
    }

    fn record(&mut self, name: &str, size_bytes: u32, members: &[(&str, TypeId, u64)]) -> TypeId {
        let member = |(name, ty, bit_offset): &(&str, TypeId, u64)| Member {
            name: (*name).to_owned(),
            ty: *ty,
            bit_offset: *bit_offset,
            bit_size: None,
        };
        let members = members.iter().map(member).collect();
        let name = name.to_owned();
        let id =
            self.0.add(Type::Struct { name: name.clone(), is_union: false, size_bytes, members });
        self.0.add_name(&name, id);
        id
    }
}

fn relocation(kind: CoreKind, root: TypeId, name: &str, path: &[u32]) -> CoreRelocation {
    let names = [name.to_owned()].into();
    CoreRelocation { insn_idx: 0, kind, root, names, path: path.to_vec() }
}

const fn insn(opcode: u8, off: i16, imm: i32) -> Insn {
    Insn { opcode, dst: 1, src: 2, off, imm }
}

const MOV: u8 = op::ALU64 | op::MOV | op::K;
const LOAD_4: u8 = op::LDX | op::MEM | op::W;
const LOAD_8: u8 = op::LDX | op::MEM | op::DW;

/// The program's `struct s { u32 before, x; }`.
fn local() -> (Types, TypeId) {
    let mut graph = Graph::default();
    let int = graph.int(4, false);
    let root = graph.record("s", 8, &[("before", int, 0), ("x", int, 32)]);
    (graph.0, root)
}

/// What becomes of a load of `s.x`, of what size it is in the target.
fn load_of(target: &Types) -> Result<Relocated, CoreError> {
    let (local, root) = local();
    let relocation = relocation(CoreKind::FieldByteOffset, root, "s", &[0, 1]);
    relocate(&[insn(LOAD_4, 4, 0)], &[relocation], &local, target)
}

#[test]
fn several_types_of_one_name_have_to_agree() {
    let mut graph = Graph::default();
    let int = graph.int(4, false);
    graph.record("s", 16, &[("x", int, 64)]);
    graph.record("s", 32, &[("y", int, 0), ("x", int, 64)]);
    assert_eq!(load_of(&graph.0).unwrap().insns, [insn(LOAD_4, 8, 0)]);
    // One without such a field does not count.
    graph.record("s", 4, &[("y", int, 0)]);
    assert_eq!(load_of(&graph.0).unwrap().insns, [insn(LOAD_4, 8, 0)]);
    graph.record("s", 16, &[("x", int, 96)]);
    let error = load_of(&graph.0).unwrap_err();
    assert_eq!(error.what, "field 'struct s.x'");
    assert_eq!(error.fault, CoreFault::Ambiguous { name: "s".into() });
    let mut graph = Graph::default();
    let (narrow, wide) = (graph.int(4, false), graph.int(8, false));
    graph.record("s", 16, &[("x", narrow, 64)]);
    graph.record("s", 16, &[("x", wide, 64)]);
    assert_eq!(load_of(&graph.0).unwrap_err().fault, CoreFault::Ambiguous { name: "s".into() });
}

#[test]
fn only_unsigned_numbers_and_pointers_change_their_size() {
    let of = |size_bytes, signed| {
        let mut graph = Graph::default();
        let int = graph.int(size_bytes, signed);
        graph.record("s", 64, &[("x", int, 64)]);
        load_of(&graph.0).unwrap()
    };
    assert_eq!(of(8, false).insns, [insn(LOAD_8, 8, 0)]);
    assert_eq!(of(1, false).insns, [insn(op::LDX | op::MEM | op::B, 8, 0)]);
    assert_eq!(of(4, true).insns, [insn(LOAD_4, 8, 0)]);
    for (size_bytes, signed) in [(8, true), (16, false), (3, false)] {
        let refused = of(size_bytes, signed);
        assert_eq!(refused.insns[0].imm, POISON);
        let reason = &refused.poisoned[0].1;
        assert!(reason.contains(&format!("has {size_bytes} bytes")), "{reason}");
    }
}

#[test]
fn a_field_of_another_kind_is_not_the_field() {
    let mut graph = Graph::default();
    let to = graph.int(4, false);
    let pointer = graph.0.add(Type::Pointer { to });
    graph.record("s", 64, &[("x", pointer, 64)]);
    let relocated = load_of(&graph.0).unwrap();
    assert_eq!(relocated.insns[0].imm, POISON);
    assert_eq!(relocated.poisoned.len(), 1);
}

#[test]
fn fields_are_found_through_base_classes() {
    let mut graph = Graph::default();
    let int = graph.int(4, false);
    let base = graph.record("ns::Base", 8, &[("a", int, 0), ("x", int, 32)]);
    graph.record("s", 64, &[("", base, 128)]);
    assert_eq!(load_of(&graph.0).unwrap().insns, [insn(LOAD_4, 20, 0)]);
    // As `flea types` prints it.
    let mut local = Graph::default();
    let int = local.int(4, false);
    let base = local.record("ns__Base", 4, &[("x", int, 0)]);
    let root = local.record("s", 4, &[("base_ns__Base", base, 0)]);
    let relocation = relocation(CoreKind::FieldByteOffset, root, "s", &[0, 0, 0]);
    let relocated = relocate(&[insn(LOAD_4, 0, 0)], &[relocation], &local.0, &graph.0).unwrap();
    assert_eq!(relocated.insns, [insn(LOAD_4, 20, 0)]);
}

#[test]
fn damage_is_told() {
    let (local, root) = local();
    let far = {
        let mut graph = Graph::default();
        let int = graph.int(4, false);
        graph.record("s", 1 << 20, &[("x", int, 8 << 16)]);
        graph.0
    };
    let at = |insns: &[Insn], path: &[u32], target: &Types| {
        let relocation = relocation(CoreKind::FieldByteOffset, root, "s", path);
        relocate(insns, &[relocation], &local, target).unwrap_err().fault
    };
    let unexpected = CoreFault::Unexpected { found: 5, stated: 4 };
    assert_eq!(at(&[insn(LOAD_4, 5, 0)], &[0, 1], &local), unexpected);
    assert_eq!(at(&[insn(MOV, 0, 5)], &[0, 1], &local), unexpected);
    assert_eq!(at(&[insn(LOAD_4, 4, 0)], &[0, 1], &far), CoreFault::TooLarge { value: 1 << 16 });
    let exit = op::EXIT_OP;
    assert_eq!(
        at(&[insn(exit, 0, 0)], &[0, 1], &local),
        CoreFault::BadInstruction { opcode: exit }
    );
    for (path, what) in [
        (&[][..], "no steps"),
        (&[0, 2], "no such member"),
        (&[0, 1, 0], "a step into what has no parts"),
        (&[u32::MAX, 0, 0], "a step into what has no parts"),
        (&[0; 65], "too many steps"),
    ] {
        assert_eq!(at(&[insn(LOAD_4, 4, 0)], path, &local), CoreFault::Damaged(what));
    }
    let behind = at(&[], &[0, 1], &local);
    assert_eq!(behind, CoreFault::Damaged("it is behind the program's end"));
}

/// A structure that holds itself twice, in every depth.
#[test]
fn what_nests_in_itself_comes_to_an_end() {
    let mut graph = Graph::default();
    let id = graph.record("s", 8, &[]);
    let member = Member { name: String::new(), ty: id, bit_offset: 0, bit_size: None };
    let members = vec![member.clone(), member];
    graph.0.set(id, Type::Struct { name: "s".into(), is_union: false, size_bytes: 8, members });
    assert_eq!(load_of(&graph.0).unwrap().insns[0].imm, POISON);
}

#[test]
fn types_match_by_their_members() {
    let (local, root) = local();
    let matches = |members: &[(&str, u32, bool)]| {
        let mut graph = Graph::default();
        let members: Vec<(&str, TypeId, u64)> = members
            .iter()
            .map(|(name, size_bytes, signed)| (*name, graph.int(*size_bytes, *signed), 0))
            .collect();
        graph.record("s", 64, &members);
        let relocation = relocation(CoreKind::TypeMatches, root, "s", &[0]);
        let insns = relocate(&[insn(MOV, 0, 1)], &[relocation], &local, &graph.0).unwrap().insns;
        insns[0].imm == 1
    };
    assert!(matches(&[("more", 8, true), ("x", 4, false), ("before", 4, false)]));
    assert!(!matches(&[("x", 4, false)]));
    assert!(!matches(&[("x", 4, false), ("before", 4, true)]));
    assert!(!matches(&[("x", 4, false), ("before", 8, false)]));
}

#[test]
fn both_halves_of_a_long_constant_are_poisoned() {
    let (local, root) = local();
    let insns = [insn(op::LDDW, 0, 4), Insn::default()];
    let relocation = relocation(CoreKind::FieldByteOffset, root, "s", &[0, 1]);
    let relocated = relocate(&insns, &[relocation], &local, &Types::default()).unwrap();
    assert!(relocated.insns.iter().all(|insn| insn.imm == POISON && insn.opcode == op::CALL_OP));
    assert_eq!(relocated.poisoned[0].1, "field 'struct s.x': the target has no type 's'");
}

/// Any types at all, cycles included.
pub(crate) fn any_types() -> impl Strategy<Value = Types> {
    let id = 0usize..8;
    let name = prop::sample::select(vec!["", "a", "b", "a___x"]).prop_map(str::to_owned);
    let member = (name.clone(), id.clone(), any::<u64>(), proptest::option::of(any::<u32>()));
    let small = (name.clone(), id.clone(), 0u64..128, proptest::option::of(0u32..70));
    let members = prop::collection::vec(prop_oneof![3 => small, 1 => member], 0..4);
    let ty = prop_oneof![
        (name.clone(), 0u32..17, any::<bool>()).prop_map(|(name, size_bytes, signed)| {
            (Type::Int { name, size_bytes, signed, is_bool: false }, vec![])
        }),
        (name.clone(), any::<bool>(), prop::collection::vec((name.clone(), any::<u64>()), 0..3))
            .prop_map(|(name, signed, values)| {
                (Type::Enum { name, size_bytes: 4, signed, values }, vec![])
            }),
        id.clone().prop_map(|to| (Type::Void, vec![(String::new(), to, 0, Some(1))])),
        (id, prop_oneof![0u32..4, any::<u32>()])
            .prop_map(|(of, n)| (Type::Void, vec![(String::new(), of, u64::from(n), None)])),
        (name, any::<bool>(), any::<u32>(), members).prop_map(|(name, is_union, size, members)| {
            (Type::Struct { name, is_union, size_bytes: size, members: Vec::new() }, members)
        }),
    ];
    prop::collection::vec(ty, 8).prop_map(|list| {
        let mut types = Types::default();
        let ids: Vec<TypeId> = list.iter().map(|_| types.add(Type::Void)).collect();
        for (id, (ty, parts)) in ids.iter().zip(list) {
            let set = match (ty, parts.as_slice()) {
                (Type::Struct { name, is_union, size_bytes, .. }, _) => {
                    types.add_name(&name, *id);
                    let members = parts.into_iter().map(|(name, ty, bit_offset, bit_size)| {
                        Member { name, ty: ids[ty], bit_offset, bit_size }
                    });
                    Type::Struct { name, is_union, size_bytes, members: members.collect() }
                }
                (Type::Void, [(_, to, _, Some(_))]) => Type::Pointer { to: ids[*to] },
                (Type::Void, [(_, of, n, None)]) => {
                    let n_elements = u32::try_from(*n).unwrap();
                    Type::Array { of: ids[*of], n_elements }
                }
                (ty, _) => ty,
            };
            if let Type::Enum { name, .. } = &set {
                types.add_name(name, *id);
            }
            types.set(*id, set);
        }
        types
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever is in both graphs, there is an answer or an error, and as many instructions.
    #[test]
    fn nothing_panics(
        local in any_types(),
        target in any_types(),
        kind in 0u32..13,
        root in 0usize..9,
        path in prop::collection::vec(prop_oneof![4 => 0u32..4, 1 => any::<u32>()], 0..5),
        insns in prop::collection::vec(any::<[u8; 8]>(), 1..3),
    ) {
        let root = local.iter().nth(root).unwrap().0;
        let kind = CoreKind::from_number(kind).unwrap();
        let insns: Vec<Insn> = insns.into_iter().map(Insn::decode).collect();
        let relocation = relocation(kind, root, "a___y", &path);
        let _ = relocation.check(&local);
        if let Ok(relocated) = relocate(&insns, &[relocation], &local, &target) {
            prop_assert_eq!(relocated.insns.len(), insns.len());
        }
    }
}
