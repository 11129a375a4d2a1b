//! Exceptions, panics and `backtrace()` pass through the frames of exit skeletons, because the
//! unwinders of the process are told of them.
//!
//! An exit skeleton calls the original from a frame of its own, in memory that belongs to no
//! module: an unwinder finds no row for it, and a `throw` from below would end the process.
//! So the `_Unwind_Find_FDE` of every module that has one is patched like any traced function:
//! its skeleton (`flea_image`, `x86_64::find_fde`) answers for frames of ours. It is one with
//! the skeleton for programs, for that function may be traced as well.
//!
//! A C program has no libgcc, but glibc loads one when `backtrace`, `pthread_exit` or
//! `pthread_cancel` is called first. So where none is loaded, the loader's `_dl_find_object` is
//! patched, which the libgcc that comes will ask.
//!
//! Protected: an unwinder that meets a frame of ours finds its row. By:
//! 1. unwinders are told of all code arenas, and that is committed, before a site is swapped
//!    that leads into a skeleton with a frame ([`Change::tell_unwinders`]);
//! 2. an arena added later is told of before anything is placed in it;
//! 3. unwinders are left alone again after the last skeleton with a frame has been freed,
//!    which is when nobody has its address on a stack (`reclaim`), and when no controller that
//!    lives has an object loaded: what it attaches next need not tell them again.
//!
//! Not covered: an unwinder loaded later (dlopen) that asks `dl_iterate_phdr`, as libgcc's did
//! before gcc 12 and glibc 2.35, or that comes where another is; until the next change.

use std::sync::Arc;

use flea_image::unwind::frame_arena_rows;
use flea_symbols::{
    Site, Unwinder as Kind,
    addr::{RemoteAddr, Svma},
};

use crate::{
    change::{Change, arenas},
    error::{AttachError, RemoteError},
    function::{self, Function},
    modules::{Module, OpenError},
    registry::{CodeArena, Placed, Question, Registry, Retired},
    session::Inner,
    transaction::new_function,
};

/// Libraries that have an unwinder or work hand in hand with one.
const UNWINDER_LIBRARIES: [&str; 3] = ["libgcc_s", "libunwind", "libc++abi"];

/// A function that unwinders ask.
pub(crate) struct Unwinder {
    function: Function,
    site: Site,
    question: Question,
}

/// All unwinders of the process; where there are none, what one loaded later will ask.
///
/// # Errors
/// There is one that cannot be told of our frames.
pub(crate) fn find(session: &Inner) -> Result<Vec<Unwinder>, AttachError> {
    let mut unwinders = Vec::new();
    let mut loader = None;
    for module in session.loaded_modules().map_err(RemoteError::from)? {
        let refused =
            |reason: String| AttachError::Unwinder { module: module.path().to_owned(), reason };
        let find_fde = match module.with_symbols(|symbols| symbols.unwinder()) {
            Ok(Kind::None) => continue,
            Ok(Kind::Libgcc { find_fde }) => find_fde,
            Ok(Kind::Loader { find_object }) => {
                // For what may never come: nothing is refused because of it.
                loader = unwinder(&module, find_object, Question::Object).ok();
                continue;
            }
            Ok(Kind::Other) => return Err(refused("it is not libgcc's".to_owned())),
            Ok(Kind::Hidden) => return Err(refused("it was stripped of its symbols".to_owned())),
            Err(error) if may_lack(&module, &error) => continue,
            Err(error) => return Err(refused(error.to_string())),
        };
        unwinders.push(unwinder(&module, find_fde, Question::Row).map_err(refused)?);
    }
    if unwinders.is_empty() {
        unwinders.extend(loader);
    }
    Ok(unwinders)
}

/// The one at `address`, or why it cannot be patched.
fn unwinder(module: &Arc<Module>, address: Svma, question: Question) -> Result<Unwinder, String> {
    let function = function::at(module, address).map_err(|e| e.to_string())?;
    let function = function.ok_or("it was not found")?;
    let site = function.site().map_err(|refusal| refusal.to_string())?.clone();
    Ok(Unwinder { function, site, question })
}

