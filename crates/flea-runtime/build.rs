//! Compiles `src/blob.rs` into the flat bytes that are placed in a target: rustc makes one
//! object file without vector registers; its code and constants are laid out here and their
//! references resolved. No system linker: its defaults differ, and an image without dynamic
//! section, GOT or writable data is easier made than checked.
//!
//! Fails where anything is left that the blob must not have: an undefined symbol (a panic
//! path, a call of memcpy), writable data, an absolute address.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use object::elf::{R_X86_64_GOTPCREL, R_X86_64_PC32, R_X86_64_PLT32};
use object::{Object, ObjectSection, ObjectSymbol, RelocationFlags, RelocationTarget};
use object::{SectionFlags, SectionIndex, SymbolSection};

type Failure = Box<dyn std::error::Error>;

/// The order of `RuntimeFn::ALL`, read from the very file that defines it.
const SHARED: &str = "../flea-layout/src/shared.rs";
const BLOB_TARGET: &str = "x86_64-unknown-linux-gnu";
/// Every register a traced function's caller might have in use.
const NO_VECTORS: &str = "-mmx,-sse,-sse2,-sse3,-ssse3,-sse4.1,-sse4.2,-avx,-avx2,+soft-float";

fn main() -> Result<(), Failure> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed={SHARED}");
    let object_path = compile(&out)?;
    let data = std::fs::read(&object_path)?;
    let image = Image::link(&object::File::parse(&*data)?)?;
    std::fs::write(out.join("blob.bin"), &image.bytes)?;
    let constants = format!("const CODE_BYTES: usize = {};\n", image.code_bytes);
    std::fs::write(out.join("blob_offsets.rs"), constants + &image.offsets()?)?;
    Ok(())
}

fn compile(out: &Path) -> Result<PathBuf, Failure> {
    let object_path = out.join("blob.o");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let mut command = Command::new(rustc);
    command
        .args(["src/blob.rs", "--crate-name", "flea_blob", "--crate-type", "lib"])
        .args(["--edition", "2024", "--emit", "obj", "--target", BLOB_TARGET, "-o"])
        .arg(&object_path)
        .args(["-C", "opt-level=3", "-C", "panic=abort", "-C", "codegen-units=1"])
        .args(["-C", "relocation-model=pie", "-C", "debuginfo=0", "-C", "overflow-checks=off"])
        .args(["-C", "debug-assertions=off", "-C", "force-frame-pointers=yes"])
        .args(["-C", "force-unwind-tables=no", "-C", &format!("target-feature={NO_VECTORS}")]);
    // The warnings about soft-float say that a future rustc will want another target
    // for this. They are kept for the failure, not shown at each build.
    let output = command.output()?;
    if output.status.success() {
        return Ok(object_path);
    }
    Err(format!("{command:?} failed:\n{}", String::from_utf8_lossy(&output.stderr)).into())
}

/// The flat bytes and where its functions are in them.
struct Image {
    bytes: Vec<u8>,
    /// Constants begin here.
    code_bytes: usize,
    symbols: BTreeMap<String, u64>,
}

impl Image {
    fn link(file: &object::File<'_>) -> Result<Self, Failure> {
        let (mut bytes, code_bytes, places) = lay_out(file)?;
        for (&index, &place) in &places {
            let section = file.section_by_index(index)?;
            for (offset, relocation) in section.relocations() {
                let at = place + offset;
                let to = resolve(file, &places, &relocation)?;
                let kind = relocation.flags();
                let field = usize::try_from(at)?;
                match kind {
                    RelocationFlags::Elf { r_type: R_X86_64_PC32 | R_X86_64_PLT32 } => {}
                    RelocationFlags::Elf { r_type: R_X86_64_GOTPCREL } => {
                        call_directly(&mut bytes, field)?;
                    }
                    _ => return Err(format!("blob: {kind:?} at {at:#x} is not relative").into()),
                }
                let value = to.cast_signed() + relocation.addend() - at.cast_signed();
                bytes[field..field + 4].copy_from_slice(&i32::try_from(value)?.to_le_bytes());
            }
        }
        let mut symbols = BTreeMap::new();
        for symbol in file.symbols().filter(|s| s.is_global() && s.is_definition()) {
            let SymbolSection::Section(index) = symbol.section() else { continue };
            if let Some(place) = places.get(&index) {
                symbols.insert(symbol.name()?.to_owned(), place + symbol.address());
            }
        }
        Ok(Self { bytes, code_bytes, symbols })
    }

