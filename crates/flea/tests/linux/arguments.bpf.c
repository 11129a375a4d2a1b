/* fentry and fexit on arguments of every width; what main.rs calls the functions with is
 * what is compared with here. Each check counts in its own element of `right`. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

__u64 right[32];

static __always_inline void check(int n, int holds)
{
	if (holds)
		right[n]++;
}

SEC("fentry/one")
int BPF_PROG(entry1, int a)
{
	check(0, a == 1);
	return 0;
}

SEC("fentry/two")
int BPF_PROG(entry2, int a, __u64 b)
{
	check(1, a == 2 && b == 3);
	return 0;
}

SEC("fentry/three")
int BPF_PROG(entry3, char a, int b, __u64 c)
{
	check(2, a == 4 && b == 5 && c == 6);
	return 0;
}

SEC("fentry/four")
int BPF_PROG(entry4, void *a, char b, int c, __u64 d)
{
	check(3, a == (void *)7 && b == 8 && c == 9 && d == 10);
	return 0;
}

SEC("fentry/five")
int BPF_PROG(entry5, __u64 a, void *b, short c, int d, __u64 e)
{
	check(4, a == 11 && b == (void *)12 && c == 13 && d == 14 && e == 15);
	return 0;
}

SEC("fentry/six")
int BPF_PROG(entry6, __u64 a, void *b, short c, int d, void *e, __u64 f)
{
	check(5, a == 16 && b == (void *)17 && c == 18 && d == 19 && e == (void *)20 && f == 21);
	return 0;
}

SEC("fentry/null_pointer")
int BPF_PROG(entry7, void *a)
{
	check(6, !a);
	return 0;
}

/* `a->next` is a load through the target's pointer. */
SEC("fentry/null_member")
int BPF_PROG(entry8, void *a)
{
	void *next = (void *)1;

	check(7, a && !bpf_probe_read_user(&next, sizeof(next), a) && !next);
	return 0;
}

SEC("fexit/one")
int BPF_PROG(exit1, int a, int ret)
{
	check(8, a == 1 && ret == 2);
	return 0;
}

SEC("fexit/two")
int BPF_PROG(exit2, int a, __u64 b, int ret)
{
	check(9, a == 2 && b == 3 && ret == 5);
	return 0;
}

SEC("fexit/three")
int BPF_PROG(exit3, char a, int b, __u64 c, int ret)
{
	check(10, a == 4 && b == 5 && c == 6 && ret == 15);
	return 0;
}

SEC("fexit/four")
int BPF_PROG(exit4, void *a, char b, int c, __u64 d, int ret)
{
	check(11, a == (void *)7 && b == 8 && c == 9 && d == 10 && ret == 34);
	return 0;
}

SEC("fexit/five")
int BPF_PROG(exit5, __u64 a, void *b, short c, int d, __u64 e, int ret)
{
	check(12, a == 11 && b == (void *)12 && c == 13 && d == 14 && e == 15 && ret == 65);
	return 0;
}

SEC("fexit/six")
int BPF_PROG(exit6, __u64 a, void *b, short c, int d, void *e, __u64 f, int ret)
{
	check(13, a == 16 && b == (void *)17 && c == 18 && d == 19 && e == (void *)20 &&
			  f == 21 && ret == 111);
	return 0;
}

SEC("fexit/null_pointer")
int BPF_PROG(exit7, void *a, int ret)
{
	check(14, !a && ret == 0);
	return 0;
}

SEC("fexit/null_member")
int BPF_PROG(exit8, void *a, int ret)
{
	void *next = (void *)1;

	check(15, a && !bpf_probe_read_user(&next, sizeof(next), a) && !next && ret == 0);
	return 0;
}

/* Arguments past the sixth come from the caller's frame, small ones with their upper bytes
 * cleared. */
SEC("fentry/seven")
int BPF_PROG(entry_7_args, __u64 a, void *b, short c, int d, void *e, char f, int g)
{
	check(16, a == 16 && b == (void *)17 && c == 18 && d == 19 && e == (void *)20 &&
			  f == 21 && g == 22 && ctx[6] == 22);
	return 0;
}

SEC("fexit/seven")
int BPF_PROG(exit_7_args, __u64 a, void *b, short c, int d, void *e, char f, int g, int ret)
{
	check(17, a == 16 && b == (void *)17 && c == 18 && d == 19 && e == (void *)20 &&
			  f == 21 && g == 22 && ctx[6] == 22 && ret == 133);
	return 0;
}

SEC("fentry/eleven")
int BPF_PROG(entry_11_args, __u64 a, void *b, short c, int d, void *e, char f, int g,
	     unsigned int h, long i, __u64 j, unsigned long k)
{
	check(18, a == 16 && b == (void *)17 && c == 18 && d == 19 && e == (void *)20 &&
			  f == 21 && g == 22 && h == 23 && i == 24 && j == 25 && k == 26 &&
			  ctx[7] == 23);
	return 0;
}

SEC("fexit/eleven")
int BPF_PROG(exit_11_args, __u64 a, void *b, short c, int d, void *e, char f, int g,
	     unsigned int h, long i, __u64 j, unsigned long k, int ret)
{
	check(19, a == 16 && b == (void *)17 && c == 18 && d == 19 && e == (void *)20 &&
			  f == 21 && g == 22 && h == 23 && i == 24 && j == 25 && k == 26 &&
			  ret == 231);
	return 0;
}

char LICENSE[] SEC("license") = "GPL";
