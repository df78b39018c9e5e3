#include "blocks.h"

#include <stdlib.h>

enum { LINE = 16 /* floats */ };

const float *as_floats(const void *x, int64_t *stride, int dtype, int64_t num_rows, int64_t in_features)
{
    static __thread float *room;
    static __thread int64_t num_held;
    if (dtype == FLOAT32)
        return x;
    const int64_t num = num_rows * in_features;
    if (num > num_held) {
        free(room);
        room = aligned_alloc(LINE * sizeof(float), (size_t)((num + LINE - 1) / LINE * LINE) * sizeof(float));
        if (!room)
            abort();
        num_held = num;
    }
    for (int64_t r = 0; r < num_rows; r++) {
        float *to = room + r * in_features;
        int64_t k = 0;
        for (; k + LANES <= in_features; k += LANES)
            store_floats(to + k, load(x, r * *stride + k, BFLOAT16));
        for (; k < in_features; k++)
            to[k] = load_one(x, r * *stride + k, BFLOAT16);
    }
    *stride = in_features;
    return room;
}
