/* Group convolution with narrow groups: the local part of the two-level convolution.

       y[o, c] = sum over taps t and inputs i of c's group of w[c, i, t] x[in(o, t), i]       vectors along outputs c

   Lanes of different groups take different inputs. Therefore rows of x are expanded, for one vector of outputs after
   the other: a vector for each pixel and each input of a group, every lane that of its own group. The rows that the
   taps of one row of outputs read stay in the nearest cache, with the zeros of the padding beside them.

   gx is the same with the outputs of a group for inputs and vectors along channels of x; gw sums gy[o, c] times the
   expanded x. The zeros are multiplied like any other value, so of an infinite weight or gradient they make a NaN. */

#include "layer.h"

/* One direction: from an image `source` to one of vectors along `channels`. */
typedef struct {
    int64_t channels, source_channels;
    int64_t width, terms;      /* channels of a group, here and in the source */
    int64_t taps;              /* kh kw */
    int64_t rows, columns;     /* of the source */
    int64_t before, after;     /* columns of padding */
    int64_t ring;              /* rows held */
    int64_t stride;            /* columns of the source from what one output reads to what the next reads */
    int64_t expanded;          /* rows of the source that were: those before this */
    int32_t *lanes;            /* [terms, LANES]: source channels of the lanes, from the first one */
    float *held;               /* [ring, terms, before + columns + after, LANES] */
    float *weight;             /* [vectors, taps, terms, LANES] */
} side;

/* One tap of the kernel, for a row of outputs: where its values are, and its weights, both of the first term. */
typedef struct {
    const float *values;
    const float *weight;
} tap;

static int prepare(side *s, const layer *l) {
    s->width = s->channels / l->groups, s->terms = s->source_channels / l->groups;
    s->taps = l->kernel[0] * l->kernel[1];
    s->ring = (l->kernel[0] - 1) * l->dilation[0] + 1;
    s->lanes = (int32_t *)zeros(s->terms * LANES);
    s->held = zeros(s->ring * s->terms * (s->before + s->columns + s->after) * LANES);
    s->weight = zeros(s->channels * s->taps * s->terms);
    if (!s->lanes || !s->held || !s->weight) return -1;
    for (int64_t i = 0; i < s->terms; i++)
        for (int64_t lane = 0; lane < LANES; lane++) s->lanes[i * LANES + lane] = lane / s->width * s->terms + i;
    return 0;
}

static void discard(side *s) { free(s->lanes), free(s->held), free(s->weight); }

/* From x to y. */
static int prepare_forward(side *s, const layer *l, int64_t outputs) {
    const int64_t last = (l->out[1] - 1) * l->stride[1] + (l->kernel[1] - 1) * l->dilation[1] - l->padding[1];
    *s = (side){
        .channels = outputs, .source_channels = l->channels, .rows = l->in[0], .columns = l->in[1],
        .before = l->padding[1],
        .after = max64(0, last - (l->in[1] - 1)),
        .stride = l->stride[1],
    };
    return prepare(s, l);
}

/* From gy to gx. */
static int prepare_backward(side *s, const layer *l, int64_t outputs) {
    const int64_t last = (l->in[1] - 1 + l->padding[1]) / l->stride[1];
    *s = (side){
        .channels = l->channels, .source_channels = outputs, .rows = l->out[0], .columns = l->out[1],
        .before = max64(0, (l->kernel[1] - 1) * l->dilation[1] - l->padding[1]),
        .after = max64(0, last - (l->out[1] - 1)),
        .stride = 1,
    };
    return prepare(s, l);
}

INLINE int64_t row_size(const side *s) { return (s->before + s->columns + s->after) * LANES; }
/* Where column 0 of row r of the source is held, of the first term. */
INLINE float *held_row(const side *s, int64_t r) {
    return s->held + r % s->ring * s->terms * row_size(s) + s->before * LANES;
}

INLINE float *weights_of(const side *s, float *weights, int64_t c, int64_t tap) {
    return weights + (c * s->taps + tap * LANES) * s->terms;
}

/* Rows by which requests for the source are ahead. Processors do not foresee steps of so many channels. */
enum { REQUESTED_ROWS = 2 };

INLINE void request(const float *image_row, int64_t columns, int64_t channels) {
    for (int64_t p = 0; p < columns; p++) __builtin_prefetch(image_row + (REQUESTED_ROWS * columns + p) * channels);
}

