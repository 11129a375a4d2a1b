//! Whether a function makes calls: only one that makes none keeps anything below its stack
//! pointer (psABI, "The Stack Frame": the red zone).

use iced_x86::FlowControl;

use super::stack_words::decode;
use crate::addr::Svma;
use crate::module::Module;

impl Module<'_> {
    /// Whether the function that has the instruction at `address` makes calls. `false` where
    /// it cannot be told.
    #[must_use]
    pub fn makes_calls(&self, address: Svma) -> bool {
        let entry = self.unwind().entry_at(address.0).map(|entry| (entry.start, entry.end));
        let function = || self.function_at(address).map(|f| (f.address.0, f.end().0));
        let Some((start, end)) = entry.or_else(function) else { return false };
        decode(self, start, end).is_some_and(|region| {
            region.iter().any(|insn| {
                matches!(insn.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
            })
        })
    }
}
