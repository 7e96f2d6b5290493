/* Working memory of a call. A thread keeps what its last calls took, as new pages cost as much as their use. */

#ifndef TWOLEVEL_MEMORY_H
#define TWOLEVEL_MEMORY_H

#include "layer.h"

enum { LINE = 64, MOST_KEPT = 1 << 26 /* bytes */ };

typedef union more {
    union more *next;
    char line[LINE];
} more; /* before memory that there was no room for */

typedef struct {
    char *at;
    int64_t left;  /* bytes there */
    int64_t taken; /* bytes in all */
    more *extra;
    int failed;
} arena;

static _Thread_local struct {
    char *at;
    int64_t bytes;
} kept;

static inline arena open_arena(void) { return (arena){.at = kept.at, .left = kept.bytes}; }

/* Whole cache lines; NULL where there is no memory. */
static void *take(arena *a, int64_t bytes) {
    const int64_t size = round_up(max64(bytes, 1), LINE);
    a->taken += size;
    if (size <= a->left) {
        a->at += size, a->left -= size;
        return a->at - size;
    }
    more *extra = aligned_alloc(LINE, (size_t)(size + LINE));
    if (!extra) return a->failed = 1, NULL;
    extra->next = a->extra, a->extra = extra;
    return extra + 1;
}

static inline float *take_floats(arena *a, int64_t number) { return take(a, 4 * number); }

static inline float *take_zeros(arena *a, int64_t number) {
    float *p = take_floats(a, number);
    return p ? memset(p, 0, (size_t)(4 * number)) : NULL;
}

static inline void close_arena(arena *a) {
    while (a->extra) {
        more *next = a->extra->next;
        free(a->extra), a->extra = next;
    }
    if (a->taken <= kept.bytes || a->taken > MOST_KEPT) return;
    free(kept.at);
    kept.at = aligned_alloc(LINE, (size_t)a->taken);
    kept.bytes = kept.at ? a->taken : 0;
}

#endif