/// Whether a module that cannot be read may be taken for one without unwinder. Files that are
/// mapped without being ELF, and libraries replaced by an upgrade, are common.
fn may_lack(module: &Module, error: &OpenError) -> bool {
    match error {
        OpenError::Parse { .. } => true,
        _ => !UNWINDER_LIBRARIES.iter().any(|name| module.name().starts_with(name)),
    }
}

impl Unwinder {
    fn site_address(&self) -> RemoteAddr {
        self.function.site_address(&self.site)
    }
}

/// Whether there is nothing for [`Change::tell_unwinders`] to do.
pub(crate) fn all_told(registry: &Registry, unwinders: &[Unwinder]) -> bool {
    let mut told = registry.functions.iter().filter(|f| f.finds_frames.is_some()).peekable();
    if told.peek().is_none() {
        return unwinders.is_empty();
    }
    let told: Vec<_> = told.collect();
    // One may be in its first state: its author died before the sites were swapped.
    told.iter().all(|f| !f.original.starts_with(&f.patched))
        && unwinders.iter().all(|u| told.iter().any(|f| f.site == u.site_address()))
        && registry.code.iter().all(|arena| arena.rows.is_some())
}

impl Change {
    /// Gives all arenas rows, and tells `unwinders`, and those told before, of them all.
    pub(crate) fn tell_unwinders(&mut self, unwinders: &[Unwinder]) -> Result<(), AttachError> {
        let functions = &mut self.registry.functions;
        for unwinder in unwinders {
            let site = unwinder.site_address();
            if !functions.iter().any(|f| f.site == site) {
                functions.push(new_function(&unwinder.function, &unwinder.site));
            }
        }
        let mut sites = Vec::new();
        for f in functions.iter_mut() {
            let told = unwinders.iter().find(|u| u.site_address() == f.site);
            if let Some(told) = told {
                f.finds_frames = Some(told.question);
            }
            if f.finds_frames.is_some() {
                sites.push(f.site);
            }
        }
        for i in 0..self.registry.code.len() {
            let CodeArena { base, size_bytes, rows: None, .. } = self.registry.code[i] else {
                continue;
            };
            self.registry.code[i].rows = Some(self.place_rows(base, size_bytes)?);
        }
        sites.into_iter().try_for_each(|site| self.relink_site(site))
    }

    fn place_rows(&mut self, base: RemoteAddr, size_bytes: u64) -> Result<Placed, AttachError> {
        let draft = frame_arena_rows(base, base, size_bytes);
        let len = u32::try_from(draft.len()).expect("rows and a few instructions");
        let placed = self.registry.place(base, len);
        let rows = placed.ok_or(AttachError::NoRoom { near: base, bytes: len })?;
        self.writes.push((rows.at, frame_arena_rows(rows.at, base, size_bytes)));
        Ok(rows)
    }

    /// Gives all unwinders their own code back, as far as nothing else is attached there.
    pub(crate) fn leave_unwinders(&mut self) -> Result<(), AttachError> {
        let mut sites = Vec::new();
        for f in self.registry.functions.iter_mut().filter(|f| f.finds_frames.is_some()) {
            f.finds_frames = None;
            sites.push(f.site);
        }
        for site in sites {
            self.relink_site(site)?;
        }
        for rows in self.registry.code.iter_mut().filter_map(|arena| arena.rows.take()) {
            // An unwinder may be reading them.
            self.retired.push(Retired::plain(rows, Vec::new()));
        }
        Ok(())
    }

    /// Makes the site enter exactly what is attached there.
    pub(crate) fn relink_site(&mut self, site: RemoteAddr) -> Result<(), AttachError> {
        let functions = &mut self.registry.functions;
        let Some(at) = functions.iter().position(|f| f.site == site) else { return Ok(()) };
        let mut function = functions.swap_remove(at);
        let arenas = arenas(&function);
        self.relink(&mut function, arenas)?;
        self.registry.functions.push(function);
        Ok(())
    }
}
