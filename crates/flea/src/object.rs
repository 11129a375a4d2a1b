//! A loaded object: its maps live in memory shared with the target, its programs can be
//! attached to functions.

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, RwLock},
};

use flea_image::RelocTarget;
use flea_layout::plan::ArenaPlan;
use flea_object::{
    helper::Helper,
    insn::Insn,
    spec::{MapIdx, MapKind, MapSpec, Object as Spec, ProgramKind},
    types::{Type, TypeId, Types},
};
use flea_symbols::addr::RemoteAddr;
use flea_verifier::{
    Changeable, Context, Permissions, Rejection, Target, Verified, Verifier, targets,
};

use crate::{
    compile::Compiled,
    error::{AttachError, LoadError},
    fit::{Fits, Fitted, ModuleKey},
    function::Function,
    given::{Given, stack_args},
    link::Link,
    prepared::Prepared,
    program_array::{Attached, ProgramArray},
    registry::StackArgs,
    session::{Inner, lock},
    slots::Slots,
    transaction,
};

mod share;

/// Bytes of the ring buffer behind `bpf_printk`.
const PRINTK_BYTES: u32 = 1 << 20;
/// Name of that map.
const PRINTK_NAME: &str = "printk";

/// A loaded object. Dropping the last handle to it, links included, takes its memory out of
/// the target.
///
/// ```
/// # mod parts { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/parts/counter.rs")); }
/// # use parts::{counter, total};
/// #[unsafe(no_mangle)]
/// #[inline(never)]
/// extern "C" fn object_example(x: u64) -> u64 {
///     x + 1
/// }
///
/// let session = flea::Session::this_process()?;
/// let object = session.load(counter())?;
/// assert_eq!(object.maps()[0].name, "calls");
/// let names: Vec<String> = object.programs().map(|p| p.name().to_owned()).collect();
/// assert_eq!(names, ["count"]);
///
/// // Everything that belongs together in one go: all of it is attached, or nothing.
/// let program = object.program("count").unwrap();
/// let functions = session.find("object_exampl?")?;
/// let attachments: Vec<_> = functions.iter().map(|f| program.on(f, 0)).collect();
/// let link = object.attach(&attachments)?;
/// object_example(1);
/// assert_eq!((total(&object), object.missed(), object.lost()), (1, 0, 0));
/// drop((link, object));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Object {
    pub(crate) inner: Arc<Loaded>,
}

/// What the handles share.
pub(crate) struct Loaded {
    pub(crate) session: Arc<Inner>,
    pub(crate) spec: Spec,
    pub(crate) plan: ArenaPlan,
    pub(crate) arena: flea_maps::Arena,
    /// The arena's base in the target.
    pub(crate) base: RemoteAddr,
    pub(crate) printk: Option<MapIdx>,
    printk_reader: Arc<Mutex<Option<flea_maps::RingBuf>>>,
    permissions: Permissions,
    /// Programs that can change the target's memory.
    writers: HashSet<usize>,
    fits: Fits,
    verified: Mutex<HashMap<ProofKey, Arc<Verified>>>,
    pub(crate) compiled: Compiled,
    attached: Mutex<HashSet<(usize, RemoteAddr)>>,
    /// Read for as long as programs are compiled and attached, so that none is with old contents
    /// once they have been changed.
    pub(crate) slots: RwLock<Slots>,
    /// What is attached, where program arrays might change it.
    pub(crate) links: Mutex<Vec<Attached>>,
}

/// What a proof depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct ProofKey {
    program: usize,
    context: Context,
    /// What it may change: nothing as long as nobody has allowed anything.
    changeable: Changeable,
    /// Whose types the program was fitted to, if it was.
    module: Option<ModuleKey>,
    /// Whose types it needs besides its context, if it does.
    function: Option<RemoteAddr>,
}

/// One program of an [`Object`].
///
/// ```
/// # mod parts { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/parts/counter.rs")); }
/// # use parts::{counter, total};
/// #[unsafe(no_mangle)]
/// #[inline(never)]
/// extern "C" fn program_example(x: u64) -> u64 {
///     x + 1
/// }
///
/// let session = flea::Session::this_process()?;
/// let object = session.load(counter())?;
/// let program = object.program("count").unwrap();
/// assert_eq!(program.kind(), flea::ProgramKind::Fentry);
///
/// let function = &session.find("program_example")?[0];
/// program.check(function)?; // would it attach, and does the verifier accept it there?
/// let link = program.attach(function)?;
/// assert!(program.attach(function).is_err(), "it is attached already");
/// program_example(1);
/// link.detach()?;
/// assert_eq!(total(&object), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Program {
    object: Object,
    index: usize,
}

