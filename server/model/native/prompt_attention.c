/* Attention of prompts: several queries of one sequence against its keys and values, read where they lie in the
 * paged cache.
 *
 *     out = sum_t softmax_t(scaling * q . k_t) v_t        over t up to the query's own, with an online softmax
 *
 * Queries lie in strips, as outputs of packed weights do, so that scores are products of a key's elements and
 * vectors of queries, the softmax of a strip needs no sum over lanes, and keys and values are read in place.
 * What a query gets does not depend on those beside it: tiles begin at the same tokens for all, and of a token that
 * it does not see it adds zeros. */
#include "attention.h"

enum {
    STRIP = 16,  /* queries */
    VECTORS = STRIP / LANES,
    QUERIES = 64, /* for which keys and values are read at once: rows by heads of a group */
    TOKENS = 64, /* whose scores are held at once */
    KEYS = LANES == 16 ? 8 : LANES == 8 ? 6 : 2, /* against a strip of queries, with sums in registers */
    ROWS = KEYS, /* of outputs at once against a strip of their columns, likewise */
    LINE = 64    /* bytes */
};

/* Some rows of a span with one key-value head, its group's heads beside each other: query r is that of row
 * r / group and head r % group of the group. */
struct item {
    const struct span *span;
    int64_t first, num_rows; /* of the span */
    int64_t kv_head, group, num_queries, num_strips;
};

static int64_t blocks_of(const struct span *span, int64_t rows_per_item)
{
    return (span->num_rows + rows_per_item - 1) / rows_per_item;
}

/* Those that see most come first. */
static struct item item_at(const struct attention *a, const struct prompts *prompts, int64_t index)
{
    const struct span *span = prompts->spans;
    int64_t num_blocks;
    for (; (num_blocks = blocks_of(span, prompts->rows_per_item)) * a->num_kv_heads <= index; span++)
        index -= num_blocks * a->num_kv_heads;
    struct item item = {.span = span, .kv_head = index % a->num_kv_heads, .group = a->num_heads / a->num_kv_heads};
    item.first = (num_blocks - 1 - index / a->num_kv_heads) * prompts->rows_per_item;
    const int64_t rest = span->num_rows - item.first;
    item.num_rows = rest < prompts->rows_per_item ? rest : prompts->rows_per_item;
    item.num_queries = item.num_rows * item.group;
    item.num_strips = (item.num_queries + STRIP - 1) / STRIP;
    return item;
}

/* Parts of the memory that an item is computed in, each of whole lines of the cache. */
struct scratch {
    float *query;   /* [num_strips, head_dim, STRIP] */
    float *out;     /* [num_strips * STRIP, value_dim] */
    float *scores;  /* [TOKENS, STRIP], of one strip, then its weights */
    float *kept;    /* [STRIP]: what its output so far is multiplied by */
    float *largest, *total; /* [num_strips * STRIP] */
    float *keys, *values;   /* [TOKENS, head_dim or value_dim]: bfloat16 as float32 */
    float *end;
};

static struct scratch lay_out(const struct attention *a, int64_t num_strips, float *memory)
{
    struct scratch s = {.query = memory};
    s.out = s.query + num_strips * STRIP * a->head_dim;
    s.scores = s.out + num_strips * STRIP * a->value_dim;
    s.kept = s.scores + TOKENS * STRIP;
    s.largest = s.kept + STRIP;
    s.total = s.largest + num_strips * STRIP;
    s.keys = s.total + num_strips * STRIP;
    s.values = s.keys + (a->dtype == FLOAT32 ? 0 : TOKENS * a->head_dim);
    s.end = s.values + (a->dtype == FLOAT32 ? 0 : TOKENS * a->value_dim);
    return s;
}

struct prompts prompts_of(
    const struct attention *a, const struct span *spans, int64_t num_spans, int64_t num_threads)
{
    const int64_t group = a->num_heads / a->num_kv_heads;
    struct prompts prompts = {.spans = spans};
    prompts.rows_per_item = group < QUERIES ? QUERIES / group : 1;
    for (;;) {
        prompts.num_items = 0;
        for (int64_t i = 0; i < num_spans; i++)
            prompts.num_items += blocks_of(spans + i, prompts.rows_per_item) * a->num_kv_heads;
        const int is_least = prompts.rows_per_item == 1 || prompts.rows_per_item * group <= STRIP;
        if (prompts.num_items >= 2 * num_threads || is_least)
            break;
        prompts.rows_per_item = (prompts.rows_per_item + 1) / 2;
    }
    const int64_t num_strips = (prompts.rows_per_item * group + STRIP - 1) / STRIP;
    prompts.num_scratch = lay_out(a, num_strips, 0).end - (float *)0;
    return prompts;
}

