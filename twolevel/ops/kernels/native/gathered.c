/* Convolution of chosen channels in three steps for every band of rows that fits into a cache.

   gather    the group's channels, each to a plane of its own with its border of zeros; of stride s, columns c, c + s, ..
             of a row lie together, so that all vectors run along neighbouring pixels
   multiply  y[o, p] = sum over inputs and taps of w[o, i, t] plane_i[p + offset of t]      vectors along pixels p
   put       the rows where they belong in the result

   Vectors run along pixels, so a group may have any number of channels at no loss. Where pixels of one row end and the
   next begins, some lanes compute what nobody reads: a plane is one long row. */

#include "gathered.h"

#define MOST_OUTPUTS 6
/* Gathered planes stay in the second cache, and where there is one tap only, in the first. */
#define BAND_FLOATS (1 << 15)
#define BAND_FLOATS_1X1 (1 << 12)

typedef struct {
    const convolution *c;
    int64_t taps;
    int flat;          /* whether a plane is rows of the image as they are */
    int64_t rows;      /* of the result in a band */
    int64_t phases[2]; /* remainders of rows and columns by the stride */
    int64_t reach[2];  /* rows and columns that a plane has more than the result */
    int64_t pitch;     /* of a row of a plane, and of the result before it is put in its place */
    int64_t plane;     /* floats of all planes of a channel */
    int64_t line;      /* floats of a channel of the result of a band */
    int64_t *offset;   /* [taps] of a tap in the planes */
    int64_t *tap;      /* [taps] of a tap in the weights */
    int64_t *ahead;    /* [taps] of weights to ask for while a tap is multiplied: those of the next outputs */
    float *planes, *result, *image, *bias;
    /* The channels of the band's input rows, `channel` apart, from row first_row on. */
    const float *image_rows, *image_end, *planes_end;
    int64_t channel, first_row;
} plan;

/* An odd number of cache lines: neighbours in another dimension do not compete for places in the cache. */
static int64_t odd_lines(int64_t floats) { return round_up(floats, 32) + 16; }

static int64_t input_rows(const layer *l, int64_t rows) {
    return (rows - 1) * l->stride[0] + (l->kernel[0] - 1) * l->dilation[0] + 1;
}

static void measure(plan *p, const convolution *c, int64_t widest, int64_t wanted) {
    const layer *l = c->shape;
    *p = (plan){.c = c, .taps = l->kernel[0] * l->kernel[1]};
    for (int d = 0; d < 2; d++) {
        const int64_t span = (l->kernel[d] - 1) * l->dilation[d];
        p->phases[d] = min64(l->stride[d], span + 1), p->reach[d] = span / l->stride[d];
    }
    p->flat = p->taps * l->stride[0] * l->stride[1] == 1 && !l->padding[0] && !l->padding[1];
    p->pitch = l->out[1] + p->reach[1];
    const int64_t phases = p->phases[0] * p->phases[1];
    const int64_t fits = (p->taps == 1 ? BAND_FLOATS_1X1 : BAND_FLOATS) / (p->pitch * phases * widest) - p->reach[0];
    /* At least what fills the widest tile. */
    p->rows = min64(wanted, max64(fits, ceil_div(TILE_VECTORS * LANES, p->pitch)));
    p->rows = ceil_div(wanted, max64(1, ceil_div(wanted, max64(1, p->rows))));
    p->plane = odd_lines(phases * (p->rows + p->reach[0]) * p->pitch);
    p->line = odd_lines(round_up(p->rows * p->pitch, LANES));
    p->channel = l->channels_last ? odd_lines(min64(l->in[0], input_rows(l, p->rows)) * l->in[1]) : l->in[0] * l->in[1];
}

static int prepare(plan *p, const convolution *c, int64_t widest, int64_t wanted, arena *a) {
    const layer *l = c->shape;
    measure(p, c, max64(widest, 1), wanted);
    const int64_t planes = max64(widest, 1) * p->plane + p->reach[1] + TILE_VECTORS * LANES;
    p->offset = take(a, p->taps * sizeof *p->offset), p->tap = take(a, p->taps * sizeof *p->tap);
    p->ahead = take(a, p->taps * sizeof *p->ahead);
    p->bias = take_floats(a, l->outputs);
    p->planes = take_floats(a, planes), p->planes_end = p->planes + planes;
    p->result = take_floats(a, l->outputs * p->line + LANES);
    if (l->channels_last) p->image = take_floats(a, l->channels * p->channel);
    if (a->failed) return -1;
    for (int64_t t = 0; t < p->taps; t++) {
        const int64_t at[2] = {t / l->kernel[1] * l->dilation[0], t % l->kernel[1] * l->dilation[1]};
        const int64_t phase = at[0] % l->stride[0] * p->phases[1] + at[1] % l->stride[1];
        p->offset[t] = (phase * (p->rows + p->reach[0]) + at[0] / l->stride[0]) * p->pitch + at[1] / l->stride[1];
        p->tap[t] = c->first_tap + t * c->by_tap;
        /* Outputs of a tap lie side by side, or taps of an output. */
        p->ahead[t] = c->by_output == 1 ? p->tap[t] + LINE / 4 : MOST_OUTPUTS * c->by_output + t * LINE / 4;
    }
    for (int64_t o = 0; o < l->outputs; o++) p->bias[o] = c->bias ? c->bias[o] : 0;
    return 0;
}

