// Linears over weights in 8 and 4 bits, in the panels of packed.h: each row the same bits whatever the number of rows.
//
// An output's inputs are in groups with a scale s and a zero-point z of their own (one group: all inputs), w = (q - z) s. What is stored
// is u = q + 2^(bits - 1), no less than 0, so that a group's part of the output is
//
//     s sum (q - z) x = s (sum u x - (z + 2^(bits - 1)) sum x)
//
// where sum x is taken once for all outputs (activations.h). sum u x is one accumulator in the order of the inputs that is given below;
// the parts of groups are added in order, each by one fma, then multiplied by the row's scale, then the bias is added.
//
//     weight-only   sums in fp32. Converting a field of a word where it stands gives u 2^k, so x comes multiplied by 2^-k: exact.
//     fp8 (e4m3)    its bits, moved to where those of fp32 are, are w 2^-120: x comes multiplied by 2^60, as does the row's scale.
//     dynamic       sums in int32, exact: u x <= 255 * 128, of 4 bits 15 * 128, times less than 65,000 inputs.
//
// Sums of integers are the same bits by all instructions; those of fp32 where an fma is one.
//
// A panel holds eight inputs of WIDTH outputs after the other. Of 8 bits: WIDTH words of four inputs each, WIDTH more of the next four.
// Of 4 bits: WIDTH words, in whose bytes the low halves are the first four inputs, the high halves the others.
#pragma once
#include <type_traits>

#include "packed.h"

constexpr int UNIT = 8;  // inputs

#if RAYLINE_AVX512 && defined(__AVX512VNNI__)
#define RAYLINE_DOT_INT8 1
constexpr bool DOT_INT8 = true;
#else
constexpr bool DOT_INT8 = false;
#endif

typedef uint8_t LaneBytes __attribute__((vector_size(LANES)));

inline Words load_words(const char* from) {
    Words v;
    memcpy(&v, from, sizeof v);
    return v;
}

inline Words words(uint32_t x) { return x + Words{}; }

inline Floats as_numbers(Ints v) { return __builtin_convertvector(v, Floats); }

// Adds here and now. Sums of integers over several steps a compiler would join otherwise, and keep their parts in memory.
inline void add_to(Ints& sum, Ints v) {
    sum += v;
#if RAYLINE_AVX2
    asm("" : "+x"(sum));
#endif
}

// Of each word's two 16-bit integers, the sum of products.
inline Ints dot2(Words a, Words b) {
#if RAYLINE_AVX512
    return (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif RAYLINE_AVX2
    return (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
    return ((Ints)(a << 16) >> 16) * ((Ints)(b << 16) >> 16) + ((Ints)a >> 16) * ((Ints)b >> 16);
#endif
}

// To sum, of each word's four bytes the products, a's of 0 to 15, b's signed; then the same of c and d.
inline void add_dot8(Ints& sum, Words a, Words b, Words c, Words d) {
#if RAYLINE_DOT_INT8
    sum = (Ints)_mm512_dpbusd_epi32(_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)b), (__m512i)c, (__m512i)d);
#elif RAYLINE_AVX512
    __m512i halves = _mm512_add_epi16(_mm512_maddubs_epi16((__m512i)a, (__m512i)b), _mm512_maddubs_epi16((__m512i)c, (__m512i)d));
    add_to(sum, dot2((Words)halves, words(0x00010001u)));
#elif RAYLINE_AVX2
    __m256i halves = _mm256_add_epi16(_mm256_maddubs_epi16((__m256i)a, (__m256i)b), _mm256_maddubs_epi16((__m256i)c, (__m256i)d));
    add_to(sum, dot2((Words)halves, words(0x00010001u)));
#else
    for (int j = 0; j < 4; j++) {
        const int up = 24 - 8 * j;
        sum += (Ints)(a << up >> 24) * ((Ints)(b << up) >> 24) + (Ints)(c << up >> 24) * ((Ints)(d << up) >> 24);
    }
#endif
}

// --- packing --------------------------------------------------------------------------------------------------------

struct Quantized {
    const uint8_t* values;  // [outputs, inputs]: int8 of 8 or 4 bits, or e4m3
    const float* scale;     // [outputs, groups]
    const int8_t* zero;     // [outputs, groups] or none
    int64_t groups;
};

// Where in a word the product of 16-bit integers wants an input of four: it takes bytes 0 and 2 together, then 1 and 3.
constexpr int place(int64_t input, bool dynamic) { return dynamic && !DOT_INT8 ? (input % 2 * 2 + input / 2) : input; }

