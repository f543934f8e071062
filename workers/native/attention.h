// Attention over the paged pool: softmax(q Kᵀ / sqrt(d)) V with a running maximum (Milakov & Gimelshein 2018), tile by tile.
//
// Tiles are TILE positions from multiples of TILE on, and a row's results depend on its own tiles in their order only: a query has
// the same bits alone, in any batch, as a decode or in a chunk of a prompt, and whoever walks the same blocks with it (paged.h).
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "memory.h"
#include "tile.h"

// Memory of one thread.
struct AttentionScratch {
    Buffer<float> tiles, scores, sums;  // vectors that lie across lines of the cache take twice the time
    std::vector<float> zeros, query_sums;
    std::vector<const float*> queries;
    std::vector<int64_t> positions, bases;
    std::vector<float*> sums_of;
    std::vector<Kept> kept;
    std::vector<float> scales[2], minimums[2];  // of keys and of values: [heads][TILE]
    std::vector<int64_t> rows;
};

// Keys and values of TILE positions, of `heads` heads `size` apart, and those of the next tile, which are fetched meanwhile. Positions
// come in the order of their addresses, a few at a time, and their heads one after the other.
template <class KV>
struct Context {
    const KV *keys[TILE], *values[TILE], *next_keys[TILE], *next_values[TILE];
    int64_t heads, size, padded, count, coming;
};

constexpr int STRIDE = 4;   // positions at a time
constexpr int AT_ONCE = 6;  // rows whose scores are kept meanwhile

template <class KV>
inline void all_dots(const Context<KV>& context, const float* const* queries, int64_t rows, float* scores) {
    for (int64_t t = 0; t < context.count; t += STRIDE)
        for (int64_t h = 0; h < context.heads; h++) {
            const int64_t offset = h * context.size;
            for (int64_t i = t; i < t + STRIDE && i < context.coming; i++) fetch(context.next_keys[i] + offset, context.size);
            const float* const* own = queries + h * rows;
            float* to = scores + h * rows * TILE + t;
            some_rows<2>(rows, [&](auto many, int64_t row) { dots<many>(own + row, context.keys + t, offset, context.padded, to + row * TILE); });
        }
}

template <class KV>
inline void weigh_all(const Context<KV>& context, const float* weights, int64_t rows, float* const* sums) {
    const int64_t stride = context.heads == 1 ? TILE : 2 * STRIDE;
    for (int64_t t = 0; t < context.count; t += stride)
        for (int64_t h = 0; h < context.heads; h++) {
            const int64_t offset = h * context.size, count = std::min(stride, context.count - t), padded = context.padded;
            for (int64_t i = t; i < t + stride && i < context.coming; i++) fetch(context.next_values[i] + offset, context.size);
            const float* from = weights + h * rows * TILE + t;
            float* const* to = sums + h * rows;
            some_rows<2>(rows, [&](auto many, int64_t row) { weigh<many>(from + row * TILE, context.values + t, offset, count, padded, to + row); });
        }
}

// One task: queries [num_tokens, num_heads, padded] fp32, padded with zeros -> what put() gives. keys, values: a layer's. window: positions
// that a query sees, its own included; 0: all. Rows are those of a piece, and of these those of a head, one after the other.
template <class KV>
class Attending {
  public:
    Attending(const Paged& paged, const Tasks& tasks, const Task& task, const float* queries, int64_t padded, const KV* keys,
              const KV* values, int64_t window, AttentionScratch& scratch)
        : paged_(paged), tasks_(tasks), task_(task), padded_(padded), keys_(keys), values_(values), window_(window), s_(scratch) {
        begin(queries);
        if (window) {
            for (int64_t i = task.begin; i < task.end; i++) alone(i, 0);
        } else {
            walk(task.begin, task.end, 0);
        }
        for (int64_t row = 0; row < rows_; row++)
            for (int64_t d = 0; d < padded_; d += LANES) {
                float* sums = s_.sums_of[row] + d;
                const Floats whole = PARAMETERS<KV> == 2 ? load(sums) + s_.kept[row].shift : load(sums);
                store(sums, whole / s_.kept[row].total);
            }
    }

  private:
    static constexpr bool QUANTIZED = PARAMETERS<KV> > 0;