/// One program on one function.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// Index into the object's programs.
    pub(crate) program: usize,
    function: Function,
    cookie: u64,
}

impl Object {
    pub(crate) fn load(session: &Arc<Inner>, mut spec: Spec) -> Result<Self, LoadError> {
        let slots = RwLock::new(Slots::of(&spec)?);
        let printk = add_printk_map(&mut spec);
        let n_programs = u32::try_from(spec.programs.len()).expect("an object is far smaller");
        let writes =
            |index: &usize| calls(&spec.programs[*index].insns, &[Helper::ProbeWriteUser as u32]);
        let writers = (0..spec.programs.len()).filter(writes).collect();
        let plan = ArenaPlan::new(&spec.maps, n_programs);
        let (arena, base) = transaction::create_arena(session, &plan, &spec.maps)?;
        let printk_reader = printk.and_then(|index| arena.ringbuf(index).ok());
        let printk_reader = Arc::new(Mutex::new(printk_reader));
        Ok(Self {
            inner: Arc::new(Loaded {
                session: Arc::clone(session),
                spec,
                plan,
                arena,
                base,
                printk,
                printk_reader,
                permissions: session.permissions(),
                writers,
                fits: Fits::default(),
                verified: Mutex::default(),
                compiled: Compiled::default(),
                attached: Mutex::default(),
                slots,
                links: Mutex::default(),
            }),
        })
    }

