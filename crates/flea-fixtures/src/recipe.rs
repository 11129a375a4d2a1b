//! How each fixture is compiled, as data: the files to write and the commands to run in a
//! fresh directory. Running them, and not running them twice, is `cache.rs`'s.

use std::fmt::Write as _;

use crate::entries::{self, Entry};
use crate::{CBuild, Fixture, RustBuild, Tool, variadic};

/// A source file, by its name in the build directory.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub name: &'static str,
    pub text: String,
}

/// One run of a compiler.
#[derive(Debug, Clone)]
pub(crate) struct Step {
    pub tool: Tool,
    pub args: Vec<String>,
}

/// Everything that decides what a fixture becomes.
#[derive(Debug, Clone)]
pub(crate) struct Recipe {
    pub program: String,
    pub sources: Vec<Source>,
    pub steps: Vec<Step>,
}

macro_rules! source {
    ($dir:literal, $name:literal) => {
        Source { name: $name, text: include_str!(concat!($dir, "/", $name)).to_owned() }
    };
}

/// Flags of a build that the compiler and the linker see.
struct Flags {
    tool: Tool,
    compile: &'static str,
    link: &'static str,
}

fn c_flags(build: CBuild) -> Flags {
    let (tool, compile, link) = match build {
        CBuild::O0 => (Tool::Gcc, "-O0", ""),
        CBuild::O1 => (Tool::Gcc, "-O1", ""),
        CBuild::O2 => (Tool::Gcc, "-O2", ""),
        CBuild::O3 => (Tool::Gcc, "-O3", ""),
        CBuild::NoPie => (Tool::Gcc, "-O2 -fno-pie", "-no-pie"),
        CBuild::Static => (Tool::Gcc, "-O2 -fno-pie", "-static"),
        CBuild::StaticPie => (Tool::Gcc, "-O2 -fPIE", "-static-pie"),
        CBuild::Musl => (Tool::MuslGcc, "-O2", ""),
        CBuild::MuslStatic => (Tool::MuslGcc, "-O2", "-static"),
        CBuild::OnlyDynsym => (Tool::Gcc, "-O2", "-s -rdynamic"),
        // gcc has no -mnop-mcount for position independent code. -pg is left out of the
        // link: it would bring a profiler along.
        CBuild::NopMcount => (Tool::Gcc, "-O2 -fno-pie -pg -mfentry -mnop-mcount", "-no-pie"),
        CBuild::FentryCall => (Tool::Gcc, "-O2 -pg -mfentry", ""),
        CBuild::Patchable5 => (Tool::Gcc, "-O2 -fpatchable-function-entry=5", ""),
        CBuild::Patchable16Before5 => (Tool::Gcc, "-O2 -fpatchable-function-entry=16,5", ""),
        CBuild::ClangPatchable5 => (Tool::Clang, "-O2 -fPIE -fpatchable-function-entry=5", "-pie"),
        CBuild::ClangO0 => (Tool::Clang, "-O0 -fPIE", "-pie"),
        CBuild::Clang => (Tool::Clang, "-O2 -fPIE", "-pie"),
        CBuild::CfProtection => (Tool::Gcc, "-O2 -fcf-protection=full", ""),
        CBuild::CfProtectionPatchable5 => {
            (Tool::Gcc, "-O2 -fcf-protection=full -fpatchable-function-entry=5", "")
        }
    };
    Flags { tool, compile, link }
}

fn words(text: &str) -> impl Iterator<Item = String> {
    text.split_whitespace().map(str::to_owned)
}

/// Compile and link apart, because some flags are for one of the two only.
fn c_steps(flags: &Flags, source: &str, objects: &str, program: &str) -> Vec<Step> {
    let mut compile: Vec<String> = words("-g -Wall -Wextra -pthread -c").collect();
    compile.extend(words(flags.compile));
    compile.extend([source.to_owned(), "-o".into(), "main.o".into()]);
    let mut link: Vec<String> = words("-g -pthread main.o").collect();
    link.extend(words(objects));
    link.extend(words(flags.link));
    link.extend(["-o".into(), program.to_owned()]);
    vec![Step { tool: flags.tool, args: compile }, Step { tool: flags.tool, args: link }]
}

fn cpp_steps(flags: Flags, source: &str, program: &str) -> Vec<Step> {
    let tool = match flags.tool {
        Tool::Clang => Tool::Clangxx,
        _ => Tool::Gxx,
    };
    c_steps(&Flags { tool, ..flags }, source, "", program)
}

fn rust_steps(build: RustBuild, name: &str, program: &str) -> Vec<Step> {
    let opt = match build {
        RustBuild::Debug => "0",
        RustBuild::Release => "3",
    };
    let mut args: Vec<String> = words("--edition 2024 -g --crate-name").collect();
    args.push(name.into());
    args.extend(words("-C symbol-mangling-version=v0 -C codegen-units=1 -C panic=unwind"));
    args.extend(["-C".into(), format!("opt-level={opt}"), format!("{name}.rs")]);
    args.extend(["-o".into(), program.to_owned()]);
    vec![Step { tool: Tool::Rustc, args }]
}

