/* The gradients; what Python calls. Images begin to end; -1 without memory.

       gz = C^T gy     gx_g = A_g^T gy_g + r_g^T gz_g     gA_g = gy_g x_g     gr_g = gz_g x_g     gC = gy z */

#include "two_level.h"

/* From gy to the pixels (phase) + stride (r, c) of gx. */
static void shift_backward(planes *p, const layer *l, int64_t row_phase, int64_t column_phase, arena *a) {
    const int64_t phase[2] = {row_phase, column_phase};
    *p = (planes){.source = {l->out[0], l->out[1]}, .stride = {1, 1}};
    for (int d = 0; d < 2; d++) p->target[d] = ceil_div(l->in[d] - phase[d], l->stride[d]);
    p->taps = take(a, l->kernel[0] * l->kernel[1] * sizeof(tap));
    if (!p->taps) return;
    for (int64_t h = 0; h < l->kernel[0]; h++)
        for (int64_t w = 0; w < l->kernel[1]; w++) {
            const int64_t down = phase[0] + l->padding[0] - h * l->dilation[0];
            const int64_t right = phase[1] + l->padding[1] - w * l->dilation[1];
            if (down % l->stride[0] || right % l->stride[1]) continue;
            p->taps[p->number++] = (tap){.row = down / l->stride[0], .column = right / l->stride[1],
                                         .weight = h * l->kernel[1] + w};
        }
    lay_out(p, a);
}

/* One phase of gx: a step of the stride apart, its pixels are sums over some of the taps. */
typedef struct {
    planes shifted;
    grid pixels;
    float *held;         /* copies of gy and gz of one group */
    const float **value; /* [outputs + 1, taps] */
    float *weight;       /* [groups, inputs, outputs + 1, taps], in the order of `combine` */
} phase;

/* Weights of the inputs of a group: of every output and tap, and of the restriction. */
static void pack_phase(float *to, const planes *p, int64_t inputs, int64_t outputs, int64_t taps, const float *local,
                       const float *restriction) {
    const int64_t all = (outputs + (restriction != NULL)) * p->number;
    for (int64_t i = 0, n; i < inputs; i += n) {
        n = together(inputs - i);
        float *at = to + i * all;
        for (int64_t o = 0; o < outputs; o++)
            for (int64_t t = 0; t < p->number; t++)
                for (int64_t k = 0; k < n; k++) *at++ = local[(o * inputs + i + k) * taps + p->taps[t].weight];
        for (int64_t t = 0; restriction && t < p->number; t++)
            for (int64_t k = 0; k < n; k++) *at++ = restriction[(i + k) * taps + p->taps[t].weight];
    }
}

INLINE void merge_part(float *to, vec v, int64_t number, int add) {
    store_part(to, add ? load_part(to, number) + v : v, number);
}

/* Put pixels of every `stride`-th column of a row where they belong, or add them: from `stride` rows, or fewer where
   the row is short. */
INLINE void merge_row(float *to, const float *const *from, int64_t columns, int64_t stride, int add) {
    int64_t c = 0;
    if (stride == 2)
        for (; c + 2 * LANES <= columns; c += 2 * LANES) {
            const vec a = load(from[0] + c / 2), b = load(from[1] + c / 2);
            const vec low = IN_TURN_LOWER(a, b), high = IN_TURN_UPPER(a, b);
            store(to + c, add ? load(to + c) + low : low);
            store(to + c + LANES, add ? load(to + c + LANES) + high : high);
        }
    if (stride == 2 && c < columns) {
        const int64_t left = columns - c;
        const vec a = load_part(from[0] + c / 2, (left + 1) / 2), b = left > 1 ? load_part(from[1] + c / 2, left / 2) : (vec){0};
        merge_part(to + c, IN_TURN_LOWER(a, b), min64(left, LANES), add);
        if (left > LANES) merge_part(to + c + LANES, IN_TURN_UPPER(a, b), left - LANES, add);
        return;
    }
    for (; c < columns; c++) to[c] = (add ? to[c] : 0) + from[c % stride][c / stride];
}

