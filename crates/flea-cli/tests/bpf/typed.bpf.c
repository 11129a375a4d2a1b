/* Programs for ../typed.rs: fields of the target's own data by plain loads, as in C. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

struct point { int x; short y; };

struct item {
	struct item *next;
	const char *name;
	char label[8];
	struct point at;
	unsigned flags : 3, kind : 5;
	union { struct item *owner; long number; } u;
	struct point *corners[2];
	double weight;
};

SEC("fentry/visit")
int BPF_PROG(on_visit, struct item *item)
{
	struct item *next = item->next;
	char name[8];
	long length;

	bpf_printk("at %d %d, flags %d kind %d, number %ld, %c", item->at.x, item->at.y,
		   item->flags, item->kind, item->u.number, item->label[5]);
	bpf_printk("next %c, x %d, corner %d %d", next->name[3], next->at.x, item->corners[0]->x,
		   next->corners[1]->y);
	/* As a source for the helpers, whatever they are called. */
	length = bpf_probe_read_kernel_str(name, sizeof(name), next->next->name);
	bpf_printk("last %s %ld", name, length);
	return 0;
}

SEC("fexit/find")
int BPF_PROG(on_find, struct item *list, int n, struct item *ret)
{
	bpf_printk("found %c behind %c, %d on", ret->name[0], list->name[0], n);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
