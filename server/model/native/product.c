/* y = x W^T + bias, over weights as oneDNN packs them for AVX-512:
 *
 *     W [out_features, in_features]  ->  packed [out_features / 64, in_features, 64]
 *
 * both padded with zeros. With few rows the time is what reading W takes, so it is read once, in order, by
 * whichever thread is free, and what comes next is asked for while this is multiplied. Each output is one sum
 * over in_features in one fixed order, whatever the number of rows. */
#include "blocks.h"

enum {
    VECTORS = BLOCK / LANES,
    ROWS = LANES == 16 ? 6 : 2, /* at once: as many sums as there are registers for, less what they are made of */
    PANEL = 1024,          /* inputs at once, so that a block's share of W stays in the second cache */
    /* The same for a few groups of rows: in the first cache. Those after the first group would else wait for the
     * second one behind what is asked of memory meanwhile, and that is where the time goes with few rows. */
    NEAR_PANEL = 32,
    MAX_NEAR_ROWS = 3 * ROWS,
    LINE = 16 /* floats */
};

struct product {
    float *y;       /* [num_rows, out_features] */
    const float *x; /* [num_rows, in_features] */
    const float *packed;
    const float *bias; /* or null */
    int64_t y_stride, x_stride;
    int64_t num_rows, in_features, out_features;
    int64_t block_stride; /* floats of a block of `packed` */
};

const int64_t fathom_sizeof_product = sizeof(struct product);

/* Adds the products of inputs [0, num) to the sums [num_rows, BLOCK], `num_rows` a constant where it is called.
 * Asks for `lines` from `wanted` meanwhile, in step. */
INLINE void multiply(
    const struct product *p, const float *x, const float *w, int64_t num, float *sums, const int num_rows,
    const float *wanted, int64_t lines)
{
    floats sum[ROWS][VECTORS];
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < VECTORS; v++)
            sum[r][v] = load_floats(sums + r * BLOCK + v * LANES);
    const int64_t per_step = num ? (lines + num - 1) / num : 0;
    for (int64_t k = 0; k < num; k++) {
        for (int64_t l = 0; l < per_step; l++)
            __builtin_prefetch(wanted + (k * per_step + l) * LINE, 0, 2);
        floats own[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            own[v] = load_floats(w + k * BLOCK + v * LANES);
        for (int r = 0; r < num_rows; r++) {
            const float factor = x[r * p->x_stride + k];
            for (int v = 0; v < VECTORS; v++)
                sum[r][v] += own[v] * factor;
        }
    }
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < VECTORS; v++)
            store_floats(sums + r * BLOCK + v * LANES, sum[r][v]);
}

#define OF_ROWS(n) \
    case n: multiply(p, x, w, num, sums, n, wanted, lines); break;

static void multiply_rows(
    const struct product *p, const float *x, const float *w, int64_t num, float *sums, int64_t num_rows,
    const float *wanted, int64_t lines)
{
    switch (num_rows) {
        OF_ROWS(1)
        OF_ROWS(2)
#if LANES == 16
        OF_ROWS(3)
        OF_ROWS(4)
        OF_ROWS(5)
        OF_ROWS(6)
#endif
    }
}

static void multiply_tile(
    const void *product, int64_t block, int64_t first_row, int64_t num_rows, const void *wanted, float *sums)
{
    const struct product *p = product;
    const float *w = p->packed + block * p->block_stride, *x = p->x + first_row * p->x_stride;
    const int64_t num_groups = (num_rows + ROWS - 1) / ROWS;
    /* As even as can be: 16 rows are 6, 5 and 5. */
    const int64_t rows = num_rows / num_groups, larger = num_rows % num_groups;
    const int64_t panel = num_groups > 1 && num_rows <= MAX_NEAR_ROWS ? NEAR_PANEL : PANEL;
    memset(sums, 0, (size_t)(num_rows * BLOCK) * sizeof(float));
    for (int64_t first = 0; first < p->in_features; first += panel) {
        const int64_t rest = p->in_features - first, num = rest < panel ? rest : panel;
        const float *ahead = num < rest ? w + (first + num) * BLOCK : wanted;
        int64_t lines = num < rest ? rest - num : p->in_features;
        lines = ahead ? (lines < panel ? lines : panel) * (BLOCK / LINE) : 0;
        int64_t row = 0;
        for (int64_t g = 0; g < num_groups; g++) {
            const int64_t own = rows + (g < larger), from = lines * g / num_groups;
            multiply_rows(
                p, x + row * p->x_stride + first, w + first * BLOCK, num, sums + row * BLOCK, own,
                ahead + from * LINE, lines * (g + 1) / num_groups - from);
            row += own;
        }
    }
}

static void write_tile(
    const void *product, int64_t block, int64_t first_row, int64_t num_rows, const float *sums)
{
    const struct product *p = product;
    const int64_t column = block * BLOCK;
    const int64_t width = p->out_features - column < BLOCK ? p->out_features - column : BLOCK;
    for (int64_t r = 0; r < num_rows; r++) {
        float *to = p->y + (first_row + r) * p->y_stride + column;
        const float *from = sums + r * BLOCK;
        if (p->bias)
            for (int64_t i = 0; i < width; i++)
                to[i] = from[i] + p->bias[column + i];
        else
            memcpy(to, from, (size_t)width * sizeof(float));
    }
}

/* A step. */
void fathom_product(const void *call, struct worker *worker)
{
    const struct product *p = call;
    multiply_blocks(
        p, p->num_rows, p->out_features, p->packed, p->block_stride * (int64_t)sizeof(float), worker, multiply_tile,
        write_tile);
}
