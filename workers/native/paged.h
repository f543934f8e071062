// Where the contexts of an iteration lie in the paged pool, and who attends together.
//
// Sequences that share a prefix have the same blocks at the head of their tables. Queries of several of them walk such blocks together,
// so that keys and values are read and converted once for all, and part where their tables do (a radix tree's path, as in Zheng et al.
// 2024; Juravsky et al. 2024 split softmax there and merge it, which would give other bits than one pass does). Each query's sums still
// go over its own tiles in order, whoever is beside it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

constexpr int TILE = 32;       // positions, from multiples of TILE on
constexpr int TASK_ROWS = 32;  // rows (queries x their heads) of a piece, where one query's heads are no more
constexpr int TOGETHER = 16;   // pieces of a task at most: what is kept of all of them stays in the second-level cache

// How spans lie in a pool [blocks, block_size, row_size()]. See workers/attention/spans.py.
struct Paged {
    int64_t num_spans, block_size, num_heads, num_kv_heads, head_dim;
    const int64_t* start;        // [num_spans]
    const int64_t* end;          // [num_spans]
    const int64_t* first_row;    // [num_spans + 1]
    const int64_t* tables;
    const int64_t* first_block;  // [num_spans + 1]

    int64_t group() const { return num_heads / num_kv_heads; }

    // Where positions [first, first + count) of a span lie in a pool with rows of `width`.
    void locate(int64_t span, int64_t first, int64_t count, int64_t width, int64_t* to) const {
        const int64_t* block = tables + first_block[span] + first / block_size;
        int64_t offset = first % block_size, t = 0;
        while (t < count) {
            int64_t at = (*block * block_size + offset) * width;
            for (; offset < block_size && t < count; offset++, t++, at += width) to[t] = at;
            offset = 0, block++;
        }
    }

    // Positions from 0 on that two spans have in the same blocks.
    int64_t common(int64_t one, int64_t other) const {
        const int64_t *a = tables + first_block[one], *b = tables + first_block[other];
        const int64_t count = std::min(first_block[one + 1] - first_block[one], first_block[other + 1] - first_block[other]);
        return (std::mismatch(a, a + count, b).first - a) * block_size;
    }

    bool before(int64_t one, int64_t other) const {
        return std::lexicographical_compare(tables + first_block[one], tables + first_block[one + 1], tables + first_block[other],
                                            tables + first_block[other + 1]);
    }
};

// Some queries of one span.
struct Piece {
    int64_t span, first, count;
};

// Some pieces and some of their key/value heads: of decodes all, so that blocks are read from end to end, as long as there are enough
// for all threads, else a thread's share; of longer spans one, whose keys and values are converted once.
struct Task {
    int64_t begin, end;   // pieces
    int64_t head, heads;  // key/value heads [head, head + heads)
};

class Tasks {
  public:
    std::vector<Piece> pieces;    // those with the same prefix side by side
    std::vector<int64_t> shared;  // [pieces]: positions, in whole tiles, that a piece and the next find in the same blocks and see all of
    std::vector<Task> tasks;      // the longest first, so that no thread ends with one while the others wait

    Tasks(const Paged& paged, int threads) {
        std::vector<int64_t> spans(paged.num_spans);
        std::iota(spans.begin(), spans.end(), 0);
        auto decodes = [&](int64_t span) { return paged.end[span] - paged.start[span] == 1; };
        auto before = [&](int64_t one, int64_t other) { return paged.before(one, other); };
        const auto longer = std::stable_partition(spans.begin(), spans.end(), decodes);
        std::stable_sort(spans.begin(), longer, before);
        std::stable_sort(longer, spans.end(), before);
        const int64_t most = std::max<int64_t>(1, TASK_ROWS / paged.group()), single = longer - spans.begin();
        for (int64_t span : spans)
            for (int64_t first = 0, queries = paged.end[span] - paged.start[span]; first < queries; first += most)
                pieces.push_back({span, first, std::min(most, queries - first)});
        for (size_t i = 0; i < pieces.size(); i++) shared.push_back(i + 1 < pieces.size() ? common(paged, pieces[i], pieces[i + 1]) : 0);

        const auto cut = cuts(0, single, threads);
        const int64_t shares = (int64_t)cut.size() >= 4 * threads ? 1 : threads;
        add(cut, (paged.num_kv_heads + shares - 1) / shares, paged.num_kv_heads);
        add(cuts(single, pieces.size(), threads), 1, paged.num_kv_heads);
        auto cost = [&](const Task& task) {
            int64_t sum = 0;
            for (int64_t i = task.begin; i < task.end; i++) sum += seen(paged, pieces[i], pieces[i].count) * (pieces[i].count + 1);
            return sum * task.heads;
        };
        std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
    }

  private:
    // Positions that the first `count` queries of a piece see.
    static int64_t seen(const Paged& paged, const Piece& piece, int64_t count) { return paged.start[piece.span] + piece.first + count; }

    static int64_t common(const Paged& paged, const Piece& one, const Piece& other) {
        const int64_t both = std::min(seen(paged, one, 1), seen(paged, other, 1));
        return (one.span == other.span ? both : std::min(both, paged.common(one.span, other.span))) / TILE * TILE;
    }

    // Pieces [begin, end) in parts that share something, of TOGETHER at most, alike in size.
    std::vector<std::pair<int64_t, int64_t>> cuts(int64_t begin, int64_t end, int threads) const {
        std::vector<std::pair<int64_t, int64_t>> found;
        const int64_t most = std::clamp<int64_t>((end - begin) / threads, 1, TOGETHER);
        for (int64_t i = begin, next; i < end; i = next) {
            for (next = i + 1; next < end && shared[next - 1] > 0;) next++;
            const int64_t parts = (next - i + most - 1) / most;
            for (int64_t part = 0; part < parts; part++) found.push_back({i + (next - i) * part / parts, i + (next - i) * (part + 1) / parts});
        }
        return found;
    }

    void add(const std::vector<std::pair<int64_t, int64_t>>& parts, int64_t heads, int64_t num_kv_heads) {
        for (const auto& [begin, end] : parts)
            for (int64_t head = 0; head < num_kv_heads; head += heads) tasks.push_back({begin, end, head, std::min(heads, num_kv_heads - head)});
    }
};
