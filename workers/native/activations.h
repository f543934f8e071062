// Activations as a kind of weights takes them: as they are, widened, multiplied by powers of two, or quantized.
//
// Dynamic: each row by its own range, symmetric, s = max |x| * 2 / 255, q = clamp(round(x / s), -128, 127), half to even; of fp8
// weights s = max |x| / 448 and the nearest e4m3. A row that has a number that is none has that for a scale. All by eight inputs at a
// time, whatever the vectors are, so that all CPUs have the same bits. Where ranks have parts of the inputs, the range is that of all.
#pragma once
#include <cfloat>

#include "packed.h"
#include "quantized.h"

typedef float Eight __attribute__((vector_size(32)));
typedef int32_t EightInts __attribute__((vector_size(32)));
typedef uint32_t EightWords __attribute__((vector_size(32)));
typedef uint16_t EightHalves __attribute__((vector_size(16)));
typedef int8_t EightBytes __attribute__((vector_size(8)));

inline Eight load_eight(const float* from) {
    Eight v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline Eight load_eight(const bf16* from) {
    EightHalves v;
    memcpy(&v, from, sizeof v);
    return (Eight)(__builtin_convertvector(v, EightWords) << 16);
}

// Those from i on; zeros behind n.
template <class X>
inline Eight eight(const X* x, int64_t i, int64_t n) {
    if (i + 8 <= n) return load_eight(x + i);
    X some[8] = {};
    if (i < n) memcpy(some, x + i, (n - i) * sizeof(X));
    return load_eight(some);
}

template <class V>
inline auto total(V v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

// max |x|; no number where one is none.
template <class X>
inline float largest_of(const X* x, int64_t n) {
    Eight most = {}, bad = {};
    for (int64_t i = 0; i < n; i += 8) {
        const Eight v = eight(x, i, n), size = (Eight)((EightWords)v & 0x7fffffffu);
        most = most > size ? most : size;
        bad += v * 0.0f;
    }
    float largest = most[0];
    for (int i = 1; i < 8; i++) largest = std::max(largest, most[i]);
    return largest + total(bad);
}

// largest * times / over; 1 where that is too small to divide by.
inline float range_of(float largest, float times, float over) {
    const float scale = largest * times / over;
    return scale < FLT_MIN ? 1.0f : scale;
}

// The integer next to v, even of two, for |v| < 2^22.
inline EightInts nearest(Eight v) {
    const float magic = 12582912.0f;  // see exp in simd.h
    return (EightInts)(v + magic) - (EightInts)(magic + Eight{});
}

// The nearest e4m3, even of two: 3 bits behind the first, and none below 2^-9.
inline Eight nearest_e4m3(Eight v) {
    const EightWords bits = (EightWords)v, size = bits & 0x7fffffffu;
    const Eight normal = (Eight)((size + 0x7ffff + (size >> 20 & 1)) & 0xfff00000u);
    const float magic = 24576.0f;  // 1.5 * 2^14: units of 2^-9
    const Eight magnitude = (Eight)size, small = (magnitude + magic) - magic;
    Eight rounded = magnitude < 0.015625f ? small : normal;
    rounded = rounded < 448.0f ? rounded : 448.0f + Eight{};
    return (Eight)((EightWords)rounded | (bits & 0x80000000u));
}

template <class X>
struct Taken {
    const Packed& packed;
    const X* x;
    const float* largest;  // of the row on all ranks, or none: it is looked for
    float* scale;          // of the row, or none
    void* sums;            // [groups]

    float range(float times, float over) const { return range_of(largest ? *largest : largest_of(x, packed.inputs), times, over); }

    // Weight-only, and all fp8.
    template <Kind KIND>
    void fields(float* to) const {
        typedef Fields<KIND> F;
        Eight powers;
        for (int part = 0; part < F::BITS / 4; part++)
            for (int field = 0; field < F::COUNT; field++) powers[part * 4 + F::input(field)] = F::power(field) < 0 ? 0x1p60f : 1.0f / (1 << F::power(field));
        const float by = KIND == Kind::fp8 && packed.dynamic ? range(1.0f, 448.0f) : 1.0f;
        if (scale) *scale = (largest ? 1.0f : by) * 0x1p60f;
        for (int64_t group = 0, i = 0; group < packed.groups; group++) {
            Eight sum = {};
            for (const int64_t end = i + packed.group; i < end; i += 8) {
                Eight v = eight(x, i, packed.inputs);
                if (KIND == Kind::fp8 && packed.dynamic) v = nearest_e4m3(v / by);
                sum += v;
                v *= powers;
                memcpy(to + i, &v, sizeof v);
            }
            static_cast<float*>(sums)[group] = total(sum);
        }
    }

    template <class Q>
    void integers(Q* to) const {
        typedef Q EightValues __attribute__((vector_size(8 * sizeof(Q))));
        const float by = range(2.0f, 255.0f);
        if (scale) *scale = by;
        for (int64_t group = 0, i = 0; group < packed.groups; group++) {
            EightInts sum = {};
            for (const int64_t end = i + packed.group; i < end; i += 8) {
                EightInts q = nearest(eight(x, i, packed.inputs) / by);
                q = q < 127 ? q : 127 + EightInts{};
                q = q > -128 ? q : -128 + EightInts{};
                sum += q;
                const EightValues values = __builtin_convertvector(q, EightValues);
                memcpy(to + i, &values, sizeof values);
            }
            static_cast<int32_t*>(sums)[group] = total(sum);
        }
    }
};

// x [rows, stride] as `packed` takes it; good until the calling thread calls again.
template <class X>
Rows taken_by(const Packed& packed, const X* x, int64_t stride, int64_t rows, Threads& threads) {
    if (packed.kind == Kind::bf16 || (packed.kind == Kind::fp32 && sizeof(X) == 4)) return {x, stride, nullptr, nullptr};
    thread_local Buffer<float> taken, scales, sums, ranges;
    const bool dynamic = packed.dynamic, scaled = packed.kind == Kind::fp8 || (dynamic && !packed.exchange);
    float* const largest = packed.exchange ? ranges.fit(rows) : nullptr;
    if (largest) {
        for (int64_t row = 0; row < rows; row++) largest[row] = largest_of(x + row * stride, packed.inputs);
        packed.exchange(largest, rows);
    }
    const int64_t width = round_up(packed.depth, 16);
    const Rows made{taken.fit(rows * width), width, scaled ? scales.fit(rows) : nullptr, sums.fit(rows * packed.groups)};
    constexpr int64_t share = 4;  // rows: fewer are not worth a hand-over
    threads.run((rows + share - 1) / share, [&, to = taken.fit(0), scale = scales.fit(0), sum = sums.fit(0)](int64_t task, int) {
        for (int64_t row = task * share; row < std::min(rows, (task + 1) * share); row++) {
            const X* from = x + row * stride;
            const Taken<X> one{packed, from, largest ? largest + row : nullptr, scaled ? scale + row : nullptr, sum + row * packed.groups};
            if (packed.kind == Kind::fp32) {
                for (int64_t i = 0; i < width; i += 8) {
                    const Eight v = eight(from, i, packed.inputs);
                    memcpy(to + row * width + i, &v, sizeof v);
                }
            } else if (packed.kind == Kind::fp8) {
                one.template fields<Kind::fp8>(to + row * width);
            } else if (!dynamic) {
                packed.kind == Kind::int8 ? one.template fields<Kind::int8>(to + row * width) : one.template fields<Kind::int4>(to + row * width);
            } else if (packed.kind == Kind::int8) {
                one.integers(reinterpret_cast<Integers<8>::Input*>(to) + row * width);
            } else {
                one.integers(reinterpret_cast<int8_t*>(to) + row * width);
            }
        }
    });
    return made;
}
