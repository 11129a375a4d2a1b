/* Objects that are refused: each CASE_ is one, with a message of its own. */
#include "flea_test.h"

#define MAP(...) struct { __VA_ARGS__ } a_map SEC(".maps")
#define PROGRAM(section) SEC(section) u64 prog(u64 *ctx) { return 0; }

#if defined(CASE_kprobe)
PROGRAM("kprobe/do_unlinkat")
#elif defined(CASE_uprobe_offset)
PROGRAM("uprobe/libc:malloc+4")
#elif defined(CASE_unknown_section)
PROGRAM("foo/bar")
#elif defined(CASE_no_function)
PROGRAM("fentry/")
#elif defined(CASE_static)
SEC("fentry/f") static u64 prog(u64 *ctx) { return 0; }
#elif defined(CASE_prog_array)
MAP(__uint(type, PROG_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64););
#elif defined(CASE_prog_array_flags)
MAP(__uint(type, PROG_ARRAY); __uint(max_entries, 1); __uint(map_flags, 1 << 7); __type(key, u32);
    __type(value, u32););
#elif defined(CASE_prog_array_size)
SEC("fentry/f") int prog(void *ctx) { return 0; }
MAP(__uint(type, PROG_ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u64);
    __array(values, int (void *));) = { .values = { (void *)&prog } };
#elif defined(CASE_prog_array_end)
SEC("fentry/f") int prog(void *ctx) { return 0; }
MAP(__uint(type, PROG_ARRAY); __uint(max_entries, 2); __type(key, u32);
    __array(values, int (void *));) = { .values = { [2] = (void *)&prog } };
#elif defined(CASE_prog_array_text)
__noinline int helper(void *ctx) { return 0; }
MAP(__uint(type, PROG_ARRAY); __uint(max_entries, 2); __type(key, u32);
    __array(values, int (void *));) = { .values = { (void *)&helper } };
#elif defined(CASE_prog_array_data)
u64 number;
MAP(__uint(type, PROG_ARRAY); __uint(max_entries, 2); __type(key, u32);
    __array(values, int (void *));) = { .values = { [1] = (void *)&number } };
#elif defined(CASE_prog_array_values)
MAP(__uint(type, PROG_ARRAY); __uint(max_entries, 2); __type(key, u32); __array(values, u64););
#elif defined(CASE_lru)
MAP(__uint(type, LRU_HASH); __uint(max_entries, 1); __type(key, u32); __type(value, u32););
#elif defined(CASE_no_type)
MAP(__uint(max_entries, 1); __type(key, u32); __type(value, u32););
#elif defined(CASE_array_key)
MAP(__uint(type, ARRAY); __uint(max_entries, 1); __type(key, u64); __type(value, u32););
#elif defined(CASE_no_entries)
MAP(__uint(type, ARRAY); __type(key, u32); __type(value, u32););
#elif defined(CASE_no_value)
MAP(__uint(type, HASH); __uint(max_entries, 1); __type(key, u32););
#elif defined(CASE_ringbuf_size)
MAP(__uint(type, RINGBUF); __uint(max_entries, 3 * 4096););
#elif defined(CASE_ringbuf_page)
MAP(__uint(type, RINGBUF); __uint(max_entries, 2048););
#elif defined(CASE_ringbuf_key)
MAP(__uint(type, RINGBUF); __uint(max_entries, 4096); __type(key, u32););
#elif defined(CASE_hash_key)
MAP(__uint(type, HASH); __uint(max_entries, 1); __uint(key_size, 513); __uint(value_size, 4););
#elif defined(CASE_percpu_value)
MAP(__uint(type, PERCPU_HASH); __uint(max_entries, 1); __type(key, u32);
    __uint(value_size, 32769););
#elif defined(CASE_flags)
MAP(__uint(type, ARRAY); __uint(max_entries, 1); __uint(map_flags, 1 << 11); __type(key, u32);
    __type(value, u32););
#elif defined(CASE_pinning)
MAP(__uint(type, ARRAY); __uint(max_entries, 1); __uint(pinning, 1); __type(key, u32);
    __type(value, u32););
#elif defined(CASE_conflict)
MAP(__uint(type, ARRAY); __uint(max_entries, 1); __uint(key_size, 4); __type(key, u64);
    __type(value, u32););
#elif defined(CASE_inner_map)
struct inner { __uint(type, ARRAY); };
MAP(__uint(type, HASH); __uint(max_entries, 1); __type(key, u32); __array(values, struct inner););
#elif defined(CASE_no_inner)
MAP(__uint(type, ARRAY_OF_MAPS); __uint(max_entries, 1); __type(key, u32); __type(value, u32););
#elif defined(CASE_nested_maps)
struct leaf { __uint(type, ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u32); };
struct inner { __uint(type, ARRAY_OF_MAPS); __uint(max_entries, 1); __type(key, u32);
	       __array(values, struct leaf); };
