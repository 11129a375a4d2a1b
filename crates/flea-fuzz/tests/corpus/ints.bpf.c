/* Ints of every width, as clang bounds and extends them. */
#include "corpus.h"

#define WITH(b) struct big *b = big_at(0); if (!b) return 0
PROG(int_index) { WITH(b); int i = ctx[0]; if (i < 0 || i >= 64) return 0; b->slots[i]++; return 0; }
PROG(uint_index) { WITH(b); u32 i = ctx[0]; if (i >= 64) return 0; b->slots[i]++; return 0; }
PROG(long_index2) { WITH(b); s64 i = ctx[0]; if (i < 0 || i > 63) return 0; b->slots[i]++; return 0; }
PROG(short_index) { WITH(b); s16 i = ctx[0]; if (i < 0 || i >= 64) return 0; b->slots[i]++; return 0; }
PROG(char_index) { WITH(b); s8 i = ctx[0]; if (i < 0) return 0; b->words[i]++; return 0; }
PROG(byte_as_index) { WITH(b); u8 i = ctx[0]; b->words[i]++; return 0; }
PROG(masked) { WITH(b); b->slots[ctx[0] & 63]++; return 0; }
PROG(masked_int) { WITH(b); int i = ctx[0]; b->slots[i & 63]++; return 0; }
PROG(modulo) { WITH(b); u32 i = ctx[0]; i = i % 64; b->slots[i]++; return 0; }
PROG(shifted) { WITH(b); b->slots[ctx[0] >> 58]++; return 0; }
PROG(shifted_int) { WITH(b); u32 i = ctx[0]; b->slots[i >> 26]++; return 0; }
PROG(clamped) { WITH(b); u64 i = ctx[0]; if (i > 63) i = 63; b->slots[i]++; return 0; }
PROG(clamped_both) { WITH(b); int i = ctx[0]; if (i < 0) i = 0; if (i > 63) i = 63; b->slots[i]++; return 0; }
PROG(offset_index) { WITH(b); u32 i = ctx[0]; if (i < 100 || i >= 164) return 0; b->slots[i - 100]++; return 0; }
PROG(plus_one) { WITH(b); u32 i = ctx[0]; if (i >= 63) return 0; b->slots[i + 1] = b->slots[i]; return 0; }
PROG(sum_checked) { WITH(b); u32 i = ctx[0], n = ctx[1]; if (i >= 32 || n >= 32) return 0; b->slots[i + n]++; return 0; }
PROG(copy_checked) { WITH(b); u64 i = ctx[0], j = i; barrier_var(j); if (j >= 64) return 0; b->slots[j]++; return 0; }
PROG(end_checked) { WITH(b); u32 off = ctx[0], len = ctx[1] & 63; if (off > 4096 - 64) return 0; b->bytes[off + len] = 1; return 0; }
PROG(length_left) { WITH(b); u32 used = b->n; if (used > 4096) return 0; u32 left = 4096 - used; if (left < 8) return 0;
	b->bytes[used] = 1; return 0; }
PROG(flags_one_by_one) { WITH(b); u64 f = ctx[0]; u32 i = 0; if (f & 1) i |= 1; if (f & 2) i |= 2; if (f & 4) i |= 4;
	if (f & 8) i |= 8; if (f & 16) i |= 16; if (f & 32) i |= 32; b->slots[i]++; return 0; }
PROG(many_flags) { WITH(b); u64 f = b->slots[0]; u64 s = 0;
	if (f & 1) s += b->slots[1]; if (f & 2) s += b->slots[2]; if (f & 4) s += b->slots[3]; if (f & 8) s += b->slots[4];
	if (f & 16) s += b->slots[5]; if (f & 32) s += b->slots[6]; if (f & 64) s += b->slots[7]; if (f & 128) s += b->slots[8];
	if (f & 256) s += b->slots[9]; if (f & 512) s += b->slots[10]; if (f & 1024) s += b->slots[11]; if (f & 2048) s += b->slots[12];
	if (f & 4096) s += b->slots[13]; if (f & 8192) s += b->slots[14]; if (f & 16384) s += b->slots[15]; if (f & 32768) s += b->slots[16];
	if (f & 0x10000) s += b->slots[17]; if (f & 0x20000) s += b->slots[18]; if (f & 0x40000) s += b->slots[19]; if (f & 0x80000) s += b->slots[20];
	b->slots[21] = s; return 0; }
PROG(switch_table) { WITH(b); u32 i; switch (ctx[0]) { case 1: i = 3; break; case 2: i = 7; break; case 17: i = 63; break; case 99: i = 1; break; default: i = 0; } b->slots[i]++; return 0; }
PROG(switch_dense) { WITH(b); u64 r; switch ((u32)ctx[0] & 15) { case 0: r = b->n; break; case 1: r = b->slots[3]; break; case 2: r = b->words[9]; break; case 3: r = b->bytes[100]; break;
	case 4: r = ctx[1]; break; case 5: r = ctx[2]; break; case 6: r = ~ctx[1]; break; case 7: r = ctx[1] * 3; break; default: r = 1; } return r & 1; }
PROG(rodata_table) { static const u8 table[16] = {1, 5, 9, 2, 63, 4, 8, 3, 7, 6, 11, 12, 13, 0, 1, 2}; WITH(b); volatile const u8 *t = table;
	u32 i = t[ctx[0] & 15]; if (i < 64) b->slots[i]++; return 0; }
