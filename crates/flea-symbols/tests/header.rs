//! Headers of the target's types: both compilers lay them out as the target has them, to the
//! bit. What they make of a header is read from the BTF of their objects.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compiled;

use std::path::PathBuf;
use std::process::Command;

use compiled::compile;
use flea_object::btf::{Btf, Graph};
use flea_object::header::{Header, header};
use flea_object::types::{Member, Type, TypeId, Types, base_name, c_name};
use flea_symbols::{Files, Module, TypeNames};
use object::{Object as _, ObjectSection as _};

/// What makes objects with BTF of headers.
const COMPILERS: [(&str, &[&str]); 4] = [
    ("clang-14", &["-target", "bpf", "-g", "-Werror"]),
    ("clang-19", &["-target", "bpf", "-g", "-Werror"]),
    ("gcc", &["-gbtf", "-Werror"]),
    ("clang-16", &["-fsyntax-only", "-Werror"]),
];

/// A place: name, bit offset, bit-field's width, bytes.
type Place = (String, u64, Option<u32>, Option<u64>);

/// Members of `id` by name, through those that have none.
fn places(types: &Types, id: TypeId, at: u64) -> Vec<Place> {
    let Type::Struct { members, .. } = types.get(id) else { return Vec::new() };
    let mut found = Vec::new();
    for Member { name, ty, bit_offset, bit_size } in members {
        let name = match types.get(*ty) {
            Type::Struct { name: tag, members, .. } if name.is_empty() => {
                if tag.is_empty() {
                    found.extend(places(types, *ty, at + bit_offset));
                    continue;
                }
                // Where it is empty, there may be no room for it.
                if members.is_empty() {
                    continue;
                }
                base_name(tag)
            }
            Type::Struct { members, .. } if members.is_empty() => continue,
            _ if name.is_empty() => continue,
            _ => c_name(name).into_owned(),
        };
        // What the target does not describe has no place, and what has no bytes may have none.
        let size = types.size_bytes(*ty);
        if size == Some(0) {
            continue;
        }
        let is_flexible = matches!(types.get(*ty), Type::Array { n_elements: 0, .. });
        if size.is_some() || is_flexible {
            found.push((name, at + bit_offset, *bit_size, size.filter(|_| bit_size.is_none())));
        }
    }
    found
}

/// Compiles the header, with a variable of each type in it.
fn compile_header(name: &str, header: &Header, compiler: &str, flags: &[&str]) -> Option<Vec<u8>> {
    let is_defined = |tag: &&String| header.text.contains(&format!("\n{tag} {{"));
    let mut tags: Vec<&String> = header.tags.values().filter(is_defined).collect();
    tags.sort_unstable();
    // Of pointers, clang describes what they point to only where it meets them first.
    let uses = tags.iter().enumerate().map(|(i, tag)| format!("{tag} use_{i}[1];\n"));
    let source = format!("{}{}", header.text, uses.collect::<String>());
    let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(&directory).unwrap();
    let stem = format!("header-{name}-{compiler}-{}", std::process::id());
    let (input, output) =
        (directory.join(format!("{stem}.c")), directory.join(format!("{stem}.o")));
    std::fs::write(&input, source).unwrap();
    let result =
        Command::new(compiler).args(flags).arg("-c").arg(&input).arg("-o").arg(&output).output();
    let Ok(result) = result else {
        assert!(std::env::var_os("CI").is_none(), "{compiler} is missing on CI");
        eprintln!("skipped: {compiler} is not installed");
        std::fs::remove_file(&input).unwrap();
        return None;
    };
    let errors = String::from_utf8_lossy(&result.stderr);
    assert!(result.status.success(), "{compiler} {}:\n{errors}", input.display());
    std::fs::remove_file(&input).unwrap();
    let bytes = std::fs::read(&output).ok()?;
    std::fs::remove_file(&output).unwrap();
    Some(bytes)
}

