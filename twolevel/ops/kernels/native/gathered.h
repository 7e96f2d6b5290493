/* Convolution of chosen channels: of every group its own list, which may have any length and order. */

#ifndef TWOLEVEL_GATHERED_H
#define TWOLEVEL_GATHERED_H

#include "memory.h"
#include "pixels.h"

/* One group: its outputs are rows first .. first + outputs of the result before `order` is applied. */
typedef struct {
    int64_t first, outputs, inputs;
    const int64_t *channels;    /* [inputs] of the image; NULL for those from first_channel on */
    int64_t first_channel;
    const float **weight;       /* [inputs] where the weights of each input begin */
    int64_t by_output;          /* between the weights of neighbouring outputs */
    const float *factor;        /* [inputs] that the input is multiplied with; NULL for 1 */
} group;

/* max(0, sign x + shift) in place of x, by channel; NULL for x itself. */
typedef struct {
    const float *sign, *shift;
} activation;

/* Images, and how the result is ordered: its channel c is row order[c], or row c without an order. */
typedef struct {
    const layer *shape;
    const int64_t *order;
    int64_t first_tap, by_tap; /* weights of the taps: the first, and from one to the next */
    int64_t by_output;         /* between those of neighbouring outputs, where inputs' weights lie far apart; else 0 */
    activation before;
    const float *bias;         /* of the rows, or NULL */
    int64_t relu;              /* whether the result is max(0, .) of it */
} convolution;

/* Rows begin to end of the result of one image; -1 without memory. */
int gathered_rows(const convolution *c, const group *groups, int64_t number, const float *x, float *y, int64_t begin,
                  int64_t end);

#endif
