/* The two products of which all is made, vectors along the pixels of planes.

   combine    out[o] = sum over terms t of weight[t, o] value[t]     planes from planes
   correlate  sum[r, c] = sum over pixels of row[r] column[c]        numbers from pairs of planes

   Up to 20 sums stay in registers: of a few planes for a few vectors of pixels, or of four rows with four columns. */

#ifndef TWOLEVEL_PRODUCTS_H
#define TWOLEVEL_PRODUCTS_H

#include "layer.h"

enum { TILE = TILE_VECTORS, MOST_TOGETHER = 5 };

/* The pixels of a plane as rows of whole vectors. Where those of the image are not, all but `part` pixels are rows of
   one vector each. */
typedef struct {
    int64_t rows, columns, part;
} grid;

INLINE grid grid_of(int64_t height, int64_t width) {
    if (width % LANES == 0) return (grid){height, width, 0};
    return (grid){height * width / LANES, LANES, height * width % LANES};
}

/* Planes to be added up, whose rows are `pitch` apart. */
typedef struct {
    const float *const *value;
    int64_t number, pitch;
} terms;

/* Planes that lie `step` apart. */
typedef struct {
    float *out;
    const float *start; /* what is added to; NULL for zero */
    int64_t number, step;
} sums;

/* How many planes of `left` are computed together. Their weights lie together, [terms, planes]. */
INLINE int64_t together(int64_t left) { return left % 4 && left % 5 == 0 ? 5 : min64(left, 4); }

INLINE void add_terms(vec sum[MOST_TOGETHER][TILE], const terms *t, const float *weight, int outputs, int vectors,
                      int64_t row, int64_t column, int64_t part) {
    const int64_t first = row * t->pitch + column, pitch = t->pitch;
    for (int64_t i = 0; i < t->number; i++, weight += outputs) {
        const float *from = t->value[i] + first;
        vec x[TILE];
        UNROLL for (int v = 0; v < vectors; v++) x[v] = part ? load_part(from, part) : load_once(from + v * pitch);
        UNROLL for (int o = 0; o < outputs; o++) {
            const vec w = splat(weight[o]);
            UNROLL for (int v = 0; v < vectors; v++) sum[o][v] += w * x[v];
        }
    }
}

/* `outputs` planes from one on, a vector in each of `vectors` rows; or `part` of one vector unless that is 0. */
INLINE void combine_tile(const sums *s, int64_t plane, const grid *g, const terms *one, const terms *other,
                         const float *weight, int outputs, int vectors, int64_t row, int64_t column, int64_t part) {
    const int64_t at = plane * s->step + row * g->columns + column;
    vec sum[MOST_TOGETHER][TILE];
    UNROLL for (int o = 0; o < outputs; o++)
        UNROLL for (int v = 0; v < vectors; v++) {
            const float *start = s->start + at + o * s->step + v * g->columns;
            sum[o][v] = !s->start ? (vec){0} : part ? load_part(start, part) : load(start);
        }
    add_terms(sum, one, weight, outputs, vectors, row, column, part);
    add_terms(sum, other, weight + one->number * outputs, outputs, vectors, row, column, part);
    UNROLL for (int o = 0; o < outputs; o++)
        UNROLL for (int v = 0; v < vectors; v++) {
            float *out = s->out + at + o * s->step + v * g->columns;
            if (part) store_part(out, sum[o][v], part);
            else store(out, sum[o][v]);
        }
}

#define BY_OUTPUTS(number, call) \
    switch (number) { \
    case 1: call(1); break; \
    case 2: call(2); break; \
    case 3: call(3); break; \
    case 4: call(4); break; \
    default: call(5); \
    }

static __attribute__((noinline)) void combine_rows(const sums *s, int64_t plane, int64_t outputs, const grid *g,
                                                   const terms *one, const terms *other, const float *weight,
                                                   int64_t row, int64_t column) {
#define CALL(n) combine_tile(s, plane, g, one, other, weight, n, TILE, row, column, 0)
    BY_OUTPUTS(outputs, CALL)
#undef CALL
}

static __attribute__((noinline)) void combine_row(const sums *s, int64_t plane, int64_t outputs, const grid *g,
                                                  const terms *one, const terms *other, const float *weight,
                                                  int64_t row, int64_t column) {
#define CALL(n) combine_tile(s, plane, g, one, other, weight, n, 1, row, column, 0)
    BY_OUTPUTS(outputs, CALL)
#undef CALL
}