/// That every struct has its size and its members' places in the compiled header. How many
/// members were compared.
fn compare(what: &str, types: &Types, header: &Header, object: &[u8]) -> usize {
    let elf = object::File::parse(object).unwrap();
    let section = elf.section_by_name(".BTF").unwrap();
    let parts = [Btf::parse(section.data().unwrap()).unwrap()];
    let mut graph = Graph::new(&parts, Types::default());
    graph.add_named(|_| true);
    let compiled = graph.into_types();
    let mut n_places = 0;
    for (id, tag) in &header.tags {
        let Type::Struct { size_bytes, .. } = types.get(*id) else { continue };
        let name = tag.split_once(' ').unwrap().1;
        let is_it = |id: &&TypeId| matches!(compiled.get(**id), Type::Struct { name: found, .. } if found == name);
        let found = compiled.named(name).iter().find(is_it);
        let found = *found.unwrap_or_else(|| panic!("{what}: {tag} is not there"));
        let size = compiled.size_bytes(found);
        // clang counts the bits of a type in 32 bits.
        if *size_bytes >= 1 << 29 {
            continue;
        }
        assert_eq!(size, Some(u64::from(*size_bytes)), "{what}: size of {tag}");
        let there = places(&compiled, found, 0);
        for place in places(types, *id, 0) {
            assert!(there.contains(&place), "{what}: {tag}: {place:?} is not in {there:#?}");
            n_places += 1;
        }
    }
    n_places
}

fn check(name: &str, files: Files<'_>, roots: &[&str], at_least: usize) -> Option<Header> {
    let module = Module::parse_files(files).unwrap();
    let types = match roots {
        [] => module.types(&[], TypeNames::All).types,
        roots => module.types(&[], TypeNames::These(roots)).types,
    };
    let ids: Vec<TypeId> = match roots {
        [] => types.iter().map(|(id, _)| id).collect(),
        roots => roots.iter().flat_map(|name| types.named(name)).copied().collect(),
    };
    let header = header(&types, &ids);
    for (compiler, flags) in COMPILERS {
        let what = format!("{name} {compiler}");
        let Some(object) = compile_header(name, &header, compiler, flags) else { continue };
        let n_places = compare(&what, &types, &header, &object);
        assert!(n_places >= at_least, "{what}: {n_places} members");
    }
    Some(header)
}

fn image(image: &[u8]) -> Files<'_> {
    Files { image, debug: None, alt_debug: None }
}

#[test]
fn of_c_with_every_kind_of_layout() {
    let source = r"
        #ifdef NO_EXOTIC /* gcc writes damaged BTF for these */
        #define EXOTIC(member)
        #else
        #define EXOTIC(member) member
        #endif
        typedef struct { int x; } point_t; typedef point_t *points;
        struct __attribute__((packed)) packed { char a; int b; short c; unsigned d : 3, e : 30; };
        struct __attribute__((packed, aligned(4))) packed4 { int a; long b; };
        struct __attribute__((aligned(64))) line { int a; };
        struct holds { char a; struct line line; char b; struct packed p; long double wide; };
        struct bits { unsigned a : 3; unsigned : 7; unsigned b : 9; unsigned : 0; int c : 5;
            unsigned long d : 33; unsigned long e : 40; _Bool f : 1; enum { OFF, ON } g : 2;
            char h : 4; unsigned short i : 12; };
        struct anonymous { int a; union { struct { short b, c; }; long d; struct { char e; } f[2]; };
            enum { FIRST = -1, LAST = 0x7fffffff } g; struct { int h; } *i; };
        union mixed { char a[5]; int b; struct packed p; EXOTIC(_Complex float c;) };
        struct zero {}; struct flexible { long n; char c; struct zero z; char text[]; };
        struct matrix { point_t at[2][3]; int (*row)[3]; void (*run[4])(int); __int128 wide;
            EXOTIC(float v __attribute__((vector_size(16)));) struct hidden *hidden; const char *const *argv; };
        struct keywords { int class, new, typeof_, default_; };
        enum __attribute__((packed)) tiny { T0, T1 = 255 }; enum long_ { L0 = 1, L1 = 0x123456789 };
        struct enums { enum tiny t; enum long_ l; };
        struct deep { struct { struct { struct { int x : 3, y : 29; } a; } b; } c; } deep[2];
        struct loop { struct loop *next, **table; union mixed u; struct flexible *f; };
        void use(points p, struct packed *a, struct packed4 *a4, struct holds *b, struct bits *c,
            struct anonymous *d, struct matrix *f, struct keywords *g, struct enums *h,
            struct loop *i) {}
    ";
    for (compiler, debug) in
        [("gcc", "-gdwarf-5"), ("gcc", "-gbtf"), ("clang", "-gdwarf-4"), ("clang", "-gdwarf-5")]
    {
        let name = format!("layouts{debug}");
        let limit = if debug == "-gbtf" { "-DNO_EXOTIC" } else { "-DEXOTIC_TOO" };
        let Some(bytes) = compile(&name, compiler, source, &[debug, "-w", limit]) else { continue };
        check(&format!("{compiler}{name}"), image(&bytes), &[], 50);
    }
}

