//! Whatever is in a graph of types, its header comes to an end.

use proptest::prelude::*;

use super::*;
use crate::core_relo::any_types;
use crate::types::Member;

fn member(name: &str, ty: TypeId, bit_offset: u64) -> Member {
    Member { name: name.into(), ty, bit_offset, bit_size: None }
}

fn record(name: &str, size_bytes: u32, members: Vec<Member>) -> Type {
    Type::Struct { name: name.into(), is_union: false, size_bytes, members }
}

#[test]
fn what_lies_over_each_other_becomes_a_union() {
    let mut types = Types::default();
    let int =
        types.add(Type::Int { name: "int".into(), size_bytes: 4, signed: true, is_bool: false });
    let base = types.add(record("B", 8, vec![member("x", int, 0), member("y", int, 32)]));
    let tail = types.add(record("D", 12, vec![member("", base, 0), member("z", int, 32)]));
    let text = header(&types, &[tail]).text;
    let expect = "
struct D {
	union {
		struct {
			struct B base_B;
			unsigned char __pad1[4];
		};
		struct {
			unsigned char __pad2[4];
			int z;
			unsigned char __pad3[4];
		};
	};
};
";
    assert!(text.contains(expect), "{text}");
}

#[test]
fn types_of_one_name_are_flavours() {
    let mut types = Types::default();
    let one = types.add(record("s", 1, Vec::new()));
    let declared = types.add(Type::Opaque { name: "s".into() });
    let to = types.add(Type::Pointer { to: declared });
    let two = types.add(record("s", 8, vec![member("p", to, 0)]));
    let enums = ["e", "f"].map(|name| {
        let values = vec![("A".to_owned(), 1)];
        types.add(Type::Enum { name: name.into(), size_bytes: 4, signed: false, values })
    });
    let text = header(&types, &[one, two, enums[0], enums[1]]).text;
    for part in ["struct s {", "struct s___2 {\n\tstruct s___3 *p;", "\tA = 1,", "\tA___2 = 1,"] {
        assert!(text.contains(part), "{part}\n{text}");
    }
}

/// Two members of its own, in every depth: as text it has no end.
#[test]
fn what_nests_in_itself_comes_to_an_end() {
    let mut types = Types::default();
    let id = types.add(Type::Void);
    types.set(id, record("", 8, vec![member("a", id, 0), member("b", id, 0)]));
    let root = types.add(record("s", 8, vec![member("", id, 0)]));
    let printed = header(&types, &[root]);
    assert!(printed.text.contains("struct s {"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_panics(types in any_types()) {
        let roots: Vec<TypeId> = types.iter().map(|(id, _)| id).collect();
        let printed = header(&types, &roots);
        prop_assert!(printed.text.ends_with("#endif\n"));
    }
}
