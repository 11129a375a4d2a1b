//! A function that is about to be attached to, and how its bodies are compiled.

use std::sync::Arc;

use flea_image::{Body, BodyRequest, CompileError, Cpu, ProgramUse, SkipResult};
use flea_symbols::{
    Site,
    addr::RemoteAddr,
    signature::{Signature, Unnamed},
};
use flea_verifier::Verified;

use crate::{error::AttachError, function::Function, object::Loaded, registry::StackArgs};

/// Everything about one function that the transaction needs.
pub(crate) struct Prepared {
    pub(crate) function: Function,
    pub(crate) site: Site,
    pub(crate) stack: StackArgs,
    /// Some program of `uses` needs the skeleton's frame, so the original runs inside it.
    pub(crate) has_frame: bool,
    /// (program index, cookie), newest first.
    pub(crate) uses: Vec<(usize, u64)>,
    /// Their proofs.
    pub(crate) verified: Vec<Arc<Verified>>,
}

impl Prepared {
    /// The site's first byte in the target.
    pub(crate) fn site_address(&self) -> RemoteAddr {
        self.function.site_address(&self.site)
    }

    /// Where the value of a program goes that skips the function.
    pub(crate) fn skip(&self) -> Option<SkipResult> {
        flea_image::skip_result(self.function.signature()).ok()
    }

    /// What is compiled the same for every function for which this is equal, but for addresses
    /// and cookies. It names proofs by their addresses: for as long as those are kept.
    pub(crate) fn shape(&self, frame_offset: u32) -> Shape<'_> {
        let proofs = self.uses.iter().zip(&self.verified);
        Shape {
            signature: Unnamed(self.function.signature()),
            programs: proofs
                .map(|((index, _), proof)| (*index, Arc::as_ptr(proof).addr()))
                .collect(),
            frame_offset,
        }
    }

    /// Compiles the programs on this function, for a frame that starts at `frame_offset`.
    pub(crate) fn compile(&self, object: &Loaded, frame_offset: u32) -> Result<Body, AttachError> {
        let what = (self.function.signature(), frame_offset);
        self.compile_by(flea_image::compile_body, object, what)
    }

    /// The same for all functions of this shape, of which this is one.
    pub(crate) fn compile_shared(
        &self,
        object: &Loaded,
        shape: &Shape<'_>,
    ) -> Result<Body, AttachError> {
        // Names are no part of the shape, so nothing may depend on them.
        let signature = shape.signature.0.without_names();
        let what = (&signature, shape.frame_offset);
        self.compile_by(flea_image::compile_shared_body, object, what)
    }

    fn compile_by(
        &self,
        compile: fn(&BodyRequest<'_>) -> Result<Body, CompileError>,
        object: &Loaded,
        (signature, frame_offset): (&Signature, u32),
    ) -> Result<Body, AttachError> {
        let programs: Vec<ProgramUse<'_>> = self
            .uses
            .iter()
            .zip(&self.verified)
            .map(|(&(index, cookie), verified)| ProgramUse {
                verified,
                kind: object.spec.programs[index].kind,
                cookie,
                state_index: u32::try_from(index).expect("an object is far smaller"),
            })
            .collect();
        compile(&BodyRequest {
            signature,
            programs: &programs,
            maps: &object.spec.maps,
            plan: &object.plan,
            function_address: self.function.address(),
            frame_offset,
            printk_map: object.printk,
            cpu: cpu(),
        })
        .map_err(|source| AttachError::Compile { function: self.function.name(), source })
    }
}

/// What of a function decides what is compiled for it: see [`Prepared::shape`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape<'a> {
    signature: Unnamed<'a>,
    /// Index of each program, and where its proof is.
    programs: Vec<(usize, usize)>,
    frame_offset: u32,
}

/// What this machine can do, which is the target's as well.
fn cpu() -> Cpu {
    Cpu { lzcnt: std::arch::is_x86_feature_detected!("lzcnt") }
}
