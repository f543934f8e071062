// A linear layer over packed weights: y = x Wᵀ + b, each row the same bits whatever the number of rows.
//
// W [outputs, inputs] is cut into panels of WIDTH outputs. A panel holds its weights in the order in which they are multiplied: input
// by input, WIDTH outputs each; of bf16 two inputs together, as the low and the high half of a word (what AVX512-BF16 multiplies).
// An output is one accumulator over all inputs in order, of a pair the second first: fma(x0, w0, fma(x1, w1, sum)). So neither the
// number of rows, nor how rows and panels are shared out, can change a bit, and AVX2 has the bits of AVX512-BF16 (but for denormals,
// which that takes for 0).
//
// With few rows the weights stream past once, at the memory's speed. With many, blocks of up to BLOCK rows run over panels that stay
// in the second-level cache.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "simd.h"
#include "threads.h"

constexpr int VECTORS = LANES == 16 ? 4 : 2;  // of a panel
constexpr int WIDTH = VECTORS * LANES;
constexpr int BLOCK = 6;                  // rows at a time: their accumulators, and what else is needed, fit the registers
constexpr int64_t RESIDENT = 192 << 10;  // bytes of panels that a row block passes over before the next row block
constexpr int64_t HUGE_PAGE = 2 << 20;

// Zeros, on huge pages where the system has some.
class Zeros {
  public:
    explicit Zeros(int64_t bytes) : size_(round_up(bytes, HUGE_PAGE) + HUGE_PAGE) {
        base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(base_, size_, MADV_HUGEPAGE);
#endif
    }
    ~Zeros() { munmap(base_, size_); }
    Zeros(const Zeros&) = delete;

    char* at() const { return reinterpret_cast<char*>(round_up(reinterpret_cast<int64_t>(base_), HUGE_PAGE)); }

  private:
    int64_t size_;
    void* base_;
};

struct Packed {
    int64_t outputs, inputs;
    int64_t panels, depth;  // depth: inputs, of bf16 rounded up to even
    bool half;               // bf16, else fp32
    bool paired;             // each panel: WIDTH / 2 outputs of the first half of W, and those WIDTH / 2 of the second half beside them
    Zeros memory;
    std::vector<float> bias;  // [panels * WIDTH] in the order of the panels, or none

    char* weights() const { return memory.at(); }

    // The output of W in column `column` of panel `panel`; none: outputs or more.
    int64_t output(int64_t panel, int column) const {
        if (!paired) return panel * WIDTH + column;
        int64_t half_width = WIDTH / 2, at = panel * half_width + column % half_width;
        if (at >= outputs / 2) return outputs;
        return column < half_width ? at : outputs / 2 + at;
    }
};

template <class W>
void pack_panel(const Packed& packed, const W* from, int64_t panel) {
    W* to = reinterpret_cast<W*>(packed.weights()) + panel * packed.depth * WIDTH;
    constexpr int step = sizeof(W) == 2 ? 2 : 1;
    for (int column = 0; column < WIDTH; column++) {
        int64_t output = packed.output(panel, column);
        if (output >= packed.outputs) continue;
        const W* row = from + output * packed.inputs;
        for (int64_t i = 0; i < packed.inputs; i++) to[(i / step * WIDTH + column) * step + i % step] = row[i];
    }
}

template <class W>
Packed* pack(const W* from, const float* bias, int64_t outputs, int64_t inputs, bool paired, Threads& threads) {
    bool half = sizeof(W) == 2;
    int64_t columns = paired ? round_up(outputs / 2, WIDTH / 2) * 2 : round_up(outputs, WIDTH);
    int64_t panels = columns / WIDTH, depth = round_up(inputs, half ? 2 : 1);
    const int64_t bytes = panels * depth * WIDTH * (int64_t)sizeof(W);
    std::unique_ptr<Packed> packed(new Packed{outputs, inputs, panels, depth, half, paired, Zeros(bytes), {}});
    Threads::Step step(threads);
    threads.run(panels, [&](int64_t panel, int) { pack_panel(*packed, from, panel); });
    if (bias) {
        packed->bias.resize(panels * WIDTH);
        for (int64_t at = 0; at < panels * WIDTH; at++) {
            int64_t output = packed->output(at / WIDTH, at % WIDTH);
            if (output < outputs) packed->bias[at] = bias[output];
        }
    }
    return packed.release();
}