/* The gradient of one group of one image, from gy [outputs, H', W'] unless `outputs` is 0 and gz unless NULL. */
static void input_grad(const layer *l, const phase *phase_of, const float *gy, const float *gz, int64_t outputs,
                       int64_t group, float *gx, int add, float *part) {
    const int64_t inputs = l->channels / l->groups, in = l->in[0] * l->in[1], columns = l->stride[1];
    for (int64_t down = 0; down < min64(l->stride[0], l->in[0]); down++) {
        float *to[columns];
        for (int64_t right = 0; right < min64(columns, l->in[1]); right++) {
            const phase *own = phase_of + down * columns + right;
            const planes *p = &own->shifted;
            const int64_t size = p->target[0] * p->target[1], all = (outputs + (gz != NULL)) * p->number;
            to[right] = part ? (right ? to[right - 1] + inputs * in : part) : gx;
            copy_channels(p, own->held, gy, 0, outputs, (normaliser){0});
            if (gz) copy_channels(p, own->held + outputs * p->size, gz, 0, 1, (normaliser){0});
            const sums s = {to[right], add && !part ? gx : NULL, inputs, size};
            combine(&s, &own->pixels, &(terms){own->value, all, pitch_of(p)}, &(terms){NULL, 0, 0},
                    own->weight + group * inputs * all);
        }
        for (int64_t i = 0; part && i < inputs; i++)
            for (int64_t r = 0; r < phase_of[down * columns].shifted.target[0]; r++) {
                const float *from[columns];
                for (int64_t right = 0; right < min64(columns, l->in[1]); right++) {
                    const planes *p = &phase_of[down * columns + right].shifted;
                    from[right] = to[right] + (i * p->target[0] + r) * p->target[1];
                }
                merge_row(gx + i * in + (down + r * l->stride[0]) * l->in[1], from, l->in[1], columns, add);
            }
    }
}

enum { PIXELS = 512 }; /* that many or more to a sum, whose end costs as much as 50 pixels */

