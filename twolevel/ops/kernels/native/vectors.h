/* Vectors of floats as wide as the processor's, and sums and copies across their lanes.

   Loops over arrays of vectors have constant bounds and are unrolled, so that the arrays live in registers. */

#ifndef TWOLEVEL_VECTORS_H
#define TWOLEVEL_VECTORS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LOG_LANES 4
#elif defined(__AVX__)
#define LOG_LANES 3
#else
#define LOG_LANES 2
#endif
#define LANES (1 << LOG_LANES)

/* 32 vector registers hold tiles of 4 x 4 sums, 16 of them tiles of 4 x 2. */
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILE_VECTORS 4
#else
#define TILE_VECTORS 2
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t lanes_vec __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vec load(const float *p) { return *(const unaligned_vec *)p; }
/* A value of several uses, which GCC otherwise reads from memory for every one. */
INLINE vec once(vec v) {
#if defined(__AVX512F__)
    __asm__("" : "+v"(v));
#elif defined(__x86_64__)
    __asm__("" : "+x"(v));
#elif defined(__aarch64__)
    __asm__("" : "+w"(v));
#endif
    return v;
}
INLINE vec load_once(const float *p) { return once(load(p)); }
/* A number about which the compiler is to know nothing. */
#define OPAQUE(number) __asm__("" : "+r"(number))
INLINE void store(float *p, vec v) { *(unaligned_vec *)p = v; }
INLINE vec splat(float f) { return f - (vec){0}; }
INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/* even(a, b, k): lane l is a[l] where bit k of l is 0, else b[l with bit k cleared].
   odd(a, b, k):  lane l is a[l with bit k set] where bit k of l is 0, else b[l]. */
#define EVEN(l, bit) ((l) & (bit) ? LANES + ((l) ^ (bit)) : (l))
#define ODD(l, bit) ((l) & (bit) ? LANES + (l) : (l) | (bit))
#define FOUR(of, l, bit) of(l, bit), of(l + 1, bit), of(l + 2, bit), of(l + 3, bit)
#if LOG_LANES == 4
#define ALL(of, bit) FOUR(of, 0, bit), FOUR(of, 4, bit), FOUR(of, 8, bit), FOUR(of, 12, bit)
#elif LOG_LANES == 3
#define ALL(of, bit) FOUR(of, 0, bit), FOUR(of, 4, bit)
#else
#define ALL(of, bit) FOUR(of, 0, bit)
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (lanes_vec){__VA_ARGS__})
#endif

/* Lanes 0, 2, 4, ... of a and b together, and lanes 1, 3, 5, ... */
#define TWICE(l, bit) (2 * (l))
#define TWICE_AND_ONE(l, bit) (2 * (l) + 1)
#define EVERY_OTHER(a, b) SHUFFLE(a, b, ALL(TWICE, 1))
#define THE_OTHERS(a, b) SHUFFLE(a, b, ALL(TWICE_AND_ONE, 1))
/* Those lanes of a and b in turn: of their lower halves, of their upper halves. */
#define LOWER(l, bit) ((l) & 1 ? LANES + (l) / 2 : (l) / 2)
#define UPPER(l, bit) (LOWER(l, bit) + LANES / 2)
#define IN_TURN_LOWER(a, b) SHUFFLE(a, b, ALL(LOWER, 1))
#define IN_TURN_UPPER(a, b) SHUFFLE(a, b, ALL(UPPER, 1))

INLINE vec even(vec a, vec b, int k) {
    switch (k) {
    case 0: return SHUFFLE(a, b, ALL(EVEN, 1));
    case 1: return SHUFFLE(a, b, ALL(EVEN, 2));
#if LOG_LANES > 2
    case 2: return SHUFFLE(a, b, ALL(EVEN, 4));
#endif
#if LOG_LANES > 3
    case 3: return SHUFFLE(a, b, ALL(EVEN, 8));
#endif
    }
    __builtin_unreachable();
}

INLINE vec odd(vec a, vec b, int k) {
    switch (k) {
    case 0: return SHUFFLE(a, b, ALL(ODD, 1));
    case 1: return SHUFFLE(a, b, ALL(ODD, 2));
#if LOG_LANES > 2
    case 2: return SHUFFLE(a, b, ALL(ODD, 4));
#endif
#if LOG_LANES > 3
    case 3: return SHUFFLE(a, b, ALL(ODD, 8));
#endif
    }
    __builtin_unreachable();
}

/* Transpose u [pixels][channels], and sum every 2^log_sum neighbouring channels on the way.
   Vector c of the result, c a multiple of 2^log_sum, holds the sums of channels c .. for all pixels. */
INLINE void transpose_sum(vec u[LANES], int log_sum) {
    UNROLL for (int k = 0; k < LOG_LANES; k++) {
        const int bit = 1 << k, gone = (1 << (k < log_sum ? k : log_sum)) - 1;
        UNROLL for (int i = 0; i < LANES; i++) {
            if (i & (bit | gone)) continue;
            const vec low = even(u[i], u[i | bit], k), high = odd(u[i], u[i | bit], k);
            if (k < log_sum) u[i] = low + high;
            else u[i] = low, u[i | bit] = high;
        }
    }
}

/* Numbers of part of a vector, and `others` in the other lanes; nothing beyond them is touched. 0 < number <= LANES. */
#if defined(__AVX512F__)
INLINE vec load_over(vec others, const float *p, int64_t number) {
    return (vec)_mm512_mask_loadu_ps((__m512)others, (__mmask16)(0xffff >> (LANES - number)), p);
}
INLINE void store_part(float *p, vec v, int64_t number) {
    _mm512_mask_storeu_ps(p, (__mmask16)(0xffff >> (LANES - number)), (__m512)v);
}
#else
INLINE vec load_over(vec others, const float *p, int64_t number) {
    memcpy(&others, p, 4 * number);
    return others;
}
INLINE void store_part(float *p, vec v, int64_t number) { memcpy(p, &v, 4 * number); }
#endif
INLINE vec load_part(const float *p, int64_t number) { return load_over((vec){0}, p, number); }

/* max(0, v); of NaN and -0 these, as torch has it. */
INLINE vec rectified(vec v) {
#if defined(__AVX512F__)
    return _mm512_max_ps((vec){0}, v);
#else
    return (vec)((lanes_vec)v & ~(lanes_vec)(v < 0));
#endif
}
INLINE float rectified1(float f) { return f < 0 ? 0 : f; }

/* Memory that is needed soon, and how much of it is asked for at a time: a few lines after every tile are lost less
   often than many at once, and come while there is enough to do. */
typedef struct {
    const char *at, *end;
    int64_t lines; /* at a time */
} ahead;

INLINE ahead look_ahead(const float *from, int64_t number, int64_t times) {
    return (ahead){(const char *)from, (const char *)(from + number), number / 16 / max64(times, 1) + 1};
}

INLINE void ask(ahead *a) {
    for (int64_t i = 0; i < a->lines && a->at < a->end; i++, a->at += 64) __builtin_prefetch(a->at, 0, 2);
}

/* `number` zeros at an address of whole cache lines; NULL where there is no memory. */
INLINE float *zeros(int64_t number) {
    const size_t bytes = (size_t)round_up(4 * max64(number, 1), 64);
    float *p = aligned_alloc(64, bytes);
    return p ? memset(p, 0, bytes) : NULL;
}

#endif
