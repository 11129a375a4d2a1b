/* Bounded loops, with every shape of induction variable that clang makes. */
#include "corpus.h"

PROG(for_sum) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (int i = 0; i < 64; i++) s += b->slots[i]; return s & 1; }
PROG(for_down) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (int i = 63; i >= 0; i--) s = s * 3 + b->slots[i]; return s & 1; }
PROG(while_until) { struct big *b = big_at(0); u32 i = 0; if (!b) return 0;
	_Pragma("nounroll") while (i < 256 && b->words[i]) i++; return i & 1; }
PROG(do_while) { struct big *b = big_at(0); u32 i = 0; u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") do { s += b->words[i]; } while (++i < 256); return s & 1; }
PROG(nested) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (int i = 0; i < 8; i++)
	_Pragma("nounroll") for (int j = 0; j < 8; j++) s += b->slots[i * 8 + j];
	return s & 1; }
PROG(triangle) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (int i = 0; i < 10; i++)
	_Pragma("nounroll") for (int j = 0; j <= i; j++) s += b->slots[i + j];
	return s & 1; }
PROG(bounded_by_argument) { struct big *b = big_at(0); u64 s = 0; u32 n = ctx[0]; if (!b) return 0;
	_Pragma("nounroll") for (u32 i = 0; i < n && i < 64; i++) s += b->slots[i]; return s & 1; }
PROG(bounded_int) { struct big *b = big_at(0); u64 s = 0; int n = ctx[0]; if (!b) return 0;
	_Pragma("nounroll") for (int i = 0; i < n && i < 64; i++) s += b->slots[i]; return s & 1; }
PROG(bounded_first) { struct big *b = big_at(0); u64 s = 0; u32 n = ctx[0]; if (!b) return 0;
	if (n > 64) n = 64;
	_Pragma("nounroll") for (u32 i = 0; i < n; i++) s += b->slots[i]; return s & 1; }
PROG(bounded_by_map) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	u32 n = b->n; if (n > 40) return 0;
	_Pragma("nounroll") for (u32 i = 0; i < n; i++) s += b->words[i]; return s & 1; }
PROG(break_in_the_middle) { struct big *b = big_at(0); int i; if (!b) return 0;
	_Pragma("nounroll") for (i = 0; i < 64; i++) if (b->slots[i] == ctx[1]) break; return i == 64; }
PROG(last_found) { struct big *b = big_at(0); int found = -1; if (!b) return 0;
	_Pragma("nounroll") for (int i = 0; i < 10; i++) if (b->slots[i] == ctx[1]) found = i;
	if (found >= 0 && found < 64) b->slots[found]++; return 0; }
PROG(continue_in_the_middle) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (int i = 0; i < 64; i++) { if (b->slots[i] & 1) continue; s ^= b->slots[i]; } return s & 1; }
PROG(pointer_walk) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	u64 *p = b->slots, *end = b->slots + 64;
	_Pragma("nounroll") for (int i = 0; i < 64; i++, p++) s += *p; return s & 1; }
PROG(stack_walk) { u64 a[16]; u64 s = 0;
	_Pragma("nounroll") for (int i = 0; i < 16; i++) { a[i] = ctx[0] + i; barrier_var(s); }
	_Pragma("nounroll") for (int i = 0; i < 16; i++) { s += a[i]; barrier_var(s); } return s & 1; }
PROG(thousand_rounds) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (u32 i = 0; i < 4096; i++) s += b->bytes[i]; return s & 1; }
PROG(thousand_rounds_masked) { struct big *b = big_at(0); u64 s = ctx[0]; if (!b) return 0;
	_Pragma("nounroll") for (u32 i = 0; i < 2000; i++) s = s * 31 + b->bytes[s & 4095]; return s & 1; }
