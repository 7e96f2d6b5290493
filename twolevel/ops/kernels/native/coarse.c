/* The coarse term of the two-level convolution: products with few rows, one pass over y.

       y [P, m] += z^T [P, R] C^T [R, m]      add
       gz [R, P] = C^T [R, m] gy^T [m, P]     project
       gC^T [R, m] = z [R, P] gy [P, m]       sum

   for P pixels of m channels and R representatives. Pixels go by blocks of LANES, of which a few make a span: z is
   read and gz written by spans, because their rows are far apart, and often in the same set of the cache. A block
   that is not whole, or not of whole vectors of channels, is first copied to one that is, padded by zeros. */

#include "vectors.h"

enum {
    TILE_PIXELS = 4,
    TILE_ROWS = 4,
    PROJECTED_ROWS = LANES / TILE_PIXELS,
    SPAN = 4 * LANES, /* pixels */
    AHEAD = 2, FLUSH = 16,       /* spans */
};

typedef struct {
    int64_t channels, rows, pixels; /* m, R, P */
    int64_t wide;                   /* m as whole vectors */
    int64_t tall;                   /* R as whole tiles */
    int64_t full;                   /* the rows that fill vectors */
    float *weight;                  /* C^T [tall, wide] */
    float *by_channel;              /* C [m, full] */
    float *z, *gz;                  /* [tall, SPAN] */
    float *y;                       /* [LANES, wide] */
    float *sums, *flushed;          /* gC^T [tall, wide]: of the last FLUSH spans, and of those before */
} scratch;

static int prepare(scratch *s, const float *coarse) {
    s->wide = round_up(s->channels, LANES);
    s->tall = round_up(s->rows, TILE_ROWS);
    s->full = s->rows / LANES * LANES;
    const int64_t matrix = s->tall * s->wide;
    s->weight = zeros(3 * matrix + 2 * s->tall * SPAN + LANES * s->wide + s->channels * s->full);
    if (!s->weight) return -1;
    s->sums = s->weight + matrix;
    s->flushed = s->sums + matrix;
    s->z = s->flushed + matrix;
    s->gz = s->z + s->tall * SPAN;
    s->y = s->gz + s->tall * SPAN;
    s->by_channel = s->y + LANES * s->wide;
    if (!coarse) return 0;
    for (int64_t c = 0; c < s->channels; c++) {
        memcpy(s->by_channel + c * s->full, coarse + c * s->rows, 4 * s->full);
        for (int64_t r = 0; r < s->rows; r++) s->weight[r * s->wide + c] = coarse[c * s->rows + r];
    }
    return 0;
}

/* `size` <= LANES pixels of y as [LANES, wide]; in place where they are that already. */
INLINE const float *whole_block(const scratch *s, const float *y, int64_t size) {
    if (size == LANES && s->wide == s->channels) return y;
    memset(s->y, 0, 4 * LANES * s->wide);
    for (int64_t p = 0; p < size; p++) memcpy(s->y + p * s->wide, y + p * s->channels, 4 * s->channels);
    return s->y;
}

/* Have the block that comes `AHEAD` blocks after this one brought near. */
INLINE void prefetch_block(const scratch *s, const float *y) {
    for (int64_t i = 0; i < LANES * s->channels; i += 16) __builtin_prefetch(y + AHEAD * LANES * s->channels + i);
}

/* `size` <= SPAN values of each row, between rows `from` and `to` apart. */
INLINE void copy_rows(int64_t rows, float *target, int64_t to, const float *source, int64_t from, int64_t size) {
    if (size == SPAN) /* of a size known to the compiler */
        for (int64_t r = 0; r < rows; r++) memcpy(target + r * to, source + r * from, 4 * SPAN);
    else
        for (int64_t r = 0; r < rows; r++) memcpy(target + r * to, source + r * from, 4 * size);
}

/* ---- y += C z ---- */

