/* Whole tools, in small. */
#include "corpus.h"

struct event { u64 time; u32 pid; u32 tid; u64 args[3]; char comm[16]; u32 n; u8 text[64]; };

PROG(count_calls) { u32 key = 0; struct big *b = map_lookup_elem(&bigs, &key); if (b) __sync_fetch_and_add(&b->slots[0], 1); return 0; }
PROG(entry_time) { u64 id = get_current_pid_tgid(), now = ktime_get_ns(); map_update_elem(&counts, &id, &now, 0); return 0; }
PROG(exit_time) { u64 id = get_current_pid_tgid(); u64 *start = map_lookup_elem(&counts, &id); if (!start) return 0; u64 d = ktime_get_ns() - *start; map_delete_elem(&counts, &id);
	struct big *b = big_at(0); if (!b) return 0; u32 slot = 0;
	_Pragma("unroll") for (int i = 5; i >= 0; i--) if (d >> (1 << i) >> slot) slot += 1 << i; if (slot > 63) slot = 63; __sync_fetch_and_add(&b->slots[slot], 1); return 0; }
PROG(event_sent) { struct event *e = ringbuf_reserve(&events, sizeof(*e), 0); if (!e) return 0; u64 id = get_current_pid_tgid(); e->time = ktime_get_ns(); e->pid = id >> 32; e->tid = id;
	e->args[0] = ctx[0]; e->args[1] = ctx[1]; e->args[2] = ctx[2]; get_current_comm(e->comm, sizeof(e->comm)); long n = probe_read_user_str(e->text, sizeof(e->text), (void *)ctx[0]); e->n = n < 0 ? 0 : n; ringbuf_submit(e, 0); return 0; }
PROG(event_filtered) { u64 id = get_current_pid_tgid(); volatile u32 *want = 0; struct big *b = big_at(0); if (!b) return 0; if (b->n && b->n != (u32)(id >> 32)) return 0;
	struct event *e = ringbuf_reserve(&events, sizeof(*e), 0); if (!e) return 0; __builtin_memset(e, 0, sizeof(*e)); e->pid = id >> 32; if (b->slots[1] & 1) e->args[0] = ctx[0]; if (b->slots[1] & 2) e->args[1] = ctx[1]; ringbuf_submit(e, 0); return 0; }
PROG(latency_by_size) { struct big *b = big_at(0); if (!b) return 0; u64 size = ctx[1]; u32 row = size < 64 ? 0 : size < 4096 ? 1 : size < 65536 ? 2 : 3; u64 t = ctx[2] / 1000; u32 col = t > 15 ? 15 : t; b->slots[row * 16 + col]++; return 0; }
PROG(stack_of_calls) { struct big *b = scratch_area(); if (!b) return 0; u32 depth = b->n; if (depth < 64) b->slots[depth] = ktime_get_ns(); b->n = depth + 1; return 0; }
PROG(stack_popped) { struct big *b = scratch_area(); if (!b) return 0; u32 depth = b->n; if (!depth) return 0; depth--; b->n = depth; if (depth < 64) b->slots[depth] = ktime_get_ns() - b->slots[depth]; return 0; }
PROG(ring_of_samples) { struct big *b = scratch_area(); if (!b) return 0; u32 at = b->n++; b->slots[at % 64] = ctx[0]; return 0; }
PROG(top_ten) { struct big *b = big_at(0); if (!b) return 0; u64 v = ctx[0]; int at = 0;
	_Pragma("nounroll") for (at = 0; at < 10; at++) if (v > b->slots[at]) break; if (at >= 10) return 0;
	_Pragma("nounroll") for (int i = 9; i > 0; i--) { if (i <= at) break; b->slots[i] = b->slots[i - 1]; } b->slots[at] = v; return 0; }
PROG(exponential_average) { struct big *b = big_at(0); if (!b) return 0; u64 old = b->slots[0]; b->slots[0] = old - (old >> 3) + (ctx[0] >> 3); return 0; }
PROG(rate_limited) { struct big *b = big_at(0); if (!b) return 0; u64 now = ktime_get_ns(); if (now - b->slots[0] < 1000000000) { if (b->slots[1]++ > 100) return 0; } else { b->slots[0] = now; b->slots[1] = 0; }
	ringbuf_output(&events, &now, sizeof(now), 0); return 0; }
PROG(sampled) { if (get_prandom_u32() % 100) return 0; struct big *b = big_at(0); if (b) b->n++; return 0; }
PROG(linked_list) { u64 p = ctx[0]; struct { u64 next; u64 value; } node; u64 sum = 0;
	_Pragma("nounroll") for (int i = 0; i < 32; i++) { if (!p) break; if (probe_read_user(&node, sizeof(node), (void *)p)) break; sum += node.value; p = node.next; } map_update_elem(&counts, &sum, &sum, 0); return 0; }
PROG(frame_pointers) { struct big *b = scratch_area(); if (!b) return 0; u64 fp = ctx[0]; u64 frame[2]; u32 n = 0;
	_Pragma("nounroll") for (int i = 0; i < 32; i++) { if (probe_read_user(frame, 16, (void *)fp)) break; b->slots[i] = frame[1]; n = i + 1; fp = frame[0]; if (!fp) break; }
	if (n) ringbuf_output(&events, b->slots, n * 8, 0); return 0; }
