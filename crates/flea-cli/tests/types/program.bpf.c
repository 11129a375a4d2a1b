/* Compiled against what `flea types` says of the older build of target.c. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
/* The macros for bit-fields are the kernel's; here all memory is the user's. */
#define bpf_probe_read_kernel bpf_probe_read_user
#include <bpf/bpf_core_read.h>

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 16);
	__type(key, __u32);
	__type(value, __s64);
} answers SEC(".maps");

static void answer(__u32 key, __s64 value)
{
	__s64 *place = bpf_map_lookup_elem(&answers, &key);

	if (place)
		*place = value;
}

#if defined(DIRECT)
/* The same by loads through the typed pointer that the function is given. */
SEC("fentry/describe")
int fields(__u64 *ctx)
{
	struct client *c = (void *)ctx[0];

	answer(0, c->id);
	answer(1, BPF_CORE_READ_BITFIELD(c, kind));
	answer(2, (int)BPF_CORE_READ_BITFIELD(c, level));
	answer(3, bpf_core_field_exists(c->age) ? c->age : 99);
	answer(4, c->state == bpf_core_enum_value(enum state, BUSY));
	answer(5, c->in.bytes);
	answer(6, c->from[1]->port);
	answer(7, c->name[2]);
	answer(8, bpf_core_type_size(struct client));
	return 0;
}
#elif !defined(LIVE)
SEC("fentry/describe")
int fields(__u64 *ctx)
{
	struct client *c = (void *)ctx[0];
	char name[3];

	answer(0, BPF_CORE_READ_USER(c, id));
	answer(1, BPF_CORE_READ_BITFIELD_PROBED(c, kind));
	answer(2, (int)BPF_CORE_READ_BITFIELD_PROBED(c, level));
	answer(3, bpf_core_field_exists(c->age) ? BPF_CORE_READ_USER(c, age) : 99);
	answer(4, BPF_CORE_READ_USER(c, state) == bpf_core_enum_value(enum state, BUSY));
	answer(5, BPF_CORE_READ_USER(c, in.bytes));
	answer(6, BPF_CORE_READ_USER(c, from[1], port));
	bpf_core_read_user(&name, sizeof(name), &c->name);
	answer(7, name[2]);
	answer(8, bpf_core_type_size(struct client));
	return 0;
}
#else
SEC("fentry/describe")
int fields(__u64 *ctx)
{
	answer(3, BPF_CORE_READ_USER((struct client *)ctx[0], age));
	return 0;
}
#endif

char LICENSE[] SEC("license") = "GPL";
