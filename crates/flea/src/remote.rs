//! Our ground in the target: code arenas, the runtime blob, the registry, data arenas. Made
//! on first use, given back when nothing is left in it.

use std::{
    cell::OnceCell,
    fs::File,
    os::{
        fd::{BorrowedFd, IntoRawFd as _, RawFd},
        unix::ffi::OsStrExt as _,
    },
};

use flea_image::frames_file::{FILE_BYTES, HEAD_BYTES};
use flea_layout::shared::THREAD_TABLE_BYTES;
use flea_load::{Protection, SharedObject};
use flea_process::{Borrowed, HandOverError, MapRequest, Memory, MemoryLeft, Pid, Tracer};
use flea_symbols::addr::RemoteAddr;

use crate::{
    error::RemoteError,
    frames_file,
    pages::Pages,
    registry::{self, CodeArena, Controller, DataArena, LoadedObject, Registry, Runtime, Storage},
};

/// Bytes of the first code arena near a module; later ones are twice as large.
const CODE_ARENA_BYTES: u64 = 2 << 20;
const MAX_CODE_ARENA_BYTES: u64 = 256 << 20;
/// What the runtime, a small registry and the kernel's own tables for them take, and some more.
const GROUND_BYTES: u64 = 1 << 20;
/// `MADV_WIPEONFORK`: a forked child's thread table is empty.
const MADV_WIPEONFORK: u64 = 18;
/// `MADV_DONTDUMP`: the registry's and the arenas' sparse gigabytes are not for core files.
const MADV_DONTDUMP: u64 = 16;

/// Who keeps a data arena's file open: the controller, or the target where both are one
/// process and a forked child does the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileGoesTo {
    Controller,
    Target,
}

/// The target's side of everything, while it is seized.
pub(crate) struct Ground<'t> {
    pub(crate) tracer: &'t mut Tracer,
    pub(crate) storage: Storage,
    pub(crate) registry: Registry,
    /// What is in `storage`, as far as we know.
    stored: Option<Registry>,
    /// The sites are what the stored registry says, unless their modules are other ones by now.
    pub(crate) is_made: bool,
    /// Which of the target's memory exists, once somebody has asked.
    pub(crate) pages: OnceCell<Pages>,
}

/// Fails where `bytes` more of memory, and what our ground takes, might be more than the target's
/// control group has left: the kernel would kill the target for it.
pub(crate) fn check_memory_limit(pid: Pid, bytes: u64) -> Result<(), RemoteError> {
    let needed = bytes.saturating_add(GROUND_BYTES);
    match flea_process::memory_left(pid) {
        Some(MemoryLeft { bytes: left, group }) if left < needed => {
            Err(RemoteError::MemoryLimit { pid, left, needed, group })
        }
        _ => Ok(()),
    }
}

/// Where the registry of process `pid` is, if it has one.
pub(crate) fn find_registry(pid: Pid) -> Result<Option<RemoteAddr>, RemoteError> {
    let maps = flea_process::maps(pid)?;
    Ok(maps.iter().find(|m| m.path == registry::MAPS_PATH && !m.perms.shared).map(|m| m.start))
}

/// Puts this build's runtime into a code arena: any will do, as it is called by its address.
/// Whether one had room.
fn place_runtime(tracer: &Tracer, registry: &mut Registry) -> Result<bool, RemoteError> {
    let len = u32::try_from(flea_runtime::BLOB.len()).expect("the blob is small");
    let bases: Vec<_> = registry.code.iter().map(|arena| arena.base).collect();
    let Some(code) = bases.into_iter().find_map(|base| registry.place(base, len)) else {
        return Ok(false);
    };
    tracer.memory().write(code.at, flea_runtime::BLOB)?;
    registry.runtimes.push(Runtime { code, sum: registry::runtime_sum() });
    Ok(true)
}

impl<'t> Ground<'t> {
    /// What is there; `None` where nothing is.
    pub(crate) fn find(tracer: &'t mut Tracer) -> Result<Option<Self>, RemoteError> {
        let Some(base) = find_registry(tracer.pid())? else { return Ok(None) };
        let storage = Storage::at(base);
        let registry = storage.load(tracer.memory())?;
        let stored = Some(registry.clone());
        let is_made = storage.is_made(tracer.memory())?;
        let pages = OnceCell::new();
        let mut ground = Self { tracer, storage, registry, stored, is_made, pages };
        ground.bring_runtime()?;
        Ok(Some(ground))
    }

