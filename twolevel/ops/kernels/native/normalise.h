/* What batch normalisation, with or without ReLU, makes of a vector of numbers, forward and backward. */

#ifndef TWOLEVEL_NORMALISE_H
#define TWOLEVEL_NORMALISE_H

#include "vectors.h"

/* Of each channel or place: v = scale (x - mean) + bias, and gx = scale g - slope (x - mean) - offset. */
typedef struct {
    float *mean, *scale, *bias, *slope, *offset;
} affine;

/* Of the lanes of a vector. */
typedef struct {
    vec mean, scale, bias, slope, offset;
} affine_vec;

INLINE affine_vec load_affine(const affine *a, int64_t at) {
    return (affine_vec){load(a->mean + at), load(a->scale + at), load(a->bias + at), load(a->slope + at),
                        load(a->offset + at)};
}

INLINE affine_vec splat_affine(const affine *a, int64_t at) {
    return (affine_vec){splat(a->mean[at]), splat(a->scale[at]), splat(a->bias[at]), splat(a->slope[at]),
                        splat(a->offset[at])};
}

/* One expression, so that backward finds the same numbers above 0 as forward. */
INLINE vec normalised(vec x, affine_vec a) { return (x - a.mean) * a.scale + a.bias; }

/* The gradient of `rectified`: g where v is above 0 or NaN, else 0. */
INLINE vec passed(vec g, vec v) { return (vec)((lanes_vec)g & ~(v <= (vec){0})); }

#endif
