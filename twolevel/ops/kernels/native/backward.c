/* The gradients; what Python calls. Images begin to end; -1 without memory.

       gz = C^T gy     gx_g = A_g^T gy_g + r_g^T gz_g     gA_g = gy_g x_g     gr_g = gz_g x_g     gC = gy z */

#include "two_level.h"

/* gx in phases of the stride: pixels (phase) + stride (r, c), which are sums over some of the taps. Every tap belongs
   to one phase, so that all phases read the same copies of gy; those that are a row or column short compute one more. */
typedef struct {
    int64_t terms;       /* of one plane */
    const float **value; /* [terms]: of every output of a group, then of its representatives */
    float *weight;       /* [groups, inputs, terms], in the order of `combine` */
} phase;

typedef struct {
    const layer *l;
    const tensors *t;
    int64_t in, out;         /* pixels of an image of x, and of y */
    int64_t inputs, outputs; /* of a group */
    int64_t columns;         /* weights of an output: inputs and taps */
    int64_t most;            /* images of a block */
    grid pixels;             /* of y */
    /* From gy to gz. */
    const float **value_of_gy;
    float *turned;           /* C^T in the order of `combine` */
    float *gz;               /* [r G, most, H', W'], where it is kept for one block */
    /* To the weights' gradients: sums, tile by tile. */
    planes of_x;
    float *held_x;           /* [most, inputs]: copies of one group of a block */
    const float **value_of_x;
    int64_t of_local, of_restriction;
    float *sums_local, *sums_restriction, *sums_coarse;
    /* From gy and gz to gx. */
    planes of_gy;
    grid pixels_x;           /* of one phase */
    float *held_gy;          /* [outputs + r]: copies of one group of an image, the last are of gz */
    phase *phases;
    float *part;             /* a row of phases, where there is more than one */
    /* Planes of a block, and of an image, where channels lie last. */
    float *planar_gy, *planar_x, *planar_gx;
} backward;

/* Some images, of which enough pixels are summed that the end of a sum, as long as 50 pixels, does not count. */
typedef struct {
    int64_t first, images;
    const float *gy, *x; /* planes */
    const float *gz;     /* that of representative k and image b at k gz_step + b out */
    int64_t gz_step;
    ahead next_x, next_gy;
} block;

enum { PIXELS = 512 };

/* ---- Preparation ---- */

/* How gy is read for one phase of gx. */
static void shift_backward(planes *p, const layer *l, arena *a) {
    *p = (planes){.source = {l->out[0], l->out[1]}, .stride = {1, 1}, .number = l->kernel[0] * l->kernel[1]};
    for (int d = 0; d < 2; d++) p->target[d] = ceil_div(l->in[d], l->stride[d]);
    p->taps = take(a, p->number * (int64_t)sizeof(tap));
    if (!p->taps) return;
    for (int64_t t = 0; t < p->number; t++)
        p->taps[t] = (tap){.row = -floor_div(t / l->kernel[1] * l->dilation[0] - l->padding[0], l->stride[0]),
                           .column = -floor_div(t % l->kernel[1] * l->dilation[1] - l->padding[1], l->stride[1])};
    lay_out(p, a);
}

INLINE int64_t phase_of(const layer *l, int64_t tap) {
    const int64_t down = tap / l->kernel[1] * l->dilation[0] - l->padding[0];
    const int64_t right = tap % l->kernel[1] * l->dilation[1] - l->padding[1];
    return (down - floor_div(down, l->stride[0]) * l->stride[0]) * l->stride[1] + right -
           floor_div(right, l->stride[1]) * l->stride[1];
}