    /// Another build of Flea may have been here first.
    fn bring_runtime(&mut self) -> Result<(), RemoteError> {
        if self.registry.own_runtime().is_some() || self.registry.code.is_empty() {
            return Ok(());
        }
        if !place_runtime(self.tracer, &mut self.registry)? {
            let near = self.registry.code[0].base;
            self.add_code_arena(near)?;
            let placed = place_runtime(self.tracer, &mut self.registry)?;
            assert!(placed, "a fresh arena has room");
        }
        self.store()
    }

    /// What is there, made where nothing is.
    pub(crate) fn open(tracer: &'t mut Tracer) -> Result<Self, RemoteError> {
        // Looked for first and apart: the borrow checker cannot see that `find` gives the
        // tracer back with `None`.
        if find_registry(tracer.pid())?.is_some() {
            return Self::find(tracer)?.ok_or_else(|| local("finding the registry"));
        }
        Self::found(tracer)
    }

    /// Makes code arena, runtime and registry.
    fn found(tracer: &'t mut Tracer) -> Result<Self, RemoteError> {
        let near = flea_process::auxv(tracer.pid())?
            .entry
            .ok_or_else(|| local("the target's entry point"))?;
        let arena = map_code(tracer, near, CODE_ARENA_BYTES)?;
        let (at, size_bytes) = (arena.base, arena.size_bytes);
        match Self::furnish(tracer, arena) {
            Ok((storage, registry)) => {
                let pages = OnceCell::new();
                Ok(Self { tracer, storage, registry, stored: None, is_made: true, pages })
            }
            Err(error) => {
                // What failed first is what is told.
                let _ = unmap(tracer, at, size_bytes);
                Err(error)
            }
        }
    }

    /// Puts the runtime into a fresh arena and makes the registry.
    fn furnish(tracer: &mut Tracer, arena: CodeArena) -> Result<(Storage, Registry), RemoteError> {
        let mut registry = Registry { code: vec![arena], ..Registry::default() };
        let placed = place_runtime(tracer, &mut registry)?;
        assert!(placed, "a fresh arena has room");

        let base = tracer.remote_map(MapRequest {
            near: None,
            size_bytes: registry::MAPPING_BYTES,
            prot: libc::PROT_READ | libc::PROT_WRITE,
            flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            fd: -1,
            offset: 0,
        })?;
        let file = NewFile {
            name: registry::NAME,
            size_bytes: registry::MAPPING_BYTES,
            at: base,
            flags: libc::MAP_PRIVATE | libc::MAP_NORESERVE,
            stays_open: false,
        };
        if let Err(error) = file.map(tracer, &mut registry) {
            // What failed first is what is told.
            let _ = unmap(tracer, base, registry::MAPPING_BYTES);
            return Err(error);
        }
        let storage = Storage::at(base);
        storage.store(tracer.memory(), &registry)?;
        Ok((storage, registry))
    }

    /// More room for code near `near`.
    pub(crate) fn add_code_arena(&mut self, near: RemoteAddr) -> Result<(), RemoteError> {
        self.add_code_arena_of(near, 0)
    }

    /// The same, with room for at least so many bytes, if that is less than the largest arena
    /// has.
    pub(crate) fn add_code_arena_of(
        &mut self,
        near: RemoteAddr,
        n_bytes: u64,
    ) -> Result<(), RemoteError> {
        let largest = self.registry.code.iter().map(|a| a.size_bytes).max().unwrap_or(0);
        let wanted = (n_bytes + HEAD_BYTES).next_multiple_of(CODE_ARENA_BYTES);
        let size_bytes = (largest * 2).max(wanted).clamp(CODE_ARENA_BYTES, MAX_CODE_ARENA_BYTES);
        let arena = map_code(self.tracer, near, size_bytes)?;
        self.registry.code.push(arena);
        self.store()
    }

