//! Our ground in the target: code arenas, the runtime blob, the registry, data arenas. Made
//! on first use, given back when nothing is left in it.

use std::{
    fs::{File, OpenOptions},
    os::{
        fd::{IntoRawFd as _, RawFd},
        unix::ffi::OsStrExt as _,
    },
};

use flea_image::frames_file::{FILE_BYTES, HEAD_BYTES};
use flea_layout::shared::THREAD_TABLE_BYTES;
use flea_load::{Protection, SharedObject};
use flea_process::{MapRequest, Memory, Pid, Tracer};
use flea_symbols::addr::RemoteAddr;

use crate::{
    error::RemoteError,
    frames_file,
    registry::{self, CodeArena, Controller, DataArena, LoadedObject, Registry, Runtime, Storage},
};

/// Bytes of the first code arena near a module; later ones are twice as large.
const CODE_ARENA_BYTES: u64 = 2 << 20;
const MAX_CODE_ARENA_BYTES: u64 = 256 << 20;
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
        let mut ground = Self { tracer, storage, registry, stored };
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
            Ok((storage, registry)) => Ok(Self { tracer, storage, registry, stored: None }),
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

        let fd = memfd(tracer, &mut registry, registry::NAME)?;
        let base = tracer.remote_map(MapRequest {
            near: None,
            size_bytes: registry::MAPPING_BYTES,
            prot: libc::PROT_READ | libc::PROT_WRITE,
            flags: libc::MAP_PRIVATE | libc::MAP_NORESERVE,
            fd,
            offset: 0,
        });
        // A private mapping reads as zeros behind the file's end only within the file: give
        // it its size first.
        let base = base.and_then(|base| {
            let size = [u64::from(fd.cast_unsigned()), registry::MAPPING_BYTES, 0, 0, 0, 0];
            tracer.remote_syscall(libc::SYS_ftruncate, size)?;
            let advice = [base.0, registry::MAPPING_BYTES, MADV_DONTDUMP, 0, 0, 0];
            tracer.remote_syscall(libc::SYS_madvise, advice)?;
            Ok(base)
        });
        close(tracer, fd)?;
        let storage = Storage::at(base?);
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
        let target_fd = memfd(self.tracer, &mut self.registry, "flea-maps")?;
        let mapped = self.map_data_arena(target_fd, size_bytes);
        if goes_to == FileGoesTo::Controller || mapped.is_err() {
            close(self.tracer, target_fd)?;
        }
        let (file, mapping) = mapped?;
        let fd = match goes_to {
            FileGoesTo::Controller => file.into_raw_fd(),
            FileGoesTo::Target => target_fd,
        };
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

    fn map_data_arena(
        &mut self,
        fd: i32,
        size_bytes: u64,
    ) -> Result<(File, RemoteAddr), RemoteError> {
        let path = format!("/proc/{}/fd/{fd}", self.tracer.pid());
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|source| {
            RemoteError::Local { what: "opening the target's shared memory", source }
        })?;
        file.set_len(size_bytes).map_err(|source| RemoteError::Local {
            what: "sizing the target's shared memory",
            source,
        })?;
        let table = THREAD_TABLE_BYTES as u64;
        let rw = u64::from((libc::PROT_READ | libc::PROT_WRITE).cast_unsigned());
        let fixed = u64::from((libc::MAP_SHARED | libc::MAP_FIXED).cast_unsigned());
        let mapping = self.tracer.remote_map(MapRequest {
            near: None,
            size_bytes: table + size_bytes,
            prot: libc::PROT_READ | libc::PROT_WRITE,
            flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            fd: -1,
            offset: 0,
        })?;
        let arena = mapping.0 + table;
        let shared = self.tracer.with_thread(|thread| {
            thread.syscall(libc::SYS_madvise, [mapping.0, table, MADV_WIPEONFORK, 0, 0, 0])?;
            let fd = u64::from(fd.cast_unsigned());
            thread.syscall(libc::SYS_mmap, [arena, size_bytes, rw, fixed, fd, 0])?;
            thread.syscall(libc::SYS_madvise, [arena, size_bytes, MADV_DONTDUMP, 0, 0, 0])
        });
        if let Err(error) = shared {
            let _ = unmap(self.tracer, mapping, table + size_bytes);
            return Err(error.into());
        }
        Ok((file, mapping))
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

    /// Takes data arenas out of the target that were released and that no retired code works
    /// on any more.
    pub(crate) fn unmap_released(&mut self) -> Result<(), RemoteError> {
        let table = THREAD_TABLE_BYTES as u64;
        let in_use = |arena: &DataArena| {
            let base = RemoteAddr(arena.mapping.0 + table);
            let bodies = self.registry.functions.iter().flat_map(|f| &f.bodies);
            let mut retired = self.registry.retired.iter().flat_map(|r| &r.arenas);
            bodies.into_iter().any(|b| b.arena == base) || retired.any(|a| *a == base)
        };
        let (gone, stay): (Vec<_>, Vec<_>) = self
            .registry
            .data
            .iter()
            .cloned()
            .partition(|arena| (arena.released || !arena.owner.is_alive()) && !in_use(arena));
        for arena in &gone {
            unmap(self.tracer, arena.mapping, arena.size_bytes)?;
        }
        self.registry.data = stay;
        Ok(())
    }

    /// Writes the registry; or, where nothing is left in it, takes all of our ground out of
    /// the target.
    pub(crate) fn close(mut self) -> Result<(), RemoteError> {
        let r = &self.registry;
        let empty = r.functions.is_empty()
            && r.data.is_empty()
            && r.objects.is_empty()
            && r.retired.is_empty();
        if !empty {
            return self.store();
        }
        for arena in std::mem::take(&mut self.registry.code) {
            unmap(self.tracer, arena.base, arena.size_bytes)?;
        }
        unmap(self.tracer, self.storage.base(), registry::MAPPING_BYTES)
    }

    /// Writes the registry, if it has changed since.
    pub(crate) fn store(&mut self) -> Result<(), RemoteError> {
        if self.stored.as_ref() != Some(&self.registry) {
            self.stored = None;
            self.storage.store(self.tracer.memory(), &self.registry)?;
            self.stored = Some(self.registry.clone());
        }
        Ok(())
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
    let opened = tracer.remote_syscall(libc::SYS_openat, [here, base.0, flags, 0, 0, 0]);
    let Some(fd) = unless_refused(opened)? else { return Ok(false) };
    let rx = u64::from((libc::PROT_READ | libc::PROT_EXEC).cast_unsigned());
    let flags = u64::from((libc::MAP_PRIVATE | libc::MAP_FIXED).cast_unsigned());
    let mapped = tracer.remote_syscall(libc::SYS_mmap, [base.0, size_bytes, rx, flags, fd, 0]);
    tracer.remote_syscall(libc::SYS_close, [fd, 0, 0, 0, 0, 0])?;
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

/// A memfd of the target, by its number there. The name is handed over in code memory that
/// nothing uses yet: there is no other memory of ours at this point.
fn memfd(tracer: &mut Tracer, registry: &mut Registry, name: &str) -> Result<i32, RemoteError> {
    let near = registry.code.first().map(|arena| arena.base).unwrap_or_default();
    let text = format!("{name}\0");
    let len = u32::try_from(text.len()).expect("a name is short");
    let place = registry.place(near, len).ok_or(RemoteError::NoGap { near, bytes: len.into() })?;
    tracer.memory().write(place.at, text.as_bytes())?;
    let flags = u64::from(libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
    let fd = tracer.remote_syscall(libc::SYS_memfd_create, [place.at.0, flags, 0, 0, 0, 0]);
    registry.unplace(place);
    Ok(i32::try_from(fd?).expect("a file descriptor is an int"))
}

fn close(tracer: &mut Tracer, fd: i32) -> Result<(), RemoteError> {
    tracer.remote_syscall(libc::SYS_close, [u64::from(fd.cast_unsigned()), 0, 0, 0, 0, 0])?;
    Ok(())
}

fn unmap(tracer: &mut Tracer, at: RemoteAddr, size_bytes: u64) -> Result<(), RemoteError> {
    tracer.remote_syscall(libc::SYS_munmap, [at.0, size_bytes, 0, 0, 0, 0])?;
    Ok(())
}

fn local(what: &'static str) -> RemoteError {
    RemoteError::Local { what, source: std::io::ErrorKind::NotFound.into() }
}
