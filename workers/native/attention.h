// Attention over the paged pool: softmax(q Kᵀ / sqrt(d)) V with a running maximum (Milakov & Gimelshein 2018), tile by tile.
//
// Tiles are TILE positions from multiples of TILE on, and a row's results depend on its own tiles in their order only: a query has
// the same bits alone, in any batch, as a decode or in a chunk of a prompt.
//
// A task is one key/value head of some queries of one span. Keys and values of a tile are laid out in fp32 once for all of its rows.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.h"
#include "threads.h"

constexpr int TILE = 32;
constexpr int TASK_ROWS = 32;  // rows (queries x their heads) of a task, about

// One layer's KV as bytes of K [blocks, block_size, kv_heads, head_dim], and how spans lie in it. See workers/attention/spans.py.
struct Paged {
    int64_t num_spans, block_size, num_heads, num_kv_heads, head_dim;
    const int64_t* start;        // [num_spans]
    const int64_t* end;          // [num_spans]
    const int64_t* first_row;    // [num_spans + 1]
    const int64_t* tables;
    const int64_t* first_block;  // [num_spans + 1]
};

struct Task {
    int64_t span, kv_head, first, count;  // queries of the span
};

inline std::vector<Task> tasks_of(const Paged& paged) {
    const int64_t group = paged.num_heads / paged.num_kv_heads, most = std::max<int64_t>(1, TASK_ROWS / group);
    std::vector<Task> tasks;
    for (int64_t span = 0; span < paged.num_spans; span++) {
        const int64_t queries = paged.end[span] - paged.start[span];
        for (int64_t first = 0; first < queries; first += most)
            for (int64_t head = 0; head < paged.num_kv_heads; head++)
                tasks.push_back({span, head, first, std::min(most, queries - first)});
    }
    // The longest first, so that no thread ends with one while the others wait.
    auto cost = [&](const Task& t) { return (paged.start[t.span] + t.first + t.count) * (t.count + 1); };
    std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
    return tasks;
}

// Memory of one thread.
struct AttentionScratch {
    std::vector<float> tile, scores, sums, largest, total;

    void fit(int64_t rows, int64_t padded) {
        if ((int64_t)tile.size() < TILE * padded) tile.assign(TILE * padded, 0.0f);
        if ((int64_t)scores.size() < rows * TILE) scores.resize(rows * TILE);
        if ((int64_t)sums.size() < rows * padded) sums.resize(rows * padded);
        if ((int64_t)largest.size() < rows) largest.resize(rows), total.resize(rows);
    }
};

// [count, padded] fp32 of positions [first, first + count) from one head of `pool`; the rest of TILE is zero.
template <class KV>
inline void lay_out(const Paged& paged, const KV* pool, const Task& task, int64_t first, int64_t count, int64_t padded, float* to) {
    const int64_t size = paged.block_size, width = paged.num_kv_heads * paged.head_dim;
    const int64_t* table = paged.tables + paged.first_block[task.span];
    for (int64_t i = 0; i < count; i++, to += padded) {
        const int64_t position = first + i;
        const KV* from = pool + (table[position / size] * size + position % size) * width + task.kv_head * paged.head_dim;
        int64_t d = 0;
        for (; d + LANES <= paged.head_dim; d += LANES) store(to + d, load(from + d));
        for (; d < paged.head_dim; d++) to[d] = sizeof(KV) == 2 ? widen((bf16)from[d]) : (float)from[d];
    }
    memset(to, 0, (TILE - count) * padded * sizeof(float));
}

// scores [ROWS][TILE] = q [ROWS, padded] · tile [TILE, padded]
template <int ROWS>
inline void dots(const float* const* queries, const float* tile, int64_t padded, float* scores) {
    for (int t = 0; t < TILE; t += 4) {
        Floats sums[ROWS][4] = {};
        for (int64_t d = 0; d < padded; d += LANES) {
            Floats k[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) k[j] = load(tile + (t + j) * padded + d);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) {
                Floats q = load(queries[row] + d);
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++) sums[row][j] = fma(q, k[j], sums[row][j]);
            }
        }
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++)
            sums4(sums[row][0], sums[row][1], sums[row][2], sums[row][3], scores + row * TILE + t);
    }
}

