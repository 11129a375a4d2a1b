//! The list of target programs and of the ways in which they are built. How a compiler is
//! called for each is in `recipe.rs`; what the programs do is said in their sources.

/// A program to be traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Fixture {
    /// `c/counts.c`: C functions of many shapes, called a known number of times.
    CountsC(CBuild),
    /// `cpp/counts.cpp`: overloads, methods, virtual calls, templates, exceptions.
    CountsCpp(CBuild),
    /// `rust/counts.rs`: generics, `&str`, trait objects, panics that are caught.
    CountsRust(RustBuild),
    /// `cpp/throws.cpp`: exceptions and backtraces through functions that may be traced.
    Throws(CBuild),
    /// The same with libgcc's unwinder linked in and stripped, names only in .dynsym.
    ThrowsHidden,
    /// `rust/panics.rs`: panics through functions that may be traced.
    Panics(RustBuild),
    /// `c/ways.c`: jumps, ends of threads, tail calls, recursion, signals.
    WaysC(CBuild),
    /// `c/stacks.c`: coroutines and backtraces; not for musl.
    StacksC(CBuild),
    /// `cpp/ways.cpp`: exceptions, ends of threads, coroutines.
    WaysCpp(CBuild),
    /// `rust/ways.rs`: panics, also through C++ functions, and C++ exceptions through it.
    WaysRust(RustBuild),
    /// `c/plt.c`: an executable that calls `libcounted.so` through its PLT.
    Plt,
    /// The same with `-fno-plt -z now`: calls through the GOT.
    NoPlt,
    /// The same library, loaded with dlopen after the first line on stdin.
    Dlopen,
    /// `asm/odd.S`: entries that a patcher must get right or refuse.
    Odd,
    /// `c/disturb.c`: notices EINTR, signals, changed masks and handlers.
    Disturb,
    /// `c/dies.c`: ends in the middle of calls.
    Dies,
    /// `c/naps.c`: threads and a coroutine stay inside functions for as long as is wanted.
    Naps,
    /// `c/confined.c`: a program under restrictions: seccomp, limits, strange text.
    Confined,
    /// The same with a function in a page of text that may be a huge one.
    ConfinedHuge,
    /// `c/spin.c`: calls one function for ever, also from storms of threads or children.
    Spin,
    /// `c/variadic.c`: variadic functions, called in every way.
    Variadic(CBuild),
    /// A generated program with functions of every `-fpatchable-function-entry=N,M`.
    Entries(CBuild),
    /// The same functions with XRay's sleds at their entries, without XRay's runtime (clang).
    Sleds,
    /// `c/bench_loop.c`: functions to be timed side by side in one process.
    BenchLoop,
    /// `c/stalls.c`: ten thousand functions, and threads that notice how long each call takes.
    Stalls,
    /// `cpp/torture.cpp`: checks all that it does, beside threads, forks, signals and a plug-in.
    /// Beside it are `libtorture_plugin.so` and a live patch, `torture_patch.so`.
    TortureCpp,
    /// `rust/torture.rs`: the same in Rust, with panics and channels.
    TortureRust,
    /// A generated program with this many functions `many_0`, `many_1`, ..., each with a
    /// 5-byte nop at its entry; counts like the others, every function once per call.
    Many(u32),
}

/// How a C or C++ program is compiled. All have DWARF unless it says otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CBuild {
    /// gcc -O0.
    O0,
    /// gcc -O1.
    O1,
    /// gcc -O2, the distribution's default: position independent, dynamic.
    O2,
    /// gcc -O3.
    O3,
    /// gcc -O2 -no-pie.
    NoPie,
    /// gcc -O2 -static: no dynamic loader, addresses fixed.
    Static,
    /// gcc -O2 -static-pie.
    StaticPie,
    /// musl-gcc -O2, dynamic (C only).
    Musl,
    /// musl-gcc -O2 -static (C only).
    MuslStatic,
    /// gcc -O2 -s -rdynamic: no .symtab and no DWARF, names only in .dynsym.
    OnlyDynsym,
    /// gcc -O2 -pg -mfentry -mnop-mcount: one 5-byte nop at entry.
    NopMcount,
    /// gcc -O2 -pg -mfentry: a call of `__fentry__` at entry.
    FentryCall,
    /// gcc -O2 -fpatchable-function-entry=5: five 1-byte nops at entry.
    Patchable5,
    /// gcc -O2 -fpatchable-function-entry=16,5: five nops before the entry, eleven behind.
    Patchable16Before5,
    /// clang -O2 -fpatchable-function-entry=5: one 5-byte nop at entry.
    ClangPatchable5,
    /// clang -O0.
    ClangO0,
    /// clang -O2.
    Clang,
    /// gcc -O2 -fcf-protection=full: endbr64 at entry.
    CfProtection,
    /// gcc -O2 -fcf-protection=full -fpatchable-function-entry=5: nops behind endbr64.
    CfProtectionPatchable5,
}

