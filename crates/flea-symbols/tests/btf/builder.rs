//! Writes BTF as pahole and newer compilers do, into a C source.

use std::fmt::Write as _;

pub const STATIC: u32 = 0;
pub const GLOBAL: u32 = 1;

/// Types and strings of one `.BTF`.
pub struct Builder {
    words: Vec<u32>,
    strings: Vec<u8>,
    n_types: u32,
}

impl Builder {
    pub fn new() -> Self {
        Self { words: Vec::new(), strings: vec![0], n_types: 0 }
    }

    /// A type of this kind, with `n_parts` parts in `rest`; its id.
    pub fn add(&mut self, name: &str, kind: u32, n_parts: u32, size: u32, rest: &[u32]) -> u32 {
        let name = self.string(name);
        self.words.extend([name, kind << 24 | n_parts, size]);
        self.words.extend(rest);
        self.n_types += 1;
        self.n_types
    }

    pub fn int(&mut self) -> u32 {
        self.add("int", 1, 0, 4, &[1 << 24 | 32])
    }

    pub fn array(&mut self, of: u32, n: u32) -> u32 {
        self.add("", 3, 0, 0, &[of, 1, n])
    }

    /// A struct with one member.
    pub fn holder(&mut self, name: &str, of: u32, size_bytes: u32) -> u32 {
        let member = self.string("member");
        self.add(name, 4, 1, size_bytes, &[member, of, 0])
    }

    /// A function and its prototype.
    pub fn function(&mut self, name: &str, linkage: u32, ret: u32, params: &[(&str, u32)]) {
        let parts: Vec<u32> =
            params.iter().flat_map(|(name, id)| [self.string(name), *id]).collect();
        let n_params = u32::try_from(params.len()).unwrap();
        let proto = self.add("", 13, n_params, ret, &parts);
        self.add(name, 12, linkage, proto, &[]);
    }

    pub fn bytes(&self) -> Vec<u8> {
        let n_bytes = u32::try_from(self.words.len() * 4).unwrap();
        let header = [24, 0, n_bytes, n_bytes, u32::try_from(self.strings.len()).unwrap()];
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        bytes.extend(header.iter().chain(&self.words).flat_map(|word| word.to_le_bytes()));
        bytes.extend(&self.strings);
        bytes
    }

    /// A definition of the section in C.
    pub fn source(&self) -> String {
        let mut list = String::new();
        for byte in self.bytes() {
            write!(list, "{byte},").unwrap();
        }
        format!(
            "__attribute__((used, section(\".BTF\"))) static const unsigned char btf[] = {{{list}}};\n"
        )
    }

    fn string(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        let at = u32::try_from(self.strings.len()).unwrap();
        self.strings.extend(text.bytes().chain([0]));
        at
    }
}