/* scores[t] = query . key_t for a strip of queries [dim, STRIP]. */
INLINE void score_keys(
    const float *query, const float *const *keys, int64_t dim, float *scores, const int num)
{
    floats s[KEYS][VECTORS];
    for (int t = 0; t < num; t++)
        for (int v = 0; v < VECTORS; v++)
            s[t][v] = splat(0.0f);
    for (int64_t d = 0; d < dim; d++) {
        floats own[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            own[v] = load_floats(query + d * STRIP + v * LANES);
        for (int t = 0; t < num; t++) {
            const float factor = keys[t][d];
            for (int v = 0; v < VECTORS; v++)
                s[t][v] += own[v] * factor;
        }
    }
    for (int t = 0; t < num; t++)
        for (int v = 0; v < VECTORS; v++)
            store_floats(scores + t * STRIP + v * LANES, s[t][v]);
}

/* out[q] = kept[q] * out[q] + sum_t weights[t][q] value_t, a strip of columns of some queries. */
INLINE void add_values(
    float *out, int64_t stride, const float *kept, const float *weights, const float *const *values,
    int64_t column, int64_t num_tokens, const int num)
{
    floats s[ROWS][VECTORS];
    for (int q = 0; q < num; q++)
        for (int v = 0; v < VECTORS; v++)
            s[q][v] = load_floats(out + q * stride + v * LANES) * kept[q];
    for (int64_t t = 0; t < num_tokens; t++) {
        floats own[VECTORS];
        for (int v = 0; v < VECTORS; v++)
            own[v] = load_floats(values[t] + column + v * LANES);
        for (int q = 0; q < num; q++) {
            const float weight = weights[t * STRIP + q];
            for (int v = 0; v < VECTORS; v++)
                s[q][v] += own[v] * weight;
        }
    }
    for (int q = 0; q < num; q++)
        for (int v = 0; v < VECTORS; v++)
            store_floats(out + q * stride + v * LANES, s[q][v]);
}

/* Makes a strip's scores weights relative to its largest scores so far, and its `kept`. first: the token of the
 * first score. positions: of the strip's queries. */
INLINE void weigh(
    const struct attention *a, float *scores, int64_t first, int64_t num_tokens, const int32_t *positions,
    const int is_masked, float *largest, float *total, float *kept)
{
    if (a->softcap != 0.0f)
        for (int64_t i = 0; i < num_tokens * STRIP; i++)
            scores[i] = tanhf(scores[i] * a->scaling / a->softcap) * a->softcap;
    const floats scaling = splat(a->softcap != 0.0f ? 1.0f : a->scaling);
    const floats nothing = splat(-INFINITY);
    for (int v = 0; v < VECTORS; v++) {
        float *own = scores + v * LANES;
        ints position;
        memcpy(&position, positions + v * LANES, sizeof position);
        const floats before = load_floats(largest + v * LANES);
        floats most = before;
        for (int64_t t = 0; t < num_tokens; t++) {
            floats score = load_floats(own + t * STRIP) * scaling;
            if (is_masked) {
                const ints distance = position - (int32_t)(first + t);
                ints is_seen = distance >= 0;
                if (a->window)
                    is_seen &= distance < (int32_t)a->window;
                score = choose(is_seen, score, nothing);
            }
            store_floats(own + t * STRIP, score);
            most = choose(score > most, score, most);
        }
        /* A query that has seen nothing yet has only weights of zero. */
        const floats from = choose(most == nothing, splat(0.0f), most);
        const floats left = exp_of_nonpositive(before - from);
        floats added = splat(0.0f);
        for (int64_t t = 0; t < num_tokens; t++) {
            const floats weight = exp_of_nonpositive(load_floats(own + t * STRIP) - from);
            store_floats(own + t * STRIP, weight);
            added += weight;
        }
        store_floats(kept + v * LANES, left);
        store_floats(total + v * LANES, load_floats(total + v * LANES) * left + added);
        store_floats(largest + v * LANES, most);
    }
}

/* Where the rows of tokens [first, first + num) lie for one head, as float32. */
INLINE void find_rows(
    const struct attention *a, const void *pool, const int64_t *blocks, int64_t first, int64_t num,
    int64_t kv_head, int64_t dim, float *wide, const float **rows, const int dtype)
{
    for (int64_t t = 0; t < num; t++) {
        const int64_t at = (pool_row(a, blocks, first + t) * a->num_kv_heads + kv_head) * dim;
        if (dtype == FLOAT32) {
            rows[t] = (const float *)pool + at;
            for (int64_t d = 0; d < dim; d += LINE / (int64_t)sizeof(float))
                __builtin_prefetch(rows[t] + d, 0, 2);
        } else {
            for (int64_t d = 0; d < dim; d += LANES)
                store_floats(wide + t * dim + d, load(pool, at + d, dtype));
            rows[t] = wide + t * dim;
        }
    }
}

INLINE void attend_item(const struct attention *a, const struct item *item, struct scratch s, const int dtype)
{
    const int64_t dim = a->head_dim, value_dim = a->value_dim, first_head = item->kv_head * item->group;
    const int64_t num_padded = item->num_strips * STRIP;
    const int64_t first_position = item->span->kv_len - item->span->num_rows + item->first;
    int32_t positions[num_padded];
    memset(s.out, 0, (size_t)(num_padded * value_dim) * sizeof(float));
    for (int64_t r = 0; r < num_padded; r++) {
        const int64_t query = r < item->num_queries ? r : item->num_queries - 1; /* what pads is like the last */
        const int64_t head = first_head + query % item->group, row = item->first + query / item->group;
        const int64_t from = (item->span->first_row + row) * a->query_row_stride + head * a->query_head_stride;
        float *to = s.query + r / STRIP * STRIP * dim + r % STRIP;
        for (int64_t d = 0; d < dim; d++)
            to[d * STRIP] = load_one(a->query, from + d, dtype);
        positions[r] = (int32_t)(first_position + query / item->group);
        s.largest[r] = a->sinks ? a->sinks[head] : -INFINITY;
        s.total[r] = a->sinks ? 1.0f : 0.0f;
    }
    const int64_t end = first_position + item->num_rows;
    int64_t token = first_seen(a, first_position + 1);
    while (token < end) {
        const int64_t then = token - token % TOKENS + TOKENS;
        const int64_t num = (then < end ? then : end) - token;
        const float *keys[TOKENS], *values[TOKENS];
        find_rows(a, a->keys, item->span->blocks, token, num, item->kv_head, dim, s.keys, keys, dtype);
        find_rows(a, a->values, item->span->blocks, token, num, item->kv_head, value_dim, s.values, values, dtype);
        for (int64_t strip = 0; strip < item->num_strips; strip++) {
            const int32_t *own = positions + strip * STRIP;
            const int64_t lowest = own[0], highest = own[STRIP - 1];
            const int64_t num_seen = highest + 1 - token < num ? highest + 1 - token : num;
            if (num_seen <= 0)
                continue;
            const float *query = s.query + strip * STRIP * dim;
            for (int64_t t = 0; t < num_seen; t += KEYS)
                WITH_ROWS(num_seen - t, KEYS, score_keys(query, keys + t, dim, s.scores + t * STRIP, N))
            const int is_masked =
                token + num_seen - 1 > lowest || (a->window && highest - token >= a->window);
            float *largest = s.largest + strip * STRIP, *total = s.total + strip * STRIP;
            if (is_masked)
                weigh(a, s.scores, token, num_seen, own, 1, largest, total, s.kept);
            else
                weigh(a, s.scores, token, num_seen, own, 0, largest, total, s.kept);
            for (int64_t column = 0; column < value_dim; column += STRIP)
                for (int64_t q = 0; q < STRIP; q += ROWS) {
                    float *out = s.out + (strip * STRIP + q) * value_dim + column;
                    WITH_ROWS(STRIP - q, ROWS, add_values(
                        out, value_dim, s.kept + q, s.scores + q, values, column, num_seen, N))
                }
        }
        token = then;
    }
}

void attend_prompt(const struct attention *a, const struct prompts *prompts, int64_t index, float *scratch)
{
    const struct item item = item_at(a, prompts, index);
    const struct scratch s = lay_out(a, item.num_strips, scratch);
    if (a->dtype == FLOAT32)
        attend_item(a, &item, s, FLOAT32);
    else
        attend_item(a, &item, s, BFLOAT16);
}

void write_prompt(const struct attention *a, const struct prompts *prompts, int64_t index, const float *scratch)
{
    const struct item item = item_at(a, prompts, index);
    const struct scratch s = lay_out(a, item.num_strips, (float *)scratch);
    for (int64_t r = 0; r < item.num_queries; r++) {
        const int64_t row = item.span->first_row + item.first + r / item.group;
        const int64_t to = (row * a->num_heads + item.kv_head * item.group + r % item.group) * a->value_dim;
        for (int64_t i = 0; i < a->value_dim; i += LANES)
            store(a->out, to + i, load_floats(s.out + r * a->value_dim + i) / s.total[r], a->dtype);
    }
}
