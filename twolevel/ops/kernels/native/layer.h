/* Sizes of a layer. */

#ifndef TWOLEVEL_LAYER_H
#define TWOLEVEL_LAYER_H

#include "vectors.h"

/* Pairs are (height, width). Mirrored by `Layer` in call.py. */
typedef struct {
    int64_t batch, channels, outputs, groups;
    int64_t representatives; /* r G, of all ranks */
    int64_t of_group;        /* r, representatives of a group */
    int64_t channels_last;   /* how x, y and their gradients lie in memory */
    int64_t in[2], out[2], kernel[2], stride[2], padding[2], dilation[2];
} layer;

INLINE int64_t floor_div(int64_t a, int64_t b) { return (a >= 0 ? a : a - b + 1) / b; }
INLINE int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

#endif
