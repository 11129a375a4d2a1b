//! The types of a module's data, and where [`Module`] takes them from: DWARF, and BTF for what
//! DWARF does not have. Start at [`Module::types`].

use flea_object::btf;
use flea_object::types::{Type, TypeId, Types, key};

use crate::dwarf::{self, dies::Dies};
use crate::function::Function;
use crate::module::Module;
use crate::signature::{self, Signature, SignatureSource};

/// Which types are read besides those of functions.
#[derive(Clone, Copy, Debug)]
pub enum TypeNames<'n> {
    /// Those that programs may call one of these: a tag or a typedef, as
    /// [`flea_object::types::c_name`] spells it, perhaps with a flavour.
    These(&'n [&'n str]),
    /// All of the module's.
    All,
}

/// Types of a module, and all that can be reached from them.
#[derive(Clone, Debug, Default)]
pub struct TypeGraph {
    /// The types.
    pub types: Types,
    /// For each function that was asked for, the type of each of its words: arguments in
    /// `ctx`'s order, then the result. `None` for a part of a larger value, and where it is not
    /// known. A result that is not there, or not known, has one word.
    pub slots: Vec<Vec<Option<TypeId>>>,
    /// The types of the functions' parameters and results, whole.
    pub declared: Vec<TypeId>,
}

/// What is read of functions.
struct Found {
    slots: Vec<Vec<Option<TypeId>>>,
    declared: Vec<TypeId>,
}

impl Module<'_> {
    /// The types of `functions`, whose signatures are [`Module::signature`]'s, and of `names`.
    /// What a name means is searched in all of the module's debug information.
    #[must_use]
    pub fn types(&self, functions: &[(&Function, &Signature)], names: TypeNames<'_>) -> TypeGraph {
        let mut found = Found { slots: vec![Vec::new(); functions.len()], declared: Vec::new() };
        let types = self.dwarf_types(functions, names, &mut found);
        let mut types = self.btf_types(types, functions, names, &mut found);
        types.sort_members();
        let Found { mut slots, declared } = found;
        for ((_, signature), slots) in functions.iter().zip(&mut slots) {
            slots.resize(n_slots(signature), None);
        }
        TypeGraph { types, slots, declared }
    }

    /// Whether any debug information is there that may describe types.
    #[must_use]
    pub fn describes_types(&self) -> bool {
        self.debug_info().has_units() || !self.type_info().parts().is_empty()
    }

    fn dwarf_types(
        &self,
        functions: &[(&Function, &Signature)],
        names: TypeNames<'_>,
        found: &mut Found,
    ) -> Types {
        let info = self.debug_info();
        let view = info.dwarf();
        let dies = Dies::new(&view);
        let index = || info.type_index();
        let mut graph = dwarf::graph::Graph::new(&dies, &index);
        for ((function, signature), slots) in functions.iter().zip(&mut found.slots) {
            if signature.source != SignatureSource::Dwarf {
                continue;
            }
            let die = info
                .subprogram_at(function.address)
                .and_then(|subprogram| dwarf::signature::die_of(&dies, &subprogram));
            let params = die.as_ref().and_then(|die| Some(dies.params(die)?.0));
            if let Some((die, params)) = die.zip(params) {
                let params: Vec<TypeId> = params.iter().map(|die| graph.type_of(die)).collect();
                let ret = graph.type_of(&die);
                *slots = slots_of(graph.types_so_far(), signature, &params, ret);
                found.declared.extend(params.into_iter().chain([ret]));
            }
        }
        match names {
            TypeNames::All => graph.add_all(),
            TypeNames::These(names) => names.iter().for_each(|name| graph.add_named(name)),
        }
        graph.into_types()
    }

    fn btf_types(
        &self,
        types: Types,
        functions: &[(&Function, &Signature)],
        names: TypeNames<'_>,
        found: &mut Found,
    ) -> Types {
        let info = self.type_info();
        // What DWARF knows is not added a second time.
        let missing: Vec<&str> = match names {
            TypeNames::All => Vec::new(),
            TypeNames::These(names) => {
                names.iter().copied().filter(|name| types.named(name).is_empty()).collect()
            }
        };
        let has_dwarf = types.len() > 1;
        let mut graph = btf::Graph::new(info.parts(), types);
        for ((function, signature), slots) in functions.iter().zip(&mut found.slots) {
            let from_btf = signature.source == SignatureSource::Btf;
            if let Some((part, params, ret)) = info.prototype(function).filter(|_| from_btf) {
                let named = signature.params.len().min(params.len());
                let params: Vec<TypeId> =
                    params[..named].iter().map(|id| graph.id_of(part, *id)).collect();
                let ret = graph.id_of(part, ret);
                *slots = slots_of(graph.types_so_far(), signature, &params, ret);
                found.declared.extend(params.into_iter().chain([ret]));
            }
        }
        match names {
            TypeNames::All if has_dwarf => {}
            TypeNames::All => graph.add_named(|_| true),
            TypeNames::These(_) if missing.is_empty() => {}
            TypeNames::These(_) => {
                let wanted: std::collections::HashSet<String> =
                    missing.into_iter().map(key).collect();
                graph.add_named(|name| wanted.contains(&key(name)));
            }
        }
        graph.into_types()
    }
}

fn n_slots(signature: &Signature) -> usize {
    signature.arg_words().count() + signature.ret.words.len().max(1)
}

/// The types of a function's words, from those of its parameters and its result.
fn slots_of(
    types: &mut Types,
    signature: &Signature,
    params: &[TypeId],
    ret: TypeId,
) -> Vec<Option<TypeId>> {
    if params.len() != signature.params.len() {
        return Vec::new();
    }
    let mut slots = Vec::new();
    for (param, ty) in signature.params.iter().zip(params) {
        slots.extend(words_of(types, *ty, &param.ty, param.words.len()));
    }
    slots.extend(words_of(types, ret, &signature.ret.ty, signature.ret.words.len()));
    slots
}

fn words_of(
    types: &mut Types,
    id: TypeId,
    stated: &signature::Type,
    n_words: usize,
) -> Vec<Option<TypeId>> {
    if n_words != 1 {
        return vec![None; n_words];
    }
    let is_stated = |size: u32| match stated {
        signature::Type::Int { size_bytes, .. } | signature::Type::Float { size_bytes, .. } => {
            *size_bytes == size
        }
        _ => false,
    };
    let ty = match types.get(id) {
        Type::Pointer { .. } => Some(id),
        Type::Int { size_bytes, .. }
        | Type::Float { size_bytes, .. }
        | Type::Enum { size_bytes, .. } => {
            // A parameter without a prototype comes as another type than its own.
            Some(id).filter(|_| *size_bytes <= 8 && is_stated(*size_bytes))
        }
        // In one word there is only its address.
        Type::Struct { size_bytes, .. } if *size_bytes > 8 => {
            Some(types.add(Type::Pointer { to: id }))
        }
        _ => None,
    };
    vec![ty]
}