/* Which taps a phase sums, and their weights. */
static void prepare_phase(const backward *w, int64_t number, arena *a) {
    const layer *l = w->l;
    const float *local = w->t->local, *restriction = w->t->restriction;
    const int64_t outputs = local ? w->outputs : 0, others = restriction ? l->of_group : 0, taps = w->of_gy.number;
    int64_t own[taps], count = 0;
    for (int64_t t = 0; t < taps; t++)
        if (phase_of(l, t) == number) own[count++] = t;
    phase *f = w->phases + number;
    f->terms = (outputs + others) * count;
    f->value = take(a, f->terms * (int64_t)sizeof *f->value);
    f->weight = take_floats(a, l->channels * f->terms);
    if (a->failed) return;
    for (int64_t i = 0; i < f->terms; i++)
        f->value[i] = w->held_gy + i / count * w->of_gy.size + w->of_gy.taps[own[i % count]].at;
    float *to = f->weight;
    for (int64_t g = 0; g < l->groups; g++)
        for (int64_t i = 0, n; i < w->inputs; i += n) {
            n = together(w->inputs - i);
            for (int64_t o = g * outputs; o < (g + 1) * outputs; o++)
                for (int64_t t = 0; t < count; t++)
                    for (int64_t k = 0; k < n; k++) *to++ = local[(o * w->inputs + i + k) * taps + own[t]];
            for (int64_t h = g * others; h < (g + 1) * others; h++)
                for (int64_t t = 0; t < count; t++)
                    for (int64_t k = 0; k < n; k++) *to++ = restriction[(h * w->inputs + i + k) * taps + own[t]];
        }
}

static int prepare_input(backward *w, arena *a) {
    const layer *l = w->l;
    const int64_t phases = l->stride[0] * l->stride[1];
    shift_backward(&w->of_gy, l, a);
    if (a->failed) return -1;
    w->pixels_x = grid_of(w->of_gy.target[0], w->of_gy.target[1]);
    w->held_gy = take_zeros(a, (w->outputs + l->of_group) * w->of_gy.size + LANES);
    w->phases = take(a, phases * (int64_t)sizeof *w->phases);
    if (phases > 1) w->part = take_floats(a, l->stride[1] * w->inputs * w->of_gy.target[0] * w->of_gy.target[1]);
    if (l->channels_last) w->planar_gx = take_floats(a, l->channels * w->in);
    for (int64_t f = 0; f < phases && !a->failed; f++) prepare_phase(w, f, a);
    return a->failed ? -1 : 0;
}

static int prepare_weights(backward *w, int local, int restriction, arena *a) {
    const layer *l = w->l;
    shift_forward(&w->of_x, l, a);
    if (a->failed) return -1;
    w->held_x = take_zeros(a, w->most * w->inputs * w->of_x.size + LANES);
    w->value_of_x = take(a, w->columns * (int64_t)sizeof *w->value_of_x);
    w->of_local = correlated(w->outputs, w->columns);
    w->of_restriction = l->of_group == 1 ? round_up(w->columns, SUMS) * LANES : correlated(l->of_group, w->columns);
    if (local) w->sums_local = take_zeros(a, l->groups * w->of_local);
    if (restriction) w->sums_restriction = take_zeros(a, l->groups * w->of_restriction);
    if (l->channels_last) w->planar_x = take_floats(a, w->most * l->channels * w->in);
    if (a->failed) return -1;
    list_taps(&w->of_x, w->value_of_x, w->held_x, w->inputs);
    return 0;
}

static int prepare_coarse(backward *w, int sum, arena *a) {
    const layer *l = w->l;
    const int64_t rows = l->representatives;
    if (sum) w->sums_coarse = take_zeros(a, correlated(l->outputs, rows));
    if (!w->t->coarse) return a->failed ? -1 : 0;
    w->value_of_gy = take(a, l->outputs * (int64_t)sizeof *w->value_of_gy);
    w->turned = take_floats(a, l->outputs * rows);
    if (!w->t->gz_of_all) w->gz = take_floats(a, rows * w->most * w->out);
    if (a->failed) return -1;
    for (int64_t r = 0, n; r < rows; r += n) {
        n = together(rows - r);
        for (int64_t o = 0; o < l->outputs; o++)
            for (int64_t k = 0; k < n; k++) w->turned[r * l->outputs + o * n + k] = w->t->coarse[o * rows + r + k];
    }
    return 0;
}

/* ---- A block of images ---- */

static const float *planes_of_images(float *planar, const float *images, int64_t number, int64_t pixels,
                                     int64_t channels) {
    if (!planar) return images;
    for (int64_t b = 0; b < number; b++)
        planes_of_image(planar + b * channels * pixels, images + b * channels * pixels, pixels, channels);
    return planar;
}