#if defined(__AVX512F__)
/* The source channels of all lanes are in one vector or in two; `vectors` and `terms` are constants. */
INLINE void permute_row(const side *s, const float *source, float *target, int vectors, int terms) {
    const int64_t row = row_size(s), reach = max64(1, LANES / s->width) * terms;
    const __mmask16 mask = 0xffff >> (vectors * LANES - reach); /* nothing beyond the image is read */
    __m512i lanes[LANES];
    UNROLL for (int i = 0; i < terms; i++) lanes[i] = _mm512_load_si512(s->lanes + i * LANES);
    for (int64_t p = 0; p < s->columns; p++, source += s->source_channels, target += LANES) {
        __builtin_prefetch(source + REQUESTED_ROWS * s->columns * s->source_channels);
        if (vectors == 1) {
            const __m512 all = _mm512_maskz_loadu_ps(mask, source);
            UNROLL for (int i = 0; i < terms; i++) store(target + i * row, _mm512_permutexvar_ps(lanes[i], all));
        } else {
            const __m512 low = _mm512_loadu_ps(source), high = _mm512_maskz_loadu_ps(mask, source + LANES);
            UNROLL for (int i = 0; i < terms; i++)
                store(target + i * row, _mm512_permutex2var_ps(low, lanes[i], high));
        }
    }
}

/* Whether there is a way for these sizes, and it was gone. */
INLINE int permuted_row(const side *s, const float *source, float *target) {
    const int64_t reach = max64(1, LANES / s->width) * s->terms;
#define CASE(n) \
    case n: \
        if (reach <= LANES) permute_row(s, source, target, 1, n); \
        else permute_row(s, source, target, 2, n); \
        return 1;
    if (reach <= 2 * LANES) switch (s->terms) { CASE(1) CASE(2) CASE(4) CASE(8) CASE(16) }
#undef CASE
    return 0;
}
#else
INLINE int permuted_row(const side *s, const float *source, float *target) {
    return (void)s, (void)source, (void)target, 0;
}
#endif

INLINE void expand_row(const side *s, const float *source, float *target) {
    const int64_t row = row_size(s);
    if (permuted_row(s, source, target)) return;
    for (int64_t p = 0; p < s->columns; p++, source += s->source_channels, target += LANES)
        for (int64_t i = 0; i < s->terms; i++)
            for (int lane = 0; lane < LANES; lane++) target[i * row + lane] = source[s->lanes[i * LANES + lane]];
}

/* Have rows first .. last of the image expanded for the vector of channels c; earlier ones are not needed any more. */
static void expand_rows(side *s, const float *image, int64_t c, int64_t first, int64_t last) {
    for (int64_t r = max64(first, s->expanded); r <= last; r++)
        expand_row(s, image + r * s->columns * s->source_channels + c / s->width * s->terms, held_row(s, r));
    s->expanded = max64(s->expanded, last + 1);
}

/* ---- y and gx ---- */

enum { LONGEST_TILE = 4 * TILE_VECTORS };

/* `count` neighbouring outputs: sums over taps, whose values and weights are listed, and over terms. */
INLINE void conv_tile(int count, const side *s, const tap *taps, int64_t number, int64_t q, int64_t stride, float *out,
                      int64_t out_step) {
    const int64_t row = row_size(s);
    vec sum[LONGEST_TILE];
    UNROLL for (int i = 0; i < count; i++) sum[i] = (vec){0};
    for (int64_t t = 0; t < number; t++) {
        const float *values = taps[t].values + q * stride * LANES, *weights = taps[t].weight;
        for (int64_t u = 0; u < s->terms; u++, values += row, weights += LANES) {
            const vec weight = load_once(weights);
            UNROLL for (int i = 0; i < count; i++) sum[i] += weight * load(values + i * stride * LANES);
        }
    }
    UNROLL for (int i = 0; i < count; i++) store(out + i * out_step, sum[i]);
}

INLINE void conv_row_by(const side *s, const tap *taps, int64_t number, int64_t count, int64_t stride, float *out,
                        int64_t out_step) {
    int64_t q = 0;
#define TILES(size) \
    for (; q + size <= count; q += size) conv_tile(size, s, taps, number, q, stride, out + q * out_step, out_step)
    TILES(LONGEST_TILE);
    if (LONGEST_TILE > 8) TILES(8);
    TILES(4);
    TILES(1);
#undef TILES
}

