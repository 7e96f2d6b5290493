/* Maps whose channels are normalised one by one, and the vectors of a strip of their memory.

   Planes [B, C, P], where vectors run along pixels; or rows [B P, C], where they run along channels: there as many
   pixels as fill whole vectors make a line, and what is summed is summed by place in the line before it is by channel. */

#ifndef TWOLEVEL_MAPS_H
#define TWOLEVEL_MAPS_H

#include "vectors.h"

enum {
    LEAST_LINE = 128, /* numbers; sums in fewer places would wait for each other */
    BLOCK = 16384,    /* numbers summed in float, before they are added to others in double */
    AHEAD = 4096,     /* numbers, of several pages: processors look ahead to the end of one */
};

/* Mirrored by `Maps` in call.py. */
typedef struct {
    int64_t images, channels, pixels, in_rows, relu;
    float *mean, *inv_std;      /* [C] */
    const float *weight, *bias; /* [C] or NULL: ones and zeros */
} maps;

/* How far ahead of it to ask for memory: small planes that follow each other are far apart. */
INLINE int64_t ahead_of(const maps *m) {
    return m->in_rows || m->pixels > AHEAD ? AHEAD : m->channels * m->pixels;
}

INLINE void ask_for(const float *p) { __builtin_prefetch(p, 0, 2); }

/* The next LANES numbers; `others` in the lanes where there are fewer. */
INLINE vec load_upto(const float *p, int64_t left, vec others) {
    if (left >= LANES) return load(p);
    return left > 0 ? load_over(others, p, left) : others;
}

INLINE void store_upto(float *p, int64_t left, vec v) {
    if (left >= LANES) store(p, v);
    else store_part(p, v, left);
}

INLINE double sum_of_lanes(vec v) {
    double sum = 0;
    UNROLL for (int l = 0; l < LANES; l++) sum += v[l];
    return sum;
}

/* Where a plane begins. */
INLINE int64_t plane(const maps *m, int64_t image, int64_t channel) {
    return (image * m->channels + channel) * m->pixels;
}

/* Images and pixels of them that are summed together: a part of a plane, or a few planes. Size 0: no more. */
typedef struct {
    int64_t image, images, pixel, size;
} block;

INLINE block block_at(const maps *m, int64_t image, int64_t pixel, int64_t numbers) {
    if (image == m->images) return (block){0};
    const int64_t images = max64(1, min64(m->images - image, numbers / m->pixels));
    return (block){image, images, pixel, min64(numbers, m->pixels - pixel)};
}

INLINE block first_block(const maps *m, int64_t numbers) { return block_at(m, 0, 0, numbers); }

INLINE block next_block(const maps *m, block last, int64_t numbers) {
    const int64_t pixel = last.pixel + last.size;
    if (pixel < m->pixels) return block_at(m, last.image, pixel, numbers);
    return block_at(m, last.image + last.images, 0, numbers);
}

/* Numbers of a line. */
INLINE int64_t line_of(int64_t channels) {
    int64_t wide = channels;
    while (wide % LANES) wide += channels;
    return wide < LEAST_LINE ? (LEAST_LINE + wide - 1) / wide * wide : wide;
}

#endif
