/* One decode step of attention over a paged KV cache: each sequence's one query against its own keys
 * and values, read where they lie.
 *
 *     out = sum_t softmax_t(scaling * q . k_t) v_t        over t of the sequence, with an online softmax
 *
 * What `server/model/attention.py` computes by gathering; tests hold the two against each other. */
#include "attention.h"

#include <stdlib.h>

enum { TILE = 64 }; /* tokens whose scores are held at once */

const int64_t fathom_sizeof_attention = sizeof(struct attention);

/* Tokens that share what is loaded of a query or an output. */
enum { TOKENS = 4 };

/* The number of vectors in a head as a constant where it is a usual one. */
#define FOR_WIDTHS(num_vectors, body)                       \
    switch (num_vectors) {                                  \
    case 64 / LANES: { enum { N = 64 / LANES }; body } break;   \
    case 128 / LANES: { enum { N = 128 / LANES }; body } break; \
    default: { const int64_t N = num_vectors; body } break; \
    }

/* scores[t] = scaling * query . key_t, for as many tokens as num says: a constant where it is called.
 * query [dim] float32; key at `offset`, the next token's `stride` further; dim a multiple of LANES. */
INLINE void score_tokens(
    const float *query, const void *key, int64_t offset, int64_t stride, int64_t dim, const int dtype,
    float scaling, float *scores, const int num)
{
    floats dot[TOKENS];
    for (int t = 0; t < num; t++)
        dot[t] = splat(0.0f);
    FOR_WIDTHS(dim / LANES, {
        for (int64_t i = 0; i < N; i++) {
            floats q = load_floats(query + i * LANES);
            for (int t = 0; t < num; t++)
                dot[t] += q * load(key, offset + t * stride + i * LANES, dtype);
        }
    })
    for (int t = 0; t < num; t++)
        scores[t] = sum(dot[t]) * scaling;
}

/* out [dim] float32 += sum_t weights[t] * value_t, likewise. */
INLINE void add_values(
    float *out, const void *value, int64_t offset, int64_t stride, int64_t dim, const int dtype,
    const float *weights, const int num)
{
    FOR_WIDTHS(dim / LANES, {
        for (int64_t i = 0; i < N; i++) {
            floats added = load_floats(out + i * LANES);
            for (int t = 0; t < num; t++)
                added += weights[t] * load(value, offset + t * stride + i * LANES, dtype);
            store_floats(out + i * LANES, added);
        }
    })
}

/* Turns a tile's scores into weights relative to the largest score so far; returns what the output so
 * far has to be multiplied by. */
INLINE float weigh(float *scores, int64_t num_tokens, float *largest, float *total)
{
    float most = *largest;
    for (int64_t t = 0; t < num_tokens; t++)
        most = scores[t] > most ? scores[t] : most;
    for (int64_t t = num_tokens; t % LANES; t++)
        scores[t] = -INFINITY;
    floats added = splat(0.0f);
    for (int64_t t = 0; t < num_tokens; t += LANES) {
        floats weight = exp_of_nonpositive(load_floats(scores + t) - most);
        store_floats(scores + t, weight);
        added += weight;
    }
    float kept = *largest == -INFINITY ? 0.0f : expf(*largest - most);
    *total = *total * kept + sum(added);
    *largest = most;
    return kept;
}

/* Tokens [0, num) of one tile: they lie one after the other in a block, from pool row `row` on. */
struct tile {
    int64_t num, row, next_row; /* next_row: where the following tile begins, -1 after the last */
};

INLINE struct tile tile_at(const struct attention *a, const int64_t *blocks, int64_t token, int64_t kv_len)
{
    struct tile tile = {.next_row = -1};
    tile.row = pool_row(a, blocks, token);
    tile.num = a->block_size - token % a->block_size;
    tile.num = tile.num < TILE ? tile.num : TILE;
    tile.num = tile.num < kv_len - token ? tile.num : kv_len - token;
    token += tile.num;
    if (token < kv_len)
        tile.next_row = pool_row(a, blocks, token);
    return tile;
}

/* Asks for one head of `num` rows of a pool before they are read: what the processor would ask for by itself
 * ends with the block. A head at a time, so that asking goes on beside multiplying. */
INLINE void fetch(
    const struct attention *a, const void *pool, int64_t row, int64_t num, int64_t head, int64_t dim,
    const int dtype)
{
    const int64_t size = size_of(dtype), row_size = a->num_kv_heads * dim * size;
    for (int64_t t = 0; t < num; t++) {
        const char *from = (const char *)pool + (row + t) * row_size + head * dim * size;
        for (int64_t at = 0; at < dim * size; at += 64)
            __builtin_prefetch(from + at, 0, 2);
    }
}

/* Some heads of the key-value heads of one sequence. */
struct item {
    int64_t seq, first, end;
};