INLINE void add_tile(const scratch *s, float *y, const float *z, int64_t j, int vectors) {
    vec sum[TILE_PIXELS][TILE_VECTORS];
    float *at = y + j;
    UNROLL for (int a = 0; a < TILE_PIXELS; a++)
        UNROLL for (int b = 0; b < vectors; b++) sum[a][b] = load(at + a * s->wide + b * LANES);
    for (int64_t r = 0; r < s->rows; r++) {
        vec weight[TILE_VECTORS];
        UNROLL for (int b = 0; b < vectors; b++) weight[b] = load_once(s->weight + r * s->wide + j + b * LANES);
        UNROLL for (int a = 0; a < TILE_PIXELS; a++) {
            const vec value = splat(z[r * SPAN + a]);
            UNROLL for (int b = 0; b < vectors; b++) sum[a][b] += value * weight[b];
        }
    }
    UNROLL for (int a = 0; a < TILE_PIXELS; a++)
        UNROLL for (int b = 0; b < vectors; b++) store(at + a * s->wide + b * LANES, sum[a][b]);
}

INLINE void add_block(const scratch *s, float *y, const float *z) {
    for (int64_t p = 0; p < LANES; p += TILE_PIXELS) {
        int64_t j = 0;
        for (; j + TILE_VECTORS * LANES <= s->wide; j += TILE_VECTORS * LANES)
            add_tile(s, y + p * s->wide, z + p, j, TILE_VECTORS);
        for (; j < s->wide; j += LANES) add_tile(s, y + p * s->wide, z + p, j, 1);
    }
}

/* y [P, m] += z [R, P] and C [m, R], at pixels begin to end. -1 without memory. */
int twolevel_add_coarse(float *y, const float *z, const float *coarse, int64_t channels, int64_t rows, int64_t pixels,
                        int64_t begin, int64_t end) {
    scratch s = {.channels = channels, .rows = rows, .pixels = pixels};
    if (prepare(&s, coarse)) return -1;
    for (int64_t span = begin; span < end; span += SPAN) {
        const int64_t stop = min64(span + SPAN, end);
        copy_rows(rows, s.z, SPAN, z + span, pixels, stop - span);
        for (int64_t first = span; first < stop; first += LANES) {
            const int64_t size = min64(LANES, stop - first);
            float *own = y + first * channels;
            prefetch_block(&s, own);
            float *block = (float *)whole_block(&s, own, size);
            add_block(&s, block, s.z + first - span);
            if (block != own) copy_rows(size, own, channels, block, s.wide, channels);
        }
    }
    free(s.weight);
    return 0;
}

/* ---- gz = C^T gy ---- */

/* LANES rows, which are the lanes. */
INLINE void project_rows(const scratch *s, const float *gy, float *gz, int64_t r) {
    vec sum[LANES];
    UNROLL for (int p = 0; p < LANES; p++) sum[p] = (vec){0};
    for (int64_t c = 0; c < s->channels; c++) {
        const vec weight = load_once(s->by_channel + c * s->full + r);
        UNROLL for (int p = 0; p < LANES; p++) sum[p] += weight * splat(gy[p * s->wide + c]);
    }
    transpose_sum(sum, 0);
    UNROLL for (int i = 0; i < LANES; i++) store(gz + (r + i) * SPAN, sum[i]);
}

/* Fewer rows: channels are the lanes, over which the sums are summed in the end. */
INLINE void project_tile(const scratch *s, const float *gy, float *gz, int64_t r) {
    vec sum[LANES];
    float found[LANES];
    UNROLL for (int i = 0; i < LANES; i++) sum[i] = (vec){0};
    for (int64_t j = 0; j < s->wide; j += LANES) {
        vec y[TILE_PIXELS];
        UNROLL for (int a = 0; a < TILE_PIXELS; a++) y[a] = load_once(gy + a * s->wide + j);
        UNROLL for (int b = 0; b < PROJECTED_ROWS; b++) {
            const vec weight = load_once(s->weight + (r + b) * s->wide + j);
            UNROLL for (int a = 0; a < TILE_PIXELS; a++) sum[a + b * TILE_PIXELS] += weight * y[a];
        }
    }
    transpose_sum(sum, LOG_LANES);
    store(found, sum[0]);
    UNROLL for (int b = 0; b < PROJECTED_ROWS; b++)
        memcpy(gz + (r + b) * SPAN, found + b * TILE_PIXELS, 4 * TILE_PIXELS);
}