static void conv_row(const side *s, const tap *taps, int64_t number, int64_t count, float *out, int64_t out_step) {
    /* Of a stride that the compiler knows, addresses are known too. */
    if (s->stride == 1) conv_row_by(s, taps, number, count, 1, out, out_step);
    else if (s->stride == 2) conv_row_by(s, taps, number, count, 2, out, out_step);
    else conv_row_by(s, taps, number, count, s->stride, out, out_step);
}

static void conv_image(side *s, const layer *l, const float *x, float *y, tap *taps) {
    for (int64_t c = 0; c < s->channels; c += LANES) {
        s->expanded = 0;
        for (int64_t row = 0; row < l->out[0]; row++) {
            const int64_t top = row * l->stride[0] - l->padding[0];
            int64_t number = 0;
            expand_rows(s, x, c, max64(0, top), min64(s->rows, top + s->ring) - 1);
            for (int64_t h = 0; h < l->kernel[0]; h++) {
                const int64_t from = top + h * l->dilation[0];
                if (from < 0 || from >= s->rows) continue;
                for (int64_t w = 0; w < l->kernel[1]; w++)
                    taps[number++] = (tap){held_row(s, from) + (w * l->dilation[1] - l->padding[1]) * LANES,
                                               weights_of(s, s->weight, c, h * l->kernel[1] + w)};
            }
            conv_row(s, taps, number, l->out[1], y + row * l->out[1] * s->channels + c, s->channels);
        }
    }
}

static void input_grad_image(side *s, const layer *l, const float *gy, float *gx, tap *taps) {
    for (int64_t c = 0; c < s->channels; c += LANES) {
        s->expanded = 0;
        for (int64_t row = 0; row < l->in[0]; row++) {
            const int64_t bottom = row + l->padding[0];
            const int64_t first = ceil_div(bottom - s->ring + 1, l->stride[0]);
            expand_rows(s, gy, c, first, min64(s->rows - 1, bottom / l->stride[0]));
            for (int64_t phase = 0; phase < min64(l->stride[1], l->in[1]); phase++) {
                int64_t number = 0;
                for (int64_t h = 0; h < l->kernel[0]; h++) {
                    const int64_t down = bottom - h * l->dilation[0];
                    if (down < 0 || down % l->stride[0] || down / l->stride[0] >= s->rows) continue;
                    for (int64_t w = 0; w < l->kernel[1]; w++) {
                        const int64_t right = phase + l->padding[1] - w * l->dilation[1];
                        if (right % l->stride[1]) continue;
                        taps[number++] = (tap){held_row(s, down / l->stride[0]) + right / l->stride[1] * LANES,
                                                   weights_of(s, s->weight, c, h * l->kernel[1] + w)};
                    }
                }
                conv_row(s, taps, number, ceil_div(l->in[1] - phase, l->stride[1]),
                         gx + (row * l->in[1] + phase) * s->channels + c, l->stride[1] * s->channels);
            }
        }
    }
}

/* ---- gw ---- */

enum { SUM_TERMS = TILE_VECTORS };

/* Sums of neighbouring taps of a row, and of a few terms of each, over a row of outputs. */
INLINE void sum_tile(const side *s, int taps, int terms, const float *gy, const float *values, float *sums,
                     int64_t count) {
    const int64_t row = row_size(s);
    vec sum[3][SUM_TERMS];
    UNROLL for (int t = 0; t < taps; t++)
        UNROLL for (int i = 0; i < terms; i++) sum[t][i] = load(sums + (t * s->terms + i) * LANES);
    for (int64_t q = 0; q < count; q++, values += s->stride * LANES) {
        const vec grad = load_once(gy + q * s->channels);
        UNROLL for (int i = 0; i < terms; i++)
            UNROLL for (int t = 0; t < taps; t++) sum[t][i] += grad * load(values + i * row + t * LANES);
    }
    UNROLL for (int t = 0; t < taps; t++)
        UNROLL for (int i = 0; i < terms; i++) store(sums + (t * s->terms + i) * LANES, sum[t][i]);
}

INLINE void sum_taps(const side *s, int taps, const float *gy, const float *values, float *sums, int64_t count) {
    int64_t term = 0;
    for (; term + SUM_TERMS <= s->terms; term += SUM_TERMS)
        sum_tile(s, taps, SUM_TERMS, gy, values + term * row_size(s), sums + term * LANES, count);
    for (; term < s->terms; term++)
        sum_tile(s, taps, 1, gy, values + term * row_size(s), sums + term * LANES, count);
}

