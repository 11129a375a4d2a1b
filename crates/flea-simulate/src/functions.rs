//! The functions of the made-up process: one for each kind of entry that can be patched, and
//! different ways in which its instructions lie over the bytes that change.

use flea::registry::{FunctionState, SiteKind, StackArgs};
use flea_symbols::addr::RemoteAddr;

/// Where the first function is, and how far apart they are.
pub const TEXT: u64 = 0x40_0000;
/// Bytes from one function to the next.
pub const STRIDE: u64 = 0x40;

/// One kind of function.
#[derive(Debug)]
pub struct Layout {
    /// Its name.
    pub name: &'static str,
    kind: SiteKind,
    /// All of its instructions, from the site on.
    pub bytes: &'static [u8],
    /// Lengths of those that are replaced.
    pub lens: &'static [u8],
    /// Where it is entered.
    entry: u64,
    door: Option<u64>,
}

/// Each sleeps once, in `pause`, which stands for any system call.
pub const LAYOUTS: [Layout; 8] = [
    Layout {
        name: "one nop",
        kind: SiteKind::Nop,
        bytes: &[0x0f, 0x1f, 0x44, 0, 0, 0xf3, 0x90, 0xc3],
        lens: &[5],
        entry: 0,
        door: None,
    },
    Layout {
        name: "five nops",
        kind: SiteKind::Nop,
        bytes: &[0x90, 0x90, 0x90, 0x90, 0x90, 0xf3, 0x90, 0xc3],
        lens: &[1, 1, 1, 1, 1],
        entry: 0,
        door: None,
    },
    Layout {
        name: "two nops",
        kind: SiteKind::Nop,
        bytes: &[0x66, 0x90, 0x0f, 0x1f, 0x40, 0, 0xf3, 0x90, 0xc3],
        lens: &[2, 4],
        entry: 0,
        door: None,
    },
    // push rbp; mov rbp, rsp; push rbx | pause; pop rbx; pop rbp; ret
    Layout {
        name: "prologue",
        kind: SiteKind::Relocated,
        bytes: &[0x55, 0x48, 0x89, 0xe5, 0x53, 0xf3, 0x90, 0x5b, 0x5d, 0xc3],
        lens: &[1, 3, 1],
        entry: 0,
        door: None,
    },
    // sub rsp, 24; mov [rsp+8], rdi | pause; add rsp, 24; ret
    Layout {
        name: "frame",
        kind: SiteKind::Relocated,
        bytes: &[
            0x48, 0x83, 0xec, 24, 0x48, 0x89, 0x7c, 0x24, 8, 0xf3, 0x90, 0x48, 0x83, 0xc4, 24, 0xc3,
        ],
        lens: &[4, 5],
        entry: 0,
        door: None,
    },
    // push rbx; push rbp; sub rsp, 8 | pause; add rsp, 8; pop rbp; pop rbx; ret
    Layout {
        name: "pushes",
        kind: SiteKind::Relocated,
        bytes: &[
            0x53, 0x55, 0x48, 0x83, 0xec, 8, 0xf3, 0x90, 0x48, 0x83, 0xc4, 8, 0x5d, 0x5b, 0xc3,
        ],
        lens: &[1, 1, 4],
        entry: 0,
        door: None,
    },
    // mov rax, 42 | pause; ret
    Layout {
        name: "constant",
        kind: SiteKind::Relocated,
        bytes: &[0x48, 0xc7, 0xc0, 42, 0, 0, 0, 0xf3, 0x90, 0xc3],
        lens: &[7],
        entry: 0,
        door: None,
    },
    // Nops before the entry; then endbr64 and the door.
    Layout {
        name: "door",
        kind: SiteKind::Nop,
        bytes: &[
            0x90, 0x90, 0x90, 0x90, 0x90, 0xf3, 0x0f, 0x1e, 0xfa, 0x90, 0x90, 0xf3, 0x90, 0xc3,
        ],
        lens: &[1, 1, 1, 1, 1, 4, 1, 1],
        entry: 5,
        door: Some(9),
    },
];

/// A function of the process.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    /// Its kind.
    pub layout: &'static Layout,
    /// Where its site is.
    pub site: u64,
}

impl Function {
    /// Number `index`.
    #[must_use]
    pub fn new(index: usize, layout: &'static Layout) -> Self {
        Self { layout, site: TEXT + STRIDE * index as u64 }
    }

    /// Where it is called.
    #[must_use]
    pub fn entry(&self) -> u64 {
        self.site + self.layout.entry
    }

    /// The bytes that a patch replaces.
    #[must_use]
    pub fn original(&self) -> &'static [u8] {
        let n_bytes = self.layout.lens.iter().copied().map(usize::from).sum();
        &self.layout.bytes[..n_bytes]
    }

    /// The instructions that a patch replaces: where each is, and its bytes.
    pub fn replaced(&self) -> impl Iterator<Item = (u64, &'static [u8])> + use<> {
        let (site, bytes) = (self.site, self.layout.bytes);
        self.layout.lens.iter().scan(0usize, move |at, &len| {
            let from = *at;
            *at += usize::from(len);
            Some((site + from as u64, &bytes[from..*at]))
        })
    }

    /// What a registry says of it before anything is attached.
    #[must_use]
    pub fn fresh(&self) -> FunctionState {
        let original = self.original().to_vec();
        let first: [u8; 5] = original[..5].try_into().expect("five bytes and more");
        FunctionState {
            module: "/simulated".to_owned(),
            name: self.layout.name.to_owned(),
            address: RemoteAddr(self.entry()),
            file: None,
            site: RemoteAddr(self.site),
            door: self.layout.door.map(|door| RemoteAddr(self.site + door)),
            kind: self.layout.kind,
            original,
            insn_lens: self.layout.lens.to_vec(),
            patched: first,
            previous: first,
            skeleton: None,
            skip: None,
            stack: StackArgs::NONE,
            calls_original: false,
            finds_frames: None,
            returns_to: None,
            calls: Vec::new(),
            switches: Vec::new(),
            bodies: Vec::new(),
            replacements: Vec::new(),
        }
    }
}