PROG(signed_chain) { WITH(b); s64 v = ctx[0]; u32 i; if (v < -1000) i = 0; else if (v < 0) i = 1; else if (v < 10) i = 2; else if (v < 1000) i = 3; else i = 4; b->slots[i]++; return 0; }
PROG(division) { WITH(b); u32 v = ctx[0]; if (v >= 640) return 0; b->slots[v / 10]++; return 0; }
PROG(division_wide) { WITH(b); u64 v = ctx[0]; v /= 1000; if (v > 63) v = 63; b->slots[v]++; return 0; }
PROG(average) { WITH(b); u64 n = b->slots[0], s = b->slots[1]; if (n == 0) return 0; b->slots[2] = s / n; return 0; }
PROG(rounded_up) { WITH(b); u32 n = ctx[0] & 0xfff; n = (n + 7) & ~7u; if (n > 4088) return 0; b->bytes[n] = 1; return 0; }
PROG(low_word) { WITH(b); u64 v = ctx[0]; u32 lo = v, hi = v >> 32; if (lo < 64 && hi < 64) b->slots[lo] = hi, b->slots[hi] = lo; return 0; }
PROG(pid_and_tid) { WITH(b); u64 id = get_current_pid_tgid(); u32 pid = id >> 32, tid = id; b->slots[pid & 63] = tid; return 0; }
PROG(min_of_two) { WITH(b); u32 a = ctx[0], c = ctx[1], m = a < c ? a : c; if (m < 64) b->slots[m]++; return 0; }
PROG(max_of_two) { WITH(b); u32 a = ctx[0] & 31, c = ctx[1] & 63, m = a > c ? a : c; b->slots[m]++; return 0; }
PROG(absolute) { WITH(b); s64 v = ctx[0]; if (v < 0) v = -v; if (v >= 0 && v < 64) b->slots[v]++; return 0; }
PROG(bool_index) { WITH(b); b->slots[ctx[0] > ctx[1]]++; return 0; }
PROG(bool_sum) { WITH(b); b->slots[(ctx[0] > 1) + (ctx[1] > 2) + (ctx[2] > 3)]++; return 0; }
PROG(ternary_pointers) { WITH(b); u64 *p = ctx[0] ? &b->slots[1] : &b->slots[60]; (*p)++; return 0; }
PROG(nested_struct_array) { struct row { u32 a; u16 c[6]; }; WITH(b); struct row *rows = (void *)b->bytes; u32 i = ctx[0], j = ctx[1];
	if (i < 16 && j < 6) rows[i].c[j]++; return 0; }
PROG(two_dimensions) { WITH(b); u32 i = ctx[0], j = ctx[1]; if (i < 8 && j < 8) b->slots[i * 8 + j]++; return 0; }
PROG(or_of_bytes) { WITH(b); u32 i = (ctx[0] & 3) | (ctx[1] & 3) << 2 | (ctx[2] & 3) << 4; b->slots[i]++; return 0; }
PROG(xor_index) { WITH(b); u32 i = (ctx[0] & 63) ^ (ctx[1] & 63); b->slots[i]++; return 0; }
PROG(multiplied) { WITH(b); u32 i = ctx[0] & 7; b->slots[i * 9]++; return 0; }
PROG(subtracted) { WITH(b); u32 i = ctx[0] & 63; b->slots[63 - i]++; return 0; }
PROG(unaligned) { WITH(b); u32 i = ctx[0] & 1023; u64 v = *(u64 *)(b->bytes + i); *(u32 *)(b->bytes + i + 1) = v; return v & 1; }
PROG(bitfields) { struct f { u32 a : 3, c : 7, d : 22; }; WITH(b); struct f *f = (void *)b->bytes; b->words[f->a]++; b->slots[f->c & 63]++; f->c = 5; return f->d & 1; }
PROG(byteswapped) { WITH(b); u16 port = __builtin_bswap16((u16)ctx[0]); if (port < 256) b->words[port]++; return 0; }
PROG(sign_of_result) { WITH(b); long n = probe_read_user(&b->n, 4, (void *)ctx[0]); if (n < 0) return 0; u32 i = b->n; if (i < 64) b->slots[i]++; return 0; }
PROG(log2_histogram) { WITH(b); u64 v = ctx[0]; u32 hi = v >> 32, r, sh; u32 x;
	x = hi ? hi : v; r = (x > 0xffff) << 4; x >>= r; sh = (x > 0xff) << 3; x >>= sh; r |= sh; sh = (x > 0xf) << 2; x >>= sh; r |= sh;
	sh = (x > 0x3) << 1; x >>= sh; r |= sh; r |= x >> 1; if (hi) r += 32; if (r >= 64) r = 63; b->slots[r]++; return 0; }
PROG(linear_histogram) { WITH(b); u64 v = (ctx[1] - ctx[0]) / 1000; u32 i = v > 62 ? 63 : v; b->slots[i]++; return 0; }
PROG(remainder_is_small) { WITH(b); u64 s = ctx[0] / 1000000000, ns = ctx[0] % 1000000000; b->slots[s & 63] = ns; return 0; }
PROG(jset_branches) { WITH(b); u64 f = ctx[0]; if (f & 0x40) { if (f & ~0x7full) return 0; b->words[f]++; } return 0; }
PROG(equal_to_known) { WITH(b); u64 a = ctx[0], c = ctx[1] & 31; if (a == c) b->slots[a]++; return 0; }
PROG(range_by_subtraction) { WITH(b); u64 c = ctx[0]; if (c - '0' <= 9) b->slots[c - '0']++; return 0; }
PROG(alpha_ranges) { WITH(b); u8 c = ctx[0]; if (c >= 'a' && c <= 'z') b->slots[c - 'a']++; else if (c >= 'A' && c <= 'Z') b->slots[c - 'A' + 26]++; return 0; }