PROG(thousand_with_branch) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (u32 i = 0; i < 1024; i++) { if (b->bytes[i] > 10) s++; else s += 2; } return s & 1; }
PROG(step_of_three) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (u32 i = 0; i < 200; i += 3) s += b->words[i]; return s & 1; }
PROG(doubling) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (u32 i = 1; i < 4096; i <<= 1) s += b->bytes[i]; return s & 1; }
PROG(halving) { u64 n = ctx[0]; int bits = 0;
	_Pragma("nounroll") for (int i = 0; i < 64; i++) { if (!n) break; n >>= 1; bits++; } return bits; }
PROG(two_indices) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (u32 i = 0, j = 63; i < j; i++, j--) { u64 t = b->slots[i]; b->slots[i] = b->slots[j]; b->slots[j] = t; } return 0; }
PROG(unrolled) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("unroll") for (int i = 0; i < 16; i++) if (b->slots[i] > ctx[0]) s += b->words[i]; return s & 1; }
PROG(unrolled_flags) { u64 f = ctx[0]; u32 n = 0;
	_Pragma("unroll") for (int i = 0; i < 24; i++) if (f & (1ull << i)) n++; struct big *b = big_at(0); if (!b) return 0;
	if (n < 64) b->slots[n]++; return 0; }
PROG(bubble) { struct big *b = big_at(0); if (!b) return 0;
	_Pragma("nounroll") for (int i = 0; i < 10; i++)
	_Pragma("nounroll") for (int j = 0; j < 9; j++)
		if (b->slots[j] > b->slots[j + 1]) { u64 t = b->slots[j]; b->slots[j] = b->slots[j + 1]; b->slots[j + 1] = t; }
	return 0; }
PROG(binary_search) { struct big *b = big_at(0); u32 lo = 0, hi = 32; if (!b) return 0;
	_Pragma("nounroll") for (int i = 0; i < 6; i++) { u32 mid = (lo + hi) / 2; if (mid >= 256) break;
		if (b->words[mid] < (u32)ctx[0]) lo = mid + 1; else hi = mid; } return lo & 1; }
PROG(lookup_in_loop) { u64 s = 0;
	_Pragma("nounroll") for (u32 i = 0; i < 4; i++) { struct big *b = big_at(i); if (b) s += b->n; } return s & 1; }
PROG(update_in_loop) {
	_Pragma("nounroll") for (u64 i = 0; i < 20; i++) { u64 v = i; map_update_elem(&counts, &i, &v, 0); } return 0; }
PROG(counts_matches) { struct big *b = big_at(0); u32 n = 0; if (!b) return 0;
	_Pragma("nounroll") for (u32 i = 0; i < 6; i++) if (b->words[i] == (u32)ctx[0]) n++;
	if (n < 64) b->slots[n] = 1; return 0; }
PROG(compacts) { struct big *b = big_at(0); u32 n = 0; if (!b) return 0;
	_Pragma("nounroll") for (u32 i = 0; i < 16; i++) { u64 v = b->slots[i]; if (v && n < 64) b->slots[n++] = v; } b->n = n; return 0; }
PROG(waits_for_zero) { u64 v = ctx[0]; int i = 0;
	_Pragma("nounroll") while (v && i < 100) { v = v / 10; i++; } return i; }
PROG(fibonacci) { u64 a = 0, c = 1;
	_Pragma("nounroll") for (int i = 0; i < 90; i++) { u64 t = a + c; a = c; c = t; barrier_var(a); } return a & 1; }
PROG(unsigned_short_index) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (u16 i = 0; i < 256; i++) s += b->words[i]; return s & 1; }
PROG(byte_index) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (u8 i = 0; i < 200; i++) s += b->words[i]; return s & 1; }
PROG(long_index) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (s64 i = 0; i < 64; i++) s += b->slots[i]; return s & 1; }
PROG(starts_at_argument) { struct big *b = big_at(0); u64 s = 0; u32 i = ctx[0] & 63; if (!b) return 0;
	_Pragma("nounroll") for (int n = 0; n < 64; n++) { s += b->slots[i]; i = (i + 1) & 63; } return s & 1; }
PROG(not_equal_end) { struct big *b = big_at(0); u64 s = 0; if (!b) return 0;
	_Pragma("nounroll") for (u32 i = 0; i != 64; i++) s += b->slots[i]; return s & 1; }
