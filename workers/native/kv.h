// What keys and values are kept in, of any kind that a pool has (kv/formats.py, whose formulas these are, to the bit).
//
// A token's row is its heads one after the other, and behind them, where numbers are codes, the parameters of each. Attention reads codes
// as the numbers they stand for without their parameters, which are the same for a whole vector and come in where its products have been
// summed up:
//
//     q · (scale * code + minimum) = scale * (q · code) + minimum * sum(q)
//     sum of w * (scale * code + minimum) = sum of (w * scale) * code, + sum of w * minimum
#pragma once
#include <cmath>

#include "simd.h"

enum Form : int64_t { FLOAT32, BFLOAT16, FLOAT16, INT8, FP8 };  // KV_DTYPES in library.py

struct fp16 {
    uint16_t bits;
};
struct Int8 {  // scale * code + minimum
    uint8_t code;
};
struct Fp8 {  // scale * code, e4m3
    uint8_t code;
};

// bf16 behind a row's vectors, of each one.
template <class KV>
constexpr int64_t PARAMETERS = 0;
template <>
constexpr int64_t PARAMETERS<Int8> = 2;
template <>
constexpr int64_t PARAMETERS<Fp8> = 1;

// A row in units of KV.
template <class KV>
constexpr int64_t row_size(int64_t heads, int64_t size) {
    return heads * (size + PARAMETERS<KV> * 2);
}

// f(KV{}) for the type that a form is of.
template <class F>
inline void with_form(int64_t form, const F& f) {
    switch (form) {
        case FLOAT32: return f(float{});
        case BFLOAT16: return f(bf16{});
        case FLOAT16: return f(fp16{});
        case INT8: return f(Int8{});
        default: return f(Fp8{});
    }
}

// --- numbers of a vector, as they are read -----------------------------------------------------------------------------------

inline Floats load(const Int8* from) {
#if RAYLINE_AVX512
    const Ints v = (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif RAYLINE_AVX2
    const Ints v = (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    Ints v;
    for (int i = 0; i < LANES; i++) v[i] = from[i].code;
#endif
    return __builtin_convertvector(v, Floats);
}

// Sign, exponent and mantissa go where an fp32 has them; its exponent counts from 127, not 7. Denormals come out right too.
inline Floats load(const Fp8* from) {
#if RAYLINE_AVX512
    const Words v = (Words)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif RAYLINE_AVX2
    const Words v = (Words)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    Words v;
    for (int i = 0; i < LANES; i++) v[i] = (uint32_t)(int8_t)from[i].code;
#endif
    return as_floats(v << 20 & 0x87f00000) * 0x1p120f;
}

inline Floats load(const fp16* from) {
#if RAYLINE_AVX512
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif RAYLINE_AVX2 && defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    Words v;
    for (int i = 0; i < LANES; i++) v[i] = from[i].bits;
    const Words bits = (v & 0x7fff) << 13, sign = (v & 0x8000) << 16;
    const Words wide = as_words(as_floats(bits) * 0x1p112f);
    return as_floats(((v & 0x7c00) == 0x7c00 ? bits | 0x7f800000 : wide) | sign);  // inf and NaN have the highest exponent
#endif
}

// The first `count` of LANES, zeros behind them.
template <class KV>
inline Floats load_some(const KV* from, int64_t count) {
    KV some[LANES] = {};
    memcpy(some, from, count * sizeof(KV));
    return load(some);
}

// Of vector `head` of a row of so many heads; a minimum only where there is one.
template <class KV>
inline void parameters(const KV* row, int64_t heads, int64_t size, int64_t head, float& scale, float& minimum) {
    const char* from = reinterpret_cast<const char*>(row) + heads * size + head * PARAMETERS<KV> * 2;
    bf16 found[PARAMETERS<KV>];
    memcpy(found, from, sizeof found);
    scale = widen(found[0]);
    if constexpr (PARAMETERS<KV> == 2) minimum = widen(found[1]);
}

// --- the store ---------------------------------------------------------------------------------------------------------------

// To the nearest, ties to even; beyond the largest to infinity.
inline fp16 to_fp16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return {(uint16_t)(sign | 0x7e00)};
    if (size >= 0x477ff000) return {(uint16_t)(sign | 0x7c00)};  // 65520: halfway to what would come next
    if (size < 0x38800000) return {(uint16_t)(sign | (uint32_t)std::nearbyint(std::fabs(x) * 0x1p24f))};  // denormals, up to 2**-14
    return {(uint16_t)(sign | ((size + 0xfff + (size >> 13 & 1)) - 0x38000000) >> 13)};
}

// The same to e4m3, for numbers up to its largest, 448.
inline uint8_t to_e4m3(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 24 & 0x80, size = bits & 0x7fffffff;
    if (size < 0x3c800000) return sign | (uint32_t)std::nearbyint(std::fabs(x) * 0x1p9f);  // denormals, up to 2**-6
    return sign | ((size + 0x7ffff + (size >> 20 & 1)) - 0x3c000000) >> 20;
}

// To a bf16 away from 0.
inline float away(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0xffff) & 0xffff0000;
    memcpy(&x, &bits, 4);
    return x;
}