INLINE struct item item_at(const struct attention *a, int64_t index, int64_t per_seq, int64_t heads)
{
    struct item item = {.seq = index / per_seq, .first = index % per_seq * heads};
    item.end = item.first + heads < a->num_kv_heads ? item.first + heads : a->num_kv_heads;
    return item;
}

INLINE int64_t first_token(const struct attention *a, int64_t seq) { return first_seen(a, a->kv_lens[seq]); }

/* Leaves the output in scratch, `write_item` takes it from there. `next`: what is read after it, or null.
 * scratch: floats, as many as `attend` says. */
INLINE void attend_item(
    const struct attention *a, const struct item *own, const struct item *next, float *scratch, const int dtype)
{
    const int64_t seq = own->seq, first = own->first, end = own->end;
    const int64_t dim = a->head_dim, value_dim = a->value_dim, group = a->num_heads / a->num_kv_heads;
    const int64_t num_heads = (end - first) * group;
    float *query = scratch, *out = query + num_heads * dim, *scores = out + num_heads * value_dim;
    float *largest = scores + num_heads * TILE, *total = largest + num_heads;

    for (int64_t h = 0; h < num_heads; h++) {
        int64_t from = seq * a->query_row_stride + (first * group + h) * a->query_head_stride;
        for (int64_t i = 0; i < dim; i += LANES)
            store_floats(query + h * dim + i, load(a->query, from + i, dtype));
        largest[h] = a->sinks ? a->sinks[first * group + h] : -INFINITY;
        total[h] = a->sinks ? 1.0f : 0.0f;
    }
    memset(out, 0, (size_t)(num_heads * value_dim) * sizeof(float));

    const int64_t *blocks = a->block_table + seq * a->table_width;
    const int64_t kv_len = a->kv_lens[seq];
    struct tile tile;
    for (int64_t token = first_token(a, seq); token < kv_len; token += tile.num) {
        tile = tile_at(a, blocks, token, kv_len);
        int64_t then = tile.next_row, then_first = first;
        if (then < 0 && next && a->kv_lens[next->seq] > 0) {
            const int64_t *next_blocks = a->block_table + next->seq * a->table_width;
            then = tile_at(a, next_blocks, first_token(a, next->seq), a->kv_lens[next->seq]).row;
            then_first = next->first;
        }
        const int64_t fours = tile.num - tile.num % TOKENS;
        const int64_t key_stride = a->num_kv_heads * dim, value_stride = a->num_kv_heads * value_dim;
        for (int64_t t = 0, num; t < tile.num; t += num) {
            num = t < fours ? TOKENS : 1;
            for (int64_t h = 0; h < num_heads; h++) {
                if (then >= 0 && h % group == 0)
                    fetch(a, a->keys, then + t, num, then_first + h / group, dim, dtype);
                int64_t offset = (tile.row + t) * key_stride + (first + h / group) * dim;
                const float *q = query + h * dim;
                float *score = scores + h * TILE + t;
                if (num == TOKENS)
                    score_tokens(q, a->keys, offset, key_stride, dim, dtype, a->scaling, score, TOKENS);
                else
                    score_tokens(q, a->keys, offset, key_stride, dim, dtype, a->scaling, score, 1);
            }
        }
        for (int64_t h = 0; h < num_heads; h++) {
            if (a->softcap != 0.0f)
                for (int64_t t = 0; t < tile.num; t++)
                    scores[h * TILE + t] = tanhf(scores[h * TILE + t] / a->softcap) * a->softcap;
            float kept = weigh(scores + h * TILE, tile.num, largest + h, total + h);
            for (int64_t i = 0; i < value_dim; i += LANES) {
                float *at = out + h * value_dim + i;
                store_floats(at, load_floats(at) * kept);
            }
        }
        for (int64_t t = 0, num; t < tile.num; t += num) {
            num = t < fours ? TOKENS : 1;
            for (int64_t h = 0; h < num_heads; h++) {
                if (then >= 0 && h % group == 0)
                    fetch(a, a->values, then + t, num, then_first + h / group, value_dim, dtype);
                int64_t offset = (tile.row + t) * value_stride + (first + h / group) * value_dim;
                float *to = out + h * value_dim;
                const float *weight = scores + h * TILE + t;
                if (num == TOKENS)
                    add_values(to, a->values, offset, value_stride, value_dim, dtype, weight, TOKENS);
                else
                    add_values(to, a->values, offset, value_stride, value_dim, dtype, weight, 1);
            }
        }
    }
    for (int64_t h = 0; h < num_heads; h++)
        for (int64_t i = 0; i < value_dim; i += LANES)
            store_floats(out + h * value_dim + i, load_floats(out + h * value_dim + i) / total[h]);
}

static void write_item(const struct attention *a, const struct item *own, const float *scratch)
{
    const int64_t group = a->num_heads / a->num_kv_heads, num_heads = (own->end - own->first) * group;
    const float *out = scratch + num_heads * a->head_dim;
    const int64_t to = (own->seq * a->num_heads + own->first * group) * a->value_dim;
    for (int64_t i = 0; i < num_heads * a->value_dim; i += LANES)
        store(a->out, to + i, load_floats(out + i), a->dtype);
}

