//! Calls functions of Rust's own ABI, and says where their arguments and results really were.
//! `grab` takes the place of a callee and keeps what it is called with; `spy` calls `SPIED`
//! with what it is called with, and keeps the result registers.
use std::hint::black_box;
use std::mem::{forget, size_of, transmute};

core::arch::global_asm!(
    ".globl grab", "grab:",
    "lea dump(%rip), %rax",
    "mov %rdi, 0(%rax)", "mov %rsi, 8(%rax)", "mov %rdx, 16(%rax)",
    "mov %rcx, 24(%rax)", "mov %r8, 32(%rax)", "mov %r9, 40(%rax)",
    "lea 8(%rsp), %rcx", "mov %rcx, 48(%rax)",
    "movups %xmm0, 64(%rax)", "movups %xmm1, 80(%rax)", "movups %xmm2, 96(%rax)",
    "movups %xmm3, 112(%rax)", "movups %xmm4, 128(%rax)", "movups %xmm5, 144(%rax)",
    "movups %xmm6, 160(%rax)", "movups %xmm7, 176(%rax)",
    "xor %ecx, %ecx",
    "1: mov 8(%rsp,%rcx,8), %rdx", "mov %rdx, 192(%rax,%rcx,8)",
    "inc %ecx", "cmp $16, %ecx", "jb 1b",
    "mov %rdi, %rax", "ret",
    ".globl spy", "spy:",
    "pop spy_return(%rip)",
    "call *SPIED(%rip)",
    "push spy_return(%rip)",
    "lea dump(%rip), %rcx",
    "mov %rax, 320(%rcx)", "mov %rdx, 328(%rcx)",
    "movups %xmm0, 336(%rcx)", "movups %xmm1, 352(%rcx)",
    "ret",
    ".bss", "spy_return: .quad 0", ".text",
    options(att_syntax)
);

#[repr(C, align(64))]
struct Dump {
    gpr: [u64; 6],
    area: u64,
    pad: u64,
    xmm: [[u64; 2]; 8],
    stack: [u64; 16],
    rax: [u64; 2],
    result: [[u64; 2]; 2],
}

#[unsafe(no_mangle)]
static mut dump: Dump = unsafe { std::mem::zeroed() };
#[unsafe(no_mangle)]
static mut SPIED: usize = 0;

unsafe extern "C" {
    fn grab();
    fn spy();
}

fn behind(what: &str, name: &str, i: usize, word: u64) {
    let area = unsafe { dump.area };
    if word.wrapping_sub(area).wrapping_add(4096) < 16384 {
        let bytes = unsafe { std::slice::from_raw_parts(word as *const u8, 32) };
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        println!("{what} {name} {i} {hex}");
    }
}

fn said(what: &str, name: &str, i: usize, word: u64) {
    let hex: String = word.to_le_bytes().iter().map(|b| format!("{b:02x}")).collect();
    println!("{what} {name} {i} {hex}");
}

#[allow(static_mut_refs)]
fn report(name: &str) {
    let d = unsafe { &dump };
    for (i, word) in d.gpr.iter().enumerate() {
        said("gpr", name, i, *word);
        behind("behind", name, i, *word);
    }
    for (i, xmm) in d.xmm.iter().enumerate() {
        said("xmm", name, i, xmm[0]);
    }
    for (i, word) in d.stack.iter().enumerate() {
        said("stack", name, i, *word);
        behind("behind", name, 6 + i, *word);
    }
}

#[allow(static_mut_refs)]
fn report_result(name: &str) {
    let d = unsafe { &dump };
    said("rax", name, 0, d.rax[0]);
    said("rax", name, 1, d.rax[1]);
    said("vector", name, 0, d.result[0][0]);
    said("vector", name, 1, d.result[1][0]);
    behind("result", name, 0, d.rax[0]);
}

