// Vectors, weights and the division of work, shared by the kernels of this directory.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16, ROWS = 4;  // floats per vector, weight rows per tile
constexpr int64_t BLOCK = 64, SCALES = 256;  // 4-bit weights per scale; 8-bit scales per second-level scale
constexpr int64_t AHEAD = 8192;              // prefetch distance in packed weights, in bytes
using Floats = float __attribute__((vector_size(64)));
using UInt32s = uint32_t __attribute__((vector_size(64)));
using UInt16s = uint16_t __attribute__((vector_size(32)));
using Int32s = int32_t __attribute__((vector_size(64)));
struct BFloat16 { uint16_t bits; };

enum Kind : int64_t { PLAIN, INT8, FOUR_BIT };

// Sizes and strides are in elements. As in PyTorch a weight is (out, in). A linear layer is one or several parts, which are
// concatenated along out.
struct Part {
    int64_t kind, rows, width;
    const void *data;            // PLAIN: of the model's dtype. FOUR_BIT: two codes per byte, the first in the high bits
    const float *bias;           // may be null
    const float *scales;         // INT8: 127 times those of the rows. FOUR_BIT: of blocks, or of groups of scale_codes
    const float *values;         // FOUR_BIT: of the 16 codes
    const uint8_t *scale_codes;  // FOUR_BIT: null unless the scales are quantized, too
    const float *scale_values;   // of the 256 scale_codes
    double scale_offset;
};

inline Floats load(const float *at) {
    Floats found;
    std::memcpy(&found, at, sizeof found);
    return found;
}

inline Floats load(const BFloat16 *at) {
    UInt16s bits;
    std::memcpy(&bits, at, sizeof bits);
    const UInt32s wide = __builtin_convertvector(bits, UInt32s) << 16;
    Floats found;
    std::memcpy(&found, &wide, sizeof found);
    return found;
}

// 16 bytes as 32-bit integers. Compilers widen them badly on their own.
template <class Wide, class Byte>
inline Wide widen(const Byte *at) {
    Wide found;
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(at));
    const __m512i wide = std::is_signed<Byte>::value ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
    std::memcpy(&found, &wide, sizeof found);
#elif defined(__AVX2__)
    __m256i halves[2];
    for (int half = 0; half < 2; ++half) {
        const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(at + 8 * half));
        halves[half] = std::is_signed<Byte>::value ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
    }
    std::memcpy(&found, halves, sizeof found);
#else
    for (int64_t lane = 0; lane < LANES; ++lane) found[lane] = at[lane];
#endif
    return found;
}

inline Floats load(const int8_t *at) { return __builtin_convertvector(widen<Int32s>(at), Floats); }

inline void store(float *at, Floats value) { std::memcpy(at, &value, sizeof value); }

inline void store(BFloat16 *at, Floats value) {  // rounds to nearest even; NaN stays NaN
    UInt32s bits;
    std::memcpy(&bits, &value, sizeof bits);
    const UInt32s rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const UInt16s bf16 = __builtin_convertvector(value == value ? rounded : (bits >> 16) | 0x40, UInt16s);
    std::memcpy(at, &bf16, sizeof bf16);
}

