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
    ROWS = 4, /* of x at once: the sums of their products with RANKS rows of A are in registers */
    RANKS = LANES == 16 ? 4 : 2,
    WIDE = LANES == 16 ? 4 : 2, /* vectors of lora_B against as many rows, likewise */
    BLOCK_ROWS = 32,  /* rows of a segment in one item of work */
    BLOCK_RANKS = 64, /* rows of lora_A in one item */
    SHORT_BLOCK_RANKS = 4, /* the same where there would be too few items for all threads */
    BLOCK_OUT = 1024, /* columns of y in one item; lora_B is read in runs of as many */
    SHORT_BLOCK_OUT = 256, /* likewise */
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

/* low[m][rank + r] for up to ROWS rows of x and RANKS of A. Whole tiles ask for the rows of A after them, if these
 * are read next. */
INLINE void shrink_tile(
    const struct lora *a, const struct lora_weights *w, float *low, int64_t row, int64_t num_rows,
    int64_t rank, int64_t num_ranks, const int goes_on)
{
    const int64_t in = a->in_features, whole = in - in % LANES;
    const int dtype = a->dtype;
    if (num_rows == ROWS && num_ranks == RANKS) {
        floats s[ROWS][RANKS];
        for (int m = 0; m < ROWS; m++)
            for (int r = 0; r < RANKS; r++)
                s[m][r] = splat(0.0f);
        for (int64_t k = 0; k < whole; k += LANES) {
            floats x[ROWS];
            for (int m = 0; m < ROWS; m++)
                x[m] = load(a->x, (row + m) * a->x_stride + k, dtype);
            for (int r = 0; r < RANKS; r++) {
                int64_t at = (rank + r) * in + k;
                if (goes_on)
                    __builtin_prefetch((const char *)w->lora_A + (at + RANKS * in) * size_of(dtype), 0, 2);
                floats A = load(w->lora_A, at, dtype);
                for (int m = 0; m < ROWS; m++)
                    s[m][r] += x[m] * A;
            }
        }
        for (int m = 0; m < ROWS; m++)
            for (int r = 0; r < RANKS; r++)
                low[m * a->low_stride + rank + r] = sum(s[m][r]);
    } else {
        for (int64_t m = 0; m < num_rows; m++)
            for (int64_t r = 0; r < num_ranks; r++) {
                floats s = splat(0.0f);
                for (int64_t k = 0; k < whole; k += LANES)
                    s += load(a->x, (row + m) * a->x_stride + k, dtype) *
                         load(w->lora_A, (rank + r) * in + k, dtype);
                low[m * a->low_stride + rank + r] = sum(s);
            }
    }
    for (int64_t m = 0; m < num_rows; m++)
        for (int64_t r = 0; r < num_ranks; r++)
            for (int64_t k = whole; k < in; k++)
                low[m * a->low_stride + rank + r] +=
                    load_one(a->x, (row + m) * a->x_stride + k, dtype) *
                    load_one(w->lora_A, (rank + r) * in + k, dtype);
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

/* ROWS rows, or fewer, by some vectors of a part's columns. low: of the first of these rows. */
INLINE void expand_tile(
    const struct lora *a, const struct lora_part *part, const struct lora_weights *w, const float *low,
    int64_t row, int64_t num_rows, int64_t column, int num_vectors)
{
    const int dtype = a->dtype;
    floats s[ROWS][WIDE];
    for (int64_t m = 0; m < num_rows; m++)
        for (int v = 0; v < num_vectors; v++)
            s[m][v] = splat(0.0f);
    for (int64_t r = 0; r < w->rank; r++)
        for (int v = 0; v < num_vectors; v++) {
            int64_t at = r * part->out_features + column + v * LANES;
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

static void expand_columns(
    const struct lora *a, const struct lora_part *part, const struct lora_weights *w, const float *low,
    int64_t row, int64_t num_rows, int64_t first, int64_t end)
{
    const int64_t stride = a->low_stride;
    int64_t column = first;
    for (; column + WIDE * LANES <= end; column += WIDE * LANES) {
        int64_t m = 0;
        for (; m + ROWS <= num_rows; m += ROWS)
            expand_tile(a, part, w, low + m * stride, row + m, ROWS, column, WIDE);
        for (; m < num_rows; m++)
            expand_tile(a, part, w, low + m * stride, row + m, 1, column, WIDE);
    }
    for (; column + LANES <= end; column += LANES)
        for (int64_t m = 0; m < num_rows; m++)
            expand_tile(a, part, w, low + m * stride, row + m, 1, column, 1);
    for (; column < end; column++)
        for (int64_t m = 0; m < num_rows; m++) {
            float delta = 0.0f;
            for (int64_t r = 0; r < w->rank; r++)
                delta += low[m * stride + r] *
                         load_one(w->lora_B, r * part->out_features + column, a->dtype);
            int64_t at = (row + m) * a->y_stride + part->column + column;
            float y = load_one(a->y, at, a->dtype);
            store_one(a->y, at, adapted_one(w, part->base_bias, column, y, delta, a->dtype), a->dtype);
        }
}

static void shrink_rows(
    const struct lora *a, const struct lora_weights *w, float *low, int64_t row, int64_t num_rows,
    int64_t first, int64_t end)
{
    for (int64_t rank = first; rank < end; rank += RANKS) {
        const int64_t num_ranks = end - rank < RANKS ? end - rank : RANKS;
        for (int64_t m = 0; m < num_rows; m += ROWS) {
            const int64_t own = num_rows - m < ROWS ? num_rows - m : ROWS;
            float *to = low + m * a->low_stride;
            if (m == 0 && rank + RANKS < end)
                shrink_tile(a, w, to, row + m, own, rank, num_ranks, 1);
            else
                shrink_tile(a, w, to, row + m, own, rank, num_ranks, 0);
        }
    }
}

/* One phase: blocks of a segment's rows by pieces of the ranks, or of the columns, of a part. Every thread walks
 * all of them in one order and does those that it takes. */
static void walk(const struct lora *a, struct worker *worker, int phase)
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
                        expand_columns(a, part, w, low, row, num_rows, at, at + size);
                    else
                        shrink_rows(a, w, low, row, num_rows, at, at + size);
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
    walk(call, worker, 0);
    walk(call, worker, 1);
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