/// A function, its type, a value for it, and the words of the value, as (word, bytes).
macro_rules! case {
    ($name:ident, $ty:ty, $value:expr, $words:expr) => {
        #[inline(never)]
        fn $name(z: u8, a: $ty, b: u64) -> $ty {
            // No two of them are the same code.
            black_box(stringify!($name));
            black_box(&z);
            black_box(&b);
            let a = black_box(a);
            a
        }
        mod $name {
            use super::*;
            #[inline(never)]
            pub fn call() {
                let name = stringify!($name);
                let value: $ty = black_box($value);
                let words: &[(u64, u64)] = &$words;
                for (i, (word, bytes)) in words.iter().enumerate() {
                    said("want", name, i, *word);
                    said("bytes", name, i, *bytes);
                }
                said("size", name, 0, size_of::<$ty>() as u64);
                let raw = unsafe { std::slice::from_raw_parts(&raw const value as *const u8, size_of::<$ty>()) };
                let hex: String = raw.iter().map(|b| format!("{b:02x}")).collect();
                println!("raw {name} 0 {hex}");
                let f: fn(u8, $ty, u64) -> $ty = unsafe { transmute(grab as *const ()) };
                forget(f(0x5a, black_box(value), 0x1122_3344_5566_7788));
                report(name);
                unsafe { SPIED = super::$name as *const () as usize };
                let f: fn(u8, $ty, u64) -> $ty = unsafe { transmute(spy as *const ()) };
                let result = f(0x5a, black_box($value), 0x1122_3344_5566_7788);
                report_result(name);
                forget(black_box(result));
            }
        }
    };
}

#[derive(Clone, Copy)] struct P2(u32, u32);
#[derive(Clone, Copy)] struct A2([u32; 2]);
#[derive(Clone, Copy)] struct T3(u8, u8, u16);
#[derive(Clone, Copy)] struct T12(u32, u32, u32);
#[derive(Clone, Copy)] struct Q3(u64, u64, u64);
#[derive(Clone, Copy)] struct N(u64);
#[derive(Clone, Copy)] struct W(f64);
#[derive(Clone, Copy)] #[repr(C)] struct Wc(f64);
#[derive(Clone, Copy)] #[repr(C)] struct Pc(u32, u32);
#[derive(Clone, Copy)] enum E3 { #[allow(dead_code)] A, B(u32), #[allow(dead_code)] C(u32) }
#[derive(Clone, Copy)] enum E4 { #[allow(dead_code)] A(u32), B(u64) }
#[derive(Clone, Copy)] enum E5 { #[allow(dead_code)] A(f64), B(f64) }
#[derive(Clone, Copy)] enum E7 { #[allow(dead_code)] A, #[allow(dead_code)] B, C }
#[derive(Clone, Copy)] enum E8 { #[allow(dead_code)] A(u16), B(u16, u32) }
#[derive(Clone, Copy)] union U { f: f64, #[allow(dead_code)] i: u64 }

static WORD: u32 = 7;
static TEXT: &str = "some text";
fn address<T: ?Sized>(r: &T) -> u64 { r as *const T as *const u8 as u64 }
fn f(v: f64) -> (u64, u64) { (v.to_bits(), 8) }
fn g(v: f32) -> (u64, u64) { (u64::from(v.to_bits()), 4) }
/// By address; all of it has a value.
const BEHIND: (u64, u64) = (u64::MAX, 99);
/// By address; the bytes from `a` to `b`, and from `c` to `d`, have a value.
const fn behind_but(a: u64, b: u64, c: u64, d: u64) -> (u64, u64) {
    ((1 << b) - (1 << a) | (1 << d) - (1 << c), 99)
}

