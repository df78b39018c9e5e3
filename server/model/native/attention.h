/* Attention over a paged KV cache: what the kernels of decode rows and of prompts have in common. */
#ifndef FATHOM_ATTENTION_H
#define FATHOM_ATTENTION_H

#include "pass.h"
#include "team.h"
#include "vector.h"

struct attention {
    void *out;         /* [num_rows, num_heads, value_dim] */
    const void *query; /* [num_rows, num_heads, head_dim], strides in elements */
    int64_t query_row_stride, query_head_stride;
    void *keys, *values; /* [num_blocks, block_size, num_kv_heads, head_dim or value_dim] */
    const int64_t *block_table; /* [num_rows, table_width] */
    const int64_t *kv_lens;     /* [num_rows], the query's own token included */
    int64_t table_width, block_size, num_rows, num_heads, num_kv_heads, head_dim, value_dim;
    int64_t window; /* keys that a query sees at most; 0 is all */
    float scaling, softcap; /* softcap 0 is none */
    const float *sinks;     /* [num_heads], or null */
    int dtype;
};

/* The first token that a query sees, which is the last of so many. */
INLINE int64_t first_seen(const struct attention *a, int64_t kv_len)
{
    return a->window && kv_len > a->window ? kv_len - a->window : 0;
}

/* Where a token of the sequence with these blocks lies. */
INLINE int64_t pool_row(const struct attention *a, const int64_t *blocks, int64_t token)
{
    return blocks[token / a->block_size] * a->block_size + token % a->block_size;
}

/* What prompts of a step are given to the threads as: some rows of a span with one key-value head each. */
struct prompts {
    const struct span *spans;
    int64_t rows_per_item;
    int64_t num_items;
    int64_t num_scratch; /* floats that computing one takes */
};

struct prompts prompts_of(
    const struct attention *a, const struct span *spans, int64_t num_spans, int64_t num_threads);

/* Leaves the outputs in scratch, `write_prompt` takes them from there. */
void attend_prompt(const struct attention *a, const struct prompts *prompts, int64_t item, float *scratch);
void write_prompt(const struct attention *a, const struct prompts *prompts, int64_t item, const float *scratch);

#endif