/* ---- Gather ---- */

/* to[i] = from[i * stride], or max(0, sign from[i * stride] + shift) factor. Whole vectors where memory up to `from_end`
   and `to_end` allows, so what follows in `to` must be written later. */
INLINE void copy_row(const float *from, const float *from_end, int64_t stride, int64_t number, float sign, float shift,
                     float factor, int active, float *to, const float *to_end) {
    int64_t i = 0;
    if (stride == 1)
        for (; i < number && from + i + LANES <= from_end && to + i + LANES <= to_end; i += LANES) {
            const vec v = load(from + i);
            store(to + i, active ? rectified(v * sign + shift) * factor : v);
        }
    for (; i < number; i++) to[i] = active ? rectified1(from[i * stride] * sign + shift) * factor : from[i * stride];
}

/* The planes of one channel: rows `first` .. of the result read them. */
INLINE void gather_channel(const plan *p, int64_t channel, float factor, int64_t first, int64_t rows, int active,
                           float *to) {
    const layer *l = p->c->shape;
    const activation *before = &p->c->before;
    const float *x = p->image_rows + channel * p->channel;
    const float sign = active ? before->sign[channel] : 1, shift = active ? before->shift[channel] : 0;
    const int64_t height = p->rows + p->reach[0], stride = l->stride[1];
    if (p->flat) {
        x += (first - p->first_row) * l->in[1];
        copy_row(x, p->image_end, 1, rows * l->in[1], sign, shift, factor, active, to, p->planes_end);
        return;
    }
    for (int64_t phase = 0; phase < p->phases[0] * p->phases[1]; phase++) {
        const int64_t column = phase % p->phases[1] - l->padding[1];
        const int64_t low = min64(p->pitch, max64(0, ceil_div(-column, stride)));
        const int64_t high = max64(low, min64(p->pitch, ceil_div(l->in[1] - column, stride)));
        for (int64_t r = 0; r < rows + p->reach[0]; r++) {
            float *row = to + (phase * height + r) * p->pitch;
            const int64_t source = (first + r) * l->stride[0] + phase / p->phases[1] - l->padding[0];
            const int inside = source >= 0 && source < l->in[0];
            const int64_t begin = inside ? low : p->pitch, end = inside ? high : p->pitch;
            const float *from = x + (source - p->first_row) * l->in[1] + low * stride + column;
            for (int64_t i = 0; i < begin; i++) row[i] = 0;
            if (inside && stride == 1)
                copy_row(from, p->image_end, 1, high - low, sign, shift, factor, active, row + low, p->planes_end);
            else if (inside)
                copy_row(from, NULL, stride, high - low, sign, shift, factor, active, row + low, NULL);
            for (int64_t i = end; i < p->pitch; i++) row[i] = 0;
        }
    }
}

static void gather(const plan *p, const group *g, int64_t first, int64_t rows) {
    for (int64_t k = 0; k < g->inputs; k++) {
        const int64_t channel = g->channels ? g->channels[k] : g->first_channel + k;
        float *to = p->planes + k * p->plane;
        if (p->c->before.sign) gather_channel(p, channel, g->factor[k], first, rows, 1, to);
        else gather_channel(p, channel, 1, first, rows, 0, to);
    }
}

/* ---- Multiply ---- */

