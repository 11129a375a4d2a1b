//! Programs fitted to a module: CO-RE relocations are resolved by the types of the module that
//! defines the function. Each program is fitted to a module once. Start at [`Fits::fit`].

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use flea_object::{
    core_relo::{self, CoreError},
    spec::{Object as Spec, Program},
    types::Types,
};
use flea_verifier::Rejection;

use crate::{modules::Module, session::lock};

/// What has been fitted so far.
#[derive(Default)]
pub(crate) struct Fits {
    types: Mutex<HashMap<ModuleKey, KeptTypes>>,
    fitted: Mutex<HashMap<(usize, ModuleKey), Arc<Fitted>>>,
}

/// The address of a module that is kept alive by [`KeptTypes`], so no other gets it.
pub(crate) type ModuleKey = usize;

struct KeptTypes {
    _module: Arc<Module>,
    types: Arc<Types>,
}

/// A program as one module needs it.
#[derive(Debug)]
pub(crate) struct Fitted {
    pub(crate) program: Program,
    /// What the module has of the types that programs name: type ids in `program` are theirs.
    pub(crate) types: Arc<Types>,
    /// Instructions that ask for what the module does not have, and why; sorted.
    poisoned: Vec<(u32, String)>,
}

impl Fits {
    /// Program `index` of `spec` for the functions of `module`; `None` for one that is the same
    /// for all.
    ///
    /// # Errors
    /// [`CoreError`]: the module's types give no clear answer.
    pub(crate) fn fit(
        &self,
        spec: &Spec,
        index: usize,
        module: &Arc<Module>,
    ) -> Result<Option<(ModuleKey, Arc<Fitted>)>, CoreError> {
        let program = &spec.programs[index];
        if program.core_relocations.is_empty() {
            return Ok(None);
        }
        let module_key = Arc::as_ptr(module).addr();
        let types = self.types_of(spec, module_key, module);
        let key = (index, module_key);
        if let Some(known) = lock(&self.fitted).get(&key) {
            return Ok(Some((module_key, Arc::clone(known))));
        }
        let relocations = &program.core_relocations;
        let relocated = core_relo::relocate(&program.insns, relocations, &spec.types, &types)?;
        let program =
            Program { insns: relocated.insns, core_relocations: Vec::new(), ..program.clone() };
        let fitted = Arc::new(Fitted { program, types, poisoned: relocated.poisoned });
        let mut all = lock(&self.fitted);
        Ok(Some((module_key, Arc::clone(all.entry(key).or_insert(fitted)))))
    }

    /// What `module` has of the types that any program of `spec` names.
    fn types_of(&self, spec: &Spec, key: ModuleKey, module: &Arc<Module>) -> Arc<Types> {
        if let Some(known) = lock(&self.types).get(&key) {
            return Arc::clone(&known.types);
        }
        let relocations = spec.programs.iter().flat_map(|program| &program.core_relocations);
        let mut names: Vec<&str> =
            relocations.flat_map(|r| r.names.iter().map(String::as_str)).collect();
        names.sort_unstable();
        names.dedup();
        // A module that cannot be read has no types; no function is found in one.
        let types = Arc::new(module.types_named(&names).unwrap_or_default());
        let kept = KeptTypes { _module: Arc::clone(module), types };
        Arc::clone(&lock(&self.types).entry(key).or_insert(kept).types)
    }
}

impl Fitted {
    /// Says which field is missing, where the verifier could only say that there is a call of
    /// nothing.
    pub(crate) fn explain(&self, rejection: &mut Rejection) {
        let at = self.poisoned.binary_search_by_key(&rejection.insn_idx, |(at, _)| *at);
        let Some((_, reason)) = at.ok().and_then(|at| self.poisoned.get(at)) else { return };
        rejection.message = format!("failed to resolve CO-RE relocation: {reason}");
        rejection.log.push(rejection.message.clone());
        rejection.hint = Some(
            "ask first: bpf_core_field_exists, bpf_core_type_exists, bpf_core_enum_value_exists"
                .into(),
        );
    }
}
