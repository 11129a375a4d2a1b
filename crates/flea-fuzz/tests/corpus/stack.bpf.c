/* The stack: arrays with variable indices, ints spilled, frames passed down. */
#include "corpus.h"

struct key { u32 pid; u32 cpu; u64 address; };

PROG(array_written_at_index) { volatile u64 a[8] = {}; u32 i = ctx[0] & 7; a[i] = ctx[1]; return a[3] & 1; }
PROG(array_read_at_index) { volatile u64 a[8] = {1, 2, 3, 4, 5, 6, 7, 8}; u32 i = ctx[0] & 7; return a[i] & 1; }
PROG(bytes_at_index) { volatile u8 a[16] = {}; u32 i = ctx[0]; if (i >= 16) return 0; a[i] = 'x'; return a[0]; }
PROG(ints_at_index) { volatile u32 a[16] = {}; u32 i = ctx[0]; if (i >= 16) return 0; a[i]++; return a[i] & 1; }
PROG(two_arrays) { volatile u32 a[8] = {}, c[8] = {}; u32 i = ctx[0] & 7, j = ctx[1] & 7; a[i] = 1; c[j] = a[j]; return c[0]; }
PROG(local_histogram) { volatile u32 h[16] = {};
	_Pragma("nounroll") for (int i = 0; i < 5; i++) h[ctx[i] & 15]++; return h[0]; }
PROG(sorted_on_stack) { volatile u64 a[5];
	_Pragma("nounroll") for (int i = 0; i < 5; i++) a[i] = i; 
	_Pragma("unroll") for (int i = 0; i < 5; i++) a[i] = ctx[i];
	_Pragma("unroll") for (int i = 0; i < 4; i++) if (a[i] > a[i + 1]) { u64 t = a[i]; a[i] = a[i + 1]; a[i + 1] = t; } return a[4] & 1; }
PROG(volatile_int) { volatile u32 i = ctx[0] & 63; struct big *b = big_at(0); if (!b) return 0; b->slots[i & 63]++; return 0; }
PROG(volatile_int_bounded) { volatile u32 v = (u32)ctx[0] & 31; struct big *b = big_at(0); if (!b) return 0; b->slots[v]++; return 0; }
PROG(volatile_long_bounded) { volatile u64 v = ctx[0] & 31; struct big *b = big_at(0); if (!b) return 0; b->slots[v]++; return 0; }
PROG(many_live_numbers) { struct big *b = big_at(0); if (!b) return 0;
	u32 a = ctx[0] & 63, c = ctx[1] & 63, d = ctx[2] & 63, e = ctx[3] & 63, f = ctx[4] & 63, g = ctx[5] & 63, h = ctx[6] & 63, i = ctx[7] & 63;
	u64 t = ktime_get_ns(); b->slots[a] = t; t += ktime_get_ns(); b->slots[c] += t; b->slots[d] += ktime_get_ns(); b->slots[e] += t; b->slots[f] += ktime_get_ns();
	b->slots[g] = b->slots[h] + b->slots[i] + a + c + d + e + f + g + h + i; return 0; }
PROG(spilled_pointers) { struct big *a = big_at(0), *b = big_at(1), *c = big_at(2), *d = big_at(3); struct big *s = scratch_area();
	if (!a || !b || !c || !d || !s) return 0; u64 t = ktime_get_ns(); a->n = t; b->n = t; c->n = t; d->n = t; s->n = a->n + b->n; return 0; }
PROG(key_of_struct) { struct key k = {}; k.pid = ctx[0]; k.cpu = 3; u64 *v = map_lookup_elem(&counts, &k.address); if (v) (*v)++; return 0; }
PROG(key_from_argument) { u64 k = ctx[0]; u64 one = 1; u64 *v = map_lookup_elem(&counts, &k); if (v) __sync_fetch_and_add(v, 1); else map_update_elem(&counts, &k, &one, 1); return 0; }
PROG(struct_copied) { struct key a, c; a.pid = ctx[0]; a.cpu = 1; a.address = ctx[1]; c = a; barrier_var(c.pid); ringbuf_output(&events, &c, sizeof(c), 0); return 0; }
PROG(struct_zeroed) { struct { u8 kind; u8 pad[7]; u64 a[6]; } e; __builtin_memset(&e, 0, sizeof(e)); e.kind = 3; e.a[2] = ctx[0]; ringbuf_output(&events, &e, sizeof(e), 0); return 0; }
PROG(read_into_struct) { struct key k; if (probe_read_user(&k, sizeof(k), (void *)ctx[0])) return 0; u64 a = k.address; u64 *v = map_lookup_elem(&counts, &a); if (v) *v += k.pid; return 0; }
PROG(read_of_known_size) { u8 buf[64]; probe_read_user(buf, sizeof(buf), (void *)ctx[0]); ringbuf_output(&events, buf, sizeof(buf), 0); return buf[3]; }
PROG(read_of_bounded_size) { u8 buf[64] = {}; u32 n = ctx[1]; if (n > 64) n = 64; probe_read_user(buf, n, (void *)ctx[0]); ringbuf_output(&events, buf, n, 0); return 0; }
PROG(read_of_masked_size) { u8 buf[64] = {}; u32 n = ctx[1] & 63; probe_read_user(buf, n, (void *)ctx[0]); ringbuf_output(&events, buf, n, 0); return 0; }
PROG(read_behind_others) { u8 buf[64] = {}; u32 off = ctx[1] & 31; probe_read_user(buf + off, 16, (void *)ctx[0]); return buf[7]; }
PROG(name_of_process) { char comm[16]; get_current_comm(comm, sizeof(comm)); u64 k = *(u64 *)comm; map_update_elem(&counts, &k, &k, 0); return 0; }
PROG(name_hashed) { char comm[16]; get_current_comm(comm, sizeof(comm)); u64 h = 5381;
	_Pragma("nounroll") for (int i = 0; i < 16; i++) h = h * 33 + comm[i]; map_update_elem(&counts, &h, &h, 0); return 0; }