inline void pack_panel(const Packed& packed, const Quantized& from, int64_t panel) {
    uint8_t* to = reinterpret_cast<uint8_t*>(packed.weights() + panel * packed.panel_bytes);
    const int offset = packed.kind == Kind::fp8 ? 0 : packed.kind == Kind::int8 ? 128 : 8;
    for (int column = 0; column < WIDTH; column++) {
        const int64_t output = packed.output(panel, column);
        if (output >= packed.outputs) continue;
        const uint8_t* row = from.values + output * packed.inputs;
        for (int64_t i = 0; i < packed.inputs; i++) {
            const uint8_t value = row[i] + offset;
            if (packed.kind == Kind::int4) to[(i / 8 * WIDTH + column) * 4 + i % 4] |= value << (i % 8 / 4 * 4);
            else to[(i / 4 * WIDTH + column) * 4 + (packed.kind == Kind::fp8 ? i % 4 : place(i % 4, packed.dynamic))] = value;
        }
        for (int64_t group = 0; group < packed.groups; group++) {
            const int64_t at = (panel * packed.groups + group) * WIDTH + column;
            packed.scales()[at] = from.scale[output * packed.groups + group];
            if (from.zero) packed.zeros()[at] = from.zero[output * packed.groups + group] + offset;
        }
    }
}

inline Packed* pack(Kind kind, const Quantized& from, bool dynamic, const float* bias, int64_t outputs, int64_t inputs, bool paired,
                    Threads& threads) {
    auto packed = make_packed(kind, bias, outputs, inputs, paired, from.groups, dynamic, from.zero);
    Threads::Step step(threads);
    threads.run(packed->panels, [&](int64_t panel, int) { pack_panel(*packed, from, panel); });
    return packed.release();
}

// --- products -------------------------------------------------------------------------------------------------------

// Weight-only. Of four bits the inputs of a unit in the order 0, 4, 1, 5, ...: that of a word's fields.
template <Kind KIND>
struct Fields {
    typedef Floats Sum;
    typedef float Input;
    static constexpr int BITS = KIND == Kind::int4 ? 4 : 8, COUNT = 32 / BITS, OFFSET = KIND == Kind::fp8 ? 0 : 1 << (BITS - 1);

    static constexpr int input(int field) { return BITS == 8 ? field : field / 2 + field % 2 * 4; }

    // 2^-this is what an input is to be multiplied by.
    static constexpr int power(int field) { return KIND == Kind::fp8 ? -60 : field == COUNT - 1 ? 0 : BITS * field; }

    static inline Floats number(Words word, int field) {
        if (KIND == Kind::fp8) return as_floats((Words)((Ints)(word << (24 - 8 * field)) >> 4) & 0x87f00000u);
        return as_numbers((Ints)(field == COUNT - 1 ? word >> (32 - BITS) : word & (((1u << BITS) - 1) << (BITS * field))));
    }

    template <int ROWS, int N>
    __attribute__((always_inline)) static void add(const char* weights, int64_t panel_bytes, const float* x, int64_t stride, Floats (&sums)[ROWS][N]) {
#pragma GCC unroll 2
        for (int part = 0; part < BITS / 4; part++) {
#pragma GCC unroll 8
            for (int field = 0; field < COUNT; field++) {
                outer_product<ROWS, N>(
                    sums, [&](int row) { return all(x[row * stride + part * 4 + input(field)]); },
                    [&](int v) { return number(load_words(weights + v / VECTORS * panel_bytes + (part * WIDTH + v % VECTORS * LANES) * 4), field); });
            }
        }
    }

    static Floats corrected(Floats sum, Ints zero, float inputs) { return KIND == Kind::fp8 ? sum : fma(all(-inputs), as_numbers(zero), sum); }
};

// Activations in integers, too.
template <int BITS>
struct Integers;

template <>
struct Integers<8> {
    typedef Ints Sum;
    typedef std::conditional_t<DOT_INT8, int8_t, int16_t> Input;
    static constexpr int BITS = 8, OFFSET = 128;

    template <int ROWS, int N>
    __attribute__((always_inline)) static void add(const char* weights, int64_t panel_bytes, const Input* x, int64_t stride, Ints (&sums)[ROWS][N]) {
        constexpr int STEPS = DOT_INT8 ? 2 : 4;  // words of activations
#pragma GCC unroll 4
        for (int step = 0; step < STEPS; step++) {
            Words w[N];
#pragma GCC unroll 16
            for (int v = 0; v < N; v++) {
                w[v] = load_words(weights + v / VECTORS * panel_bytes + (step * 2 / STEPS * WIDTH + v % VECTORS * LANES) * 4);
                if (!DOT_INT8) w[v] = step % 2 ? halves_above(w[v]) : w[v] & 0x00ff00ffu;
            }
#pragma GCC unroll 16
            for (int row = 0; row < ROWS; row++) {
                uint32_t some;
                memcpy(&some, x + row * stride + step * (UNIT / STEPS), 4);
                const Words value = words(some);
#pragma GCC unroll 16
                for (int v = 0; v < N; v++) {
#if RAYLINE_DOT_INT8
                    sums[row][v] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[row][v], (__m512i)w[v], (__m512i)value);
#else
                    add_to(sums[row][v], dot2(w[v], value));
#endif
                }
            }
        }
    }

    // The upper byte of each half of a word.
    static inline Words halves_above(Words w) {
        typedef uint16_t Halves __attribute__((vector_size(LANES * 4)));
        return (Words)((Halves)w >> 8);
    }

    static Floats corrected(Ints sum, Ints zero, int32_t inputs) { return as_numbers(sum - zero * inputs); }
};