fn library_steps(compile: &'static str, link: &'static str, program: &str) -> Vec<Step> {
    let flags = "-g -O2 -Wall -Wextra -fPIC -shared counted_lib.c -o libcounted.so";
    let mut steps = vec![Step { tool: Tool::Gcc, args: words(flags).collect() }];
    let flags = Flags { tool: Tool::Gcc, compile, link };
    steps.extend(c_steps(&flags, "plt.c", "", program));
    steps
}

/// One function per line and a table of them; the harness's names would not fit.
fn many_source(n_functions: u32) -> String {
    let mut text = String::from(
        "/* Generated: many functions, each with a 5-byte nop at its entry.\n \
         * usage: many CALLS [wait]; as harness.h, with one total for all functions. */\n\
         #include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n",
    );
    for i in 0..n_functions {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "__attribute__((noinline, no_icf)) long many_{i}(long x) \
             {{ __asm__ volatile(\"\" ::: \"memory\"); return x + {i}; }}"
        );
    }
    text.push_str("static long (*const all[])(long) = {\n");
    for i in 0..n_functions {
        let _ = writeln!(text, "many_{i},");
    }
    text.push_str(concat!(
        "};\n",
        "enum { N = sizeof all / sizeof *all };\n",
        "static void wait_line(void) { char l[64]; if (!fgets(l, sizeof l, stdin)) exit(9); }\n",
        "static void say(const char *s) { puts(s); fflush(stdout); }\n",
        "int main(int argc, char **argv)\n{\n",
        "    long calls = argc > 1 ? atol(argv[1]) : 1, errors = 0;\n",
        "    int waits = argc > 2 && !strcmp(argv[2], \"wait\");\n",
        "    if (waits) { say(\"ready\"); wait_line(); }\n",
        "    for (long c = 0; c < calls; c++)\n",
        "        for (long i = 0; i < N; i++)\n",
        "            errors += all[i](c) != c + i;\n",
        "    printf(\"{\\\"threads\\\":1,\\\"calls\\\":%ld,\\\"errors\\\":%ld,\\\"functions\\\":\"\n",
        "           \"{\\\"many_*\\\":{\\\"count\\\":%ld}}}\\n\", calls, errors, calls * N);\n",
        "    fflush(stdout);\n",
        "    if (waits) { say(\"done\"); wait_line(); }\n",
        "    return errors ? 3 : waits ? 7 : 0;\n}\n",
    ));
    text
}

fn simple(program: &str, source: &str, objects: &str) -> Vec<Step> {
    let flags = Flags { tool: Tool::Gcc, compile: "-O2", link: "" };
    c_steps(&flags, source, objects, program)
}

fn torture_steps(program: &str) -> Vec<Step> {
    let flags = Flags { tool: Tool::Gcc, compile: "-O2 -std=c++20", link: "-ldl" };
    let mut steps = cpp_steps(flags, "torture.cpp", program);
    for (source, library) in
        [("torture_plugin.cpp", "libtorture_plugin.so"), ("torture_patch.cpp", "torture_patch.so")]
    {
        let mut args: Vec<String> = words("-g -O2 -Wall -Wextra -fPIC -shared").collect();
        args.extend([source.to_owned(), "-o".into(), library.to_owned()]);
        steps.push(Step { tool: Tool::Gxx, args });
    }
    steps
}