/* How decode rows are given to the threads. */
struct decodes {
    int64_t num_rows;
    int64_t heads, per_row; /* key-value heads of an item, and items of a row */
    int64_t num_scratch;    /* floats */
};

/* Whole rows of the cache are read in order where there are enough sequences to go round; a few sequences
 * are shared out by heads. */
static struct decodes decodes_of(const struct attention *a, int64_t num_rows, int64_t num_threads)
{
    struct decodes d = {.num_rows = num_rows, .per_row = 1};
    while (d.per_row * num_rows < 4 * num_threads && d.per_row < a->num_kv_heads)
        d.per_row *= 2;
    d.heads = (a->num_kv_heads + d.per_row - 1) / d.per_row;
    d.per_row = (a->num_kv_heads + d.heads - 1) / d.heads;
    const int64_t num_queries = d.heads * (a->num_heads / a->num_kv_heads);
    d.num_scratch = num_queries * (a->head_dim + a->value_dim + TILE + 2);
    return d;
}

/* Decode rows first, then what spans say. */
static void attend(const struct attention *a, const struct pass *pass, struct worker *worker, int phase)
{
    const int64_t num_decodes = pass->num_spans ? pass->spans[0].first_row : a->num_rows;
    const struct decodes decodes = decodes_of(a, num_decodes, worker->num_threads);
    const struct prompts prompts = prompts_of(a, pass->spans, pass->num_spans, worker->num_threads);
    const int64_t num_own = decodes.num_rows * decodes.per_row, num_items = num_own + prompts.num_items;
    const int64_t most = num_own ? decodes.num_scratch : 0;
    const int64_t num_scratch = prompts.num_items && prompts.num_scratch > most ? prompts.num_scratch : most;
    float *scratch = aligned_alloc(64, (size_t)((num_scratch + 15) / 16 * 16) * sizeof(float));
    struct item own, next;
    int64_t taken, then;
    while ((taken = open_item(worker, phase, num_items, &then)) >= 0) {
        const int is_prompt = taken >= num_own;
        if (is_prompt) {
            attend_prompt(a, &prompts, taken - num_own, scratch);
        } else {
            own = item_at(a, taken, decodes.per_row, decodes.heads);
            next = item_at(a, then, decodes.per_row, decodes.heads);
            const struct item *following = then >= 0 && then < num_own ? &next : 0;
            if (a->dtype == FLOAT32)
                attend_item(a, &own, following, scratch, FLOAT32);
            else
                attend_item(a, &own, following, scratch, BFLOAT16);
        }
        if (may_write(worker)) {
            if (is_prompt)
                write_prompt(a, &prompts, taken - num_own, scratch);
            else
                write_item(a, &own, scratch);
            items_done(worker, phase, 1);
        }
    }
    free(scratch);
}

/* One layer of a pass: all that stays the same from run to run. */
struct attention_layer {
    struct attention attention; /* its rows are the pass's */
    const void *key, *value;    /* [num_rows, num_kv_heads, head_dim or value_dim], strides in elements */
    int64_t key_row_stride, key_head_stride, value_row_stride, value_head_stride;
};

const int64_t fathom_sizeof_attention_layer = sizeof(struct attention_layer);

/* Copies a row of keys or values [num_kv_heads, dim] into its slot of a pool. */
static void write_kv(
    const struct attention *a, void *pool, const void *rows, int64_t row, int64_t row_stride, int64_t head_stride,
    int64_t slot, int64_t dim)
{
    const int64_t size = size_of(a->dtype);
    for (int64_t h = 0; h < a->num_kv_heads; h++)
        memcpy(
            (char *)pool + (slot * a->num_kv_heads + h) * dim * size,
            (const char *)rows + (row * row_stride + h * head_stride) * size, (size_t)(dim * size));
}

/* A step of a pass: writes the rows' keys and values to the cache, then attends. */
void fathom_attention_layer(const void *call, struct worker *worker)
{
    const struct attention_layer *layer = call;
    const struct pass *pass = worker->pass;
    struct attention own = layer->attention;
    own.block_table = pass->block_table;
    own.kv_lens = pass->kv_lens;
    own.table_width = pass->table_width;
    for (int64_t row; (row = take_item(worker, 0)) < own.num_rows; items_done(worker, 0, 1)) {
        write_kv(
            &own, own.keys, layer->key, row, layer->key_row_stride, layer->key_head_stride, pass->slots[row],
            own.head_dim);
        write_kv(
            &own, own.values, layer->value, row, layer->value_row_stride, layer->value_head_stride,
            pass->slots[row], own.value_dim);
    }
    await_items(worker, 0, own.num_rows);
    attend(&own, pass, worker, 1);
}
