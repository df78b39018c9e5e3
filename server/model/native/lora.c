/* LoRA of one module for the rows of a step, each row with the adapter of its segment.
 *
 *     low = A x;  y += scaling * (B low + bias)                                          LoRA
 *     y = gain * (y - base_bias) + base_bias + gain * scaling * (B low + bias)           DoRA
 *
 * All segments are one job: first everybody's `low`, then everybody's outputs. Each element is summed in
 * an order that does not depend on what else is in the step. */
#include "team.h"
#include "vector.h"

enum {
    ROWS = 4,        /* of x against as many of A: sixteen sums in registers */
    BLOCK_ROWS = 32, /* rows of a segment in one item of work */
    BLOCK_OUT = 256, /* columns of y in one item */
};

struct lora_weights {
    const void *lora_A;   /* [rank, in_features] */
    const void *lora_B;   /* [rank, out_features]: PEFT's, transposed */
    const void *bias;     /* [out_features], or null */
    const void *gain;     /* [out_features], or null */
    int64_t rank;         /* 0: this slot does not target the module */
    float scaling;
};

struct lora_segment {
    int64_t slot, start, end;
};

struct lora {
    void *y; /* [num_rows, out_features], strides in elements */
    const void *x;
    int64_t y_stride, x_stride;
    const void *base_bias; /* [out_features], or null */
    const struct lora_weights *weights; /* by slot */
    const struct lora_segment *segments;
    int64_t num_segments, in_features, out_features, max_rank;
    float *low; /* [num_rows of the last segment's end, max_rank] */
    int dtype, num_threads;
};

const int64_t fathom_sizeof_lora_weights = sizeof(struct lora_weights);
const int64_t fathom_sizeof_lora = sizeof(struct lora);

struct lora_job {
    const struct lora *a;
    int64_t next_shrink, next_expand;
};

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* low[m][r] for up to ROWS rows of x and of A. */
INLINE void shrink_tile(
    const struct lora *a, const struct lora_weights *w, int64_t row, int64_t num_rows, int64_t rank,
    int64_t num_ranks)
{
    const int64_t in = a->in_features, whole = in - in % LANES;
    const int dtype = a->dtype;
    if (num_rows == ROWS && num_ranks == ROWS) {
        floats s[ROWS][ROWS];
        for (int m = 0; m < ROWS; m++)
            for (int r = 0; r < ROWS; r++)
                s[m][r] = splat(0.0f);
        for (int64_t k = 0; k < whole; k += LANES) {
            floats x[ROWS];
            for (int m = 0; m < ROWS; m++)
                x[m] = load(a->x, (row + m) * a->x_stride + k, dtype);
            for (int r = 0; r < ROWS; r++) {
                floats A = load(w->lora_A, (rank + r) * in + k, dtype);
                for (int m = 0; m < ROWS; m++)
                    s[m][r] += x[m] * A;
            }
        }
        for (int m = 0; m < ROWS; m++)
            for (int r = 0; r < ROWS; r++)
                a->low[(row + m) * a->max_rank + rank + r] = sum(s[m][r]);
    } else {
        for (int64_t m = 0; m < num_rows; m++)
            for (int64_t r = 0; r < num_ranks; r++) {
                floats s = splat(0.0f);
                for (int64_t k = 0; k < whole; k += LANES)
                    s += load(a->x, (row + m) * a->x_stride + k, dtype) *
                         load(w->lora_A, (rank + r) * in + k, dtype);
                a->low[(row + m) * a->max_rank + rank + r] = sum(s);
            }
    }
    for (int64_t m = 0; m < num_rows; m++)
        for (int64_t r = 0; r < num_ranks; r++)
            for (int64_t k = whole; k < in; k++)
                a->low[(row + m) * a->max_rank + rank + r] +=
                    load_one(a->x, (row + m) * a->x_stride + k, dtype) *
                    load_one(w->lora_A, (rank + r) * in + k, dtype);
}

INLINE floats adapted(
    const struct lora *a, const struct lora_weights *w, int64_t column, floats y, floats delta)
{
    const int dtype = a->dtype;
    if (w->bias)
        delta += load(w->bias, column, dtype);
    delta *= w->scaling;
    if (!w->gain)
        return y + delta;
    floats gain = load(w->gain, column, dtype);
    if (!a->base_bias)
        return gain * y + gain * delta;
    floats base = load(a->base_bias, column, dtype);
    return gain * (y - base) + base + gain * delta;
}

