/* A probe for ../typed.rs: registers have no types, so the program says what they lead to. The
 * structure is not laid out as the target's: it is fitted to that. */
#include <linux/bpf.h>
#include <linux/ptrace.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

extern void *bpf_rdonly_cast(const void *obj, __u32 type_id) __ksym __weak;

struct point { short y; } __attribute__((preserve_access_index));
struct item {
	struct point at;
	const char *name;
	struct item *next;
} __attribute__((preserve_access_index));

SEC("uprobe//proc/self/exe:visit")
int on_visit(struct pt_regs *regs)
{
	struct item *item = bpf_rdonly_cast((void *)PT_REGS_PARM1(regs),
					    bpf_core_type_id_kernel(struct item));

	bpf_printk("%c %d then %d", item->name[1], item->at.y, item->next->next->at.y);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
