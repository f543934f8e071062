// Vectors of fp32 over the instructions at hand: AVX-512, AVX2 with FMA, or what the compiler makes of plain vector code.
//
// A kernel written over these gives every element of its output the same sequence of operations, whatever is computed beside it.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define RAYLINE_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#define RAYLINE_AVX2 1
#endif

#if RAYLINE_AVX512 && defined(__AVX512BF16__)
#define RAYLINE_DOT_BF16 1
constexpr const char* INSTRUCTIONS = "avx512-bf16";
#elif RAYLINE_AVX512
constexpr const char* INSTRUCTIONS = "avx512";
#elif RAYLINE_AVX2
constexpr const char* INSTRUCTIONS = "avx2";
#else
constexpr const char* INSTRUCTIONS = "portable";
#endif

#if RAYLINE_AVX512
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t bf16;  // its bits

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline Floats load(const float* from) {
    Floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Floats v) { memcpy(to, &v, sizeof v); }

// In a register here and now: compilers would read memory once for each use, or much ahead, for which 16 registers have no room.
inline Floats held(Floats v) {
#if RAYLINE_AVX2
    asm("" : "+x"(v));
#endif
    return v;
}

inline Floats all(float x) { return x - Floats{}; }

inline Floats as_floats(Words v) { return (Floats)v; }
inline Words as_words(Floats v) { return (Words)v; }

// a * b + c with one rounding where the machine can.
inline Floats fma(Floats a, Floats b, Floats c) {
#if RAYLINE_AVX512
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif RAYLINE_AVX2
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    Floats r;
    for (int i = 0; i < LANES; i++) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return r;
#else
    return a * b + c;
#endif
}

inline Floats max(Floats a, Floats b) { return a > b ? a : b; }

#if RAYLINE_AVX512
inline __m256 folded(Floats v) { return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1)); }
#elif RAYLINE_AVX2
inline __m256 folded(Floats v) { return (__m256)v; }
#endif

// The sums of four vectors' elements, each by the same tree.
inline void sums4(Floats a, Floats b, Floats c, Floats d, float* to) {
#if RAYLINE_AVX512 || RAYLINE_AVX2
    __m256 ab = _mm256_hadd_ps(folded(a), folded(b)), cd = _mm256_hadd_ps(folded(c), folded(d));
    __m256 abcd = _mm256_hadd_ps(ab, cd);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
#else
    const Floats v[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++)
        to[i] = ((v[i][0] + v[i][1]) + (v[i][2] + v[i][3])) + ((v[i][4] + v[i][5]) + (v[i][6] + v[i][7]));
#endif
}

inline float sum(Floats v) {
    float s[4];
    sums4(v, v, v, v, s);
    return s[0];
}

// Of numbers; where one is none, that or the largest of some.
inline float largest(Floats v) {
#if RAYLINE_AVX512 || RAYLINE_AVX2
#if RAYLINE_AVX512
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
#else
    const __m256 eight = (__m256)v;
#endif
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#else
    float m = v[0];
    for (int i = 1; i < LANES; i++) m = v[i] > m ? v[i] : m;
    return m;
#endif
}

// e**x to some 2 units in the last place, for x cut to [-87, 88]. Cody & Waite's reduction by ln 2 in two parts, then a polynomial
// of degree 6 (the coefficients of Cephes' expf). What is no number stays none.
inline Floats exp(Floats number) {
    Floats x = max(number, all(-87.0f));
    x = x < 88.0f ? x : all(88.0f);
    const Floats magic = all(12582912.0f);  // 1.5 * 2**23: adding it rounds to an integer, which then stands in the low bits
    Floats t = fma(x, all(1.44269504088896341f), magic);
    Ints n = (Ints)t - (Ints)magic;
    Floats whole = t - magic;
    Floats r = fma(whole, all(-0.693359375f), x);
    r = fma(whole, all(2.12194440e-4f), r);
    Floats p = all(1.9875691500e-4f);
    p = fma(p, r, all(1.3981999507e-3f));
    p = fma(p, r, all(8.3334519073e-3f));
    p = fma(p, r, all(4.1665795894e-2f));
    p = fma(p, r, all(1.6666665459e-1f));
    p = fma(p, r, all(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    const Floats power = (Floats)((Ints)p + (n << 23));
    return number == number ? power : number;
}

inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

// --- bfloat16: the upper half of an fp32 ---------------------------------------------------------------------------

inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

// To the nearest, ties to even. Numbers that are none stay none.
inline bf16 narrow(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return (bits >> 16) | 0x40;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline Floats rounded_to_bf16(Floats v) {
    Words bits = as_words(v);
    Words nearest = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    Words nan = (bits | 0x400000) & 0xffff0000;
    return as_floats((bits & 0x7fffffff) > 0x7f800000 ? nan : nearest);
}

// LANES consecutive bf16 as fp32.
inline Floats load(const bf16* from) {
#if RAYLINE_AVX512
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif RAYLINE_AVX2
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#else
    Floats v;
    for (int i = 0; i < LANES; i++) v[i] = widen(from[i]);
    return v;
#endif
}

inline void store(bf16* to, Floats v) {
    Words bits = as_words(rounded_to_bf16(v)) >> 16;
#if RAYLINE_AVX512
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16((__m512i)bits));
#elif RAYLINE_AVX2
    __m128i low = _mm256_castsi256_si128((__m256i)bits), high = _mm256_extracti128_si256((__m256i)bits, 1);
    _mm_storeu_si128((__m128i*)to, _mm_packus_epi32(low, high));
#else
    for (int i = 0; i < LANES; i++) to[i] = (bf16)bits[i];
#endif
}

// --- what activations are kept in on their way into a linear with weights of type W ---------------------------------

// Weights bf16: activations are rounded to bf16 too, and kept as such where the machine multiplies them, else as fp32.
template <class W>
struct Activation {
    typedef float type;
    static void put(float* to, Floats v) { store(to, sizeof(W) == 2 ? rounded_to_bf16(v) : v); }
};

#if RAYLINE_DOT_BF16
template <>
struct Activation<bf16> {
    typedef bf16 type;
    static void put(bf16* to, Floats v) { store(to, v); }
};
#endif
