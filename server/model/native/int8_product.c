/* y = (x Q^T) * scales + bias, over int8 weights with one scale an output:
 *
 *     Q [out_features, in_features]  ->  packed [out_features / 64, in_features, 64]
 *
 * padded with zeros. Of 64 outputs, those a vector of lanes apart lie together, as the four bytes of one lane's
 * integer: shifts take them apart, where widening bytes takes an instruction that compilers do not all find.
 * Activations are float32 or bfloat16, all arithmetic is float32. With few rows the time is what reading Q takes,
 * so its numbers become floats in registers; with many, a panel of a block becomes floats once for all rows of a
 * tile. Each output is one sum over in_features in one fixed order, whatever the number of rows, times its scale
 * at the end. */
#include "blocks.h"

enum {
    PANEL = 256, /* inputs at once: as floats, a block's share stays in the second cache */
    BYTES = 4,   /* of an integer */
    ROWS = 6,    /* at once, over NARROW vectors: as many sums as there are registers for */
    NARROW = LANES == 16 ? 4 : 2,
    /* Rows up to which no panel of floats is made: making them anew for each ROWS rows then costs less than
     * reading them, as long as a vector's shifts find room beside its multiplications. */
    MAX_DIRECT = LANES == 16 ? 3 * ROWS : 1
};

struct int8_product {
    void *y;       /* [num_rows, out_features] */
    const void *x; /* [num_rows, in_features] */
    const int8_t *packed;
    const float *scales; /* [out_features] */
    const float *bias;   /* the same, or null */
    int64_t y_stride, x_stride;
    int64_t num_rows, in_features, out_features;
    int64_t dtype; /* of y */
    int64_t x_dtype;
};

const int64_t fathom_sizeof_int8_product = sizeof(struct int8_product);
/* Outputs that lie BYTES apart, one after the other. */
const int64_t fathom_int8_lanes = LANES;

/* The weights of BYTES vectors of outputs. */
INLINE void load_weights(const int8_t *from, floats *to)
{
    words all;
    memcpy(&all, from, sizeof all);
    to[0] = __builtin_convertvector((ints)(all << 24) >> 24, floats);
    to[1] = __builtin_convertvector((ints)(all << 16) >> 24, floats);
    to[2] = __builtin_convertvector((ints)(all << 8) >> 24, floats);
    to[3] = __builtin_convertvector((ints)all >> 24, floats);
}

/* Adds the products of `num` inputs to BYTES vectors of the sums [num_rows, BLOCK]; num_rows is a constant where
 * it is called. Asks for a line of `ahead` at each input, if it is not null. */
INLINE void multiply_bytes(
    const float *x, int64_t x_stride, const int8_t *w, int64_t num, float *sums, const int num_rows,
    const int8_t *ahead)
{
    floats sum[ROWS][BYTES];
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < BYTES; v++)
            sum[r][v] = load_floats(sums + r * BLOCK + v * LANES);
    for (int64_t k = 0; k < num; k++) {
        if (ahead)
            __builtin_prefetch(ahead + k * BLOCK, 0, 2);
        floats own[BYTES];
        load_weights(w + k * BLOCK, own);
        for (int r = 0; r < num_rows; r++) {
            const float factor = x[r * x_stride + k];
            for (int v = 0; v < BYTES; v++)
                sum[r][v] += own[v] * factor;
        }
    }
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < BYTES; v++)
            store_floats(sums + r * BLOCK + v * LANES, sum[r][v]);
}

/* The same of NARROW vectors whose weights are floats already. */
INLINE void multiply_narrow(
    const float *x, int64_t x_stride, const float *w, int64_t num, float *sums, const int num_rows)
{
    floats sum[ROWS][NARROW];
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < NARROW; v++)
            sum[r][v] = load_floats(sums + r * BLOCK + v * LANES);
    for (int64_t k = 0; k < num; k++) {
        floats own[NARROW];
        for (int v = 0; v < NARROW; v++)
            own[v] = load_floats(w + k * BLOCK + v * LANES);
        for (int r = 0; r < num_rows; r++) {
            const float factor = x[r * x_stride + k];
            for (int v = 0; v < NARROW; v++)
                sum[r][v] += own[v] * factor;
        }
    }
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < NARROW; v++)
            store_floats(sums + r * BLOCK + v * LANES, sum[r][v]);
}

