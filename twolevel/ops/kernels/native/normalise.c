/* Batch normalisation with or without ReLU, in passes over maps x of C channels:

       mean, spread = sum of (x - mean)^2                                moments
       o  = ReLU(v), v = scale (x - mean) + bias                         apply
       s  = sum of g, t = sum of g (x - mean) / std, g = go where v > 0  sums
       gx = scale g - slope (x - mean) - offset (+ more)                 input_grad

   with scale = weight / std, offset = scale s / N and slope = scale t / (N std) for N numbers of a channel.

   In rows every pass is over all channels. In planes a channel can be normalised as soon as its moments are there, while
   a cache still holds its images: there `forward` and `backward` are two passes in one. */

#include <math.h>

#include "moments.h"
#include "normalise.h"

/* ---- A strip of memory: a line, or a plane, which is of `one` channel ---- */

INLINE void apply_strip(const float *x, float *o, int64_t size, const affine *a, const affine_vec *one, int64_t ahead,
                        int relu) {
    for (int64_t j = 0; j < size; j += LANES) {
        ask_for(x + j + ahead), ask_for(o + j + ahead);
        const affine_vec n = one ? *one : load_affine(a, j);
        const vec v = normalised(load_upto(x + j, size - j, n.mean), n);
        store_upto(o + j, size - j, relu ? rectified(v) : v);
    }
}

INLINE vec gradient(const float *go, int64_t left, vec x, affine_vec n, int relu) {
    const vec given = load_upto(go, left, (vec){0});
    return relu ? passed(given, normalised(x, n)) : given;
}

INLINE void grad_strip(const float *go, const float *x, const float *more, float *gx, int64_t size, const affine *a,
                       const affine_vec *one, int64_t ahead, int relu) {
    for (int64_t j = 0; j < size; j += LANES) {
        ask_for(go + j + ahead), ask_for(x + j + ahead), ask_for(gx + j + ahead);
        const affine_vec n = one ? *one : load_affine(a, j);
        const vec value = load_upto(x + j, size - j, n.mean);
        vec found = gradient(go + j, size - j, value, n, relu) * n.scale - (value - n.mean) * n.slope - n.offset;
        if (more) {
            ask_for(more + j + ahead);
            found += load_upto(more + j, size - j, (vec){0});
        }
        store_upto(gx + j, size - j, found);
    }
}

/* Add to s and std t at each place of a line. */
INLINE void sum_line(const float *go, const float *x, int64_t size, const affine *a, float *s, float *t, int relu) {
    for (int64_t j = 0; j < size; j += LANES) {
        ask_for(go + j + AHEAD), ask_for(x + j + AHEAD);
        const affine_vec n = load_affine(a, j);
        const vec value = load_upto(x + j, size - j, n.mean), g = gradient(go + j, size - j, value, n, relu);
        store(s + j, load(s + j) + g);
        store(t + j, load(t + j) + g * (value - n.mean));
    }
}

/* Add to s and std t of a plane: two sums of each, which do not wait for each other. */
INLINE void sum_plane(const float *go, const float *x, int64_t size, affine_vec n, int64_t ahead, vec s[2], vec t[2],
                      int relu) {
    for (int64_t j = 0; j < size; j += 2 * LANES)
        UNROLL for (int i = 0; i < 2; i++) {
            const int64_t at = j + i * LANES, left = size - at;
            ask_for(go + at + ahead), ask_for(x + at + ahead);
            const vec value = load_upto(x + at, left, n.mean), g = gradient(go + at, left, value, n, relu);
            s[i] += g, t[i] += g * (value - n.mean);
        }
}

/* ---- A channel of planes ---- */

INLINE void apply_channel(const maps *m, const affine *a, const float *x, float *o, int64_t c, int relu) {
    const affine_vec one = splat_affine(a, c);
    for (int64_t b = 0; b < m->images; b++)
        apply_strip(x + plane(m, b, c), o + plane(m, b, c), m->pixels, a, &one, ahead_of(m), relu);
}

INLINE void sum_channel(const maps *m, const affine *a, const float *go, const float *x, float *found, int64_t c,
                        int relu) {
    const affine_vec one = splat_affine(a, c);
    double s = 0, t = 0;
    for (block k = first_block(m, BLOCK); k.size; k = next_block(m, k, BLOCK)) {
        vec sum[2] = {0}, product[2] = {0};
        for (int64_t b = k.image; b < k.image + k.images; b++) {
            const int64_t at = plane(m, b, c) + k.pixel;
            sum_plane(go + at, x + at, k.size, one, ahead_of(m), sum, product, relu);
        }
        s += sum_of_lanes(sum[0] + sum[1]), t += sum_of_lanes(product[0] + product[1]);
    }
    found[c] = s, found[m->channels + c] = t * m->inv_std[c];
}

