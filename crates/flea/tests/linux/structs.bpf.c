/* Structs by value: one context word per eightbyte, wherever the words are. `seen` has what each
 * function's programs found in their context, a row for each. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

enum { ROWS = 7, WORDS = 16 };

struct {
	__u64 at_entry[ROWS][WORDS];
	__u64 at_exit[ROWS][WORDS];
} seen;

#define ROW(row, name, n)                                                                      \
	SEC("fentry/" #name) int entry_##name(__u64 *ctx)                                      \
	{                                                                                      \
		for (int i = 0; i < (n); i++)                                                  \
			seen.at_entry[row][i] = ctx[i];                                             \
		seen.at_entry[row][WORDS - 1] = bpf_get_func_arg_cnt(ctx);                          \
		return 0;                                                                      \
	}                                                                                      \
	SEC("fexit/" #name) int exit_##name(__u64 *ctx)                                        \
	{                                                                                      \
		for (int i = 0; i <= (n); i++)                                                 \
			seen.at_exit[row][i] = ctx[i];                                              \
		seen.at_exit[row][WORDS - 1] = bpf_get_func_arg_cnt(ctx);                           \
		return 0;                                                                      \
	}

ROW(0, struct_first, 4)
ROW(1, struct_middle, 4)
ROW(2, struct_last, 4)
ROW(3, struct_small, 1)
ROW(4, struct_no_room, 9)
ROW(5, struct_mixed, 8)
ROW(6, struct_large, 7)

char LICENSE[] SEC("license") = "GPL";