    /// Maps a thread table and an arena of `size_bytes` behind it. What is returned is an
    /// open descriptor to the arena's file, and the arena's base in the target. It is
    /// `owner`'s, who is not the process that runs this where that is a forked helper.
    pub(crate) fn add_data_arena(
        &mut self,
        size_bytes: u64,
        goes_to: FileGoesTo,
        owner: Controller,
    ) -> Result<(RawFd, RemoteAddr), RemoteError> {
        let stays_open = goes_to == FileGoesTo::Target;
        let (file, target_fd, mapping) = self.map_data_arena(size_bytes, stays_open)?;
        let fd = if stays_open { target_fd } else { file.into_raw_fd() };
        let table = THREAD_TABLE_BYTES as u64;
        self.registry.data.push(DataArena {
            mapping,
            size_bytes: table + size_bytes,
            owner,
            released: false,
        });
        self.store()?;
        Ok((fd, RemoteAddr(mapping.0 + table)))
    }

    /// Maps a thread table, and behind it an arena that other processes have already. Its base.
    pub(crate) fn share_data_arena(
        &mut self,
        size_bytes: u64,
        file: BorrowedFd<'_>,
        owner: Controller,
    ) -> Result<RemoteAddr, RemoteError> {
        let table = THREAD_TABLE_BYTES as u64;
        let mapping = self.tracer.remote_map(MapRequest {
            near: None,
            size_bytes: table + size_bytes,
            prot: libc::PROT_READ | libc::PROT_WRITE,
            flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            fd: -1,
            offset: 0,
        })?;
        if let Err(error) = self.map_shared(mapping, size_bytes, file) {
            // What failed first is what is told.
            let _ = unmap(self.tracer, mapping, table + size_bytes);
            return Err(error);
        }
        let size_bytes = table + size_bytes;
        self.registry.data.push(DataArena { mapping, size_bytes, owner, released: false });
        self.store()?;
        Ok(RemoteAddr(mapping.0 + table))
    }

