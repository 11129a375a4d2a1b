/* Programs for ../typed.rs that change the target's memory, or would like to. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

struct item {
	struct item *next;
	const char *name;
	char label[8];
	int x;
};

SEC("fentry/visit")
int BPF_PROG(moves, struct item *item)
{
	const char *name = item->name;
	int x = 77;
	long moved = bpf_probe_write_user(&item->x, &x, sizeof(x));

	/* A string constant: nobody may write to its page. */
	bpf_printk("moved %ld, renamed %ld", moved, bpf_probe_write_user((void *)name, "x", 1));
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
