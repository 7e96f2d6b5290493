/* Planes of a source, laid out so that every tap of a kernel reads a target's pixels in their own order.

   A target pixel (r, c) reads the source at (r sh + dr, c sw + dc) by the tap with shift (dr, dc), zero outside it.
   For a channel there are copies of its plane, one for each class of columns (dc modulo sw), in which rows stand by
   classes (dr modulo sh): there a tap is no more than an offset, and the padding is there as zeros.

   Where a row of the target is whole vectors, a copy has margins left and right, and a tap reads rows of it. Else
   every different dc has a copy of its own, without margins: a vector then goes on over the end of a row. */

#ifndef TWOLEVEL_PLANES_H
#define TWOLEVEL_PLANES_H

#include "memory.h"

#if defined(__AVX512F__)
#define COPIES_FLAT 1
#else
#define COPIES_FLAT 0
#endif

typedef struct {
    int64_t row, column; /* shift */
    int64_t at;          /* where its first value is in the copies of a channel */
} tap;

typedef struct {
    int64_t source[2], target[2], stride[2];
    int64_t number;  /* of taps */
    tap *taps;
    int64_t copies;
    int64_t *column; /* [copies]: the source column of their first value */
    int64_t rows;    /* of one copy */
    int64_t *row;    /* [rows]: the source row of each; it may be outside */
    int64_t lead;    /* before the first row */
    int64_t used;    /* of a row, by all taps */
    int64_t pitch;   /* from one row of a copy to the next */
    int64_t size;    /* of all copies of a channel */
    int64_t whole;   /* rows of the target are whole vectors */
    int64_t left, wide; /* margin and pitch of `plane` */
    float *plane;    /* the source with margins, where copies have none */
    int64_t flat;    /* no rows of the copies but those of the source, as wide */
    int64_t period;  /* vectors of a plane after which columns are the same again */
    uint16_t *inside; /* [copies, period]: which lanes of a copy are inside the source */
} planes;

/* Which copy a tap reads is decided by this. */
INLINE int64_t class_of(const planes *p, int64_t shift) {
    return p->whole ? shift - floor_div(shift, p->stride[1]) * p->stride[1] : shift;
}

/* Rows of a copy, if no two taps share any but their class. */
INLINE int64_t most_rows(const planes *p) {
    int64_t least = 0, most = 0;
    for (int64_t t = 0; t < p->number; t++)
        least = min64(least, p->taps[t].row), most = max64(most, p->taps[t].row);
    return most - least + p->stride[0] * (p->target[0] + 1);
}

/* Lay out the copies for taps whose shifts are set. */
static void lay_out(planes *p, arena *a) {
    int64_t least = INT64_MAX, most = INT64_MIN, low = 0, high = 0, total = 0, class[p->number + 1];
    p->whole = p->target[1] % LANES == 0;
    p->copies = 0;
    for (int64_t t = 0; t < p->number; t++) {
        const int64_t shift = p->taps[t].column, own = class_of(p, shift);
        int64_t k = 0;
        while (k < p->copies && class[k] != own) k++;
        if (k == p->copies) class[p->copies++] = own;
        least = min64(least, floor_div(shift, p->stride[1])), most = max64(most, floor_div(shift, p->stride[1]));
    }
    if (!p->number) least = most = 0;
    p->used = p->target[1] + (p->whole ? most - least : 0);
    /* What a tap without shift reads is as aligned as the target. */
    p->pitch = p->target[1] + round_up(p->used - p->target[1], LANES);
    p->lead = p->whole ? round_up(max64(-least, 0), LANES) - max64(-least, 0) : 0;
    p->column = take(a, 8 * p->copies);
    p->row = take(a, 8 * most_rows(p));
    if (a->failed) return;
    for (int64_t k = 0; k < p->copies; k++) {
        p->column[k] = p->whole ? class[k] + least * p->stride[1] : class[k];
        low = min64(low, p->column[k]), high = max64(high, p->column[k] + p->used * p->stride[1]);
    }
    for (int64_t own = 0; own < p->stride[0]; own++) {
        int64_t first = INT64_MAX, last = INT64_MIN;
        for (int64_t t = 0; t < p->number; t++) {
            const int64_t q = floor_div(p->taps[t].row, p->stride[0]);
            if (p->taps[t].row - q * p->stride[0] == own) first = min64(first, q), last = max64(last, q);
        }
        if (first > last) continue;
        for (int64_t t = 0; t < p->number; t++) {
            const int64_t q = floor_div(p->taps[t].row, p->stride[0]);
            if (p->taps[t].row - q * p->stride[0] == own) p->taps[t].at = total + q - first;
        }
        for (int64_t q = first; q < last + p->target[0]; q++) p->row[total++] = own + q * p->stride[0];
    }
    p->rows = total;
    for (int64_t t = 0; t < p->number; t++) {
        const int64_t shift = p->taps[t].column;
        int64_t k = 0;
        while (class[k] != class_of(p, shift)) k++;
        p->taps[t].at = p->lead + (k * total + p->taps[t].at) * p->pitch;
        if (p->whole) p->taps[t].at += floor_div(shift, p->stride[1]) - least;
    }
    p->size = round_up(p->lead + p->copies * total * p->pitch, LANES);
    p->flat = !p->whole && p->stride[0] == 1 && p->stride[1] == 1 && p->source[1] == p->target[1];
    p->period = 1;
    while (p->period * LANES % p->target[1]) p->period++;
    p->inside = take(a, p->copies * p->period * sizeof *p->inside);
    for (int64_t k = 0; p->inside && p->flat && k < p->copies; k++)
        for (int64_t v = 0; v < p->period; v++) {
            uint16_t mask = 0;
            for (int64_t lane = 0; lane < LANES; lane++) {
                const int64_t column = (v * LANES + lane) % p->target[1] + p->column[k];
                mask |= (uint16_t)((column >= 0 && column < p->source[1]) << lane);
            }
            p->inside[k * p->period + v] = mask;
        }
    p->left = -low, p->wide = p->left + max64(p->source[1], high);
    p->plane = take_zeros(a, p->source[0] * p->wide + LANES);
}

