/* The gradients; what Python calls. Images begin to end; -1 without memory.

       gz = C^T gy     gx_g = A_g^T gy_g + r_g^T gz_g     gA_g = gy_g x_g     gr_g = gz_g x_g     gC = gy z */

#include "two_level.h"

/* gx in phases of the stride: pixels (phase) + stride (r, c), which are sums over some of the taps. Every tap belongs to
   one phase, so that all phases read the same copies of gy; those that are a row or column short compute one more. */
typedef struct {
    int64_t terms;       /* of one plane */
    const float **value; /* [terms]: of every output of a group, then of its representative */
    float *weight;       /* [groups, inputs, terms], in the order of `combine` */
} phase;

INLINE int64_t phase_of(const layer *l, int64_t tap) {
    const int64_t down = tap / l->kernel[1] * l->dilation[0] - l->padding[0];
    const int64_t right = tap % l->kernel[1] * l->dilation[1] - l->padding[1];
    return (down - floor_div(down, l->stride[0]) * l->stride[0]) * l->stride[1] + right -
           floor_div(right, l->stride[1]) * l->stride[1];
}

/* From gy to one phase of gx. */
static void shift_backward(planes *p, const layer *l, arena *a) {
    *p = (planes){.source = {l->out[0], l->out[1]}, .stride = {1, 1}, .number = l->kernel[0] * l->kernel[1]};
    for (int d = 0; d < 2; d++) p->target[d] = ceil_div(l->in[d], l->stride[d]);
    p->taps = take(a, p->number * sizeof(tap));
    if (!p->taps) return;
    for (int64_t t = 0; t < p->number; t++)
        p->taps[t] = (tap){.row = -floor_div(t / l->kernel[1] * l->dilation[0] - l->padding[0], l->stride[0]),
                           .column = -floor_div(t % l->kernel[1] * l->dilation[1] - l->padding[1], l->stride[1]),
                           .weight = t};
    lay_out(p, a);
}

/* Which taps a phase sums, and their weights. `held`: copies of gy of the outputs of a group, then of gz. */
static void prepare_phase(phase *f, const layer *l, const planes *p, int64_t number, const float *held,
                          const float *local, const float *restriction, arena *a) {
    const int64_t inputs = l->channels / l->groups, outputs = local ? l->outputs / l->groups : 0, taps = p->number;
    int64_t own[taps], count = 0;
    for (int64_t t = 0; t < taps; t++)
        if (phase_of(l, t) == number) own[count++] = t;
    f->terms = (outputs + (restriction != NULL)) * count;
    f->value = take(a, f->terms * sizeof *f->value);
    f->weight = take_floats(a, l->channels * f->terms);
    if (a->failed) return;
    for (int64_t i = 0; i < f->terms; i++) f->value[i] = held + i / count * p->size + p->taps[own[i % count]].at;
    float *to = f->weight;
    for (int64_t g = 0; g < l->groups; g++)
        for (int64_t i = 0, n; i < inputs; i += n) {
            n = together(inputs - i);
            for (int64_t o = g * outputs; o < (g + 1) * outputs; o++)
                for (int64_t t = 0; t < count; t++)
                    for (int64_t k = 0; k < n; k++) *to++ = local[(o * inputs + i + k) * taps + own[t]];
            for (int64_t t = 0; restriction && t < count; t++)
                for (int64_t k = 0; k < n; k++) *to++ = restriction[(g * inputs + i + k) * taps + own[t]];
        }
}

INLINE void merge_part(float *to, vec v, int64_t number, int add) {
    store_part(to, add ? load_part(to, number) + v : v, number);
}

