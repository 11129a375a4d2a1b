// A library that the torture program opens and closes all the time.
#include "torture.h"

extern "C" __attribute__((noinline)) unsigned long plugin_step(unsigned long x)
{
    __asm__ volatile("" ::: "memory");
    return mixed(x);
}

extern "C" unsigned long plugin_work(unsigned long x, int rounds)
{
    for (int i = 0; i < rounds; i++)
        x = plugin_step(x);
    return x;
}
