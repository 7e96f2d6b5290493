/* Means and spreads of sets of numbers, joined as by Chan, Golub and LeVeque (1979).

   Of a block of numbers it takes one pass: sums are of differences from the mean of all numbers before it. Where that is
   far from the block's own mean, digits are lost; but then the distance of the two adds as much to the spread, as no
   block is longer than all before it (the first: than a few vectors). */

#ifndef TWOLEVEL_MOMENTS_H
#define TWOLEVEL_MOMENTS_H

#include "maps.h"

enum { SUMS = 4 }; /* that do not wait for each other */

typedef struct {
    double number, mean, spread; /* spread: the sum of (x - mean)^2 */
} moments;

INLINE moments joined(moments a, moments b) {
    if (!b.number) return a;
    const double number = a.number + b.number, off = b.mean - a.mean, part = b.number / number;
    return (moments){number, a.mean + off * part, a.spread + b.spread + off * off * a.number * part};
}

/* Those of `number` numbers, from sums of their differences from `shift` and of the squares of these. */
INLINE moments moments_of_sums(double number, double shift, double sum, double square) {
    return (moments){number, shift + sum / number, square - sum * (sum / number)};
}

/* Numbers of the next block. */
INLINE int64_t block_of(moments m) { return max64(SUMS * LANES, min64(m.number, BLOCK)); }

/* ---- Planes ---- */

INLINE double sum_of_all(const vec sum[SUMS]) { return sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])); }

/* Add the differences of a strip from `shift`, and their squares. */
INLINE void sum_strip(const float *x, int64_t size, vec shift, int64_t ahead, vec sum[SUMS], vec square[SUMS]) {
    int64_t p = 0;
    for (; p + SUMS * LANES <= size; p += SUMS * LANES)
        UNROLL for (int i = 0; i < SUMS; i++) {
            ask_for(x + p + i * LANES + ahead);
            const vec off = load(x + p + i * LANES) - shift;
            sum[i] += off, square[i] += off * off;
        }
    for (; p < size; p += LANES) {
        ask_for(x + p + ahead);
        const vec off = load_upto(x + p, size - p, shift) - shift;
        sum[0] += off, square[0] += off * off;
    }
}

static moments moments_of_channel(const maps *m, const float *x, int64_t channel) {
    moments found = {0, x[plane(m, 0, channel)], 0};
    for (block k = first_block(m, SUMS * LANES); k.size; k = next_block(m, k, block_of(found))) {
        const vec shift = splat((float)found.mean);
        vec sum[SUMS] = {0}, square[SUMS] = {0};
        for (int64_t b = k.image; b < k.image + k.images; b++)
            sum_strip(x + plane(m, b, channel) + k.pixel, k.size, shift, ahead_of(m), sum, square);
        found = joined(found, moments_of_sums(k.images * k.size, shift[0], sum_of_all(sum), sum_of_all(square)));
    }
    return found;
}

/* ---- Rows ---- */

/* At each place of a line of `wide` numbers, of `lines` lines; and the sums of a block of them. */
typedef struct {
    int64_t wide, lines;
    double *mean, *spread;
    float *shift, *sum, *square;
} line_moments;

/* Sums of `lines` lines, of which only one may be shorter than `wide`. */
INLINE void sum_lines(line_moments *m, const float *x, int64_t lines, int64_t width) {
    const int64_t wide = m->wide;
    for (int64_t j = 0; j < wide; j++) m->shift[j] = (float)m->mean[j], m->sum[j] = m->square[j] = 0;
    int64_t i = 0;
    for (; i + 2 <= lines; i += 2, x += 2 * wide)
        for (int64_t j = 0; j < wide; j += LANES) {
            ask_for(x + j + AHEAD), ask_for(x + wide + j + AHEAD);
            const vec shift = load(m->shift + j), a = load(x + j) - shift, b = load(x + wide + j) - shift;
            store(m->sum + j, load(m->sum + j) + (a + b));
            store(m->square + j, load(m->square + j) + (a * a + b * b));
        }
    for (int64_t j = 0; i < lines && j < width; j += LANES) {
        const vec shift = load(m->shift + j), off = load_upto(x + j, width - j, shift) - shift;
        store(m->sum + j, load(m->sum + j) + off);
        store(m->square + j, load(m->square + j) + off * off);
    }
}

static void add_lines(line_moments *m, const float *x, int64_t lines, int64_t width) {
    sum_lines(m, x, lines, width);
    /* `joined` at each place, its divisions taken out of the loop. */
    const double each = 1. / lines, part = lines / (double)(m->lines + lines), both = m->lines * part;
    for (int64_t j = 0; j < width; j++) {
        const double sum = m->sum[j], own = sum * each, off = m->shift[j] - m->mean[j] + own;
        m->spread[j] += m->square[j] - sum * own + off * off * both;
        m->mean[j] += off * part;
    }
    m->lines += lines;
}

/* Of each channel, to mean and spread [C], from pixels `begin` to `end` of all images. -1 without memory. */
static int moments_of_rows(const maps *m, const float *x, double *mean, double *spread, int64_t begin, int64_t end) {
    const int64_t channels = m->channels, wide = line_of(channels), numbers = (end - begin) * channels;
    const int64_t lines = numbers / wide, rest = numbers % wide;
    float *room = zeros(7 * wide); /* doubles first, so that they are aligned */
    if (!room) return -1;
    line_moments l = {.wide = wide, .mean = (double *)room, .spread = (double *)(room + 2 * wide)};
    l.shift = room + 4 * wide, l.sum = l.shift + wide, l.square = l.sum + wide;
    x += begin * channels;
    for (int64_t j = 0; j < min64(wide, numbers); j++) l.mean[j] = x[j];
    while (l.lines < lines) {
        const int64_t next = max64(1, min64(l.lines, BLOCK / wide));
        add_lines(&l, x + l.lines * wide, min64(next, lines - l.lines), wide);
    }
    const double whole = lines;
    if (rest) add_lines(&l, x + lines * wide, 1, rest);
    for (int64_t c = 0; c < channels; c++) {
        moments found = {0};
        for (int64_t j = c; j < wide; j += channels)
            found = joined(found, (moments){whole + (j < rest), l.mean[j], l.spread[j]});
        mean[c] = found.mean, spread[c] = found.spread;
    }
    free(room);
    return 0;
}

#endif