inline float toward(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits &= 0xffff0000;
    memcpy(&x, &bits, 4);
    return x;
}

struct Range {
    float least, greatest;
    bool finite;
};

inline Range range_of(const float* x, int64_t size) {
    Range found{x[0], x[0], true};
    for (int64_t i = 0; i < size; i++) {
        found.least = x[i] < found.least ? x[i] : found.least;
        found.greatest = x[i] > found.greatest ? x[i] : found.greatest;
        found.finite &= x[i] - x[i] == 0.0f;
    }
    return found;
}

// Vector `head` of a row of so many heads.
inline void put_vector(float* row, int64_t, int64_t size, int64_t head, const float* x) { memcpy(row + head * size, x, size * sizeof(float)); }

inline void put_vector(bf16* row, int64_t, int64_t size, int64_t head, const float* x) {
    bf16* to = row + head * size;
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES) store(to + i, load(x + i));
    for (; i < size; i++) to[i] = narrow(x[i]);
}

inline void put_vector(fp16* row, int64_t, int64_t size, int64_t head, const float* x) {
    for (int64_t i = 0; i < size; i++) row[head * size + i] = to_fp16(x[i]);
}

inline void put_parameters(void* row, int64_t heads, int64_t size, int64_t head, const bf16* some, int64_t count) {
    memcpy(static_cast<char*>(row) + heads * size + head * count * 2, some, count * 2);
}

inline void put_vector(Int8* row, int64_t heads, int64_t size, int64_t head, const float* x) {
    const Range range = range_of(x, size);
    const float least = range.least + 0.0f, minimum = least < 0 ? away(least) : toward(least);
    const float scale = away((range.greatest - minimum) / 255.0f);
    const bool good = range.finite && scale - scale == 0.0f;
    Int8* to = row + head * size;
    for (int64_t i = 0; i < size; i++) {
        const float steps = good && scale > 0 ? std::nearbyint((x[i] - minimum) / scale) : 0.0f;
        to[i].code = (uint8_t)(steps < 255.0f ? steps : 255.0f);
    }
    const bf16 both[2] = {good ? narrow(scale) : (bf16)0x7fc0, good ? narrow(minimum) : (bf16)0x7fc0};
    put_parameters(row, heads, size, head, both, 2);
}

inline void put_vector(Fp8* row, int64_t heads, int64_t size, int64_t head, const float* x) {
    const Range range = range_of(x, size);
    const float scale = away(std::fmax(std::fabs(range.least), std::fabs(range.greatest)) / 448.0f);
    const bool good = range.finite && scale - scale == 0.0f;
    Fp8* to = row + head * size;
    for (int64_t i = 0; i < size; i++) {
        const float number = good && scale > 0 ? x[i] / scale : 0.0f;
        to[i].code = to_e4m3(number > 448.0f ? 448.0f : number < -448.0f ? -448.0f : number);
    }
    const bf16 one[1] = {good ? narrow(scale) : (bf16)0x7fc0};
    put_parameters(row, heads, size, head, one, 1);
}