#[test]
fn of_cpp_classes() {
    let source = r#"
        #include <map>
        #include <memory>
        #include <string>
        #include <variant>
        #include <vector>
        namespace shop {
            struct Empty {};
            struct Base { long a; char tail; };
            struct NonPod : Base { NonPod(); char reused; int more; };
            class Item : public NonPod, Empty {
            public:
                virtual ~Item();
                enum class Kind : unsigned char { Book, Toy } kind;
                enum class Other { Book, Toy } other;
                std::map<std::string, std::vector<int>> names;
                std::unique_ptr<Item> next; std::variant<int, std::string> either;
                int Base::*member; void (Item::*method)(int);
                [[no_unique_address]] Empty nothing;
                bool flag : 1; int wide : 31; long double ld; Item &self;
            private:
                static int count;
            };
            Item::~Item() {}
            NonPod::NonPod() {}
            struct Left : virtual Base { int l; }; struct Right : virtual Base { int r; };
            struct Both : Left, Right { int operator_; } both;
        }
        extern "C" long sell(shop::Item &item, shop::Both *both) {
            return item.names.size() + both->a;
        }
    "#;
    for (compiler, debug) in
        [("g++", "-gdwarf-5"), ("clang++", "-gdwarf-4"), ("clang++", "-gdwarf-5")]
    {
        let name = format!("classes{debug}");
        let flags = [debug, "-std=c++20", "-w"];
        let Some(bytes) = compile(&name, compiler, source, &flags) else { continue };
        let name = format!("{compiler}{name}");
        let header = check(&name, image(&bytes), &["shop__Item", "shop__Both"], 30).unwrap();
        for part in [
            "struct shop__Item { /* shop::Item */",
            "struct shop__NonPod base_shop__NonPod;",
            "enum shop__Item__Kind kind;",
        ] {
            assert!(header.text.contains(part), "{part}\n{}", header.text);
        }
        // Everything that the library's headers define as well.
        check(&format!("all-{name}"), image(&bytes), &[], 80);
    }
}

#[test]
fn of_rust_types() {
    let source = "
        #![crate_type = \"cdylib\"]
        use std::collections::{BTreeMap, HashMap};
        pub enum Shape { Point, Circle { radius: u32 }, Named(String, u8) }
        pub struct All<'a> {
            shape: Shape, maybe: Option<Box<All<'a>>>, names: HashMap<String, Vec<&'a str>>,
            order: BTreeMap<u8, (u16, [u64; 3])>, wide: u128, unit: (), f: fn(u8) -> u8,
            r#type: char, dynamic: Box<dyn Fn() + 'a>,
        }
        #[no_mangle]
        pub extern fn draw(all: &All) -> usize { all.names.len() + all.order.len() }
    ";
    let Some(bytes) = compile("header-rust", "rustc", source, &["-g"]) else { return };
    check("rust", image(&bytes), &[], 60);
}

/// libc as the system has it, with its debug file where that is installed.
#[test]
fn of_libc() {
    let path = "/lib/x86_64-linux-gnu/libc.so.6";
    let Ok(libc) = std::fs::read(path) else {
        eprintln!("skipped: there is no {path}");
        return;
    };
    let id = Module::parse(&libc, None).unwrap().build_id().unwrap_or_default().to_vec();
    let hex: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = format!("/usr/lib/debug/.build-id/{}/{}.debug", &hex[..2], &hex[2..]);
    let Ok(debug) = std::fs::read(&path) else {
        eprintln!("skipped: {path} is not installed (libc6-dbg)");
        return;
    };
    let files = Files { image: &libc, debug: Some(&debug), alt_debug: None };
    check("libc", files, &[], 2000);
}
