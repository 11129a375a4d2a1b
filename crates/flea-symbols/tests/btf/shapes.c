/* Functions of every kind of type. Up to BEYOND, BTF describes all that decides their places. */
#include <stdarg.h>
#include <stddef.h>

struct pair { int a; double b; };
struct point { long x, y; };
struct three { char c; short s; float f; };
struct large { long a, b, c; };
struct huge { char bytes[4000]; };
struct floats { float x, y, z; };
struct nested { struct { int a; union { float f; unsigned u; } v; } in; struct point *p; };
struct __attribute__((packed)) tight { char c; int i; };
struct bits { int a : 3; unsigned b : 7; int c; };
struct spread { unsigned long a : 40; unsigned long b : 60; };
struct matrix { short cell[3][2]; };
struct five { char text[5]; };
struct open { int n; int rest[]; };
struct wide { __int128 w; };
struct x87 { long double v; };
union number { float f; int i; double d; };
union word { long n; void *p; };
enum color { RED, BLUE };
enum sign { MINUS = -1, ZERO, PLUS };
typedef unsigned int u32;
typedef const char *text;
typedef int (*callback)(const char *, ...);
typedef struct point place;

int add(int a, int b) { return a + b; }
void nothing(void) {}
void stores(int *to, long n) { *to = (int)n; }
_Bool flag(_Bool b) { return !b; }
char small(char c, signed char s, unsigned char u, short h, unsigned short w) { return c + s + u + h + w; }
long many(int a, int b, int c, int d, int e, int f, int g, char h, long i) { return a + g + h + i; }
double scale(double v, float by, int up) { return up ? v * by : v; }
float manyf(float a, float b, float c, float d, float e, float f, float g, float h, float i) { return a + i; }
long double extended(long double v, int n) { return v + (float)n; }
__int128 wide_int(int n, __int128 w) { return w; }
unsigned __int128 wide_last(int a, int b, int c, int d, int e, unsigned __int128 w, int f) { return w + a + f; }
__float128 quad(__float128 q, int n) { return n ? q : -q; }
double _Complex complex_double(double _Complex z) { return z; }
float _Complex complex_float(float _Complex z, float f) { return z * f; }
long double _Complex complex_extended(long double _Complex z) { return z; }
enum color paint(enum color c) { return c; }
enum sign turn(enum sign s) { return s; }
u32 typed(u32 n, text t, const volatile u32 *restrict r) { return n + *r + !t; }
const char *greet(const char *name, unsigned char **out, const void *const any) { return any ? name : 0; }
int calls(int (*f)(int, char *), callback back, void (*none)(void)) { none(); return f(1, 0) + back(""); }
struct pair of_pair(struct pair p, struct pair *q) { return q ? *q : p; }
place of_point(place p, int n) { p.x += n; return p; }
struct three of_three(struct three t) { return t; }
struct large of_large(struct large l, int last) { l.a += last; return l; }
struct huge *of_huge(struct huge h, struct huge *to) { *to = h; return to; }
struct floats of_floats(struct floats f) { return f; }
struct nested of_nested(struct nested n) { return n; }
struct tight of_tight(struct tight t, int n) { t.i += n; return t; }
struct bits of_bits(struct bits b) { return b; }
struct spread of_spread(struct spread s) { return s; }
struct matrix of_matrix(struct matrix m) { return m; }
struct five of_five(struct five f) { return f; }
struct open *of_open(struct open o, struct open *to) { to->n = o.n; return to; }
struct wide of_wide(struct wide w) { return w; }
struct x87 of_x87(struct x87 x) { return x; }
union number of_number(union number n) { return n; }
union word of_word(union word w) { return w; }
int format(const char *fmt, ...) { va_list l; va_start(l, fmt); int n = va_arg(l, int); va_end(l); return n; }
double formatd(struct point p, double d, ...) { va_list l; va_start(l, d); d += va_arg(l, double); va_end(l); return d + p.x; }
static __attribute__((noinline)) long hidden(struct pair p, long n) { volatile long v = n; return v + p.a; }
long shows(struct pair p) { return hidden(p, 3) + hidden(p, 5); }
long split(int a, int b, int c, int d, int e, struct point p, int f) { return a + p.y + f; }

#ifdef BEYOND
typedef float v4f __attribute__((vector_size(16)));
typedef int v8i __attribute__((vector_size(32)));
struct over { int a; } __attribute__((aligned(16)));
struct held { v4f v; };
struct name { char text[16]; };
struct sixteen { long a, b, c, d; };
v4f vector(v4f v, int n) { return v + (float)n; }
void takes_vector(int n, v4f v, int m) { (void)(v + (float)(n + m)); }
v8i wide_vector(v8i v) { return v; }
_Decimal64 decimal(_Decimal64 d, int n) { return n ? d : -d; }
void takes_half(_Float16 h, int n) { (void)h; (void)n; }
struct over of_over(struct over o) { return o; }
struct held of_held(struct held h, float f) { h.v += f; return h; }
struct name of_name(struct name n, int m) { n.text[0] += m; return n; }
long odd_place(struct large l, struct sixteen s) { return l.a + s.a; }
#endif
