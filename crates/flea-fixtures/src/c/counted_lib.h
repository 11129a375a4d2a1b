/* What libcounted.so exports. */
#ifndef FLEA_COUNTED_LIB_H
#define FLEA_COUNTED_LIB_H

long lib_add(long a, long b);
unsigned long lib_len(const char *s);
long lib_twice(long a);

#endif
