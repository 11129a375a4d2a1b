//! Programs that make code of their own as they run, traced in their native parts: what they
//! print and how they end is as without.

use std::{fs, path::Path, process::Command};

use anyhow::Result;
use flea_fixtures::{Tool, require};

use crate::{
    scratch::Scratch,
    support::{TempFile, flea},
};

/// Runs it alone and under `flea latency`; what was counted, by function.
fn same_under_flea(words: &[&str], patterns: &[&str], directory: &Path) -> Result<Vec<u64>> {
    let alone = Command::new(words[0]).args(&words[1..]).current_dir(directory).output()?;
    let out = TempFile::new("engine");
    let mut command = flea();
    command.arg("latency").args(patterns).args(["--json", "--output"]).arg(&out.0);
    let traced = command.arg("--").args(words).current_dir(directory).output()?;
    assert_eq!(traced.stdout, alone.stdout, "{traced:?}");
    assert_eq!(traced.status.code(), alone.status.code(), "{traced:?}");
    let records = out.records()?;
    let summary = records.iter().find(|r| r["type"] == "summary").unwrap();
    assert_eq!(summary["missed"], 0, "{summary}");
    let histograms = records.iter().filter(|r| r["type"] == "histogram");
    Ok(histograms.filter_map(|r| r["count"].as_u64()).collect())
}

#[test]
fn node() -> Result<()> {
    let Some(node) = require(Tool::Node) else { return Ok(()) };
    let scratch = Scratch::new("node");
    // Optimised code, a worker with an isolate of its own, collected garbage, an exception.
    let script = r"
        const { Worker } = require('worker_threads'), crypto = require('crypto');
        const fib = n => n < 2 ? n : fib(n - 1) + fib(n - 2);
        let h = '', caught = 0, keep = [];
        for (let i = 0; i < 300; i++) {
            h = crypto.createHash('sha256').update(h + i).digest('hex');
            keep.push(new Array(1000).fill(h));
            if (keep.length > 20) keep = [];
            try { null.x } catch (e) { caught++ }
        }
        const worker = new Worker('process.exitCode = 0; require(`worker_threads`)' +
            '.parentPort.postMessage([...Array(1000).keys()].reduce((a, b) => a + b))',
            { eval: true });
        worker.on('message', m => { console.log(m, fib(25), caught, h); process.exitCode = 5; });
    ";
    fs::write(scratch.path().join("program.js"), script)?;
    let node = node.to_string_lossy();
    let patterns = ["libc.so.6:malloc", "libc.so.6:pthread_mutex_lock", "libc.so.6:mprotect"];
    let counts = same_under_flea(&[&node, "program.js"], &patterns, scratch.path())?;
    assert_eq!(counts.len(), patterns.len());
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    Ok(())
}

/// Too large to be installed for one test: where there is none, that is said.
#[test]
fn java() -> Result<()> {
    let find = |name: &str| Path::new("/usr/bin").join(name).is_file();
    if !find("java") || !find("javac") {
        eprintln!("skipped: there is no java and javac here");
        return Ok(());
    }
    let scratch = Scratch::new("java");
    // The virtual machine answers a null pointer by a handler for SIGSEGV, stops its threads by
    // protecting a page, and compiles what is called often.
    let program = "public class Program {
        static long fib(long n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
        public static void main(String[] args) throws Exception {
            long sum = 0;
            for (int i = 0; i < 8; i++) {
                Thread thread = new Thread(() -> System.gc());
                thread.start();
                sum += fib(24);
                thread.join();
                try { Object none = i < 9 ? null : args; none.toString(); }
                catch (NullPointerException e) { sum++; }
            }
            System.out.println(sum);
            System.exit(6);
        }
    }";
    fs::write(scratch.path().join("Program.java"), program)?;
    let compiled =
        Command::new("javac").arg("Program.java").current_dir(scratch.path()).output()?;
    assert!(compiled.status.success(), "{compiled:?}");
    let patterns = ["libc.so.6:malloc", "libc.so.6:pthread_mutex_lock"];
    let counts = same_under_flea(&["/usr/bin/java", "Program"], &patterns, scratch.path())?;
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
    Ok(())
}
