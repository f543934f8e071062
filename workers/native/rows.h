// What a decoder does to one row at a time: norms and rotary embeddings.
#pragma once
#include <cmath>

#include "simd.h"

// 1 / sqrt(mean(x**2) + eps) of n elements (Zhang & Sennrich 2019).
inline float inverse_rms(const float* x, int64_t n, float eps) {
    Floats squares[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int j = 0; j < 4; j++) {
            Floats v = load(x + i + j * LANES);
            squares[j] = fma(v, v, squares[j]);
        }
    for (; i + LANES <= n; i += LANES) {
        Floats v = load(x + i);
        squares[0] = fma(v, v, squares[0]);
    }
    float total = sum((squares[0] + squares[1]) + (squares[2] + squares[3]));
    for (; i < n; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / (float)n + eps);
}

// x [n] -> what a linear with weights W takes; what is behind n in the last vector is zero.
template <class W>
inline void put_row(typename Activation<W>::type* to, const float* x, int64_t n) {
    float last[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) Activation<W>::put(to + i, load(x + i));
    if (i == n) return;
    memcpy(last, x + i, (n - i) * sizeof(float));
    Activation<W>::put(to + i, load(last));
}

// The same of x scaled by its inverse_rms and by `weight` [n].
template <class W>
inline void norm_row(typename Activation<W>::type* to, const float* x, const float* weight, int64_t n, float eps) {
    const Floats scale = all(inverse_rms(x, n, eps));
    float last[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) Activation<W>::put(to + i, load(x + i) * scale * load(weight + i));
    if (i == n) return;
    for (int64_t j = i; j < n; j++) last[j - i] = x[j] * scale[0] * weight[j];
    Activation<W>::put(to + i, load(last));
}

// One head [n], normed if `weight` is there, then turned (Su et al. 2021): pairs at distance n / 2 by cos and sin [n / 2].
inline void turn_head(float* head, int64_t n, const float* weight, float eps, const float* cos, const float* sin) {
    if (weight) {
        const float scale = inverse_rms(head, n, eps);
        for (int64_t i = 0; i < n; i++) head[i] = head[i] * scale * weight[i];
    }
    float *first = head, *second = head + n / 2;
    for (int64_t i = 0; i < n / 2; i++) {
        const float a = first[i], b = second[i];
        first[i] = a * cos[i] - b * sin[i];
        second[i] = b * cos[i] + a * sin[i];
    }
}