    /// Its programs, in the object's order.
    pub fn programs(&self) -> impl Iterator<Item = Program> + '_ {
        (0..self.inner.spec.programs.len()).map(|index| Program { object: self.clone(), index })
    }

    /// The program with this name.
    #[must_use]
    pub fn program(&self, name: &str) -> Option<Program> {
        self.programs().find(|p| p.name() == name)
    }

    /// Its maps' declarations; global data and the buffer of `bpf_printk` included.
    #[must_use]
    pub fn maps(&self) -> &[MapSpec] {
        &self.inner.spec.maps
    }

    /// The program array with this name.
    #[must_use]
    pub fn program_array(&self, name: &str) -> Option<ProgramArray> {
        let is_it = |m: &MapSpec| m.name == name && m.kind == MapKind::ProgArray;
        let index = self.inner.spec.maps.iter().position(is_it)?;
        Some(ProgramArray::new(self.clone(), map_idx(index)))
    }

    /// The map with this name. Not a program array, which holds nothing to read or write:
    /// [`Object::program_array`].
    ///
    /// ```
    /// # mod parts { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/parts/counter.rs")); }
    /// # use parts::{counter, total};
    /// # #[unsafe(no_mangle)]
    /// # #[inline(never)]
    /// # extern "C" fn map_example(x: u64) -> u64 {
    /// #     x + 1
    /// # }
    /// let session = flea::Session::this_process()?;
    /// let object = session.load(counter())?;
    /// let function = &session.find("map_example")?[0];
    /// let link = object.program("count").unwrap().attach(function)?;
    /// std::thread::spawn(|| map_example(1)).join().unwrap();
    /// map_example(2);
    ///
    /// // It can be read and written while the programs run. A "per-CPU" map has a value per
    /// // thread.
    /// let Some(flea::Map::PerCpuArray(calls)) = object.map("calls") else { panic!("no map") };
    /// let values = calls.get(0)?.into_iter().map(|v| u64::from_le_bytes(v.try_into().unwrap()));
    /// assert_eq!(values.sum::<u64>(), 2);
    /// calls.set(0, &0u64.to_le_bytes())?;
    /// map_example(3);
    /// assert_eq!(total(&object), 1);
    /// link.detach()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn map(&self, name: &str) -> Option<flea_maps::Map> {
        self.map_at(self.map_index(name)?)
    }

    /// The index of the map with this name: what a map of maps takes and gives, and what
    /// [`Object::maps`] is indexed by.
    ///
    /// Only maps that are declared in the object can be put into its maps of maps: its memory
    /// does not grow once it is loaded.
    #[must_use]
    pub fn map_index(&self, name: &str) -> Option<MapIdx> {
        self.inner.spec.maps.iter().position(|m| m.name == name).map(map_idx)
    }

    /// The map at this index; `None` also for one that is only a template.
    #[must_use]
    pub fn map_at(&self, index: MapIdx) -> Option<flea_maps::Map> {
        self.inner.arena.map_at(index).ok()
    }

    /// Attaches all of `attachments` or none. Several programs on one function become one
    /// image; later ones in the list are newer and run first within their kind.
    ///
    /// # Errors
    /// [`AttachError`] for the first that cannot be; the target runs as before.
    pub fn attach(&self, attachments: &[Attachment]) -> Result<Link, AttachError> {
        let slots = self.slots();
        let prepared = self.prepare(attachments, &slots)?;
        let keys: Vec<_> = attachments.iter().map(|a| (a.program, a.function.address())).collect();
        self.claim(&keys, attachments)?;
        let ids = transaction::attach(&self.inner, &prepared).inspect_err(|_| {
            self.release(&keys);
        })?;
        self.remember(&ids, attachments);
        drop(slots);
        Ok(Link::new(self.clone(), ids, keys))
    }

    /// What the programs wrote with `bpf_printk` since the last call, a line each.
    pub fn printk(&self, mut line: impl FnMut(&str)) {
        let mut reader = lock(&self.inner.printk_reader);
        if let Some(ring) = reader.as_mut() {
            ring.poll(|bytes| {
                line(String::from_utf8_lossy(bytes).trim_end_matches(['\0', '\n']));
            });
        }
    }

    /// Runs that were skipped: a program that was entered again on its own thread, or a
    /// thread that found no slot.
    #[must_use]
    pub fn missed(&self) -> u64 {
        let arena = &self.inner.arena;
        let programs = u32::try_from(self.inner.spec.programs.len()).unwrap_or(u32::MAX);
        let guarded: u64 = (0..programs).map(|i| arena.program_misses(i)).sum();
        guarded + arena.no_slot()
    }

    /// Ring buffer records that were dropped because a buffer was full.
    #[must_use]
    pub fn lost(&self) -> u64 {
        let maps = self.inner.spec.maps.iter().enumerate();
        maps.filter(|(_, m)| m.kind == MapKind::RingBuf)
            .filter_map(|(i, _)| self.inner.arena.ringbuf(map_idx(i)).ok())
            .map(|ring| ring.lost())
            .sum()
    }

    pub(crate) fn release(&self, keys: &[(usize, RemoteAddr)]) {
        let mut attached = lock(&self.inner.attached);
        for key in keys {
            attached.remove(key);
        }
    }

    fn claim(
        &self,
        keys: &[(usize, RemoteAddr)],
        attachments: &[Attachment],
    ) -> Result<(), AttachError> {
        let mut attached = lock(&self.inner.attached);
        let mut new = HashSet::with_capacity(keys.len());
        for (key, attachment) in keys.iter().zip(attachments) {
            let names =
                || (attachment.function.name(), self.inner.spec.programs[key.0].name.clone());
            if attached.contains(key) {
                let (function, program) = names();
                return Err(AttachError::Twice { function, program });
            }
            if !new.insert(*key) {
                let (function, program) = names();
                return Err(AttachError::NamedTwice { function, program });
            }
        }
        attached.extend(new);
        Ok(())
    }

    pub(crate) fn prepare(
        &self,
        attachments: &[Attachment],
        slots: &Slots,
    ) -> Result<Vec<Prepared>, AttachError> {
        let mut by_address: HashMap<RemoteAddr, usize> = HashMap::new();
        let mut prepared: Vec<Prepared> = Vec::new();
        for a in attachments {
            let program = Program { object: self.clone(), index: a.program };
            let verified = program.check_with(&a.function, slots, None)?;
            let at = *by_address.entry(a.function.address()).or_insert(prepared.len());
            if at == prepared.len() {
                prepared.push(self.prepare_function(&a.function)?);
            }
            let one = &mut prepared[at];
            let kind = self.inner.spec.programs[a.program].kind;
            if flea_image::needs_frame(kind, &verified, a.function.signature()) {
                one.stack = stack_args(&a.function, a.function.signature())?;
                one.has_frame = true;
            }
            one.uses.insert(0, (a.program, a.cookie));
            one.verified.insert(0, verified);
        }
        Ok(prepared)
    }

    fn prepare_function(&self, function: &Function) -> Result<Prepared, AttachError> {
        let site = function
            .site()
            .map_err(|refusal| AttachError::Refused { function: function.name(), refusal })?;
        Ok(Prepared {
            function: function.clone(),
            site: site.clone(),
            stack: StackArgs::NONE,
            has_frame: false,
            uses: Vec::new(),
            verified: Vec::new(),
        })
    }
}