#define OF_ROWS(n) \
    case n: \
        for (int v = 0; v < BLOCK; v += BYTES * LANES) \
            multiply_bytes(x, x_stride, w + v, num, sums + v, n, v ? 0 : ahead); \
        break;

static void multiply_direct(
    const float *x, int64_t x_stride, const int8_t *w, int64_t num, float *sums, int64_t num_rows,
    const int8_t *ahead)
{
    switch (num_rows) {
        OF_ROWS(1)
#if LANES == 16
        OF_ROWS(2)
        OF_ROWS(3)
        OF_ROWS(4)
        OF_ROWS(5)
        OF_ROWS(6)
#endif
    }
}

#undef OF_ROWS
#define OF_ROWS(n) \
    case n: \
        for (int v = 0; v < BLOCK; v += NARROW * LANES) \
            multiply_narrow(x, x_stride, w + v, num, sums + v, n); \
        break;

static void multiply_floats(
    const float *x, int64_t x_stride, const float *w, int64_t num, float *sums, int64_t num_rows)
{
    switch (num_rows) {
        OF_ROWS(1)
        OF_ROWS(2)
        OF_ROWS(3)
        OF_ROWS(4)
        OF_ROWS(5)
        OF_ROWS(6)
    }
}

static void widen(const int8_t *w, int64_t num, float *to, const int8_t *ahead)
{
    for (int64_t k = 0; k < num; k++) {
        if (ahead)
            __builtin_prefetch(ahead + k * BLOCK, 0, 2);
        for (int v = 0; v < BLOCK; v += BYTES * LANES) {
            floats own[BYTES];
            load_weights(w + k * BLOCK + v, own);
            for (int b = 0; b < BYTES; b++)
                store_floats(to + k * BLOCK + v + b * LANES, own[b]);
        }
    }
}

/* x is float32. */
static void multiply_tile(
    const void *product, int64_t block, int64_t first_row, int64_t num_rows, const void *wanted, float *sums)
{
    const struct int8_product *p = product;
    const int8_t *w = p->packed + block * p->in_features * BLOCK;
    const int64_t num_groups = (num_rows + ROWS - 1) / ROWS;
    /* As even as can be: 16 rows are 6, 5 and 5. */
    const int64_t rows = num_rows / num_groups, larger = num_rows % num_groups;
    float panel[PANEL * BLOCK] __attribute__((aligned(64)));
    memset(sums, 0, (size_t)(num_rows * BLOCK) * sizeof(float));
    for (int64_t first = 0; first < p->in_features; first += PANEL, w += PANEL * BLOCK) {
        const int64_t rest = p->in_features - first, num = rest < PANEL ? rest : PANEL;
        /* A panel's worth further on, which near the end may be past it: asking is harmless. */
        const int8_t *ahead = num < rest ? w + PANEL * BLOCK : wanted;
        if (num_rows > MAX_DIRECT)
            widen(w, num, panel, ahead);
        int64_t row = 0;
        for (int64_t g = 0; g < num_groups; g++) {
            const int64_t own = rows + (g < larger);
            const float *x = (const float *)p->x + (first_row + row) * p->x_stride + first;
            float *to = sums + row * BLOCK;
            if (num_rows > MAX_DIRECT)
                multiply_floats(x, p->x_stride, panel, num, to, own);
            else
                multiply_direct(x, p->x_stride, w, num, to, own, g ? 0 : ahead);
            row += own;
        }
    }
}

static void write_tile(
    const void *product, int64_t block, int64_t first_row, int64_t num_rows, const float *sums)
{
    const struct int8_product *p = product;
    const int64_t column = block * BLOCK;
    const int64_t width = p->out_features - column < BLOCK ? p->out_features - column : BLOCK;
    for (int64_t r = 0; r < num_rows; r++) {
        const int64_t to = (first_row + r) * p->y_stride + column;
        const float *from = sums + r * BLOCK;
        for (int64_t i = 0; i < width; i++) {
            const float scaled = from[i] * p->scales[column + i];
            store_one(p->y, to + i, p->bias ? scaled + p->bias[column + i] : scaled, (int)p->dtype);
        }
    }
}

/* A step. */
void fathom_int8_product(const void *call, struct worker *worker)
{
    struct int8_product p = *(const struct int8_product *)call;
    p.x = as_floats(p.x, &p.x_stride, (int)p.x_dtype, p.num_rows, p.in_features);
    multiply_blocks(
        &p, p.num_rows, p.out_features, p.packed, p.in_features * BLOCK, worker, multiply_tile, write_tile);
}
