/* Counts calls of work(), in all processes that run it, in one map. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 2);
    __type(key, __u32);
    __type(value, __u64);
} sums SEC(".maps");

struct {
    __uint(type, BPF_MAP_TYPE_HASH);
    __uint(max_entries, 1024);
    __type(key, __u32);
    __type(value, __u64);
} by_process SEC(".maps");

static void add(__u32 at, __u64 n)
{
    __u64 *sum = bpf_map_lookup_elem(&sums, &at);
    if (sum)
        __sync_fetch_and_add(sum, n);
}

SEC("fentry/work")
int BPF_PROG(entered)
{
    __u32 pid = bpf_get_current_pid_tgid() >> 32;
    __u64 one = 1, *calls = bpf_map_lookup_elem(&by_process, &pid);
    add(0, 1);
    if (calls) {
        __sync_fetch_and_add(calls, 1);
    } else {
        bpf_map_update_elem(&by_process, &pid, &one, BPF_ANY);
        bpf_printk("process %d", pid);
    }
    return 0;
}

SEC("fexit/work")
int BPF_PROG(left, int x, int result)
{
    add(1, result);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
