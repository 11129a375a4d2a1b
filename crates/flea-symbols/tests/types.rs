//! Types as each compiler and each format describes them: all tell the same.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compiled;

use std::collections::HashSet;
use std::fmt::Write as _;

use compiled::{compile, function, gcc};
use expect_test::expect;
use flea_object::types::{Member, Type, TypeId, Types};
use flea_symbols::{Module, TypeGraph, TypeNames};

/// Every struct, union and enum that `roots` lead to, in the order of the walk.
fn render(types: &Types, roots: &[TypeId]) -> String {
    let (mut text, mut seen, mut todo) = (String::new(), HashSet::new(), roots.to_vec());
    todo.reverse();
    while let Some(id) = todo.pop() {
        if !seen.insert(id) {
            continue;
        }
        let mut next = Vec::new();
        match types.get(id) {
            Type::Pointer { to } | Type::Array { of: to, .. } => next.push(*to),
            Type::Struct { name, is_union, size_bytes, members } => {
                let keyword = if *is_union { "union" } else { "struct" };
                let name = if name.is_empty() { "-" } else { name };
                writeln!(text, "{keyword} {name} {size_bytes}").unwrap();
                for Member { name, ty, bit_offset, bit_size } in members {
                    let bits = bit_size.map(|n| format!(":{n}")).unwrap_or_default();
                    let (byte, bit) = (bit_offset / 8, bit_offset % 8);
                    let name = if name.is_empty() { "-" } else { name };
                    writeln!(text, "  {byte}.{bit} {name}{bits} {}", spell(types, *ty)).unwrap();
                    next.push(*ty);
                }
            }
            Type::Enum { name, size_bytes, signed, values } => {
                let sign = if *signed { "signed" } else { "unsigned" };
                writeln!(text, "enum {name} {size_bytes} {sign}").unwrap();
                for (name, value) in values {
                    writeln!(text, "  {name} {}", value.cast_signed()).unwrap();
                }
            }
            _ => {}
        }
        todo.extend(next.into_iter().rev());
    }
    text
}

fn spell(types: &Types, id: TypeId) -> String {
    match types.get(id) {
        Type::Void => "void".into(),
        Type::Int { size_bytes, signed, is_bool, .. } => {
            let kind = if *is_bool {
                "bool"
            } else if *signed {
                "i"
            } else {
                "u"
            };
            format!("{kind}{}", size_bytes * 8)
        }
        Type::Float { size_bytes, .. } => format!("f{}", size_bytes * 8),
        Type::Enum { name, .. } => format!("enum {name}"),
        Type::Pointer { to } => format!("*{}", spell(types, *to)),
        Type::Array { of, n_elements } => format!("[{n_elements}]{}", spell(types, *of)),
        Type::Struct { name, .. } if name.is_empty() => "-".into(),
        Type::Struct { name, .. } => name.clone(),
        Type::Opaque { name } => format!("opaque {name}"),
        Type::Function => "function".into(),
    }
}

fn types_of(bytes: &[u8], function_name: &str, names: &[&str]) -> TypeGraph {
    let module = Module::parse(bytes, None).unwrap();
    let function = function(&module, function_name);
    let signature = module.signature(function);
    assert!(signature.is_known(), "{:?}", signature.doubt);
    module.types(&[(function, &signature)], TypeNames::These(names))
}

/// The function's slots, then all that they lead to.
fn render_slots(graph: &TypeGraph) -> String {
    let spelled = |slot: &Option<TypeId>| match slot {
        Some(id) => spell(&graph.types, *id),
        None => "-".into(),
    };
    let slots: Vec<String> = graph.slots[0].iter().map(spelled).collect();
    let roots: Vec<TypeId> = graph.slots[0].iter().flatten().copied().collect();
    format!("{}\n{}", slots.join(", "), render(&graph.types, &roots))
}

const C: &str = r"
    typedef struct { int x, y; } point_t;
    typedef unsigned int u32;
    struct node;
    union number { long i; double f; };
    struct tree {
        struct node *root; const volatile u32 count; _Bool ok;
        int (*compare)(struct node *, struct node *);
        struct hidden *hidden; union number *number;
    };
    enum color { RED = 1, GREEN = 200, BLUE = 1000 };
    enum level { LOW = -5, HIGH = 5 };
    struct node {
        struct node *left, *right;
        union { long key; struct { unsigned a : 3, b : 7; int : 2; int c : 5; }; };
        point_t at[2][3];
        struct { char tag; short more; } inner;
        enum color color; enum level level;
        unsigned long wide : 33; unsigned char last : 1;
        char text[];
    };
    struct pair { long a, b; };
    struct tree *grow(struct tree *tree, struct pair pair, u32 n, double scale, char small) {
        tree->root->color = GREEN; tree->root->level = HIGH;
        return tree;
    }