    /// `static OFFSETS`, in the order of `RuntimeFn::ALL`.
    fn offsets(&self) -> Result<String, Failure> {
        let shared = std::fs::read_to_string(SHARED)?;
        // The lines `RuntimeFn::ThreadSlot => "flea_thread_slot",` in the order of the enum.
        let names: Vec<&str> = shared
            .lines()
            .filter(|line| line.trim().starts_with("RuntimeFn::") && line.contains("=>"))
            .filter_map(|line| line.split('"').nth(1))
            .collect();
        let mut text = format!("static OFFSETS: [u32; {}] = [\n", names.len());
        for name in names {
            let offset = self.symbols.get(name).ok_or(format!("blob: {name} is missing"))?;
            writeln!(text, "    {offset}, // {name}")?;
        }
        text.push_str("];\n");
        Ok(text)
    }
}

/// The bytes, how many of them are code, and where each section is.
type Layout = (Vec<u8>, usize, HashMap<SectionIndex, u64>);

/// Puts code first, then constants. Anything else that would be loaded is an error.
fn lay_out(file: &object::File<'_>) -> Result<Layout, Failure> {
    let mut bytes = Vec::new();
    let mut code_bytes = 0;
    let mut places = HashMap::new();
    for code in [true, false] {
        for section in file.sections() {
            let SectionFlags::Elf { sh_flags, .. } = section.flags() else { continue };
            let name = section.name()?;
            let loaded = sh_flags.contains(object::elf::SHF_ALLOC);
            let is_code = sh_flags.contains(object::elf::SHF_EXECINSTR);
            // Without unwinding there is nobody to read these in the target.
            let skipped = name.starts_with(".eh_frame") || name.starts_with(".note");
            if !loaded || skipped || section.size() == 0 || is_code != code {
                continue;
            }
            if sh_flags.contains(object::elf::SHF_WRITE) {
                return Err(format!("blob: {name} is writable data").into());
            }
            let align = usize::try_from(section.align())?.max(16);
            let filler = if code { 0xcc } else { 0 };
            bytes.resize(bytes.len().next_multiple_of(align), filler);
            places.insert(section.index(), bytes.len() as u64);
            bytes.extend_from_slice(section.data()?);
        }
        if code {
            code_bytes = bytes.len();
        }
    }
    Ok((bytes, code_bytes, places))
}

/// rustc calls memset through the GOT, which the blob has none of: `call [rip+x]` becomes
/// `addr32 call x`, of the same length, as linkers do it.
fn call_directly(bytes: &mut [u8], field: usize) -> Result<(), Failure> {
    match bytes.get_mut(field.wrapping_sub(2)..field) {
        Some(opcode) if *opcode == [0xff, 0x15] => {
            opcode.copy_from_slice(&[0x67, 0xe8]);
            Ok(())
        }
        other => Err(format!("blob: {other:x?} at {field:#x} reads the GOT").into()),
    }
}

fn resolve(
    file: &object::File<'_>,
    places: &HashMap<SectionIndex, u64>,
    relocation: &object::Relocation,
) -> Result<u64, Failure> {
    let RelocationTarget::Symbol(index) = relocation.target() else {
        return Err("blob: a relocation without symbol".into());
    };
    let symbol = file.symbol_by_index(index)?;
    let name = symbol.name().unwrap_or("?");
    let SymbolSection::Section(section) = symbol.section() else {
        return Err(
            format!("blob: `{name}` is not defined: a panic path, or a library call").into()
        );
    };
    let place = places.get(&section).ok_or(format!("blob: `{name}` is in no loaded section"))?;
    Ok(place + symbol.address())
}
