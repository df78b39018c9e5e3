/* LoRA of the modules that read one tensor, for the rows of a step, each row with the adapter of its segment.
 *
 *     low = A x;  y += scaling * (B low + bias)                                          LoRA
 *     y = gain * (y - base_bias) + base_bias + gain * scaling * (B low + bias)           DoRA
 *
 * All segments and modules are one job: first every `low`, then every output. Each element is summed in an
 * order that does not depend on what else is in the step. */
#include "pass.h"
#include "team.h"
#include "vector.h"

enum {
    ROWS = 4, /* of x at once, at most: sums of their products with some rows of A are in registers */
    MAX_RANKS = 4,
    WIDE = LANES == 16 ? 4 : 2, /* vectors of lora_B against as many rows, likewise */
    BLOCK_ROWS = 32,  /* rows of a segment in one item of work */
    BLOCK_RANKS = 64, /* rows of lora_A in one item */
    SHORT_BLOCK_RANKS = 4, /* the same where there would be too few items for all threads */
    BLOCK_OUT = 1024, /* columns of y in one item; lora_B is read in runs of as many */
    SHORT_BLOCK_OUT = 256, /* likewise */
    NEAR_OUT = 256, /* columns of lora_B that stay in the first cache for all rows of an item */
    AHEAD = 128, /* elements of each row of lora_B that are asked for before they are read: more rows than
                    the processor follows by itself */
};

struct lora_weights {
    const void *lora_A;   /* [rank, in_features] */
    const void *lora_B;   /* [rank, out_features]: PEFT's, transposed */
    const void *bias;     /* [out_features], or null */
    const void *gain;     /* [out_features], or null */
    int64_t rank;         /* 0: this slot does not target the module */
    float scaling;
};

/* One module. */
struct lora_part {
    const struct lora_weights *weights; /* [num_slots] */
    const void *base_bias;              /* [out_features], or null */
    int64_t column;                     /* its first of y */
    int64_t out_features;
    int64_t low_column;                 /* its first of low: after the largest ranks of those before it */
};

struct lora {
    void *y; /* [num_rows, columns of all parts], strides in elements */
    const void *x;
    int64_t y_stride, x_stride;
    const struct lora_part *parts;
    const struct lora_segment *segments;
    int64_t num_parts, num_segments, in_features;
    int64_t num_slots; /* of every part; a slot beyond them targets none */
    float *low; /* [num_rows of the last segment's end, low_stride] */
    int64_t low_stride;
    int dtype;
};

const int64_t fathom_sizeof_lora_weights = sizeof(struct lora_weights);
const int64_t fathom_sizeof_lora_part = sizeof(struct lora_part);
const int64_t fathom_sizeof_lora = sizeof(struct lora);

/* Rows of A at once against so many of x: enough sums that none waits for itself, and no more than there are
 * registers for. */
INLINE int ranks_of(int64_t num_rows)
{
    return LANES != 16 && num_rows == ROWS ? MAX_RANKS / 2 : MAX_RANKS;
}

/* low[m][rank + r] for some rows of x and of A, both numbers constants where it is called. Whole tiles ask for the
 * rows of A after them, if these are read next. */
INLINE void shrink_tile(
    const struct lora *a, const struct lora_weights *w, float *low, int64_t row, const int num_rows,
    int64_t rank, const int num_ranks, const int goes_on, const int dtype)
{
    const int64_t in = a->in_features, whole = in - in % LANES;
    floats s[ROWS][MAX_RANKS];
    for (int m = 0; m < num_rows; m++)
        for (int r = 0; r < num_ranks; r++)
            s[m][r] = splat(0.0f);
    for (int64_t k = 0; k < whole; k += LANES) {
        floats x[ROWS];
        for (int m = 0; m < num_rows; m++)
            x[m] = load(a->x, (row + m) * a->x_stride + k, dtype);
        for (int r = 0; r < num_ranks; r++) {
            int64_t at = (rank + r) * in + k;
            if (goes_on)
                __builtin_prefetch((const char *)w->lora_A + (at + num_ranks * in) * size_of(dtype), 0, 2);
            floats A = load(w->lora_A, at, dtype);
            for (int m = 0; m < num_rows; m++)
                s[m][r] += x[m] * A;
        }
    }
    for (int m = 0; m < num_rows; m++)
        for (int r = 0; r < num_ranks; r++) {
            float *to = low + m * a->low_stride + rank + r;
            *to = sum(s[m][r]);
            for (int64_t k = whole; k < in; k++)
                *to += load_one(a->x, (row + m) * a->x_stride + k, dtype) *
                       load_one(w->lora_A, (rank + r) * in + k, dtype);
        }
}

