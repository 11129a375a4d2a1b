//! What is attached in which process, whoever attached it: the library side of `flea ps` and
//! `flea detach`. All of it is read from the targets themselves.

use std::fs;

use flea_process::Pid;

use crate::{
    change,
    error::{AttachError, RemoteError},
    registry::{Controller, Registry},
    transaction,
};

/// What one controller attached to one function in one go: programs, or a replacement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachedBody {
    /// The traced process.
    pub pid: Pid,
    /// Its number there.
    pub id: u32,
    /// Path of the module.
    pub module: String,
    /// The function.
    pub function: String,
    /// (kind, name) of its programs, newest first. A replacement is one of kind `replace`.
    pub programs: Vec<(String, String)>,
    /// They can change the target's memory, or one of `changes`, which somebody has allowed them.
    pub writes_target: bool,
    /// What they change of the function's arguments and result: registers' names.
    pub changes: Vec<&'static str>,
    /// Process id of the controller.
    pub controller: Pid,
    /// Whether that very process still runs.
    pub controller_alive: bool,
    /// Seconds since the epoch.
    pub since: u64,
}

/// What is attached in process `pid`; nothing where Flea never was.
///
/// # Errors
/// No such process, no permission, or a damaged registry.
pub fn in_process(pid: Pid) -> Result<Vec<AttachedBody>, RemoteError> {
    flea_process::check_traceable(pid)?;
    Ok(bodies(pid, &transaction::peek(pid)?))
}

/// What is attached in every process that may be looked at, and the processes that have
/// something attached that could not be read.
#[must_use]
pub fn everywhere() -> (Vec<AttachedBody>, Vec<RemoteError>) {
    let mut found = Vec::new();
    let mut unreadable = Vec::new();
    for pid in processes() {
        // Most processes have nothing of ours, belong to somebody else, or end meanwhile.
        if !matches!(transaction::find_registry(pid), Ok(Some(_))) {
            continue;
        }
        match in_process(pid) {
            Ok(bodies) => found.extend(bodies),
            // Ended meanwhile.
            Err(RemoteError::Process(_)) => {}
            Err(error) => unreadable.push(error),
        }
    }
    (found, unreadable)
}

/// Takes the bodies with these ids off, whoever attached them.
///
/// # Errors
/// The process may not be traced, or a site was changed by another tool: then all stays.
pub fn detach(pid: Pid, ids: &[u32]) -> Result<(), AttachError> {
    transaction::detach_from(pid, ids)
}

fn processes() -> Vec<Pid> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let mut pids: Vec<Pid> =
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    pids
}

fn bodies(pid: Pid, registry: &Registry) -> Vec<AttachedBody> {
    let mut found = Vec::new();
    for function in &registry.functions {
        for body in &function.bodies {
            found.push(AttachedBody {
                pid,
                id: body.id,
                module: function.module.clone(),
                function: function.name.clone(),
                programs: body.programs.clone(),
                writes_target: body.writes_target,
                changes: change::unpack_changes(body.changes).registers(),
                controller: body.owner.pid,
                controller_alive: body.owner.is_alive(),
                since: body.since,
            });
        }
        for one in &function.replacements {
            found.push(AttachedBody {
                pid,
                id: one.id,
                module: function.module.clone(),
                function: function.name.clone(),
                programs: vec![("replace".to_owned(), one.name.clone())],
                writes_target: false,
                changes: Vec::new(),
                controller: one.owner.pid,
                controller_alive: one.owner.is_alive(),
                since: one.since,
            });
        }
    }
    found.sort_by_key(|body| body.id);
    found
}

impl Controller {
    /// This very process.
    pub(crate) fn this() -> Self {
        let pid = std::process::id().cast_signed();
        Self { pid, started: start_time(pid).unwrap_or(0) }
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }
}

/// Field 22 of `/proc/PID/stat`: clock ticks between boot and the process's start.
fn start_time(pid: Pid) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in parentheses and may itself hold any of ") (".
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_is_this_process_and_no_other_with_its_number() {
        let this = Controller::this();
        assert!(this.is_alive());
        assert!(!Controller { started: this.started + 1, ..this }.is_alive());
    }

    #[test]
    fn a_process_without_flea_has_nothing_attached() {
        let pid = std::process::id().cast_signed();
        assert_eq!(in_process(pid).unwrap(), []);
    }
}