// sums [ROWS, padded] += weights [ROWS][TILE] · tile [TILE, padded], of the first `count` positions
template <int ROWS>
inline void weigh(const float* weights, const float* tile, int64_t count, int64_t padded, float* sums) {
    constexpr int MANY = 4;
    auto columns = [&](auto number, int64_t d) {
        constexpr int N = decltype(number)::value;
        Floats acc[ROWS][N];
        for (int row = 0; row < ROWS; row++)
            for (int j = 0; j < N; j++) acc[row][j] = load(sums + row * padded + d + j * LANES);
        for (int64_t t = 0; t < count; t++) {
            Floats v[N];
#pragma GCC unroll 4
            for (int j = 0; j < N; j++) v[j] = load(tile + t * padded + d + j * LANES);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) {
                Floats w = all(weights[row * TILE + t]);
#pragma GCC unroll 4
                for (int j = 0; j < N; j++) acc[row][j] = fma(w, v[j], acc[row][j]);
            }
        }
        for (int row = 0; row < ROWS; row++)
            for (int j = 0; j < N; j++) store(sums + row * padded + d + j * LANES, acc[row][j]);
    };
    int64_t d = 0;
    for (; d + MANY * LANES <= padded; d += MANY * LANES) columns(std::integral_constant<int, MANY>{}, d);
    for (; d < padded; d += LANES) columns(std::integral_constant<int, 1>{}, d);
}

// Scores of one row become weights; what was summed up so far is scaled to the new maximum.
inline void soften(float* scores, int64_t from, int64_t to, float scale, int64_t padded, float* sums, float& most, float& total) {
    if (from >= to) {
        memset(scores, 0, TILE * sizeof(float));
        return;
    }
    for (int t = 0; t < TILE; t++) scores[t] = t >= from && t < to ? scores[t] * scale : -INFINITY;
    Floats peak = load(scores);
    for (int t = LANES; t < TILE; t += LANES) peak = max(peak, load(scores + t));
    const float raised = std::max(most, largest(peak));
    Floats mass = {};
    for (int t = 0; t < TILE; t += LANES) {
        Floats s = load(scores + t), weight = exp(s - raised);
        weight = s == -INFINITY ? Floats{} : weight;
        mass += weight;
        store(scores + t, weight);
    }
    if (raised != most) {
        const float factor = most == -INFINITY ? 0.0f : exp(all(most - raised))[0];
        for (int64_t d = 0; d < padded; d += LANES) store(sums + d, load(sums + d) * factor);
        total *= factor;
        most = raised;
    }
    total += sum(mass);
}

// queries [num_tokens, num_heads, padded] fp32, padded with zeros; put(row, head, d, sums): LANES of an output from dimension d on.
// window: positions that a query sees, its own included; 0: all.
template <class KV, class P>
void attend(const Paged& paged, const Task& task, const float* queries, int64_t padded, const KV* keys, const KV* values, int64_t window,
            AttentionScratch& scratch, const P& put) {
    const int64_t group = paged.num_heads / paged.num_kv_heads, rows = task.count * group;
    const int64_t row0 = paged.first_row[task.span] + task.first, position0 = paged.start[task.span] + task.first;
    const float scale = 1.0f / std::sqrt((float)paged.head_dim);
    scratch.fit(rows, padded);
    std::fill_n(scratch.sums.begin(), rows * padded, 0.0f);
    std::fill_n(scratch.largest.begin(), rows, -INFINITY);
    std::fill_n(scratch.total.begin(), rows, 0.0f);
    const float* own[TASK_ROWS * 16];
    for (int64_t row = 0; row < rows; row++)
        own[row] = queries + ((row0 + row / group) * paged.num_heads + task.kv_head * group + row % group) * padded;
    const int64_t end = position0 + task.count, begin = window ? std::max<int64_t>(0, position0 + 1 - window) : 0;
    for (int64_t first = begin / TILE * TILE; first < end; first += TILE) {
        const int64_t count = std::min<int64_t>(TILE, end - first);
        float *tile = scratch.tile.data(), *scores = scratch.scores.data();
        lay_out(paged, keys, task, first, count, padded, tile);
        int64_t row = 0;
        for (; row + 2 <= rows; row += 2) dots<2>(own + row, tile, padded, scores + row * TILE);
        if (row < rows) dots<1>(own + row, tile, padded, scores + row * TILE);
        for (row = 0; row < rows; row++) {
            const int64_t position = position0 + row / group;
            const int64_t from = window ? std::max<int64_t>(0, position + 1 - window - first) : 0;
            soften(scores + row * TILE, from, std::min<int64_t>(TILE, position + 1 - first), scale, padded,
                   scratch.sums.data() + row * padded, scratch.largest[row], scratch.total[row]);
        }
        lay_out(paged, values, task, first, count, padded, tile);
        for (row = 0; row + 2 <= rows; row += 2) weigh<2>(scores + row * TILE, tile, count, padded, scratch.sums.data() + row * padded);
        if (row < rows) weigh<1>(scores + row * TILE, tile, count, padded, scratch.sums.data() + row * padded);
    }
    for (int64_t row = 0; row < rows; row++) {
        const int64_t head = task.kv_head * group + row % group;
        for (int64_t d = 0; d < padded; d += LANES)
            put(row0 + row / group, head, d, load(scratch.sums.data() + row * padded + d) / scratch.total[row]);
    }
}
