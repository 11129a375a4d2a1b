//! One build of the matrix: compiled, called untraced, traced with everything, called again.
//! Start at [`trace`].

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use flea::signature::{Absent, Doubt, Signature, SignatureSource};
use flea::{
    AttachError, Attachment, Function as Traced, Map, Object, Program, ProgramKind, Session,
};

use crate::builds::{Build, Compiler};
use crate::emit::{Buffers, head, source_text};
use crate::generate::{Form, Function, Source};
use crate::kept::{self, Untraced};
use crate::programs::{KINDS, MAP_NAME, Records, Shape, object, program_name, sides};
use crate::rng::Rng;
use crate::seen::Seen;
use crate::target::{Round, Target};
use crate::types::{LeafKind, Type};

/// What came of it.
#[derive(Default)]
pub struct Outcome {
    /// Functions with at least one program.
    pub n_functions: usize,
    pub n_programs: usize,
    /// Functions of which something is not known.
    pub n_unknown: usize,
    /// Why there were not more.
    pub refused: BTreeMap<String, usize>,
    pub failures: Vec<String>,
}

impl Outcome {
    pub fn add(&mut self, other: Self) {
        self.n_functions += other.n_functions;
        self.n_programs += other.n_programs;
        self.n_unknown += other.n_unknown;
        for (reason, n) in other.refused {
            *self.refused.entry(reason).or_default() += n;
        }
        self.failures.extend(other.failures);
    }
}

/// Everything about one build.
struct Work<'a> {
    build: Build,
    source: &'a Source,
    buffers: Buffers,
    inputs: Vec<u8>,
    seed: u64,
    this: Type,
}

/// Traces all functions of one build. `None`, said on stderr, where a tool is missing.
pub fn trace(build: Build, source: &Source, seed: u64, number: u64) -> Result<Option<Outcome>> {
    let buffers = Buffers::of(source);
    let text = source_text(build.language, source, &buffers);
    let Some(built) = build.compile(&text)? else { return Ok(None) };
    let Some(mut target) = Target::start(&built)? else { return Ok(None) };
    let inputs = buffers.inputs(source, &mut Rng::new(seed, number + 1000));
    let this = Type::scalar("host *", 8, &[LeafKind::Bits(64)]);
    let work = Work { build, source, buffers, inputs, seed, this };
    let mut outcome = Outcome::default();

    // The first round resolves and warms up whatever there is.
    work.round(0, &mut target)?;
    let untraced =
        Untraced { zeros: work.round(0, &mut target)?, ones: work.round(0xff, &mut target)? };
    let again = work.round(0, &mut target)?;
    work.compare(&untraced, &again, "untraced", &mut outcome);
    ensure!(outcome.failures.is_empty(), "calls differ untraced:\n{}", outcome.failures.join("\n"));

    let session = Session::attach(target.pid())?;
    let functions = work.functions(&session)?;
    work.unknown(&functions, &mut outcome);
    for kinds in [&[ProgramKind::Fentry], KINDS] {
        let shapes: Vec<Shape> =
            source.functions.iter().zip(&functions).map(|(f, traced)| shape(f, traced)).collect();
        let object = session.load(object(&shapes))?;
        let (attachments, on) = work.attachments(&object, &functions, kinds, &mut outcome)?;
        let link = object.attach(&attachments)?;
        let round = work.round(0, &mut target).with_context(|| format!("traced with {kinds:?}"))?;
        link.detach()?;
        work.compare(&untraced, &round, &format!("traced with {kinds:?}"), &mut outcome);
        ensure!(object.missed() == 0, "{} runs were missed", object.missed());
        work.check_seen(&object, &shapes, &functions, &on, &round, &mut outcome)?;
    }
    work.compare(&untraced, &work.round(0, &mut target)?, "detached", &mut outcome);
    target.finish()?;
    Ok(Some(outcome))
}

