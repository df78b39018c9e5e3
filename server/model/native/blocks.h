/* Products by blocks of outputs: what the kernels that multiply have in common. */
#ifndef FATHOM_BLOCKS_H
#define FATHOM_BLOCKS_H

#include "team.h"
#include "vector.h"

enum {
    BLOCK = 64, /* outputs that lie together: of int8 weights an input's are one line of the cache */
    TILE = 66   /* rows whose sums are held at once: a multiple of as many as any kernel does at once */
};

/* x [num_rows, in_features] of this dtype as float32: where it lies, or this thread's own copy, made once for all
 * blocks that it takes and valid until its next. `stride`, from row to row, becomes that of what is returned. */
const float *as_floats(const void *x, int64_t *stride, int dtype, int64_t num_rows, int64_t in_features);

/* Makes sums [num_rows, BLOCK] of the rows from first_row on by a block. `wanted`: what is read after it, or null. */
typedef void multiply_tile_function(
    const void *product, int64_t block, int64_t first_row, int64_t num_rows, const void *wanted, float *sums);

/* Writes what came of it to the output. */
typedef void write_tile_function(
    const void *product, int64_t block, int64_t first_row, int64_t num_rows, const float *sums);

/* A step, each block an open item of it. packed: the weights, a block of so many bytes after the other. */
INLINE void multiply_blocks(
    const void *product, int64_t num_rows, int64_t out_features, const void *packed, int64_t block_size,
    struct worker *worker, multiply_tile_function *multiply_tile, write_tile_function *write_tile)
{
    const int64_t num_blocks = num_rows ? (out_features + BLOCK - 1) / BLOCK : 0;
    float sums[TILE * BLOCK] __attribute__((aligned(64)));
    int64_t block, then;
    while ((block = open_item(worker, 0, num_blocks, &then)) >= 0) {
        int is_wanted = 1;
        for (int64_t row = 0; row < num_rows && is_wanted; row += TILE) {
            const int64_t rest = num_rows - row, num = rest < TILE ? rest : TILE;
            const char *wanted = 0;
            if (rest <= TILE && then >= 0)
                wanted = (const char *)packed + then * block_size;
            multiply_tile(product, block, row, num, wanted, sums);
            if (row == 0)
                is_wanted = may_write(worker);
            if (is_wanted)
                write_tile(product, block, row, num, sums);
        }
        if (is_wanted)
            items_done(worker, 0, 1);
    }
}

#endif
