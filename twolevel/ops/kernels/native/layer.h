/* Sizes of a layer. */

#ifndef TWOLEVEL_LAYER_H
#define TWOLEVEL_LAYER_H

#include "vectors.h"

/* Pairs are (height, width). Mirrored by `Layer` in parts.py. */
typedef struct {
    int64_t channels, groups;
    int64_t in[2], out[2], kernel[2], stride[2], padding[2], dilation[2];
} layer;

/* At least 0. */
INLINE int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : 0; }

#endif