PROG(frames_bounded) { struct big *b = scratch_area(); if (!b) return 0; u32 n = ctx[0]; if (n > 32) return 0; ringbuf_output(&events, b->slots, n * 8 + 8, 0); return 0; }
PROG(iovec) { struct big *b = scratch_area(); struct { u64 base, len; } v; u32 off = 0; u32 n = ctx[1]; if (!b) return 0; if (n > 8) n = 8;
	_Pragma("nounroll") for (u32 i = 0; i < 8; i++) { if (i >= n) break; if (probe_read_user(&v, 16, (void *)(ctx[0] + 16 * i))) break; u32 len = v.len; if (len > 128) len = 128; if (off > 1024) break; probe_read_user(b->bytes + off, len, (void *)v.base); off += len; } b->n = off; return 0; }
PROG(payload) { struct big *b = scratch_area(); if (!b) return 0; u64 want = ctx[1]; if (want > 4096) want = 4096; b->n = want; if (probe_read_user(b->bytes, want, (void *)ctx[0])) return 0; ringbuf_output(&events, b->bytes, want, 0); return 0; }
PROG(payload_masked) { struct big *b = scratch_area(); if (!b) return 0; u32 want = ctx[1]; want &= 0xfff; probe_read_user(b->bytes, want, (void *)ctx[0]); ringbuf_output(&events, b->bytes, want + 1, 0); return 0; }
PROG(payload_header) { struct big *b = scratch_area(); if (!b) return 0; u32 want = ctx[1]; if (want > 1024) want = 1024; probe_read_user(b->bytes + 16, want, (void *)ctx[0]); *(u32 *)b->bytes = want; ringbuf_output(&events, b->bytes, want + 16, 0); return 0; }
PROG(chunks) { struct big *b = scratch_area(); if (!b) return 0; u32 left = ctx[1];
	_Pragma("nounroll") for (int i = 0; i < 4; i++) { if (!left) break; u32 n = left > 1024 ? 1024 : left; probe_read_user(b->bytes, n, (void *)(ctx[0] + i * 1024)); ringbuf_output(&events, b->bytes, n, 0); left -= n; } return 0; }
PROG(bloom_filter) { struct big *b = big_at(0); if (!b) return 0; u64 k = ctx[0]; u32 hit = 1;
	_Pragma("unroll") for (int i = 0; i < 4; i++) { k = k * 0x9e3779b97f4a7c15ull + i; u32 bit = k >> 52; if (!(b->slots[bit >> 6] & (1ull << (bit & 63)))) hit = 0; b->slots[bit >> 6] |= 1ull << (bit & 63); } return hit; }
PROG(open_hash) { struct big *b = big_at(0); if (!b) return 0; u32 h = (u32)ctx[0] * 2654435761u;
	_Pragma("nounroll") for (int i = 0; i < 8; i++) { u32 at = ((h >> 24) + i) & 255; if (b->words[at] == (u32)ctx[0]) return 1; if (!b->words[at]) { b->words[at] = ctx[0]; return 2; } } return 0; }
PROG(state_machine) { struct big *b = scratch_area(); if (!b) return 0; u32 state = 0, n = 0;
	_Pragma("nounroll") for (int i = 0; i < 100; i++) { u8 c = b->bytes[i]; switch (state) { case 0: if (c == '"') state = 1; break; case 1: if (c == '\\') state = 2; else if (c == '"') { state = 0; n++; } break; case 2: state = 1; break; } } b->n = n; return 0; }
PROG(json_depth) { struct big *b = scratch_area(); if (!b) return 0; int depth = 0, max = 0;
	_Pragma("nounroll") for (int i = 0; i < 8; i++) { u8 c = b->bytes[i]; if (c == '{') depth++; else if (c == '}') depth--; if (depth > max) max = depth; } if (max >= 0 && max < 64) b->slots[max]++; return 0; }
PROG(minmax) { struct big *b = big_at(0); u32 lo = 0, hi = 0; if (!b) return 0;
	_Pragma("nounroll") for (u32 i = 1; i < 6; i++) { if (b->slots[i] < b->slots[lo & 63]) lo = i; if (b->slots[i] > b->slots[hi & 63]) hi = i; } b->n = lo * 64 + hi; return 0; }
PROG(bits_counted) { struct big *b = big_at(0); u32 n = 0; if (!b) return 0; u64 v = ctx[0];
	_Pragma("nounroll") for (int i = 0; i < 64; i++) { if (v & 1) n++; v >>= 1; } b->words[n]++; return 0; }
PROG(prefix_sums) { struct big *b = big_at(0); if (!b) return 0; u64 s = 0;
	_Pragma("nounroll") for (int i = 0; i < 64; i++) { s += b->slots[i]; b->slots[i] = s; } return 0; }
PROG(crc) { struct big *b = big_at(0); if (!b) return 0; u32 crc = ~0u;
	_Pragma("nounroll") for (int i = 0; i < 32; i++) { crc ^= b->bytes[i]; _Pragma("nounroll") for (int k = 0; k < 8; k++) crc = crc & 1 ? (crc >> 1) ^ 0xedb88320 : crc >> 1; } b->n = crc; return 0; }
PROG(mode_table) { struct mode { u32 lo, hi, slot; }; struct big *b = big_at(0); if (!b) return 0; struct mode *m = (void *)b->bytes;
	_Pragma("nounroll") for (int i = 0; i < 20; i++) { if (ctx[0] >= m[i].lo && ctx[0] < m[i].hi) { u32 s = m[i].slot; if (s < 64) b->slots[s]++; break; } } return 0; }