";

#[test]
fn of_c_in_every_format() {
    let graph = types_of(&gcc("types", C, &["-g"]), "grow", &[]);
    let expected = render_slots(&graph);
    expect![[r#"
        *tree, -, -, u32, f64, i8, *tree
        struct tree 40
          0.0 root *node
          8.0 count u32
          12.0 ok bool8
          16.0 compare *function
          24.0 hidden *opaque hidden
          32.0 number *number
        struct node 96
          0.0 left *node
          8.0 right *node
          16.0 - -
          24.0 at [2][3]point_t
          72.0 inner -
          76.0 color enum color
          80.0 level enum level
          88.0 wide:33 u64
          92.1 last:1 u8
          93.0 text [0]i8
        union - 8
          0.0 key i64
          0.0 - -
        struct - 4
          0.0 a:3 u32
          0.3 b:7 u32
          1.4 c:5 i32
        struct point_t 8
          0.0 x i32
          4.0 y i32
        struct - 4
          0.0 tag i8
          2.0 more i16
        enum color 4 unsigned
          RED 1
          GREEN 200
          BLUE 1000
        enum level 4 signed
          LOW -5
          HIGH 5
        union number 8
          0.0 i i64
          0.0 f f64
    "#]]
    .assert_eq(&expected);
    for compiler in ["gcc", "clang"] {
        for flags in [
            &["-gdwarf-3", "-gno-strict-dwarf"][..],
            &["-gdwarf-4"],
            &["-gdwarf-5"],
            &["-gdwarf-4", "-fdebug-types-section"],
            &["-gdwarf-5", "-fdebug-types-section"],
        ] {
            let name = format!("types-{compiler}{}", flags.concat());
            let Some(bytes) = compile(&name, compiler, C, flags) else { continue };
            assert_eq!(render_slots(&types_of(&bytes, "grow", &[])), expected, "{name}");
        }
    }
    let graph = types_of(&gcc("types-btf", C, &["-gbtf"]), "grow", &[]);
    // gcc before 12.4 writes the dimensions of arrays backwards.
    let text = render_slots(&graph).replace("[3][2]point_t", "[2][3]point_t");
    assert_eq!(text, expected);
}

#[test]
fn of_cpp_classes() {
    let source = r#"
        #include <cstdint>
        namespace shop {
            struct Counted { int n; };
            struct Empty {};
            template <class T, int N> struct Box { T items[N]; static int made; };
            class Item : public Counted, Empty {
            public:
                virtual ~Item();
                enum class Kind : uint8_t { Book, Toy = 255 } kind;
                Box<int, 2> names;
                int Counted::*member; int (Counted::*method)(int);
                struct Inner { Item &back; } *inner;
            };
            Item::~Item() {}
            struct Virtual : virtual Counted { long x; } made;
        }
        namespace { struct Hidden { int x; }; }
        extern "C" long sell(shop::Item &item, shop::Virtual *v, Hidden *hidden, decltype(nullptr) n) {
            return item.inner->back.names.items[0] + hidden->x + v->x;
        }
    "#;
    let mut texts = Vec::new();
    for (compiler, flags) in [
        ("g++", &["-gdwarf-5"][..]),
        ("g++", &["-gdwarf-4", "-fdebug-types-section"]),
        ("clang++", &["-gdwarf-5"]),
        ("clang++", &["-gdwarf-4", "-fdebug-types-section"]),
    ] {
        let name = format!("types-{compiler}{}", flags.concat());
        let Some(bytes) = compile(&name, compiler, source, flags) else { continue };
        let text = render_slots(&types_of(&bytes, "sell", &[]));
        // Compilers name the hidden member differently.
        texts.push((name, text.replace("_vptr$", "_vptr.")));
    }
    expect![[r#"
        *shop::Item, *shop::Virtual, *(anonymous namespace)::Hidden, *void, i64
        struct shop::Item 56
          0.0 - shop::Empty
          0.0 _vptr.Item **function
          8.0 - shop::Counted
          12.0 kind enum shop::Item::Kind
          16.0 names shop::Box<int, 2>
          24.0 member i64
          32.0 method [2]i64
          48.0 inner *shop::Item::Inner
        struct shop::Empty 1
        struct shop::Counted 4
          0.0 n i32
        enum shop::Item::Kind 1 unsigned
          Book 0
          Toy 255
        struct shop::Box<int, 2> 8
          0.0 items [2]i32
        struct shop::Item::Inner 8
          0.0 back *shop::Item
        struct shop::Virtual 24
          0.0 _vptr.Virtual **function
          8.0 x i64
        struct (anonymous namespace)::Hidden 4
          0.0 x i32
    "#]]
    .assert_eq(&texts[0].1);
    for (name, text) in &texts {
        assert_eq!(text, &texts[0].1, "{name}");
    }
}

#[test]
fn of_rust_enums() {
    let source = r"
        #![crate_type = 'cdylib']
        pub enum Shape { Point, Circle { radius: u32 }, Named(&'static str, u8) }
        #[no_mangle]
        pub extern fn draw(shape: &Shape, maybe: &Option<u32>, text: &&str) -> usize {
            match shape { Shape::Circle { radius } => *radius as usize, _ => text.len() }
        }
    "
    .replace('\'', "\"")
    .replace("&\"static", "&'static");
    let Some(bytes) = compile("types-rust", "rustc", &source, &["-g"]) else { return };
    let text = render_slots(&types_of(&bytes, "draw", &[]));
    let text = text.replace(&format!("types_rust_{}", std::process::id()), "types_rust");
    // The order of fields is the compiler's to choose.
    for line in [
        "*types_rust::Shape, *core::option::Option<u32>, *&str, u64",
        "  0.0 Circle types_rust::Shape::Circle",
        "  0.0 Named types_rust::Shape::Named",
        "  0.0 - -",
    ] {
        assert!(text.contains(line), "{line}\n{text}");
    }
}

/// Compiles a library of several units.
fn units(name: &str, first: &str, others: &[&str], flags: &[&str]) -> Vec<u8> {
    let directory = std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(&directory).unwrap();
    let paths: Vec<String> = (0..others.len())
        .map(|i| format!("{}/{name}-{}-{i}.c", directory.display(), std::process::id()))
        .collect();
    for (path, text) in paths.iter().zip(others) {
        std::fs::write(path, text).unwrap();
    }
    let all: Vec<&str> = flags.iter().copied().chain(paths.iter().map(String::as_str)).collect();
    let bytes = gcc(name, first, &all);
    paths.iter().for_each(|path| std::fs::remove_file(path).unwrap());
    bytes
}

#[test]
fn declarations_are_completed_from_other_units() {
    let first = "
        struct whole; union either; struct twice; struct kind;
        struct user { struct whole *whole; union either *either; struct twice *twice;
            struct kind *kind; };
        int use(struct user *user) { return !user; }
    ";
    let others = [
        "struct whole { int x; }; struct twice { int x; }; union kind { int x; };
         int a(struct whole *w, struct twice *t, union kind *k) { return w->x + t->x + k->x; }",
        "struct whole { int x; }; struct twice { long x; }; union either { char c; };
         int b(struct whole *w, struct twice *t, union either *e) { return w->x + t->x + e->c; }",
    ];
    let bytes = units("types-units", first, &others, &["-g"]);
    let graph = types_of(&bytes, "use", &["twice", "kind", "user___flavour"]);
    expect![[r#"
        *user, i32
        struct user 32
          0.0 whole *whole
          8.0 either *either
          16.0 twice *opaque twice
          24.0 kind *opaque kind
        struct whole 4
          0.0 x i32
        union either 1
          0.0 c i8
    "#]]
    .assert_eq(&render_slots(&graph));
    let spelled = |name: &str| render(&graph.types, graph.types.named(name));
    // Two that differ, and one that both of the units above have.
    assert_eq!(spelled("twice"), "struct twice 4\n  0.0 x i32\nstruct twice 8\n  0.0 x i64\n");
    assert_eq!(spelled("kind"), "union kind 4\n  0.0 x i32\n");
    assert_eq!(graph.types.named("user").len(), 1);
    assert_eq!(graph.types.named("whole").len(), 1);
}

/// Many units share a header: its types are there once.
#[test]
fn a_type_of_many_units_is_one() {
    let header = "struct list { struct list *next; struct item { int n; } *item; };";
    let unit = |name: &str| format!("{header} int {name}(struct list *l) {{ return l->item->n; }}");
    let (first, others) = (unit("a"), [unit("b"), unit("c")]);
    let others: Vec<&str> = others.iter().map(String::as_str).collect();
    let bytes = units("types-header", &first, &others, &["-g"]);
    let module = Module::parse(&bytes, None).unwrap();
    let graph = module.types(&[], TypeNames::All);
    let structs = graph.types.iter().filter(|(_, ty)| matches!(ty, Type::Struct { .. }));
    assert_eq!(structs.count(), 2);
}