case!(int, i32, -7, [(-7i32 as u32 as u64, 4)]);
case!(boolean, bool, true, [(1, 1)]);
case!(character, char, 'x', [('x' as u64, 4)]);
case!(float, f32, 1.5, [g(1.5)]);
case!(double, f64, 2.5, [f(2.5)]);
case!(wide, i128, -3, [(-3i64 as u64, 8), (u64::MAX, 8)]);
case!(unit, (), (), []);
case!(text, &'static str, TEXT, [(address(TEXT), 8), (9, 8)]);
case!(reference, &'static u32, &WORD, [(address(&WORD), 8)]);
case!(pair, P2, P2(1, 2), [(1, 4), (2, 4)]);
case!(array, A2, A2([1, 2]), [(0x2_0000_0001, 8)]);
case!(three, T3, T3(1, 2, 3), [(0, 0)]);
case!(twelve, T12, T12(1, 2, 3), [BEHIND]);
case!(large, Q3, Q3(1, 2, 3), [BEHIND]);
case!(newtype, N, N(77), [(77, 8)]);
case!(newfloat, W, W(7.5), [f(7.5)]);
case!(newfloat_c, Wc, Wc(7.5), [f(7.5)]);
case!(pair_c, Pc, Pc(3, 4), [(3, 4), (4, 4)]);
case!(floats, (f64, f64), (1.0, 2.0), [f(1.0), f(2.0)]);
case!(small_floats, (f32, f32), (1.0, 2.0), [g(1.0), g(2.0)]);
case!(mixed, (f64, u64), (1.0, 5), [f(1.0), (5, 8)]);
case!(bytes, [u8; 7], [1, 2, 3, 4, 5, 6, 7], [(0x07_0605_0403_0201, 7)]);
case!(two_doubles, [f64; 2], [1.0, 2.0], [BEHIND]);
case!(one_double, [f64; 1], [1.25], [f(1.25)]);
case!(option_int, Option<u32>, Some(9), [(1, 4), (9, 4)]);
case!(option_long, Option<u64>, Some(9), [(1, 8), (9, 8)]);
case!(option_ref, Option<&'static u32>, Some(&WORD), [(address(&WORD), 8)]);
case!(option_text, Option<&'static str>, Some(TEXT), [(address(TEXT), 8), (9, 8)]);
case!(option_bool, Option<bool>, Some(true), [(1, 1)]);
case!(option_char, Option<char>, Some('y'), [('y' as u64, 4)]);
case!(option_double, Option<f64>, Some(0.5), [(1, 8), f(0.5)]);
case!(option_box, Option<Box<u64>>, None, [(0, 8)]);
case!(option_three, Option<T3>, Some(T3(1, 2, 3)), [(0, 0)]);
case!(result_same, Result<u32, u32>, Err(4), [(1, 4), (4, 4)]);
case!(result_signs, Result<u32, i32>, Err(-4), [(1, 4), (-4i32 as u32 as u64, 4)]);
case!(result_box, Result<u64, Box<u8>>, Ok(4), [(0, 8), (4, 8)]);
case!(result_sizes, Result<u32, u64>, Err(4), [behind_but(0, 4, 8, 16)]);
case!(result_unit, Result<(), Box<dyn std::fmt::Debug>>, Ok(()), [(0, 8), (0, 0)]);
case!(result_io, std::io::Result<u32>, Ok(4), [behind_but(0, 4, 4, 8)]);
case!(result_io_unit, std::io::Result<()>, Ok(()), [(0, 8)]);
case!(infallible, Result<(u32, u32), std::convert::Infallible>, Ok((4, 5)), [(4, 4), (5, 4)]);
case!(infallible_double, Result<f64, std::convert::Infallible>, Ok(4.5), [f(4.5)]);
case!(infallible_large, Result<Q3, std::convert::Infallible>, Ok(Q3(1, 2, 3)), [BEHIND]);
case!(string, String, String::from("abc"), [BEHIND]);
case!(vector, Vec<u32>, vec![1, 2], [BEHIND]);
case!(boxed, Box<dyn Fn() -> u32>, Box::new(|| 4), [(0, 0), (0, 0)]);
case!(rc, std::rc::Rc<[u8]>, std::rc::Rc::from([1u8, 2]), [(0, 0), (2, 8)]);
case!(duration, std::time::Duration, std::time::Duration::new(5, 6), [(5, 8), (6, 4)]);
case!(option_duration, Option<std::time::Duration>, Some(std::time::Duration::new(5, 6)), [(5, 8), (6, 4)]);
case!(ordering, std::cmp::Ordering, std::cmp::Ordering::Greater, [(1, 1)]);
case!(range, std::ops::Range<usize>, 3..5, [(3, 8), (5, 8)]);
case!(inclusive, std::ops::RangeInclusive<u32>, 3..=5, [behind_but(0, 8, 8, 9)]);
case!(nested, ((u32, u8), ()), ((8, 9), ()), [(8, 4), (9, 1)]);
case!(byte_long, (u8, u64), (3, 4), [(3, 1), (4, 8)]);
case!(three_values, (u8, u16, u32), (1, 2, 3), [(0, 0)]);
case!(slice_and, (&'static [u8], u8), (b"ab", 1), [behind_but(0, 16, 16, 17)]);
case!(pointer, fn(u32) -> u32, |x| x, [(0, 0)]);
case!(nonzero, Option<std::num::NonZeroU16>, std::num::NonZeroU16::new(300), [(300, 2)]);
case!(maybe, std::mem::MaybeUninit<f64>, std::mem::MaybeUninit::new(3.5), [f(3.5)]);
case!(cell, std::cell::Cell<u32>, std::cell::Cell::new(31), [(31, 4)]);
case!(un, U, U { f: 4.5 }, [f(4.5)]);
case!(e3, E3, E3::B(6), [(1, 4), (6, 4)]);
case!(e4, E4, E4::B(6), [behind_but(0, 4, 8, 16)]);
case!(e5, E5, E5::B(6.5), [(1, 8), f(6.5)]);
case!(e7, E7, E7::C, [(2, 1)]);
case!(e8, E8, E8::B(6, 7), [(0, 0)]);

// Register and stack words of one value.
#[inline(never)]
fn crowded(a: u64, b: u64, c: u64, d: u64, e: u64, s: &str, p: P2, x: f64, w: i128, l: Q3, z: u8) -> u64 {
    black_box((a, b, c, d, e, s, p.0, p.1, x, w, l, z));
    3
}

fn main() {
    let f: fn(u64, u64, u64, u64, u64, &'static str, P2, f64, i128, Q3, u8) -> u64 =
        unsafe { transmute(grab as *const ()) };
    f(1, 2, 3, 4, 5, TEXT, P2(6, 7), 0.5, 8, Q3(9, 10, 11), 12);
    report("crowded");
    said("text", "crowded", 0, address(TEXT));
    black_box(crowded as *const ());
    int::call(); boolean::call(); character::call(); float::call(); double::call(); wide::call();
    unit::call(); text::call(); reference::call(); pair::call(); array::call(); three::call();
    twelve::call(); large::call(); newtype::call(); newfloat::call(); newfloat_c::call(); pair_c::call();
    floats::call(); small_floats::call(); mixed::call(); bytes::call(); two_doubles::call(); one_double::call();
    option_int::call(); option_long::call(); option_ref::call(); option_text::call(); option_bool::call();
    option_char::call(); option_double::call(); option_box::call(); option_three::call(); result_same::call();
    result_signs::call(); result_box::call(); result_sizes::call(); result_unit::call(); result_io::call();
    result_io_unit::call(); infallible::call(); infallible_double::call(); infallible_large::call(); string::call(); vector::call(); boxed::call(); rc::call(); duration::call();
    option_duration::call(); ordering::call(); range::call(); inclusive::call(); nested::call(); byte_long::call();
    three_values::call(); slice_and::call(); pointer::call(); nonzero::call(); maybe::call(); cell::call(); un::call();
    e3::call(); e4::call(); e5::call(); e7::call(); e8::call();
}