impl Program {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.spec().name
    }

    /// When it runs.
    #[must_use]
    pub fn kind(&self) -> ProgramKind {
        self.spec().kind
    }

    /// The pattern in its section name, `[MODULE:]FUNCTION`.
    #[must_use]
    pub fn target(&self) -> Option<&str> {
        self.spec().target.as_deref()
    }

    /// Whether its section has a `.multi` form: of the functions that its pattern names, those
    /// that it cannot be attached to are left out.
    #[must_use]
    pub fn multi(&self) -> bool {
        self.spec().multi
    }

    /// Whether it is attached without being asked for (`SEC("?...")` is not).
    #[must_use]
    pub fn autoload(&self) -> bool {
        self.spec().autoload
    }

    /// This program on `function`; `cookie` is what `bpf_get_attach_cookie` returns there.
    #[must_use]
    pub fn on(&self, function: &Function, cookie: u64) -> Attachment {
        Attachment { program: self.index, function: function.clone(), cookie }
    }

    /// Attaches it to `function`.
    ///
    /// # Errors
    /// [`AttachError`]; the target runs as before.
    pub fn attach(&self, function: &Function) -> Result<Link, AttachError> {
        self.object.attach(&[self.on(function, 0)])
    }

    /// Attaches it to all of `functions`, each with the cookie that `bpf_get_attach_cookie`
    /// returns there, or to none.
    ///
    /// ```
    /// # mod parts { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/parts/counter.rs")); }
    /// # use parts::{counter, total};
    /// # #[unsafe(no_mangle)]
    /// # #[inline(never)]
    /// # extern "C" fn multi_example_1(x: u64) -> u64 {
    /// #     x + 1
    /// # }
    /// # #[unsafe(no_mangle)]
    /// # #[inline(never)]
    /// # extern "C" fn multi_example_2(x: u64) -> u64 {
    /// #     x + 2
    /// # }
    /// let session = flea::Session::this_process()?;
    /// let object = session.load(counter())?;
    /// let functions = session.find("multi_example_?")?;
    /// let link = object.program("count").unwrap().attach_multi(functions.iter().zip(100..))?;
    /// assert_eq!(link.n_functions(), 2);
    /// multi_example_1(1);
    /// multi_example_2(1);
    /// assert_eq!(total(&object), 2);
    /// # drop((link, object));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`AttachError`] for the first that cannot be, also where it is named twice or there is
    /// none at all; the target runs as before.
    pub fn attach_multi<'a>(
        &self,
        functions: impl IntoIterator<Item = (&'a Function, u64)>,
    ) -> Result<Link, AttachError> {
        let attachments: Vec<_> =
            functions.into_iter().map(|(function, cookie)| self.on(function, cookie)).collect();
        if attachments.is_empty() {
            return Err(AttachError::NoFunctions { program: self.name().to_owned() });
        }
        self.object.attach(&attachments)
    }

    /// Whether it stands in a program array: one that is not attached itself is run by tail
    /// calls.
    #[must_use]
    pub fn is_in_program_array(&self) -> bool {
        self.object.slots().hold(self.index)
    }

    pub(crate) fn index(&self) -> usize {
        self.index
    }

    pub(crate) fn is_of(&self, object: &Object) -> bool {
        Arc::ptr_eq(&self.object.inner, &object.inner)
    }

    /// Whether it could be attached to `function`: there is a site, the verifier accepts it with
    /// this signature, and the stack arguments are known where a frame has to pass them on.
    ///
    /// # Errors
    /// The reason why not.
    pub fn check(&self, function: &Function) -> Result<Arc<Verified>, AttachError> {
        self.check_with(function, &self.object.slots(), None)
    }

    /// The same, and `line` is called with each line of the verifier's log: every instruction
    /// that it visits with the registers that this touches, as Linux's level 2. Silent where the
    /// proof is known from another function that looks alike.
    ///
    /// # Errors
    /// The reason why not.
    pub fn check_logged(
        &self,
        function: &Function,
        line: &mut dyn FnMut(&str),
    ) -> Result<Arc<Verified>, AttachError> {
        self.check_with(function, &self.object.slots(), Some(line))
    }

    fn check_with(
        &self,
        function: &Function,
        slots: &Slots,
        log: Option<&mut dyn FnMut(&str)>,
    ) -> Result<Arc<Verified>, AttachError> {
        function
            .site()
            .map_err(|refusal| AttachError::Refused { function: function.name(), refusal })?;
        let signature = function.signature();
        let given = Given::to(self.kind(), signature);
        let verified = self.verify_all(function, given, slots, log)?;
        if flea_image::needs_frame(self.kind(), &verified, signature) {
            stack_args(function, signature)?;
        }
        if self.kind() == ProgramKind::FmodRet && verified.return_range() != (0..=0) {
            self.check_skip(function)?;
        }
        Ok(verified)
    }

    /// The proof for a function with this context, with what its tail calls lead to.
    fn verify_all(
        &self,
        function: &Function,
        given: Given,
        slots: &Slots,
        mut log: Option<&mut dyn FnMut(&str)>,
    ) -> Result<Arc<Verified>, AttachError> {
        let mut prove = |index| {
            let program = Program { object: self.object.clone(), index };
            let log = log.as_mut().map(|line| &mut **line as &mut dyn FnMut(&str));
            program.verify(function, given, log)
        };
        let verified = prove(self.index)?;
        if verified.tail_calls().next().is_none() {
            return Ok(verified);
        }
        targets::link(self.index, slots.all(), prove).map(Arc::new)
    }

    /// The proof for a function with this context, made once for all functions where that
    /// suffices: only a program that goes through the target's data needs the function's types.
    fn verify(
        &self,
        function: &Function,
        Given { context, changeable }: Given,
        mut log: Option<&mut dyn FnMut(&str)>,
    ) -> Result<Arc<Verified>, AttachError> {
        let loaded = &self.object.inner;
        let fitted = loaded.fits.fit(&loaded.spec, self.index, function.owner());
        let fitted = fitted.map_err(|source| AttachError::Core {
            program: self.name().to_owned(),
            function: function.name(),
            source,
        })?;
        let (module, fitted) = fitted.unzip();
        let program = fitted.as_ref().map_or(self.spec(), |fitted| &fitted.program);
        let verifier = Verifier::new(program, &loaded.spec.maps, context)
            .permit(loaded.permissions)
            .changeable(changeable);
        let for_all = ProofKey {
            program: self.index,
            context,
            changeable: if loaded.permissions.write_target { changeable } else { Changeable::NONE },
            module,
            function: None,
        };
        let for_this = ProofKey { function: Some(function.address()), ..for_all };
        let rejected = |mut rejection: Rejection| {
            if let Some(fitted) = &fitted {
                fitted.explain(&mut rejection);
            }
            AttachError::Rejected {
                program: self.name().to_owned(),
                function: function.name(),
                rejection: Box::new(rejection),
            }
        };
        if let Some(known) = loaded.proof(for_this).or_else(|| loaded.proof(for_all)) {
            return Ok(known);
        }
        let mut prove = |verifier: Verifier<'_>| match &mut log {
            Some(line) => verifier.verify_logged(line),
            None => verifier.verify(),
        };
        let plain = match prove(verifier) {
            Ok(verified) => return Ok(loaded.keep_proof(for_all, verified)),
            Err(rejection) => rejection,
        };
        let Some((types, slots)) = self.target_types(function, context, fitted.as_deref()) else {
            return Err(rejected(plain));
        };
        let target = Target { types: &types, slots: &slots };
        let verified = prove(verifier.target(target)).map_err(rejected)?;
        Ok(loaded.keep_proof(for_this, verified))
    }

    /// The types that pointers of the program lead to, and those of its context's words; `None`
    /// where there are no such pointers.
    fn target_types<'f>(
        &self,
        function: &'f Function,
        context: Context,
        fitted: Option<&Fitted>,
    ) -> Option<TypesOf<'f>> {
        let graph = match context {
            Context::Tracing { .. } => Some(function.types()),
            Context::PtRegs | Context::Memory { .. } => None,
        };
        let types = graph.map_or_else(Cow::default, |graph| Cow::Borrowed(&graph.types));
        let slots = graph.and_then(|graph| graph.slots.first()).map_or(&[][..], Vec::as_slice);
        if calls(&self.spec().insns, &[Helper::RdonlyCast as u32]) {
            // The relocated program's numbers are those of the types that it was fitted to.
            let mut named = fitted.map(|fitted| Types::clone(&fitted.types)).unwrap_or_default();
            let slots = named.append(&types, slots);
            return Some((Cow::Owned(named), Cow::Owned(slots)));
        }
        let is_pointer = |id: &TypeId| matches!(types.get(*id), Type::Pointer { .. });
        let has_pointers = slots.iter().flatten().any(is_pointer);
        has_pointers.then_some((types, Cow::Borrowed(slots)))
    }

    /// Whether `function` may be skipped: its caller goes on with a result that a program can
    /// make up.
    fn check_skip(&self, function: &Function) -> Result<(), AttachError> {
        let refused = |reason: String| AttachError::Skip {
            function: function.name(),
            program: self.name().to_owned(),
            reason,
        };
        if function.never_returns() {
            return Err(refused(
                "the function never returns: its caller need not have code behind the call".into(),
            ));
        }
        flea_image::skip_result(function.signature())
            .map(drop)
            .map_err(|reason| refused(reason.to_string()))
    }

    fn spec(&self) -> &flea_object::spec::Program {
        &self.object.inner.spec.programs[self.index]
    }
}

