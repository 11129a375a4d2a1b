//! From a file's bytes to what is to be in memory. Start at [`SharedObject::parse`].

use flea_symbols::addr::Svma;
use object::elf::FileHeader64;
use object::read::elf::ElfFile;
use object::{LittleEndian, Object as _, ObjectSection as _};

use crate::error::ParseError;
use crate::file::{
    File, PAGE, PF_R, PF_W, PF_X, PT_GNU_RELRO, PT_GNU_STACK, PT_LOAD, PT_TLS, ProgramHeader,
    damaged, read_u64, slice,
};
use crate::relocations::{self, Relocation};
use crate::start_code;
use crate::symbols::Dynamic;

/// A patch is a few functions. The bound keeps a hostile file from taking our memory.
const MAX_IMAGE_BYTES: u64 = 64 << 20;
/// What unwinders call for frames that catch or clean up.
const PERSONALITIES: [&str; 3] =
    ["__gcc_personality_v0", "__gxx_personality_v0", "rust_eh_personality"];
const DT_FLAGS_1: u64 = 0x6fff_fffb;
const DF_1_PIE: u64 = 0x0800_0000;

/// A shared object that can be loaded.
#[derive(Clone, Debug)]
pub struct SharedObject {
    /// Its bytes in memory before relocation, whole pages, from `first` on.
    pub(crate) image: Vec<u8>,
    /// Address of its first page.
    pub(crate) first: Svma,
    /// One per page, as it is to be once relocated.
    pub(crate) pages: Vec<Protection>,
    pub(crate) relocations: Vec<Relocation>,
    pub(crate) imports: Vec<Import>,
}

/// What may be done with a page. There is none for writing and executing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// A hole between segments.
    None,
    /// Constants; also what was relocated and is not to change any more (RELRO).
    Read,
    /// Code.
    ReadExecute,
    /// Variables.
    ReadWrite,
}

/// A symbol that somebody else has to define.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// Its name.
    pub name: String,
    /// The version that the object was linked against (`GLIBC_2.14`).
    pub version: Option<String>,
    /// May be missing: its address is 0 then.
    pub weak: bool,
}

impl SharedObject {
    /// Reads `bytes`.
    ///
    /// # Errors
    /// [`ParseError`]: not a shared object, damaged, or one that needs what only the system's
    /// loader can give.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        let file = File::parse(bytes)?;
        refuse_kinds(&file)?;
        let (image, first) = read_image(&file)?;
        let pages = protections(&file, first, image.len() as u64 / PAGE)?;
        let dynamic = Dynamic::read(&file)?;
        if dynamic.value(DT_FLAGS_1).is_some_and(|flags| flags & DF_1_PIE != 0) {
            return Err(ParseError::NotSharedObject { found: "an executable" });
        }
        let original = |at: Svma| {
            let into = usize::try_from(at.0.checked_sub(first.0)?).ok()?;
            read_u64(&image, into)
        };
        let found = relocations::read(&dynamic, original)?;
        start_code::check(&file, &dynamic, &found.list)?;
        check_sections(bytes)?;
        if found.imports.iter().any(|import| PERSONALITIES.contains(&import.name.as_str())) {
            return Err(ParseError::Exceptions);
        }
        let relocations::Relocations { list, imports, .. } = found;
        let object = Self { image, first, pages, relocations: list, imports };
        object.check_places()?;
        Ok(object)
    }

    /// Memory that it takes: whole pages, the first at any page boundary.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.image.len() as u64
    }

    /// What has to be found elsewhere. The object's own definitions are its own: nobody's
    /// symbol of the same name takes their place.
    #[must_use]
    pub fn imports(&self) -> &[Import] {
        &self.imports
    }

    /// Where `address` is from the beginning of its memory; `None` outside of it.
    #[must_use]
    pub fn offset_of(&self, address: Svma) -> Option<u64> {
        address.0.checked_sub(self.first.0).filter(|offset| *offset < self.size_bytes())
    }

    /// Every relocation is inside a segment.
    fn check_places(&self) -> Result<(), ParseError> {
        for relocation in &self.relocations {
            let last = relocation.at.0.checked_add(relocation.field.size_bytes() - 1);
            let inside = |at: u64| {
                let page = self.offset_of(Svma(at)).map(|offset| offset / PAGE);
                let page = page.and_then(|page| usize::try_from(page).ok());
                page.is_some_and(|page| self.pages[page] != Protection::None)
            };
            if !inside(relocation.at.0) || !last.is_some_and(inside) {
                return Err(damaged("a relocation is outside its segments"));
            }
        }
        Ok(())
    }
}

