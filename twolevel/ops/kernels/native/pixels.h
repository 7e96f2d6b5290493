/* Rows of pixels copied, and turned between the two memory formats of an image. */

#ifndef TWOLEVEL_PIXELS_H
#define TWOLEVEL_PIXELS_H

#include "layer.h"

/* max(0, v), and NaN for NaN. */
INLINE vec relu(vec v) {
#if defined(__AVX512F__)
    return _mm512_max_ps((vec){0}, v);
#else
    return (vec)((lanes_vec)v & ~(lanes_vec)(v < 0));
#endif
}
INLINE float relu1(float f) { return f < 0 ? 0 : f; }

/* to[i] = from[i * stride], or max(0, sign from[i * stride] + shift) factor. Whole vectors where memory up to `from_end`
   and `to_end` allows, so what follows in `to` must be written later. */
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

/* x [pixels, channels] to channels `distance` apart. */
INLINE void separate(const float *x, int64_t pixels, int64_t channels, float *to, int64_t distance) {
    for (int64_t p = 0; p < pixels; p += LANES)
        for (int64_t c = 0; c < channels; c += LANES) {
            const int64_t high = min64(LANES, pixels - p), wide = min64(LANES, channels - c);
            vec u[LANES];
            UNROLL for (int i = 0; i < LANES; i++) {
                const float *from = x + (p + i) * channels + c;
                u[i] = i >= high ? (vec){0} : wide == LANES ? load(from) : load_part(from, wide);
            }
            transpose_sum(u, 0);
            UNROLL for (int i = 0; i < LANES; i++) {
                if (i >= wide) break;
                float *at = to + (c + i) * distance + p;
                if (high == LANES) store(at, u[i]);
                else store_part(at, u[i], high);
            }
        }
}

/* `number` <= LANES pixels of rows order[i], `distance` apart, to y [pixels, channels]; rows may be read beyond them. */
INLINE void join(const float *rows, int64_t distance, const int64_t *order, int64_t channels, int64_t number, float *y) {
    for (int64_t c = 0; c < channels; c += LANES) {
        const int64_t wide = min64(LANES, channels - c);
        vec u[LANES];
        UNROLL for (int i = 0; i < LANES; i++)
            u[i] = i >= wide ? (vec){0} : load(rows + (order ? order[c + i] : c + i) * distance);
        transpose_sum(u, 0);
        UNROLL for (int i = 0; i < LANES; i++) {
            if (i >= number) break;
            if (wide == LANES) store(y + i * channels + c, u[i]);
            else store_part(y + i * channels + c, u[i], wide);
        }
    }
}

#endif