static __attribute__((noinline)) void combine_part(const sums *s, int64_t plane, int64_t outputs, const grid *g,
                                                   const terms *one, const terms *other, const float *weight) {
#define CALL(n) combine_tile(s, plane, g, one, other, weight, n, 1, g->rows, 0, g->part)
    BY_OUTPUTS(outputs, CALL)
#undef CALL
}

/* About how often `combine` of so many planes asks for memory. */
INLINE int64_t steps_of(int64_t planes, const grid *g) {
    return ceil_div(g->rows, TILE) * (g->columns / LANES) * ceil_div(planes, 4);
}

/* All planes of `s` from two lists of terms. The weights are those of blocks of `together` planes, one block after the
   other. */
static inline void combine(const sums *s, const grid *g, const terms *one, const terms *other, const float *weight,
                           ahead *next) {
    const int64_t of_plane = one->number + other->number;
    for (int64_t row = 0; row < g->rows + (g->part > 0);) {
        const int64_t rows = g->rows - row >= TILE ? TILE : 1;
        for (int64_t column = 0; column < g->columns; column += LANES)
            for (int64_t o = 0, n; o < s->number; o += n) {
                const float *own = weight + o * of_plane;
                n = together(s->number - o);
                ask(next);
                if (rows == TILE) combine_rows(s, o, n, g, one, other, own, row, column);
                else if (row < g->rows) combine_row(s, o, n, g, one, other, own, row, column);
                else combine_part(s, o, n, g, one, other, own);
            }
        row += rows;
    }
}

/* ---- Numbers from pairs of planes ---- */

/* What is summed over: the pixels of some images, of which the planes lie some steps apart from one to the next. */
typedef struct {
    grid pixels;
    int64_t images, row_step, column_step;
    int64_t pitch;      /* from row to row of the column planes */
    const float *other; /* a row that lies elsewhere, or NULL */
    int64_t other_step;
    float *of_other;    /* its sums [columns, LANES], still to be added up */
} pairs;

/* Tiles of SUMS numbers: all rows of a tile with all its columns. */
enum { SUMS = 4 * TILE_VECTORS, MOST_SUMS = SUMS + TILE_VECTORS };

INLINE void correlate_step(vec sum[MOST_SUMS], const float *row, int64_t step, const float *other,
                           const float *const *column, int64_t in, int rows, int columns, int with_other) {
    vec y[5];
    UNROLL for (int r = 0; r < rows; r++) y[r] = load_once(row + r * step);
    if (with_other) y[rows] = load_once(other);
    UNROLL for (int c = 0; c < columns; c++) {
        const vec x = load_once(column[c] + in);
        UNROLL for (int r = 0; r < rows + with_other; r++) sum[r * columns + c] += y[r] * x;
    }
}

/* Constants: with_other, the other row too, whose sums begin at of_other; thin, a line is one vector, and no loop. */
INLINE void correlate_tile(const pairs *p, const float *y, int64_t step, const float *const *some, float *to,
                           float *of_other, int rows, int columns, int with_other, int thin) {
    const grid *g = &p->pixels;
    const float *column[SUMS], *other = p->other;
    vec sum[MOST_SUMS];
    int64_t in = 0;
    UNROLL for (int c = 0; c < columns; c++) column[c] = some[c];
    UNROLL for (int i = 0; i < MOST_SUMS; i++) sum[i] = (vec){0};
    for (int64_t image = 0; image < p->images; image++) {
        if (thin)
            for (int64_t line = 0; line < g->rows; line++, y += LANES, other += LANES, in += p->pitch) {
                OPAQUE(in); /* one index, not a pointer for each plane, for which there are no registers */
                correlate_step(sum, y, step, other, column, in, rows, columns, with_other);
            }
        else
            for (int64_t line = 0; line < g->rows; line++, in += p->pitch - g->columns)
                for (const float *const end = y + g->columns; y < end; y += LANES, other += LANES, in += LANES) {
                    OPAQUE(in);
                    correlate_step(sum, y, step, other, column, in, rows, columns, with_other);
                }
        if (g->part)
            UNROLL for (int c = 0; c < columns; c++) {
                const vec x = load_part(column[c] + in, g->part);
                UNROLL for (int r = 0; r < rows; r++) sum[r * columns + c] += load_part(y + r * step, g->part) * x;
                if (with_other) sum[rows * columns + c] += load_part(other, g->part) * x;
            }
        const int64_t done = g->rows * g->columns;
        y += p->row_step - done, other += p->other_step - done, in += p->column_step - g->rows * p->pitch;
    }
    UNROLL for (int c = 0; with_other && c < columns; c++)
        store(of_other + c * LANES, load(of_other + c * LANES) + sum[rows * columns + c]);
    UNROLL for (int i = 0; i < SUMS; i += LANES) {
        transpose_sum(sum + i, LOG_LANES);
        store(to + i, load(to + i) + sum[i]);
    }
}

