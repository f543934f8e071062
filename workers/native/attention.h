// Attention over the paged pool: softmax(q Kᵀ / sqrt(d)) V with a running maximum (Milakov & Gimelshein 2018), tile by tile.
//
// Tiles are TILE positions from multiples of TILE on, and a row's results depend on its own tiles in their order only: a query has
// the same bits alone, in any batch, as a decode or in a chunk of a prompt.
//
// A task is some queries of one span and some of its key/value heads: of a decode all, so that blocks are read from end to end, as long
// as there are enough decodes for all threads, else a thread's share; of a longer span one, whose keys and values are converted once.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "kv.h"
#include "simd.h"
#include "threads.h"

constexpr int TILE = 32;
constexpr int TASK_ROWS = 32;  // rows (queries x their heads) of a task, where one query's heads are no more

// How spans lie in a pool [blocks, block_size, row_size()]. See workers/attention/spans.py.
struct Paged {
    int64_t num_spans, block_size, num_heads, num_kv_heads, head_dim;
    const int64_t* start;        // [num_spans]
    const int64_t* end;          // [num_spans]
    const int64_t* first_row;    // [num_spans + 1]
    const int64_t* tables;
    const int64_t* first_block;  // [num_spans + 1]
};

struct Task {
    int64_t span, head, heads;   // key/value heads [head, head + heads)
    int64_t first, count;        // queries of the span
};

inline std::vector<Task> tasks_of(const Paged& paged, int threads) {
    const int64_t group = paged.num_heads / paged.num_kv_heads, most = std::max<int64_t>(1, TASK_ROWS / group);
    const int64_t shares = paged.num_spans >= 4 * threads ? 1 : threads, together = (paged.num_kv_heads + shares - 1) / shares;
    std::vector<Task> tasks;
    for (int64_t span = 0; span < paged.num_spans; span++) {
        const int64_t queries = paged.end[span] - paged.start[span], heads = queries == 1 ? together : 1;
        for (int64_t first = 0; first < queries; first += most)
            for (int64_t head = 0; head < paged.num_kv_heads; head += heads)
                tasks.push_back({span, head, std::min(heads, paged.num_kv_heads - head), first, std::min(most, queries - first)});
    }
    // The longest first, so that no thread ends with one while the others wait.
    auto cost = [&](const Task& t) { return (paged.start[t.span] + t.first + t.count) * t.heads * (t.count + 1); };
    std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
    return tasks;
}

// Memory of one thread.
struct AttentionScratch {
    std::vector<float> tile, zeros, scores, sums, largest, total;
    std::vector<const float*> queries;
    std::vector<float> query_sums, shifts;               // of rows: elements summed up, minimums of values weighed
    std::vector<float> scales[2], minimums[2];           // of keys and of values: [heads][TILE]

    // For a task of so many rows, nothing summed up yet.
    void begin(int64_t rows, int64_t padded) {
        if ((int64_t)zeros.size() < rows * padded) zeros.assign(rows * padded, 0.0f);
        if ((int64_t)tile.size() < TILE * padded) tile.assign(TILE * padded, 0.0f);
        if ((int64_t)total.size() < rows) queries.resize(rows), scores.resize(rows * TILE), total.resize(rows), largest.resize(rows);
        sums.assign(rows * padded, 0.0f);
        std::fill_n(total.begin(), rows, 0.0f);
        std::fill_n(largest.begin(), rows, -INFINITY);
    }

    // The same for what keys and values of a quantized pool take besides.
    void begin_quantized(int64_t rows, int64_t heads, int64_t padded) {
        query_sums.resize(rows);
        shifts.assign(rows, 0.0f);
        for (int i = 0; i < 2; i++) scales[i].resize(heads * TILE), minimums[i].resize(heads * TILE);
        for (int64_t row = 0; row < rows; row++) {
            Floats whole = {};
            for (int64_t d = 0; d < padded; d += LANES) whole += load(queries[row] + d);
            query_sums[row] = sum(whole);
        }
    }
};