INLINE void grad_channel(const maps *m, const affine *a, const float *go, const float *x, const float *more, float *gx,
                         int64_t c, int relu) {
    const affine_vec one = splat_affine(a, c);
    for (int64_t b = 0; b < m->images; b++) {
        const int64_t at = plane(m, b, c);
        grad_strip(go + at, x + at, more ? more + at : NULL, gx + at, m->pixels, a, &one, ahead_of(m), relu);
    }
}

/* ---- Rows, numbers begin to end ---- */

INLINE void apply_rows(const maps *m, const affine *a, const float *x, float *o, int64_t begin, int64_t end, int relu) {
    const int64_t wide = line_of(m->channels);
    for (int64_t at = begin; at < end; at += wide)
        apply_strip(x + at, o + at, min64(wide, end - at), a, NULL, AHEAD, relu);
}

/* -1 without memory. */
INLINE int sum_rows(const maps *m, const affine *a, const float *go, const float *x, float *found, int64_t begin,
                    int64_t end, int relu) {
    const int64_t wide = line_of(m->channels), most = max64(1, BLOCK / wide) * wide;
    float *sums = zeros(6 * wide);
    if (!sums) return -1;
    double *total = (double *)(sums + 2 * wide); /* s and std t at each place */
    for (int64_t from = begin; from < end; from += most) {
        memset(sums, 0, 2 * 4 * wide);
        for (int64_t at = from; at < min64(from + most, end); at += wide)
            sum_line(go + at, x + at, min64(wide, end - at), a, sums, sums + wide, relu);
        for (int64_t j = 0; j < 2 * wide; j++) total[j] += sums[j];
    }
    for (int64_t c = 0; c < m->channels; c++) {
        double s = 0, t = 0;
        for (int64_t j = c; j < wide; j += m->channels) s += total[j], t += total[wide + j];
        found[c] = s, found[m->channels + c] = t * m->inv_std[c];
    }
    free(sums);
    return 0;
}

INLINE void grad_rows(const maps *m, const affine *a, const float *go, const float *x, const float *more, float *gx,
                      int64_t begin, int64_t end, int relu) {
    const int64_t wide = line_of(m->channels);
    for (int64_t at = begin; at < end; at += wide)
        grad_strip(go + at, x + at, more ? more + at : NULL, gx + at, min64(wide, end - at), a, NULL, AHEAD, relu);
}

/* ---- Numbers of the channels ---- */

static void set_channel(const maps *m, affine *a, int64_t c) {
    a->mean[c] = m->mean[c];
    a->scale[c] = m->weight ? m->weight[c] * m->inv_std[c] : m->inv_std[c];
    a->bias[c] = m->bias ? m->bias[c] : 0;
}

/* From the means of s and t. */
static void set_gradient(const maps *m, affine *a, int64_t c, float s, float t) {
    a->offset[c] = a->scale[c] * s;
    a->slope[c] = a->scale[c] * m->inv_std[c] * t;
}

/* Room for every channel, in rows for every place of a line. -1 without memory. */
static int make_affine(const maps *m, affine *a) {
    const int64_t wide = m->in_rows ? line_of(m->channels) : m->channels;
    a->mean = zeros(5 * wide);
    if (!a->mean) return -1;
    a->scale = a->mean + wide, a->bias = a->scale + wide, a->slope = a->bias + wide, a->offset = a->slope + wide;
    return 0;
}

/* That and what is in it; `means` of s and t [2, C] may be NULL. */
static int prepare(const maps *m, affine *a, const float *means) {
    const int64_t channels = m->channels, wide = m->in_rows ? line_of(channels) : channels;
    if (make_affine(m, a)) return -1;
    for (int64_t c = 0; c < channels; c++) {
        set_channel(m, a, c);
        if (means) set_gradient(m, a, c, means[c], means[channels + c]);
    }
    for (int i = 0; i < 5; i++)
        for (int64_t j = channels; j < wide; j++) a->mean[i * wide + j] = a->mean[i * wide + j - channels];
    return 0;
}

/* ---- What Python calls: pixels of all images (rows) or channels (planes) begin to end; -1 without memory ---- */

/* relu as a constant. */
#define BY_RELU(m, call)                                                                                               \
    if ((m)->relu) {                                                                                                   \
        call(1);                                                                                                       \
    } else {                                                                                                           \
        call(0);                                                                                                       \
    }

/* x -> mean and spread [2, C]: in rows of these pixels. */
int twolevel_norm_moments(const maps *m, const float *x, double *found, int64_t begin, int64_t end) {
    if (m->in_rows) return moments_of_rows(m, x, found, found + m->channels, begin, end);
    for (int64_t c = begin; c < end; c++) {
        const moments of = moments_of_channel(m, x, c);
        found[c] = of.mean, found[m->channels + c] = of.spread;
    }
    return 0;
}

