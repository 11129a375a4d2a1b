//! The built-in commands as a library: counting, histograms, traces. Each is an eBPF object
//! like any other (`programs`) and a reader of its map.
//!
//! All of them take a list of functions, attach to those that can be, and keep the others
//! with the reason.

mod histogram;
mod programs;
mod reader;
mod trace;

use flea_symbols::signature::{RetWord, Type};

pub use self::{
    histogram::{Bucket, Histogram, Signedness},
    trace::{Call, Trace, Word},
};
use crate::{AttachError, Attachment, Function, Link, LoadError, Object, Program, Session};

/// Why a command could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Loading.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Attaching.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The expression does not fit the function.
    #[error("{function}: {what}")]
    Expression {
        /// The function.
        function: String,
        /// What is wrong.
        what: String,
    },
}

/// A function that could not be attached to.
#[derive(Debug)]
pub struct Refused {
    /// Which.
    pub function: Function,
    /// Why.
    pub reason: AttachError,
}

/// One object on a set of functions.
struct Attached {
    object: Object,
    link: Option<Link>,
    functions: Vec<Function>,
    refused: Vec<Refused>,
}

impl Attached {
    /// Attaches `program_of(function)` to every function that it can be attached to; the
    /// cookie is the function's index in `functions`.
    fn start(
        object: Object,
        candidates: &[Function],
        program_of: impl Fn(&Function) -> Program,
    ) -> Result<Self, AttachError> {
        let mut functions = Vec::new();
        let mut refused = Vec::new();
        let mut attachments: Vec<Attachment> = Vec::new();
        for function in candidates {
            let program = program_of(function);
            match program.check(function) {
                Ok(_) => {
                    attachments.push(program.on(function, functions.len() as u64));
                    functions.push(function.clone());
                }
                Err(reason) => refused.push(Refused { function: function.clone(), reason }),
            }
        }
        let link = match attachments.is_empty() {
            true => None,
            false => Some(object.attach(&attachments)?),
        };
        Ok(Self { object, link, functions, refused })
    }

    fn detach(&mut self) -> Result<(), AttachError> {
        self.link.take().map_or(Ok(()), Link::detach)
    }

    /// The per-thread values of function `index`.
    fn per_thread(&self, index: usize) -> Vec<Vec<u8>> {
        let index = u32::try_from(index).expect("no more functions than map elements");
        match self.object.map(programs::MAP_NAME) {
            Some(flea_maps::Map::PerCpuArray(map)) => map.get(index).unwrap_or_default(),
            _ => Vec::new(),
        }
    }
}

macro_rules! command_handle {
    ($name:ident) => {
        command_handle!($name, lost: |handle: &$name| handle.attached.object.lost());
    };
    ($name:ident, lost: $lost:expr) => {
        impl $name {
            /// Functions attached to.
            #[must_use]
            pub fn functions(&self) -> &[Function] {
                &self.attached.functions
            }

            /// Functions that could not be.
            #[must_use]
            pub fn refused(&self) -> &[Refused] {
                &self.attached.refused
            }

            /// Program runs that were skipped.
            #[must_use]
            pub fn missed(&self) -> u64 {
                self.attached.object.missed()
            }

            /// Records dropped because a buffer was full, or given up because they were never
            /// finished.
            #[must_use]
            pub fn lost(&self) -> u64 {
                $lost(self)
            }

            /// Takes the programs off; what they gathered can still be read.
            ///
            /// # Errors
            /// See [`crate::Link::detach`].
            pub fn detach(&mut self) -> Result<(), AttachError> {
                self.attached.detach()
            }
        }
    };
}
use command_handle;

/// Counts calls.
pub struct Count {
    attached: Attached,
}

command_handle!(Count);

impl Count {
    /// Starts counting calls of `functions`.
    ///
    /// # Errors
    /// [`StartError`]; functions that merely cannot be attached to are in
    /// [`Count::refused`].
    pub fn start(session: &Session, functions: &[Function]) -> Result<Self, StartError> {
        let object = session.load(programs::count(n_elements(functions)))?;
        let program = first_program(&object);
        let attached = Attached::start(object, functions, |_| program.clone())?;
        Ok(Self { attached })
    }

    /// Calls so far, in the order of [`Count::functions`].
    #[must_use]
    pub fn read(&self) -> Vec<u64> {
        let sum = |i| {
            let cells = self.attached.per_thread(i);
            let words = cells.iter().filter_map(|cell| Some(*cell.first_chunk()?));
            words.map(u64::from_le_bytes).fold(0, u64::wrapping_add)
        };
        (0..self.attached.functions.len()).map(sum).collect()
    }
}

/// What a histogram is taken of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expr {
    /// Time from entry to exit.
    Duration,
    /// The result.
    Retval,
    /// The n-th parameter.
    Arg(usize),
    /// The parameter of this name.
    Named(String),
}

impl Expr {
    /// Reads `argN`, `retval`, `duration` or a parameter's name.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        match text {
            "duration" | "duration_ns" => Self::Duration,
            "retval" => Self::Retval,
            _ => match text.strip_prefix("arg").and_then(|n| n.parse().ok()) {
                Some(n) => Self::Arg(n),
                None => Self::Named(text.to_owned()),
            },
        }
    }
}

