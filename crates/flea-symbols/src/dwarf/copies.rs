//! Which C++ classes are copied by their own code, and are passed by address for that reason.
//! Knows nothing of what a type's bytes are.

use gimli::constants as dw;

use super::dies::{Die, Dies};

/// Whether a copy of a class must call this method of it.
pub(crate) enum MustRun {
    No,
    /// If it is the source's own.
    Perhaps,
    Yes,
}

impl<'a> Dies<'a> {
    /// A destructor, copy or move constructor that the source wrote itself.
    pub(crate) fn must_run(&self, method: &Die<'a>, class: &Die<'a>) -> MustRun {
        let is_trivial_if_defaulted = self.number(method, dw::DW_AT_defaulted) == Some(1);
        if method.entry.attr(dw::DW_AT_virtuality).is_some() {
            return MustRun::Yes; // a vtable pointer makes the copy constructor non-trivial
        }
        let implicit = method.entry.attr(dw::DW_AT_artificial).is_some();
        let Some(name) = self.name(method).filter(|_| !is_trivial_if_defaulted && !implicit) else {
            return MustRun::No;
        };
        if name.starts_with('~') {
            return MustRun::Perhaps;
        }
        let class_name = self.name(class).unwrap_or_default();
        let plain = class_name.split('<').next().unwrap_or_default();
        if name.split('<').next() != Some(plain) || plain.is_empty() {
            return MustRun::No;
        }
        // A constructor: copies if its first parameter behind `this` refers to the class.
        let children = self.children(method);
        let mut params = children.iter().filter(|die| {
            die.entry.tag() == dw::DW_TAG_formal_parameter
                && die.entry.attr(dw::DW_AT_artificial).is_none()
        });
        let target = params.next().and_then(|param| self.follow(param, dw::DW_AT_type));
        let reference = target.filter(|die| {
            matches!(die.entry.tag(), dw::DW_TAG_reference_type | dw::DW_TAG_rvalue_reference_type)
        });
        let referred = reference
            .and_then(|die| self.follow(&die, dw::DW_AT_type))
            .and_then(|die| self.bare(&die));
        match referred {
            Some(die) if die.entry.offset() == class.entry.offset() => MustRun::Perhaps,
            _ => MustRun::No,
        }
    }
}