// --- products of a few rows and a few panels, all inputs ------------------------------------------------------------

template <int ROWS, int COUNT>
inline void multiply(const float* x, int64_t stride, const float* weights, int64_t panel_size, int64_t depth, Floats (&sums)[ROWS][COUNT * VECTORS]) {
    for (int64_t i = 0; i < depth; i++) {
        Floats w[COUNT * VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < COUNT * VECTORS; v++) w[v] = load(weights + v / VECTORS * panel_size + i * WIDTH + v % VECTORS * LANES);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            Floats value = all(x[row * stride + i]);
#pragma GCC unroll 16
            for (int v = 0; v < COUNT * VECTORS; v++) sums[row][v] = fma(value, w[v], sums[row][v]);
        }
    }
}

#if RAYLINE_DOT_BF16
template <int ROWS, int COUNT>
inline void multiply(const bf16* x, int64_t stride, const bf16* weights, int64_t panel_size, int64_t depth, Floats (&sums)[ROWS][COUNT * VECTORS]) {
    for (int64_t i = 0; i < depth; i += 2) {
        __m512i w[COUNT * VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < COUNT * VECTORS; v++) {
            const bf16* at = weights + v / VECTORS * panel_size + i * WIDTH + v % VECTORS * LANES * 2;
            _mm_prefetch((const char*)at + 768, _MM_HINT_T0);
            w[v] = _mm512_loadu_si512(at);
        }
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            int32_t pair;
            memcpy(&pair, x + row * stride + i, 4);
            __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 16
            for (int v = 0; v < COUNT * VECTORS; v++)
                sums[row][v] = (Floats)_mm512_dpbf16_ps((__m512)sums[row][v], value, (__m512bh)w[v]);
        }
    }
}
#endif

template <int ROWS, int COUNT>
inline void multiply(const float* x, int64_t stride, const bf16* weights, int64_t panel_size, int64_t depth, Floats (&sums)[ROWS][COUNT * VECTORS]) {
    for (int64_t i = 0; i < depth; i += 2) {
        Words pairs[COUNT * VECTORS];
        Floats w[COUNT * VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < COUNT * VECTORS; v++) {
            memcpy(&pairs[v], weights + v / VECTORS * panel_size + i * WIDTH + v % VECTORS * LANES * 2, sizeof pairs[v]);
            w[v] = as_floats(pairs[v] & 0xffff0000);
        }
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            Floats value = all(x[row * stride + i + 1]);
#pragma GCC unroll 16
            for (int v = 0; v < COUNT * VECTORS; v++) sums[row][v] = fma(value, w[v], sums[row][v]);
        }
#pragma GCC unroll 16
        for (int v = 0; v < COUNT * VECTORS; v++) w[v] = as_floats(pairs[v] << 16);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            Floats value = all(x[row * stride + i]);
#pragma GCC unroll 16
            for (int v = 0; v < COUNT * VECTORS; v++) sums[row][v] = fma(value, w[v], sums[row][v]);
        }
    }
}

// x [ROWS, stride] times COUNT panels from `panel` on, with the bias: to [ROWS][COUNT * VECTORS].
template <int ROWS, int COUNT, class W, class X>
__attribute__((noinline)) void tile(const Packed& packed, const X* x, int64_t stride, int64_t panel, Floats* to) {
    Floats sums[ROWS][COUNT * VECTORS] = {};
    const int64_t panel_size = packed.depth * WIDTH;
    multiply<ROWS, COUNT>(x, stride, reinterpret_cast<const W*>(packed.weights()) + panel * panel_size, panel_size, packed.depth, sums);
    const float* bias = packed.bias.empty() ? nullptr : packed.bias.data() + panel * WIDTH;
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < COUNT * VECTORS; v++) to[row * COUNT * VECTORS + v] = bias ? sums[row][v] + load(bias + v * LANES) : sums[row][v];
}

