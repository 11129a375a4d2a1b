//! Targets and functions that there are not, or that cannot be traced.

use std::{os::unix::process::CommandExt as _, path::Path, process::Command, time::Duration};

use flea_fixtures::{Fixture, Running, build};
use nix::{sys::ptrace, unistd::Pid};

use crate::{
    refusal::{Bystander, flea, refuses, said},
    scratch::Scratch,
};

#[test]
fn functions_that_there_are_not() {
    let Some(target) = Bystander::start() else { return };
    target.refuses("count", &["spin_stap"], &["`spin_stap`: no such function", "spin_step"]);
    target.refuses("latency", &["libc.so.6:mallox"], &["did you mean", "malloc"]);
    target.refuses("trace", &["no_function_is_called_so*"], &["no such function", "flea list"]);
    target.refuses("list", &["libc.so.6:qqqqqqqqqq"], &["no such function"]);
    let module = ["`libnone.so:malloc`: no loaded module has that name", "libc.so.6", "spin"];
    target.refuses("count", &["libnone.so:malloc"], &module);
    target.refuses("count", &["spin_step", "spin_stap"], &["spin_stap", "did you mean"]);
    target.refuses("hist", &["spin_step", "arg9"], &["no value `arg9`", "spin_step(long"]);
    target.refuses("hist", &["spin_step", "size"], &["no value `size`", "retval"]);
    target.refuses("hist", &["libc.so.6:mem*", "arg0"], &["functions", "name one"]);
    target.finish();
}

#[test]
fn sites_that_are_refused() {
    let Some(target) = Bystander::start() else { return };
    target.refuses("count", &["libc.so.6:memcpy"], &["memcpy", "ifunc", "nothing was changed"]);
    target.refuses("latency", &["libc.so.6:vfork"], &["vfork", "return address", "flea count"]);
    // Without debug information, and with the words behind its return address on its mind.
    target.refuses("latency", &["_start"], &["_start", "stack arguments"]);
    target.finish();
}

#[test]
fn processes_that_there_are_not() {
    // Beyond the largest number that the kernel gives.
    refuses(&mut flea(&["count", "-p", "99999999", "main"]), 1, &["no process 99999999"]);
    refuses(&mut flea(&["ps", "-p", "99999999"]), 1, &["no process 99999999"]);
    refuses(&mut flea(&["detach", "99999999"]), 1, &["no process 99999999"]);
    if std::fs::read_to_string("/proc/2/comm").is_ok_and(|comm| comm == "kthreadd\n") {
        refuses(&mut flea(&["count", "-p", "2", "main"]), 1, &["2 is a kernel thread"]);
    } else {
        eprintln!("skipped: no kernel thread is to be seen here");
    }
    let Some(target) = Bystander::start() else { return };
    let threads = std::fs::read_dir(format!("/proc/{}/task", target.pid())).unwrap();
    let names = threads.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let pid = target.pid().to_string();
    let thread = names.into_iter().find(|name| *name != pid).unwrap();
    let parts = [&format!("{thread} is a thread of process {pid}")[..], &format!("give {pid}")];
    refuses(&mut flea(&["count", "-p", &thread, "main"]), 1, &parts);
    refuses(&mut flea(&["detach", &pid]), 1, &[&pid, "nothing like that", "flea ps"]);
    target.assert_untouched();
    target.finish();
}

#[test]
fn a_process_that_has_ended_and_waits_for_its_parent() {
    // `exec` keeps the child, and the second `sleep` does not wait for it.
    let script = "sleep 0.3 & echo $!; exec sleep 600";
    let mut parent = Running::start(Command::new("sh").args(["-c", script])).unwrap();
    let zombie = parent.line().unwrap();
    let state = || std::fs::read_to_string(format!("/proc/{zombie}/stat")).unwrap();
    while !state().contains(") Z ") {
        std::thread::sleep(Duration::from_millis(5));
    }
    refuses(&mut flea(&["count", "-p", &zombie, "main"]), 1, &["has ended already", &zombie]);
}

