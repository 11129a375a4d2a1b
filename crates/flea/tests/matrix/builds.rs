//! The compilers and flags of the matrix, and programs made with them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use flea_fixtures::{Tool, require};

use crate::generate::{Dialect, Language};

/// One way to compile.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    pub compiler: Compiler,
    pub language: Language,
    pub opt: &'static str,
    pub isa: Isa,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compiler {
    Gcc,
    Clang,
}

/// Vector registers that the program may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    Sse2,
    Avx,
    Avx2,
    Avx512,
}

impl Isa {
    fn flag(self) -> Option<&'static str> {
        match self {
            Self::Sse2 => None,
            Self::Avx => Some("-mavx"),
            Self::Avx2 => Some("-mavx2"),
            Self::Avx512 => Some("-mavx512f"),
        }
    }

    /// Whether this machine can run it.
    pub fn is_here(self) -> bool {
        match self {
            Self::Sse2 => true,
            Self::Avx => is_x86_feature_detected!("avx"),
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            Self::Avx512 => is_x86_feature_detected!("avx512f"),
        }
    }
}

/// All of one compiler and language: every optimisation level without AVX and with some.
pub fn builds(compiler: Compiler, language: Language) -> Vec<Build> {
    let wide = [Isa::Avx, Isa::Avx2, Isa::Avx512, Isa::Avx];
    let mut builds = Vec::new();
    for (opt, wide) in ["-O0", "-O1", "-O2", "-O3"].into_iter().zip(wide) {
        // The second AVX-512 build in four, so that each compiler has both languages with it.
        for isa in [Isa::Sse2, wide] {
            builds.push(Build { compiler, language, opt, isa });
        }
    }
    builds
}

impl Build {
    /// What its sources may use.
    pub fn dialect(self) -> Dialect {
        Dialect {
            language: self.language,
            has_nested: self.compiler == Compiler::Gcc,
            has_variadic_int128: self.compiler == Compiler::Gcc,
            as_clang: self.compiler == Compiler::Clang,
            vector_bytes: match self.isa {
                Isa::Sse2 => 16,
                Isa::Avx | Isa::Avx2 => 32,
                Isa::Avx512 => 64,
            },
        }
    }

    fn tool(self) -> Tool {
        match (self.compiler, self.language) {
            (Compiler::Gcc, Language::C) => Tool::Gcc,
            (Compiler::Gcc, Language::Cpp) => Tool::Gxx,
            (Compiler::Clang, Language::C) => Tool::Clang,
            (Compiler::Clang, Language::Cpp) => Tool::Clangxx,
        }
    }

    fn source_name(self) -> &'static str {
        match self.language {
            Language::C => "matrix.c",
            Language::Cpp => "matrix.cpp",
        }
    }

    /// What the compiler is told; warnings are off because the sources are odd on purpose.
    /// DWARF 4 and 5 take turns, and so do sites: relocated prologues, nops, `endbr64`.
    pub fn flags(self) -> Vec<&'static str> {
        let more: &[&str] = match (self.opt, self.isa) {
            ("-O1", Isa::Sse2) => &["-gdwarf-4", "-fpatchable-function-entry=5"],
            ("-O2", Isa::Sse2) => &["-gdwarf-5", "-fcf-protection=full"],
            ("-O1" | "-O3", _) => &["-gdwarf-4"],
            _ => &["-gdwarf-5"],
        };
        let mut flags = vec!["-m64", self.opt, "-g", "-w", "-fPIE", "-pie", "-Wl,-z,now"];
        flags.extend(more);
        flags.extend(self.isa.flag());
        flags
    }

    /// For file names and messages.
    pub fn slug(self) -> String {
        let (tool, isa) = (self.tool().name(), self.isa.flag().unwrap_or("-sse2"));
        format!("{tool}{}{isa}", self.opt)
    }

    /// Compiles `text` in a directory of this build's own, unless it was compiled before.
    /// `None`, said on stderr, where there is no such compiler.
    ///
    /// The directory is locked until the result is dropped: several runs of the test share it.
    pub fn compile(self, text: &str) -> Result<Option<Built>> {
        let (Some(tool), Some(gcc)) = (require(self.tool()), require(Tool::Gcc)) else {
            return Ok(None);
        };
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("matrix").join(self.slug());
        fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        let lock = File::create(dir.join("lock"))?;
        lock.lock().context("locking a build of the matrix")?;
        let built = Built { program: dir.join("matrix"), dir, _lock: lock };
        let flags = self.flags();
        let version = Command::new(&tool).arg("--version").output()?.stdout;
        let key = format!("{flags:?} {version:?} {HARNESS}{ENTER}{text}");
        let key_path = built.dir.join("key");
        if built.program.exists() && fs::read_to_string(&key_path).is_ok_and(|k| k == key) {
            return Ok(Some(built));
        }
        // A key without its program, or with an older one, would be believed.
        let _ = fs::remove_file(&key_path);
        fs::write(built.dir.join("harness.c"), HARNESS)?;
        fs::write(built.dir.join("enter.S"), ENTER)?;
        fs::write(built.dir.join(self.source_name()), text)?;
        let harness = ["-O1", "-w", "-fPIE", "-mgeneral-regs-only", "-c", "harness.c", "enter.S"];
        run(&gcc, &harness, &built.dir)?;
        let mut all = flags;
        all.extend([self.source_name(), "harness.o", "enter.o", "-o", "matrix"]);
        run(&tool, &all, &built.dir)?;
        fs::write(&key_path, key)?;
        Ok(Some(built))
    }
}

const HARNESS: &str = include_str!("harness.c");
const ENTER: &str = include_str!("enter.S");

/// A compiled program of the matrix.
pub struct Built {
    pub program: PathBuf,
    /// Its directory, for the program's input and output.
    pub dir: PathBuf,
    _lock: File,
}

fn run(tool: &Path, args: &[&str], dir: &Path) -> Result<()> {
    let output = Command::new(tool)
        .args(args)
        .current_dir(dir)
        .output()
        .with_context(|| format!("running {}", tool.display()))?;
    if !output.status.success() {
        bail!(
            "in {}: {} {} failed ({}):\n{}",
            dir.display(),
            tool.display(),
            args.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(())
}
