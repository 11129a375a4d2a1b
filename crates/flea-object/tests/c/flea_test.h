/* What the test programs need, and no more; not libbpf's headers, which not every machine
 * has (libbpf_headers.bpf.c uses those). */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long s64;

#define SEC(name) __attribute__((section(name), used))
#define __uint(name, val) int (*name)[val]
#define __type(name, val) __typeof__(val) *name
#define __array(name, val) __typeof__(val) *name[]
#define __noinline __attribute__((noinline))
#define __ksym __attribute__((section(".ksyms")))
#define __kconfig __attribute__((section(".kconfig")))

enum { HASH = 1, ARRAY = 2, PROG_ARRAY = 3, PERCPU_HASH = 5, PERCPU_ARRAY = 6, LRU_HASH = 9,
       ARRAY_OF_MAPS = 12, HASH_OF_MAPS = 13, RINGBUF = 27 };

struct bpf_spin_lock { u32 val; };

static void *(*map_lookup_elem)(void *map, const void *key) = (void *)1;
static long (*map_update_elem)(void *map, const void *key, const void *value,
			       u64 flags) = (void *)2;
static u64 (*ktime_get_ns)(void) = (void *)5;
static long (*trace_printk)(const char *fmt, u32 size, ...) = (void *)6;
static long (*spin_lock)(struct bpf_spin_lock *lock) = (void *)93;
static long (*spin_unlock)(struct bpf_spin_lock *lock) = (void *)94;
static long (*ringbuf_output)(void *map, void *data, u64 size, u64 flags) = (void *)130;
static long (*loop)(u32 n, void *callback, void *ctx, u64 flags) = (void *)181;
