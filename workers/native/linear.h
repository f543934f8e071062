// y = x Wᵀ + b for weights of all kinds, rows and panels shared out among threads.
#pragma once
#include "activations.h"
#include "packed.h"
#include "quantized.h"

template <class X>
const Tiles& tiles_for(const Packed& packed) {
    switch (packed.kind) {
        case Kind::fp32: return tiles_of<Dense<float, float>>;
        case Kind::bf16: return tiles_of<Dense<bf16, X>>;
        case Kind::int8: return packed.dynamic ? tiles_of<Grouped<Integers<8>>> : tiles_of<Grouped<Fields<Kind::int8>>>;
        case Kind::int4: return packed.dynamic ? tiles_of<Grouped<Integers<4>>> : tiles_of<Grouped<Fields<Kind::int4>>>;
        default: return tiles_of<Grouped<Fields<Kind::fp8>>>;
    }
}

// All rows: x [rows, stride], where inputs up to packed.depth must be finite; emit(row, panel, the panel's vectors).
template <class X, class E>
void linear(const Packed& packed, const X* x, int64_t stride, int64_t rows, Threads& threads, const E& emit) {
    const Rows taken = taken_by(packed, x, stride, rows, threads);
    const Tiles& tiles = tiles_for<X>(packed);
    const int64_t blocks = (rows + BLOCK - 1) / BLOCK;
    const int64_t share = (packed.panels + threads.count() - 1) / threads.count();
    const int64_t even = packed.panels / (16 * threads.count());  // small enough that nobody waits long for the last one
    const int64_t group = std::max<int64_t>(1, std::min(std::min(RESIDENT / packed.panel_bytes, share), std::max<int64_t>(even, beside(1))));
    threads.run((packed.panels + group - 1) / group, [&](int64_t task, int) {
        Floats y[BLOCK * VECTORS];
        const int64_t end = std::min(packed.panels, (task + 1) * group);
        for (int64_t block = 0; block < blocks; block++) {  // sizes differ by one at most
            const int64_t begin = rows * block / blocks, count = rows * (block + 1) / blocks - begin;
            for (int64_t panel = task * group, some; panel < end; panel += some) {
                const bool room = panel + beside(count) <= end;
                some = room ? beside(count) : 1;
                (room ? tiles.some : tiles.one)[count - 1](packed, taken, begin, panel, y);
                for (int64_t row = 0; row < count; row++)
                    for (int64_t i = 0; i < some; i++) emit(begin + row, panel + i, y + (row * some + i) * VECTORS);
            }
        }
    });
}

// The same into fp32 rows `to` [rows, outputs]: emit(place, vector) for each vector of outputs, in W's order (not of paired weights).
// Of a last one that is not whole, what is there is copied out and back.
template <class X, class E>
void linear_to(const Packed& packed, const X* x, int64_t stride, int64_t rows, Threads& threads, float* to, const E& emit) {
    const int64_t outputs = packed.outputs;
    linear(packed, x, stride, rows, threads, [=](int64_t row, int64_t panel, const Floats* y) {
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
