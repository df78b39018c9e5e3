/* y = x W^T + bias, over weights that are packed for it, float32 or bfloat16:
 *
 *     W [out_features, in_features]  ->  packed [out_features / 64, 64 / STRIP, in_features, STRIP]
 *
 * padded with zeros. y is of the weights' type, x of that or float32, all arithmetic is float32. With few rows the time is what
 * reading W takes, so it is read once, in order, by whichever thread is free, and what comes next is asked for
 * while this is multiplied. Each output is one sum over in_features in one fixed order, whatever the number of
 * rows. */
#include "product.h"

enum {
    STRIP = LANES == 16 ? 64 : 16, /* outputs that lie together: those of as many rows as can be, at once */
    VECTORS = STRIP / LANES,
    STRIPS = BLOCK / STRIP,
    ROWS = LANES == 4 ? 3 : 6, /* at once: as many sums as there are registers for, less what they are made of */
    /* Inputs at once, so that a block's share of W stays in the second cache. */
    PANEL = LANES == 16 ? 1024 : 256,
    /* The same for several groups of rows: in the first cache. Those after the first group would else wait for the
     * second one behind what is asked of memory meanwhile, and that is where the time goes with few rows. With more,
     * it goes where sums are loaded and stored for each panel. */
    NEAR_PANEL = LANES == 16 ? 32 : 64,
    MAX_NEAR_ROWS = 3 * ROWS,
    WIDE_PANEL = LANES == 16 ? NEAR_PANEL : PANEL, /* of bfloat16 that becomes float32 for several groups */
    LINE = 64 /* bytes */
};

#if LANES == 16
#define UNROLLED
#else
#define UNROLLED _Pragma("GCC unroll 2")
#endif

const int64_t fathom_sizeof_product = sizeof(struct product);
const int64_t fathom_product_block = BLOCK;
const int64_t fathom_product_strip = STRIP;

/* What is multiplied at once: some rows, some strips of a block, some inputs. */
struct part {
    const float *x;
    int64_t x_stride;
    const void *w;
    int64_t strip_stride; /* elements */
    int64_t num;          /* inputs */
    float *sums;          /* [num_rows, BLOCK] */
    const char *wanted;   /* asked for meanwhile, in step, of each strip */
    int64_t num_lines;
    float *wide; /* [num, STRIP]: where weights are kept as float32 */
};

/* All but the part are constants where it is called. keeps: of one strip, its weights as float32. */
INLINE void multiply(
    const struct part *p, const int num_rows, const int num_strips, const int dtype, const int keeps)
{
    const int num_vectors = num_strips * VECTORS;
    floats sum[ROWS][STRIPS * VECTORS];
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < num_vectors; v++)
            sum[r][v] = load_floats(p->sums + r * BLOCK + v * LANES);
    const int64_t strip_size = p->strip_stride * size_of(dtype);
    const int64_t per_step = LANES == 16 && p->num ? (p->num_lines + p->num - 1) / p->num : 1;
    UNROLLED
    for (int64_t k = 0; k < p->num; k++) {
        if (LANES == 16) {
            for (int64_t l = 0; l < per_step; l++)
                __builtin_prefetch(p->wanted + (k * per_step + l) * LINE, 0, 2);
        } else if (k < p->num_lines) { /* a line of a strip has one input, or two */
            for (int s = 0; s < num_strips; s++)
                __builtin_prefetch(p->wanted + s * strip_size + k * LINE, 0, 2);
        }
        floats own[STRIPS * VECTORS];
        for (int v = 0; v < num_vectors; v++)
            own[v] = load(p->w, v / VECTORS * p->strip_stride + k * STRIP + v % VECTORS * LANES, dtype);
        for (int v = 0; v < num_vectors && keeps; v++)
            store_floats(p->wide + k * STRIP + v * LANES, own[v]);
        for (int r = 0; r < num_rows; r++) {
            const float factor = p->x[r * p->x_stride + k];
            for (int v = 0; v < num_vectors; v++)
                sum[r][v] += own[v] * factor;
        }
    }
    for (int r = 0; r < num_rows; r++)
        for (int v = 0; v < num_vectors; v++)
            store_floats(p->sums + r * BLOCK + v * LANES, sum[r][v]);
}