impl CBuild {
    /// All of them.
    pub const ALL: &'static [Self] = &[
        Self::O0,
        Self::O1,
        Self::O2,
        Self::O3,
        Self::NoPie,
        Self::Static,
        Self::StaticPie,
        Self::Musl,
        Self::MuslStatic,
        Self::OnlyDynsym,
        Self::NopMcount,
        Self::FentryCall,
        Self::Patchable5,
        Self::Patchable16Before5,
        Self::ClangPatchable5,
        Self::ClangO0,
        Self::Clang,
        Self::CfProtection,
        Self::CfProtectionPatchable5,
    ];

    /// Those that C++ programs can be built with: there is no C++ library for musl.
    pub fn all_cpp() -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(|build| !matches!(build, Self::Musl | Self::MuslStatic))
    }

    /// The variant in a file name.
    pub(crate) fn slug(self) -> &'static str {
        match self {
            Self::O0 => "O0",
            Self::O1 => "O1",
            Self::O2 => "O2",
            Self::O3 => "O3",
            Self::NoPie => "no-pie",
            Self::Static => "static",
            Self::StaticPie => "static-pie",
            Self::Musl => "musl",
            Self::MuslStatic => "musl-static",
            Self::OnlyDynsym => "only-dynsym",
            Self::NopMcount => "nop-mcount",
            Self::FentryCall => "fentry-call",
            Self::Patchable5 => "patchable5",
            Self::Patchable16Before5 => "patchable16-5",
            Self::ClangPatchable5 => "clang-patchable5",
            Self::ClangO0 => "clang-O0",
            Self::Clang => "clang",
            Self::CfProtection => "cf-protection",
            Self::CfProtectionPatchable5 => "cf-protection-patchable5",
        }
    }
}

/// How a Rust program is compiled, always with DWARF and v0 symbol names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RustBuild {
    /// -C opt-level=0.
    Debug,
    /// -C opt-level=3.
    Release,
}

impl RustBuild {
    /// All of them.
    pub const ALL: &'static [Self] = &[Self::Debug, Self::Release];

    pub(crate) fn slug(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Release => "release",
        }
    }
}

impl Fixture {
    /// Every fixture in every variant (with two sizes of [`Fixture::Many`]).
    pub fn all() -> Vec<Self> {
        let mut all: Vec<Self> = CBuild::ALL.iter().map(|b| Self::CountsC(*b)).collect();
        all.extend(CBuild::all_cpp().map(Self::CountsCpp));
        all.extend(RustBuild::ALL.iter().map(|b| Self::CountsRust(*b)));
        all.extend([
            Self::Throws(CBuild::O2),
            Self::Throws(CBuild::Static),
            Self::ThrowsHidden,
            Self::Panics(RustBuild::Debug),
            Self::WaysC(CBuild::O2),
            Self::StacksC(CBuild::O2),
            Self::WaysCpp(CBuild::O2),
            Self::WaysRust(RustBuild::Release),
            Self::Plt,
            Self::NoPlt,
            Self::Dlopen,
            Self::Odd,
            Self::Disturb,
            Self::Dies,
            Self::Naps,
            Self::Confined,
            Self::ConfinedHuge,
            Self::Spin,
            Self::Variadic(CBuild::O0),
            Self::Variadic(CBuild::O2),
            Self::Variadic(CBuild::ClangO0),
            Self::Variadic(CBuild::Clang),
            Self::Entries(CBuild::O1),
            Self::Entries(CBuild::O2),
            Self::Entries(CBuild::CfProtection),
            Self::Entries(CBuild::Clang),
            Self::Sleds,
            Self::BenchLoop,
            Self::Stalls,
            Self::TortureCpp,
            Self::TortureRust,
            Self::Many(100),
            Self::Many(10_000),
        ]);
        all
    }

    /// The file name of the program: short where people type it, unique with its variant.
    pub fn program_name(self) -> String {
        match self {
            Self::CountsC(build) => format!("counts-c-{}", build.slug()),
            Self::CountsCpp(build) => format!("counts-cpp-{}", build.slug()),
            Self::CountsRust(build) => format!("counts-rust-{}", build.slug()),
            Self::Throws(build) => format!("throws-{}", build.slug()),
            Self::ThrowsHidden => "throws-hidden".into(),
            Self::Panics(build) => format!("panics-{}", build.slug()),
            Self::WaysC(build) => format!("ways-c-{}", build.slug()),
            Self::StacksC(build) => format!("stacks-{}", build.slug()),
            Self::WaysCpp(build) => format!("ways-cpp-{}", build.slug()),
            Self::WaysRust(build) => format!("ways-rust-{}", build.slug()),
            Self::Plt => "plt".into(),
            Self::NoPlt => "no-plt".into(),
            Self::Dlopen => "dlopen".into(),
            Self::Odd => "odd".into(),
            Self::Disturb => "disturb".into(),
            Self::Dies => "dies".into(),
            Self::Naps => "naps".into(),
            Self::Confined => "confined".into(),
            Self::ConfinedHuge => "confined-huge".into(),
            Self::Spin => "spin".into(),
            Self::Variadic(build) => format!("variadic-{}", build.slug()),
            Self::Entries(build) => format!("entries-{}", build.slug()),
            Self::Sleds => "sleds".into(),
            Self::BenchLoop => "bench_loop".into(),
            Self::Stalls => "stalls".into(),
            Self::TortureCpp => "torture-cpp".into(),
            Self::TortureRust => "torture-rust".into(),
            Self::Many(n) => format!("many-{n}"),
        }
    }
}