    fn map_shared(
        &mut self,
        mapping: RemoteAddr,
        size_bytes: u64,
        file: BorrowedFd<'_>,
    ) -> Result<(), RemoteError> {
        let table = THREAD_TABLE_BYTES as u64;
        let arena = mapping.0 + table;
        let rw = u64::from((libc::PROT_READ | libc::PROT_WRITE).cast_unsigned());
        let fixed = u64::from((libc::MAP_SHARED | libc::MAP_FIXED).cast_unsigned());
        let scratch = self.storage.scratch();
        let shared = self.tracer.with_own_thread(|thread| {
            thread.syscall(libc::SYS_madvise, [mapping.0, table, MADV_WIPEONFORK, 0, 0, 0])?;
            let fd = match flea_process::hand_over(thread, scratch, file) {
                Ok(fd) => fd,
                Err(HandOverError::Remote(error)) => return Err(error),
                Err(HandOverError::Local(source)) => return Ok(Err(source)),
            };
            let mapped = thread
                .syscall(libc::SYS_mmap, [arena, size_bytes, rw, fixed, fd, 0])
                .and_then(|_| {
                    let advice = [arena, size_bytes, MADV_DONTDUMP, 0, 0, 0];
                    thread.syscall(libc::SYS_madvise, advice)
                });
            thread.syscall(libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
            mapped.map(|_| Ok(()))
        })?;
        let what = "handing the shared memory to the target";
        shared.map_err(|source| RemoteError::Local { what, source })
    }

    fn map_data_arena(
        &mut self,
        size_bytes: u64,
        stays_open: bool,
    ) -> Result<(File, i32, RemoteAddr), RemoteError> {
        let table = THREAD_TABLE_BYTES as u64;
        let mapping = self.tracer.remote_map(MapRequest {
            near: None,
            size_bytes: table + size_bytes,
            prot: libc::PROT_READ | libc::PROT_WRITE,
            flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            fd: -1,
            offset: 0,
        })?;
        let at = RemoteAddr(mapping.0 + table);
        let flags = libc::MAP_SHARED;
        let file = NewFile { name: "flea-maps", size_bytes, at, flags, stays_open };
        let advice = [mapping.0, table, MADV_WIPEONFORK, 0, 0, 0];
        let wiped = self.tracer.remote_syscall(libc::SYS_madvise, advice);
        let shared = wiped
            .map_err(RemoteError::from)
            .and_then(|_| file.map(self.tracer, &mut self.registry));
        match shared {
            Ok((file, fd)) => Ok((file, fd, mapping)),
            Err(error) => {
                // What failed first is what is told.
                let _ = unmap(self.tracer, mapping, table + size_bytes);
                Err(error)
            }
        }
    }

    /// Maps a shared object near `near` and writes it there. Its base.
    ///
    /// It is written through /proc/PID/mem before any page is what it will be: none of them is
    /// ever writable and executable.
    pub(crate) fn add_object(
        &mut self,
        near: RemoteAddr,
        object: &SharedObject,
        addresses: &[RemoteAddr],
        pinned: bool,
    ) -> Result<RemoteAddr, RemoteError> {
        let size_bytes = object.size_bytes();
        let base = self.tracer.remote_map(MapRequest {
            near: Some(near),
            size_bytes,
            prot: libc::PROT_READ,
            flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            fd: -1,
            offset: 0,
        })?;
        let loaded = LoadedObject { base, size_bytes, pinned };
        self.registry.objects.push(loaded.clone());
        let furnished = self.furnish_object(base, object, addresses).and_then(|()| self.store());
        if let Err(error) = furnished {
            // What failed first is what is told.
            let _ = self.unmap_object(&loaded);
            return Err(error);
        }
        Ok(base)
    }

    fn furnish_object(
        &mut self,
        base: RemoteAddr,
        object: &SharedObject,
        addresses: &[RemoteAddr],
    ) -> Result<(), RemoteError> {
        let linked = object.link(base, |import| addresses[import])?;
        self.memory().write(base, &linked.bytes)?;
        self.tracer.with_thread(|thread| {
            for region in &linked.regions {
                let prot = match region.protection {
                    Protection::None => libc::PROT_NONE,
                    Protection::Read => libc::PROT_READ,
                    Protection::ReadExecute => libc::PROT_READ | libc::PROT_EXEC,
                    Protection::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
                };
                let prot = u64::from(prot.cast_unsigned());
                let args = [region.at.0, region.size_bytes, prot, 0, 0, 0];
                thread.syscall(libc::SYS_mprotect, args)?;
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Takes a shared object out of the target. Nobody may have an address of it any more.
    pub(crate) fn unmap_object(&mut self, object: &LoadedObject) -> Result<(), RemoteError> {
        // Forgotten first: who finds it in the registry may take it that it is there.
        self.registry.objects.retain(|other| other.base != object.base);
        self.store()?;
        unmap(self.tracer, object.base, object.size_bytes)
    }

    /// Writes the registry, if it has changed since.
    pub(crate) fn store(&mut self) -> Result<(), RemoteError> {
        if self.stored.as_ref() != Some(&self.registry) {
            self.stored = None;
            self.storage.store(self.tracer.memory(), &self.registry)?;
            self.stored = Some(self.registry.clone());
            if self.is_made {
                self.storage.note_made(self.tracer.memory())?;
            }
        }
        Ok(())
    }

    /// The sites are now what the stored registry says.
    pub(crate) fn note_made(&mut self) -> Result<(), RemoteError> {
        self.is_made = true;
        Ok(self.storage.note_made(self.tracer.memory())?)
    }

    pub(crate) fn memory(&self) -> &Memory {
        self.tracer.memory()
    }
}

fn map_code(
    tracer: &mut Tracer,
    near: RemoteAddr,
    size_bytes: u64,
) -> Result<CodeArena, RemoteError> {
    let base = tracer.remote_map(MapRequest {
        near: Some(near),
        size_bytes,
        prot: libc::PROT_READ | libc::PROT_EXEC,
        flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        fd: -1,
        offset: 0,
    })?;
    let arena = CodeArena::new(base, size_bytes);
    match map_frames_file(tracer, base, size_bytes) {
        Ok(true) => Ok(arena.behind(HEAD_BYTES)),
        Ok(false) => Ok(arena),
        Err(error) => {
            // What failed first is what is told.
            let _ = unmap(tracer, base, size_bytes);
            Err(error)
        }
    }
}

/// Puts the file that has the arena's unwind row in the place of its memory, if there is one
/// and the target may map it. The arena is still empty: it holds the path meanwhile.
fn map_frames_file(
    tracer: &mut Tracer,
    base: RemoteAddr,
    size_bytes: u64,
) -> Result<bool, RemoteError> {
    let Some(path) = frames_file::usable(tracer.pid()) else { return Ok(false) };
    let path = [path.as_os_str().as_bytes(), b"\0"].concat();
    if path.len() as u64 > HEAD_BYTES || size_bytes > FILE_BYTES {
        return Ok(false);
    }
    tracer.memory().write(base, &path)?;
    let here = i64::from(libc::AT_FDCWD).cast_unsigned();
    let flags = u64::from((libc::O_RDONLY | libc::O_CLOEXEC).cast_unsigned());
    let rx = u64::from((libc::PROT_READ | libc::PROT_EXEC).cast_unsigned());
    let map_flags = u64::from((libc::MAP_PRIVATE | libc::MAP_FIXED).cast_unsigned());
    let mapped = tracer.with_own_thread(|thread| {
        let fd = thread.syscall(libc::SYS_openat, [here, base.0, flags, 0, 0, 0])?;
        let args = [base.0, size_bytes, rx, map_flags, fd, 0];
        let mapped = thread.mmap(args);
        thread.syscall(libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
        mapped
    });
    Ok(unless_refused(mapped)?.is_some())
}

/// `None` where the kernel said no to the target.
fn unless_refused(
    outcome: Result<u64, flea_process::RemoteError>,
) -> Result<Option<u64>, RemoteError> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(flea_process::RemoteError::Refused { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Shared memory to be made in the target, and mapped over memory that it has for that.
///
/// Protected: the target's own files. Threads may have descriptors of their own (`unshare`; a
/// vfork child has), so all that names the file by its number is done by one thread, and while
/// it is borrowed.
struct NewFile {
    name: &'static str,
    size_bytes: u64,
    at: RemoteAddr,
    /// `MAP_SHARED` or `MAP_PRIVATE`.
    flags: i32,
    stays_open: bool,
}

impl NewFile {
    /// The file as we have it, and its number in the target where it stays open.
    ///
    /// The name is handed over in code memory that nothing uses yet: there is no other memory of
    /// ours at this point.
    fn map(
        &self,
        tracer: &mut Tracer,
        registry: &mut Registry,
    ) -> Result<(File, i32), RemoteError> {
        let near = registry.code.first().map(|arena| arena.base).unwrap_or_default();
        let text = format!("{}\0", self.name);
        let len = u32::try_from(text.len()).expect("a name is short");
        let place =
            registry.place(near, len).ok_or(RemoteError::NoGap { near, bytes: len.into() })?;
        tracer.memory().write(place.at, text.as_bytes())?;
        let made = tracer.with_own_thread(|thread| {
            let flags = u64::from(libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
            let fd = thread.syscall(libc::SYS_memfd_create, [place.at.0, flags, 0, 0, 0, 0])?;
            let mapped = self.map_open(thread, fd);
            if !self.stays_open || !matches!(mapped, Ok(Ok(_))) {
                thread.syscall(libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
            }
            let fd = i32::try_from(fd).expect("a file descriptor is an int");
            Ok(mapped?.map(|file| (file, fd)))
        });
        registry.unplace(place);
        made?
    }

    fn map_open(
        &self,
        thread: &mut Borrowed<'_>,
        fd: u64,
    ) -> Result<Result<File, RemoteError>, flea_process::RemoteError> {
        // Opened by the thread that has it. It is sized by us: the target may have a limit for
        // files (RLIMIT_FSIZE), of which it would be told by a signal that kills.
        let file = flea_process::open_new_memfd(thread.tid(), fd)
            .and_then(|file| file.set_len(self.size_bytes).map(|()| file));
        let file = match file {
            Ok(file) => file,
            Err(source) => {
                let what = "opening and sizing the target's shared memory";
                return Ok(Err(RemoteError::Local { what, source }));
            }
        };
        let rw = u64::from((libc::PROT_READ | libc::PROT_WRITE).cast_unsigned());
        let flags = u64::from((self.flags | libc::MAP_FIXED).cast_unsigned());
        let (at, size_bytes) = (self.at.0, self.size_bytes);
        thread.mmap([at, size_bytes, rw, flags, fd, 0])?;
        thread.syscall(libc::SYS_madvise, [at, size_bytes, MADV_DONTDUMP, 0, 0, 0])?;
        Ok(Ok(file))
    }
}

fn unmap(tracer: &mut Tracer, at: RemoteAddr, size_bytes: u64) -> Result<(), RemoteError> {
    tracer.remote_syscall(libc::SYS_munmap, [at.0, size_bytes, 0, 0, 0, 0])?;
    Ok(())
}

fn local(what: &'static str) -> RemoteError {
    RemoteError::Local { what, source: std::io::ErrorKind::NotFound.into() }
}