MAP(__uint(type, HASH_OF_MAPS); __uint(max_entries, 1); __type(key, u32);
    __array(values, struct inner););
#elif defined(CASE_outer_value)
struct inner { __uint(type, ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u32); };
MAP(__uint(type, HASH_OF_MAPS); __uint(max_entries, 1); __type(key, u32); __type(value, u64);
    __array(values, struct inner););
#elif defined(CASE_wrong_inner)
struct inner { __uint(type, ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u32); };
struct { __uint(type, ARRAY); __uint(max_entries, 2); __type(key, u32); __type(value, u32); }
	two SEC(".maps");
MAP(__uint(type, HASH_OF_MAPS); __uint(max_entries, 1); __type(key, u32);
    __array(values, struct inner);) = { .values = { [0] = (void *)&two } };
#elif defined(CASE_inner_slot)
struct inner { __uint(type, ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u32); };
struct inner one SEC(".maps");
MAP(__uint(type, ARRAY_OF_MAPS); __uint(max_entries, 1); __type(key, u32);
    __array(values, struct inner);) = { .values = { [1] = &one } };
#elif defined(CASE_inner_room)
struct inner { __uint(type, ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u32); };
struct inner one SEC(".maps");
MAP(__uint(type, HASH_OF_MAPS); __uint(max_entries, 1); __type(key, u32);
    __array(values, struct inner);) = { .values = { [5] = &one, [9] = &one } };
#elif defined(CASE_inner_key)
struct inner { __uint(type, ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u32); };
struct inner one SEC(".maps");
MAP(__uint(type, HASH_OF_MAPS); __uint(max_entries, 1); __type(key, u64);
    __array(values, struct inner);) = { .values = { [0] = &one } };
#elif defined(CASE_inner_data)
struct inner { __uint(type, ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, u32); };
u64 number;
MAP(__uint(type, ARRAY_OF_MAPS); __uint(max_entries, 1); __type(key, u32);
    __array(values, struct inner);) = { .values = { [0] = (void *)&number } };
#elif defined(CASE_two_locks)
struct value { struct bpf_spin_lock a; u32 x; struct bpf_spin_lock b; };
MAP(__uint(type, ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, struct value););
#elif defined(CASE_lock_array)
struct value { u64 x; struct bpf_spin_lock locks[3]; };
MAP(__uint(type, HASH); __uint(max_entries, 1); __type(key, u32); __type(value, struct value););
#elif defined(CASE_lock_alignment)
struct value { u16 x; struct bpf_spin_lock lock; } __attribute__((packed));
MAP(__uint(type, ARRAY); __uint(max_entries, 1); __type(key, u32); __type(value, struct value););
#elif defined(CASE_lock_percpu)
struct value { u32 x; struct bpf_spin_lock lock; };
MAP(__uint(type, PERCPU_ARRAY); __uint(max_entries, 1); __type(key, u32);
    __type(value, struct value););
#elif defined(CASE_lock_rodata)
const struct bpf_spin_lock lock = {};
SEC("fentry/f") u64 prog(u64 *ctx) { return *(volatile u32 *)&lock.val; }
#elif defined(CASE_not_uint)
MAP(int type; __uint(max_entries, 1););
#elif defined(CASE_not_a_structure)
u64 a_map SEC(".maps");
#elif defined(CASE_legacy)
struct { u32 type, key, value, entries, flags; } a_map SEC("maps") = { 1, 4, 4, 1, 0 };
#elif defined(CASE_extern_function)
extern void bpf_rcu_read_lock(void) __ksym;
SEC("fentry/f") u64 prog(u64 *ctx) { bpf_rcu_read_lock(); return 0; }
#elif defined(CASE_extern_variable)
extern const int LINUX_KERNEL_VERSION __kconfig;
SEC("fentry/f") u64 prog(u64 *ctx) { return LINUX_KERNEL_VERSION; }
#elif defined(CASE_not_a_session)
extern _Bool bpf_session_is_return(void *ctx) __ksym;
SEC("fexit/f") u64 prog(u64 *ctx) { return bpf_session_is_return(ctx); }
#elif defined(CASE_address_in_data)
u64 number;
u64 *pointer = &number;
SEC("fentry/f") u64 prog(u64 *ctx) { return *(volatile u64 *)pointer; }
#elif defined(CASE_much_data)
volatile char one[40 << 20] SEC(".bss.one"), two[40 << 20] SEC(".bss.two");
SEC("fentry/f") u64 prog(u64 *ctx) { return one[5] + two[5]; }
#else
#error which case?
#endif
