/* Images turned from one memory format to the other. */

#ifndef TWOLEVEL_PIXELS_H
#define TWOLEVEL_PIXELS_H

#include "vectors.h"

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
