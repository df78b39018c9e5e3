/* y = x W^T over a weight that lies as in a checkpoint, row by row, because others read it so: an lm_head that is the
 * embedding. All arithmetic is float32. Each output is one sum over in_features in one fixed order, whatever the
 * number of rows. */
#include "product.h"

enum {
    PLAIN_ROWS = 4, /* of x at once, at most, against so many rows of a weight that lies row by row */
    PLAIN_OUT = LANES == 16 ? 4 : 2,
};

/* Some rows by some outputs, both numbers constants where it is called. asks: for the outputs after these. */
INLINE void dot_tile(
    const struct product *p, int64_t output, const int num_outputs, int64_t row, const int num_rows, float *sums,
    const int asks, const int dtype)
{
    const int64_t in = p->in_features, whole = in - in % LANES;
    const float *x = (const float *)p->x + row * p->x_stride;
    floats s[PLAIN_ROWS][PLAIN_OUT];
    for (int m = 0; m < num_rows; m++)
        for (int o = 0; o < num_outputs; o++)
            s[m][o] = splat(0.0f);
    for (int64_t k = 0; k < whole; k += LANES) {
        floats own[PLAIN_ROWS];
        for (int m = 0; m < num_rows; m++)
            own[m] = load_floats(x + m * p->x_stride + k);
        for (int o = 0; o < num_outputs; o++) {
            const int64_t at = (output + o) * in + k;
            if (asks)
                __builtin_prefetch((const char *)p->packed + (at + num_outputs * in) * size_of(dtype), 0, 2);
            const floats w = load(p->packed, at, dtype);
            for (int m = 0; m < num_rows; m++)
                s[m][o] += own[m] * w;
        }
    }
    for (int m = 0; m < num_rows; m++)
        for (int o = 0; o < num_outputs; o++) {
            float total = sum(s[m][o]);
            for (int64_t k = whole; k < in; k++)
                total += x[m * p->x_stride + k] * load_one(p->packed, (output + o) * in + k, dtype);
            sums[m * BLOCK + o] = total;
        }
}

/* Outputs outside, so that their weights stay in the first cache for all rows. */
INLINE void dot_outputs(
    const struct product *p, int64_t output, const int num_outputs, int64_t first_row, int64_t num_rows, float *sums,
    const int dtype)
{
    for (int64_t r = 0; r < num_rows; r += PLAIN_ROWS) {
        float *to = sums + r * BLOCK;
        if (r == 0)
            WITH_ROWS(num_rows, PLAIN_ROWS, dot_tile(p, output, num_outputs, first_row, N, to, 1, dtype))
        else
            WITH_ROWS(num_rows - r, PLAIN_ROWS, dot_tile(p, output, num_outputs, first_row + r, N, to, 0, dtype))
    }
}

INLINE void multiply_plain(
    const struct product *p, int64_t block, int64_t first_row, int64_t num_rows, float *sums, const int dtype)
{
    const int64_t column = block * BLOCK, rest = p->out_features - column, width = rest < BLOCK ? rest : BLOCK;
    int64_t o = 0;
    for (; o + PLAIN_OUT <= width; o += PLAIN_OUT)
        dot_outputs(p, column + o, PLAIN_OUT, first_row, num_rows, sums + o, dtype);
    for (; o < width; o++)
        dot_outputs(p, column + o, 1, first_row, num_rows, sums + o, dtype);
}

static void multiply_plain_floats(
    const void *product, int64_t block, int64_t first_row, int64_t num_rows, const void *wanted, float *sums)
{
    multiply_plain(product, block, first_row, num_rows, sums, FLOAT32);
}

static void multiply_plain_halves(
    const void *product, int64_t block, int64_t first_row, int64_t num_rows, const void *wanted, float *sums)
{
    multiply_plain(product, block, first_row, num_rows, sums, BFLOAT16);
}

/* A step. */
void fathom_plain_product(const void *call, struct worker *worker)
{
    multiply_by_dtype(call, worker, multiply_plain_floats, multiply_plain_halves);
}