/// What the programs of one function note: with what is behind addresses.
fn shape(function: &Function, traced: &Traced) -> Shape {
    let signature = traced.signature();
    let mut reads = Vec::new();
    let mut slot = 0;
    let n_hidden = usize::from(function.form == Form::Method);
    for (i, param) in signature.params.iter().enumerate() {
        let declared = i.checked_sub(n_hidden).and_then(|i| function.params.get(i));
        if let Some(declared) = declared.filter(|p| p.is_address() && param.absent.is_none()) {
            reads.push((slot, declared.ty.size));
        }
        slot += param.words.len();
    }
    let in_memory = function.ret.as_ref().filter(|ty| ty.is_returned_in_memory());
    Shape::new(signature, reads, in_memory.map_or(0, |ty| ty.size))
}

impl Work<'_> {
    fn round(&self, residue: u8, target: &mut Target<'_>) -> Result<Round> {
        target.run(residue, &self.inputs, self.source.functions.len())
    }

    /// The functions, by their names.
    fn functions(&self, session: &Session) -> Result<Vec<Traced>> {
        let find = |function: &Function| {
            let name = function.name();
            let members = matches!(function.form, Form::Method | Form::StaticMethod);
            // A nested function's name has a number behind it.
            let pattern = match function.form {
                Form::Nested => format!("{name}.*"),
                _ if members => format!("host::{name}"),
                _ => name,
            };
            let found = session.find(&pattern)?;
            ensure!(found.len() == 1, "{pattern}: {found:?}");
            Ok(found[0].clone())
        };
        self.source.functions.iter().map(find).collect()
    }

    /// All that can be attached, and which kinds that is by function. Nothing is refused where
    /// the whole signature is known.
    fn attachments(
        &self,
        object: &Object,
        functions: &[Traced],
        kinds: &[ProgramKind],
        outcome: &mut Outcome,
    ) -> Result<(Vec<Attachment>, Vec<Vec<ProgramKind>>)> {
        let mut attachments = Vec::new();
        let mut on = Vec::new();
        for (f, traced) in functions.iter().enumerate() {
            let mut of_this = Vec::new();
            for &kind in kinds {
                let program = object.program(&program_name(f, kind)).context("a program")?;
                match check(&program, traced) {
                    Ok(()) => {
                        attachments.push(program.on(traced, 0));
                        of_this.push(kind);
                    }
                    Err(why) => {
                        let why = format!("no {}: {why}", kind.name());
                        if is_known(traced.signature()) {
                            self.report(f, [why.clone()], outcome);
                        }
                        *outcome.refused.entry(why).or_default() += 1;
                    }
                }
            }
            if kinds.len() > 1 {
                outcome.n_programs += of_this.len();
                outcome.n_functions += usize::from(!of_this.is_empty());
            }
            on.push(of_this);
        }
        Ok((attachments, on))
    }

    /// What is not known of the signatures, by reason; it has to be one that there is no way
    /// around.
    fn unknown(&self, functions: &[Traced], outcome: &mut Outcome) {
        for (f, traced) in functions.iter().enumerate() {
            let signature = traced.signature();
            let absent = signature.params.iter().map(|p| &p.absent).chain([&signature.ret.absent]);
            let mut reasons: Vec<String> = Vec::new();
            let mut failures = Vec::new();
            for why in absent.flatten() {
                reasons.push(why.to_string());
                if !self.may_be_absent(f, why) {
                    failures.push(format!("not known: {why}"));
                }
            }
            if let Some(doubt) = &signature.doubt {
                reasons.push(doubt.to_string());
                if !matches!(doubt, Doubt::Result { reason, .. } if self.may_be_absent(f, reason)) {
                    failures.push(format!("not known: {doubt}"));
                }
            }
            outcome.n_unknown += usize::from(!reasons.is_empty());
            for reason in reasons {
                *outcome.refused.entry(reason).or_default() += 1;
            }
            self.report(f, failures, outcome);
        }
    }

    /// Only a local function's convention is the compiler's own; of types, the debug
    /// information leaves out some things. And what clang makes of packed records in packed
    /// ones is not what gcc makes of them.
    fn may_be_absent(&self, f: usize, why: &Absent) -> bool {
        match why {
            Absent::Unclassified(_) | Absent::Ambiguous(_) | Absent::Behind(_) => true,
            _ => {
                !self.source.functions[f].form.is_external()
                    || self.build.compiler == Compiler::Clang
            }
        }
    }

    fn check_seen(
        &self,
        object: &Object,
        shapes: &[Shape],
        functions: &[Traced],
        on: &[Vec<ProgramKind>],
        round: &Round,
        outcome: &mut Outcome,
    ) -> Result<()> {
        let Some(Map::Array(map)) = object.map(MAP_NAME) else { anyhow::bail!("no map") };
        let bytes = map.get(0)?;
        let records = Records::of(shapes);
        for (f, function) in self.source.functions.iter().enumerate() {
            let seen = Seen {
                function,
                index: f,
                places: &self.buffers.functions[f],
                round,
                signature: functions[f].signature(),
                shape: &shapes[f],
                address: functions[f].address().0,
                this: &self.this,
            };
            let mut failures = Vec::new();
            for side in sides(&on[f]) {
                let at = 8 * records.at(f, side);
                let record = &bytes[at..at + 8 * shapes[f].n_words()];
                let name = side.kind.name();
                let when = if side.is_exit { "exit" } else { "entry" };
                seen.check(side, record, &mut |what| {
                    failures.push(format!("{name} program at {when}: {what}"));
                });
            }
            self.report(f, failures, outcome);
        }
        Ok(())
    }

    /// The functions did what they do, and registers are what they were.
    fn compare(&self, untraced: &Untraced, round: &Round, when: &str, outcome: &mut Outcome) {
        for (f, function) in self.source.functions.iter().enumerate() {
            let places = &self.buffers.functions[f];
            let mut failures = Vec::new();
            let mut say = |what| failures.push(what);
            kept::check(f, function, places, untraced, round, &mut say);
            crate::seen::received(function, places, &self.inputs, round, &mut say);
            self.report(f, failures.into_iter().map(|what| format!("{when}: {what}")), outcome);
        }
    }

    /// Notes what is wrong with function `f`, with all that it takes to see it again.
    fn report(&self, f: usize, failures: impl IntoIterator<Item = String>, outcome: &mut Outcome) {
        let lines: String = failures.into_iter().map(|what| format!("\n  - {what}")).collect();
        if !lines.is_empty() {
            outcome.failures.push(self.describe(f) + &lines);
        }
    }

    /// The function and how it was made.
    fn describe(&self, f: usize) -> String {
        let function = &self.source.functions[f];
        let definitions: Vec<&str> =
            function.types().filter_map(|ty| ty.definition.as_deref()).collect();
        format!(
            "seed {:#x}, {}, {}\n  {}; as {:?}{}{}",
            self.seed,
            self.build.slug(),
            self.build.flags().join(" "),
            head(function, &function.name()),
            function.form,
            if definitions.is_empty() { "" } else { "\n  " },
            definitions.join("\n  "),
        )
    }
}

/// Whether every parameter and the result have their places.
fn is_known(signature: &Signature) -> bool {
    let mut absent = signature.params.iter().map(|p| &p.absent).chain([&signature.ret.absent]);
    signature.doubt.is_none() && absent.all(Option::is_none)
}

/// Whether `program` can be attached to a function whose signature is known.
fn check(program: &Program, traced: &Traced) -> Result<(), String> {
    if traced.signature().source != SignatureSource::Dwarf {
        return Err("the signature is not known".to_owned());
    }
    program.check(traced).map(|_| ()).map_err(|error| reason(&error))
}

/// Why a program cannot be attached, without names and numbers.
fn reason(error: &AttachError) -> String {
    match error {
        AttachError::Refused { refusal, .. } => format!("no site: {refusal}"),
        AttachError::StackArguments { .. } => "unknown stack arguments".to_owned(),
        AttachError::ReturnAddress { .. } => "uses its return address".to_owned(),
        other => format!("{other}"),
    }
}
