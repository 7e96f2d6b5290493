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
    int64_t taps;
    int64_t rows;      /* of the result in a band */
    int64_t phases[2]; /* remainders of rows and columns by the stride */
    int64_t reach[2];  /* rows and columns that a plane has more than the result */
    int64_t pitch;     /* of a row of a plane, and of the result before it is put in its place */
    int64_t plane;     /* floats of all planes of a channel */
    int64_t line;      /* floats of a channel of the result of a band */
    int64_t *offset;   /* [taps] of a tap in the planes */
    int64_t *tap;      /* [taps] of a tap in the weights */
    float *planes, *result, *image;
    const float *image_rows; /* the channels of the band's input rows, `channel` apart, from row first_row on */
    int64_t channel, first_row;
} plan;

/* An odd number of cache lines: neighbours in another dimension do not compete for places in the cache. */
static int64_t odd_lines(int64_t floats) { return round_up(floats, 32) + 16; }

static int64_t input_rows(const layer *l, int64_t rows) {
    return (rows - 1) * l->stride[0] + (l->kernel[0] - 1) * l->dilation[0] + 1;
}

static int prepare(plan *p, const convolution *c, int64_t widest, int64_t wanted) {
    const layer *l = c->shape;
    memset(p, 0, sizeof *p);
    p->taps = l->kernel[0] * l->kernel[1];
    for (int d = 0; d < 2; d++) {
        const int64_t span = (l->kernel[d] - 1) * l->dilation[d];
        p->phases[d] = min64(l->stride[d], span + 1), p->reach[d] = span / l->stride[d];
    }
    p->pitch = l->out[1] + p->reach[1];
    const int64_t phases = p->phases[0] * p->phases[1], row = p->pitch * phases * max64(widest, 1);
    const int64_t fits = (p->taps == 1 ? BAND_FLOATS_1X1 : BAND_FLOATS) / row - p->reach[0];
    /* At least what fills the widest tile. */
    p->rows = min64(wanted, max64(fits, ceil_div(TILE_VECTORS * LANES, p->pitch)));
    p->rows = ceil_div(wanted, ceil_div(wanted, p->rows));
    const int64_t rows = p->rows + p->reach[0];
    p->plane = odd_lines(phases * rows * p->pitch);
    p->line = odd_lines(round_up(p->rows * p->pitch, LANES));
    p->offset = malloc(2 * p->taps * sizeof *p->offset), p->tap = p->offset + p->taps;
    p->planes = room(max64(widest, 1) * p->plane + p->reach[1] + TILE_VECTORS * LANES);
    p->result = room(c->outputs * p->line + LANES);
    p->channel = l->in[0] * l->in[1];
    if (c->last) {
        p->channel = odd_lines(min64(l->in[0], input_rows(l, p->rows)) * l->in[1]);
        p->image = room(l->channels * p->channel);
    }
    if (!p->offset || !p->planes || !p->result || (c->last && !p->image)) return -1;
    for (int64_t t = 0; t < p->taps; t++) {
        const int64_t at[2] = {t / l->kernel[1] * l->dilation[0], t % l->kernel[1] * l->dilation[1]};
        const int64_t phase = at[0] % l->stride[0] * p->phases[1] + at[1] % l->stride[1];
        p->offset[t] = (phase * rows + at[0] / l->stride[0]) * p->pitch + at[1] / l->stride[1];
        p->tap[t] = c->first_tap + t * c->by_tap;
    }
    return 0;
}

static void discard(plan *p) { free(p->offset), free(p->planes), free(p->result), free(p->image); }

/* ---- From [pixels, channels] to channels `distance` apart, and back ---- */

/* A block of LANES x LANES; `from` has rows of `step`, `to` of `distance`. */
INLINE void turn(const float *from, int64_t step, float *to, int64_t distance) {
    vec u[LANES];
    UNROLL for (int q = 0; q < LANES; q++) u[q] = load(from + q * step);
    transpose_sum(u, 0);
    UNROLL for (int i = 0; i < LANES; i++) store(to + i * distance, u[i]);
}

