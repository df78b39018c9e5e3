/* As many floats at once as the processor has lanes, in the compilers' own vector types (GCC, Clang): no
 * instruction is named, so one source serves AVX-512, AVX2, SSE and NEON, as the build's -march says.
 *
 * Elements are float32 or bfloat16; all arithmetic is float32. */
#ifndef FATHOM_VECTOR_H
#define FATHOM_VECTOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

/* By value over calls would be another ABI with another -march. */
#define INLINE static inline __attribute__((always_inline))

/* A call with a number of rows as the constant N: `num`, or `most` (8 at the most) where there are more. */
#define WITH_ROWS(num, most, call)                     \
    switch ((num) < (most) ? (num) : (most)) {         \
    case 1: { enum { N = 1 }; call; } break;           \
    WITH_N(2, most, call)                              \
    WITH_N(3, most, call)                              \
    WITH_N(4, most, call)                              \
    WITH_N(5, most, call)                              \
    WITH_N(6, most, call)                              \
    WITH_N(7, most, call)                              \
    WITH_N(8, most, call)                              \
    }
#define WITH_N(n, most, call) \
    case n: { enum { N = (n) < (most) ? (n) : (most) }; call; } break;

enum { FLOAT32 = 0, BFLOAT16 = 1 };

INLINE int64_t size_of(int dtype) { return dtype == FLOAT32 ? 4 : 2; }

INLINE floats load_floats(const float *from)
{
    floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store_floats(float *to, floats v) { memcpy(to, &v, sizeof v); }

INLINE floats load(const void *from, int64_t index, int dtype)
{
    if (dtype == FLOAT32)
        return load_floats((const float *)from + index);
    halves h;
    memcpy(&h, (const uint16_t *)from + index, sizeof h);
    return (floats)(__builtin_convertvector(h, words) << 16);
}

INLINE float load_one(const void *from, int64_t index, int dtype)
{
    if (dtype == FLOAT32)
        return ((const float *)from)[index];
    uint32_t word = (uint32_t)((const uint16_t *)from)[index] << 16;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

/* bfloat16 of the nearest value, ties to even; a NaN stays one. */
INLINE void store(void *to, int64_t index, floats v, int dtype)
{
    if (dtype == FLOAT32) {
        store_floats((float *)to + index, v);
        return;
    }
    words w = (words)v;
    words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
    words is_nan = (words)(v != v);
    rounded = (rounded & ~is_nan) | (((w >> 16) | 0x40) & is_nan);
    halves h = __builtin_convertvector(rounded, halves);
    memcpy((uint16_t *)to + index, &h, sizeof h);
}

INLINE void store_one(void *to, int64_t index, float value, int dtype)
{
    if (dtype == FLOAT32) {
        ((float *)to)[index] = value;
        return;
    }
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    ((uint16_t *)to)[index] = (uint16_t)(value != value ? (word >> 16) | 0x40 : rounded);
}

INLINE floats splat(float value) { return (floats){} + value; }

INLINE floats choose(ints which, floats yes, floats no)
{
    return (floats)(((ints)yes & which) | ((ints)no & ~which));
}

/* The sum of all lanes, in one fixed order. */
INLINE float sum(floats v)
{
#if LANES == 16
    typedef float eight __attribute__((vector_size(32)));
    eight e = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
              __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
#elif LANES == 8
    floats e = v;
#endif
    typedef float four __attribute__((vector_size(16)));
#if LANES == 4
    four f = v;
#else
    four f = __builtin_shufflevector(e, e, 0, 1, 2, 3) + __builtin_shufflevector(e, e, 4, 5, 6, 7);
#endif
    return (f[0] + f[2]) + (f[1] + f[3]);
}

/* e^x, for x of at most 0 or not a number; 2 units in the last place of float32.
 *
 * x = n ln 2 + r with |r| <= ln 2 / 2, e^r by its Taylor series to the seventh power, which is off by
 * less than 1e-8 there, and 2^n by the exponent's bits. */
INLINE floats exp_of_nonpositive(floats x)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to a whole number */
    floats held = choose(x < splat(-87.0f), splat(-87.0f), x);
    floats shifted = held * 1.44269504f + magic;
    ints n = (ints)shifted - (ints)splat(magic);
    floats whole = shifted - magic;
    floats r = held - whole * 0.693359375f + whole * 2.12194440e-4f;
    floats series = splat(1.0f / 5040.0f);
    series = series * r + 1.0f / 720.0f;
    series = series * r + 1.0f / 120.0f;
    series = series * r + 1.0f / 24.0f;
    series = series * r + 1.0f / 6.0f;
    series = series * r + 0.5f;
    series = series * r + 1.0f;
    series = series * r + 1.0f;
    floats result = (floats)((ints)series + (n << 23));
    result = choose(x < splat(-87.0f), splat(0.0f), result);
    return choose(x == x, result, x);
}

#endif
