//! Whether a function ever returns, read from its code.

use iced_x86::FlowControl;

use super::stack_words::{MAX_RANGES, decode};
use super::sweep::is_near_branch;
use crate::function::Function;
use crate::module::Module;

/// Whether the code of `function`, and whatever it jumps to, holds no way back to its caller: no
/// `ret`, and no jump to where nobody knows. The caller of such a function (`exit`, `abort`)
/// may have nothing behind the call that could go on. `false` where it cannot be told.
pub(crate) fn never_returns(module: &Module<'_>, function: &Function) -> bool {
    let mut todo = vec![function.address.0];
    let mut seen = Vec::new();
    while let Some(address) = todo.pop() {
        let Some(entry) = module.unwind().entry_at(address) else { return false };
        let (start, end) = (entry.start, entry.end);
        if seen.contains(&start) {
            continue;
        }
        seen.push(start);
        if seen.len() > MAX_RANGES {
            return false;
        }
        let Some(region) = decode(module, start, end) else { return false };
        for instruction in &region {
            match instruction.flow_control() {
                FlowControl::Return | FlowControl::IndirectBranch => return false,
                FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
                    if is_near_branch(instruction)
                        && !(start..end).contains(&instruction.near_branch_target()) =>
                {
                    todo.push(instruction.near_branch_target());
                }
                _ => {}
            }
        }
    }
    true
}
