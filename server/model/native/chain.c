/* A chain of elementwise operators over many short vectors, in one pass: what a decoder layer does between
 * its matrix products (norms, rotary embeddings, activations, residuals), each vector a head or a row.
 *
 * The chain is data, not code: `server/model/replay/chain.py` writes it from the operators that a forward
 * pass was seen to call, and each works on a whole vector, so that choosing the operator costs little. A
 * vector is computed by itself, in one fixed order: its result does not depend on the others' number. */
#include "team.h"
#include "vector.h"

#include <stdlib.h>

enum {
    MAX_OUTER = 4,
    CHUNKS_PER_THREAD = 4,
    SHARED_FLOATS = 1 << 15 /* computed by a chain that is worth waking other threads for */
};

enum code {
    LOAD,
    STORE,
    COPY,
    ADD,
    SUB,
    MUL,
    DIV,
    NEG,
    SQUARE,
    RSQRT,
    MEAN,
    SIGMOID,
    SILU,
    TANH,
    GELU_TANH,
    RELU,
    ROUND, /* to the nearest bfloat16 */
    NUM_CODES
};

/* What an operator's second argument is. */
enum { VECTOR = 0, FIRST = 1, CONSTANT = 2 }; /* a register, a register's first element, `value` */

struct chain_operand {
    char *address;
    int64_t strides[MAX_OUTER]; /* in bytes, of the outer dimensions; 0 repeats */
    int64_t dtype;
};

/* out, a, b: floats from the start of the registers (LOAD and STORE: `b` is the operand). */
struct chain_op {
    int32_t code, kind;
    int32_t out, a, b;
    int32_t length;
    float value;
    int32_t unused;
};

struct chain {
    struct chain_operand *operands;
    const struct chain_op *ops;
    int64_t num_ops;
    int64_t sizes[MAX_OUTER]; /* of the outer dimensions, padded in front with 1 */
    int64_t num_vectors;      /* their product */
    int64_t num_floats;       /* of the registers, a multiple of 16 */
    int64_t num_computed;     /* floats that its operators compute of a vector */
};

const int64_t fathom_sizeof_chain = sizeof(struct chain);
const int64_t fathom_sizeof_chain_op = sizeof(struct chain_op);
const int64_t fathom_sizeof_chain_operand = sizeof(struct chain_operand);
const int64_t fathom_num_chain_codes = NUM_CODES;

/* 1 / (1 + e^-x), without overflow on either side. */
INLINE floats sigmoid_of(floats x)
{
    floats minus_abs = choose(x > splat(0.0f), -x, x);
    floats e = exp_of_nonpositive(minus_abs);
    return choose(x > splat(0.0f), splat(1.0f), e) / (splat(1.0f) + e);
}

/* sign(x) (1 - e^(-2|x|)) / (1 + e^(-2|x|)); near 0, where that cancels, the odd series up to x^7. */
INLINE floats tanh_of(floats x)
{
    floats minus_abs = choose(x > splat(0.0f), -x, x);
    floats e = exp_of_nonpositive(minus_abs * 2.0f);
    floats far = (splat(1.0f) - e) / (splat(1.0f) + e);
    far = choose(x < splat(0.0f), -far, far);
    floats square = x * x;
    floats near = square * (-17.0f / 315.0f) + 2.0f / 15.0f;
    near = near * square - 1.0f / 3.0f;
    near = x + x * square * near;
    floats result = choose(minus_abs > splat(-0.1f), near, far);
    return choose(x == x, result, x);
}

/* As torch's: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))). */
INLINE floats gelu_tanh_of(floats x)
{
    floats inner = (x + x * x * x * 0.044715f) * 0.7978845608f;
    return x * 0.5f * (splat(1.0f) + tanh_of(inner));
}

INLINE floats rounded(floats v)
{
    words w = (words)v;
    words up = (w + 0x7fff + ((w >> 16) & 1)) & 0xffff0000u;
    return choose(v == v, (floats)up, v);
}

/* Reads `length` elements; whole vectors where they are, and never past the end. */
INLINE void load_row(float *to, const char *from, int64_t length, int dtype)
{
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES)
        store_floats(to + i, load(from, i, dtype));
    for (; i < length; i++)
        to[i] = load_one(from, i, dtype);
}

INLINE void store_row(char *to, const float *from, int64_t length, int dtype)
{
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES)
        store(to, i, load_floats(from + i), dtype);
    for (; i < length; i++)
        store_one(to, i, from[i], dtype);
}