inline float sum(Floats value) {
    using Eight = float __attribute__((vector_size(32)));
    using Four = float __attribute__((vector_size(16)));
    Eight halves[2];
    std::memcpy(halves, &value, sizeof halves);
    const Eight eight = halves[0] + halves[1];
    Four quarters[2];
    std::memcpy(quarters, &eight, sizeof quarters);
    const Four four = quarters[0] + quarters[1];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// e to the power of each value, exact to two units in the last place; below -87 a tiny number, above 88 a large one.
inline Floats exponential(Floats x) {
    x = x < -87.0f ? Floats{} - 87.0f : x > 88.0f ? Floats{} + 88.0f : x;  // NaN stays NaN
    const Floats shifted = x * 1.44269504f + 12582912.0f, count = shifted - 12582912.0f;  // rounds x / ln 2
    const Floats rest = (x - count * 0.693359375f) + count * 2.12194440e-4f;
    Floats series = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    for (const float factor : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        series = series * rest + factor;
    UInt32s bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4B400000 + 127) << 23;  // 2 to the power of count
    Floats scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return (series * rest * rest + rest + 1.0f) * scale;
}

// Outputs first .. last - 1.
struct Range {
    int64_t first, last;
};

// Keys and values (layers, 2, kv_heads, tokens, head_dim); kv_stride is the distance of values from keys.
struct KVBlock {
    void *data;
    int64_t tokens, layer_stride, kv_stride, head_stride;
};

// Whether two rows attend to the same blocks, apart from the last of each; those of row r are first[r] .. first[r + 1] - 1.
inline bool same_prefix(const int64_t *first, const KVBlock *blocks, int64_t row, int64_t other) {
    const int64_t count = first[row + 1] - first[row] - 1;
    bool same = count > 0 && count == first[other + 1] - first[other] - 1;
    for (int64_t at = 0; same && at < count; ++at) {
        const KVBlock &left = blocks[first[row] + at], &right = blocks[first[other] + at];
        same = left.data == right.data && left.tokens == right.tokens;
    }
    return same;
}

// Rotary embedding: out (head_dim) = x rotated by its position; the first half of sin is negative.
inline void rotate(const float *x, const float *cos, const float *sin, int64_t size, float *out) {
    const int64_t half = size / 2;
    for (int64_t at = 0; at < half; ++at) out[at] = x[at] * cos[at] + x[at + half] * sin[at];
    for (int64_t at = half; at < size; ++at) out[at] = x[at] * cos[at] + x[at - half] * sin[at];
}

// The outputs of this thread among `count`, in whole units but for the last.
inline Range thread_range(int64_t count, int64_t unit = 1) {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num(), units = (count + unit - 1) / unit;
    return {std::min(count, units * thread / threads * unit), std::min(count, units * (thread + 1) / threads * unit)};
}

// The scales of `count` blocks of 4-bit weights from block `first` on.
inline void block_scales(const Part &part, int64_t first, int64_t count, float *out) {
    if (!part.scale_codes) {
        std::copy(part.scales + first, part.scales + first + count, out);
        return;
    }
    const float offset = static_cast<float>(part.scale_offset);
    for (int64_t at = first, end = first + count; at < end;) {
        const float scale = part.scales[at / SCALES];
        for (const int64_t last = std::min(end, (at / SCALES + 1) * SCALES); at < last; ++at)
            *out++ = part.scale_values[part.scale_codes[at]] * scale + offset;
    }
}

// table[code % 16] of each code
inline Floats lookup(Floats table, UInt32s codes) {
    Floats found;
#if defined(__AVX512F__)
    const __m512 permuted = _mm512_permutexvar_ps((__m512i)codes, (__m512)table);
    std::memcpy(&found, &permuted, sizeof found);
#elif defined(__AVX2__)
    __m256 tables[2], halves[2];
    __m256i indices[2];
    std::memcpy(tables, &table, sizeof tables), std::memcpy(indices, &codes, sizeof indices);
    for (int half = 0; half < 2; ++half)
        halves[half] = _mm256_blendv_ps(_mm256_permutevar8x32_ps(tables[0], indices[half]),
                                        _mm256_permutevar8x32_ps(tables[1], indices[half]),
                                        _mm256_castsi256_ps(_mm256_slli_epi32(indices[half], 28)));
    std::memcpy(&found, halves, sizeof found);
#else
    float values[LANES];
    store(values, table);
    for (int64_t lane = 0; lane < LANES; ++lane) found[lane] = values[codes[lane] % LANES];
#endif
    return found;
}

struct Pair { Floats even, odd; };

// The 32 weights of 16 bytes: those of the high bits, which are at even places, and those of the low bits.
inline Pair lookup_pair(Floats table, const uint8_t *codes) {
    const UInt32s wide = widen<UInt32s>(codes);
    return {lookup(table, wide >> 4), lookup(table, wide)};
}

inline void store_weights(float *at, Floats value) { store(at, value); }

inline void store_weights(BFloat16 *at, Floats value) {  // as `store`, but faster, and tiny values may become zero
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
    std::memcpy(at, &rounded, sizeof rounded);
#else
    store(at, value);
#endif
}

// Two vectors of the weights of a pair in their order.
inline Pair in_order(Pair pair) {
    Pair found;
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    const __m512 even = (__m512)pair.even, odd = (__m512)pair.odd;
    const __m512 mixed[2] = {_mm512_permutex2var_ps(even, low, odd), _mm512_permutex2var_ps(even, high, odd)};
#else
    float mixed[2 * LANES];
    for (int64_t lane = 0; lane < LANES; ++lane) mixed[2 * lane] = pair.even[lane], mixed[2 * lane + 1] = pair.odd[lane];
#endif
    std::memcpy(&found, mixed, sizeof found);
    return found;
}

// Weights of rows first .. last - 1 of an INT8 or FOUR_BIT part, as T.
template <class T>
void unpack(const Part &part, int64_t first, int64_t last, T *out) {
    const int64_t width = part.width, blocks = width / BLOCK;
    std::vector<float> scales(blocks);
    for (int64_t row = first; row < last; ++row, out += width) {
        if (part.kind == INT8) {
            const Floats scale = Floats{} + part.scales[row] * (1 / 127.0f);
            for (int64_t at = 0; at < width; at += LANES)
                store_weights(out + at, load(static_cast<const int8_t *>(part.data) + row * width + at) * scale);
            continue;
        }
        block_scales(part, row * blocks, blocks, scales.data());
        const uint8_t *codes = static_cast<const uint8_t *>(part.data) + row * width / 2;
        for (int64_t at = 0; at < width; at += 2 * LANES) {
            const Pair pair = in_order(lookup_pair(load(part.values) * scales[at / BLOCK], codes + at / 2));
            store_weights(out + at, pair.even), store_weights(out + at + LANES, pair.odd);
        }
    }
}

}  // namespace
