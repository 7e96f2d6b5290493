/* Dynamic group convolution in inference: which channels each head of an image keeps, and the convolution of these.

       t = max(0, sign x + shift)                                    [n, H, W], only ever a row of it
       g = max(0, offset + max(0, (sum of t) squeeze) excite / H W)  [heads, n]
       kept: the `kept` channels of largest g, of equal ones the last; or all of g above the threshold

   and each head's kept channels of t, times g, are convolved. */

#include "gathered.h"

/* Floats of a row of weights that are fetched ahead. */
#define SHORT_ROW 64

/* A layer of n channels; its groups are the heads. Mirrored by `_Dynamic` in dynamic.py. */
typedef struct {
    layer shape;
    int64_t hidden;                       /* units of a head */
    int64_t kept;                         /* channels, or -1 for those above the threshold */
    int64_t by_output, first_tap, by_tap; /* where weights lie, from the first of their head and input */
    int64_t has_bias, relu;               /* whether a bias is added, whether the result is max(0, .) of it */
    float bound;                          /* of what kept channels are multiplied with */
} dynamic;

/* A layer's numbers, one after the other. */
typedef struct {
    activation before;                      /* [n] each */
    const float *squeeze, *excite, *offset; /* [n, heads hidden], [heads, hidden, n], [heads, n] */
    const float *threshold;                 /* [1] */
    const float *weights;                   /* [heads n, m/heads kh kw] */
    const float *bias;                      /* [heads, m/heads], where there is one */
} numbers;

static numbers numbers_at(const float *p, const dynamic *d) {
    const int64_t n = d->shape.channels, heads = d->shape.groups, matrix = n * heads * d->hidden;
    const float *squeeze = p + 2 * n, *excite = squeeze + matrix, *offset = excite + matrix;
    const float *threshold = offset + heads * n, *weights = threshold + 1;
    const float *bias = weights + n * d->shape.outputs * d->shape.kernel[0] * d->shape.kernel[1];
    return (numbers){{p, p + n}, squeeze, excite, offset, threshold, weights, d->has_bias ? bias : NULL};
}

/* ---- Saliency ---- */

/* Sums over the pixels of t, [n]. */
static void pool(const layer *l, const float *x, const activation *a, float *sums) {
    const int64_t channels = l->channels, pixels = l->in[0] * l->in[1];
    if (!l->channels_last) {
        for (int64_t c = 0; c < channels; c++, x += pixels) {
            vec sum[4] = {{0}};
            int64_t i = 0;
            for (; i + 4 * LANES <= pixels; i += 4 * LANES)
                UNROLL for (int v = 0; v < 4; v++)
                    sum[v] += rectified(load(x + i + v * LANES) * a->sign[c] + a->shift[c]);
            for (; i + LANES <= pixels; i += LANES) sum[0] += rectified(load(x + i) * a->sign[c] + a->shift[c]);
            sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
            float total = 0;
            for (int v = 0; v < LANES; v++) total += sum[0][v];
            for (; i < pixels; i++) total += rectified1(x[i] * a->sign[c] + a->shift[c]);
            sums[c] = total;
        }
        return;
    }
    int64_t c = 0;
    for (; c + 4 * LANES <= channels; c += 4 * LANES) {
        vec sum[4] = {{0}};
        for (int64_t i = 0; i < pixels; i++)
            UNROLL for (int v = 0; v < 4; v++) {
                const int64_t at = c + v * LANES;
                sum[v] += rectified(load(x + i * channels + at) * load(a->sign + at) + load(a->shift + at));
            }
        UNROLL for (int v = 0; v < 4; v++) store(sums + c + v * LANES, sum[v]);
    }
    for (; c + LANES <= channels; c += LANES) {
        vec sum = {0};
        for (int64_t i = 0; i < pixels; i++)
            sum += rectified(load(x + i * channels + c) * load(a->sign + c) + load(a->shift + c));
        store(sums + c, sum);
    }
    for (; c < channels; c++) {
        float sum = 0;
        for (int64_t i = 0; i < pixels; i++) sum += rectified1(x[i * channels + c] * a->sign[c] + a->shift[c]);
        sums[c] = sum;
    }
}

