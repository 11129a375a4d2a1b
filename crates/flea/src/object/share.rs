//! One object in several processes: the same maps, and in each the programs of its own.

use std::sync::{Arc, Mutex, RwLock};

use super::{Compiled, Fits, Loaded, Object};
use crate::{error::LoadError, session::Session, transaction};

impl Object {
    /// The same object in another process, as [`crate::Following`] finds them: its programs can be
    /// attached there as well, and work on the same maps. What this one's programs print and miss
    /// is told by either.
    ///
    /// # Errors
    /// Memory in that process cannot be set up.
    pub fn share_with(&self, session: &Session) -> Result<Self, LoadError> {
        let loaded = &self.inner;
        let session = session.inner();
        let base = transaction::share_arena(session, &loaded.arena)?;
        Ok(Self {
            inner: Arc::new(Loaded {
                session: Arc::clone(session),
                spec: loaded.spec.clone(),
                plan: loaded.plan.clone(),
                arena: loaded.arena.clone(),
                base,
                printk: loaded.printk,
                printk_reader: Arc::clone(&loaded.printk_reader),
                permissions: loaded.permissions,
                writers: loaded.writers.clone(),
                fits: Fits::default(),
                verified: Mutex::default(),
                compiled: Compiled::default(),
                attached: Mutex::default(),
                slots: RwLock::new(self.slots().clone()),
                links: Mutex::default(),
            }),
        })
    }
}
