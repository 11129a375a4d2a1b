//! Callers that keep values in registers which the ABI lets a function change.
#![allow(clippy::unwrap_used, reason = "a test")]

mod compiled;

use compiled::{compile, function, gcc};
use flea_symbols::Module;
use flea_symbols::addr::Svma;

/// `leaf` leaves most registers alone, and gcc knows. What its callers keep across the call
/// is read at once, behind another call, after a loop, or by their own callers.
const SOURCE: &str = r"
#define LOCAL static __attribute__((noinline, noclone))
LOCAL long leaf(long x) { return x * 3 + 1; }
LOCAL long far_leaf(long x) { return x * 5 + 1; }
LOCAL long middle(long x) { return far_leaf(x + 1) + 2; }
LOCAL double vector(double x) { return x * 3 + 1; }
extern long outside(long);
LOCAL long calls(long x) { return outside(x) * 3; }
long near(long a, long b, long c) { return leaf(a) + b * c; }
long far(long a, long b, long c) { return middle(a) + b * c; }
double doubles(double a, double b) { return vector(a) * b; }
long keeps(long a, long b, long c) { return calls(a) + b * c; }
long alone(long a) { return leaf(a) * 2; }
";

fn found(module: &Module<'_>, name: &str) -> Option<Svma> {
    let function = function(module, name);
    module.caller_relying_on_registers(function, &module.signature(function))
}

#[test]
fn what_gcc_keeps_across_calls_is_found() {
    let bytes = gcc("kept", SOURCE, &["-O2", "-g"]);
    let module = Module::parse(&bytes, None).unwrap();
    for (callee, caller) in
        [("leaf", "near"), ("far_leaf", "middle"), ("middle", "far"), ("vector", "doubles")]
    {
        let at = found(&module, callee).unwrap_or_else(|| panic!("nobody relies on {callee}"));
        let caller = function(&module, caller);
        assert!((caller.address..caller.end()).contains(&at), "{callee}: {at}");
    }
    assert_eq!(found(&module, "calls"), None, "what it calls may change everything");
}

#[test]
fn callers_that_follow_the_abi_are_left_alone() {
    let cases = [("gcc", &["-O2", "-g", "-fno-ipa-ra"][..]), ("clang", &["-O2", "-g"])];
    for (i, (compiler, flags)) in cases.into_iter().enumerate() {
        let Some(bytes) = compile(&format!("abi{i}"), compiler, SOURCE, flags) else { continue };
        let module = Module::parse(&bytes, None).unwrap();
        for callee in ["leaf", "far_leaf", "middle", "vector", "calls"] {
            assert_eq!(found(&module, callee), None, "{compiler}: {callee}");
        }
    }
}