/* Put pixels of every `stride`-th column of a row where they belong, or add them: from rows that are `step` apart. */
INLINE void merge_row(float *to, const float *from, int64_t step, int64_t columns, int64_t stride, int add) {
    int64_t c = 0;
    if (stride == 2)
        for (; c + 2 * LANES <= columns; c += 2 * LANES) {
            const vec a = load(from + c / 2), b = load(from + step + c / 2);
            const vec low = IN_TURN_LOWER(a, b), high = IN_TURN_UPPER(a, b);
            store(to + c, add ? load(to + c) + low : low);
            store(to + c + LANES, add ? load(to + c + LANES) + high : high);
        }
    if (stride == 2 && c < columns) {
        const int64_t left = columns - c;
        const vec a = load_part(from + c / 2, (left + 1) / 2);
        const vec b = left > 1 ? load_part(from + step + c / 2, left / 2) : (vec){0};
        merge_part(to + c, IN_TURN_LOWER(a, b), min64(left, LANES), add);
        if (left > LANES) merge_part(to + c + LANES, IN_TURN_UPPER(a, b), left - LANES, add);
        return;
    }
    for (; c < columns; c++) to[c] = (add ? to[c] : 0) + from[c % stride * step + c / stride];
}

/* The gradient of one group of one image, from copies of gy and gz that are there. */
static void input_grad(const layer *l, const planes *p, const phase *phases, const grid *g, int64_t group, float *gx,
                       int add, float *part, ahead *next) {
    const int64_t inputs = l->channels / l->groups, in = l->in[0] * l->in[1], size = p->target[0] * p->target[1];
    for (int64_t down = 0; down < l->stride[0]; down++) {
        for (int64_t right = 0; right < l->stride[1]; right++) {
            const phase *f = phases + down * l->stride[1] + right;
            float *to = part ? part + right * inputs * size : gx;
            const sums s = {to, add && !part ? gx : NULL, inputs, size};
            combine(&s, g, &(terms){f->value, f->terms, pitch_of(p)}, &(terms){NULL, 0, 0},
                    f->weight + group * inputs * f->terms, next);
        }
        for (int64_t i = 0; part && i < inputs; i++)
            for (int64_t r = 0; down + r * l->stride[0] < l->in[0]; r++)
                merge_row(gx + i * in + (down + r * l->stride[0]) * l->in[1],
                          part + (i * p->target[0] + r) * p->target[1], inputs * size, l->in[1], l->stride[1], add);
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
    planes to_x = {0};
    if (gx) shift_backward(&to_x, l, &a);
    if (a.failed) return close_arena(&a), -1;
    const grid pixels_x = gx ? grid_of(to_x.target[0], to_x.target[1]) : (grid){0};
    float *held_gy = gx ? take_zeros(&a, (from_local + 1) * to_x.size + LANES) : NULL;
    phase *phase_at = take(&a, phases * (int64_t)sizeof *phase_at);
    if (a.failed) return close_arena(&a), -1;
    for (int64_t f = 0; f < phases; f++)
        prepare_phase(phase_at + f, l, &to_x, f, held_gy, local, restriction, &a);
    float *held = want_weights ? take_zeros(&a, block * inputs * p.size + LANES) : NULL;
    const float **value = take(&a, max64(columns, l->representatives) * sizeof *value);
    const float **planes_of_gy = take(&a, l->outputs * sizeof *planes_of_gy);
    float *turned = want_z ? take_floats(&a, l->outputs * l->representatives) : NULL; /* C in the order of `combine` */
    const int64_t of_local = correlated(outputs, columns), of_restriction = round_up(columns, SUMS) * LANES;
    float *sums_local = g_local ? take_zeros(&a, groups * of_local) : NULL;
    float *sums_restriction = g_restriction ? take_zeros(&a, groups * of_restriction) : NULL;
    float *sums_coarse = g_coarse ? take_zeros(&a, correlated(l->outputs, l->representatives)) : NULL;
    float *gz_own = want_z && !gz_out ? take_floats(&a, l->representatives * block * out) : NULL;
    float *planar_gy = l->channels_last && gy ? take_floats(&a, block * l->outputs * out) : NULL;
    float *planar_x = l->channels_last && want_weights ? take_floats(&a, block * l->channels * in) : NULL;
    float *planar_gx = l->channels_last && gx ? take_floats(&a, l->channels * in) : NULL;
    float *part = phases > 1 ? take_floats(&a, l->stride[1] * inputs * to_x.target[0] * to_x.target[1]) : NULL;
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
        const int64_t left = min64(block, end - first - images);
        ahead next_x = look_ahead(image_x, images * l->channels * in, want_z * images * ceil_div(l->representatives, 4) * ceil_div(out, TILE * LANES) + (g_coarse != NULL) * correlated(l->outputs, l->representatives) / SUMS);
        ahead next_gy = look_ahead(gy + (first + images) * l->outputs * out, left * l->outputs * out, (g_local != NULL) * groups * of_local / SUMS + (gx != NULL) * images * groups * ceil_div(inputs, 4) * ceil_div(in, TILE * LANES));
        /* Plane of representative k of image b: gz + k gz_step + b out. */
        const int64_t gz_step = gz_own ? block * out : l->batch * out;
        const float *gz = gz_own ? gz_own : (gz_in ? gz_in : gz_out) + first * out;
        for (int64_t b = 0; want_z && b < images; b++) {
            for (int64_t o = 0; o < l->outputs; o++) planes_of_gy[o] = image_gy + (b * l->outputs + o) * out;
            const sums s = {(float *)gz + b * out, NULL, l->representatives, gz_step};
            combine(&s, &pixels, &(terms){planes_of_gy, l->outputs, pixels.columns}, &(terms){NULL, 0, 0}, turned, &next_x);
        }
        if (g_coarse) {
            const float *column[l->representatives];
            for (int64_t h = 0; h < l->representatives; h++) column[h] = z + (h * l->batch + first) * out;
            correlate(&(pairs){.pixels = pixels, .images = images, .row_step = l->outputs * out, .column_step = out, .pitch = pixels.columns}, l->outputs, image_gy, out,
                      l->representatives, column, sums_coarse, &next_x);
        }
        for (int64_t k = 0; want_weights && k < groups; k++) {
            for (int64_t b = 0; b < images; b++)
                copy_channels(&p, held + b * inputs * p.size, image_x + b * l->channels * in, k * inputs, (k + 1) * inputs, n);
            const pairs p_ = {.pixels = pixels, .images = images, .row_step = l->outputs * out,
                              .column_step = inputs * p.size, .pitch = pitch_of(&p), .other_step = out,
                              .other = g_restriction ? gz + k * gz_step : NULL,
                              .of_other = g_restriction ? sums_restriction + k * of_restriction : NULL};
            correlate(&p_, g_local ? outputs : 0, image_gy + k * outputs * out, out, columns, value,
                      g_local ? sums_local + k * of_local : NULL, &next_gy);
        }
        for (int64_t b = 0; gx && b < images; b++) {
            float *result = gx + (first + b) * l->channels * in;
            if (planar_gx) {
                if (!local) planes_of_image(planar_gx, result, in, l->channels);
                result = planar_gx;
            }
            for (int64_t k = 0; k < groups; k++) {
                if (from_local)
                    copy_channels(&to_x, held_gy, image_gy + b * l->outputs * out, k * outputs, (k + 1) * outputs,
                                  (normaliser){0});
                if (restriction)
                    copy_channels(&to_x, held_gy + from_local * to_x.size, gz + k * gz_step + b * out, 0, 1,
                                  (normaliser){0});
                input_grad(l, &to_x, phase_at, &pixels_x, k, result + k * inputs * in, !local, part, &next_gy);
            }
            if (planar_gx) image_of_planes(gx + (first + b) * l->channels * in, planar_gx, in, l->channels);
        }
    }
    for (int64_t k = 0; g_local && k < groups; k++)
        untile(outputs, columns, sums_local + k * of_local, g_local + k * outputs * columns);
    for (int64_t k = 0; g_restriction && k < groups; k++)
        add_up(columns, sums_restriction + k * of_restriction, g_restriction + k * columns);
    if (g_coarse) untile(l->outputs, l->representatives, sums_coarse, g_coarse);
    close_arena(&a);
    return 0;
}
