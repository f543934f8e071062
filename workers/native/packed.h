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
#include <algorithm>
#include <vector>

#include "memory.h"
#include "simd.h"
#include "threads.h"

constexpr int VECTORS = LANES == 16 ? 4 : 2;  // of a panel
constexpr int WIDTH = VECTORS * LANES;
constexpr int BLOCK = 6;                  // rows at a time: their accumulators, and what else is needed, fit the registers
constexpr int64_t RESIDENT = 192 << 10;  // bytes of panels that a row block passes over before the next row block

// What weights are kept in. The numbers are those of workers/native/library.py.
enum class Kind : int { fp32, bf16, int8, int4, fp8 };

// largest [rows]: the greatest magnitude of each row's inputs here -> of those of all ranks.
typedef void (*Exchange)(float* largest, int64_t rows);

struct Packed {
    int64_t outputs, inputs;
    int64_t panels, depth;  // depth: inputs, of bf16 rounded up to even, of quantized weights to a multiple of 8
    int64_t panel_bytes;     // of weights
    Kind kind;
    bool paired;             // each panel: WIDTH / 2 outputs of the first half of W, and those WIDTH / 2 of the second half beside them
    bool dynamic;            // quantized weights: activations are quantized as well
    bool asymmetric;         // there are zero-points
    int64_t groups, group;   // of quantized weights: an output's, and the inputs of one (the last has what is behind the inputs, too)
    Zeros memory;            // panels; of quantized weights then scales and zero-points, [panels, groups, WIDTH] each
    std::vector<float> bias; // [panels * WIDTH] in the order of the panels, or none
    Exchange exchange = nullptr;  // dynamic, of a rank that has some inputs: outputs are not multiplied by the rows' scales yet

    char* weights() const { return memory.at(); }
    float* scales() const { return reinterpret_cast<float*>(memory.at() + panels * panel_bytes); }
    uint8_t* zeros() const { return asymmetric ? reinterpret_cast<uint8_t*>(scales() + panels * groups * WIDTH) : nullptr; }

    // The output of W in column `column` of panel `panel`; none: outputs or more.
    int64_t output(int64_t panel, int column) const {
        if (!paired) return panel * WIDTH + column;
        int64_t half_width = WIDTH / 2, at = panel * half_width + column % half_width;
        if (at >= outputs / 2) return outputs;
        return column < half_width ? at : outputs / 2 + at;
    }
};

// Sizes, memory, bias [outputs] or none.
inline std::unique_ptr<Packed> make_packed(Kind kind, const float* bias, int64_t outputs, int64_t inputs, bool paired, int64_t groups = 0,
                                           bool dynamic = false, bool asymmetric = false) {
    const int64_t columns = paired ? round_up(outputs / 2, WIDTH / 2) * 2 : round_up(outputs, WIDTH), panels = columns / WIDTH;
    const int64_t depth = round_up(inputs, groups ? 8 : kind == Kind::bf16 ? 2 : 1);
    const int64_t bits = kind == Kind::fp32 ? 32 : kind == Kind::bf16 ? 16 : kind == Kind::int4 ? 4 : 8;
    const int64_t panel_bytes = depth * WIDTH * bits / 8, bytes = panels * (panel_bytes + groups * WIDTH * (asymmetric ? 5 : 4));
    std::unique_ptr<Packed> packed(new Packed{outputs, inputs, panels, depth, panel_bytes, kind, paired, dynamic, asymmetric, groups,
                                              groups ? depth / groups : 0, Zeros(bytes), {}});
    if (bias) {
        packed->bias.resize(columns);
        for (int64_t at = 0; at < columns; at++) {
            int64_t output = packed->output(at / WIDTH, at % WIDTH);
            if (output < outputs) packed->bias[at] = bias[output];
        }
    }
    return packed;
}

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
    auto packed = make_packed(sizeof(W) == 2 ? Kind::bf16 : Kind::fp32, bias, outputs, inputs, paired);
    Threads::Step step(threads);
    threads.run(packed->panels, [&](int64_t panel, int) { pack_panel(*packed, from, panel); });
    return packed.release();
}

// Activations as a kind of weights takes them.
struct Rows {
    const void* at;         // [rows, stride]
    int64_t stride;
    const float* scales;    // [rows] by which sums are multiplied, or none
    const void* sums;       // [rows, groups] of a group's activations, fp32 or int32; where zero-points take them off
};

// Some rows, from `row` on, times some panels, from `panel` on, with the bias: to [rows][panels * VECTORS].
typedef void (*Tile)(const Packed& packed, const Rows& rows, int64_t row, int64_t panel, Floats* to);

// How many panels side by side keep the multipliers busy where rows are few.
constexpr int beside(int rows) {
    if (LANES == 16) return rows <= 2 ? 2 : 1;
    return rows == 1 ? 4 : rows == 2 ? 3 : rows == 3 ? 2 : 1;
}

