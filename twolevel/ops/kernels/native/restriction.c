/* The restriction of the two-level convolution, one pass over x, forward and backward.

   A depthwise convolution with sums over the channels of a group, which is never stored: rows of it live in the cache.

       d[o, c] = sum over taps t of w[t, c] x[i(o, t), c]       vectors along channels c
       z[g, o] = sum over c in group g of d[o, c]

   Backward, with e[o, c] = gz[group of c, o] kept for one image:

       gx[i, c] += sum over taps of w[t, c] e[o(i, t), c]
       gw[t, c] = sum over o of e[o, c] x[i(o, t), c]

   Images whose channels are not whole vectors are first copied to ones that are, padded by zeros. */

#include "depthwise.h"

typedef struct {
    const layer *shape;
    int64_t wide;   /* channels as whole vectors */
    int log_lanes;  /* 2^that neighbouring channels, all in one group, are summed at once */
    int64_t taps;   /* kh kw */
    float *weight;  /* [taps, wide] */
    tap *row;       /* [taps] */
    tap *border;    /* [taps] */
} plan;

static int prepare(plan *p, const layer *shape, const float *weight) {
    p->shape = shape;
    p->wide = round_up(shape->channels, LANES);
    p->taps = shape->kernel[0] * shape->kernel[1];
    const int64_t width = shape->channels / shape->groups;
    p->log_lanes = 0;
    while (p->log_lanes < LOG_LANES && width % (2 << p->log_lanes) == 0) p->log_lanes++;
    p->weight = zeros(p->taps * p->wide);
    p->row = malloc(2 * p->taps * sizeof(tap));
    p->border = p->row + p->taps;
    if (!p->weight || !p->row) return -1;
    for (int64_t c = 0; c < shape->channels; c++)
        for (int64_t t = 0; t < p->taps; t++) p->weight[t * p->wide + c] = weight[c * p->taps + t];
    return 0;
}

static void discard(plan *p) { free(p->weight), free(p->row); }

/* An image as [pixels, wide]: itself, or a copy. */
static const float *whole_image(const plan *p, const float *x, float *copy) {
    const int64_t channels = p->shape->channels, pixels = p->shape->in[0] * p->shape->in[1];
    if (!copy) return x;
    for (int64_t i = 0; i < pixels; i++) memcpy(copy + i * p->wide, x + i * channels, 4 * channels);
    return copy;
}

/* The rows of the image that the next row of outputs reads and this one does not. */
INLINE soon next_rows(const plan *p, const float *image, int64_t out_row) {
    const layer *l = p->shape;
    const int64_t size = l->in[1] * p->wide, reach = (l->kernel[0] - 1) * l->dilation[0] + 1;
    const int64_t end = (out_row + 1) * l->stride[0] - l->padding[0] + reach, first = max64(0, end - l->stride[0]);
    return (soon){image + first * size, max64(0, min64(end, l->in[0]) - first) * size, 0};
}

/* ---- Between channels and groups ---- */

#define BY_LOG_LANES(log, call) \
    switch (log) { \
    case 0: call(0); break; \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(LOG_LANES < 3 ? LOG_LANES : 3); break; \
    default: call(LOG_LANES); \
    }

/* d [LANES, wide] to sums [groups, LANES], which are zero before. */
INLINE void sum_groups(const plan *p, const float *d, float *sums, int log) {
    const int64_t width = p->shape->channels / p->shape->groups;
    const int64_t together = log == LOG_LANES ? width : LANES;
    for (int64_t c = 0; c < p->shape->channels; c += together) {
        vec u[LANES];
        UNROLL for (int q = 0; q < LANES; q++) u[q] = load(d + q * p->wide + c);
        for (int64_t more = LANES; more < together; more += LANES)
            UNROLL for (int q = 0; q < LANES; q++) u[q] += load(d + q * p->wide + c + more);
        transpose_sum(u, log);
        UNROLL for (int i = 0; i < LANES; i += 1 << log) {
            if (c + i >= p->shape->channels) break;
            float *sum = sums + (c + i) / width * LANES;
            store(sum, load(sum) + u[i]);
        }
    }
}

/* z [groups, pixels] at `size` <= LANES pixels, from d [LANES, wide]. */
static void write_groups(const plan *p, const float *d, float *sums, float *z, int64_t pixels, int64_t size) {
    memset(sums, 0, 4 * LANES * p->shape->groups);
#define CALL(log) sum_groups(p, d, sums, log)
    BY_LOG_LANES(p->log_lanes, CALL)
#undef CALL
    for (int64_t g = 0; g < p->shape->groups; g++) memcpy(z + g * pixels, sums + g * LANES, 4 * size);
}