/* x -> o. */
int twolevel_norm_apply(const maps *m, const float *x, float *o, int64_t begin, int64_t end) {
    affine a;
    if (prepare(m, &a, NULL)) return -1;
#define APPLY(relu)                                                                                                    \
    if (m->in_rows) apply_rows(m, &a, x, o, begin * m->channels, end * m->channels, relu);                             \
    else for (int64_t c = begin; c < end; c++) apply_channel(m, &a, x, o, c, relu)
    BY_RELU(m, APPLY)
    free(a.mean);
    return 0;
}

/* go, x -> s and t [2, C]: in rows of these pixels. */
int twolevel_norm_sums(const maps *m, const float *go, const float *x, float *found, int64_t begin, int64_t end) {
    affine a;
    int status = prepare(m, &a, NULL);
    if (status) return status;
#define SUM(relu)                                                                                                      \
    if (m->in_rows) status = sum_rows(m, &a, go, x, found, begin * m->channels, end * m->channels, relu);              \
    else for (int64_t c = begin; c < end; c++) sum_channel(m, &a, go, x, found, c, relu)
    BY_RELU(m, SUM)
    free(a.mean);
    return status;
}

/* go, x, means of s and t [2, C] -> gx, plus `more` unless that is NULL. */
int twolevel_norm_input_grad(const maps *m, const float *go, const float *x, const float *more, const float *means,
                             float *gx, int64_t begin, int64_t end) {
    affine a;
    if (prepare(m, &a, means)) return -1;
#define GRAD(relu)                                                                                                     \
    if (m->in_rows) grad_rows(m, &a, go, x, more, gx, begin * m->channels, end * m->channels, relu);                   \
    else for (int64_t c = begin; c < end; c++) grad_channel(m, &a, go, x, more, gx, c, relu)
    BY_RELU(m, GRAD)
    free(a.mean);
    return 0;
}

/* Running statistics [C], which may be NULL, and how far they move towards those of a batch. */
typedef struct {
    float *mean, *var;
    double rate;
} running;

static void set_moments(const maps *m, const running *r, int64_t c, double mean, double spread, double eps) {
    const double number = m->images * m->pixels;
    m->mean[c] = mean, m->inv_std[c] = 1 / sqrt(spread / number + eps);
    if (r->mean) r->mean[c] += r->rate * (mean - r->mean[c]);
    if (r->var) r->var[c] += r->rate * (spread / (number - 1) - r->var[c]);
}

/* x -> o, mean and inv_std of `m`; in rows of all pixels. */
int twolevel_norm_forward(const maps *m, double eps, double rate, float *running_mean, float *running_var,
                          const float *x, float *o, int64_t begin, int64_t end) {
    const running r = {running_mean, running_var, rate};
    if (m->in_rows) {
        double *found = (double *)zeros(2 * 2 * m->channels);
        const int status = found ? moments_of_rows(m, x, found, found + m->channels, begin, end) : -1;
        for (int64_t c = 0; c < m->channels && !status; c++)
            set_moments(m, &r, c, found[c], found[m->channels + c], eps);
        free(found);
        return status ? status : twolevel_norm_apply(m, x, o, begin, end);
    }
    affine a;
    if (make_affine(m, &a)) return -1;
    for (int64_t c = begin; c < end; c++) {
        const moments of = moments_of_channel(m, x, c);
        set_moments(m, &r, c, of.mean, of.spread, eps);
        set_channel(m, &a, c);
#define APPLY_ONE(relu) apply_channel(m, &a, x, o, c, relu)
        BY_RELU(m, APPLY_ONE)
    }
    free(a.mean);
    return 0;
}

/* go, x -> s and t [2, C], and from these gx, plus `more` unless that is NULL; in rows of all pixels. */
int twolevel_norm_backward(const maps *m, const float *go, const float *x, const float *more, float *found, float *gx,
                           int64_t begin, int64_t end) {
    const float number = m->images * m->pixels;
    if (m->in_rows) {
        float *means = zeros(2 * m->channels);
        int status = means ? twolevel_norm_sums(m, go, x, found, begin, end) : -1;
        for (int64_t c = 0; c < 2 * m->channels && !status; c++) means[c] = found[c] / number;
        if (!status) status = twolevel_norm_input_grad(m, go, x, more, means, gx, begin, end);
        free(means);
        return status;
    }
    affine a;
    if (prepare(m, &a, NULL)) return -1;
    for (int64_t c = begin; c < end; c++) {
#define SUM_AND_GRAD(relu)                                                                                             \
    sum_channel(m, &a, go, x, found, c, relu);                                                                         \
    set_gradient(m, &a, c, found[c] / number, found[m->channels + c] / number);                                        \
    grad_channel(m, &a, go, x, more, gx, c, relu)
        BY_RELU(m, SUM_AND_GRAD)
    }
    free(a.mean);
    return 0;
}