// For 1, 2, ... BLOCK rows: of one panel, and of beside(rows).
struct Tiles {
    Tile one[BLOCK], some[BLOCK];
};

template <class F>
constexpr Tiles tiles_of = {
    {F::template tile<1, 1>, F::template tile<2, 1>, F::template tile<3, 1>, F::template tile<4, 1>, F::template tile<5, 1>,
     F::template tile<6, 1>},
    {F::template tile<1, beside(1)>, F::template tile<2, beside(2)>, F::template tile<3, beside(3)>, F::template tile<4, beside(4)>,
     F::template tile<5, beside(5)>, F::template tile<6, beside(6)>},
};

template <int ROWS, int N>
inline void put_with_bias(const Packed& packed, int64_t panel, const Floats (&sums)[ROWS][N], Floats* to) {
    const float* bias = packed.bias.empty() ? nullptr : packed.bias.data() + panel * WIDTH;
    for (int row = 0; row < ROWS; row++)
        for (int v = 0; v < N; v++) to[row * N + v] = bias ? sums[row][v] + load(bias + v * LANES) : sums[row][v];
}

// --- products of a few rows and a few panels, all inputs ------------------------------------------------------------

// Whether what few rows have at one input is kept in registers, and weights come one vector after the other, or the other way round:
// beside the sums there is no room for more.
constexpr bool rows_first(int rows, int vectors) { return LANES == 8 && rows < vectors; }

// sums [ROWS][N] += value(row) * weight(v)
template <int ROWS, int N, class X, class W>
__attribute__((always_inline)) inline void outer_product(Floats (&sums)[ROWS][N], const X& value, const W& weight) {
    if constexpr (rows_first(ROWS, N)) {
        Floats x[ROWS];
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) x[row] = value(row);
#pragma GCC unroll 16
        for (int v = 0; v < N; v++) {
            const Floats w = held(weight(v));
#pragma GCC unroll 16
            for (int row = 0; row < ROWS; row++) sums[row][v] = held(fma(x[row], w, sums[row][v]));
        }
    } else {
        Floats w[N];
#pragma GCC unroll 16
        for (int v = 0; v < N; v++) w[v] = weight(v);
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            const Floats x = value(row);
#pragma GCC unroll 16
            for (int v = 0; v < N; v++) sums[row][v] = fma(x, w[v], sums[row][v]);
        }
    }
}

constexpr int64_t AHEAD = 2048;  // bytes

// The `bytes` of each panel that come AHEAD of these. Of one row the memory's own look-ahead is as fast.
template <int ROWS, int COUNT>
__attribute__((always_inline)) inline void fetch_ahead(const void* weights, int64_t panel_bytes, int64_t bytes) {
    if constexpr (ROWS > 1)
        for (int panel = 0; panel < COUNT; panel++)
            for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(weights) + panel * panel_bytes + AHEAD + at);
}

template <int ROWS, int COUNT>
inline void multiply(const float* x, int64_t stride, const float* weights, int64_t panel_size, int64_t depth, Floats (&sums)[ROWS][COUNT * VECTORS]) {
    for (int64_t i = 0; i < depth; i++) {
        fetch_ahead<ROWS, COUNT>(weights + i * WIDTH, panel_size * sizeof(float), WIDTH * sizeof(float));
        outer_product<ROWS, COUNT * VECTORS>(
            sums, [&](int row) { return all(x[row * stride + i]); },
            [&](int v) { return load(weights + v / VECTORS * panel_size + i * WIDTH + v % VECTORS * LANES); });
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
    constexpr int N = COUNT * VECTORS;
    for (int64_t i = 0; i < depth; i += 2) {
        fetch_ahead<ROWS, COUNT>(weights + i * WIDTH, panel_size * sizeof(bf16), WIDTH * 2 * sizeof(bf16));
        auto pair = [&](int v) {
            Words both;
            memcpy(&both, weights + v / VECTORS * panel_size + i * WIDTH + v % VECTORS * LANES * 2, sizeof both);
            return both;
        };
        outer_product<ROWS, N>(sums, [&](int row) { return all(x[row * stride + i + 1]); }, [&](int v) { return as_floats(pair(v) & 0xffff0000); });
        outer_product<ROWS, N>(sums, [&](int row) { return all(x[row * stride + i]); }, [&](int v) { return as_floats(pair(v) << 16); });
    }
}

// Weights W and activations X.
template <class W, class X>
struct Dense {
    template <int ROWS, int COUNT>
    __attribute__((noinline)) static void tile(const Packed& packed, const Rows& rows, int64_t row, int64_t panel, Floats* to) {
        Floats sums[ROWS][COUNT * VECTORS] = {};
        const int64_t panel_size = packed.depth * WIDTH;
        const X* x = static_cast<const X*>(rows.at) + row * rows.stride;
        multiply<ROWS, COUNT>(x, rows.stride, reinterpret_cast<const W*>(packed.weights()) + panel * panel_size, panel_size, packed.depth, sums);
        put_with_bias(packed, panel, sums, to);
    }
};
