/* The two-level convolution, image by image, so that what one step leaves is in the cache for the next: what both
   directions share.

       z_g = r_g * x_g                  y_g = A_g * x_g + C_g z

   x [B, n, H, W], y [B, m, H', W'], z [r G, B, H', W'], with r representatives a group and P ranks of which this one
   holds G/P groups. Where x and y lie channels last, planes are made of an image first, and an image of the planes in
   the end. */

#ifndef TWOLEVEL_TWO_LEVEL_H
#define TWOLEVEL_TWO_LEVEL_H

#include "pixels.h"
#include "planes.h"
#include "products.h"

/* ---- Between an image [pixels, channels] and planes [channels, pixels] ---- */

static void planes_of_image(float *to, const float *image, int64_t pixels, int64_t channels) {
    separate(image, pixels, channels, to, pixels);
}

static void image_of_planes(float *image, const float *from, int64_t pixels, int64_t channels) {
    planes_of_image(image, from, channels, pixels);
}

/* ---- Planes and their weights ---- */

/* What a call is given, and what it is to fill; NULL for what is not there, or not wanted. Shapes as above; gz, the
   gradient of z, is [r G/P, B, H', W'] where it is given. Mirrored by `Tensors` in call.py. */
typedef struct {
    const float *x, *local, *restriction, *coarse, *z, *gy, *gz;
    float *own, *y;        /* forward: the representatives of this rank [r G/P, B, H', W'] */
    float *gz_of_all, *gx; /* backward: the first [r G, B, H', W'] */
} tensors;

/* How x is read for the outputs. */
static void shift_forward(planes *p, const layer *l, arena *a) {
    *p = (planes){
        .source = {l->in[0], l->in[1]}, .target = {l->out[0], l->out[1]}, .stride = {l->stride[0], l->stride[1]},
        .number = l->kernel[0] * l->kernel[1],
    };
    p->taps = take(a, p->number * (int64_t)sizeof(tap));
    if (!p->taps) return;
    for (int64_t t = 0; t < p->number; t++)
        p->taps[t] = (tap){.row = t / l->kernel[1] * l->dilation[0] - l->padding[0],
                           .column = t % l->kernel[1] * l->dilation[1] - l->padding[1]};
    lay_out(p, a);
}

/* Where the taps of some channels find their values, in copies from `held` on. */
static void list_taps(const planes *p, const float **value, const float *held, int64_t channels) {
    for (int64_t c = 0; c < channels; c++)
        for (int64_t t = 0; t < p->number; t++) *value++ = held + c * p->size + p->taps[t].at;
}

INLINE int64_t pitch_of(const planes *p) { return p->whole ? p->pitch : LANES; }

/* Weights of some planes in the order of `combine`, as terms from `first` on of `all`: that of plane o and term t is
   weight[o by + t]. */
static inline void pack(float *to, int64_t planes, int64_t terms, const float *weight, int64_t by, int64_t first,
                        int64_t all) {
    for (int64_t o = 0, n; o < planes; o += n) {
        n = together(planes - o);
        for (int64_t t = 0; t < terms; t++)
            for (int64_t k = 0; k < n; k++) to[o * all + (first + t) * n + k] = weight[(o + k) * by + t];
    }
}

static const terms NOTHING = {NULL, 0, 0};

#endif