    void begin(const float* queries) {
        const int64_t group = paged_.group();
        s_.queries.clear(), s_.positions.clear(), s_.bases.clear();
        for (int64_t i = task_.begin; i < task_.end; i++) {
            const Piece& piece = tasks_.pieces[i];
            const int64_t row0 = paged_.first_row[piece.span] + piece.first, position0 = paged_.start[piece.span] + piece.first;
            s_.bases.push_back(s_.queries.size());
            for (int64_t h = task_.head * group; h < (task_.head + task_.heads) * group; h += group)
                for (int64_t row = 0; row < piece.count * group; row++) {
                    s_.queries.push_back(queries + ((row0 + row / group) * paged_.num_heads + h + row % group) * padded_);
                    s_.positions.push_back(position0 + row / group);
                }
        }
        rows_ = s_.queries.size();
        s_.kept.assign(rows_, Kept{});
        sums_ = s_.sums.fit(rows_ * padded_);
        std::fill_n(sums_, rows_ * padded_, 0.0f);
        s_.sums_of.resize(rows_);
        for (int64_t row = 0; row < rows_; row++) s_.sums_of[row] = sums_ + row * padded_;
        if ((int64_t)s_.zeros.size() < task_.heads * padded_) s_.zeros.assign(task_.heads * padded_, 0.0f);
        key_tile_ = s_.tiles.fit(2 * TILE * padded_);
        value_tile_ = key_tile_ + TILE * padded_;
        scores_ = s_.scores.fit(std::max<int64_t>(AT_ONCE, 2 * task_.heads) * TILE);
        if (!QUANTIZED) return;
        for (int i = 0; i < 2; i++) s_.scales[i].resize(task_.heads * TILE), s_.minimums[i].resize(task_.heads * TILE);
        s_.query_sums.resize(rows_);
        for (int64_t row = 0; row < rows_; row++) {
            Floats whole = {};
            for (int64_t d = 0; d < padded_; d += LANES) whole += load(s_.queries[row] + d);
            s_.query_sums[row] = sum(whole);
        }
    }

    // Pieces [begin, end), which have all been up to position `from`: on together while their blocks are the same, then in parts.
    void walk(int64_t begin, int64_t end, int64_t from) {
        if (end - begin == 1) return alone(begin, from);
        const int64_t* shared = tasks_.shared.data();
        const int64_t border = *std::min_element(shared + begin, shared + end - 1);
        if (border > from) convert(begin, end, from, border);
        for (int64_t i = begin, next; i < end; i = next) {
            for (next = i + 1; next < end && shared[next - 1] > border;) next++;
            walk(i, next, std::max(from, border));
        }
    }

    // A piece from position `from` on. What only a row or two will read is read where it is; else it is converted once.
    void alone(int64_t piece, int64_t from) {
        const Piece& own = tasks_.pieces[piece];
        const int64_t first = paged_.start[own.span] + own.first;
        if (window_) from = std::max<int64_t>(0, first + 1 - window_) / TILE * TILE;
        if (own.count * paged_.group() <= 2 && padded_ == paged_.head_dim) {
            in_place(piece, from, first + own.count);
        } else {
            convert(piece, piece + 1, from, first + own.count);
        }
    }

    // Positions [from, to) for pieces that have them in the same blocks.
    void convert(int64_t begin, int64_t end, int64_t from, int64_t to) {
        const int64_t group = paged_.group(), size = paged_.head_dim, span = tasks_.pieces[begin].span;
        const int64_t width = row_size<KV>(paged_.num_kv_heads, size);
        s_.rows.clear();
        for (int64_t h = 0; h < task_.heads; h++)
            for (int64_t i = begin; i < end; i++)
                for (int64_t row = 0, count = tasks_.pieces[i].count * group; row < count; row++)
                    s_.rows.push_back(s_.bases[i - task_.begin] + h * count + row);
        const int64_t rows = s_.rows.size() / task_.heads;
        int64_t places[TILE];
        const KV *key_rows[TILE], *value_rows[TILE];
        const float *keys[TILE], *values[TILE];
        const bool there = sizeof(KV) == 4 && padded_ == size;
        if (!there) {
            std::fill_n(key_tile_, 2 * TILE * padded_, 0.0f);
            for (int t = 0; t < TILE; t++) keys[t] = key_tile_ + t * padded_, values[t] = value_tile_ + t * padded_;
        }
        for (int64_t first = from; first < to; first += TILE) {
            const int64_t count = std::min<int64_t>(TILE, to - first), coming = std::clamp<int64_t>(to - first - TILE, 0, TILE);
            paged_.locate(span, first, count, width, places);
            for (int64_t t = 0; t < count; t++) key_rows[t] = keys_ + places[t], value_rows[t] = values_ + places[t];
            if constexpr (QUANTIZED) look_up(key_rows, value_rows, count);
            paged_.locate(span, first + TILE, coming, width, places);
            for (int64_t h = 0; h < task_.heads; h++) {
                const int64_t offset = (task_.head + h) * size;
                if constexpr (sizeof(KV) == 4) {
                    if (there)
                        for (int64_t t = 0; t < TILE; t++) {
                            keys[t] = t < count ? key_rows[t] + offset : s_.zeros.data();
                            values[t] = t < count ? value_rows[t] + offset : s_.zeros.data();
                        }
                }
                if (!there) {
                    lay_out(key_rows, offset, count, size, padded_, key_tile_);
                    lay_out(value_rows, offset, count, size, padded_, value_tile_);
                }
                for (int64_t t = 0; t < coming; t++) fetch(keys_ + places[t] + offset, size), fetch(values_ + places[t] + offset, size);
                for (int64_t i = 0; i < rows; i += AT_ONCE)
                    attend(s_.rows.data() + h * rows + i, std::min<int64_t>(AT_ONCE, rows - i), keys, values, first, count, h);
            }
        }
    }

