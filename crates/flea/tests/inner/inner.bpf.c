/* Maps of maps as a routing table, and an account that is changed under its lock. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

/* By class and destination: how often, and how much. */
struct traffic {
	__u64 calls;
	__u64 bytes;
};

struct table {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 64);
	__type(key, __u32);
	__type(value, struct traffic);
};

struct table north SEC(".maps");
struct table south SEC(".maps");
struct table spare SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 4);
	__type(key, __u32);
	__array(values, struct table);
} classes SEC(".maps") = {
	.values = { [0] = (void *)&north, [2] = (void *)&south },
};

/* The same tables by name, and of any length: how much each thread has sent. */
struct list {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 8);
	__type(key, __u32);
	__type(value, __u64);
} sent SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(max_entries, 8);
	__type(key, __u32);
	__array(values, struct list);
} names SEC(".maps");

__u64 unrouted;

SEC("fentry/inner_route")
int route(__u64 *ctx)
{
	__u32 class = ctx[0], to = ctx[1];
	__u64 bytes = ctx[2];
	void *table = bpf_map_lookup_elem(&classes, &class);
	struct traffic *known, first = { 1, bytes };

	if (!table) {
		__sync_fetch_and_add(&unrouted, 1);
		return 0;
	}
	known = bpf_map_lookup_elem(table, &to);
	if (known) {
		__sync_fetch_and_add(&known->calls, 1);
		__sync_fetch_and_add(&known->bytes, bytes);
	} else if (bpf_map_update_elem(table, &to, &first, BPF_NOEXIST)) {
		/* Another thread was faster. */
		known = bpf_map_lookup_elem(table, &to);
		if (known) {
			__sync_fetch_and_add(&known->calls, 1);
			__sync_fetch_and_add(&known->bytes, bytes);
		}
	}
	return 0;
}

SEC("fexit/inner_route")
int count_by_name(__u64 *ctx)
{
	__u32 name = 1000 + (__u32)ctx[0], to = ctx[1];
	void *list = bpf_map_lookup_elem(&names, &name);
	__u64 *value;

	if (!list)
		return 0;
	value = bpf_map_lookup_elem(list, &to);
	if (value)
		*value += ctx[2];
	return 0;
}

/* `left` and `right` go up together, with a while between. */
struct account {
	__u64 left;
	__u32 scratch;
	struct bpf_spin_lock lock;
	__u64 right;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct account);
} accounts SEC(".maps");

static __always_inline void change(struct account *account)
{
	bpf_spin_lock(&account->lock);
	account->left++;
	for (int i = 0; i < 300; i++)
		*(volatile __u32 *)&account->scratch = i;
	account->right++;
	bpf_spin_unlock(&account->lock);
}

SEC("fentry/inner_deposit")
int deposit(__u64 *ctx)
{
	__u32 key = 0;
	struct account *account = bpf_map_lookup_elem(&accounts, &key);

	if (account)
		change(account);
	return 0;
}

/* Another program that wants the same lock; called in a signal handler. */
SEC("fentry/inner_handler")
int deposit_in_handler(__u64 *ctx)
{
	__u32 key = 0;
	struct account *account = bpf_map_lookup_elem(&accounts, &key);

	if (account)
		change(account);
	return 0;
}

SEC("fentry/inner_reset")
int reset(__u64 *ctx)
{
	struct account empty = {};
	__u32 key = 0;

	bpf_map_update_elem(&accounts, &key, &empty, BPF_F_LOCK);
	return 0;
}

/* The same with a variable of its own lock. */
struct bpf_spin_lock total_lock SEC(".data.total");
__u64 total_left SEC(".data.total");
__u64 total_right SEC(".data.total");

SEC("fexit/inner_deposit")
int total(__u64 *ctx)
{
	bpf_spin_lock(&total_lock);
	total_left++;
	total_right++;
	bpf_spin_unlock(&total_lock);
	return 0;
}

/* A record that is reserved first, as nothing can be called under the lock. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} notes SEC(".maps");

SEC("fentry/inner_note")
int note(__u64 *ctx)
{
	__u32 key = 0;
	struct account *account = bpf_map_lookup_elem(&accounts, &key);
	__u64 *record;

	if (!account)
		return 0;
	record = bpf_ringbuf_reserve(&notes, sizeof(*record), 0);
	if (!record)
		return 0;
	bpf_spin_lock(&account->lock);
	*record = account->left;
	bpf_spin_unlock(&account->lock);
	bpf_ringbuf_submit(record, 0);
	return 0;
}