static block read_block(const backward *w, int64_t first, int64_t end) {
    const layer *l = w->l;
    const tensors *t = w->t;
    const int64_t images = min64(w->most, end - first), next = min64(w->most, end - first - images);
    const int64_t of_gy = l->outputs * w->out, of_x = l->channels * w->in;
    const float *gz = w->gz ? w->gz : (t->gz ? t->gz : t->gz_of_all);
    block k = {.first = first, .images = images, .gz_step = w->gz ? w->most * w->out : l->batch * w->out};
    if (gz) k.gz = w->gz ? gz : gz + first * w->out;
    if (t->gy) k.gy = planes_of_images(w->planar_gy, t->gy + first * of_gy, images, w->out, l->outputs);
    if (w->held_x) k.x = planes_of_images(w->planar_x, t->x + first * of_x, images, w->in, l->channels);
    /* x while gz and gC are computed; gy of the next block under all the rest. */
    int64_t steps = 0, later = 0;
    if (t->coarse) steps += images * steps_of(l->representatives, &w->pixels);
    if (w->sums_coarse) steps += correlated(l->outputs, l->representatives) / SUMS;
    if (w->sums_local) later += l->groups * w->of_local / SUMS;
    if (w->held_gy) later += images * l->groups * steps_of(w->inputs, &w->pixels_x);
    if (w->held_x && !w->planar_x) k.next_x = look_ahead(k.x, images * of_x, steps);
    if (t->gy && later) k.next_gy = look_ahead(t->gy + (first + images) * of_gy, next * of_gy, later);
    return k;
}

/* gz = C^T gy. */
static void project(const backward *w, block *k) {
    const layer *l = w->l;
    for (int64_t b = 0; b < k->images; b++) {
        for (int64_t o = 0; o < l->outputs; o++) w->value_of_gy[o] = k->gy + (b * l->outputs + o) * w->out;
        const sums s = {(float *)k->gz + b * w->out, NULL, l->representatives, k->gz_step};
        const terms all = {w->value_of_gy, l->outputs, w->pixels.columns};
        combine(&s, &w->pixels, &all, &NOTHING, w->turned, &k->next_x);
    }
}

/* gC = gy z. */
static void sum_coarse(const backward *w, block *k) {
    const layer *l = w->l;
    const float *column[l->representatives];
    for (int64_t h = 0; h < l->representatives; h++) column[h] = w->t->z + (h * l->batch + k->first) * w->out;
    const pairs p = {
        .pixels = w->pixels, .images = k->images, .row_step = l->outputs * w->out, .column_step = w->out,
        .pitch = w->pixels.columns,
    };
    correlate(&p, l->outputs, k->gy, w->out, l->representatives, column, w->sums_coarse, &k->next_x);
}

/* gA_g = gy_g x_g and gr_g = gz_g x_g. */
static void sum_weights(const backward *w, block *k) {
    const layer *l = w->l;
    const int64_t of_image = w->inputs * w->of_x.size;
    for (int64_t g = 0; g < l->groups; g++) {
        for (int64_t b = 0; b < k->images; b++)
            copy_planes(&w->of_x, w->held_x + b * of_image, k->x + (b * l->channels + g * w->inputs) * w->in,
                        w->inputs);
        pairs p = {
            .pixels = w->pixels, .images = k->images, .row_step = l->outputs * w->out, .column_step = of_image,
            .pitch = pitch_of(&w->of_x), .other_step = w->out,
        };
        if (w->sums_restriction && l->of_group == 1) /* goes along with the rows of the local part */
            p.other = k->gz + g * k->gz_step, p.of_other = w->sums_restriction + g * w->of_restriction;
        else if (w->sums_restriction) {
            pairs of_z = p;
            of_z.row_step = w->out;
            correlate(&of_z, l->of_group, k->gz + g * l->of_group * k->gz_step, k->gz_step, w->columns, w->value_of_x,
                      w->sums_restriction + g * w->of_restriction, &k->next_gy);
        }
        if (w->sums_local)
            correlate(&p, w->outputs, k->gy + g * w->outputs * w->out, w->out, w->columns, w->value_of_x,
                      w->sums_local + g * w->of_local, &k->next_gy);
        else correlate(&p, 0, NULL, 0, w->columns, w->value_of_x, NULL, &k->next_gy);
    }
}

/* ---- gx ---- */

