// AVX-512 for a CPU that has none: the few instructions that the native kernels name, in plain C++. Included before them, it has the
// AVX-512 paths compiled and tested anywhere. With -DEMULATE_BF16 the product of bf16 pairs too, as the instruction rounds it (second
// element of a pair first; that denormals count as 0 there is left out), and that of bytes (VNNI), which such CPUs have as well.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#ifdef EMULATE_BF16
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#endif

namespace emulated {

typedef float F16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));

inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
    F16 r;
    for (int i = 0; i < 16; i++) r[i] = std::fma(((F16)a)[i], ((F16)b)[i], ((F16)c)[i]);
    return (__m512)r;
}

inline __m256 low(__m512 v) {
    __m256 r;
    memcpy(&r, &v, 32);
    return r;
}

inline __m256 half(__m512 v, int which) {
    __m256 r;
    memcpy(&r, reinterpret_cast<const char*>(&v) + 32 * which, 32);
    return r;
}

inline __m512i widen(__m256i v) {
    uint16_t from[16];
    memcpy(from, &v, 32);
    U16 r;
    for (int i = 0; i < 16; i++) r[i] = from[i];
    return (__m512i)r;
}

template <class T>
inline __m512i widen_bytes(__m128i v) {
    T from[16];
    memcpy(from, &v, 16);
    U16 r;
    for (int i = 0; i < 16; i++) r[i] = (uint32_t)from[i];
    return (__m512i)r;
}

inline __m512 widen_halves(__m256i v) {
    __m128i from[2];
    memcpy(from, &v, 32);
    __m512 r;
    for (int i = 0; i < 2; i++) {
        const __m256 some = _mm256_cvtph_ps(from[i]);
        memcpy(reinterpret_cast<char*>(&r) + 32 * i, &some, 32);
    }
    return r;
}

inline __m256i narrow(__m512i v) {
    uint16_t to[16];
    for (int i = 0; i < 16; i++) to[i] = (uint16_t)((U16)v)[i];
    __m256i r;
    memcpy(&r, to, 32);
    return r;
}

inline __m512i load(const void* from) {
    __m512i v;
    memcpy(&v, from, 64);
    return v;
}

inline __m512i all(int32_t x) {
    U16 r;
    for (int i = 0; i < 16; i++) r[i] = (uint32_t)x;
    return (__m512i)r;
}

inline float upper(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
    F16 r = (F16)sum;
    for (int i = 0; i < 16; i++) {
        const uint32_t x = ((U16)a)[i], y = ((U16)b)[i];
        r[i] = std::fma(upper(x << 16), upper(y << 16), std::fma(upper(x & 0xffff0000), upper(y & 0xffff0000), r[i]));
    }
    return (__m512)r;
}

template <class T>
struct Elements {
    T at[64 / sizeof(T)];
    explicit Elements(__m512i v) { memcpy(at, &v, 64); }
    __m512i vector() const { return load(at); }
};

inline __m512i madd(__m512i a, __m512i b) {
    Elements<int32_t> r(a);
    const Elements<int16_t> x(a), y(b);
    for (int i = 0; i < 16; i++) r.at[i] = x.at[2 * i] * y.at[2 * i] + x.at[2 * i + 1] * y.at[2 * i + 1];
    return r.vector();
}

inline __m512i maddubs(__m512i a, __m512i b) {
    Elements<int16_t> r(a);
    const Elements<uint8_t> x(a);
    const Elements<int8_t> y(b);
    for (int i = 0; i < 32; i++) {
        const int sum = x.at[2 * i] * y.at[2 * i] + x.at[2 * i + 1] * y.at[2 * i + 1];
        r.at[i] = sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum;
    }
    return r.vector();
}

inline __m512i add16(__m512i a, __m512i b) {
    Elements<int16_t> r(a);
    const Elements<int16_t> y(b);
    for (int i = 0; i < 32; i++) r.at[i] = (int16_t)(r.at[i] + y.at[i]);
    return r.vector();
}

inline __m512i dpbusd(__m512i sum, __m512i a, __m512i b) {
    Elements<int32_t> r(sum);
    const Elements<uint8_t> x(a);
    const Elements<int8_t> y(b);
    for (int i = 0; i < 64; i++) r.at[i / 4] += x.at[i] * y.at[i];
    return r.vector();
}

}  // namespace emulated

#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_castps512_ps256 emulated::low
#undef _mm512_extractf32x8_ps
#define _mm512_extractf32x8_ps emulated::half
#define _mm512_cvtepu16_epi32 emulated::widen
#define _mm512_cvtepu8_epi32 emulated::widen_bytes<uint8_t>
#define _mm512_cvtepi8_epi32 emulated::widen_bytes<int8_t>
#define _mm512_cvtph_ps emulated::widen_halves
#undef _mm512_slli_epi32
#define _mm512_slli_epi32(v, n) ((__m512i)((emulated::U16)(v) << (n)))
#define _mm512_cvtepi32_epi16 emulated::narrow
#define _mm512_loadu_si512 emulated::load
#define _mm512_set1_epi32 emulated::all
#define _mm512_dpbf16_ps(sum, a, b) emulated::dot(sum, (__m512i)(a), (__m512i)(b))
#define _mm512_madd_epi16 emulated::madd
#define _mm512_maddubs_epi16 emulated::maddubs
#define _mm512_add_epi16 emulated::add16
#define _mm512_dpbusd_epi32 emulated::dpbusd
