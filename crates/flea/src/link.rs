//! What is attached stays so until its link is detached or dropped.

use flea_symbols::addr::RemoteAddr;

use crate::{error::AttachError, object::Object, transaction};

/// Programs that were attached together, to one function or to thousands. Dropping it takes
/// them off.
///
/// ```
/// # mod parts { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/examples/parts/counter.rs")); }
/// # use parts::{counter, total};
/// #[unsafe(no_mangle)]
/// #[inline(never)]
/// extern "C" fn link_example(x: u64) -> u64 {
///     x + 1
/// }
///
/// let session = flea::Session::this_process()?;
/// let object = session.load(counter())?;
/// let function = &session.find("link_example")?[0];
/// let link = object.program("count").unwrap().attach(function)?;
/// assert_eq!(link.n_functions(), 1);
/// link_example(1);
/// link.detach()?; // tells of failures, which dropping cannot
/// link_example(2);
/// assert_eq!(total(&object), 1);
///
/// // What is kept outlives this program; `flea detach`, or anybody, takes it off.
/// object.program("count").unwrap().attach(function)?.keep();
/// let attached = flea::attached::in_process(session.pid())?;
/// assert_eq!(attached[0].function, "link_example");
/// flea::attached::detach(session.pid(), &[attached[0].id])?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Link {
    object: Object,
    ids: Vec<u32>,
    keys: Vec<(usize, RemoteAddr)>,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Attached,
    LetGo,
}

impl Link {
    pub(crate) fn new(object: Object, ids: Vec<u32>, keys: Vec<(usize, RemoteAddr)>) -> Self {
        Self { object, ids, keys, state: State::Attached }
    }

    /// Takes the programs off. When this returns, no call runs them any more, also no call that
    /// is still inside the traced function. (A program that is interrupted by a signal handler
    /// ends when the handler returns.)
    ///
    /// # Errors
    /// The target could not be seized, or another tool has changed a site since; what is
    /// attached stays so. A target that has ended is no error.
    pub fn detach(mut self) -> Result<(), AttachError> {
        self.take_off()
    }

    /// Leaves the programs attached when this process ends: `flea ps` finds them, `flea
    /// detach` takes them off.
    pub fn keep(mut self) {
        self.state = State::LetGo;
        // The object's memory must stay in the target with them.
        std::mem::forget(self.object.clone());
    }

    /// Functions it covers.
    #[must_use]
    pub fn n_functions(&self) -> usize {
        self.ids.len()
    }

    fn take_off(&mut self) -> Result<(), AttachError> {
        if self.state == State::LetGo {
            return Ok(());
        }
        let object = &self.object.inner;
        transaction::detach(&object.session, object.base, &self.ids)?;
        self.state = State::LetGo;
        self.object.release(&self.keys);
        self.object.forget(&self.ids);
        Ok(())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // A failure cannot be reported from here; `detach` reports it.
        let _ = self.take_off();
    }
}