/// What to write and what to run for `fixture`.
pub(crate) fn recipe(fixture: Fixture) -> Recipe {
    let program = fixture.program_name();
    let harness = source!("c", "harness.h");
    let library = || {
        vec![
            source!("c", "harness.h"),
            source!("c", "counted_lib.h"),
            source!("c", "counted_lib.c"),
            source!("c", "plt.c"),
        ]
    };
    let (sources, steps) = match fixture {
        Fixture::CountsC(build) => (
            vec![harness, source!("c", "counts.c")],
            c_steps(&c_flags(build), "counts.c", "", &program),
        ),
        Fixture::CountsCpp(build) => {
            let sources = vec![harness, source!("cpp", "counts.cpp")];
            (sources, cpp_steps(c_flags(build), "counts.cpp", &program))
        }
        Fixture::CountsRust(build) => {
            (vec![source!("rust", "counts.rs")], rust_steps(build, "counts", &program))
        }
        Fixture::Throws(build) => {
            (vec![source!("cpp", "throws.cpp")], cpp_steps(c_flags(build), "throws.cpp", &program))
        }
        Fixture::ThrowsHidden => {
            let link = "-static-libgcc -static-libstdc++ -s -rdynamic";
            let flags = Flags { tool: Tool::Gcc, compile: "-O2", link };
            (vec![source!("cpp", "throws.cpp")], cpp_steps(flags, "throws.cpp", &program))
        }
        Fixture::Panics(build) => {
            (vec![source!("rust", "panics.rs")], rust_steps(build, "panics", &program))
        }
        Fixture::WaysC(build) => {
            let sources = vec![source!("c", "ways.h"), source!("c", "ways.c")];
            (sources, c_steps(&c_flags(build), "ways.c", "", &program))
        }
        Fixture::StacksC(build) => {
            let sources = vec![source!("c", "ways.h"), source!("c", "stacks.c")];
            (sources, c_steps(&c_flags(build), "stacks.c", "", &program))
        }
        Fixture::WaysCpp(build) => {
            let sources = vec![source!("c", "ways.h"), source!("cpp", "ways.cpp")];
            let mut steps = cpp_steps(c_flags(build), "ways.cpp", &program);
            steps[0].args.push("-std=c++20".into());
            (sources, steps)
        }
        Fixture::WaysRust(build) => {
            let sources = vec![source!("rust", "ways.rs"), source!("cpp", "foreign.cpp")];
            let args = words("-g -O2 -c foreign.cpp -o foreign.o").collect();
            let mut steps = rust_steps(build, "ways", &program);
            steps[0].args.extend(words("-C link-arg=foreign.o -C link-arg=-lstdc++"));
            steps.insert(0, Step { tool: Tool::Gxx, args });
            (sources, steps)
        }
        Fixture::Plt => {
            let link = "-L. -lcounted -Wl,-z,lazy -Wl,-rpath,$ORIGIN";
            (library(), library_steps("-O2", link, &program))
        }
        Fixture::NoPlt => {
            let link = "-L. -lcounted -Wl,-z,now -Wl,-rpath,$ORIGIN";
            (library(), library_steps("-O2 -fno-plt", link, &program))
        }
        Fixture::Dlopen => (library(), library_steps("-O2 -DUSE_DLOPEN", "-ldl", &program)),
        Fixture::Odd => {
            let mut steps = simple(&program, "odd.c", "odd.o");
            let args = words("-g -c odd.S -o odd.o").collect();
            steps.insert(0, Step { tool: Tool::Gcc, args });
            (vec![harness, source!("c", "odd.c"), source!("asm", "odd.S")], steps)
        }
        Fixture::Disturb => (vec![source!("c", "disturb.c")], simple(&program, "disturb.c", "")),
        Fixture::Dies => (vec![source!("c", "dies.c")], simple(&program, "dies.c", "")),
        Fixture::Naps => (vec![source!("c", "naps.c")], simple(&program, "naps.c", "")),
        Fixture::Confined => (vec![source!("c", "confined.c")], simple(&program, "confined.c", "")),
        Fixture::ConfinedHuge => {
            let link = "-Wl,-z,max-page-size=2097152";
            let flags = Flags { tool: Tool::Gcc, compile: "-O2 -DHUGE", link };
            (vec![source!("c", "confined.c")], c_steps(&flags, "confined.c", "", &program))
        }
        Fixture::Spin => (vec![source!("c", "spin.c")], simple(&program, "spin.c", "")),
        Fixture::Variadic(build) => {
            let calls = Source { name: "variadic_calls.h", text: variadic::calls() };
            let sources = vec![source!("c", "variadic.c"), calls];
            (sources, c_steps(&c_flags(build), "variadic.c", "", &program))
        }
        Fixture::Entries(build) => {
            let sources = vec![Source { name: "entries.c", text: entries::source(Entry::Nops) }];
            (sources, c_steps(&c_flags(build), "entries.c", "", &program))
        }
        Fixture::Sleds => {
            // The flag is for the compiler alone: the linker would add XRay's runtime.
            let compile = "-O2 -fPIE -fxray-instrument -fxray-instruction-threshold=1";
            let flags = Flags { tool: Tool::Clang, compile, link: "-pie" };
            let text = entries::source(Entry::AsFlagsSay);
            (vec![Source { name: "sleds.c", text }], c_steps(&flags, "sleds.c", "", &program))
        }
        Fixture::BenchLoop => {
            (vec![source!("c", "bench_loop.c")], simple(&program, "bench_loop.c", ""))
        }
        Fixture::Stalls => {
            // Entries that are several instructions: who stands between them has to be moved.
            let compile = "-O1 -fno-omit-frame-pointer";
            let flags = Flags { tool: Tool::Gcc, compile, link: "" };
            (vec![source!("c", "stalls.c")], c_steps(&flags, "stalls.c", "", &program))
        }
        Fixture::TortureCpp => (
            vec![
                source!("cpp", "torture.h"),
                source!("cpp", "torture.cpp"),
                source!("cpp", "torture_plugin.cpp"),
                source!("cpp", "torture_patch.cpp"),
            ],
            torture_steps(&program),
        ),
        Fixture::TortureRust => {
            let steps = rust_steps(RustBuild::Release, "torture", &program);
            (vec![source!("rust", "torture.rs")], steps)
        }
        Fixture::Many(n) => {
            let compile = "-O1 -fno-pie -pg -mfentry -mnop-mcount";
            let flags = Flags { tool: Tool::Gcc, compile, link: "-no-pie" };
            let sources = vec![Source { name: "many.c", text: many_source(n) }];
            (sources, c_steps(&flags, "many.c", "", &program))
        }
    };
    Recipe { program, sources, steps }
}
