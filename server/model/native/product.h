/* What products of float32 and bfloat16 weights are told, however these lie. */
#ifndef FATHOM_PRODUCT_H
#define FATHOM_PRODUCT_H

#include "blocks.h"

struct product {
    void *y;       /* [num_rows, out_features] */
    const void *x; /* [num_rows, in_features] */
    const void *packed; /* or plain, [out_features, in_features] */
    const float *bias; /* or null */
    int64_t y_stride, x_stride;
    int64_t num_rows, in_features, out_features;
    int64_t dtype;   /* of y and packed */
    int64_t x_dtype;
};

static inline void write_tile(
    const void *product, int64_t block, int64_t first_row, int64_t num_rows, const float *sums)
{
    const struct product *p = product;
    const int64_t column = block * BLOCK;
    const int64_t width = p->out_features - column < BLOCK ? p->out_features - column : BLOCK;
    for (int64_t r = 0; r < num_rows; r++) {
        const int64_t to = (first_row + r) * p->y_stride + column;
        const float *from = sums + r * BLOCK;
        if (p->dtype == FLOAT32 && !p->bias) {
            memcpy((float *)p->y + to, from, (size_t)width * sizeof(float));
            continue;
        }
        int64_t i = 0;
        for (; p->dtype == BFLOAT16 && i + LANES <= width; i += LANES) {
            const floats own = load_floats(from + i);
            store(p->y, to + i, p->bias ? own + load_floats(p->bias + column + i) : own, BFLOAT16);
        }
        for (; i < width; i++)
            store_one(p->y, to + i, p->bias ? from[i] + p->bias[column + i] : from[i], (int)p->dtype);
    }
}

/* A step of such a product, by one of both functions. */
INLINE void multiply_by_dtype(
    const void *call, struct worker *worker, multiply_tile_function *of_floats, multiply_tile_function *of_halves)
{
    struct product p = *(const struct product *)call;
    p.x = as_floats(p.x, &p.x_stride, (int)p.x_dtype, p.num_rows, p.in_features);
    multiply_blocks(
        &p, p.num_rows, p.out_features, p.packed, p.in_features * BLOCK * size_of((int)p.dtype), worker,
        p.dtype == FLOAT32 ? of_floats : of_halves, write_tile);
}

#endif