/* Strips at once of so many rows: enough sums that none waits for itself, and no more than there are registers. */
INLINE int strips_of(int64_t num_rows)
{
    if (LANES == 16)
        return 1;
    return LANES == 8 ? (num_rows == 1 ? 4 : num_rows <= 3 ? 2 : 1) : num_rows == 1 ? 2 : 1;
}

#define OF_ROWS(n) \
    case n: \
        if (num_strips == 1) \
            multiply(p, n, 1, dtype, keeps); \
        else \
            multiply(p, n, strips_of(n), dtype, 0); \
        break;

/* num_strips: one, or strips_of(num_rows). */
INLINE void multiply_rows(
    const struct part *p, int64_t num_rows, int64_t num_strips, const int dtype, const int keeps)
{
    switch (num_rows) {
        OF_ROWS(1)
        OF_ROWS(2)
        OF_ROWS(3)
#if LANES != 4
        OF_ROWS(4)
        OF_ROWS(5)
        OF_ROWS(6)
#endif
    }
}

/* x is float32. */
INLINE void multiply_tile(
    const struct product *p, int64_t block, int64_t first_row, int64_t num_rows, const char *wanted, float *sums,
    const int dtype)
{
    const int64_t size = size_of(dtype), strip_stride = p->in_features * STRIP;
    const char *w = (const char *)p->packed + block * STRIPS * strip_stride * size;
    const int64_t num_groups = (num_rows + ROWS - 1) / ROWS;
    /* As even as can be: 16 rows are 6, 5 and 5. */
    const int64_t rows = num_rows / num_groups, larger = num_rows % num_groups;
    const int is_near = num_groups > 1 && num_rows <= MAX_NEAR_ROWS;
    const int is_widened = dtype != FLOAT32 && num_groups > 1;
    const int64_t panel = is_near ? NEAR_PANEL : is_widened ? WIDE_PANEL : PANEL;
    const int64_t step = num_groups > 1 ? 1 : strips_of(num_rows);
    float wide[dtype == FLOAT32 ? 1 : WIDE_PANEL * STRIP];
    memset(sums, 0, (size_t)(num_rows * BLOCK) * sizeof(float));
    for (int64_t first = 0; first < p->in_features; first += panel) {
        const int64_t rest = p->in_features - first, num = rest < panel ? rest : panel;
        const char *now = w + first * STRIP * size;
        const char *ahead = num < rest ? now + num * STRIP * size : wanted ? wanted : now;
        int64_t lines = num < rest ? rest - num : wanted ? p->in_features : 0;
        lines = (lines < panel ? lines : panel) * (STRIP * size) / LINE;
        struct part part = {.x_stride = p->x_stride, .strip_stride = strip_stride, .num = num, .wide = wide};
        for (int64_t strip = 0; strip < STRIPS; strip += step) {
            const int64_t skipped = strip * strip_stride * size;
            part.w = now + skipped;
            int64_t row = 0;
            for (int64_t g = 0; g < num_groups; g++) {
                const int64_t own = rows + (g < larger), from = lines * g / num_groups;
                part.x = (const float *)p->x + (first_row + row) * p->x_stride + first;
                part.sums = sums + row * BLOCK + strip * STRIP;
                part.wanted = ahead + skipped + from * LINE;
                part.num_lines = lines * (g + 1) / num_groups - from;
                if (!is_widened) {
                    multiply_rows(&part, own, step, dtype, 0);
                } else if (g == 0) { /* and for the groups after it */
                    multiply_rows(&part, own, 1, dtype, 1);
                    part.w = wide;
                } else {
                    multiply_rows(&part, own, 1, FLOAT32, 0);
                }
                row += own;
            }
        }
    }
}

static void multiply_floats(
    const void *product, int64_t block, int64_t first_row, int64_t num_rows, const void *wanted, float *sums)
{
    multiply_tile(product, block, first_row, num_rows, wanted, sums, FLOAT32);
}

static void multiply_halves(
    const void *product, int64_t block, int64_t first_row, int64_t num_rows, const void *wanted, float *sums)
{
    multiply_tile(product, block, first_row, num_rows, wanted, sums, BFLOAT16);
}

/* A step. */
void fathom_product(const void *call, struct worker *worker)
{
    multiply_by_dtype(call, worker, multiply_floats, multiply_halves);
}