/* Some rows of x by ranks [first, end). is_first: nothing of A was read for the rows before these. */
INLINE void shrink_group(
    const struct lora *a, const struct lora_weights *w, float *low, int64_t row, const int num_rows,
    int64_t first, int64_t end, int is_first, const int dtype)
{
    const int num_ranks = ranks_of(num_rows);
    int64_t rank = first;
    for (; rank + num_ranks <= end; rank += num_ranks)
        if (is_first && rank + num_ranks < end)
            shrink_tile(a, w, low, row, num_rows, rank, num_ranks, 1, dtype);
        else
            shrink_tile(a, w, low, row, num_rows, rank, num_ranks, 0, dtype);
    for (; rank < end; rank++)
        shrink_tile(a, w, low, row, num_rows, rank, 1, 0, dtype);
}

INLINE floats adapted(
    const struct lora_weights *w, const void *base_bias, int64_t column, floats y, floats delta, int dtype)
{
    if (w->bias)
        delta += load(w->bias, column, dtype);
    delta *= w->scaling;
    if (!w->gain)
        return y + delta;
    floats gain = load(w->gain, column, dtype);
    if (!base_bias)
        return gain * y + gain * delta;
    floats base = load(base_bias, column, dtype);
    return gain * (y - base) + base + gain * delta;
}

INLINE float adapted_one(
    const struct lora_weights *w, const void *base_bias, int64_t column, float y, float delta, int dtype)
{
    if (w->bias)
        delta += load_one(w->bias, column, dtype);
    delta *= w->scaling;
    if (!w->gain)
        return y + delta;
    float gain = load_one(w->gain, column, dtype);
    float base = base_bias ? load_one(base_bias, column, dtype) : 0.0f;
    return gain * (y - base) + base + gain * delta;
}

/* Some rows by some vectors of a part's columns, both numbers constants where it is called. low: of the first of
 * these rows. asks: for what of lora_B comes later. */
INLINE void expand_tile(
    const struct lora *a, const struct lora_part *part, const struct lora_weights *w, const float *low,
    int64_t row, const int num_rows, int64_t column, const int num_vectors, const int asks,
    const int dtype)
{
    floats s[ROWS][WIDE];
    for (int m = 0; m < num_rows; m++)
        for (int v = 0; v < num_vectors; v++)
            s[m][v] = splat(0.0f);
    for (int64_t r = 0; r < w->rank; r++)
        for (int v = 0; v < num_vectors; v++) {
            int64_t at = r * part->out_features + column + v * LANES;
            if (asks)
                __builtin_prefetch((const char *)w->lora_B + (at + AHEAD) * size_of(dtype), 0, 3);
            floats B = load(w->lora_B, at, dtype);
            for (int64_t m = 0; m < num_rows; m++)
                s[m][v] += low[m * a->low_stride + r] * B;
        }
    for (int64_t m = 0; m < num_rows; m++)
        for (int v = 0; v < num_vectors; v++) {
            int64_t own = column + v * LANES, at = (row + m) * a->y_stride + part->column + own;
            floats y = load(a->y, at, dtype);
            store(a->y, at, adapted(w, part->base_bias, own, y, s[m][v], dtype), dtype);
        }
}

/* Rows by whole tiles of columns [first, end). is_first: as above, of lora_B. */
INLINE void expand_group(
    const struct lora *a, const struct lora_part *part, const struct lora_weights *w, const float *low,
    int64_t row, const int num_rows, int64_t first, int64_t end, int is_first, const int dtype)
{
    for (int64_t column = first; column < end; column += WIDE * LANES)
        if (is_first)
            expand_tile(a, part, w, low, row, num_rows, column, WIDE, 1, dtype);
        else
            expand_tile(a, part, w, low, row, num_rows, column, WIDE, 0, dtype);
}

