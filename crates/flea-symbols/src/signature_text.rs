//! A signature as people write it, and where [`Module`] takes one from.

use crate::dwarf::{self, signature::Code};
use crate::function::Function;
use crate::module::Module;
use crate::signature::{Doubt, Param, Signature, SignatureSource, StackWords, Type};
use crate::x86_64::{live_in, returns, stack_words};

impl Module<'_> {
    /// What `function` is called with: from DWARF where that is sure, from BTF where no DWARF
    /// describes it, else six integers are assumed and its code is read for how many stack
    /// words it takes. Of a variadic function, the stack words are those of its named
    /// parameters.
    ///
    /// Where the code provably reads more stack words than the debug information states, the
    /// debug information is not believed.
    #[must_use]
    pub fn signature(&self, function: &Function) -> Signature {
        let proof = self.stack_words_proof(function);
        let stated = self.stated_signature(function, proof).and_then(|signature| {
            match (signature.stack_words, proof) {
                (StackWords::Known(stated), StackWords::Proved(read))
                    if read > stated && !signature.variadic =>
                {
                    Err(Doubt::StackWords { stated, read })
                }
                _ => Ok(signature),
            }
        });
        stated.unwrap_or_else(|doubt| Signature::guessed_because(doubt, proof))
    }

    /// How many words of stack arguments the code of `function` can reach, proved without
    /// debug information.
    #[must_use]
    pub fn stack_words_proof(&self, function: &Function) -> StackWords {
        stack_words::prove(self, function)
    }

    /// Whether the code of `function` uses its own return address, as `vfork`, `setjmp` and
    /// `dlsym` do: it must not be called from a frame between it and its caller.
    #[must_use]
    pub fn uses_return_address(&self, function: &Function) -> bool {
        stack_words::uses_return_address(self, function)
    }

    /// Whether `function` provably never returns, as `exit` and `abort`: what skips it would
    /// lead its caller to where there may be no code.
    #[must_use]
    pub fn never_returns(&self, function: &Function) -> bool {
        returns::never_returns(self, function)
    }

    fn stated_signature(
        &self,
        function: &Function,
        stack_words: StackWords,
    ) -> Result<Signature, Doubt> {
        let code = || Code { live: live_in::read(self, function), stack_words };
        let doubt = match self.dwarf_signature(function, code) {
            Err(doubt @ (Doubt::NoDebugInfo | Doubt::NoParameters)) => doubt,
            stated => return stated,
        };
        match self.type_info().signature(function, code) {
            Err(Doubt::NoDebugInfo) => Err(doubt),
            stated => stated,
        }
    }

    fn dwarf_signature(
        &self,
        function: &Function,
        read_code: impl FnOnce() -> Code,
    ) -> Result<Signature, Doubt> {
        let info = self.debug_info();
        let subprogram = info.subprogram_at(function.address).ok_or(Doubt::NoDebugInfo)?;
        dwarf::signature::read(&info.dwarf(), &subprogram, &function.name, &read_code())
    }
}

impl Signature {
    /// A C declaration of a function called `name`: `int add(int a, int b)`. Why a parameter
    /// or the result has no words is said in a comment: `int unused /* optimized out */`.
    #[must_use]
    pub fn declaration(&self, name: &str) -> String {
        if self.source == SignatureSource::Guessed {
            return format!("{name}(?)");
        }
        let mut params: Vec<String> = self.params.iter().map(declare).collect();
        if self.variadic {
            params.push("...".into());
        }
        let params = if params.is_empty() { "void".to_owned() } else { params.join(", ") };
        let result = match &self.ret.absent {
            None => self.ret.ty.name().to_owned(),
            Some(absent) => format!("{} /* {absent} */", self.ret.ty.name()),
        };
        format!("{}({params})", join(&result, name))
    }
}

impl Type {
    /// As the source spells it.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Void => "void",
            Self::Unknown => "?",
            Self::Int { name, .. }
            | Self::Float { name, .. }
            | Self::Pointer { name, .. }
            | Self::Aggregate { name, .. } => name,
        }
    }
}

fn declare(param: &Param) -> String {
    let plain = declare_plain(param);
    match &param.absent {
        None => plain,
        Some(absent) => format!("{plain} /* {absent} */"),
    }
}

fn declare_plain(param: &Param) -> String {
    let ty = param.ty.name();
    match (&param.name, ty.find("(*)")) {
        (None, _) => ty.to_owned(),
        (Some(name), Some(at)) => format!("{}{name}{}", &ty[..at + 2], &ty[at + 2..]),
        (Some(name), None) => join(ty, name),
    }
}

fn join(ty: &str, name: &str) -> String {
    if ty.ends_with(['*', '&']) { format!("{ty}{name}") } else { format!("{ty} {name}") }
}