/* gz [groups, LANES] to e [LANES, wide]. */
INLINE void copy_groups(const plan *p, const float *gz, float *e, int log) {
    const int64_t width = p->shape->channels / p->shape->groups;
    for (int64_t c = 0; c < p->shape->channels; c += LANES) {
        vec u[LANES];
        UNROLL for (int i = 0; i < LANES; i += 1 << log)
            u[i] = c + i < p->shape->channels ? load(gz + (c + i) / width * LANES) : (vec){0};
        transpose_copy(u, log);
        UNROLL for (int q = 0; q < LANES; q++) store(e + q * p->wide + c, u[q]);
    }
}

/* e [pixels of an image and up to LANES more, wide] from gz, rows `distance` apart. */
static void read_groups(const plan *p, const float *gz, int64_t distance, float *block, float *e) {
    const int64_t pixels = p->shape->out[0] * p->shape->out[1];
    for (int64_t first = 0; first < pixels; first += LANES) {
        const int64_t size = min64(LANES, pixels - first);
        for (int64_t g = 0; g < p->shape->groups; g++)
            memcpy(block + g * LANES, gz + g * distance + first, 4 * size);
#define CALL(log) copy_groups(p, block, e + first * p->wide, log)
        BY_LOG_LANES(p->log_lanes, CALL)
#undef CALL
    }
}

/* ---- What Python calls. Images begin to end of `batch`; -1 without memory. ---- */

/* x [B, H, W, n], w [G, n/G, kh, kw] -> z [G, B, H', W']. */
int twolevel_restrict(const layer *shape, const float *x, const float *weight, float *z, int64_t batch, int64_t begin,
                      int64_t end) {
    plan p;
    const int64_t channels = shape->channels, in = shape->in[0] * shape->in[1], width = shape->out[1];
    const int64_t pixels = batch * shape->out[0] * width;
    int status = prepare(&p, shape, weight);
    float *d = zeros((LANES + width) * p.wide), *sums = zeros(shape->groups * LANES);
    float *copy = p.wide == channels ? NULL : zeros(in * p.wide);
    if (status || !d || !sums || (p.wide != channels && !copy)) status = -1;
    int64_t held = 0, written = begin * shape->out[0] * width;
    for (int64_t b = begin; b < end && !status; b++) {
        const float *image = whole_image(&p, x + b * in * channels, copy);
        for (int64_t row = 0; row < shape->out[0]; row++) {
            const int64_t number = taps_of_output(shape, p.weight, p.wide, row, p.row);
            soon next = next_rows(&p, image, row);
            float *at = d + held * p.wide;
            const output_row r = {at, p.wide, image, shape->stride[1] * p.wide, width, p.wide, p.row, number, p.border};
            conv_row(&r, 0, &next);
            held += width;
            int64_t done = 0;
            for (; held - done >= LANES; done += LANES, written += LANES)
                write_groups(&p, d + done * p.wide, sums, z + written, pixels, LANES);
            held -= done;
            if (held && done) memmove(d, d + done * p.wide, 4 * held * p.wide);
        }
    }
    if (held) write_groups(&p, d, sums, z + written, pixels, held);
    discard(&p), free(d), free(sums), free(copy);
    return status;
}

/* Sums of `number` taps at outputs from to to. */
INLINE void weight_tile(const plan *p, const tap *taps, int number, int vectors, int64_t j, const float *e,
                        const float *image, int64_t from, int64_t to) {
    const int64_t wide = p->wide, step = p->shape->stride[1] * wide;
    vec sum[3][TILE_VECTORS];
    UNROLL for (int t = 0; t < number; t++)
        UNROLL for (int b = 0; b < vectors; b++) sum[t][b] = load(taps[t].weight + j + b * LANES);
    for (int64_t q = from; q < to; q++) {
        vec grad[TILE_VECTORS];
        UNROLL for (int b = 0; b < vectors; b++) grad[b] = load_once(e + q * wide + j + b * LANES);
        UNROLL for (int t = 0; t < number; t++)
            UNROLL for (int b = 0; b < vectors; b++)
                sum[t][b] += grad[b] * load(image + taps[t].source + q * step + j + b * LANES);
    }
    UNROLL for (int t = 0; t < number; t++)
        UNROLL for (int b = 0; b < vectors; b++) store(taps[t].weight + j + b * LANES, sum[t][b]);
}