INLINE void project_block(const scratch *s, const float *gy, float *gz) {
    int64_t r = 0;
    for (; r < s->full; r += LANES) project_rows(s, gy, gz, r);
    for (; r < s->rows; r += PROJECTED_ROWS)
        for (int64_t p = 0; p < LANES; p += TILE_PIXELS) project_tile(s, gy + p * s->wide, gz + p, r);
}

/* ---- gC^T = z gy ---- */

INLINE void sum_tile(const scratch *s, const float *gy, const float *z, int64_t r, int64_t j, int vectors) {
    vec sum[TILE_ROWS][TILE_VECTORS];
    float *at = s->sums + r * s->wide + j;
    UNROLL for (int a = 0; a < TILE_ROWS; a++)
        UNROLL for (int b = 0; b < vectors; b++) sum[a][b] = load(at + a * s->wide + b * LANES);
    for (int64_t p = 0; p < LANES; p++) {
        vec y[TILE_VECTORS];
        UNROLL for (int b = 0; b < vectors; b++) y[b] = load_once(gy + p * s->wide + j + b * LANES);
        UNROLL for (int a = 0; a < TILE_ROWS; a++) {
            const vec value = splat(z[(r + a) * SPAN + p]);
            UNROLL for (int b = 0; b < vectors; b++) sum[a][b] += value * y[b];
        }
    }
    UNROLL for (int a = 0; a < TILE_ROWS; a++)
        UNROLL for (int b = 0; b < vectors; b++) store(at + a * s->wide + b * LANES, sum[a][b]);
}

INLINE void sum_block(const scratch *s, const float *gy, const float *z) {
    for (int64_t r = 0; r < s->rows; r += TILE_ROWS) {
        int64_t j = 0;
        for (; j + TILE_VECTORS * LANES <= s->wide; j += TILE_VECTORS * LANES) sum_tile(s, gy, z, r, j, TILE_VECTORS);
        for (; j < s->wide; j += LANES) sum_tile(s, gy, z, r, j, 1);
    }
}

/* Long sums in parts: a rounding error grows with the number of terms. */
static void flush(const scratch *s) {
    for (int64_t i = 0; i < s->tall * s->wide; i++) s->flushed[i] += s->sums[i], s->sums[i] = 0;
}

/* From gy [P, m] at pixels begin to end: gz [R, P] there unless C is NULL, and their part of gC [m, R] unless z is
   NULL. -1 without memory. */
int twolevel_coarse_grads(const float *gy, const float *z, const float *coarse, float *gz, float *g_coarse,
                          int64_t channels, int64_t rows, int64_t pixels, int64_t begin, int64_t end) {
    scratch s = {.channels = channels, .rows = rows, .pixels = pixels};
    if (prepare(&s, coarse)) return -1;
    int64_t held = 0;
    for (int64_t span = begin; span < end; span += SPAN) {
        const int64_t stop = min64(span + SPAN, end);
        if (z) {
            /* What is left of the span before must not reach the sums: 0 times it may not be 0. */
            if (stop - span < SPAN) memset(s.z, 0, 4 * s.tall * SPAN);
            copy_rows(rows, s.z, SPAN, z + span, pixels, stop - span);
        }
        for (int64_t first = span; first < stop; first += LANES) {
            prefetch_block(&s, gy + first * channels);
            const float *block = whole_block(&s, gy + first * channels, min64(LANES, stop - first));
            if (coarse) project_block(&s, block, s.gz + first - span);
            if (z) sum_block(&s, block, s.z + first - span);
        }
        if (coarse) copy_rows(rows, gz + span, pixels, s.gz, SPAN, stop - span);
        if (++held == FLUSH) flush(&s), held = 0;
    }
    flush(&s);
    if (z)
        for (int64_t c = 0; c < channels; c++)
            for (int64_t r = 0; r < rows; r++) g_coarse[c * rows + r] = s.flushed[r * s.wide + c];
    free(s.weight);
    return 0;
}