INLINE void expand_columns(
    const struct lora *a, const struct lora_part *part, const struct lora_weights *w, const float *low,
    int64_t row, int64_t num_rows, int64_t first, int64_t end, const int dtype)
{
    const int64_t stride = a->low_stride;
    const int64_t tiled = end - (end - first) % (WIDE * LANES);
    int64_t column = first;
    for (; column < tiled; column += NEAR_OUT) {
        const int64_t stop = column + NEAR_OUT < tiled ? column + NEAR_OUT : tiled;
        for (int64_t m = 0; m < num_rows; m += ROWS)
            WITH_ROWS(
                num_rows - m, ROWS,
                expand_group(a, part, w, low + m * stride, row + m, N, column, stop, m == 0, dtype))
    }
    for (column = tiled; column + LANES <= end; column += LANES)
        for (int64_t m = 0; m < num_rows; m++)
            expand_tile(a, part, w, low + m * stride, row + m, 1, column, 1, 1, dtype);
    for (; column < end; column++)
        for (int64_t m = 0; m < num_rows; m++) {
            float delta = 0.0f;
            for (int64_t r = 0; r < w->rank; r++)
                delta += low[m * stride + r] *
                         load_one(w->lora_B, r * part->out_features + column, dtype);
            int64_t at = (row + m) * a->y_stride + part->column + column;
            float y = load_one(a->y, at, dtype);
            store_one(a->y, at, adapted_one(w, part->base_bias, column, y, delta, dtype), dtype);
        }
}

/* Rows outside, so that a group's inputs stay in the first cache, and A in the second. */
INLINE void shrink_rows(
    const struct lora *a, const struct lora_weights *w, float *low, int64_t row, int64_t num_rows,
    int64_t first, int64_t end, const int dtype)
{
    for (int64_t m = 0; m < num_rows; m += ROWS)
        WITH_ROWS(
            num_rows - m, ROWS,
            shrink_group(a, w, low + m * a->low_stride, row + m, N, first, end, m == 0, dtype))
}

/* One phase: blocks of a segment's rows by pieces of the ranks, or of the columns, of a part. Every thread walks
 * all of them in one order and does those that it takes. */
INLINE void walk(const struct lora *a, struct worker *worker, const int phase, const int dtype)
{
    const int is_shrink = phase == 0;
    const int is_short = a->num_parts * a->num_segments < 2 * worker->num_threads;
    const int64_t ranks = is_short ? SHORT_BLOCK_RANKS : BLOCK_RANKS, columns = is_short ? SHORT_BLOCK_OUT : BLOCK_OUT;
    const int64_t piece = is_shrink ? ranks : columns;
    int64_t mine = take_item(worker, phase), item = 0, num_done = 0;
    for (int64_t p = 0; p < a->num_parts; p++) {
        const struct lora_part *part = a->parts + p;
        for (int64_t i = 0; i < a->num_segments; i++) {
            const struct lora_segment segment = a->segments[i];
            const struct lora_weights *w = part->weights + segment.slot;
            const int is_target = segment.slot < a->num_slots && w->rank;
            const int64_t length = !is_target ? 0 : is_shrink ? w->rank : part->out_features;
            for (int64_t row = segment.start; row < segment.end; row += BLOCK_ROWS)
                for (int64_t at = 0; at < length; at += piece, item++) {
                    if (item != mine)
                        continue;
                    int64_t num_rows = segment.end - row < BLOCK_ROWS ? segment.end - row : BLOCK_ROWS;
                    int64_t size = length - at < piece ? length - at : piece;
                    float *low = a->low + row * a->low_stride + part->low_column;
                    if (!is_shrink)
                        expand_columns(a, part, w, low, row, num_rows, at, at + size, dtype);
                    else
                        shrink_rows(a, w, low, row, num_rows, at, at + size, dtype);
                    num_done++;
                    mine = take_item(worker, phase);
                }
        }
    }
    items_done(worker, phase, num_done);
    await_items(worker, phase, item);
}

/* A step. */
void fathom_lora(const void *call, struct worker *worker)
{
    const struct lora *a = call;
    if (a->dtype == FLOAT32) {
        walk(a, worker, 0, FLOAT32);
        walk(a, worker, 1, FLOAT32);
    } else {
        walk(a, worker, 0, BFLOAT16);
        walk(a, worker, 1, BFLOAT16);
    }
}

/* The modules of one layer that read one tensor, in a pass: all but what it says of its rows. */
struct lora_layer {
    struct lora lora; /* without parts where no slot targets them */
    int64_t layer;    /* whose rows of the pass they are */
};

const int64_t fathom_sizeof_lora_layer = sizeof(struct lora_layer);

/* A step of a pass. */
void fathom_lora_layer(const void *call, struct worker *worker)
{
    const struct lora_layer *layer = call;
    const struct pass *pass = worker->pass;
    if (!layer->lora.num_parts || !pass->reached || !pass->reached[layer->layer].num_segments)
        return;
    struct lora own = layer->lora;
    own.segments = pass->reached[layer->layer].segments;
    own.num_segments = pass->reached[layer->layer].num_segments;
    own.low = pass->low;
    fathom_lora(&own, worker);
}
