/* Rows of pixels copied, and turned between the two memory formats of an image. */

#ifndef TWOLEVEL_PIXELS_H
#define TWOLEVEL_PIXELS_H

#include "layer.h"

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

/* to[i] = from[i * stride], activated. Whole vectors where memory up to `from_end` and `to_end` allows, so what follows
   in `to` must be written later. */
INLINE void copy_row(const float *from, const float *from_end, int64_t stride, int64_t number, float sign, float shift,
                     float factor, int active, float *to, const float *to_end) {
    int64_t i = 0;
    if (stride == 1)
        for (; i < number && from + i + LANES <= from_end && to + i + LANES <= to_end; i += LANES) {
            const vec v = load(from + i);
            store(to + i, active ? relu(v * sign + shift) * factor : v);
        }
    for (; i < number; i++) to[i] = active ? relu1(from[i * stride] * sign + shift) * factor : from[i * stride];
}

/* A block of LANES x LANES; `from` has rows of `step`, `to` of `distance`. */
INLINE void turn(const float *from, int64_t step, float *to, int64_t distance) {
    vec u[LANES];
    UNROLL for (int q = 0; q < LANES; q++) u[q] = load(from + q * step);
    transpose_sum(u, 0);
    UNROLL for (int i = 0; i < LANES; i++) store(to + i * distance, u[i]);
}

INLINE void separate(const float *x, int64_t pixels, int64_t channels, float *to, int64_t distance) {
    if (pixels < LANES || channels < LANES) {
        for (int64_t i = 0; i < channels; i++)
            for (int64_t q = 0; q < pixels; q++) to[i * distance + q] = x[q * channels + i];
        return;
    }
    /* The last block overlaps the one before where numbers are no multiple of LANES. */
    for (int64_t q = 0; q < pixels; q = q + 2 * LANES > pixels && q + LANES < pixels ? pixels - LANES : q + LANES)
        for (int64_t i = 0; i < channels;
             i = i + 2 * LANES > channels && i + LANES < channels ? channels - LANES : i + LANES)
            turn(x + q * channels + i, channels, to + i * distance + q, distance);
}

/* Columns `from` to `from` + number <= LANES of rows order[i] of `result` to y [pixels, channels]. */
INLINE void join(const float *result, int64_t line, const int64_t *order, int64_t channels, int64_t number, float *y) {
    for (int64_t i = 0; i < channels; i += LANES) {
        if (channels < LANES) {
            for (int64_t c = 0; c < channels; c++)
                for (int64_t q = 0; q < number; q++) y[q * channels + c] = result[(order ? order[c] : c) * line + q];
            return;
        }
        if (i + LANES > channels) i = channels - LANES;
        vec u[LANES];
        UNROLL for (int c = 0; c < LANES; c++) u[c] = load(result + (order ? order[i + c] : i + c) * line);
        transpose_sum(u, 0);
        if (number >= LANES) UNROLL for (int q = 0; q < LANES; q++) store(y + q * channels + i, u[q]);
        else
            for (int64_t q = 0; q < number; q++) store(y + q * channels + i, u[q]);
    }
}

#endif