INLINE void weight_taps(const plan *p, const tap *taps, int number, const float *e, const float *image, int64_t from,
                        int64_t to) {
    int64_t j = 0;
    if (from >= to) return;
    for (; j + TILE_VECTORS * LANES <= p->wide; j += TILE_VECTORS * LANES)
        weight_tile(p, taps, number, TILE_VECTORS, j, e, image, from, to);
    for (; j < p->wide; j += LANES) weight_tile(p, taps, number, 1, j, e, image, from, to);
}

/* The part of one row of outputs in gw. */
static void weight_row(const plan *p, int64_t number, const float *e, const float *image, soon *next) {
    int64_t t = 0;
    for (; t + 3 <= number; t += 3) {
        int64_t from, to;
        common(p->row + t, 3, p->shape->out[1], &from, &to);
        prefetch(next, t + 3, number);
        weight_taps(p, p->row + t, 3, e, image, from, to);
        for (int64_t i = t; i < t + 3; i++) {
            weight_taps(p, p->row + i, 1, e, image, p->row[i].first, min64(from, p->row[i].last));
            weight_taps(p, p->row + i, 1, e, image, max64(to, p->row[i].first), p->row[i].last);
        }
    }
    for (; t < number; t++) {
        prefetch(next, t + 1, number);
        weight_taps(p, p->row + t, 1, e, image, p->row[t].first, p->row[t].last);
    }
}

static void add_input_grad(const plan *p, const float *e, float *gx) {
    const layer *l = p->shape;
    for (int64_t row = 0; row < l->in[0]; row++) {
        const int64_t size = l->in[1] * p->wide;
        soon next = {gx + (row + 1) * size, row + 1 < l->in[0] ? size : 0, 0};
        for (int64_t phase = 0; phase < min64(l->stride[1], l->in[1]); phase++) {
            const int64_t count = ceil_div(l->in[1] - phase, l->stride[1]);
            const int64_t number = taps_of_input(l, p->weight, p->wide, row, phase, count, p->row);
            float *out = gx + (row * l->in[1] + phase) * p->wide;
            const output_row r = {out, l->stride[1] * p->wide, e, p->wide, count, p->wide, p->row, number, p->border};
            if (number) conv_row(&r, 1, &next);
        }
    }
}

/* From gz [G, B, H', W']: add to gx [B, H, W, n] unless it is NULL; their part of gw [G, n/G, kh, kw] unless it is. */
int twolevel_restrict_backward(const layer *shape, const float *gz, const float *x, const float *weight, float *gx,
                               float *gw, int64_t batch, int64_t begin, int64_t end) {
    plan p;
    const int64_t channels = shape->channels, in = shape->in[0] * shape->in[1], out = shape->out[0] * shape->out[1];
    int status = prepare(&p, shape, weight);
    const int64_t matrix = p.taps * p.wide, padded = p.wide != channels;
    float *e = zeros((out + LANES) * p.wide), *block = zeros(shape->groups * LANES);
    float *copy = padded ? zeros(in * p.wide) : NULL;
    float *sums = zeros(matrix), *total = zeros(matrix);
    if (status || !e || !block || !sums || !total || (padded && !copy)) status = -1;
    for (int64_t b = begin; b < end && !status; b++) {
        read_groups(&p, gz + b * out, batch * out, block, e);
        if (gw) {
            const float *image = whole_image(&p, x + b * in * channels, copy);
            for (int64_t row = 0; row < shape->out[0]; row++) {
                soon next = next_rows(&p, image, row);
                const int64_t number = taps_of_output(shape, sums, p.wide, row, p.row);
                weight_row(&p, number, e + row * shape->out[1] * p.wide, image, &next);
            }
            /* By image: a rounding error grows with the number of terms. */
            for (int64_t i = 0; i < matrix; i++) total[i] += sums[i], sums[i] = 0;
        }
        if (gx) {
            float *own = gx + b * in * channels;
            add_input_grad(&p, e, (float *)whole_image(&p, own, copy));
            if (copy)
                for (int64_t i = 0; i < in; i++) memcpy(own + i * channels, copy + i * p.wide, 4 * channels);
        }
    }
    if (gw && !status)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t t = 0; t < p.taps; t++) gw[c * p.taps + t] = total[t * p.wide + c];
    discard(&p), free(e), free(block), free(copy), free(sums), free(total);
    return status;
}
