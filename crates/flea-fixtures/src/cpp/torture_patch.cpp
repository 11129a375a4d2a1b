// A live patch of the torture program: another code for the same function.
#include "torture.h"

extern "C" __attribute__((noinline)) unsigned long step(unsigned long x)
{
    volatile unsigned long kept = x;
    return mixed(kept);
}