    // A few rows over one tile of fp32.
    void attend(const int64_t* which, int64_t rows, const float* const* keys, const float* const* values, int64_t first, int64_t count, int64_t h) {
        const float* queries[AT_ONCE];
        float *sums[AT_ONCE], *scores = scores_;
        for (int64_t i = 0; i < rows; i++) queries[i] = s_.queries[which[i]], sums[i] = s_.sums_of[which[i]];
        some_rows<3>(rows, [&](auto many, int64_t row) {
            for (int64_t t = 0; t < count; t += 4) dots<many>(queries + row, keys + t, 0, padded_, scores + row * TILE + t);
        });
        for (int64_t i = 0; i < rows; i++) weights(scores + i * TILE, which[i], first, h);
        some_rows<3>(rows, [&](auto many, int64_t row) { weigh<many>(scores + row * TILE, values, 0, count, padded_, sums + row); });
    }

    // Of one row, over the tile that begins at position `first`: scores become weights.
    void weights(float* scores, int64_t row, int64_t first, int64_t h) {
        const int64_t position = s_.positions[row], at = h * TILE;
        const int64_t from = window_ ? std::max<int64_t>(0, position + 1 - window_ - first) : 0;
        if constexpr (QUANTIZED) scale_scores<KV>(scores, s_.scales[0].data() + at, s_.minimums[0].data() + at, s_.query_sums[row]);
        soften(scores, from, std::min<int64_t>(TILE, position + 1 - first), 1.0f / std::sqrt((float)paged_.head_dim), padded_, s_.sums_of[row], s_.kept[row]);
        if constexpr (QUANTIZED) scale_weights<KV>(scores, s_.scales[1].data() + at, s_.minimums[1].data() + at, s_.kept[row].shift);
    }

    // Parameters of a tile's keys and values.
    void look_up(const KV* const* keys, const KV* const* values, int64_t count) {
        for (int i = 0; i < 2; i++) {
            if (count < TILE) {
                std::fill(s_.scales[i].begin(), s_.scales[i].end(), 0.0f);
                std::fill(s_.minimums[i].begin(), s_.minimums[i].end(), 0.0f);
            }
            take_parameters(i ? values : keys, count, paged_, task_.head, task_.heads, s_.scales[i].data(), s_.minimums[i].data());
        }
    }

    // Positions [from, to) for the rows of one piece.
    void in_place(int64_t piece, int64_t from, int64_t to) {
        const int64_t span = tasks_.pieces[piece].span, base = s_.bases[piece - task_.begin], rows = tasks_.pieces[piece].count * paged_.group();
        const int64_t size = paged_.head_dim, width = row_size<KV>(paged_.num_kv_heads, size), own = task_.head * size;
        const KV* nothing = reinterpret_cast<const KV*>(s_.zeros.data());
        Context<KV> there{};
        there.heads = task_.heads, there.size = size, there.padded = padded_;
        int64_t places[TILE];
        const KV *key_rows[TILE], *value_rows[TILE];
        auto look_at = [&](int64_t first) {
            there.coming = std::clamp<int64_t>(to - first, 0, TILE);
            paged_.locate(span, first, there.coming, width, places);
            for (int64_t t = 0; t < there.coming; t++)
                there.next_keys[t] = keys_ + places[t] + own, there.next_values[t] = values_ + places[t] + own;
        };
        look_at(from);
        for (int64_t first = from; first < to; first += TILE) {
            there.count = there.coming;
            for (int64_t t = 0; t < TILE; t++) {
                there.keys[t] = t < there.count ? there.next_keys[t] : nothing;
                there.values[t] = t < there.count ? there.next_values[t] : nothing;
            }
            if constexpr (QUANTIZED) {
                for (int64_t t = 0; t < there.count; t++) key_rows[t] = there.keys[t] - own, value_rows[t] = there.values[t] - own;
                look_up(key_rows, value_rows, there.count);
            }
            look_at(first + TILE);
            all_dots(there, s_.queries.data() + base, rows, scores_);
            for (int64_t i = 0; i < task_.heads * rows; i++) weights(scores_ + i * TILE, base + i, first, i / rows);
            weigh_all(there, scores_, rows, s_.sums_of.data() + base);
        }
    }

    const Paged& paged_;
    const Tasks& tasks_;
    const Task& task_;
    const int64_t padded_;
    const KV *const keys_, *const values_;
    const int64_t window_;
    AttentionScratch& s_;
    int64_t rows_;
    float *sums_, *scores_, *key_tile_, *value_tile_;
};

// What a task has left: put(row, head, d, sums): LANES of an output from dimension d on.
template <class P>
inline void put_attended(const Paged& paged, const Tasks& tasks, const Task& task, int64_t padded, const AttentionScratch& scratch, const P& put) {
    const int64_t group = paged.group();
    const float* from = scratch.sums_of[0];
    for (int64_t i = task.begin; i < task.end; i++) {
        const Piece& piece = tasks.pieces[i];
        for (int64_t h = task.head * group; h < (task.head + task.heads) * group; h += group)
            for (int64_t row = 0; row < piece.count * group; row++, from += padded)
                for (int64_t d = 0; d < padded; d += LANES)
                    put(paged.first_row[piece.span] + piece.first + row / group, h + row % group, d, load(from + d));
    }
}