/* to[j] += the sum over i of factors[i] * matrix[rows[i], j], rows in turn where they are NULL. */
static void add_rows(const float *factors, const int64_t *rows, int64_t number, const float *matrix, int64_t columns,
                     float *restrict to) {
    int64_t i = 0;
    for (; i + 4 <= number; i += 4) {
        const float *row[4], *f = factors + i;
        for (int q = 0; q < 4; q++) row[q] = matrix + (rows ? rows[i + q] : i + q) * columns;
        for (int64_t j = 0; j < columns; j++)
            to[j] += (f[0] * row[0][j] + f[1] * row[1][j]) + (f[2] * row[2][j] + f[3] * row[3][j]);
    }
    for (; i < number; i++) {
        const float *row = matrix + (rows ? rows[i] : i) * columns;
        for (int64_t j = 0; j < columns; j++) to[j] += factors[i] * row[j];
    }
}

/* ---- Choice ---- */

static int64_t count_above(const lanes_vec *keys, int64_t vectors, int32_t bound) {
    const lanes_vec bounds = bound - (lanes_vec){0};
    lanes_vec found = {0};
    int64_t total = 0;
    for (int64_t i = 0; i < vectors; i++) found -= keys[i] > bounds;
    for (int i = 0; i < LANES; i++) total += found[i];
    return total;
}

/* The indices of the `kept` largest of g [n], which are at least 0, in their order; of equal ones the last.
   By bits: numbers of at least 0 are ordered as the integers of the same bits. Keys have room for g in vectors. */
static int64_t choose_largest(const float *g, int64_t number, int64_t kept, lanes_vec *keys, int64_t *chosen) {
    const int64_t vectors = ceil_div(number, LANES);
    int32_t *key = (int32_t *)keys, least = 0;
    memcpy(key, g, 4 * number);
    for (int64_t i = 0; i < number; i++) key[i] &= INT32_MAX;
    for (int64_t i = number; i < vectors * LANES; i++) key[i] = -1;
    for (int32_t bit = 1 << 30; bit; bit >>= 1) {
        const int64_t found = count_above(keys, vectors, (least | bit) - 1);
        if (found >= kept) least |= bit;
        if (found == kept) break;
    }
    int64_t equal = kept - count_above(keys, vectors, least), at = kept;
    for (int64_t i = number - 1; i >= 0 && at; i--) {
        chosen[at - 1] = i;
        const int is_equal = key[i] == least && equal > 0;
        equal -= is_equal, at -= is_equal || key[i] > least;
    }
    return kept;
}

static int64_t choose_above(const float *g, int64_t number, float threshold, int64_t *chosen) {
    int64_t found = 0;
    for (int64_t i = 0; i < number; i++) chosen[found] = i, found += g[i] > threshold;
    return found;
}

/* What a head of an image keeps: how many channels, which, and the factors of those; so many numbers for n channels. */
typedef struct {
    int64_t *number, *channels;
    float *factors;
} choice;

static int64_t choice_size(int64_t n) { return 1 + n + (n + 1) / 2; }
static choice choice_at(int64_t *kept, int64_t n, int64_t head) {
    int64_t *p = kept + head * choice_size(n);
    return (choice){p, p + 1, (float *)(p + 1 + n)};
}

