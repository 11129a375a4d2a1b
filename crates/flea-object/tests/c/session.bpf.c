/* fsession's two kernel functions, declared as Linux 7.0 wants them. */
#include "flea_test.h"

extern _Bool bpf_session_is_return(void *ctx) __ksym;
extern u64 *bpf_session_cookie(void *ctx) __ksym;

struct {
	__uint(type, PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} spent SEC(".maps");

SEC("fsession/main:work")
u64 time_work(void *ctx)
{
	u64 *cookie = bpf_session_cookie(ctx);
	u32 zero = 0;
	u64 *sum;

	if (!bpf_session_is_return(ctx)) {
		*cookie = ktime_get_ns();
		return 0;
	}
	sum = map_lookup_elem(&spent, &zero);
	if (sum)
		*sum += ktime_get_ns() - *cookie;
	return 0;
}