INLINE int is_inside(const planes *p, int64_t row) { return p->row[row] >= 0 && p->row[row] < p->source[0]; }

/* A row of numbers to another. Nothing beyond it is touched. */
INLINE void copy_row(float *to, const float *from, int64_t number) {
    int64_t c = 0;
    for (; c + LANES <= number; c += LANES) store(to + c, load(from + c));
    if (c < number) store_part(to + c, load_part(from + c, number - c), number - c);
}

/* Every `stride`-th number. */
INLINE void gather_row(float *to, const float *from, int64_t number, int64_t stride) {
    int64_t c = 0;
    if (stride == 1) {
        copy_row(to, from, number);
        return;
    }
    if (stride == 2) {
        for (; c + LANES <= number; c += LANES)
            store(to + c, EVERY_OTHER(load(from + 2 * c), load(from + 2 * c + LANES)));
        const int64_t left = number - c, read = 2 * left - 1;
        if (left > 0) {
            const vec a = load_part(from + 2 * c, min64(read, LANES));
            const vec b = read > LANES ? load_part(from + 2 * c + LANES, read - LANES) : (vec){0};
            store_part(to + c, EVERY_OTHER(a, b), left);
        }
        return;
    }
    for (; c < number; c++) to[c] = from[c * stride];
}

#if defined(__AVX512F__)
/* All copies of a plane whose rows are as wide as theirs: the plane itself, shifted, without what a shift brings from
   the row before or after. Memory of lanes that are off is not touched. */
INLINE void copy_flat(const planes *p, float *to, const float *source) {
    const int64_t width = p->target[1], first = max64(0, -p->row[0]), last = min64(p->rows, p->source[0] - p->row[0]);
    const int64_t number = (last - first) * width;
    source += (p->row[0] + first) * width;
    to += first * width;
    for (int64_t k = 0; k < p->copies; k++, to += p->rows * width) {
        const uint16_t *inside = p->inside + k * p->period;
        for (int64_t j = 0, v = 0; j < number; j += LANES) {
            const int64_t left = number - j;
            const __mmask16 there = left < LANES ? (__mmask16)(0xffff >> (LANES - left)) : (__mmask16)0xffff;
            const __mmask16 mask = (__mmask16)(there & inside[v]);
            _mm512_mask_storeu_ps(to + j, there, _mm512_maskz_loadu_ps(mask, source + j + p->column[k]));
            if (++v == p->period) v = 0;
        }
    }
}
#else
INLINE void copy_flat(const planes *p, float *to, const float *source) {
    (void)p, (void)to, (void)source;
}
#endif

/* A copy is the source with margins. */
INLINE void copy_whole(const planes *p, float *to, const float *source) {
    const int64_t first = max64(0, p->column[0]), last = min64(p->source[1], p->column[0] + p->used);
    for (int64_t r = 0; r < p->rows && first < last; r++)
        if (is_inside(p, r))
            copy_row(to + r * p->pitch + first - p->column[0], source + p->row[r] * p->source[1] + first, last - first);
}

/* Of stride 2, a row of whole vectors is dealt out to two copies, or half of it to one. */
INLINE void copy_halves(const planes *p, float *to, const float *source) {
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t c = 0; c < p->source[1] && is_inside(p, r); c += 2 * LANES) {
            const float *from = source + p->row[r] * p->source[1] + c;
            const vec a = load(from), b = load(from + LANES);
            for (int64_t k = 0; k < p->copies; k++) {
                const int64_t odd = p->column[k] & 1;
                float *at = to + (k * p->rows + r) * p->pitch + (c + odd - p->column[k]) / 2;
                store(at, odd ? THE_OTHERS(a, b) : EVERY_OTHER(a, b));
            }
        }
}

/* Of any stride and width, by way of the source with margins. */
INLINE void copy_strided(const planes *p, float *to, const float *source) {
    for (int64_t r = 0; r < p->source[0]; r++)
        copy_row(p->plane + r * p->wide + p->left, source + r * p->source[1], p->source[1]);
    for (int64_t k = 0; k < p->copies; k++)
        for (int64_t r = 0; r < p->rows; r++, to += p->pitch)
            if (is_inside(p, r))
                gather_row(to, p->plane + p->row[r] * p->wide + p->left + p->column[k], p->used, p->stride[1]);
}

/* A plane to its copies, in memory of their own: what is outside the source stays the zero that it was. */
INLINE void copy_plane(const planes *p, float *to, const float *source) {
    to += p->lead;
    if (COPIES_FLAT && p->flat) copy_flat(p, to, source);
    else if (p->whole && p->stride[1] == 1) copy_whole(p, to, source);
    else if (p->whole && p->stride[1] == 2 && p->source[1] == 2 * p->target[1]) copy_halves(p, to, source);
    else copy_strided(p, to, source);
}

/* Some planes, one after the other, to their copies. */
static inline void copy_planes(const planes *p, float *to, const float *source, int64_t number) {
    for (int64_t c = 0; c < number; c++) copy_plane(p, to + c * p->size, source + c * p->source[0] * p->source[1]);
}

/* ---- Back from the phases of a stride ---- */

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

#endif
