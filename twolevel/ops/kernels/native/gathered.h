/* Convolution of chosen channels: of every group its own list, which may have any length and order. */

#ifndef TWOLEVEL_GATHERED_H
#define TWOLEVEL_GATHERED_H

#include "layer.h"

/* One group: its outputs are rows first .. first + outputs of the result before `order` is applied. */
typedef struct {
    int64_t first, outputs, inputs;
    const int64_t *channels;    /* [inputs] of the image; NULL for those from first_channel on */
    int64_t first_channel;
    const float **weight;       /* [inputs] where the weights of each input begin */
    int64_t by_output;          /* between the weights of neighbouring outputs */
    const float *factor;        /* [inputs] that the input is multiplied with; NULL for 1 */
} group;

/* max(0, sign x + shift) in place of x, by channel; NULL for x itself. */
typedef struct {
    const float *sign, *shift;
} activation;

/* Images, and how the result is ordered: its channel c is row order[c], or row c without an order. */
typedef struct {
    const layer *shape;
    int64_t outputs, last;  /* channels of the result; whether x and y are [H, W, C] instead of [C, H, W] */
    const int64_t *order;
    int64_t first_tap, by_tap; /* weights of the taps: the first, and from one to the next */
    activation before;
} convolution;

/* Rows begin to end of the result of one image; -1 without memory. */
int gathered_rows(const convolution *c, const group *groups, int64_t number, const float *x, float *y, int64_t begin,
                  int64_t end);

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

/* max(0, v), and NaN for NaN. */
INLINE vec relu(vec v) {
#if defined(__AVX512F__)
    return _mm512_max_ps((vec){0}, v);
#else
    typedef int32_t ints __attribute__((vector_size(4 * LANES)));
    return (vec)((ints)v & ~(ints)(v < 0));
#endif
}
INLINE float relu1(float f) { return f < 0 ? 0 : f; }

/* Room for `number` floats at an address of whole cache lines, not set to anything. */
INLINE float *room(int64_t number) { return aligned_alloc(64, (size_t)round_up(4 * max64(number, 1), 64)); }

#endif
