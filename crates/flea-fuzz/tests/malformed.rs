//! Damaged objects: a moment of the fuzzer, and uBPF's descriptions of malformed files.
#![allow(clippy::unwrap_used, reason = "a test")]

use flea_fuzz::allocated::Counting;
use flea_fuzz::campaign::{End, run};
use flea_fuzz::objects::Objects;
use flea_fuzz::objects::handmade::{
    Handmade, SECTION_HEADER_BYTES, SYMBOL_BYTES, object, section, symbol,
};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn damaged_objects_are_no_harm() {
    let report = run(&mut Objects::new().unwrap(), 1, End::Inputs(2500)).unwrap();
    println!("{}", report.text());
    assert_eq!(report.failures, []);
    assert!(report.accepted > 100, "nothing is tested behind the headers");
}

#[test]
fn the_handmade_object_is_whole() {
    let object = flea_object::parse(&object().bytes).unwrap();
    assert_eq!(object.programs.len(), 1);
    assert_eq!(object.programs[0].insns.len(), 4, "{:?}", object.programs[0].insns);
    assert_eq!(object.license.as_deref(), Some("GPL"));
}

/// Where a field of a description is: offset and bytes.
fn field(file: &Handmade, name: &str) -> (usize, usize) {
    let header = |n: usize| file.section_headers + n * SECTION_HEADER_BYTES;
    let function = file.symbols + symbol::FUNCTION * SYMBOL_BYTES;
    match name {
        "ehdr.e_ident.EI_CLASS" => (4, 1),
        "ehdr.e_ident.EI_DATA" => (5, 1),
        "ehdr.e_ident.EI_VERSION" => (6, 1),
        "ehdr.e_ident.EI_OSABI" => (7, 1),
        "ehdr.e_type" => (16, 2),
        "ehdr.e_machine" => (18, 2),
        "ehdr.e_shoff" => (40, 8),
        "ehdr.e_shentsize" => (58, 2),
        "ehdr.e_shnum" => (60, 2),
        "text_shdr.sh_type" => (header(section::PROGRAM) + 4, 4),
        "text_shdr.sh_offset" => (header(section::PROGRAM) + 24, 8),
        "text_shdr.sh_size" => (header(section::PROGRAM) + 32, 8),
        "rel_shdr.sh_link" => (header(section::RELOCATIONS) + 40, 4),
        "symtab_shdr.sh_link" => (header(section::SYMBOLS) + 40, 4),
        "sqrti_rel.r_offset" => (file.relocation, 8),
        "sqrti_rel.r_info" => (file.relocation + 8, 8),
        "sqrti_sym.st_name" => (function, 4),
        "sqrti_sym.st_shndx" => (function + 6, 2),
        _ => panic!("a field that this test does not know: {name}"),
    }
}

fn value(text: &str) -> u64 {
    match text {
        "'SHT_NULL'" => 0,
        "'ELFDATA2MSB'" => 2,
        "'ELFCLASS32'" => 1,
        "'ELFOSABI_LINUX'" => 3,
        "(10 << 32) | 2" => 10 << 32 | 2,
        // Symbol 1 is the called function there, and 2 here.
        "(1 << 32) | 3" => 2 << 32 | 3,
        number => number.parse().unwrap_or_else(|_| panic!("not a number: {number}")),
    }
}

/// Changes the file as one line says.
fn apply(file: &mut Handmade, line: &str) {
    if let Some((name, text)) = line.split_once(" = ").filter(|(name, _)| name.contains('.')) {
        let (at, n) = field(file, name);
        file.bytes[at..at + n].copy_from_slice(&value(text).to_le_bytes()[..n]);
        return;
    }
    match line {
        // The file is its first four bytes.
        "del order[:]" => file.bytes.truncate(4),
        r"magic = b'\x7fELF'" | "order.append('magic')" => {}
        // A name that uBPF's host does not have. Here, a function that is not there.
        "sqrti_sym.st_name += 1" => {
            let (at, n) = field(file, "sqrti_sym.st_shndx");
            file.bytes[at..at + n].fill(0);
        }
        _ => panic!("a line that this test does not know: {line}"),
    }
}

#[test]
fn malformed_objects_are_refused() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/ubpf/elf");
    let mut paths: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    let mut accepted = Vec::new();
    for path in &paths {
        let text = std::fs::read_to_string(path).unwrap();
        let lines = text.lines().skip_while(|l| *l != "-- pyelf").skip(1);
        let mut file = object();
        for line in lines.take_while(|l| !l.starts_with("--")).filter(|l| !l.is_empty()) {
            apply(&mut file, line);
        }
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        match flea_object::parse(&file.bytes) {
            Ok(_) => accepted.push(name),
            Err(e) => println!("{name}: {e}"),
        }
    }
    assert_eq!(paths.len(), 21);
    assert_eq!(accepted, ["ok"]);
}