/// Types, and which of them a context's words have.
type TypesOf<'f> = (Cow<'f, Types>, Cow<'f, [Option<TypeId>]>);

impl Loaded {
    /// Whether the program with this index can change the target's memory.
    pub(crate) fn writes_target(&self, index: usize) -> bool {
        self.writers.contains(&index)
    }

    fn proof(&self, key: ProofKey) -> Option<Arc<Verified>> {
        lock(&self.verified).get(&key).map(Arc::clone)
    }

    fn keep_proof(&self, key: ProofKey, verified: Verified) -> Arc<Verified> {
        Arc::clone(lock(&self.verified).entry(key).or_insert(Arc::new(verified)))
    }

    /// The address or number behind a relocation in a body for `prepared`, with the runtime at
    /// `runtime`.
    pub(crate) fn resolve(
        &self,
        runtime: RemoteAddr,
        prepared: &Prepared,
        target: RelocTarget,
    ) -> u64 {
        match target {
            RelocTarget::Arena { addend } => self.base.offset(addend).0,
            RelocTarget::Runtime(function) => {
                runtime.offset(i64::from(flea_runtime::offset_of(function))).0
            }
            RelocTarget::VdsoClockGettime => {
                self.session.vdso_clock_gettime().map_or(0, |address| address.0)
            }
            RelocTarget::Constant(value) => value,
            RelocTarget::FunctionAddress => prepared.function.address().0,
            RelocTarget::Cookie { program } => {
                let found = prepared.uses.get(program as usize);
                found.map_or(0, |&(_, cookie)| cookie)
            }
            RelocTarget::ThreadPointer | RelocTarget::SkeletonFrame => 0,
        }
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        transaction::release_arena(&self.session, self.base);
    }
}

fn map_idx(index: usize) -> MapIdx {
    MapIdx(u32::try_from(index).expect("an object has far fewer maps"))
}

/// Whether one of these helpers is called.
fn calls(insns: &[Insn], helpers: &[u32]) -> bool {
    insns.iter().any(|insn| {
        insn.opcode == flea_object::opcode::CALL_OP
            && insn.src == 0
            && helpers.contains(&insn.imm.cast_unsigned())
    })
}

fn add_printk_map(spec: &mut Spec) -> Option<MapIdx> {
    let printk = [Helper::TracePrintk as u32, Helper::TraceVprintk as u32];
    let used = spec.programs.iter().any(|p| calls(&p.insns, &printk));
    used.then(|| {
        let index = u32::try_from(spec.maps.len()).expect("an object is far smaller");
        spec.maps.push(MapSpec {
            name: PRINTK_NAME.to_owned(),
            kind: MapKind::RingBuf,
            key_size_bytes: 0,
            value_size_bytes: 0,
            max_entries: PRINTK_BYTES,
            flags: 0,
            init: None,
            read_only: false,
            ..MapSpec::default()
        });
        MapIdx(index)
    })
}
