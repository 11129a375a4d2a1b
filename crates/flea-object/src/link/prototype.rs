//! What global functions take and give, by their BTF, as Linux reads it
//! (`btf_prepare_func_args`, kernel/bpf/btf.c, 6.18).

use std::collections::HashMap;

use crate::btf::{Btf, BtfError, Int, Kind, Member};
use crate::btf_ext::BtfExt;
use crate::spec::{Param, ProgramKind, Prototype};

/// Arguments that a call can have.
const MAX_PARAMS: usize = 5;
/// Types that are looked at for one alignment. A chain of them as long is no deep recursion.
const MAX_TYPES: u32 = 1000;
const TAG_CONTEXT: &str = "arg:ctx";
const TAG_NONNULL: &str = "arg:nonnull";

/// The types of an object's functions.
pub(super) struct Prototypes<'a> {
    btf: Option<&'a Btf<'a>>,
    /// Type ids by section and first instruction.
    functions: HashMap<(&'a str, usize), u32>,
    /// Attributes of parameters, by function and number.
    tags: HashMap<(u32, u32), Vec<&'a str>>,
}

/// Whether a kind of program has `struct pt_regs` as its context.
pub(super) const fn is_probe(kind: ProgramKind) -> bool {
    matches!(kind, ProgramKind::Uprobe | ProgramKind::Uretprobe)
}

impl<'a> Prototypes<'a> {
    pub(super) fn new(btf: Option<&'a Btf<'a>>, ext: &BtfExt<'a>) -> Self {
        let functions = ext.functions.iter().map(|f| ((f.section, f.insn_idx), f.type_id));
        let mut tags: HashMap<(u32, u32), Vec<&str>> = HashMap::new();
        for (_, ty) in btf.iter().flat_map(|btf| btf.types()) {
            if let Kind::DeclTag { of, component } = ty.kind {
                tags.entry((of, component)).or_default().push(ty.name);
            }
        }
        Self { btf, functions: functions.collect(), tags }
    }

    /// The prototype of the function that begins at `start` of `section`; `None` where there is
    /// no type information.
    pub(super) fn of(&self, section: &str, start: usize, probe: bool) -> Option<Prototype> {
        let btf = self.btf?;
        let type_id = *self.functions.get(&(section, start))?;
        let Kind::Func { proto } = btf.get(type_id).ok()?.kind else { return None };
        let Kind::Proto { ret, params } = &btf.get(proto).ok()?.kind else { return None };
        if params.len() > MAX_PARAMS {
            let what = format!("{} arguments, and at most {MAX_PARAMS} can be", params.len());
            return Some(Prototype {
                params: vec![Param::Unsupported { what }],
                ..Prototype::default()
            });
        }
        let params = (0..).zip(params).map(|(n, param)| {
            let tags = self.tags.get(&(type_id, n)).map_or(&[][..], Vec::as_slice);
            param_of(btf, param, tags, probe)
                .unwrap_or_else(|e| Param::Unsupported { what: e.to_string() })
        });
        Some(Prototype { params: params.collect(), bad_result: bad_result(btf, *ret) })
    }
}

fn bad_result(btf: &Btf<'_>, ret: u32) -> Option<String> {
    match btf.resolve(ret) {
        Ok(ty) => match ty.kind {
            Kind::Int(_) | Kind::Enum { .. } => None,
            Kind::Void => Some("void".into()),
            Kind::Ptr { .. } => Some("a pointer".into()),
            _ => Some(format!("`{}`", ty.name)),
        },
        Err(e) => Some(e.to_string()),
    }
}

fn param_of(
    btf: &Btf<'_>,
    param: &Member<'_>,
    tags: &[&str],
    probe: bool,
) -> Result<Param, BtfError> {
    let ty = btf.resolve(param.type_id)?;
    let to = match ty.kind {
        Kind::Int(_) | Kind::Enum { .. } => return Ok(Param::Number),
        Kind::Ptr { to } => to,
        _ => return Ok(Param::Unsupported { what: format!("`{}`", ty.name) }),
    };
    if tags.contains(&TAG_CONTEXT) || is_context(btf, to, probe)? {
        return Ok(Param::Context);
    }
    let unknown = |name: &str| Param::Unsupported {
        what: format!("a pointer to `{name}`, whose size is not known"),
    };
    match btf.size_bytes(to) {
        Ok(0) | Err(BtfError::NoSize { .. }) => Ok(unknown(btf.resolve(to)?.name)),
        Ok(size_bytes) => Ok(Param::Memory {
            size_bytes,
            align_bytes: align_bytes(btf, to, &mut { MAX_TYPES }),
            nonnull: tags.contains(&TAG_NONNULL),
        }),
        Err(e) => Err(e),
    }
}

/// Where the pointee's name alone says that it is the context: `struct pt_regs` in a probe, and
/// `void` in programs whose context has no type of its own.
fn is_context(btf: &Btf<'_>, to: u32, probe: bool) -> Result<bool, BtfError> {
    const REGISTERS: [&str; 3] = ["pt_regs", "user_pt_regs", "bpf_user_pt_regs_t"];
    let pointee = btf.resolve(to)?;
    if !probe {
        return Ok(matches!(pointee.kind, Kind::Void));
    }
    Ok(REGISTERS.contains(&btf.get(to)?.name) || REGISTERS.contains(&pointee.name))
}

/// What C aligns a type to; 1 where that cannot be told, as in packed structures. `fuel` is how
/// many types may still be looked at: a small file can nest structures without end.
fn align_bytes(btf: &Btf<'_>, type_id: u32, fuel: &mut u32) -> u32 {
    let Some(left) = fuel.checked_sub(1) else { return 1 };
    *fuel = left;
    let scalar = |size: u32| if size.is_power_of_two() { size.min(8) } else { 1 };
    match btf.resolve(type_id).map(|ty| &ty.kind) {
        Ok(Kind::Int(Int { size_bytes, .. }) | Kind::Enum { size_bytes, .. }) => {
            scalar(*size_bytes)
        }
        Ok(Kind::Ptr { .. }) => 8,
        Ok(Kind::Array { of, .. }) => align_bytes(btf, *of, fuel),
        Ok(Kind::Struct { size_bytes, members, .. }) => {
            let mut largest = 1;
            for m in members {
                let align = align_bytes(btf, m.type_id, fuel);
                if m.bit_size == 0 && !m.bit_offset.is_multiple_of(8 * align) {
                    return 1;
                }
                largest = largest.max(align);
            }
            if size_bytes.is_multiple_of(largest) { largest } else { 1 }
        }
        _ => 1,
    }
}
