//! The object at one place in memory. Start at [`SharedObject::link`].

use flea_symbols::addr::RemoteAddr;

use crate::error::LinkError;
use crate::file::PAGE;
use crate::parse::{Import, Protection, SharedObject};
use crate::relocations::{Field, Relocation, Value};

/// What is to be in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linked {
    /// All bytes, from the base on.
    pub bytes: Vec<u8>,
    /// What they are to be protected as, once written; they cover all of it.
    pub regions: Vec<Region>,
}

/// Neighbouring pages that are protected alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// The first byte.
    pub at: RemoteAddr,
    /// Whole pages.
    pub size_bytes: u64,
    /// How.
    pub protection: Protection,
}

impl SharedObject {
    /// Relocates the object for `base`, a page boundary. `address_of` is asked for each of
    /// [`SharedObject::imports`], by index.
    ///
    /// # Errors
    /// [`LinkError`]: something is too far away from there.
    pub fn link(
        &self,
        base: RemoteAddr,
        address_of: impl Fn(usize) -> RemoteAddr,
    ) -> Result<Linked, LinkError> {
        let bias = base.0.wrapping_sub(self.first.0);
        let mut bytes = self.image.clone();
        for relocation in &self.relocations {
            let value = match relocation.value {
                Value::Own(at) => at.0.wrapping_add(bias),
                Value::Absolute(value) => value,
                Value::Import(index) => address_of(index).0,
            };
            let value = value.wrapping_add_signed(relocation.addend);
            let at = RemoteAddr(relocation.at.0.wrapping_add(bias));
            let into = usize::try_from(at.0 - base.0).expect("checked when it was parsed");
            match relocation.field {
                Field::Address => bytes[into..into + 8].copy_from_slice(&value.to_le_bytes()),
                Field::Distance => {
                    let distance = value.wrapping_sub(at.0).cast_signed();
                    let distance = i32::try_from(distance).map_err(|_| LinkError::OutOfReach {
                        symbol: self.name_of(relocation),
                        at,
                    })?;
                    bytes[into..into + 4].copy_from_slice(&distance.to_le_bytes());
                }
            }
        }
        Ok(Linked { bytes, regions: self.regions(base) })
    }

    fn name_of(&self, relocation: &Relocation) -> String {
        match relocation.value {
            Value::Import(index) => self.imports[index].name.clone(),
            Value::Own(at) => at.to_string(),
            Value::Absolute(value) => format!("{value:#x}"),
        }
    }

    fn regions(&self, base: RemoteAddr) -> Vec<Region> {
        let mut regions: Vec<Region> = Vec::new();
        for (i, &protection) in self.pages.iter().enumerate() {
            match regions.last_mut() {
                Some(last) if last.protection == protection => last.size_bytes += PAGE,
                _ => {
                    let at = RemoteAddr(base.0 + i as u64 * PAGE);
                    regions.push(Region { at, size_bytes: PAGE, protection });
                }
            }
        }
        regions
    }
}

impl std::fmt::Display for Import {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.version {
            Some(version) => write!(f, "{}@{version}", self.name),
            None => f.write_str(&self.name),
        }
    }
}
