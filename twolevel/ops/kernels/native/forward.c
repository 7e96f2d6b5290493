/* Forward; what Python calls. Images begin to end; -1 without memory. */

#include "two_level.h"

typedef struct {
    const layer *l;
    const tensors *t;
    int64_t in, out;          /* pixels of an image of x, and of y */
    int64_t inputs, outputs;  /* of a group */
    int64_t of_local;         /* terms of an output: inputs and taps */
    int64_t of_y;             /* those that y has, and the coarse term's after them */
    grid pixels;
    planes shifted;
    float *held;              /* copies of an image */
    const float **value;      /* [channels, taps] in them; then the representatives */
    const float **value_of_z;
    float *weight;            /* [outputs, of_y] in the order of `combine` */
    float *restriction;       /* [r groups, of_local], likewise */
    float *planar;            /* room for the planes of an image, where channels lie last */
    ahead next;
} forward;

static int prepare(forward *f, const layer *l, const tensors *t, arena *a) {
    *f = (forward){
        .l = l, .t = t, .in = l->in[0] * l->in[1], .out = l->out[0] * l->out[1], .inputs = l->channels / l->groups,
        .outputs = l->outputs / l->groups, .pixels = grid_of(l->out[0], l->out[1]),
    };
    shift_forward(&f->shifted, l, a);
    if (a->failed) return -1;
    const int64_t of_coarse = t->coarse ? l->representatives : 0;
    f->of_local = f->inputs * f->shifted.number;
    const int64_t first = t->local ? f->of_local : 0;
    f->of_y = first + of_coarse;
    f->held = take_zeros(a, l->channels * f->shifted.size + LANES);
    f->value = take(a, (l->groups * f->of_local + l->representatives) * (int64_t)sizeof *f->value);
    f->weight = take_floats(a, l->outputs * f->of_y);
    f->planar = l->channels_last ? take_floats(a, max64(l->channels * f->in, l->outputs * f->out)) : NULL;
    if (t->own) f->restriction = take_floats(a, l->groups * l->of_group * f->of_local);
    if (a->failed) return -1;
    f->value_of_z = f->value + l->groups * f->of_local;
    list_taps(&f->shifted, f->value, f->held, l->channels);
    for (int64_t h = 0; f->restriction && h < l->groups * l->of_group; h += l->of_group) /* a group after the other */
        pack(f->restriction + h * f->of_local, l->of_group, f->of_local, t->restriction + h * f->of_local, f->of_local, 0,
             f->of_local);
    for (int64_t o = 0; o < l->outputs; o += f->outputs) {
        float *to = f->weight + o * f->of_y;
        if (t->local) pack(to, f->outputs, f->of_local, t->local + o * f->of_local, f->of_local, 0, f->of_y);
        if (t->coarse) pack(to, f->outputs, of_coarse, t->coarse + o * of_coarse, of_coarse, first, f->of_y);
    }
    return 0;
}

/* Copies of an image of x. */
static void read_image(forward *f, const float *image) {
    if (f->planar) planes_of_image(f->planar, image, f->in, f->l->channels), image = f->planar;
    copy_planes(&f->shifted, f->held, image, f->l->channels);
}

/* z_g = r_g * x_g. */
static void restrict_image(forward *f, int64_t b) {
    const int64_t number = f->l->of_group, step = f->l->batch * f->out;
    for (int64_t g = 0; g < f->l->groups; g++) {
        const sums s = {f->t->own + g * number * step + b * f->out, NULL, number, step};
        const terms own = {f->value + g * f->of_local, f->of_local, pitch_of(&f->shifted)};
        combine(&s, &f->pixels, &own, &NOTHING, f->restriction + g * number * f->of_local, &f->next);
    }
}

/* y_g = A_g * x_g + C_g z; without A what y holds, plus C_g z. */
static void write_image(forward *f, int64_t b) {
    const layer *l = f->l;
    float *image = f->t->y + b * l->outputs * f->out, *to = f->planar ? f->planar : image;
    if (f->planar && !f->t->local) planes_of_image(to, image, f->out, l->outputs);
    const int64_t of_coarse = f->t->coarse ? l->representatives : 0;
    for (int64_t h = 0; h < of_coarse; h++) f->value_of_z[h] = f->t->z + (h * l->batch + b) * f->out;
    for (int64_t g = 0; g < l->groups; g++) {
        float *at = to + g * f->outputs * f->out;
        const sums s = {at, f->t->local ? NULL : at, f->outputs, f->out};
        const terms own = {f->value + g * f->of_local, f->of_y - of_coarse, pitch_of(&f->shifted)};
        const terms all = {f->value_of_z, of_coarse, f->pixels.columns};
        combine(&s, &f->pixels, &own, &all, f->weight + g * f->outputs * f->of_y, &f->next);
    }
    if (f->planar) image_of_planes(image, to, f->out, l->outputs);
}

/* `own` from x and the restriction; y from x, A, C and z: from what there is of A and C, without A added to it. */
int twolevel_forward(const layer *l, const tensors *t, int64_t begin, int64_t end) {
    arena a = open_arena();
    forward f;
    const int status = prepare(&f, l, t, &a);
    for (int64_t b = begin; b < end && !status; b++) {
        const float *image = t->x ? t->x + b * l->channels * f.in : NULL;
        const int64_t more = image && b + 1 < end ? l->channels * f.in : 0;
        f.next = look_ahead(image + more, more, l->groups * (t->own != NULL) * steps_of(l->of_group, &f.pixels) +
                                                    l->groups * (t->y != NULL) * steps_of(f.outputs, &f.pixels));
        if (t->own || t->local) read_image(&f, image);
        if (t->own) restrict_image(&f, b);
        if (t->y) write_image(&f, b);
    }
    close_arena(&a);
    return status;
}