fn refuse_kinds(file: &File<'_>) -> Result<(), ParseError> {
    if file.of_kind(PT_TLS).any(|header| header.size_bytes > 0) {
        return Err(ParseError::ThreadLocal { symbol: None });
    }
    if file.of_kind(PT_GNU_STACK).any(|header| header.flags & PF_X != 0) {
        return Err(ParseError::ExecutableStack);
    }
    let both = PF_W | PF_X;
    match file.of_kind(PT_LOAD).find(|segment| segment.flags & both == both) {
        Some(segment) => Err(ParseError::WritableCode { at: Svma(segment.address) }),
        None => Ok(()),
    }
}

/// The bytes of all segments at their places, and the first page's address.
fn read_image(file: &File<'_>) -> Result<(Vec<u8>, Svma), ParseError> {
    let loaded = || file.of_kind(PT_LOAD).filter(|segment| segment.size_bytes > 0);
    let first = loaded().map(|segment| segment.address).min();
    let first = first.ok_or(damaged("it has no segment to load"))? / PAGE * PAGE;
    let mut end = first;
    for segment in loaded() {
        let behind = segment.end().ok_or(damaged("a segment ends beyond all addresses"))?;
        end = end.max(behind);
    }
    let size_bytes = end - first;
    if size_bytes > MAX_IMAGE_BYTES {
        return Err(ParseError::TooLarge { size_bytes, max: MAX_IMAGE_BYTES });
    }
    let len = usize::try_from(size_bytes.next_multiple_of(PAGE)).expect("bounded above");
    let mut image = vec![0; len];
    for segment in loaded() {
        if segment.file_size_bytes > segment.size_bytes {
            return Err(damaged("a segment is larger in the file than in memory"));
        }
        let bytes = slice(file.bytes, segment.offset, segment.file_size_bytes)
            .ok_or(damaged("a segment reaches past the end of the file"))?;
        let at = usize::try_from(segment.address - first).expect("inside the image");
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    Ok((image, Svma(first)))
}

/// How each of `n_pages` pages is to be protected.
fn protections(file: &File<'_>, first: Svma, n_pages: u64) -> Result<Vec<Protection>, ParseError> {
    let n = usize::try_from(n_pages).expect("the image is in memory");
    let mut pages: Vec<Option<Protection>> = vec![None; n];
    let index = |at: u64| usize::try_from((at - first.0) / PAGE).expect("inside the image");
    for segment in file.of_kind(PT_LOAD).filter(|segment| segment.size_bytes > 0) {
        let wanted = protection(segment);
        let last = segment.address + segment.size_bytes - 1;
        let covered = index(segment.address)..=index(last);
        for (i, page) in pages.iter_mut().enumerate().filter(|(i, _)| covered.contains(i)) {
            if page.is_some_and(|other| other != wanted) {
                return Err(ParseError::SharedPage { at: Svma(first.0 + i as u64 * PAGE) });
            }
            *page = Some(wanted);
        }
    }
    for relro in file.of_kind(PT_GNU_RELRO) {
        // Whole pages only, as glibc does it: what else is on the last one stays writable.
        let end = relro.end().unwrap_or(0) / PAGE * PAGE;
        let mut at = relro.address / PAGE * PAGE;
        while at < end && at >= first.0 && index(at) < n {
            let page = &mut pages[index(at)];
            if *page == Some(Protection::ReadWrite) {
                *page = Some(Protection::Read);
            }
            at += PAGE;
        }
    }
    Ok(pages.into_iter().map(|page| page.unwrap_or(Protection::None)).collect())
}

fn protection(segment: &ProgramHeader) -> Protection {
    match segment.flags & (PF_R | PF_W | PF_X) {
        flags if flags & PF_X != 0 => Protection::ReadExecute,
        flags if flags & PF_W != 0 => Protection::ReadWrite,
        flags if flags & PF_R != 0 => Protection::Read,
        _ => Protection::None,
    }
}

/// What only section headers tell. A file without them has been through a tool that removes
/// what is not needed to run it; it is taken as it is.
fn check_sections(bytes: &[u8]) -> Result<(), ParseError> {
    let Ok(elf) = ElfFile::<FileHeader64<LittleEndian>>::parse(bytes) else { return Ok(()) };
    for section in elf.sections() {
        let is_loaded = section.address() != 0;
        if is_loaded && section.align() > PAGE {
            return Err(ParseError::Alignment { align: section.align() });
        }
        if is_loaded && section.size() > 0 && section.name() == Ok(".gcc_except_table") {
            return Err(ParseError::Exceptions);
        }
    }
    Ok(())
}