/* Registers are rounded up to whole vectors, so what computes may run past a length: nobody reads it. */
#define EACH(expression)                              \
    for (int64_t i = 0; i < op->length; i += LANES) { \
        floats x = load_floats(a + i);                \
        store_floats(out + i, expression);            \
    }                                                 \
    break;

#define WITH_SECOND(expression)                               \
    if (op->kind == VECTOR) {                                 \
        const float *b = r + op->b;                           \
        for (int64_t i = 0; i < op->length; i += LANES) {     \
            floats x = load_floats(a + i), y = load_floats(b + i); \
            store_floats(out + i, expression);                \
        }                                                     \
    } else {                                                  \
        const floats y = splat(op->kind == FIRST ? r[op->b] : op->value); \
        for (int64_t i = 0; i < op->length; i += LANES) {     \
            floats x = load_floats(a + i);                    \
            store_floats(out + i, expression);                \
        }                                                     \
    }                                                         \
    break;

INLINE float mean_of(const float *a, int64_t length)
{
    floats total = splat(0.0f);
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES)
        total += load_floats(a + i);
    float rest = 0.0f;
    for (; i < length; i++)
        rest += a[i];
    return (sum(total) + rest) / (float)length;
}

static void run_vector(const struct chain *c, const int64_t *offsets, float *r)
{
    for (const struct chain_op *op = c->ops, *end = op + c->num_ops; op < end; op++) {
        float *out = r + op->out;
        const float *a = r + op->a;
        switch (op->code) {
        case LOAD: {
            const struct chain_operand *from = c->operands + op->b;
            load_row(out, from->address + offsets[op->b], op->length, (int)from->dtype);
            break;
        }
        case STORE: {
            const struct chain_operand *to = c->operands + op->b;
            store_row(to->address + offsets[op->b], a, op->length, (int)to->dtype);
            break;
        }
        case COPY: EACH(x)
        case ADD: WITH_SECOND(x + y)
        case SUB: WITH_SECOND(x - y)
        case MUL: WITH_SECOND(x * y)
        case DIV: WITH_SECOND(x / y)
        case NEG: EACH(-x)
        case SQUARE: EACH(x * x)
        case RSQRT:
            for (int64_t i = 0; i < op->length; i++)
                out[i] = 1.0f / sqrtf(a[i]);
            break;
        case MEAN: out[0] = mean_of(a, op->length); break;
        case SIGMOID: EACH(sigmoid_of(x))
        case SILU: EACH(x * sigmoid_of(x))
        case TANH: EACH(tanh_of(x))
        case GELU_TANH: EACH(gelu_tanh_of(x))
        case RELU: EACH(choose(x < splat(0.0f), splat(0.0f), x))
        case ROUND: EACH(rounded(x))
        }
    }
}

enum { MAX_OPERANDS = 96 };

/* A step. */
void fathom_chain(const void *call, struct worker *worker)
{
    const struct chain *c = call;
    const int is_shared = c->num_vectors * c->num_computed >= SHARED_FLOATS;
    int64_t num_items = is_shared ? worker->num_threads * CHUNKS_PER_THREAD : 1;
    const int64_t per_item = (c->num_vectors + num_items - 1) / num_items;
    num_items = per_item ? (c->num_vectors + per_item - 1) / per_item : 0;
    int64_t item = take_item(worker, 0);
    if (item >= num_items) {
        await_items(worker, 0, num_items);
        return;
    }
    float *registers = aligned_alloc(64, (size_t)c->num_floats * sizeof(float));
    int64_t num_operands = 0, offsets[MAX_OPERANDS];
    for (int64_t i = 0; i < c->num_ops; i++)
        if ((c->ops[i].code == LOAD || c->ops[i].code == STORE) && c->ops[i].b >= num_operands)
            num_operands = c->ops[i].b + 1;

    for (; item < num_items; item = take_item(worker, 0)) {
        const int64_t first = item * per_item;
        const int64_t end = first + per_item < c->num_vectors ? first + per_item : c->num_vectors;
        for (int64_t vector = first; vector < end; vector++) {
            int64_t at[MAX_OUTER], rest = vector;
            for (int d = MAX_OUTER - 1; d >= 0; d--) {
                at[d] = rest % c->sizes[d];
                rest /= c->sizes[d];
            }
            for (int64_t o = 0; o < num_operands; o++) {
                offsets[o] = 0;
                for (int d = 0; d < MAX_OUTER; d++)
                    offsets[o] += at[d] * c->operands[o].strides[d];
            }
            run_vector(c, offsets, registers);
        }
        items_done(worker, 0, 1);
    }
    free(registers);
    await_items(worker, 0, num_items);
}
