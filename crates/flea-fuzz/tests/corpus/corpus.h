/* What the programs of the corpus share. Each program is what tracing tools do, in small: the
 * kernel's verifier takes it, and so should ours. Only helpers that both have. */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;
typedef short s16;
typedef int s32;
typedef long long s64;

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, val) int (*name)[val]
#define __type(name, val) __typeof__(val) *name
#define __noinline __attribute__((noinline))
#define __always_inline inline __attribute__((always_inline))
#define NULL ((void *)0)
#define barrier_var(x) asm volatile("" : "+r"(x))
#define PROG(name) SEC("fentry/" #name) int name(u64 *ctx)

enum { HASH = 1, ARRAY = 2, PERCPU_HASH = 5, PERCPU_ARRAY = 6, RINGBUF = 27 };

static void *(*map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*map_update_elem)(void *map, const void *key, const void *value, u64 flags) = (void *)2;
static long (*map_delete_elem)(void *map, const void *key) = (void *)3;
static u64 (*ktime_get_ns)(void) = (void *)5;
static u32 (*get_prandom_u32)(void) = (void *)7;
static u64 (*get_current_pid_tgid)(void) = (void *)14;
static long (*get_current_comm)(void *buf, u32 size) = (void *)16;
static long (*probe_read_user)(void *dst, u32 size, const void *src) = (void *)112;
static long (*probe_read_user_str)(void *dst, u32 size, const void *src) = (void *)114;
static long (*ringbuf_output)(void *map, void *data, u64 size, u64 flags) = (void *)130;
static void *(*ringbuf_reserve)(void *map, u64 size, u64 flags) = (void *)131;
static void (*ringbuf_submit)(void *data, u64 flags) = (void *)132;
static void (*ringbuf_discard)(void *data, u64 flags) = (void *)133;

struct big {
	u64 slots[64];
	u32 words[256];
	u8 bytes[4096];
	u32 n;
};

struct { __uint(type, ARRAY); __uint(max_entries, 4); __type(key, u32); __type(value, struct big); } bigs SEC(".maps");
struct { __uint(type, HASH); __uint(max_entries, 64); __type(key, u64); __type(value, u64); } counts SEC(".maps");
struct { __uint(type, PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, struct big); } scratch SEC(".maps");
struct { __uint(type, RINGBUF); __uint(max_entries, 4096); } events SEC(".maps");

static __always_inline struct big *big_at(u32 key)
{
	return map_lookup_elem(&bigs, &key);
}

static __always_inline struct big *scratch_area(void)
{
	u32 key = 0;
	return map_lookup_elem(&scratch, &key);
}