/// Takes histograms.
pub struct Histograms {
    attached: Attached,
    sign: Signedness,
    value: String,
}

command_handle!(Histograms);

impl Histograms {
    /// Starts a histogram of the time from entry to exit of each of `functions`.
    ///
    /// # Errors
    /// As for [`Count::start`].
    pub fn of_duration(session: &Session, functions: &[Function]) -> Result<Self, StartError> {
        let unsigned = Signedness::Unsigned;
        Self::start(session, functions, programs::Source::Duration, unsigned, "duration_ns")
    }

    /// Starts a histogram of `expr` on one function.
    ///
    /// # Errors
    /// [`StartError::Expression`] where the function has no such value, or one that is not an
    /// integer or pointer.
    pub fn of(session: &Session, function: &Function, expr: &Expr) -> Result<Self, StartError> {
        let functions = std::slice::from_ref(function);
        if *expr == Expr::Duration {
            return Self::of_duration(session, functions);
        }
        let (source, sign, name) = value_of(function, expr)
            .map_err(|what| StartError::Expression { function: function.name(), what })?;
        Self::start(session, functions, source, sign, &name)
    }

    fn start(
        session: &Session,
        functions: &[Function],
        source: programs::Source,
        sign: Signedness,
        value: &str,
    ) -> Result<Self, StartError> {
        let object = session.load(programs::histogram(n_elements(functions), source, sign))?;
        let program = first_program(&object);
        let attached = Attached::start(object, functions, |_| program.clone())?;
        Ok(Self { attached, sign, value: value.to_owned() })
    }

    /// What is measured: `duration_ns`, `argN`, a parameter's name, `retval`.
    #[must_use]
    pub fn value(&self) -> &str {
        &self.value
    }

    /// The histograms so far, in the order of [`Histograms::functions`].
    #[must_use]
    pub fn read(&self) -> Vec<Histogram> {
        (0..self.attached.functions.len())
            .map(|i| Histogram::read(&self.attached.per_thread(i), self.sign))
            .collect()
    }
}

/// Where the value that `expr` names is, how it is read, and what it is called.
fn value_of(
    function: &Function,
    expr: &Expr,
) -> Result<(programs::Source, Signedness, String), String> {
    let signature = function.signature();
    let slots = |n| signature.params.iter().take(n).map(|p| p.words.len()).sum::<usize>();
    let as_slot = |n| u8::try_from(n).map_err(|_| "it has too many arguments".to_owned());
    let index = match expr {
        Expr::Duration => {
            return Ok((
                programs::Source::Duration,
                Signedness::Unsigned,
                "duration_ns".to_owned(),
            ));
        }
        Expr::Retval => {
            if signature.ret.words.first() != Some(&RetWord::Rax) {
                let what = "retval is not an integer or a pointer";
                return Err(format!("{what}: the signature is `{}`", function.signature_text()));
            }
            let (bits, sign) = integer(&signature.ret.ty)?;
            let n_args = as_slot(slots(signature.params.len()))?;
            return Ok((programs::Source::Result { n_args, bits }, sign, "retval".to_owned()));
        }
        Expr::Arg(n) => *n,
        Expr::Named(name) => signature
            .params
            .iter()
            .position(|p| p.name.as_deref() == Some(name.as_str()))
            .ok_or_else(|| no_such_parameter(function, name))?,
    };
    let param = signature
        .params
        .get(index)
        .ok_or_else(|| no_such_parameter(function, &format!("arg{index}")))?;
    if let Some(absent) = &param.absent {
        return Err(format!("{absent}: the signature is `{}`", function.signature_text()));
    }
    let (bits, sign) = integer(&param.ty)?;
    let slot = as_slot(slots(index))?;
    let name = match expr {
        Expr::Named(name) => name.clone(),
        _ => format!("arg{index}"),
    };
    Ok((programs::Source::Argument { slot, bits }, sign, name))
}

fn no_such_parameter(function: &Function, name: &str) -> String {
    format!(
        "no value `{name}`: there are argN, its parameters' names, retval and duration; the \
         signature is `{}`",
        function.signature_text()
    )
}

/// Meaningful bits and sign of an integer-like type.
fn integer(ty: &Type) -> Result<(u8, Signedness), String> {
    match ty {
        Type::Int { size_bytes: size @ 1..=8, signed, .. } => {
            let sign = if *signed { Signedness::Signed } else { Signedness::Unsigned };
            Ok((u8::try_from(size * 8).expect("at most 64"), sign))
        }
        Type::Pointer { .. } => Ok((64, Signedness::Unsigned)),
        Type::Unknown => Ok((64, Signedness::Signed)),
        Type::Void => Err("it returns nothing".to_owned()),
        Type::Int { name, .. } | Type::Float { name, .. } | Type::Aggregate { name, .. } => {
            Err(format!("a histogram is taken of integers and pointers, and this is a `{name}`"))
        }
    }
}

fn n_elements(functions: &[Function]) -> u32 {
    u32::try_from(functions.len()).expect("a process has fewer functions")
}

fn first_program(object: &Object) -> Program {
    object.programs().next().expect("a built-in object has a program")
}