/* One group of an image from the copies that are held; added to gx where there is no local part. */
static void input_grad_group(const backward *w, int64_t group, float *gx, ahead *next) {
    const layer *l = w->l;
    const planes *p = &w->of_gy;
    const int add = !w->t->local;
    const int64_t size = p->target[0] * p->target[1];
    for (int64_t down = 0; down < l->stride[0]; down++) {
        for (int64_t right = 0; right < l->stride[1]; right++) {
            const phase *f = w->phases + down * l->stride[1] + right;
            float *to = w->part ? w->part + right * w->inputs * size : gx;
            const sums s = {to, add && !w->part ? gx : NULL, w->inputs, size};
            const terms own = {f->value, f->terms, pitch_of(p)};
            combine(&s, &w->pixels_x, &own, &NOTHING, f->weight + group * w->inputs * f->terms, next);
        }
        for (int64_t i = 0; w->part && i < w->inputs; i++)
            for (int64_t r = 0; down + r * l->stride[0] < l->in[0]; r++)
                merge_row(gx + i * w->in + (down + r * l->stride[0]) * l->in[1],
                          w->part + (i * p->target[0] + r) * p->target[1], w->inputs * size, l->in[1], l->stride[1],
                          add);
    }
}

/* gx_g = A_g^T gy_g + r_g^T gz_g. */
static void input_grad_image(const backward *w, block *k, int64_t b) {
    const layer *l = w->l;
    float *image = w->t->gx + (k->first + b) * l->channels * w->in, *to = w->planar_gx ? w->planar_gx : image;
    const int64_t outputs = w->t->local ? w->outputs : 0;
    if (w->planar_gx && !w->t->local) planes_of_image(to, image, w->in, l->channels);
    for (int64_t g = 0; g < l->groups; g++) {
        if (outputs) copy_planes(&w->of_gy, w->held_gy, k->gy + (b * l->outputs + g * outputs) * w->out, outputs);
        for (int64_t h = 0; w->t->restriction && h < l->of_group; h++)
            copy_plane(&w->of_gy, w->held_gy + (outputs + h) * w->of_gy.size,
                       k->gz + (g * l->of_group + h) * k->gz_step + b * w->out);
        input_grad_group(w, g, to + g * w->inputs * w->in, &k->next_gy);
    }
    if (w->planar_gx) image_of_planes(image, to, w->in, l->channels);
}

/* gz from gy and C, where there is C, in `gz_of_all` if that is not NULL; else gz is given. gx from A, r, gy and gz:
   from what there is of A and r, without A added to it. Gradients of A, r and C unless NULL. */
int twolevel_backward(const layer *l, const tensors *t, float *g_local, float *g_restriction, float *g_coarse,
                      int64_t begin, int64_t end) {
    arena a = open_arena();
    backward w = {
        .l = l, .t = t, .in = l->in[0] * l->in[1], .out = l->out[0] * l->out[1], .inputs = l->channels / l->groups,
        .outputs = l->outputs / l->groups, .pixels = grid_of(l->out[0], l->out[1]),
    };
    w.columns = w.inputs * l->kernel[0] * l->kernel[1];
    w.most = max64(1, min64(end - begin, ceil_div(PIXELS, w.out)));
    if (l->channels_last && t->gy) w.planar_gy = take_floats(&a, w.most * l->outputs * w.out);
    int status = prepare_coarse(&w, g_coarse != NULL, &a);
    if (!status && (g_local || g_restriction)) status = prepare_weights(&w, g_local != NULL, g_restriction != NULL, &a);
    if (!status && t->gx) status = prepare_input(&w, &a);
    for (int64_t first = begin; first < end && !status; first += w.most) {
        block k = read_block(&w, first, end);
        if (t->coarse) project(&w, &k);
        if (w.sums_coarse) sum_coarse(&w, &k);
        if (w.held_x) sum_weights(&w, &k);
        for (int64_t b = 0; t->gx && b < k.images; b++) input_grad_image(&w, &k, b);
    }
    for (int64_t g = 0; g < l->groups && !status; g++) {
        if (g_local) untile(w.outputs, w.columns, w.sums_local + g * w.of_local, g_local + g * w.outputs * w.columns);
        if (!g_restriction) continue;
        const float *from = w.sums_restriction + g * w.of_restriction;
        float *to = g_restriction + g * l->of_group * w.columns;
        if (l->of_group == 1) add_up(w.columns, from, to);
        else untile(l->of_group, w.columns, from, to);
    }
    if (g_coarse && !status) untile(l->outputs, l->representatives, w.sums_coarse, g_coarse);
    close_arena(&a);
    return status;
}
