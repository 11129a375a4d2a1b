//! The way to a field, in the object's own types and in the target's. Start at
//! [`Spec::parse`] and [`find`].

use super::{CoreKind, CoreRelocation, MAX_STEPS, compat};
use crate::types::{Member, Type, TypeId, Types, base_name, c_name, essential_name};

/// Members that are looked at on the way to one field; more are damage.
const MAX_MEMBERS: u32 = 1 << 20;

/// A place in a graph of types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spec {
    pub(super) root: TypeId,
    /// Members that have names, and elements. The first is an element: of the array that a
    /// pointer points to.
    pub(super) steps: Vec<Step>,
    /// From the start of the root, all steps.
    pub(super) bit_offset: u64,
    /// Index of an enumerator.
    pub(super) enumerator: Option<usize>,
}

/// One step of the way to a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Element { of: TypeId, index: u32 },
    Member { owner: TypeId, index: usize },
}

impl Spec {
    fn new(root: TypeId) -> Self {
        Self { root, steps: Vec::new(), bit_offset: 0, enumerator: None }
    }

    /// The place that `relocation` names in the object's own types.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn parse(types: &Types, relocation: &CoreRelocation) -> Result<Self, &'static str> {
        let mut spec = Self::new(relocation.root);
        let path = relocation.path.as_slice();
        if path.len() > MAX_STEPS {
            return Err("too many steps");
        }
        let (first, rest) = path.split_first().ok_or("no steps")?;
        if relocation.kind.is_type() {
            return if path == [0] { Ok(spec) } else { Err("steps into a type") };
        }
        if relocation.kind.is_enumerator() {
            let Type::Enum { values, .. } = types.get(spec.root) else { return Err("no enum") };
            let index = *first as usize;
            if !rest.is_empty() || index >= values.len() {
                return Err("no such enumerator");
            }
            spec.enumerator = Some(index);
            return Ok(spec);
        }
        spec.step_to_element(types, spec.root, *first).ok_or("no such element")?;
        let mut id = spec.root;
        for &index in rest {
            match types.get(id) {
                Type::Struct { members, .. } => {
                    let index = index as usize;
                    let member = members.get(index).ok_or("no such member")?;
                    spec.move_by(member.bit_offset).ok_or("an offset without bounds")?;
                    // What has no name is looked for by its members' names.
                    if !member.name.is_empty() {
                        spec.steps.push(Step::Member { owner: id, index });
                    }
                    id = member.ty;
                }
                Type::Array { of, n_elements } => {
                    if !is_inside(*n_elements, index) {
                        return Err("no such element");
                    }
                    id = *of;
                    spec.step_to_element(types, id, index).ok_or("no such element")?;
                }
                _ => return Err("a step into what has no parts"),
            }
        }
        Ok(spec)
    }

    fn step_to_element(&mut self, types: &Types, of: TypeId, index: u32) -> Option<()> {
        self.steps.push(Step::Element { of, index });
        if index == 0 {
            return Some(());
        }
        let bits = types.size_bytes(of)?.checked_mul(8)?;
        self.move_by(bits.checked_mul(index.into())?)
    }

    fn move_by(&mut self, bits: u64) -> Option<()> {
        self.bit_offset = self.bit_offset.checked_add(bits)?;
        Some(())
    }
}

/// An array without a length may be as long as it likes.
fn is_inside(n_elements: u32, index: u32) -> bool {
    n_elements == 0 || index < n_elements
}