#[test]
fn a_process_that_somebody_else_traces() {
    let Some(target) = Bystander::start() else { return };
    let pid = Pid::from_raw(target.pid().cast_signed());
    ptrace::seize(pid, ptrace::Options::empty()).unwrap();
    let number = target.pid().to_string();
    let words = ["is traced by", "one tracer at a time", &number];
    refuses(&mut flea(&["count", "-p", &number, "spin_step"]), 1, &words);
    ptrace::interrupt(pid).unwrap();
    nix::sys::wait::waitpid(pid, None).unwrap();
    ptrace::detach(pid, None).unwrap();
    target.assert_untouched();
    let again = flea(&["count", "-p", &number, "--duration", "0", "spin_step"]).output().unwrap();
    assert!(again.status.success(), "{}", said(&again));
    target.finish();
}

#[test]
fn a_process_of_somebody_else() {
    const NOBODY: u32 = 65534;
    let (target, scratch) = (Bystander::start(), Scratch::new("nobody"));
    let Some(target) = target else { return };
    let pid = target.pid().to_string();
    if nix::unistd::geteuid().is_root() {
        let copy = scratch.path().join("flea");
        std::fs::copy(env!("CARGO_BIN_EXE_flea"), &copy).unwrap();
        for args in [&["count", "spin_step", "-p", &pid][..], &["ps", "-p", &pid]] {
            let mut command = Command::new(&copy);
            command.args(args).uid(NOBODY).gid(NOBODY).current_dir("/");
            refuses(&mut command, 1, &["ermission denied", "root", &pid]);
        }
        target.assert_untouched();
    } else {
        refuses(&mut flea(&["count", "main", "-p", "1"]), 1, &["root"]);
    }
    target.finish();
}

/// A static i386 program that calls pause(2) for ever.
fn i386_program(directory: &Path) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    let code = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7]; // mov eax, 29; int 0x80; jmp
    let mut bytes = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |bytes: &mut Vec<u8>, n: u16| bytes.extend(n.to_le_bytes());
    let word = |bytes: &mut Vec<u8>, n: u32| bytes.extend(n.to_le_bytes());
    half(&mut bytes, 2); // ET_EXEC
    half(&mut bytes, 3); // EM_386
    for n in [1, BASE + HEADERS, 52, 0, 0] {
        word(&mut bytes, n); // version, entry, program headers, section headers, flags
    }
    for n in [52, 32, 1, 0, 0, 0] {
        half(&mut bytes, n); // sizes and numbers of the headers
    }
    let size = HEADERS + u32::try_from(code.len()).unwrap();
    for n in [1, 0, BASE, BASE, size, size, 5, 0x1000] {
        word(&mut bytes, n); // one PT_LOAD, read and execute
    }
    bytes.extend(code);
    let path = directory.join("i386");
    std::fs::write(&path, bytes).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn a_32_bit_process() {
    let scratch = Scratch::new("i386");
    let program = i386_program(scratch.path());
    let running = match Running::start(&mut Command::new(&program)) {
        Ok(running) => running,
        Err(error) => {
            eprintln!("skipped: this kernel runs no 32-bit programs: {error:#}");
            return;
        }
    };
    let pid = running.pid().to_string();
    let parts = ["runs a 32-bit program", "only 64-bit"];
    refuses(&mut flea(&["count", "-p", &pid, "main"]), 1, &parts);
    refuses(&mut flea(&["list", "-p", &pid, "*"]), 1, &parts);
    // Started by Flea, it does not outlive the refusal.
    refuses(&mut flea(&["count", "main", "--", program.to_str().unwrap()]), 1, &parts);
    drop(running);
}

#[test]
fn a_target_that_ends_in_the_middle() {
    let Some(program) = build(Fixture::Dies) else { return };
    for how in ["exit", "abort", "segv", "kill"] {
        let mut running = Running::start(Command::new(&program).args(["1500", how])).unwrap();
        running.expect_line("ready").unwrap();
        let pid = running.pid().to_string();
        let output = flea(&["count", "step", "--json", "-p", &pid]).output().unwrap();
        let said = said(&output);
        assert!(said.contains(&format!("process {pid} has ended")), "{how}: {said}");
        // What was counted until then is printed all the same.
        let results = String::from_utf8(output.stdout).unwrap();
        assert!(results.contains(r#""function":"step","count":"#), "{how}: {results:?} {said}");
        assert!(results.contains(r#""type":"summary","attached":1"#), "{how}: {results:?}");
        // Ended by itself or by somebody: that is for the one who traces to know.
        let code = if how == "exit" { 0 } else { 1 };
        assert_eq!(output.status.code(), Some(code), "{how}: {said}");
        running.wait().unwrap();
    }
}