static void separate(const float *x, int64_t pixels, int64_t channels, float *to, int64_t distance) {
    if (pixels < LANES || channels < LANES) {
        for (int64_t i = 0; i < channels; i++)
            for (int64_t q = 0; q < pixels; q++) to[i * distance + q] = x[q * channels + i];
        return;
    }
    /* The last block overlaps the one before where numbers are no multiple of LANES. */
    for (int64_t q = 0; q < pixels; q = q + 2 * LANES > pixels && q + LANES < pixels ? pixels - LANES : q + LANES)
        for (int64_t i = 0; i < channels;
             i = i + 2 * LANES > channels && i + LANES < channels ? channels - LANES : i + LANES)
            turn(x + q * channels + i, channels, to + i * distance + q, distance);
}

/* Columns `from` to `from` + number <= LANES of rows order[i] of `result` to y [pixels, channels]. */
static void join(const float *result, int64_t line, const int64_t *order, int64_t channels, int64_t number, float *y) {
    for (int64_t i = 0; i < channels; i += LANES) {
        if (channels < LANES) {
            for (int64_t c = 0; c < channels; c++)
                for (int64_t q = 0; q < number; q++) y[q * channels + c] = result[(order ? order[c] : c) * line + q];
            return;
        }
        if (i + LANES > channels) i = channels - LANES;
        vec u[LANES];
        UNROLL for (int c = 0; c < LANES; c++) u[c] = load(result + (order ? order[i + c] : i + c) * line);
        transpose_sum(u, 0);
        if (number >= LANES) UNROLL for (int q = 0; q < LANES; q++) store(y + q * channels + i, u[q]);
        else
            for (int64_t q = 0; q < number; q++) store(y + q * channels + i, u[q]);
    }
}

/* ---- Gather ---- */

/* to[c] = x[c * stride], activated. */
INLINE void copy_row(const float *x, int64_t stride, int64_t number, float sign, float shift, float factor, int active,
                     float *to) {
    int64_t c = 0;
    if (stride == 1)
        for (; c + LANES <= number; c += LANES) {
            const vec v = load(x + c);
            store(to + c, active ? relu(v * sign + shift) * factor : v);
        }
    for (; c < number; c++) to[c] = active ? relu1(x[c * stride] * sign + shift) * factor : x[c * stride];
}

/* The planes of one channel: rows `first` .. of the result read them. */
INLINE void gather_channel(const plan *p, const convolution *c, int64_t channel, float factor, int64_t first,
                           int64_t rows, int active, float *to) {
    const layer *l = c->shape;
    const float *x = p->image_rows + channel * p->channel;
    const float sign = active ? c->before.sign[channel] : 1, shift = active ? c->before.shift[channel] : 0;
    const int64_t height = p->rows + p->reach[0], stride = l->stride[1];
    for (int64_t phase = 0; phase < p->phases[0] * p->phases[1]; phase++) {
        const int64_t column = phase % p->phases[1] - l->padding[1];
        const int64_t low = min64(p->pitch, ceil_div(-column, stride));
        const int64_t high = max64(low, min64(p->pitch, ceil_div(l->in[1] - column, stride)));
        for (int64_t r = 0; r < rows + p->reach[0]; r++) {
            float *row = to + (phase * height + r) * p->pitch;
            const int64_t source = (first + r) * l->stride[0] + phase / p->phases[1] - l->padding[0];
            const int inside = source >= 0 && source < l->in[0];
            const int64_t begin = inside ? low : p->pitch, end = inside ? high : p->pitch;
            for (int64_t i = 0; i < begin; i++) row[i] = 0;
            for (int64_t i = end; i < p->pitch; i++) row[i] = 0;
            if (!inside) continue;
            const float *from = x + (source - p->first_row) * l->in[1] + low * stride + column;
            if (stride == 1) copy_row(from, 1, high - low, sign, shift, factor, active, row + low);
            else copy_row(from, stride, high - low, sign, shift, factor, active, row + low);
        }
    }
}

static void gather(const plan *p, const convolution *c, const group *g, int64_t first, int64_t rows) {
    for (int64_t k = 0; k < g->inputs; k++) {
        const int64_t channel = g->channels ? g->channels[k] : g->first_channel + k;
        float *to = p->planes + k * p->plane;
        if (c->before.sign) gather_channel(p, c, channel, g->factor[k], first, rows, 1, to);
        else gather_channel(p, c, channel, 1, first, rows, 0, to);
    }
}

/* ---- Multiply ---- */