/// The place in the target's type `candidate` that is `local_spec` in the object's own types;
/// `None` where it has none.
pub(super) fn find(
    kind: CoreKind,
    local: &Types,
    local_spec: &Spec,
    target: &Types,
    candidate: TypeId,
) -> Option<Spec> {
    let mut spec = Spec::new(candidate);
    if kind == CoreKind::TypeMatches {
        return compat::matches(local, local_spec.root, target, candidate).then_some(spec);
    }
    if kind.is_type() {
        return compat::are_compatible(local, local_spec.root, target, candidate).then_some(spec);
    }
    if let Some(index) = local_spec.enumerator {
        let Type::Enum { values: own, .. } = local.get(local_spec.root) else { return None };
        let Type::Enum { values, .. } = target.get(candidate) else { return None };
        let wanted = essential_name(&own.get(index)?.0);
        let is_it = |(name, _): &(String, u64)| essential_name(&c_name(name)) == wanted;
        spec.enumerator = Some(values.iter().position(is_it)?);
        return Some(spec);
    }
    let mut walk = Walk { local, target, spec, members_left: MAX_MEMBERS };
    let mut id = candidate;
    for (i, step) in local_spec.steps.iter().enumerate() {
        match *step {
            Step::Member { owner, index } => {
                let Type::Struct { members, .. } = local.get(owner) else { return None };
                id = walk.go_to_member(members.get(index)?, id, 0)?;
            }
            Step::Element { index, .. } => {
                if i > 0 {
                    let Type::Array { of, n_elements } = target.get(id) else { return None };
                    id = Some(*of).filter(|_| is_inside(*n_elements, index))?;
                }
                walk.spec.step_to_element(target, id, index)?;
            }
        }
    }
    Some(walk.spec)
}

/// On the way to a field of the target.
struct Walk<'t> {
    local: &'t Types,
    target: &'t Types,
    spec: Spec,
    /// Damage may nest what has no name in itself.
    members_left: u32,
}

impl Walk<'_> {
    /// Goes to the member of `id` that is called as `wanted`, through what has no name; its type.
    fn go_to_member(&mut self, wanted: &Member, id: TypeId, depth: usize) -> Option<TypeId> {
        let Type::Struct { members, .. } = self.target.get(id) else { return None };
        if depth > MAX_STEPS {
            return None;
        }
        let before = self.spec.bit_offset;
        for (index, member) in members.iter().enumerate() {
            self.members_left = self.members_left.checked_sub(1)?;
            self.spec.bit_offset = before;
            self.spec.move_by(member.bit_offset)?;
            if is_called(self.target, member, &wanted.name) {
                let (local, target) = (self.local, self.target);
                let is_it = compat::are_fields_compatible(local, wanted.ty, target, member.ty);
                if !is_it {
                    return None;
                }
                self.spec.steps.push(Step::Member { owner: id, index });
                return Some(member.ty);
            }
            if member.name.is_empty() {
                let found = self.go_to_member(wanted, member.ty, depth + 1);
                if found.is_some() {
                    return found;
                }
            }
        }
        None
    }
}

/// A base class has no name in the target, and one in headers.
fn is_called(target: &Types, member: &Member, name: &str) -> bool {
    if !member.name.is_empty() {
        return c_name(&member.name) == name;
    }
    match target.get(member.ty) {
        Type::Struct { name: tag, .. } => !tag.is_empty() && base_name(tag) == name,
        _ => false,
    }
}

/// What a relocation is about, for messages: `field 'struct task.pid'`.
pub(super) fn spelled(types: &Types, relocation: &CoreRelocation) -> String {
    let keyword = match types.get(relocation.root) {
        Type::Struct { is_union: true, .. } => "union ",
        Type::Struct { .. } | Type::Opaque { .. } => "struct ",
        Type::Enum { .. } => "enum ",
        _ => "",
    };
    let root = format!("{keyword}{}", relocation.names.last().map_or("?", String::as_str));
    if relocation.kind.is_type() {
        return format!("type '{root}'");
    }
    let Ok(spec) = Spec::parse(types, relocation) else { return format!("a part of '{root}'") };
    if let (Some(index), Type::Enum { values, .. }) = (spec.enumerator, types.get(spec.root)) {
        let name = values.get(index).map_or("?", |(name, _)| name);
        return format!("enumerator '{name}' of '{root}'");
    }
    let mut text = root;
    for step in spec.steps.iter().skip(1) {
        match *step {
            Step::Element { index, .. } => text += &format!("[{index}]"),
            Step::Member { owner, index } => {
                if let Type::Struct { members, .. } = types.get(owner) {
                    text += &format!(".{}", members.get(index).map_or("?", |m| &m.name));
                }
            }
        }
    }
    format!("field '{text}'")
}
