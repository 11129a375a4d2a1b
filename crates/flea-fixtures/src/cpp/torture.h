// What the torture program, its plug-in and its live patch compute alike.
#ifndef TORTURE_H
#define TORTURE_H

// One round of a mixing function: every bit of the result depends on every bit of `x`.
inline unsigned long mixed(unsigned long x)
{
    x ^= x >> 31;
    x *= 0x9fb21c651e98df25UL;
    x ^= x >> 28;
    return x + 0x9e3779b97f4a7c15UL;
}

#endif