int twolevel_backward(const layer *l, const float *gy, const float *x, const float *scale, const float *shift,
                      const float *z, const float *gz_in, const float *local, const float *restriction,
                      const float *coarse, float *gz_out, float *gx, float *g_local, float *g_restriction,
                      float *g_coarse, int64_t begin, int64_t end) {
    arena a = open_arena();
    const int64_t groups = l->groups, inputs = l->channels / groups, outputs = l->outputs / groups;
    const int64_t in = l->in[0] * l->in[1], out = l->out[0] * l->out[1], taps = l->kernel[0] * l->kernel[1];
    const int64_t block = max64(1, min64(end - begin, ceil_div(PIXELS, out))), columns = inputs * taps;
    const int64_t from_local = local ? outputs : 0, phases = gx ? l->stride[0] * l->stride[1] : 0;
    const int want_weights = g_local || g_restriction, want_z = coarse != NULL;
    const grid pixels = grid_of(l->out[0], l->out[1]);
    const normaliser n = {scale, shift};

    planes p;
    shift_forward(&p, l, &a);
    phase *phase_of = take(&a, phases * sizeof *phase_of);
    if (a.failed) return close_arena(&a), -1;
    for (int64_t f = 0; f < phases; f++) {
        phase *own = phase_of + f;
        shift_backward(&own->shifted, l, f / l->stride[1], f % l->stride[1], &a);
        if (a.failed) return close_arena(&a), -1;
        const int64_t all = (from_local + (restriction != NULL)) * own->shifted.number;
        own->pixels = grid_of(own->shifted.target[0], own->shifted.target[1]);
        own->held = take_zeros(&a, (from_local + 1) * own->shifted.size + LANES);
        own->value = take(&a, all * sizeof *own->value);
        own->weight = take_floats(&a, l->channels * all);
        if (a.failed) return close_arena(&a), -1;
        list_taps(&own->shifted, own->value, own->held, from_local + (restriction != NULL));
        for (int64_t k = 0; k < groups; k++)
            pack_phase(own->weight + k * inputs * all, &own->shifted, inputs, from_local, taps,
                       local + k * outputs * columns, restriction ? restriction + k * columns : NULL);
    }
    float *held = want_weights ? take_zeros(&a, block * inputs * p.size + LANES) : NULL;
    const float **value = take(&a, max64(columns, l->representatives) * sizeof *value);
    const float **planes_of_gy = take(&a, l->outputs * sizeof *planes_of_gy);
    float *turned = want_z ? take_floats(&a, l->outputs * l->representatives) : NULL; /* C in the order of `combine` */
    const int64_t of_local = correlated(outputs, columns), of_restriction = correlated(1, columns);
    float *sums_local = g_local ? take_zeros(&a, groups * of_local) : NULL;
    float *sums_restriction = g_restriction ? take_zeros(&a, groups * of_restriction) : NULL;
    float *sums_coarse = g_coarse ? take_zeros(&a, correlated(l->outputs, l->representatives)) : NULL;
    float *gz_own = want_z && !gz_out ? take_floats(&a, l->representatives * block * out) : NULL;
    float *planar_gy = l->channels_last && gy ? take_floats(&a, block * l->outputs * out) : NULL;
    float *planar_x = l->channels_last && want_weights ? take_floats(&a, block * l->channels * in) : NULL;
    float *planar_gx = l->channels_last && gx ? take_floats(&a, l->channels * in) : NULL;
    float *part = phases > 1 ? take_floats(&a, l->stride[1] * inputs * in) : NULL;
    if (a.failed) return close_arena(&a), -1;
    list_taps(&p, value, held, want_weights ? inputs : 0);
    if (want_z)
        for (int64_t r = 0, k; r < l->representatives; r += k) {
            k = together(l->representatives - r);
            for (int64_t o = 0; o < l->outputs; o++)
                for (int64_t i = 0; i < k; i++)
                    turned[r * l->outputs + o * k + i] = coarse[o * l->representatives + r + i];
        }

    for (int64_t first = begin; first < end; first += block) {
        const int64_t images = min64(block, end - first);
        const float *image_gy = gy + first * l->outputs * out, *image_x = x + first * l->channels * in;
        if (planar_gy) {
            for (int64_t b = 0; b < images; b++)
                planes_of_image(planar_gy + b * l->outputs * out, image_gy + b * l->outputs * out, out, l->outputs);
            image_gy = planar_gy;
        }
        if (planar_x) {
            for (int64_t b = 0; b < images; b++)
                planes_of_image(planar_x + b * l->channels * in, image_x + b * l->channels * in, in, l->channels);
            image_x = planar_x;
        }
        /* Plane of representative k of image b: gz + k gz_step + b out. */
        const int64_t gz_step = gz_own ? block * out : l->batch * out;
        const float *gz = gz_own ? gz_own : (gz_in ? gz_in : gz_out) + first * out;
        for (int64_t b = 0; want_z && b < images; b++) {
            for (int64_t o = 0; o < l->outputs; o++) planes_of_gy[o] = image_gy + (b * l->outputs + o) * out;
            const sums s = {(float *)gz + b * out, NULL, l->representatives, gz_step};
            combine(&s, &pixels, &(terms){planes_of_gy, l->outputs, pixels.columns}, &(terms){NULL, 0, 0}, turned);
        }
        if (g_coarse) {
            const float *column[l->representatives];
            for (int64_t h = 0; h < l->representatives; h++) column[h] = z + (h * l->batch + first) * out;
            correlate(&(pairs){pixels, images, l->outputs * out, out, pixels.columns}, l->outputs, image_gy, out,
                      l->representatives, column, sums_coarse);
        }
        for (int64_t k = 0; want_weights && k < groups; k++) {
            for (int64_t b = 0; b < images; b++)
                copy_channels(&p, held + b * inputs * p.size, image_x + b * l->channels * in, k * inputs, (k + 1) * inputs, n);
            const pairs with_y = {pixels, images, l->outputs * out, inputs * p.size, pitch_of(&p)};
            const pairs with_z = {pixels, images, out, inputs * p.size, pitch_of(&p)};
            if (g_local)
                correlate(&with_y, outputs, image_gy + k * outputs * out, out, columns, value, sums_local + k * of_local);
            if (g_restriction)
                correlate(&with_z, 1, gz + k * gz_step, out, columns, value, sums_restriction + k * of_restriction);
        }
        for (int64_t b = 0; gx && b < images; b++) {
            float *result = gx + (first + b) * l->channels * in;
            if (planar_gx) {
                if (!local) planes_of_image(planar_gx, result, in, l->channels);
                result = planar_gx;
            }
            for (int64_t k = 0; k < groups; k++)
                input_grad(l, phase_of, image_gy + (b * l->outputs + k * outputs) * out,
                           restriction ? gz + k * gz_step + b * out : NULL, from_local, k, result + k * inputs * in,
                           !local, part);
            if (planar_gx) image_of_planes(gx + (first + b) * l->channels * in, planar_gx, in, l->channels);
        }
    }
    for (int64_t k = 0; g_local && k < groups; k++)
        untile(outputs, columns, sums_local + k * of_local, g_local + k * outputs * columns, columns);
    for (int64_t k = 0; g_restriction && k < groups; k++)
        untile(1, columns, sums_restriction + k * of_restriction, g_restriction + k * columns, columns);
    if (g_coarse) untile(l->outputs, l->representatives, sums_coarse, g_coarse, l->representatives);
    close_arena(&a);
    return 0;
}
