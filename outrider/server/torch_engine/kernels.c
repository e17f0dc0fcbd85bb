/* What a step of the engine spends its time on beside matrix products, for the CPU in float32. See kernels.py.

   Compiled once for each level of instructions: the compiler turns vectors of LANES floats into its instructions.
   A row's result depends on that row alone, never on what else is computed with it. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* Floats of one register. */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float floats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
/* Call for what will be read soon, as far as the second cache: the first has no room for it. */
#define FETCH(address) __builtin_prefetch(address, 0, 2)
#define INLINE static inline __attribute__((always_inline))

INLINE floats splat(float x) { return (floats){0} + x; }
INLINE floats load(const float *p) { return *(const floats *)p; }
INLINE void store(float *p, floats v) { *(floats *)p = v; }
INLINE floats select(ints mask, floats yes, floats no) { return (floats)((mask & (ints)yes) | (~mask & (ints)no)); }
INLINE floats larger(floats a, floats b) { return select(a > b, a, b); }

INLINE float sum(floats v) {
    float halves[LANES];
    store(halves, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) halves[i] += halves[i + width];
    return halves[0];
}

INLINE float largest(floats v) {
    float top = v[0];
    for (int i = 1; i < LANES; i++) top = v[i] > top ? v[i] : top;
    return top;
}

/* e^x for x <= 0, to about 2 units in the last place: 2^whole by the exponent's bits, 2^fraction by the polynomial
   that meets it at the Chebyshev points of [-1, 0]. NaN stays NaN. */
INLINE floats exponential(floats x) {
    x *= 1.44269504f;
    x = select(x < -126.0f, splat(-126.0f), x);
    ints whole = __builtin_convertvector(x, ints);
    floats f = x - __builtin_convertvector(whole, floats);
    floats y = splat(1.09328924e-04f);
    y = y * f + 1.27554014e-03f;
    y = y * f + 9.57985997e-03f;
    y = y * f + 5.54909321e-02f;
    y = y * f + 2.40224331e-01f;
    y = y * f + 6.93147045e-01f;
    y = y * f + 9.99999999e-01f;
    return y * (floats)((whole + 127) << 23);
}

/* cap x tanh(x / cap) */
INLINE floats capped(floats x, float cap) {
    floats y = x / cap, e = exponential(select(y < 0.0f, y, -y) * 2.0f), t = (1.0f - e) / (1.0f + e) * cap;
    return select(y < 0.0f, -t, t);
}

/* Keys lie in blocks of positions, [room / BLOCK, size, BLOCK]: all that a sequence has lies together, and scores of
   neighbouring positions are computed in one register. */
#define BLOCK 16
/* Sums kept apart, so that one addition need not wait for the other. */
#define SPLIT (LANES == BLOCK ? 2 : 1)

/* Scores of two queries against the keys of positions first to end, multiples of BLOCK. The values [room, size] of the
   same positions will be read next: they are called for meanwhile. */
INLINE void score(const float *q0, const float *q1, const float *keys, const float *values, int64_t size, int64_t first,
                  int64_t end, float *s0, float *s1) {
    for (int64_t p = first; p < end; p += BLOCK) {
        const float *k = keys + p * size, *ahead = values + p * size;
        floats a[SPLIT][BLOCK / LANES], c[SPLIT][BLOCK / LANES];
        for (int j = 0; j < SPLIT; j++)
            for (int i = 0; i < BLOCK / LANES; i++) a[j][i] = c[j][i] = splat(0);
        for (int64_t d = 0; d < size; d += SPLIT)
            for (int j = 0; j < SPLIT; j++) {
                FETCH(ahead + (d + j) * BLOCK);
                for (int i = 0; i < BLOCK / LANES; i++) {
                    floats x = load(k + (d + j) * BLOCK + i * LANES);
                    a[j][i] += q0[d + j] * x;
                    c[j][i] += q1[d + j] * x;
                }
            }
        for (int i = 0; i < BLOCK / LANES; i++) {
            for (int j = 1; j < SPLIT; j++) a[0][i] += a[j][i], c[0][i] += c[j][i];
            store(s0 + p + i * LANES, a[0][i]);
            store(s1 + p + i * LANES, c[0][i]);
        }
    }
}

/* Scores [first, end) to weights that still are to be divided by their sum, which is returned; around them, as far as
   blocks reach, scores are overwritten. */
INLINE float weigh(float *s, int64_t first, int64_t end, float scale, float softcap) {
    int64_t first_block = first / LANES * LANES;
    floats top = splat(-INFINITY), total = splat(0);
    for (int64_t p = first_block; p < first; p++) s[p] = -INFINITY;
    for (int64_t p = end; p % LANES; p++) s[p] = -INFINITY;
    for (int64_t b = first_block; b < end; b += LANES) {
        floats x = load(s + b) * scale;
        if (softcap > 0.0f) x = select(x == -INFINITY, x, capped(x, softcap));
        top = larger(x, top);
        store(s + b, x);
    }
    float shift = largest(top);
    for (int64_t b = first_block; b < end; b += LANES) {
        floats e = exponential(load(s + b) - shift);
        total += e;
        store(s + b, e);
    }
    return sum(total);
}

/* Sum of the values [room, size] of positions [first, end) by two rows of weights, two registers of columns at once.
   Meanwhile the keys that are read next are called for. */