// How many panels side by side keep the multipliers busy where rows are few.
template <int ROWS>
constexpr int beside() {
    if (LANES == 16) return ROWS <= 2 ? 2 : 1;
    return ROWS == 1 ? 4 : ROWS == 2 ? 3 : ROWS == 3 ? 2 : 1;
}

// ROWS rows over panels [panel, end); emit(row, panel, the panel's vectors).
template <int ROWS, class W, class X, class E>
void strip(const Packed& packed, const X* x, int64_t stride, int64_t first_row, int64_t panel, int64_t end, const E& emit) {
    constexpr int COUNT = beside<ROWS>();
    Floats y[ROWS * COUNT * VECTORS];
    for (int count; panel < end; panel += count) {
        count = panel + COUNT <= end ? COUNT : 1;
        count == COUNT ? tile<ROWS, COUNT, W>(packed, x, stride, panel, y) : tile<ROWS, 1, W>(packed, x, stride, panel, y);
        for (int row = 0; row < ROWS; row++)
            for (int i = 0; i < count; i++) emit(first_row + row, panel + i, y + (row * count + i) * VECTORS);
    }
}

template <class W, class X, class E>
void strip(const Packed& packed, const X* x, int64_t stride, int64_t first_row, int64_t rows, int64_t panel, int64_t end, const E& emit) {
    switch (rows) {
        case 1: return strip<1, W>(packed, x, stride, first_row, panel, end, emit);
        case 2: return strip<2, W>(packed, x, stride, first_row, panel, end, emit);
        case 3: return strip<3, W>(packed, x, stride, first_row, panel, end, emit);
        case 4: return strip<4, W>(packed, x, stride, first_row, panel, end, emit);
        case 5: return strip<5, W>(packed, x, stride, first_row, panel, end, emit);
        default: return strip<BLOCK, W>(packed, x, stride, first_row, panel, end, emit);
    }
}

// All rows: x [rows, stride], where inputs up to packed.depth must be finite.
template <class W, class X, class E>
void linear(const Packed& packed, const X* x, int64_t stride, int64_t rows, Threads& threads, const E& emit) {
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    const int64_t panel_bytes = packed.depth * WIDTH * (int64_t)sizeof(W);
    const int64_t share = (packed.panels + threads.count() - 1) / threads.count();
    const int64_t even = packed.panels / (16 * threads.count());  // small enough that nobody waits long for the last one
    const int64_t group = std::max<int64_t>(1, std::min(std::min(RESIDENT / panel_bytes, share), std::max<int64_t>(even, beside<1>())));
    threads.run((packed.panels + group - 1) / group, [&](int64_t task, int) {
        const int64_t first = task * group, end = std::min(packed.panels, first + group);
        for (int64_t block = 0; block < blocks; block++) {  // sizes differ by one at most
            const int64_t begin = rows * block / blocks, after = rows * (block + 1) / blocks;
            strip<W>(packed, x + begin * stride, stride, begin, after - begin, first, end, emit);
        }
    });
}

// The same into fp32 rows `to` [rows, outputs]: emit(place, vector) for each vector of outputs, in W's order (not of paired weights).
// Of a last one that is not whole, what is there is copied out and back.
template <class W, class X, class E>
void linear_to(const Packed& packed, const X* x, int64_t stride, int64_t rows, Threads& threads, float* to, const E& emit) {
    const int64_t outputs = packed.outputs;
    linear<W>(packed, x, stride, rows, threads, [=](int64_t row, int64_t panel, const Floats* y) {
        for (int v = 0; v < VECTORS; v++) {
            const int64_t column = panel * WIDTH + v * LANES, left = outputs - column;
            float* at = to + row * outputs + column;
            if (left >= LANES) {
                emit(at, y[v]);
            } else if (left > 0) {
                float some[LANES] = {};
                memcpy(some, at, left * sizeof(float));
                emit(some, y[v]);
                memcpy(at, some, left * sizeof(float));
            }
        }
    });
}
