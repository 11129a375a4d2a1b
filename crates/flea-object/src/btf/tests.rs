//! Of BTF: what is read, and what is refused.

use proptest::prelude::*;

use super::*;

/// A `.BTF` section with these words as types and this string section.
fn section(types: &[u32], strings: &[u8]) -> Vec<u8> {
    let type_bytes = u32::try_from(types.len() * 4).unwrap();
    let string_bytes = u32::try_from(strings.len()).unwrap();
    let mut bytes = vec![0x9f, 0xeb, 1, 0];
    for word in [24, 0, type_bytes, type_bytes, string_bytes].iter().chain(types) {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(strings);
    bytes
}

const fn info(kind: u32, n_parts: u32) -> u32 {
    kind << 24 | n_parts
}

#[test]
fn sizes() {
    #[rustfmt::skip]
    let types = [
        1, info(1, 0), 4, 32,          // 1: int
        0, info(3, 0), 0, 1, 1, 6,     // 2: int[6]
        0, info(10, 0), 2,             // 3: const int[6]
        0, info(3, 0), 0, 3, 1, 2,     // 4: (const int[6])[2]
        0, info(2, 0), 99,             // 5: pointer to nowhere
        0, info(8, 0), 7,              // 6: typedef of 7
        0, info(8, 0), 6,              // 7: typedef of 6
        0, info(3, 0), 0, 8, 1, 1,     // 8: array of itself
        0, info(3, 0), 0, 4, 1, 1 << 31, // 9: too large
        0, info(12, 0), 0,             // 10: a function
    ];
    let bytes = section(&types, b"\0int\0");
    let btf = Btf::parse(&bytes).unwrap();
    assert_eq!(btf.get(1).unwrap().name, "int");
    let sizes: Vec<_> = (1..=5).map(|id| btf.size_bytes(id).unwrap()).collect();
    assert_eq!(sizes, [4, 24, 24, 48, 8]);
    assert_eq!(btf.size_bytes(6), Err(BtfError::BadType { type_id: 6 }));
    assert_eq!(btf.size_bytes(8), Err(BtfError::BadType { type_id: 8 }));
    for id in [9, 10, 0] {
        assert_eq!(btf.size_bytes(id), Err(BtfError::NoSize { type_id: id }));
    }
    assert_eq!(btf.size_bytes(99), Err(BtfError::BadType { type_id: 99 }));
}

#[test]
fn damaged_sections() {
    let check = |bytes: &[u8], expect: BtfError| {
        assert_eq!(Btf::parse(bytes).map(|_| ()), Err(expect));
    };
    check(b"", BtfError::CutOff { what: "the header" });
    check(&[0; 24], BtfError::BadHeader { magic: 0, version: 0 });
    check(&section(&[0, info(31, 0), 0], b"\0"), BtfError::UnknownKind { type_id: 1, kind: 31 });
    check(&section(&[0, info(4, 9), 0], b"\0"), BtfError::CutOff { what: "a type" });
    check(&section(&[7, info(8, 0), 0], b"\0"), BtfError::BadString { offset: 7 });
    check(&section(&[0, info(8, 0), 0], b"a"), BtfError::BadString { offset: 0 });
    let good = section(&[0, info(8, 0), 0], b"\0");
    for len in 0..good.len() {
        assert!(Btf::parse(&good[..len]).is_err(), "{len}");
    }
}

#[test]
fn functions_of_linked_parts() {
    #[rustfmt::skip]
    let types = [
        1, info(1, 0), 4, 1 << 24 | 32,             // 1: int
        0, info(13, 2), 1, 5, 1, 0, 0,              // 2: int (int n, ...)
        5, info(12, 1), 2,                          // 3: its function
        0, info(6, 1), 4, 5, u32::MAX,              // 4: an enumeration with a -1
        0, info(19, 1) | 1 << 31, 8, 5, 0, 0,       // 5: one of 64 bits, with a sign
        0, info(4, 1) | 1 << 31, 4, 5, 1, 3 << 24 | 9, // 6: a bit-field of three bits
        1, info(1, 0), 4, 5 << 16 | 3,              // 7: an old encoder's
    ];
    let one = section(&types, b"\0int\0n\0");
    let mut linked = one.clone();
    linked.extend([0; 3]);
    linked.extend(section(&[1, info(16, 0), 8], b"\0double\0"));
    let parts = Btf::parse_linked(&linked).unwrap();
    assert_eq!(parts.len(), 2);
    assert!(matches!(parts[1].get(1).unwrap().kind, Kind::Float { size_bytes: 8 }));
    let kind = |id| &parts[0].get(id).unwrap().kind;
    let Kind::Proto { ret: 1, params } = kind(2) else { panic!("{:?}", kind(2)) };
    assert_eq!((params[0].name, params[0].type_id, params[1].type_id), ("n", 1, 0));
    assert!(matches!(kind(3), Kind::Func { proto: 2 }));
    assert!(matches!(kind(4), Kind::Enum { signed: true, .. }));
    assert!(matches!(kind(5), Kind::Enum { size_bytes: 8, signed: true, .. }));
    let Kind::Struct { members, .. } = kind(6) else { panic!("{:?}", kind(6)) };
    assert_eq!((members[0].bit_offset, members[0].bit_size), (9, 3));
    assert!(matches!(kind(1), Kind::Int(int) if int.is_whole && int.signed));
    assert!(matches!(kind(7), Kind::Int(int) if !int.is_whole));
    for len in one.len() + 4..linked.len() {
        assert!(Btf::parse_linked(&linked[..len]).is_err(), "{len}");
    }
    assert!(Btf::parse_linked(&[0; 9]).unwrap().is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// Types that lead anywhere: no panic, and nothing without end.
    #[test]
    fn any_types(
        types in prop::collection::vec((0_u32..20, 0_u32..4, 0_u32..12, any::<[u32; 6]>()), 1..24),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut words = Vec::new();
        for (kind, n_parts, id, rest) in types {
            words.extend([0, info(kind, n_parts), id]);
            words.extend(rest.map(|word| word % 16));
        }
        let mut bytes = section(&words, b"\0int\0");
        bytes.extend(section(&words[..words.len() / 2], b"\0a\0"));
        for bytes in [&bytes[..], &bytes[..cut.index(bytes.len())]] {
            for part in Btf::parse_linked(bytes).iter().flatten() {
                for (id, ty) in part.types() {
                    let _ = (part.size_bytes(id), part.resolve(id), ty.name.len());
                }
            }
        }
    }
}
