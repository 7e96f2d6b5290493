/* Group convolution of channels from anywhere, in groups of any sizes. */

#include "gathered.h"

/* Mirrored by `_Groups` in gathered.py. */
typedef struct {
    layer shape;
    int64_t relu;         /* whether the result is max(0, .) of it */
    const int64_t *sizes; /* inputs and outputs of each group in turn */
} layer_of_groups;

/* x [B, n, H, W] to rows begin to end of y's B H'; -1 without memory. The groups have the channels `inputs` in turn, or
   all in their order; filters [m_g, n_g, kh, kw] of each and `bias` [m], which may be NULL, one after the other. Channel
   c of y is row order[c] of theirs, or row c. */
int twolevel_gathered(const layer_of_groups *d, const float *x, const float *filters, const float *bias,
                      const int64_t *inputs, const int64_t *order, float *y, int64_t begin, int64_t end) {
    const layer *l = &d->shape;
    const convolution c = {.shape = l, .order = order, .by_tap = 1, .bias = bias, .relu = d->relu};
    const int64_t taps = l->kernel[0] * l->kernel[1], height = l->out[0];
    const int64_t in = l->channels * l->in[0] * l->in[1], out = l->outputs * height * l->out[1];
    int64_t total = 0;
    for (int64_t g = 0; g < l->groups; g++) total += d->sizes[2 * g];
    arena a = open_arena();
    group *groups = take(&a, l->groups * sizeof *groups);
    const float **weight = take(&a, total * sizeof *weight);
    int status = a.failed ? -1 : 0;
    for (int64_t g = 0, first = 0, row = 0; g < l->groups && !status; g++) {
        const int64_t width = d->sizes[2 * g], rows = d->sizes[2 * g + 1];
        for (int64_t k = 0; k < width; k++) weight[first + k] = filters + k * taps;
        groups[g] = (group){
            .first = row, .outputs = rows, .inputs = width, .channels = inputs ? inputs + first : NULL,
            .first_channel = first, .weight = weight + first, .by_output = width * taps,
        };
        first += width, row += rows, filters += width * rows * taps;
    }
    for (int64_t at = begin, stop; at < end && !status; at = stop) {
        const int64_t image = at / height;
        stop = min64(end, (image + 1) * height);
        status = gathered_rows(&c, groups, l->groups, x + image * in, y + image * out, at - image * height,
                               stop - image * height);
    }
    close_arena(&a);
    return status;
}