/* `number` outputs from o on at `vectors` vectors of pixels from `at` on. */
INLINE void tile(const plan *p, const group *g, int64_t o, int64_t at, int number, int vectors) {
    const int64_t by_output = g->by_output;
    vec sum[MOST_OUTPUTS][TILE_VECTORS];
    UNROLL for (int r = 0; r < number; r++)
        UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = splat(p->bias[g->first + o + r]);
    for (int64_t k = 0; k < g->inputs; k++) {
        const float *plane = p->planes + k * p->plane + at, *weight = g->weight[k] + o * by_output;
        for (int64_t t = 0; t < p->taps; t++) {
            const float *x = plane + p->offset[t], *w = weight + p->tap[t];
            __builtin_prefetch(weight + p->ahead[t]);
            vec in[TILE_VECTORS];
            UNROLL for (int v = 0; v < vectors; v++) in[v] = load_once(x + v * LANES);
            UNROLL for (int r = 0; r < number; r++) {
                const vec f = once(splat(w[r * by_output]));
                UNROLL for (int v = 0; v < vectors; v++) sum[r][v] += f * in[v];
            }
        }
    }
    float *out = p->result + (g->first + o) * p->line + at;
    UNROLL for (int r = 0; r < number; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            store(out + r * p->line + v * LANES, p->c->relu ? rectified(sum[r][v]) : sum[r][v]);
}

INLINE void tiles(const plan *p, const group *g, int64_t at, int vectors) {
    const int64_t steps = ceil_div(g->outputs, MOST_OUTPUTS);
    for (int64_t step = 0, o = 0; step < steps; step++) {
        const int64_t number = (g->outputs - o + steps - step - 1) / (steps - step);
        switch (number) {
        case 1: tile(p, g, o, at, 1, vectors); break;
        case 2: tile(p, g, o, at, 2, vectors); break;
        case 3: tile(p, g, o, at, 3, vectors); break;
        case 4: tile(p, g, o, at, 4, vectors); break;
        case 5: tile(p, g, o, at, 5, vectors); break;
        default: tile(p, g, o, at, 6, vectors);
        }
        o += number;
    }
}

static void multiply(const plan *p, const group *g, int64_t rows) {
    const int64_t vectors = ceil_div((rows - 1) * p->pitch + p->c->shape->out[1], LANES);
    int64_t v = 0;
    for (; v + TILE_VECTORS <= vectors; v += TILE_VECTORS) tiles(p, g, v * LANES, TILE_VECTORS);
    switch (vectors - v) {
    case 1: tiles(p, g, v * LANES, 1); break;
    case 2: tiles(p, g, v * LANES, 2 < TILE_VECTORS ? 2 : 1); break;
    case 3: tiles(p, g, v * LANES, 3 < TILE_VECTORS ? 3 : 1); break;
    }
}

/* ---- Put ---- */

static void put(const plan *p, int64_t first, int64_t rows, float *y) {
    const convolution *c = p->c;
    const layer *l = c->shape;
    const int64_t width = l->out[1], pixels = l->out[0] * width;
    /* Without a border rows of the result follow each other. */
    const int64_t length = p->pitch == width ? rows * width : width, lines = p->pitch == width ? 1 : rows;
    if (l->channels_last) {
        for (int64_t r = 0; r < lines; r++)
            for (int64_t q = 0; q < length; q += LANES)
                join(p->result + r * p->pitch + q, p->line, c->order, l->outputs, min64(LANES, length - q),
                     y + ((first + r) * width + q) * l->outputs);
        return;
    }
    for (int64_t o = 0; o < l->outputs; o++) {
        const float *from = p->result + (c->order ? c->order[o] : o) * p->line;
        float *to = y + o * pixels + first * width;
        for (int64_t r = 0; r < lines; r++)
            copy_row(from + r * p->pitch, from + p->line, 1, length, 1, 0, 1, 0, to + r * width, to + rows * width);
    }
}

int gathered_rows(const convolution *c, const group *groups, int64_t number, const float *x, float *y, int64_t begin,
                  int64_t end) {
    plan p;
    arena a = open_arena();
    const layer *l = c->shape;
    int64_t widest = 0;
    for (int64_t g = 0; g < number; g++) widest = max64(widest, groups[g].inputs);
    const int status = prepare(&p, c, widest, end - begin, &a);
    p.image_rows = x, p.image_end = x + l->channels * l->in[0] * l->in[1];
    for (int64_t first = begin; first < end && !status; first += p.rows) {
        const int64_t rows = min64(p.rows, end - first);
        if (l->channels_last) {
            const int64_t top = first * l->stride[0] - l->padding[0];
            p.first_row = max64(0, min64(top, l->in[0]));
            const int64_t stop = max64(p.first_row, min64(l->in[0], top + input_rows(l, rows)));
            separate(x + p.first_row * l->in[1] * l->channels, (stop - p.first_row) * l->in[1], l->channels, p.image,
                     p.channel);
            p.image_rows = p.image, p.image_end = p.image + l->channels * p.channel;
        }
        for (int64_t g = 0; g < number; g++) gather(&p, groups + g, first, rows), multiply(&p, groups + g, rows);
        put(&p, first, rows, y);
    }
    close_arena(&a);
    return status;
}
