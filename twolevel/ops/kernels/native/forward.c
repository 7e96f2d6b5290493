/* Forward; what Python calls. Images begin to end; -1 without memory. */

#include "two_level.h"

/* Weights of `outputs` planes in the order of `combine`: that of plane o and term t at weight[o by + t]. */
static void pack(float *to, int64_t outputs, int64_t terms, const float *weight, int64_t by, int64_t from, int64_t all) {
    for (int64_t o = 0, n; o < outputs; o += n) {
        n = together(outputs - o);
        for (int64_t t = 0; t < terms; t++)
            for (int64_t k = 0; k < n; k++) to[o * all + (from + t) * n + k] = weight[(o + k) * by + t];
    }
}

/* Numbers in a vector. */
int twolevel_lanes(void) { return LANES; }

/* From x, normalised where there is a scale: representatives `own` [G/P, B, H', W'] unless NULL; y unless NULL, of A
   (of what y holds, where that is NULL) and of C with z [G, B, H', W'], unless C is NULL. */
int twolevel_forward(const layer *l, const float *x, const float *scale, const float *shift, const float *local,
                     const float *restriction, const float *coarse, float *own, const float *z, float *y,
                     int64_t begin, int64_t end) {
    arena a = open_arena();
    planes p;
    shift_forward(&p, l, &a);
    if (a.failed) return close_arena(&a), -1;
    const int64_t groups = l->groups, inputs = l->channels / groups, outputs = l->outputs / groups;
    const int64_t in = l->in[0] * l->in[1], out = l->out[0] * l->out[1];
    const int64_t of_local = local ? inputs * p.number : 0, of_coarse = coarse ? l->representatives : 0;
    const int64_t all = of_local + of_coarse, of_group = inputs * p.number;
    const normaliser n = {scale, shift};
    const grid g = grid_of(l->out[0], l->out[1]);
    float *held = take_zeros(&a, l->channels * p.size + LANES);
    const float **value = take(&a, (groups * of_group + l->representatives) * sizeof *value);
    const float **others = value + groups * of_group;
    float *weight = take_floats(&a, l->outputs * all);
    float *planar = l->channels_last ? take_floats(&a, max64(l->channels * in, l->outputs * out)) : NULL;
    if (a.failed) return close_arena(&a), -1;
    list_taps(&p, value, held, l->channels);
    for (int64_t k = 0; k < groups; k++) {
        float *own_weight = weight + k * outputs * all;
        if (local) pack(own_weight, outputs, of_local, local + k * outputs * of_local, of_local, 0, all);
        if (coarse) pack(own_weight, outputs, of_coarse, coarse + k * outputs * of_coarse, of_coarse, of_local, all);
    }
    for (int64_t b = begin; b < end; b++) {
        const float *image = x + b * l->channels * in;
        /* The next image. */
        ahead next = look_ahead(image + l->channels * in, b + 1 < end ? l->channels * in : 0,
                             groups * (outputs / 4 + 1) * ceil_div(g.rows, TILE) * (g.columns / LANES));
        if (own || local) {
            if (planar) planes_of_image(planar, image, in, l->channels), image = planar;
            copy_channels(&p, held, image, 0, l->channels, n);
        }
        for (int64_t k = 0; own && k < groups; k++) {
            const sums s = {own + (k * l->batch + b) * out, NULL, 1, out};
            combine(&s, &g, &(terms){value + k * of_group, of_group, pitch_of(&p)}, &(terms){NULL, 0, 0}, restriction + k * of_group, &next);
        }
        if (!y) continue;
        float *result = y + b * l->outputs * out;
        if (planar) {
            if (!local) planes_of_image(planar, result, out, l->outputs);
            result = planar;
        }
        for (int64_t h = 0; h < of_coarse; h++) others[h] = z + (h * l->batch + b) * out;
        for (int64_t k = 0; k < groups; k++) {
            float *at = result + k * outputs * out;
            const sums s = {at, local ? NULL : at, outputs, out};
            combine(&s, &g, &(terms){value + k * of_group, of_local, pitch_of(&p)}, &(terms){others, of_coarse, g.columns},
                    weight + k * outputs * all, &next);
        }
        if (planar) image_of_planes(y + b * l->outputs * out, planar, out, l->outputs);
    }
    close_arena(&a);
    return 0;
}
