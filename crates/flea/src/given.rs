//! What a program is given on a function, and what an image has to pass on there: all from the
//! function's signature.

use flea_object::spec::ProgramKind;
use flea_symbols::signature::{Signature, StackWords};
use flea_verifier::{Changeable, Context};

use crate::{error::AttachError, function::Function, registry::StackArgs};

/// Stack words behind the named ones that a call of a variadic function has at most: C promises
/// its programs 127 arguments (C11, 5.2.4.1). What a call has beyond is not passed on.
const VARIADIC_WORDS: u32 = 128;

/// What a program finds in `r1`, as the verifier has to know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Given {
    pub(crate) context: Context,
    /// What of it the program can change, if somebody lets it.
    pub(crate) changeable: Changeable,
}

impl Given {
    /// To a program of this kind on a function with this signature, and to what it calls.
    pub(crate) fn to(kind: ProgramKind, signature: &Signature) -> Self {
        let changeable = flea_image::changeable(kind, signature);
        Self { context: context(signature, kind), changeable }
    }
}

fn context(signature: &Signature, kind: ProgramKind) -> Context {
    if matches!(kind, ProgramKind::Uprobe | ProgramKind::Uretprobe) {
        return Context::PtRegs;
    }
    let n_args = u8::try_from(signature.arg_words().count()).unwrap_or(u8::MAX);
    Context::Tracing {
        n_args,
        n_results: match kind {
            ProgramKind::Fentry => 0,
            _ => u8::try_from(signature.ret.words.len().max(1)).unwrap_or(u8::MAX),
        },
        session: kind == ProgramKind::Fsession,
    }
}

/// The stack arguments that an exit program's image has to pass on.
pub(crate) fn stack_args(
    function: &Function,
    signature: &Signature,
) -> Result<StackArgs, AttachError> {
    let (n_words, may_be_fewer) = match signature.stack_words {
        // What its code cannot reach need not be there.
        StackWords::Known(named) if signature.variadic => match function.stack_words_proof() {
            StackWords::Proved(n) => (n, false),
            _ => (named.saturating_add(VARIADIC_WORDS), true),
        },
        StackWords::Known(n) | StackWords::Proved(n) => (n, false),
        StackWords::Unknown => {
            return Err(AttachError::StackArguments { function: function.name() });
        }
    };
    if function.uses_return_address() {
        return Err(AttachError::ReturnAddress { function: function.name() });
    }
    let are_named = matches!(signature.stack_words, StackWords::Known(_)) && !signature.variadic;
    // What is not named may be aligned to as much as a vector.
    let align_bytes = if are_named { signature.stack_align_bytes } else { 64 };
    Ok(StackArgs { n_words, may_be_fewer, align_bytes })
}
