/* The few operators of a step that no chain has: a row of a table for each index, what a rotary embedding makes
 * of positions, and that of a prompt few rows are read in the end. Of a step on few numbers each would take
 * longer to call by Python than to do.
 *
 * All values are dense. Indices are not checked: whoever takes token ids from outside does. */
#include "pass.h"
#include "team.h"

#include <math.h>
#include <string.h>

enum map_code { FROM_INT64, COS, SIN, NUM_MAP_CODES };

enum { PER_ITEM = 256 }; /* numbers */

struct gather {
    char *out;              /* [num_rows, row_bytes] */
    const char *table;      /* [any, row_bytes] */
    const int64_t *indices; /* [num_rows] */
    int64_t num_rows, row_bytes;
};

struct map {
    float *out;     /* [length] */
    const void *in; /* [length]: int64 of FROM_INT64, else float */
    int64_t length;
    int64_t code;
};

struct keep {
    char *rows;         /* as many as the step has */
    int64_t row_stride; /* bytes from one to the next */
    int64_t row_bytes;
};

const int64_t fathom_sizeof_gather = sizeof(struct gather);
const int64_t fathom_sizeof_map = sizeof(struct map);
const int64_t fathom_num_map_codes = NUM_MAP_CODES;
const int64_t fathom_sizeof_keep = sizeof(struct keep);

void fathom_gather(const void *call, struct worker *worker)
{
    const struct gather *g = call;
    int64_t row;
    while ((row = take_item(worker, 0)) < g->num_rows) {
        const char *from = g->table + g->indices[row] * g->row_bytes;
        memcpy(g->out + row * g->row_bytes, from, (size_t)g->row_bytes);
        items_done(worker, 0, 1);
    }
    await_items(worker, 0, g->num_rows);
}

void fathom_map(const void *call, struct worker *worker)
{
    const struct map *m = call;
    const int64_t num_items = (m->length + PER_ITEM - 1) / PER_ITEM;
    const float *floats = m->in;
    const int64_t *integers = m->in;
    int64_t item;
    while ((item = take_item(worker, 0)) < num_items) {
        const int64_t first = item * PER_ITEM;
        const int64_t end = first + PER_ITEM < m->length ? first + PER_ITEM : m->length;
        for (int64_t i = first; i < end; i++)
            m->out[i] = m->code == FROM_INT64 ? (float)integers[i]
                        : m->code == COS      ? cosf(floats[i])
                                              : sinf(floats[i]);
        items_done(worker, 0, 1);
    }
    await_items(worker, 0, num_items);
}

/* A step of a pass: the rows that are wanted move to the front, in their order. */
void fathom_keep_rows(const void *call, struct worker *worker)
{
    const struct keep *k = call;
    const struct pass *pass = worker->pass;
    if (!pass->wanted)
        return;
    if (take_item(worker, 0) == 0) {
        for (int64_t i = 0; i < pass->num_wanted; i++)
            if (pass->wanted[i] != i) /* then it lies behind, where nothing was moved to yet */
                memcpy(k->rows + i * k->row_stride, k->rows + pass->wanted[i] * k->row_stride,
                       (size_t)k->row_bytes);
        items_done(worker, 0, 1);
    }
    await_items(worker, 0, 1);
}