/* `number` outputs from o on at `vectors` vectors of pixels from `at` on. */
INLINE void tile(const plan *p, const group *g, int64_t o, int64_t at, int number, int vectors) {
    const int64_t by_output = g->by_output;
    vec sum[MOST_OUTPUTS][TILE_VECTORS];
    UNROLL for (int r = 0; r < number; r++) UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = (vec){0};
    for (int64_t k = 0; k < g->inputs; k++) {
        const float *plane = p->planes + k * p->plane + at, *weight = g->weight[k] + o * by_output;
        for (int64_t t = 0; t < p->taps; t++) {
            const float *x = plane + p->offset[t], *w = weight + p->tap[t];
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
        UNROLL for (int v = 0; v < vectors; v++) store(out + r * p->line + v * LANES, sum[r][v]);
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

static void multiply(const plan *p, const convolution *c, const group *g, int64_t rows) {
    const int64_t vectors = ceil_div((rows - 1) * p->pitch + c->shape->out[1], LANES);
    int64_t v = 0;
    for (; v + TILE_VECTORS <= vectors; v += TILE_VECTORS) tiles(p, g, v * LANES, TILE_VECTORS);
    switch (vectors - v) {
    case 1: tiles(p, g, v * LANES, 1); break;
    case 2: tiles(p, g, v * LANES, 2 < TILE_VECTORS ? 2 : 1); break;
    case 3: tiles(p, g, v * LANES, 3 < TILE_VECTORS ? 3 : 1); break;
    }
}

/* ---- Put ---- */

static void put(const plan *p, const convolution *c, int64_t first, int64_t rows, float *y) {
    const int64_t width = c->shape->out[1], pixels = c->shape->out[0] * width;
    /* Without a border rows of the result follow each other. */
    const int64_t length = p->pitch == width ? rows * width : width, lines = p->pitch == width ? 1 : rows;
    if (c->last) {
        for (int64_t r = 0; r < lines; r++)
            for (int64_t q = 0; q < length; q += LANES)
                join(p->result + r * p->pitch + q, p->line, c->order, c->outputs, min64(LANES, length - q),
                     y + ((first + r) * width + q) * c->outputs);
        return;
    }
    for (int64_t o = 0; o < c->outputs; o++) {
        const float *from = p->result + (c->order ? c->order[o] : o) * p->line;
        float *to = y + o * pixels + first * width;
        for (int64_t r = 0; r < lines; r++) memcpy(to + r * width, from + r * p->pitch, 4 * length);
    }
}

int gathered_rows(const convolution *c, const group *groups, int64_t number, const float *x, float *y, int64_t begin,
                  int64_t end) {
    plan p;
    const layer *l = c->shape;
    int64_t widest = 0;
    for (int64_t g = 0; g < number; g++) widest = max64(widest, groups[g].inputs);
    int status = prepare(&p, c, widest, end - begin);
    p.image_rows = x;
    for (int64_t first = begin; first < end && !status; first += p.rows) {
        const int64_t rows = min64(p.rows, end - first);
        if (c->last) {
            const int64_t top = first * l->stride[0] - l->padding[0];
            p.first_row = max64(0, min64(top, l->in[0]));
            const int64_t stop = max64(p.first_row, min64(l->in[0], top + input_rows(l, rows)));
            separate(x + p.first_row * l->in[1] * l->channels, (stop - p.first_row) * l->in[1], l->channels, p.image,
                     p.channel);
            p.image_rows = p.image;
        }
        for (int64_t g = 0; g < number; g++) gather(&p, c, groups + g, first, rows), multiply(&p, c, groups + g, rows);
        put(&p, c, first, rows, y);
    }
    discard(&p);
    return status;
}

/* ---- What Python calls. -1 without memory. ---- */

/* x [B, n, H, W] to y [B, m, H', W'], or both channels last. Group g has sizes[g][0] of the channels in turn, by
   `inputs` [sum of them] or in their order, and sizes[g][1] rows of the result; its filters are [m_g, n_g, kh, kw].
   Rows begin to end of the result's B H'. */
int twolevel_gathered(const layer *l, const float *x, const float *filters, const int64_t *sizes, const int64_t *inputs,
                      const int64_t *order, float *y, int64_t outputs, int64_t last, int64_t begin, int64_t end) {
    const convolution c = {.shape = l, .outputs = outputs, .last = last, .order = order, .by_tap = 1};
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