template <>
struct Integers<4> {
    typedef Ints Sum;
    typedef int8_t Input;
    static constexpr int BITS = 4, OFFSET = 8;

    template <int ROWS, int N>
    __attribute__((always_inline)) static void add(const char* weights, int64_t panel_bytes, const int8_t* x, int64_t stride, Ints (&sums)[ROWS][N]) {
        Words low[N], high[N];
#pragma GCC unroll 16
        for (int v = 0; v < N; v++) {
            const Words word = load_words(weights + v / VECTORS * panel_bytes + v % VECTORS * LANES * 4);
            low[v] = word & 0x0f0f0f0fu;
            high[v] = word >> 4 & 0x0f0f0f0fu;
        }
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
            uint32_t some[2];
            memcpy(some, x + row * stride, 8);
            const Words first = words(some[0]), second = words(some[1]);
#pragma GCC unroll 16
            for (int v = 0; v < N; v++) add_dot8(sums[row][v], low[v], first, high[v], second);
        }
    }

    static Floats corrected(Ints sum, Ints zero, int32_t inputs) { return as_numbers(sum - zero * inputs); }
};

template <class F>
struct Grouped {
    template <int ROWS, int COUNT>
    __attribute__((noinline)) static void tile(const Packed& packed, const Rows& rows, int64_t row, int64_t panel, Floats* to) {
        typedef std::conditional_t<std::is_same_v<typename F::Sum, Floats>, float, int32_t> Total;
        constexpr int N = COUNT * VECTORS;
        const auto* x = static_cast<const typename F::Input*>(rows.at) + row * rows.stride;
        const Total* totals = static_cast<const Total*>(rows.sums) + row * packed.groups;
        const char* weights = packed.weights() + panel * packed.panel_bytes;
        Floats sums[ROWS][N] = {};
        for (int64_t group = 0; group < packed.groups; group++) {
            typename F::Sum part[ROWS][N];
            sum_up(weights, packed.panel_bytes, x, rows.stride, packed.group / UNIT, part);
            weights += packed.group * WIDTH * F::BITS / 8;
            x += packed.group;
            for (int v = 0; v < N; v++) {
                const int64_t at = ((panel + v / VECTORS) * packed.groups + group) * WIDTH + v % VECTORS * LANES;
                const Floats scale = load(packed.scales() + at);
                const Ints zero = packed.asymmetric ? load_bytes(packed.zeros() + at) : F::OFFSET + Ints{};
                for (int i = 0; i < ROWS; i++)
                    sums[i][v] = fma(scale, F::corrected(part[i][v], zero, totals[i * packed.groups + group]), sums[i][v]);
            }
        }
        if (rows.scales)
            for (int i = 0; i < ROWS; i++)
                for (int v = 0; v < N; v++) sums[i][v] *= all(rows.scales[row + i]);
        put_with_bias(packed, panel, sums, to);
    }

    // Over so many units, in registers.
    template <int ROWS, int N>
    __attribute__((always_inline)) static void sum_up(const char* weights, int64_t panel_bytes, const typename F::Input* x, int64_t stride,
                                                      int64_t units, typename F::Sum (&to)[ROWS][N]) {
        typename F::Sum sums[ROWS][N] = {};
        for (int64_t unit = 0; unit < units; unit++, weights += WIDTH * F::BITS, x += UNIT) {
            fetch_ahead<ROWS, N / VECTORS>(weights, panel_bytes, WIDTH * F::BITS);
            F::template add<ROWS, N>(weights, panel_bytes, x, stride, sums);
        }
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++)
#pragma GCC unroll 16
            for (int v = 0; v < N; v++) to[row][v] = sums[row][v];
    }

    static inline Ints load_bytes(const uint8_t* from) {
        LaneBytes bytes;
        memcpy(&bytes, from, sizeof bytes);
        return __builtin_convertvector(bytes, Ints);
    }
};