INLINE void mix(const float *w0, const float *w1, const float *values, const float *next_keys, int64_t size,
                int64_t first, int64_t end, float divisor0, float divisor1, float *out0, float *out1) {
    int64_t d = 0;
    for (; d + 2 * LANES <= size; d += 2 * LANES) {
        floats a0 = splat(0), a1 = a0, c0 = a0, c1 = a0;
        for (int64_t p = first; p < end; p++) {
            if (d == 0)
                for (int64_t i = 0; i < size; i += BLOCK) FETCH(next_keys + p * size + i);
            floats x = load(values + p * size + d), y = load(values + p * size + d + LANES);
            a0 += w0[p] * x;
            a1 += w0[p] * y;
            c0 += w1[p] * x;
            c1 += w1[p] * y;
        }
        store(out1 + d, c0 / divisor1);
        store(out1 + d + LANES, c1 / divisor1);
        store(out0 + d, a0 / divisor0);
        store(out0 + d + LANES, a1 / divisor0);
    }
    if (d < size) {
        floats a = splat(0), c = a;
        for (int64_t p = first; p < end; p++) {
            floats x = load(values + p * size + d);
            a += w0[p] * x;
            c += w1[p] * x;
        }
        store(out1 + d, c / divisor1);
        store(out0 + d, a / divisor0);
    }
}

/* Put the keys and values of a step's tokens into the slots of one layer, and attend: causally, token by token, each
   over its slot's positions up to its own, the last `window` of them. For heads [first_head, end_head) only.

   queries, out [tokens, heads, groups, size]; new_keys, new_values [tokens, heads, size]; keys [slots, heads,
   room / BLOCK, size, BLOCK]; values [slots, heads, room, size]; slots, positions [tokens]; scratch [2, room]. size and
   room are multiples of BLOCK. softcap 0 is off. A slot's tokens come in the order of their positions. */
void outrider_attend(const float *queries, const float *new_keys, const float *new_values, float *keys, float *values,
                     const int64_t *slots, const int64_t *positions, int64_t tokens, int64_t heads, int64_t groups,
                     int64_t size, int64_t room, int64_t window, float scale, float softcap, int64_t first_head,
                     int64_t end_head, float *out, float *scratch) {
    float *s0 = scratch, *s1 = scratch + room;
    for (int64_t t = 0; t < tokens; t++) {
        int64_t position = positions[t], end = position + 1, first = end > window ? end - window : 0;
        int64_t first_block = first / BLOCK * BLOCK, end_block = (end + BLOCK - 1) / BLOCK * BLOCK;
        for (int64_t h = first_head; h < end_head; h++) {
            int64_t head = slots[t] * heads + h, last = h + 1 == end_head, next_head = head + !last;
            if (last && t + 1 < tokens) next_head = slots[t + 1] * heads + first_head;
            float *k = keys + head * size * room, *v = values + head * size * room;
            const float *next = keys + next_head * size * room;
            const float *k_new = new_keys + (t * heads + h) * size;
            float *k_own = k + position / BLOCK * BLOCK * size + position % BLOCK;
            for (int64_t d = 0; d < size; d++) k_own[d * BLOCK] = k_new[d];
            memcpy(v + position * size, new_values + (t * heads + h) * size, size * sizeof(float));
            for (int64_t g = 0; g < groups; g += 2) {
                /* An odd one out is computed twice. */
                int64_t place = ((t * heads + h) * groups + g) * size, other = g + 1 < groups ? place + size : place;
                score(queries + place, queries + other, k, v, size, first_block, end_block, s0, s1);
                float sum0 = weigh(s0, first, end, scale, softcap), sum1 = weigh(s1, first, end, scale, softcap);
                mix(s0, s1, v, next, size, first, end, sum0, sum1, out + place, out + other);
            }
        }
    }
}

/* out = x / sqrt(mean(x^2) + epsilon) x (offset + weight), row by row; x, out [rows, size]. */
void outrider_rms_norm(const float *x, const float *weight, int64_t rows, int64_t size, float epsilon, float offset,
                       float *out) {
    int64_t whole = size / LANES * LANES;
    for (int64_t r = 0; r < rows; r++, x += size, out += size) {
        floats squares = splat(0);
        for (int64_t i = 0; i < whole; i += LANES) squares += load(x + i) * load(x + i);
        float total = sum(squares);
        for (int64_t i = whole; i < size; i++) total += x[i] * x[i];
        float factor = 1.0f / sqrtf(total / (float)size + epsilon);
        for (int64_t i = 0; i < whole; i += LANES) store(out + i, load(x + i) * factor * (offset + load(weight + i)));
        for (int64_t i = whole; i < size; i++) out[i] = x[i] * factor * (offset + weight[i]);
    }
}

/* Rotary position embedding by halves: x, out [tokens, heads, size]; cosines, sines [tokens, size]. */
void outrider_rotate(const float *restrict x, const float *restrict cosines, const float *restrict sines,
                     int64_t tokens, int64_t heads, int64_t size, float *restrict out) {
    int64_t half = size / 2;
    for (int64_t t = 0; t < tokens; t++, cosines += size, sines += size)
        for (int64_t h = 0; h < heads; h++, x += size, out += size)
            for (int64_t i = 0; i < half; i++) {
                out[i] = x[i] * cosines[i] - x[i + half] * sines[i];
                out[i + half] = x[i + half] * cosines[i + half] + x[i] * sines[i + half];
            }
}