// Where positions [first, first + count) of a span lie in a pool with rows of `width`.
inline void locate(const Paged& paged, int64_t span, int64_t first, int64_t count, int64_t width, int64_t* to) {
    const int64_t size = paged.block_size;
    const int64_t* block = paged.tables + paged.first_block[span] + first / size;
    int64_t offset = first % size, t = 0;
    while (t < count) {
        int64_t at = (*block * size + offset) * width;
        for (; offset < size && t < count; offset++, t++, at += width) to[t] = at;
        offset = 0, block++;
    }
}

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

// scores [ROWS][TILE], four of each row: queries [ROWS, padded] times four keys [padded].
template <int ROWS, class KV>
inline void dots(const float* const* queries, const KV* const* keys, int64_t offset, int64_t padded, float* scores) {
    Floats sums[ROWS][4] = {};
    for (int64_t d = 0; d < padded; d += LANES) {
        Floats k[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) k[j] = load(keys[j] + offset + d);
#pragma GCC unroll 4
        for (int row = 0; row < ROWS; row++) {
            Floats q = load(queries[row] + d);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sums[row][j] = fma(q, k[j], sums[row][j]);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < ROWS; row++) sums4(sums[row][0], sums[row][1], sums[row][2], sums[row][3], scores + row * TILE);
}

// sums [ROWS, padded] += weights [ROWS][TILE] times `count` values [padded]
template <int ROWS, class KV>
inline void weigh(const float* weights, const KV* const* values, int64_t offset, int64_t count, int64_t padded, float* sums) {
    constexpr int MANY = ROWS == 1 ? 8 : 4;
    auto columns = [&](auto number, int64_t d) {
        constexpr int N = decltype(number)::value;
        Floats acc[ROWS][N];
        for (int row = 0; row < ROWS; row++)
            for (int j = 0; j < N; j++) acc[row][j] = load(sums + row * padded + d + j * LANES);
        for (int64_t t = 0; t < count; t++) {
            Floats v[N];
#pragma GCC unroll 8
            for (int j = 0; j < N; j++) v[j] = load(values[t] + offset + d + j * LANES);
#pragma GCC unroll 4
            for (int row = 0; row < ROWS; row++) {
                Floats w = all(weights[row * TILE + t]);
#pragma GCC unroll 8
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

// Keys and values of TILE positions, of `heads` heads `size` apart, and those of the next tile, which are fetched meanwhile. Positions
// come in the order of their addresses, a few at a time, and their heads one after the other.
template <class KV>
struct Context {
    const KV *keys[TILE], *values[TILE], *next_keys[TILE], *next_values[TILE];
    int64_t heads, size, padded, count, coming;
};

constexpr int STRIDE = 4;  // positions at a time

template <class KV>
inline void fetch(const KV* from, int64_t size) {
    for (int64_t byte = 0; byte < size * (int64_t)sizeof(KV); byte += 64) __builtin_prefetch(reinterpret_cast<const char*>(from) + byte);
}

template <class KV>
inline void all_dots(const Context<KV>& context, const float* const* queries, int64_t rows, float* scores) {
    for (int64_t t = 0; t < context.count; t += STRIDE)
        for (int64_t h = 0; h < context.heads; h++) {
            const int64_t offset = h * context.size;
            for (int64_t i = t; i < t + STRIDE && i < context.coming; i++) fetch(context.next_keys[i] + offset, context.size);
            const float* const* own = queries + h * rows;
            float* to = scores + h * rows * TILE + t;
            int64_t row = 0;
            for (; row + 2 <= rows; row += 2) dots<2>(own + row, context.keys + t, offset, context.padded, to + row * TILE);
            if (row < rows) dots<1>(own + row, context.keys + t, offset, context.padded, to + row * TILE);
        }
}

template <class KV>
inline void weigh_all(const Context<KV>& context, const float* weights, int64_t rows, float* sums) {
    const int64_t stride = context.heads == 1 ? TILE : 2 * STRIDE;
    for (int64_t t = 0; t < context.count; t += stride)
        for (int64_t h = 0; h < context.heads; h++) {
            const int64_t offset = h * context.size, count = std::min(stride, context.count - t), padded = context.padded;
            for (int64_t i = t; i < t + stride && i < context.coming; i++) fetch(context.next_values[i] + offset, context.size);
            const float* from = weights + h * rows * TILE + t;
            float* to = sums + h * rows * padded;
            int64_t row = 0;
            for (; row + 2 <= rows; row += 2) weigh<2>(from + row * TILE, context.values + t, offset, count, padded, to + row * padded);
            if (row < rows) weigh<1>(from + row * TILE, context.values + t, offset, count, padded, to + row * padded);
        }
}

// Parameters of `count` rows' vectors of heads [head, head + heads) -> [heads][TILE]; what is behind `count` stays.
template <class KV>
inline void take_parameters(const KV* const* rows, int64_t count, const Paged& paged, int64_t head, int64_t heads, float* scales,
                            float* minimums) {
    for (int64_t t = 0; t < count; t++)
        for (int64_t h = 0; h < heads; h++)
            parameters(rows[t], paged.num_kv_heads, paged.head_dim, head + h, scales[h * TILE + t], minimums[h * TILE + t]);
}

inline Ints steps() {
    Ints v;
    for (int i = 0; i < LANES; i++) v[i] = i;
    return v;
}

// Scores of one row become weights; what was summed up so far is scaled to the new maximum.
inline void soften(float* scores, int64_t from, int64_t to, float scale, int64_t padded, float* sums, float& most, float& total,
                   float& shift) {
    if (from >= to) {
        memset(scores, 0, TILE * sizeof(float));
        return;
    }
    Floats peak = all(-INFINITY);
    for (int t = 0; t < TILE; t += LANES) {
        const Floats s = load(scores + t) * scale;
        const Floats seen = (steps() >= (int32_t)(from - t)) & (steps() < (int32_t)(to - t)) ? s : all(-INFINITY);
        store(scores + t, seen);
        peak = max(peak, seen);
    }
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
        total *= factor, shift *= factor;
        most = raised;
    }
    total += sum(mass);
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

// queries [num_tokens, num_heads, padded] fp32, padded with zeros -> scratch.sums [heads of the task, rows, padded], for put_attended.
// keys, values: a layer's. window: positions that a query sees, its own included; 0: all.
template <class KV>
void attend(const Paged& paged, const Task& task, const float* queries, int64_t padded, const KV* keys, const KV* values, int64_t window,
            AttentionScratch& scratch) {
    constexpr bool QUANTIZED = PARAMETERS<KV> > 0;
    const int64_t group = paged.num_heads / paged.num_kv_heads, rows = task.count * group, size = paged.head_dim;
    const int64_t row0 = paged.first_row[task.span] + task.first, position0 = paged.start[task.span] + task.first;
    const int64_t width = row_size<KV>(paged.num_kv_heads, size);
    const float scale = 1.0f / std::sqrt((float)size);
    scratch.begin(task.heads * rows, padded);
    for (int64_t i = 0; i < task.heads * rows; i++) {
        const int64_t row = i % rows, head = (task.head + i / rows) * group + row % group;
        scratch.queries[i] = queries + ((row0 + row / group) * paged.num_heads + head) * padded;
    }
    if (QUANTIZED) scratch.begin_quantized(task.heads * rows, task.heads, padded);
    // What only a row or two will read is read where it is; else it is converted once.
    const bool direct = padded == size && (sizeof(KV) == 4 || rows <= 2);
    const KV* nothing = reinterpret_cast<const KV*>(scratch.zeros.data());
    const int64_t own = task.head * size;
    Context<KV> there{};
    there.heads = task.heads, there.size = size, there.padded = padded;
    Context<float> here{};
    here.heads = 1, here.size = padded, here.padded = padded;
    float *scores = scratch.scores.data(), *tile = scratch.tile.data();
    for (int t = 0; t < TILE; t++) here.keys[t] = here.values[t] = tile + t * padded;

    const int64_t end = position0 + task.count, begin = window ? std::max<int64_t>(0, position0 + 1 - window) : 0;
    int64_t places[TILE], first = begin / TILE * TILE;
    const KV *key_rows[TILE], *value_rows[TILE];
    auto look_at = [&](int64_t from) {
        there.coming = std::max<int64_t>(0, std::min<int64_t>(TILE, end - from));
        locate(paged, task.span, from, there.coming, width, places);
        for (int64_t t = 0; t < there.coming; t++)
            there.next_keys[t] = keys + places[t] + own, there.next_values[t] = values + places[t] + own;
    };
    look_at(first);
    for (; first < end; first += TILE) {
        there.count = here.count = there.coming;
        for (int64_t t = 0; t < TILE; t++) {
            there.keys[t] = t < there.count ? there.next_keys[t] : nothing;
            there.values[t] = t < there.count ? there.next_values[t] : nothing;
        }
        if constexpr (QUANTIZED) {
            for (int64_t t = 0; t < there.count; t++) key_rows[t] = there.keys[t] - own, value_rows[t] = there.values[t] - own;
            for (int i = 0; i < 2; i++) {
                float *scales = scratch.scales[i].data(), *minimums = scratch.minimums[i].data();
                if (there.count < TILE) {
                    std::fill_n(scales, task.heads * TILE, 0.0f);
                    std::fill_n(minimums, task.heads * TILE, 0.0f);
                }
                take_parameters(i ? value_rows : key_rows, there.count, paged, task.head, task.heads, scales, minimums);
            }
        }
        look_at(first + TILE);
        if (direct) {
            all_dots(there, scratch.queries.data(), rows, scores);
        } else {
            for (int64_t h = 0; h < task.heads; h++) {
                lay_out(there.keys, h * size, there.count, size, padded, tile);
                all_dots(here, scratch.queries.data() + h * rows, rows, scores + h * rows * TILE);
            }
        }
        float none = 0.0f;
        for (int64_t i = 0; i < task.heads * rows; i++) {
            const int64_t position = position0 + i % rows / group, at = i / rows * TILE;
            const int64_t from = window ? std::max<int64_t>(0, position + 1 - window - first) : 0;
            float &shift = QUANTIZED ? scratch.shifts[i] : none, *own_scores = scores + i * TILE;
            if constexpr (QUANTIZED)
                scale_scores<KV>(own_scores, scratch.scales[0].data() + at, scratch.minimums[0].data() + at, scratch.query_sums[i]);
            soften(own_scores, from, std::min<int64_t>(TILE, position + 1 - first), scale, padded, scratch.sums.data() + i * padded,
                   scratch.largest[i], scratch.total[i], shift);
            if constexpr (QUANTIZED)
                scale_weights<KV>(own_scores, scratch.scales[1].data() + at, scratch.minimums[1].data() + at, shift);
        }
        if (direct) {
            weigh_all(there, scores, rows, scratch.sums.data());
        } else {
            for (int64_t h = 0; h < task.heads; h++) {
                lay_out(there.values, h * size, there.count, size, padded, tile);
                weigh_all(here, scores + h * rows * TILE, rows, scratch.sums.data() + h * rows * padded);
            }
        }
    }
    for (int64_t i = 0; i < task.heads * rows; i++)
        for (int64_t d = 0; d < padded; d += LANES) {
            float* sums = scratch.sums.data() + i * padded + d;
            const Floats whole = PARAMETERS<KV> == 2 ? load(sums) + scratch.shifts[i] : load(sums);
            store(sums, whole / scratch.total[i]);
        }
}

// What attend() has left of a task: put(row, head, d, sums): LANES of an output from dimension d on.
template <class P>
inline void put_attended(const Paged& paged, const Task& task, int64_t padded, const AttentionScratch& scratch, const P& put) {
    const int64_t group = paged.num_heads / paged.num_kv_heads, rows = task.count * group;
    const int64_t row0 = paged.first_row[task.span] + task.first;
    for (int64_t i = 0; i < task.heads * rows; i++) {
        const int64_t row = i % rows, head = (task.head + i / rows) * group + row % group;
        for (int64_t d = 0; d < padded; d += LANES) put(row0 + row / group, head, d, load(scratch.sums.data() + i * padded + d));
    }
}
