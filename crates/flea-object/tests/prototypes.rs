//! What the types say of global functions, in objects made by every clang on this machine.
#![allow(clippy::unwrap_used, reason = "a test panics where its input is not as expected")]

mod support;

use flea_object::parse;
use flea_object::spec::{Object, Param, Prototype};
use support::{compile, compilers};

fn prototype<'a>(object: &'a Object, program: &str, function: &str) -> Option<&'a Prototype> {
    let program = object.programs.iter().find(|p| p.name == program).unwrap();
    let function = program.functions.iter().find(|f| f.name == function);
    function.unwrap_or_else(|| panic!("{program:?}")).prototype.as_ref()
}

const fn memory(size_bytes: u32, align_bytes: u32, nonnull: bool) -> Param {
    Param::Memory { size_bytes, align_bytes, nonnull }
}

#[test]
fn parameters_and_results() {
    for compiler in compilers() {
        let object = parse(&compile(compiler, "global.bpf.c", &["-g"])).unwrap();
        let params =
            |program, function| prototype(&object, program, function).unwrap().params.clone();
        assert_eq!(params("run", "numbers"), vec![Param::Number; 4], "{compiler}");
        let pairs = [memory(16, 8, false), memory(16, 8, true), memory(4, 4, false)];
        assert_eq!(params("run", "pairs"), pairs, "{compiler}");
        assert_eq!(params("all", "bytes"), [memory(12, 1, false), memory(9, 1, false)]);
        assert_eq!(params("all", "contexts"), [Param::Context, Param::Context]);
        assert_eq!(params("probe", "probed"), [Param::Context]);
        let what = "a pointer to `opaque`, whose size is not known".to_owned();
        assert_eq!(params("all", "unknown"), [Param::Unsupported { what }]);

        let result =
            |program, function| prototype(&object, program, function).unwrap().bad_result.clone();
        assert_eq!(result("run", "pairs"), None);
        assert_eq!(result("all", "nothing").as_deref(), Some("void"));
        for (program, function) in [("run", "run"), ("run", "only_here"), ("all", "not_global")] {
            assert_eq!(prototype(&object, program, function), None, "{function}");
        }
    }
}

/// Without type information, every function is verified with its callers.
#[test]
fn no_types_no_prototypes() {
    for compiler in compilers() {
        let object = parse(&compile(compiler, "global.bpf.c", &[])).unwrap();
        assert_eq!(prototype(&object, "run", "pairs"), None, "{compiler}");
    }
}