static __noinline int fill(u64 *a, u64 v) { if (!a) return 0; a[0] = v; a[1] = v + 1; return 0; }
PROG(filled_by_function) { u64 a[2] = {}; fill(a, ctx[0]); return (a[0] + a[1]) & 1; }
static __noinline u64 sum4(const u64 *a) { u64 s = 0; _Pragma("nounroll") for (int i = 0; i < 4; i++) s += a[i]; return s; }
PROG(summed_by_function) { u64 a[4]; a[0] = ctx[0]; a[1] = ctx[1]; a[2] = 7; a[3] = 1; barrier_var(a[3]); return sum4(a) & 1; }
static __noinline u32 clamp(u64 v) { return v > 63 ? 63 : v; }
PROG(clamped_by_function) { struct big *b = big_at(0); if (!b) return 0; b->slots[clamp(ctx[0])]++; b->slots[clamp(ctx[1])]++; return 0; }
static __noinline void bump(struct big *b, u32 i) { if (i < 64) b->slots[i]++; }
PROG(pointer_to_function) { struct big *b = big_at(0); if (!b) return 0; bump(b, ctx[0]); bump(b, 7); bump(b, b->n); return 0; }
static __noinline void swap(u64 *a, u64 *c) { u64 t = *a; *a = *c; *c = t; }
PROG(swapped_by_function) { u64 a = ctx[0], c = ctx[1]; if (a > c) swap(&a, &c); return a < c; }
static __noinline int level2(u64 *a, u32 i) { a[i & 3] += i; return a[0] & 1; }
static __noinline int level1(u64 *a, u32 n) { int r = 0; _Pragma("nounroll") for (u32 i = 0; i < 3; i++) r += level2(a, n + i); return r; }
PROG(two_levels) { u64 a[4] = {}; barrier_var(a[0]); return level1(a, ctx[0]); }
static __noinline struct big *which(u32 i) { u32 key = i & 3; return map_lookup_elem(&bigs, &key); }
PROG(pointer_from_function) { struct big *b = which(ctx[0]); if (b) b->n++; return 0; }
PROG(record_filled) { struct key *k = ringbuf_reserve(&events, sizeof(*k), 0); if (!k) return 0; k->pid = ctx[0]; k->cpu = 1; k->address = ctx[1]; ringbuf_submit(k, 0); return 0; }
PROG(record_perhaps_discarded) { struct key *k = ringbuf_reserve(&events, sizeof(*k), 0); if (!k) return 0; if (probe_read_user(k, sizeof(*k), (void *)ctx[0])) ringbuf_discard(k, 0); else ringbuf_submit(k, 0); return 0; }
static __noinline void submit(struct key *k) { if (k) ringbuf_submit(k, 0); }
PROG(stack_or_scratch) { struct big *s = scratch_area(); u64 local[4] = {1, 2, 3, 4}; u64 *p = s ? s->slots : local; barrier_var(p); return *p & 1; }
PROG(either_map_value) { struct big *a = big_at(0), *s = scratch_area(); struct big *p = a ? a : s; if (!p) return 0; p->n++; return 0; }
PROG(both_or_none) { struct big *a = big_at(0); struct big *p = a; u64 t = ktime_get_ns(); if (!a) return 0; p->n = t; return 0; }
PROG(null_later) { u64 k = 1; u64 *v = map_lookup_elem(&counts, &k); u64 t = ktime_get_ns(); if (ctx[0] > 5) t *= 2; if (v) *v = t; return 0; }
PROG(unwritten_padding) { struct { u32 a; u64 c; } k; k.a = ctx[0]; k.c = ctx[1]; ringbuf_output(&events, &k, sizeof(k), 0); return 0; }
PROG(read_of_variable_size_into_unwritten) { u8 buf[64]; u32 n = ctx[1] & 63; probe_read_user(buf, n, (void *)ctx[0]); ringbuf_output(&events, buf, n, 0); return 0; }
