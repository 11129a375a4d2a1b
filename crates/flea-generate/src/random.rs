//! Numbers from a seed, which is all there is to a failure.

/// xorshift64*
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let mut r = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        r.word();
        r.word();
        r
    }

    /// Any 64 bits.
    pub fn word(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Any 8 bits.
    pub fn byte(&mut self) -> u8 {
        self.word() as u8
    }

    /// Any of `0..n`.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.word() >> 16) % n
    }

    /// Any of `0..n`, to be an index.
    pub fn index(&mut self, n: usize) -> usize {
        self.below(n as u64) as usize
    }

    /// One of `from`.
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.index(from.len())]
    }

    /// True in so many of a hundred cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Numbers near the places where orders and halves break.
    pub fn number(&mut self) -> u64 {
        let edges = [0, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 32, 1 << 63, u64::MAX];
        match self.below(4) {
            0 => self.word(),
            1 => self.below(80),
            2 => self.pick(&edges).wrapping_add(self.below(5)).wrapping_sub(2),
            _ => self.word() >> self.below(64),
        }
    }

    /// The low half of such a number.
    pub fn imm(&mut self) -> i32 {
        self.number() as i32
    }
}
