//! Objects that `flea run` cannot use.

use std::{path::Path, process::Command};

use flea_fixtures::{Tool, require};

use crate::{
    refusal::{Bystander, flea},
    scratch::Scratch,
};

const HEAD: &str = "#define SEC(name) __attribute__((section(name), used))\n\
                    char _license[] SEC(\"license\") = \"GPL\";\n";

/// Compiles `source` for BPF.
fn object(clang: &Path, directory: &Path, name: &str, source: &str) -> String {
    let (from, to) =
        (directory.join(format!("{name}.bpf.c")), directory.join(format!("{name}.bpf.o")));
    std::fs::write(&from, format!("{HEAD}{source}")).unwrap();
    let mut command = Command::new(clang);
    command.args(["-target", "bpf", "-O2", "-g", "-c", "-o"]).arg(&to).arg(&from);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    to.to_str().unwrap().to_owned()
}

#[test]
fn files_that_are_no_objects() {
    let Some(target) = Bystander::start() else { return };
    let scratch = Scratch::new("no-objects");
    let file = |name: &str, bytes: &[u8]| {
        let path = scratch.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let missing = scratch.path().join("missing.bpf.o").to_str().unwrap().to_owned();
    target.refuses("run", &[&missing], &["cannot read", "missing.bpf.o"]);
    target.refuses("run", &[&file("empty", b"")], &["empty", "not an ELF file"]);
    target.refuses("run", &[&file("text", b"hello\n")], &["not an ELF file", "clang -target bpf"]);
    target.refuses("run", &[&file("cut", b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0")], &["cut"]);
    target.refuses("run", &["/bin/sh"], &["/bin/sh", "not a relocatable object"]);
    target.refuses("run", &[scratch.path().to_str().unwrap()], &["cannot read"]);
    target.finish();
}

#[test]
fn programs_that_are_refused() {
    let Some(target) = Bystander::start() else { return };
    let Some(clang) = require(Tool::Clang) else { return };
    let scratch = Scratch::new("programs");
    let object = |name, source| object(&clang, scratch.path(), name, source);

    let nameless = object("nameless", "SEC(\"fentry\") int nothing(void *ctx) { return 0; }");
    target.refuses("run", &[&nameless], &["`nothing`", "names no function", "fentry/FUNCTION"]);
    let unknown = object("unknown", "SEC(\"fentry/spin_stap\") int p(void *ctx) { return 0; }");
    target.refuses("run", &[&unknown], &["`p`", "no such function", "spin_step"]);
    let kind = object("kind", "SEC(\"kprobe/spin_step\") int p(void *ctx) { return 0; }");
    target.refuses("run", &[&kind], &["kprobe"]);
    let wild = "SEC(\"fentry/spin_step\") int p(unsigned long long *ctx)
                { return *(volatile int *)ctx[0]; }";
    let parts = ["invalid mem access", "program p on spin_step", "nothing was changed"];
    let wild = object("wild", wild);
    target.refuses("run", &[&wild], &parts);
    // The report: the line, where the value came from, what to do; with -v all of the log.
    let parts = ["wild.bpf.c", "ctx[0]", "where it came from", "R1 is loaded: any number"];
    target.refuses("run", &[&wild], &parts);
    target.refuses("run", &[&wild], &["to change: ", "bpf_probe_read_user"]);
    let parts = ["verifying program `p` on spin_step", "(limit 1000000)", "0: R1=ctx() R10=fp0"];
    target.refuses("run", &[&wild, "-v"], &parts);
    let output = flea(&["run", "--json", "-p", &target.pid().to_string(), &wild]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let record: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&record["type"], &record["program"]), (&"rejected".into(), &"p".into()));
    assert_eq!(record["story"][0]["what"], "loaded", "{record}");
    assert!(record["hint"].as_str().unwrap().contains("bpf_probe_read_user"), "{record}");
    let endless = "SEC(\"fentry/spin_step\") int p(void *ctx)
                   { for (volatile int i = 0;; i++) ; }";
    target.refuses("run", &[&object("endless", endless)], &["program p on spin_step"]);
    // The second program is what is wrong; the first is not attached either.
    let second = "SEC(\"fentry/spin_step\") int good(void *ctx) { return 0; }
                  SEC(\"fexit/spin_step\") int bad(unsigned long long *ctx) { return ctx[7]; }";
    target.refuses("run", &[&object("second", second)], &["program bad on spin_step"]);
    target.finish();
}
