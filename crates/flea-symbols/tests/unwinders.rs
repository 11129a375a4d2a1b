//! Which modules bring an unwinder, and that libgcc's can be patched.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compiled;

use compiled::{compile, function, gcc};
use flea_symbols::{Module, Unwinder};

const THROWS: &str =
    "int main(int argc, char **) { try { if (argc) throw 1; } catch (int) { return 1; } }";

/// libgcc's in `module`: where, with a proved site.
fn check_libgcc(module: &Module<'_>) {
    let Unwinder::Libgcc { find_fde } = module.unwinder() else {
        panic!("{:?}", module.unwinder());
    };
    let function = function(module, "_Unwind_Find_FDE");
    assert_eq!(function.address, find_fde);
    module.site(function).unwrap();
}

#[test]
fn the_shared_libgcc() {
    let path = std::process::Command::new("gcc").arg("-print-file-name=libgcc_s.so.1").output();
    let path = String::from_utf8(path.unwrap().stdout).unwrap();
    let bytes = std::fs::read(path.trim()).unwrap();
    check_libgcc(&Module::parse(&bytes, None).unwrap());
}

/// The loader answers to a libgcc that comes later.
#[test]
fn the_loader() {
    let Ok(bytes) = std::fs::read("/lib64/ld-linux-x86-64.so.2") else {
        return println!("skipped: no glibc here");
    };
    let module = Module::parse(&bytes, None).unwrap();
    let name = "_dl_find_object";
    if !module.functions().iter().any(|function| function.name == name) {
        return println!("skipped: this glibc is older than 2.35");
    }
    let Unwinder::Loader { find_object } = module.unwinder() else {
        panic!("{:?}", module.unwinder());
    };
    let function = function(&module, name);
    assert_eq!(function.address, find_object);
    module.site(function).unwrap();
}

#[test]
fn programs() {
    let c = "int main(void) { return 0; }";
    for flags in [["-no-pie", "-O2"], ["-pie", "-fPIE"]] {
        let bytes = gcc("no-unwinder", c, &flags);
        assert_eq!(Module::parse(&bytes, None).unwrap().unwinder(), Unwinder::None);
        let Some(bytes) = compile("imported", "g++", THROWS, &flags) else { continue };
        assert_eq!(Module::parse(&bytes, None).unwrap().unwinder(), Unwinder::None);
    }
    for flags in [&["-no-pie", "-static"][..], &["-pie", "-static-libgcc", "-static-libstdc++"]] {
        let Some(bytes) = compile("static", "g++", THROWS, flags) else { continue };
        check_libgcc(&Module::parse(&bytes, None).unwrap());
    }
}

#[test]
fn an_unwinder_without_symbols_is_noticed() {
    let flags = ["-pie", "-static-libgcc", "-static-libstdc++", "-s"];
    let Some(bytes) = compile("hidden", "g++", THROWS, &flags) else { return };
    assert_eq!(Module::parse(&bytes, None).unwrap().unwinder(), Unwinder::Hidden);
    let Some(bytes) = compile("stripped", "g++", THROWS, &["-pie", "-s"]) else { return };
    assert_eq!(Module::parse(&bytes, None).unwrap().unwinder(), Unwinder::None);
}

#[test]
fn other_unwinders_are_not_taken_for_libgccs() {
    let entries = "void _Unwind_RaiseException(void) {}\n";
    let bytes = gcc("own", entries, &[]);
    assert_eq!(Module::parse(&bytes, None).unwrap().unwinder(), Unwinder::Other);
    let llvm = format!("{entries}void _Unwind_Find_FDE(void) {{}} void __unw_step(void) {{}}");
    let bytes = gcc("llvm", &llvm, &[]);
    assert_eq!(Module::parse(&bytes, None).unwrap().unwinder(), Unwinder::Other);
}