#define TILE_OF(name, rows, with_other) \
    static __attribute__((noinline)) void name(const pairs *p, const float *row, int64_t step, \
                                               const float *const *column, float *to, float *of_other) { \
        if (p->pixels.columns == LANES) \
            correlate_tile(p, row, step, column, to, of_other, rows, SUMS / rows, with_other, 1); \
        else correlate_tile(p, row, step, column, to, of_other, rows, SUMS / rows, with_other, 0); \
    }
TILE_OF(correlate_four, 4, 0)
TILE_OF(correlate_four_and_other, 4, 1)
TILE_OF(correlate_two, 2, 0)
TILE_OF(correlate_one, 1, 0)
#undef TILE_OF

INLINE int64_t rows_of_tile(int64_t left) { return left >= 4 ? 4 : left >= 2 ? 2 : 1; }

/* Numbers that `correlate` of so many rows and columns adds to. */
static inline int64_t correlated(int64_t rows, int64_t columns) {
    int64_t number = 0;
    for (int64_t r = 0, n; r < rows; r += n) {
        n = rows_of_tile(rows - r);
        number += round_up(columns, SUMS / n) * n;
    }
    return number;
}

/* Some of the columns that there are; what is too many is the last one again. */
INLINE const float *const *some_columns(const float *const *column, int64_t first, int64_t number, int64_t columns,
                                        const float **room) {
    if (first + number <= columns) return column + first;
    for (int64_t i = 0; i < number; i++) room[i] = column[min64(first + i, columns - 1)];
    return room;
}

/* The other row alone. */
static inline void correlate_other(const pairs *p, int64_t columns, const float *const *column) {
    for (int64_t c = 0; c < columns; c += SUMS) {
        const float *room[SUMS];
        float found[SUMS] = {0};
        pairs alone = *p;
        alone.row_step = p->other_step;
        correlate_one(&alone, p->other, 0, some_columns(column, c, SUMS, columns, room), found, NULL);
        for (int64_t i = 0; i < min64(SUMS, columns - c); i++) p->of_other[(c + i) * LANES] += found[i];
    }
}

/* Add the products of rows, planes `step` apart from the first, and columns to `to`, tile by tile; and those of the
   other row, which may be the only one. Some columns stay in the nearest cache for all rows. */
static inline void correlate(const pairs *p, int64_t rows, const float *first, int64_t step, int64_t columns,
                             const float *const *column, float *to, ahead *next) {
    if (p->other && rows < 4) correlate_other(p, columns, column);
    for (int64_t near = 0; near < columns && rows; near += SUMS) {
        float *of_rows = to;
        for (int64_t r = 0, n; r < rows; r += n) {
            n = rows_of_tile(rows - r);
            const int64_t wide = SUMS / n;
            for (int64_t c = near; c < min64(near + SUMS, columns); c += wide) {
                const float *room[SUMS];
                const float *const *some = some_columns(column, c, wide, columns, room);
                ask(next);
                if (n == 4 && p->other && !r)
                    correlate_four_and_other(p, first, step, some, of_rows + c * n, p->of_other + c * LANES);
                else if (n == 4) correlate_four(p, first + r * step, step, some, of_rows + c * n, NULL);
                else if (n == 2) correlate_two(p, first + r * step, step, some, of_rows + c * n, NULL);
                else correlate_one(p, first + r * step, step, some, of_rows + c * n, NULL);
            }
            of_rows += round_up(columns, wide) * n;
        }
    }
}

/* Sums of `correlate` by row and column: `to` [rows, columns]. */
static inline void untile(int64_t rows, int64_t columns, const float *from, float *to) {
    for (int64_t r = 0, n; r < rows; r += n) {
        n = rows_of_tile(rows - r);
        for (int64_t c = 0; c < columns; c += SUMS / n, from += SUMS)
            for (int64_t i = 0; i < n; i++)
                for (int64_t k = 0; k < min64(SUMS / n, columns - c); k++)
                    to[(r + i) * columns + c + k] = from[i * (SUMS / n) + k];
    }
}

/* Those of its other row [columns]. */
static inline void add_up(int64_t columns, const float *from, float *to) {
    for (int64_t c = 0; c < columns; c++) {
        to[c] = 0;
        for (int64_t lane = 0; lane < LANES; lane++) to[c] += from[c * LANES + lane];
    }
}

#endif