static void weight_grad_image(side *s, const layer *l, const float *gy, const float *x, float *sums) {
    for (int64_t c = 0; c < s->channels; c += LANES) {
        s->expanded = 0;
        for (int64_t row = 0; row < l->out[0]; row++) {
            const int64_t top = row * l->stride[0] - l->padding[0];
            const float *grad = gy + row * l->out[1] * s->channels + c;
            expand_rows(s, x, c, max64(0, top), min64(s->rows, top + s->ring) - 1);
            request(grad, l->out[1], s->channels);
            for (int64_t h = 0; h < l->kernel[0]; h++) {
                const int64_t from = top + h * l->dilation[0];
                if (from < 0 || from >= s->rows) continue;
                const float *values = held_row(s, from) - l->padding[1] * LANES;
                float *sum = weights_of(s, sums, c, h * l->kernel[1]);
                int64_t w = 0;
                if (l->dilation[1] == 1)
                    for (; w + 3 <= l->kernel[1]; w += 3)
                        sum_taps(s, 3, grad, values + w * LANES, sum + w * s->terms * LANES, l->out[1]);
                for (; w < l->kernel[1]; w++)
                    sum_taps(s, 1, grad, values + w * l->dilation[1] * LANES, sum + w * s->terms * LANES, l->out[1]);
            }
        }
    }
}

/* ---- What Python calls. Images begin to end; -1 without memory. ---- */

/* Numbers in a vector. */
int twolevel_lanes(void) { return LANES; }

/* x [B, H, W, n], w [m, n/G, kh, kw] -> y [B, H', W', m]. */
int twolevel_local(const layer *l, const float *x, const float *weight, float *y, int64_t outputs, int64_t begin,
                   int64_t end) {
    side s;
    const int64_t in = l->in[0] * l->in[1] * l->channels, out = l->out[0] * l->out[1] * outputs;
    int status = prepare_forward(&s, l, outputs);
    tap *taps = malloc(s.taps * sizeof *taps);
    if (!taps) status = -1;
    if (!status) {
        for (int64_t c = 0; c < outputs; c++)
            for (int64_t i = 0; i < s.terms; i++)
                for (int64_t t = 0; t < s.taps; t++)
                    s.weight[((c / LANES * s.taps + t) * s.terms + i) * LANES + c % LANES] =
                        weight[(c * s.terms + i) * s.taps + t];
        for (int64_t b = begin; b < end; b++) conv_image(&s, l, x + b * in, y + b * out, taps);
    }
    discard(&s), free(taps);
    return status;
}

/* From gy [B, H', W', m]: gx [B, H, W, n] unless it is NULL, and their part of gw [m, n/G, kh, kw] unless it is. */
int twolevel_local_backward(const layer *l, const float *gy, const float *x, const float *weight, float *gx, float *gw,
                            int64_t outputs, int64_t begin, int64_t end) {
    side to_x, to_w;
    const int64_t in = l->in[0] * l->in[1] * l->channels, out = l->out[0] * l->out[1] * outputs;
    int status = prepare_backward(&to_x, l, outputs);
    status |= prepare_forward(&to_w, l, outputs);
    const int64_t size = outputs * to_w.terms * to_w.taps, taps = to_w.taps, width = to_w.terms, per_group = to_x.terms;
    float *sums = zeros(size);
    tap *row = malloc(taps * sizeof *row);
    if (!sums || !row) status = -1;
    if (!status)
        for (int64_t c = 0; c < l->channels; c++)
            for (int64_t o = 0; o < per_group; o++)
                for (int64_t t = 0; t < taps; t++)
                    to_x.weight[((c / LANES * taps + t) * per_group + o) * LANES + c % LANES] =
                        weight[((c / width * per_group + o) * width + c % width) * taps + t];
    for (int64_t b = begin; b < end && !status; b++) {
        if (gx) input_grad_image(&to_x, l, gy + b * out, gx + b * in, row);
        if (gw) {
            weight_grad_image(&to_w, l, gy + b * out, x + b * in, sums);
            /* By image: a rounding error grows with the number of terms. */
            for (int64_t i = 0; i < size; i++) to_w.weight[i] += sums[i], sums[i] = 0;
        }
    }
    if (gw && !status)
        for (int64_t c = 0; c < outputs; c++)
            for (int64_t i = 0; i < width; i++)
                for (int64_t t = 0; t < taps; t++)
                    gw[(c * width + i) * taps + t] =
                        to_w.weight[((c / LANES * taps + t) * width + i) * LANES + c % LANES];
    discard(&to_x), discard(&to_w), free(sums), free(row);
    return status;
}
