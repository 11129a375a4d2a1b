/* Strings and paths. */
#include "corpus.h"

#define AREA(s) struct big *s = scratch_area(); if (!s) return 0
PROG(string_length_used) { AREA(s); long n = probe_read_user_str(s->bytes, 256, (void *)ctx[0]); if (n <= 0 || n > 256) return 0; ringbuf_output(&events, s->bytes, n, 0); return 0; }
PROG(string_length_signed) { AREA(s); int n = probe_read_user_str(s->bytes, 256, (void *)ctx[0]); if (n < 0) return 0; ringbuf_output(&events, s->bytes, n & 255, 0); return 0; }
PROG(string_length_unchecked_above) { AREA(s); int n = probe_read_user_str(s->bytes, 256, (void *)ctx[0]); if (n > 0) ringbuf_output(&events, s->bytes, n, 0); return 0; }
PROG(string_on_stack) { char buf[64]; long n = probe_read_user_str(buf, sizeof(buf), (void *)ctx[0]); if (n > 0) ringbuf_output(&events, buf, n, 0); return 0; }
PROG(string_cut) { AREA(s); long n = probe_read_user_str(s->bytes, 128, (void *)ctx[0]); if (n < 1 || n > 128) return 0; s->bytes[n - 1] = '!'; return 0; }
PROG(two_strings) { AREA(s); long n = probe_read_user_str(s->bytes, 256, (void *)ctx[0]); if (n < 0 || n > 256) return 0;
	long m = probe_read_user_str(s->bytes + n, 256, (void *)ctx[1]); if (m < 0 || m > 256) return 0; u32 total = n + m; ringbuf_output(&events, s->bytes, total & 1023, 0); return 0; }
PROG(three_strings) { AREA(s); u32 off = 0;
	_Pragma("nounroll") for (int i = 0; i < 3; i++) { if (off > 4096 - 256) break; long n = probe_read_user_str(s->bytes + off, 256, (void *)ctx[i]); if (n <= 0) break; off += n; }
	s->n = off; return 0; }
PROG(argv) { AREA(s); u32 off = 0; u64 args = ctx[0];
	_Pragma("nounroll") for (int i = 0; i < 20; i++) { u64 p = 0; if (probe_read_user(&p, 8, (void *)(args + 8 * i)) || !p) break;
		if (off > 4096 - 128) break; long n = probe_read_user_str(&s->bytes[off], 128, (void *)p); if (n < 0 || n > 128) break; off += n; }
	s->n = off; return 0; }
PROG(starts_with) { char buf[8] = {}; probe_read_user_str(buf, sizeof(buf), (void *)ctx[0]); return buf[0] == '/' && buf[1] == 'd' && buf[2] == 'e' && buf[3] == 'v'; }
PROG(compared_with_constant) { static const char want[8] = "nginx"; char buf[8] = {}; probe_read_user_str(buf, sizeof(buf), (void *)ctx[0]);
	_Pragma("nounroll") for (int i = 0; i < 6; i++) if (buf[i] != ((volatile const char *)want)[i]) return 0; return 1; }
PROG(compared_unrolled) { char buf[16] = {}; probe_read_user_str(buf, sizeof(buf), (void *)ctx[0]); const char *w = "/usr/bin/python";
	_Pragma("unroll") for (int i = 0; i < 15; i++) if (buf[i] != w[i]) return 0; return 1; }
PROG(hashed) { AREA(s); u32 h = 2166136261u; if (probe_read_user_str(s->bytes, 128, (void *)ctx[0]) < 0) return 0;
	_Pragma("nounroll") for (int i = 0; i < 128; i++) { u8 c = s->bytes[i]; if (!c) break; h = (h ^ c) * 16777619; } u64 k = h; map_update_elem(&counts, &k, &k, 0); return 0; }
PROG(decimal) { AREA(s); u64 v = ctx[0]; u32 i = 0;
	_Pragma("nounroll") for (; i < 20; i++) { s->bytes[i] = '0' + v % 10; v /= 10; if (!v) break; } s->n = i; return 0; }
PROG(hexadecimal) { char out[17]; u64 v = ctx[0];
	_Pragma("nounroll") for (int i = 0; i < 16; i++) { u32 d = (v >> (60 - 4 * i)) & 15; out[i] = d < 10 ? '0' + d : 'a' + d - 10; } out[16] = 0; ringbuf_output(&events, out, 17, 0); return 0; }
PROG(last_slash) { AREA(s); int last = -1; probe_read_user_str(s->bytes, 256, (void *)ctx[0]);
	_Pragma("nounroll") for (int i = 0; i < 8; i++) { if (!s->bytes[i]) break; if (s->bytes[i] == '/') last = i; } if (last >= 0 && last < 255) s->bytes[last + 1] = 0; return 0; }
PROG(parsed_number) { AREA(s); u64 v = 0; probe_read_user_str(s->bytes, 32, (void *)ctx[0]);
	_Pragma("nounroll") for (int i = 0; i < 20; i++) { u8 c = s->bytes[i] - '0'; if (c > 9) break; v = v * 10 + c; } if (v < 64) s->slots[v]++; return 0; }
PROG(line_copied) { AREA(s);
	_Pragma("nounroll") for (int i = 0; i < 200; i++) { u8 c = s->bytes[i]; s->bytes[i + 1000] = c; if (c == '\n') break; } return 0; }
PROG(upper_case) { AREA(s); probe_read_user_str(s->bytes, 64, (void *)ctx[0]);
	_Pragma("nounroll") for (int i = 0; i < 64; i++) { u8 c = s->bytes[i]; if (c >= 'a' && c <= 'z') s->bytes[i] = c - 32; } return 0; }
PROG(http_method) { char buf[16] = {}; probe_read_user(buf, 16, (void *)ctx[0]); if (buf[0] == 'G' && buf[1] == 'E' && buf[2] == 'T') return 1; if (buf[0] == 'P' && buf[1] == 'O' && buf[2] == 'S' && buf[3] == 'T') return 2;
	if (buf[0] == 'P' && buf[1] == 'U' && buf[2] == 'T') return 3; if (*(u32 *)buf == 0x454c4544) return 4; return 0; }
PROG(dns_labels) { AREA(s); u32 at = 0;
	_Pragma("nounroll") for (int i = 0; i < 10; i++) { if (at >= 200) break; u32 len = s->bytes[at]; if (!len || len > 63) break; s->bytes[at] = '.'; at += len + 1; } s->n = at; return 0; }
PROG(varint) { AREA(s); u64 v = 0; u32 at = ctx[0] & 1023;
	_Pragma("nounroll") for (int i = 0; i < 10; i++) { u8 c = s->bytes[at + i]; v |= (u64)(c & 127) << (7 * i); if (!(c & 128)) break; } return v & 1; }
PROG(tlv_records) { AREA(s); u32 at = 0, total = s->n & 1023;
	_Pragma("nounroll") for (int i = 0; i < 16; i++) { if (at + 2 > total) break; u8 kind = s->bytes[at & 1023], len = s->bytes[(at + 1) & 1023]; if (kind == 7) { s->slots[0] = len; break; } at += 2 + len; } return 0; }
PROG(checksum) { AREA(s); u64 sum = 0; u32 n = ctx[0]; if (n > 1024) n = 1024;
	_Pragma("nounroll") for (u32 i = 0; i + 1 < n; i += 2) sum += *(u16 *)(s->bytes + i); sum = (sum & 0xffff) + (sum >> 16); return sum & 1; }
