/* Group convolution of channels from anywhere, in groups of any sizes. */

#include "gathered.h"

/* x [B, n, H, W] to y [B, m, H', W'], or both channels last. Group g has sizes[g][0] of the channels in turn, by
   `inputs` [sum of them] or in their order, and sizes[g][1] rows of the result; its filters are [m_g, n_g, kh, kw].
   `bias` [m] is of the result, or NULL, and `relu` takes max(0, .) of it. Rows begin to end of the result's B H'; -1
   without memory. */
int twolevel_gathered(const layer *l, const float *x, const float *filters, const int64_t *sizes, const int64_t *inputs,
                      const int64_t *order, const float *bias, float *y, int64_t outputs, int64_t relu, int64_t last,
                      int64_t begin, int64_t end) {
    const convolution c = {
        .shape = l, .outputs = outputs, .last = last, .order = order, .by_tap = 1, .bias = bias, .relu = relu,
    };
    const int64_t taps = l->kernel[0] * l->kernel[1], height = l->out[0];
    const int64_t in = l->channels * l->in[0] * l->in[1], out = outputs * height * l->out[1];
    int64_t total = 0;
    for (int64_t g = 0; g < l->groups; g++) total += sizes[2 * g];
    group *groups = malloc(max64(1, l->groups) * sizeof *groups);
    const float **weight = malloc(max64(1, total) * sizeof *weight);
    int status = groups && weight ? 0 : -1;
    for (int64_t g = 0, first = 0, row = 0; g < l->groups && !status; g++) {
        const int64_t width = sizes[2 * g], rows = sizes[2 * g + 1];
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
    free(groups), free(weight);
    return status;
}