INLINE float adapted_one(
    const struct lora *a, const struct lora_weights *w, int64_t column, float y, float delta)
{
    const int dtype = a->dtype;
    if (w->bias)
        delta += load_one(w->bias, column, dtype);
    delta *= w->scaling;
    if (!w->gain)
        return y + delta;
    float gain = load_one(w->gain, column, dtype);
    float base = a->base_bias ? load_one(a->base_bias, column, dtype) : 0.0f;
    return gain * (y - base) + base + gain * delta;
}

/* ROWS rows, or fewer, by two vectors of columns. */
INLINE void expand_tile(
    const struct lora *a, const struct lora_weights *w, int64_t row, int64_t num_rows, int64_t column,
    int num_vectors)
{
    const int64_t out = a->out_features;
    const int dtype = a->dtype;
    floats s[ROWS][2];
    for (int64_t m = 0; m < num_rows; m++)
        for (int v = 0; v < num_vectors; v++)
            s[m][v] = splat(0.0f);
    const float *low = a->low + row * a->max_rank;
    for (int64_t r = 0; r < w->rank; r++)
        for (int v = 0; v < num_vectors; v++) {
            floats B = load(w->lora_B, r * out + column + v * LANES, dtype);
            for (int64_t m = 0; m < num_rows; m++)
                s[m][v] += low[m * a->max_rank + r] * B;
        }
    for (int64_t m = 0; m < num_rows; m++)
        for (int v = 0; v < num_vectors; v++) {
            int64_t at = (row + m) * a->y_stride + column + v * LANES;
            store(a->y, at, adapted(a, w, column + v * LANES, load(a->y, at, dtype), s[m][v]), dtype);
        }
}

static void expand_columns(
    const struct lora *a, const struct lora_weights *w, int64_t row, int64_t num_rows, int64_t first,
    int64_t end)
{
    int64_t column = first;
    for (; column + 2 * LANES <= end; column += 2 * LANES) {
        int64_t m = 0;
        for (; m + ROWS <= num_rows; m += ROWS)
            expand_tile(a, w, row + m, ROWS, column, 2);
        for (; m < num_rows; m++)
            expand_tile(a, w, row + m, 1, column, 2);
    }
    for (; column + LANES <= end; column += LANES)
        for (int64_t m = 0; m < num_rows; m++)
            expand_tile(a, w, row + m, 1, column, 1);
    for (; column < end; column++)
        for (int64_t m = 0; m < num_rows; m++) {
            float delta = 0.0f;
            for (int64_t r = 0; r < w->rank; r++)
                delta += a->low[(row + m) * a->max_rank + r] *
                         load_one(w->lora_B, r * a->out_features + column, a->dtype);
            int64_t at = (row + m) * a->y_stride + column;
            float y = load_one(a->y, at, a->dtype);
            store_one(a->y, at, adapted_one(a, w, column, y, delta), a->dtype);
        }
}

/* Every thread walks the same list of items and does those that it takes. */
static void lora_work(void *arg)
{
    struct lora_job *job = arg;
    const struct lora *a = job->a;

    int64_t mine = take(&job->next_shrink), item = 0;
    for (int64_t i = 0; i < a->num_segments; i++) {
        struct lora_segment segment = a->segments[i];
        const struct lora_weights *w = a->weights + segment.slot;
        for (int64_t row = segment.start; row < segment.end && w->rank; row += BLOCK_ROWS)
            for (int64_t rank = 0; rank < w->rank; rank += ROWS, item++) {
                if (item != mine)
                    continue;
                int64_t end = row + BLOCK_ROWS < segment.end ? row + BLOCK_ROWS : segment.end;
                int64_t num_ranks = w->rank - rank < ROWS ? w->rank - rank : ROWS;
                for (int64_t m = row; m < end; m += ROWS)
                    shrink_tile(a, w, m, end - m < ROWS ? end - m : ROWS, rank, num_ranks);
                mine = take(&job->next_shrink);
            }
    }
    team_barrier(a->num_threads);

    mine = take(&job->next_expand);
    item = 0;
    for (int64_t i = 0; i < a->num_segments; i++) {
        struct lora_segment segment = a->segments[i];
        const struct lora_weights *w = a->weights + segment.slot;
        for (int64_t row = segment.start; row < segment.end && w->rank; row += BLOCK_ROWS)
            for (int64_t column = 0; column < a->out_features; column += BLOCK_OUT, item++) {
                if (item != mine)
                    continue;
                int64_t end = row + BLOCK_ROWS < segment.end ? row + BLOCK_ROWS : segment.end;
                int64_t last = column + BLOCK_OUT;
                last = last < a->out_features ? last : a->out_features;
                expand_columns(a, w, row, end - row, column, last);
                mine = take(&job->next_expand);
            }
    }
}

void fathom_lora(const struct lora *a)
{
    struct lora_job job = {.a = a};
    team_run(lora_work, &job, a->num_threads);
}
