/* Rows of a depthwise convolution, vectors along channels. Taps that lie in the padding are left out. */

#ifndef TWOLEVEL_DEPTHWISE_H
#define TWOLEVEL_DEPTHWISE_H

#include "layer.h"

/* One tap of the kernel along a row: output q reads source + q steps, for first <= q < last. */
typedef struct {
    int64_t source, first, last;
    float *weight; /* in backward for the weight the sums of its gradient */
} tap;

/* The taps by which row `out_row` of the output reads the input; returns their number. That of tap t = (h, w) has its
   weight at weights + t wide. */
static int64_t taps_of_output(const layer *l, float *weights, int64_t wide, int64_t out_row, tap *taps) {
    int64_t number = 0;
    for (int64_t h = 0; h < l->kernel[0]; h++) {
        const int64_t in_row = out_row * l->stride[0] - l->padding[0] + h * l->dilation[0];
        if (in_row < 0 || in_row >= l->in[0]) continue;
        for (int64_t w = 0; w < l->kernel[1]; w++) {
            const int64_t shift = w * l->dilation[1] - l->padding[1];
            const tap t = {
                .source = (in_row * l->in[1] + shift) * wide,
                .first = ceil_div(-shift, l->stride[1]),
                .last = min64(l->out[1], ceil_div(l->in[1] - shift, l->stride[1])),
                .weight = weights + (h * l->kernel[1] + w) * wide,
            };
            if (t.first < t.last) taps[number++] = t;
        }
    }
    return number;
}

/* The same for columns phase, phase + stride, ... of row `in_row` of the input, `count` of them, and the outputs that
   read them. */
static int64_t taps_of_input(const layer *l, float *weights, int64_t wide, int64_t in_row, int64_t phase,
                             int64_t count, tap *taps) {
    int64_t number = 0;
    for (int64_t h = 0; h < l->kernel[0]; h++) {
        const int64_t down = in_row + l->padding[0] - h * l->dilation[0];
        if (down < 0 || down % l->stride[0] || down / l->stride[0] >= l->out[0]) continue;
        for (int64_t w = 0; w < l->kernel[1]; w++) {
            const int64_t right = phase + l->padding[1] - w * l->dilation[1];
            if (right % l->stride[1]) continue;
            const int64_t shift = right / l->stride[1];
            const tap t = {
                .source = (down / l->stride[0] * l->out[1] + shift) * wide,
                .first = max64(0, -shift),
                .last = min64(count, l->out[1] - shift),
                .weight = weights + (h * l->kernel[1] + w) * wide,
            };
            if (t.first < t.last) taps[number++] = t;
        }
    }
    return number;
}

/* The outputs that every one of these taps has. */
INLINE void common(const tap *taps, int64_t number, int64_t count, int64_t *from, int64_t *to) {
    *from = 0, *to = count;
    for (int64_t t = 0; t < number; t++) *from = max64(*from, taps[t].first), *to = min64(*to, taps[t].last);
    if (*from >= *to) *from = *to = count;
}

/* Memory needed soon, and how much of it has been asked for. Processors do not foresee the order of taps, and a few
   requests after every tile are lost less often than many at once. */
typedef struct {
    const float *at;
    int64_t size, asked;
} soon;

/* Ask for what is left up to this part of it. */
INLINE void prefetch(soon *s, int64_t part, int64_t of) {
    const int64_t until = min64(s->size, s->size * part / of);
    for (; s->asked < until; s->asked += 16) __builtin_prefetch(s->at + s->asked);
}

/* A row of outputs of the depthwise convolution. */
typedef struct {
    float *out;
    int64_t out_step;
    const float *source;
    int64_t step; /* from what output q reads to what q + 1 reads */
    int64_t count, wide;
    const tap *taps;
    int64_t number;
    tap *border; /* room for as many */
} output_row;

/* `count` neighbouring outputs from q, all of which have all these taps. */
INLINE void conv_tile(const output_row *r, int64_t q, int count, const tap *taps, int64_t number, int keep) {
    float *out = r->out + q * r->out_step;
    const float *source = r->source + q * r->step;
    for (int64_t j = 0; j < r->wide; j += LANES) {
        vec sum[8];
        UNROLL for (int i = 0; i < count; i++) sum[i] = keep ? load(out + i * r->out_step + j) : (vec){0};
        for (int64_t t = 0; t < number; t++) {
            const vec weight = load_once(taps[t].weight + j);
            const float *from = source + taps[t].source + j;
            UNROLL for (int i = 0; i < count; i++) sum[i] += weight * load(from + i * r->step);
        }
        UNROLL for (int i = 0; i < count; i++) store(out + i * r->out_step + j, sum[i]);
    }
}

/* keep, a constant: add to what is there. */
INLINE void conv_row(const output_row *r, int keep, soon *next) {
    int64_t from, to, q = 0;
    common(r->taps, r->number, r->count, &from, &to);
    while (q < r->count) {
        prefetch(next, q + 8, r->count);
        if (q < from || q >= to) {
            int64_t there = 0;
            for (int64_t t = 0; t < r->number; t++)
                if (r->taps[t].first <= q && q < r->taps[t].last) r->border[there++] = r->taps[t];
            conv_tile(r, q, 1, r->border, there, keep), q += 1;
        } else if (to - q >= 8) conv_tile(r, q, 8, r->taps, r->number, keep), q += 8;
        else if (to - q >= 4) conv_tile(r, q, 4, r->taps, r->number, keep), q += 4;
        else if (to - q >= 2) conv_tile(r, q, 2, r->taps, r->number, keep), q += 2;
        else conv_tile(r, q, 1, r->taps, r->number, keep), q += 1;
    }
}

#endif
