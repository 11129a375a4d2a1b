/* A shared library whose functions are called through the PLT, by the executable and by
 * the library itself. */
#include "harness.h"
#include "counted_lib.h"

NOINLINE long lib_add(long a, long b)
{
    KEEP();
    return a + b;
}

NOINLINE unsigned long lib_len(const char *s)
{
    KEEP();
    return strlen(s);
}

/* Calls an exported function of its own library: through the PLT too. */
NOINLINE long lib_twice(long a)
{
    long r = lib_add(a, a);
    KEEP();
    return r;
}
