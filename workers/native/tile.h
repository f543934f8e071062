// What attention does with one tile of keys and values: scores, weights, weighted sums. A row (a query's head) has the same operations in
// the same order whatever rows are beside it, and whether a tile is read where it lies or was converted to fp32 first.
#pragma once
#include <algorithm>
#include <cmath>

#include "kv.h"
#include "paged.h"
#include "simd.h"

// Vectors [size] as fp32 [count, padded] at `tile`, whose padding is zero.
template <class KV>
inline void lay_out(const KV* const* rows, int64_t offset, int64_t count, int64_t size, int64_t padded, float* tile) {
    for (int64_t t = 0; t < count; t++, tile += padded) {
        const KV* row = rows[t] + offset;
        int64_t d = 0;
        for (; d + LANES <= size; d += LANES) store(tile + d, load(row + d));
        if (d == size) continue;
        const Floats last = load_some(row + d, size - d);
        memcpy(tile + d, &last, (size - d) * sizeof(float));
    }
}

template <class KV>
inline void fetch(const KV* from, int64_t size) {
    for (int64_t byte = 0; byte < size * (int64_t)sizeof(KV); byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(from) + byte);
}

// scores [ROWS][TILE], four of each row: queries [ROWS, padded] times four keys [padded].
template <int ROWS, class KV>
inline void dots(const float* const* queries, const KV* const* keys, int64_t offset, int64_t padded, float* scores) {
    Floats sums[ROWS][4] = {};
    for (int64_t d = 0; d < padded; d += LANES) {
        Floats q[ROWS];
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++) q[row] = held(load(queries[row] + d));
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const Floats k = held(load(keys[j] + offset + d));
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) sums[row][j] = fma(q[row], k, sums[row][j]);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++) sums4(sums[row][0], sums[row][1], sums[row][2], sums[row][3], scores + row * TILE);
}

// sums [ROWS][padded] += weights [ROWS][TILE] times `count` values [padded]; N vectors of each.
template <int ROWS, int N, class KV>
inline void weigh_some(const float* weights, const KV* const* values, int64_t offset, int64_t count, float* const* sums, int64_t d) {
    Floats acc[ROWS][N];
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) acc[row][j] = load(sums[row] + d + j * LANES);
    for (int64_t t = 0; t < count; t++) {
        const KV* value = values[t] + offset + d;
        Floats w[ROWS];
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++) w[row] = all(weights[row * TILE + t]);
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) {
            const Floats v = held(load(value + j * LANES));
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) acc[row][j] = fma(w[row], v, acc[row][j]);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 8
        for (int j = 0; j < N; j++) store(sums[row] + d + j * LANES, acc[row][j]);
}

template <int ROWS, class KV>
inline void weigh(const float* weights, const KV* const* values, int64_t offset, int64_t count, int64_t padded, float* const* sums) {
    constexpr int MANY = ROWS == 1 ? 8 : 4;
    int64_t d = 0;
    for (; d + MANY * LANES <= padded; d += MANY * LANES) weigh_some<ROWS, MANY>(weights, values, offset, count, sums, d);
    for (; d < padded; d += LANES) weigh_some<ROWS, 1>(weights, values, offset, count, sums, d);
}

// f(rows at a time, the first one) over all rows.
template <int MOST, class F>
inline void some_rows(int64_t rows, const F& f) {
    int64_t row = 0;
    for (; row + MOST <= rows; row += MOST) f(std::integral_constant<int, MOST>{}, row);
    if constexpr (MOST > 2)
        if (row + 2 <= rows) f(std::integral_constant<int, 2>{}, row), row += 2;
    if (row < rows) f(std::integral_constant<int, 1>{}, row);
}

inline Ints steps() {
    Ints v;
    for (int i = 0; i < LANES; i++) v[i] = i;
    return v;
}

// What is kept of a row while it goes over its tiles.
struct Kept {
    float largest = -INFINITY;  // score so far
    float total = 0.0f;         // of the weights, relative to it
    float shift = 0.0f;         // of the minimums weighed, where values have some
};

// Scores of one row become weights; what was summed up so far is scaled to the new maximum. [from, to): positions of the tile it sees.
inline void soften(float* scores, int64_t from, int64_t to, float scale, int64_t padded, float* sums, Kept& kept) {
    if (from >= to) {
        memset(scores, 0, TILE * sizeof(float));
        return;
    }
    const bool whole = from <= 0 && to >= TILE;
    Floats peak = all(-INFINITY), seen[TILE / LANES];
#pragma GCC unroll 4
    for (int i = 0; i < TILE / LANES; i++) {
        seen[i] = load(scores + i * LANES) * scale;
        if (!whole) seen[i] = (steps() >= (int32_t)(from - i * LANES)) & (steps() < (int32_t)(to - i * LANES)) ? seen[i] : all(-INFINITY);
        peak = max(peak, seen[i]);
    }
    const float raised = std::max(kept.largest, largest(peak));
    Floats mass = {};
#pragma GCC unroll 4
    for (int i = 0; i < TILE / LANES; i++) {
        Floats weight = exp(seen[i] - raised);
        weight = seen[i] == -INFINITY ? Floats{} : weight;
        mass += weight;
        store(scores + i * LANES, weight);
    }
    if (raised != kept.largest) {
        const float factor = kept.largest == -INFINITY ? 0.0f : exp(all(kept.largest - raised))[0];
        for (int64_t d = 0; d < padded; d += LANES) store(sums + d, load(sums + d) * factor);
        kept.total *= factor, kept.shift *= factor;
        kept.largest = raised;
    }
    kept.total += sum(mass);
}

// Parameters of `count` rows' vectors of heads [head, head + heads) -> [heads][TILE]; what is behind `count` stays.
template <class KV>
inline void take_parameters(const KV* const* rows, int64_t count, const Paged& paged, int64_t head, int64_t heads, float* scales,
                            float* minimums) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t h = 0; h < heads; h++)
            parameters(rows[t], paged.num_kv_heads, paged.head_dim, head + h, scales[h * TILE + t], minimums[h * TILE + t]);
}

// The scores of one row with codes become those with numbers.
template <class KV>
inline void scale_scores(float* scores, const float* scales, const float* minimums, float query_sum) {
    for (int t = 0; t < TILE; t += LANES) {
        const Floats scaled = load(scores + t) * load(scales + t);
        store(scores + t, PARAMETERS<KV> == 2 ? fma(load(minimums + t), all(query_sum), scaled) : scaled);
    }
}

// The weights of one row for numbers become those for codes; the part of the minimums is added to `shift`.
template <class KV>
inline void scale_weights(float* weights, const float* scales, const float* minimums, float& shift) {
    Floats moved = {};
    for (int t = 0; t < TILE; t += LANES) {
        const Floats weight = load(weights + t);
        if (PARAMETERS<KV> == 2) moved = fma(weight, load(minimums + t), moved);
        store(weights + t, weight * load(scales + t));
    }
    if (PARAMETERS<KV> == 2) shift += sum(moved);
}