static int choose(const dynamic *d, const float *x, const float *floats, int64_t *kept, int64_t begin, int64_t end,
                  arena *a) {
    const layer *l = &d->shape;
    const int64_t n = l->channels, heads = l->groups, hidden = d->hidden, pixels = l->in[0] * l->in[1];
    const numbers of = numbers_at(floats, d);
    float *sums = take_floats(a, n), *units = take_floats(a, heads * hidden);
    float *g = take_floats(a, n), *active = take_floats(a, hidden);
    int64_t *rows = take(a, hidden * sizeof *rows);
    lanes_vec *keys = take(a, 4 * round_up(n, LANES));
    if (a->failed) return -1;
    for (int64_t b = begin; b < end; b++) {
        pool(l, x + b * n * pixels, &of.before, sums);
        memset(units, 0, 4 * heads * hidden);
        add_rows(sums, NULL, n, of.squeeze, heads * hidden, units);
        for (int64_t h = 0; h < heads; h++) {
            int64_t fired = 0;
            for (int64_t r = 0; r < hidden; r++) {
                const float unit = rectified1(units[h * hidden + r]);
                active[fired] = unit / pixels, rows[fired] = r, fired += unit != 0;
            }
            memcpy(g, of.offset + h * n, 4 * n);
            add_rows(active, rows, fired, of.excite + h * hidden * n, n, g);
            for (int64_t c = 0; c < n; c++) g[c] = rectified1(g[c]);
            const choice to = choice_at(kept, n, b * heads + h);
            *to.number = d->kept < 0 ? choose_above(g, n, *of.threshold, to.channels)
                                     : choose_largest(g, n, d->kept, keys, to.channels);
            for (int64_t k = 0; k < *to.number; k++) {
                const float factor = g[to.channels[k]];
                to.factors[k] = factor > d->bound ? d->bound : factor;
            }
        }
    }
    return 0;
}

/* ---- What Python calls; -1 without memory ---- */

/* To `kept` [B, heads, choice_size(n)] what heads keep of images begin to end of x. */
int twolevel_choose(const dynamic *d, const float *x, const float *floats, int64_t *kept, int64_t begin, int64_t end) {
    arena a = open_arena();
    const int status = choose(d, x, floats, kept, begin, end, &a);
    close_arena(&a);
    return status;
}

/* Rows begin to end of y's B H': of each head the convolution of the channels that it keeps; its channel j is channel
   j heads + h of y. Without `kept` the channels are chosen here, for rows of whole images. */
int twolevel_dynamic(const dynamic *d, const float *x, const float *floats, int64_t *kept, float *y, int64_t begin,
                     int64_t end) {
    arena a = open_arena();
    const layer *l = &d->shape;
    const int64_t n = l->channels, heads = l->groups, outputs = l->outputs / heads, height = l->out[0];
    const int64_t size = outputs * l->kernel[0] * l->kernel[1];
    const int64_t in = n * l->in[0] * l->in[1], out = l->outputs * height * l->out[1];
    const numbers of = numbers_at(floats, d);
    int64_t *order = take(&a, l->outputs * sizeof *order);
    const float **weight = take(&a, heads * n * sizeof *weight);
    group *groups = take(&a, heads * sizeof *groups);
    int64_t *chosen = kept ? kept : take(&a, ceil_div(end, height) * heads * choice_size(n) * sizeof *chosen);
    int status = a.failed ? -1 : kept ? 0 : choose(d, x, floats, chosen, begin / height, end / height, &a);
    for (int64_t o = 0; o < l->outputs && !status; o++) order[o] = o % heads * outputs + o / heads;
    const convolution c = {
        .shape = l, .order = order, .by_output = d->by_output, .first_tap = d->first_tap, .by_tap = d->by_tap,
        .before = of.before, .bias = of.bias, .relu = d->relu,
    };
    for (int64_t at = begin, stop; at < end && !status; at = stop) {
        const int64_t image = at / height;
        stop = min64(end, (image + 1) * height);
        for (int64_t h = 0; h < heads; h++) {
            const choice keeps = choice_at(chosen, n, image * heads + h);
            for (int64_t k = 0; k < *keeps.number; k++) {
                weight[h * n + k] = of.weights + (h * n + keeps.channels[k]) * size;
                /* Of rows that lie apart no processor fetches the next ahead. */
                for (int64_t i = 0; i < min64(size, SHORT_ROW); i += 16) __builtin_prefetch(weight[h * n + k] + i);
            }
            groups[h] = (group){
                .first = h * outputs, .outputs = outputs, .inputs = *keeps.number, .channels = keeps.channels,
                .weight = weight + h * n, .by_output = d->by_output, .factor = keeps.factors,
            };
        }
        status = gathered_rows(&c, groups, heads, x + image * in, y + image * out, at - image * height,
                               stop - image * height);
    }
    close_arena(&a);
    return status;
}
