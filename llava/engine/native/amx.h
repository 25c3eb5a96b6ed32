// Matrix products of bfloat16 on the tiles of Intel AMX, with float32 sums.
//
// A product is of rows of two matrices of one width: left (m, width) times right (n, width)^T. Left rows are read in
// place, 16 at a time; right rows are packed first, 16 as a group of tiles. A sum depends on its two rows only, and not on
// which of them is left: rows are independent of their neighbours, for every number of rows.
#pragma once
#include <memory>

#include "common.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define LLAVA_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#else
#define LLAVA_AMX 0
#endif

namespace {

// Asks Linux for the tile registers, once per process; false without them.
inline bool request_amx() {
#if LLAVA_AMX
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
    return granted;
#else
    return false;
#endif
}

constexpr int64_t SIDE = 16, DEPTH = 32, TILE = SIDE * DEPTH;  // rows, and inputs of one row, of a tile; its elements
constexpr int64_t FETCH_AHEAD = 4096;                          // prefetch distance in keys and values
constexpr int64_t PAIR = 2 * SIDE;                             // rows of two tiles

inline int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// Buffers of one thread.
struct TileScratch { std::vector<uint16_t> rows, left; };

// Inputs (count, width) of a linear layer, packed for the right.
struct TileInputs {
    int64_t count = 0, groups = 0, steps = 0;
    std::vector<uint16_t> tiles, copy;
};

#if LLAVA_AMX

// Writes what tiles read to memory: compilers do not know that the instructions read it.
inline void read_by_tiles(const void *data) { __asm__ volatile("" ::"r"(data) : "memory"); }

// The tile registers of this thread: all of 16 rows of 64 bytes.
struct TileRegisters {
    TileRegisters() {
        struct { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } config;
        for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = 64, config.rows[tile] = SIDE;
        read_by_tiles(&config);
        _tile_loadconfig(&config);
    }
    ~TileRegisters() { _tile_release(); }
};

// Rows as the transpose of 16 x 16 pairs of elements: the right tile of 16 rows of 32 elements.
inline void transpose(__m512i (&rows)[16], uint16_t *out) {
    __m512i other[16];
    for (int at = 0; at < 16; at += 2) {
        other[at] = _mm512_unpacklo_epi32(rows[at], rows[at + 1]);
        other[at + 1] = _mm512_unpackhi_epi32(rows[at], rows[at + 1]);
    }
    for (int at = 0; at < 16; at += 4)
        for (int half = 0; half < 2; ++half) {
            rows[at + 2 * half] = _mm512_unpacklo_epi64(other[at + half], other[at + half + 2]);
            rows[at + 2 * half + 1] = _mm512_unpackhi_epi64(other[at + half], other[at + half + 2]);
        }
    for (int at = 0; at < 4; ++at) {
        const __m512i low = _mm512_shuffle_i32x4(rows[at], rows[at + 4], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(rows[at], rows[at + 4], 0xDD);
        const __m512i low2 = _mm512_shuffle_i32x4(rows[at + 8], rows[at + 12], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(rows[at + 8], rows[at + 12], 0xDD);
        _mm512_storeu_si512(out + DEPTH * at, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(out + DEPTH * (at + 4), _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(out + DEPTH * (at + 8), _mm512_shuffle_i32x4(low, low2, 0xDD));
        _mm512_storeu_si512(out + DEPTH * (at + 12), _mm512_shuffle_i32x4(high, high2, 0xDD));
    }
}

// Pack `count` <= 16 rows for the right: (steps, 16 pairs of inputs, 16 rows); missing rows and inputs are zero.
inline void pack_right(const uint16_t *rows, int64_t count, int64_t stride, int64_t width, uint16_t *out) {
    for (int64_t at = 0; at < width; at += DEPTH, out += TILE) {
        const int64_t left = width - at;
        const __mmask32 mask = left < DEPTH ? (1u << left) - 1 : ~0u;
        __m512i lines[16];
        for (int64_t row = 0; row < 16; ++row)
            lines[row] = row < count ? _mm512_maskz_loadu_epi16(mask, rows + row * stride + at) : _mm512_setzero_si512();
        transpose(lines, out);
    }
}

// Left rows: 16 or 32 of them, of a width that is a multiple of 32.
struct LeftRows {
    const uint16_t *data;
    int64_t stride;
    const uint16_t *ahead;  // rows to prefetch meanwhile, or null
};

// sums (M, N, 16, 16) of M * 16 left rows and N groups of right rows, which are `pitch` tiles apart. With `stride`, the sums
// are written as rows of a matrix, `stride` floats apart.
template <int M, int N>
inline void multiply_tiles(LeftRows left, const uint16_t *right, int64_t pitch, int64_t steps, float *sums,
                           int64_t stride) {
    const int64_t bytes = 2 * left.stride;
    const uint16_t *below = left.data + SIDE * left.stride;
    read_by_tiles(left.data), read_by_tiles(right);
    _tile_zero(0);
    if (N > 1) _tile_zero(1);
    if (M > 1) _tile_zero(2);
    if (M > 1 && N > 1) _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step) {
        _tile_loadd(6, right + step * TILE, 64);
        if (N > 1) _tile_loadd(7, right + (pitch + step) * TILE, 64);
        _tile_loadd(4, left.data + step * DEPTH, bytes);
        _tile_dpbf16ps(0, 4, 6);
        if (N > 1) _tile_dpbf16ps(1, 4, 7);
        if (M > 1) {
            _tile_loadd(5, below + step * DEPTH, bytes);
            _tile_dpbf16ps(2, 5, 6);
            if (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
        if (left.ahead)
            for (int64_t row = 0; row < M * SIDE; ++row)
                __builtin_prefetch(left.ahead + row * left.stride + step * DEPTH, 0, 2);
    }
    const int64_t beside = stride ? SIDE : 256, under = stride ? SIDE * stride : N * 256, line = stride ? 4 * stride : 64;
    _tile_stored(0, sums, line);
    if (N > 1) _tile_stored(1, sums + beside, line);
    if (M > 1) _tile_stored(2, sums + under, line);
    if (M > 1 && N > 1) _tile_stored(3, sums + under + beside, line);
}

inline auto multiplier(int64_t rows, int64_t groups) {
    return rows > SIDE ? (groups > 1 ? multiply_tiles<2, 2> : multiply_tiles<2, 1>)
                       : (groups > 1 ? multiply_tiles<1, 2> : multiply_tiles<1, 1>);
}

// Calls emit(left tile, group, sums (16, 16)) for all products of `count` <= 32 left rows and `groups` groups of right rows.
template <class Emit>
inline void multiply_rows(LeftRows left, int64_t count, const uint16_t *right, int64_t groups, int64_t pitch, int64_t steps,
                          Emit emit) {
    alignas(64) float sums[4 * 256];
    for (int64_t group = 0; group < groups; group += 2, left.ahead = nullptr) {
        const int64_t m = count > SIDE ? 2 : 1, n = std::min<int64_t>(2, groups - group);
        multiplier(count, n)(left, right + group * pitch * TILE, pitch, steps, sums, 0);
        for (int64_t at = 0; at < m * n; ++at) emit(at / n, group + at % n, sums + at * 256);
    }
}

// `count` <= 32 rows of bfloat16 as left rows: in place, or copied behind each other and padded with zeros.
inline LeftRows left_rows(const uint16_t *rows, int64_t count, int64_t stride, int64_t width, std::vector<uint16_t> &copy) {
    if (count % SIDE == 0 && width % DEPTH == 0) return {rows, stride, nullptr};
    const int64_t padded = round_up(width, DEPTH);
    copy.assign(PAIR * padded, 0);
    for (int64_t row = 0; row < count; ++row) std::copy_n(rows + row * stride, width, copy.data() + row * padded);
    return {copy.data(), padded, nullptr};
}

// `count` <= 32 rows of a part from `first` on; packed weights are unpacked to bfloat16.
inline LeftRows left_rows(const Part &part, int64_t first, int64_t count, TileScratch &scratch) {
    const int64_t width = part.width;
    if (part.kind != PLAIN) {
        scratch.rows.resize(PAIR * width);
        unpack(part, first, first + count, reinterpret_cast<BFloat16 *>(scratch.rows.data()));
        return left_rows(scratch.rows.data(), count, width, width, scratch.left);
    }
    const uint16_t *rows = static_cast<const uint16_t *>(part.data) + first * width;
    LeftRows found = left_rows(rows, count, width, width, scratch.left);
    if (found.data == rows && first + 2 * PAIR <= part.rows) found.ahead = rows + PAIR * width;
    return found;
}

inline void pack_inputs(const uint16_t *x, int64_t rows, int64_t width, TileInputs &to) {
    to.count = rows, to.groups = round_up(rows, SIDE) / SIDE, to.steps = round_up(width, DEPTH) / DEPTH;
    to.tiles.resize(to.groups * to.steps * TILE);
    for (int64_t row = 0; row < rows; row += SIDE)
        pack_right(x + row * width, std::min(SIDE, rows - row), width, width, to.tiles.data() + row / SIDE * to.steps * TILE);
}

inline void pack_inputs(const float *x, int64_t rows, int64_t width, TileInputs &to) {
    to.copy.resize(rows * width);
    for (int64_t at = 0; at < rows * width; at += LANES)
        store_weights(reinterpret_cast<BFloat16 *>(to.copy.data()) + at, load(x + at));
    pack_inputs(to.copy.data(), rows, width, to);
}

inline __mmask16 first_lanes(int64_t count) { return count < LANES ? (1u << count) - 1 : 0xFFFF; }

// Calls emit(row, output, 16 sums, mask of the outputs) for the outputs in `range` of all rows.
template <class Emit>
inline void tile_linear(const TileInputs &x, const Part &part, Range range, TileScratch &scratch, Emit emit) {
    const __m512i down = _mm512_mullo_epi32(_mm512_set1_epi32(SIDE), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,
                                                                                       12, 13, 14, 15));
    for (int64_t first = range.first; first < range.last; first += PAIR) {
        const int64_t some = std::min(PAIR, range.last - first);
        const LeftRows left = left_rows(part, first, some, scratch);
        const auto each = [&](int64_t tile, int64_t group, const float *sums) {
            const int64_t output = first + tile * SIDE;
            const __mmask16 mask = first_lanes(range.last - output);
            const __m512 bias = part.bias ? _mm512_maskz_loadu_ps(mask, part.bias + output) : _mm512_setzero_ps();
            for (int64_t row = group * SIDE; row < std::min(x.count, (group + 1) * SIDE); ++row)
                emit(row, output, _mm512_add_ps(_mm512_i32gather_ps(down, sums + row % SIDE, 4), bias), mask);
        };
        multiply_rows(left, some, x.tiles.data(), x.groups, x.steps, x.steps, each);
    }
}

// Pack values (tokens, size) for the right of a product over tokens: groups of 16 values, `pitch` tiles apart.
inline void pack_values(const uint16_t *rows, int64_t tokens, int64_t stride, int64_t size, int64_t pitch, uint16_t *out) {
    const auto line = [&](int64_t token, int64_t at) {
        const __m256i zero = _mm256_setzero_si256();
        const void *row = rows + token * stride + at;
        return _mm512_cvtepu16_epi32(token < tokens ? _mm256_loadu_si256(static_cast<const __m256i *>(row)) : zero);
    };
    for (int64_t token = 0; token < round_up(tokens, DEPTH); token += 2)
        for (int64_t at = 0; at < size; at += SIDE) {
            __builtin_prefetch(rows + (token + DEPTH + at / SIDE % 2) * stride + at / DEPTH * DEPTH, 0, 2);
            _mm512_storeu_si512(out + (at * pitch + token / 2) * DEPTH,
                                _mm512_or_si512(line(token, at), _mm512_slli_epi32(line(token + 1, at), 16)));
        }
}

// Sums of the lanes of 16 vectors.
inline __m512 sums_of(__m512 (&rows)[16]) {
    for (int at = 0; at < 16; at += 2)
        rows[at / 2] = _mm512_add_ps(_mm512_unpacklo_ps(rows[at], rows[at + 1]), _mm512_unpackhi_ps(rows[at], rows[at + 1]));
    for (int at = 0; at < 8; at += 2) {
        const __m512d left = (__m512d)rows[at], right = (__m512d)rows[at + 1];
        rows[at / 2] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(left, right), (__m512)_mm512_unpackhi_pd(left, right));
    }
    for (int at = 0; at < 4; at += 2)
        rows[at / 2] = _mm512_add_ps(_mm512_shuffle_f32x4(rows[at], rows[at + 1], 0x88),
                                     _mm512_shuffle_f32x4(rows[at], rows[at + 1], 0xDD));
    return _mm512_add_ps(_mm512_shuffle_f32x4(rows[0], rows[1], 0x88), _mm512_shuffle_f32x4(rows[0], rows[1], 0xDD));
}

// Softmax attention of the queries of one key head over blocks of keys and values, one after the other.
struct TileAttention {
    TileScratch scratch;
    TileInputs queries;
    std::vector<float> scores;
    std::vector<uint16_t> weights, values;

    // Merges attention of the packed `queries` over `tokens` into out (count, size), which `total` divides at the end.
    void add(const uint16_t *keys, const uint16_t *block, int64_t tokens, int64_t size, float *out, float *top,
             float *total) {
        const int64_t count = queries.count, stride = round_up(tokens, DEPTH), steps = stride / DEPTH;
        scores.resize(count * stride), weights.resize(queries.groups * SIDE * stride), values.resize(stride * size);
        const Part part = {PLAIN, tokens, size, keys, nullptr, nullptr, nullptr, nullptr, nullptr, 0};
        tile_linear(queries, part, {0, tokens}, scratch, [&](int64_t row, int64_t at, __m512 found, __mmask16 mask) {
            _mm512_mask_storeu_ps(scores.data() + row * stride + at, mask, found);
        });
        for (int64_t row = 0; row < count; ++row)
            softmax(scores.data() + row * stride, tokens, stride, size, weights.data() + row * stride, out + row * size,
                    top[row], total[row]);
        pack_values(block, tokens, size, size, steps, values.data());
        for (int64_t first = 0; first < count; first += SIDE) {
            const LeftRows left = {weights.data() + first * stride, stride, nullptr};
            const auto add = [&](int64_t, int64_t group, const float *sums) {
                for (int64_t row = first; row < std::min(count, first + SIDE); ++row) {
                    float *at = out + row * size + group * SIDE;
                    store(at, load(at) + load(sums + (row - first) * SIDE));
                }
            };
            multiply_rows(left, SIDE, values.data(), size / SIDE, steps, steps, add);
        }
    }

    // The same for one query (size), rounded to bfloat16, without tiles, of which it would fill one row.
    void add_one(const uint16_t *keys, const uint16_t *block, int64_t tokens, int64_t size, const float *query, float *out,
                 float &top, float &total) {
        const int64_t stride = round_up(tokens, DEPTH);
        scores.resize(stride), weights.resize(stride), rounded.resize(round_up(size, DEPTH));
        for (int64_t at = 0; at < size; at += LANES)
            store_weights(reinterpret_cast<BFloat16 *>(rounded.data()) + at, load(query + at));
        const auto mask = [&](int64_t at) { return size - at < DEPTH ? 0xFFFFu : ~0u; };
        const auto pairs = [&](const uint16_t *rows, int64_t token, int64_t at) {
            if (token >= tokens) return _mm512_setzero_si512();
            return _mm512_maskz_loadu_epi16(mask(at), rows + token * size + at);
        };
        // The hardware prefetcher does not go on from the keys to the values.
        const auto prefetch = [&](int64_t from, int64_t count) {
            const int64_t keys_end = tokens * size, ahead = std::min(FETCH_AHEAD, keys_end);
            for (int64_t at = from + ahead; at < std::min(from + ahead + count, 2 * keys_end); at += DEPTH)
                __builtin_prefetch(at < keys_end ? keys + at : block + at - keys_end, 0, 2);
        };
        for (int64_t token = 0; token < tokens; token += LANES) {
            prefetch(token * size, LANES * size);
            __m512 products[LANES] = {};
            for (int64_t at = 0; at < size; at += DEPTH) {
                const __m512bh input = (__m512bh)_mm512_maskz_loadu_epi16(mask(at), rounded.data() + at);
                for (int64_t lane = 0; lane < LANES; ++lane)
                    products[lane] = _mm512_dpbf16_ps(products[lane], (__m512bh)pairs(keys, token + lane, at), input);
            }
            _mm512_storeu_ps(scores.data() + token, sums_of(products));
        }
        softmax(scores.data(), tokens, stride, size, weights.data(), out, top, total);
        const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
        const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (int64_t at = 0; at < size; at += 2 * DEPTH) {
            __m512 low[2] = {}, high[2] = {};  // 4 of every 8 values each
            const int64_t halves = size - at > DEPTH ? 2 : 1;
            for (int64_t token = 0; token < tokens; token += 2) {
                int32_t both;
                std::memcpy(&both, weights.data() + token, sizeof both);
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
                for (int64_t half = 0; half < halves; ++half) {
                    const __m512i left = pairs(block, token, at + half * DEPTH);
                    const __m512i right = pairs(block, token + 1, at + half * DEPTH);
                    low[half] = _mm512_dpbf16_ps(low[half], (__m512bh)_mm512_unpacklo_epi16(left, right), weight);
                    high[half] = _mm512_dpbf16_ps(high[half], (__m512bh)_mm512_unpackhi_epi16(left, right), weight);
                }
            }
            for (int64_t half = 0; half < halves; ++half) {
                float *to = out + at + half * DEPTH;
                store(to, load(to) + (Floats)_mm512_permutex2var_ps(low[half], first, high[half]));
                if (size - at - half * DEPTH < DEPTH) continue;
                store(to + LANES, load(to + LANES) + (Floats)_mm512_permutex2var_ps(low[half], second, high[half]));
            }
        }
    }

  private:
    std::vector<uint16_t> rounded;

    // Weights of the tokens relative to the largest score so far, to which `out` and `total` are rescaled.
    static void softmax(float *row, int64_t tokens, int64_t stride, int64_t size, uint16_t *to, float *out, float &top,
                        float &total) {
        std::fill(row + tokens, row + stride, -INFINITY);  // their weights are multiplied with zeros
        Floats largest = load(row), sums = {};
        for (int64_t at = LANES; at < stride; at += LANES) largest = load(row + at) > largest ? load(row + at) : largest;
        float now = top;
        for (int64_t lane = 0; lane < LANES; ++lane) now = std::max(now, largest[lane]);
        for (int64_t at = 0; at < stride; at += LANES) {
            const Floats found = exponential(load(row + at) - now);
            sums += found;
            store_weights(reinterpret_cast<BFloat16 *>(to) + at, found);
        }
        const float scale = std::exp(top - now);
        for (int64_t at = 0; at < size; at += LANES) store(out + at, load(out + at) * scale);
        total = total * scale + sum(sums), top = now;
    }
};

enum Activation : int64_t { NONE, QUICK_GELU, GELU, GATED_SILU };

// out (count, outputs) = activation(x (count, width) weight^T + bias) + residual, of bfloat16. GATED_SILU halves the
// outputs: the first half are gates, the second half is what they multiply. The width is a multiple of 32.
struct LinearCall {
    const Part *part;
    int64_t count, activation, threads;
    const uint16_t *x, *residual;  // the residual may be null, and `out`
    uint16_t *out;
};

// 2 to the power of x, to 4e-5.
inline __m512 power_of_two(__m512 x) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 series = _mm512_set1_ps(0.00961813f);
    for (const float factor : {0.0555041f, 0.2402265f, 0.6931472f, 1.0f})
        series = _mm512_fmadd_ps(series, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(series, whole);
}

// SiLU of slope * x, divided by the slope, to 1e-4: bfloat16 has 4e-3.
inline Floats sigmoid_linear(Floats x, float slope = 1) {
    const __m512 power = power_of_two(_mm512_mul_ps((__m512)x, _mm512_set1_ps(-1.4426950f * slope)));
    return x * (Floats)_mm512_rcp14_ps(_mm512_add_ps(power, _mm512_set1_ps(1)));
}

inline Floats activate(Floats x, int64_t kind) {
    if (kind == QUICK_GELU) return sigmoid_linear(x, 1.702f);
    if (kind == GELU)
        for (int64_t lane = 0; lane < LANES; ++lane) x[lane] *= 0.5f * (1 + std::erf(x[lane] * 0.70710678f));
    return x;
}

// Writes 16 outputs of row `token`, from `output` on, given their sums and, for GATED_SILU, those of their gates.
inline void write(const LinearCall &call, int64_t token, int64_t output, __mmask16 mask, Floats sums, Floats gates) {
    const bool gated = call.activation == GATED_SILU;
    Floats found = gated ? sums * sigmoid_linear(gates) : activate(sums, call.activation);
    const int64_t place = token * (gated ? call.part->rows / 2 : call.part->rows) + output;
    if (call.residual) {
        const __m256i bits = _mm256_maskz_loadu_epi16(mask, call.residual + place);
        found += (Floats)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    _mm256_mask_storeu_epi16(call.out + place, mask, (__m256i)_mm512_cvtneps_pbh((__m512)found));
}

// Multiplies at most 32 rows, which are packed; weights are read in place.
inline void few_rows_on_tiles(const LinearCall &call) {
    constexpr int64_t OUTPUTS = 4 * PAIR;  // of a task
    const Part &part = *call.part;
    const bool gated = call.activation == GATED_SILU;
    const int64_t outputs = gated ? part.rows / 2 : part.rows;
    TileInputs x;
    pack_inputs(call.x, call.count, part.width, x);
#pragma omp parallel num_threads(call.threads)
    {
        const TileRegisters registers;
        TileScratch scratch;
        std::vector<float> gates(gated ? call.count * OUTPUTS : 0);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < outputs; first += OUTPUTS) {
            const int64_t last = std::min(outputs, first + OUTPUTS), up = gated ? outputs : 0;
            const auto keep = [&](int64_t row, int64_t at, __m512 sums, __mmask16 mask) {
                _mm512_mask_storeu_ps(&gates[row * OUTPUTS + at - first], mask, sums);
            };
            if (gated) tile_linear(x, part, {first, last}, scratch, keep);
            const auto finish = [&](int64_t row, int64_t at, __m512 sums, __mmask16 mask) {
                const float *gate = gates.data() + row * OUTPUTS + at - up - first;
                write(call, row, at - up, mask, (Floats)sums, gated ? load(gate) : Floats{});
            };
            tile_linear(x, part, {up + first, up + last}, scratch, finish);
        }
    }
}

// Multiplies many rows: a thread packs some weight rows, and multiplies them with many rows of x.
inline void many_rows_on_tiles(const LinearCall &call) {
    const Part &part = *call.part;
    const bool gated = call.activation == GATED_SILU;
    const int64_t width = part.width, steps = width / DEPTH, outputs = gated ? part.rows / 2 : part.rows;
    const int64_t cached = std::max<int64_t>(PAIR, (int64_t{1} << 19) / width / PAIR * PAIR);  // rows of a mebibyte
    // Weight rows of a task: few enough that no thread waits for long at the end.
    const int64_t panel = std::min(cached, round_up((part.rows + 2 * call.threads - 1) / (2 * call.threads), PAIR));
    const int64_t panels = (part.rows + panel - 1) / panel;
    // Rows of x of a task: as many as the second cache holds, but enough for what packing costs.
    const int64_t tokens = std::max<int64_t>(512, cached), chunks = (call.count + tokens - 1) / tokens;
#pragma omp parallel num_threads(call.threads)
    {
        const TileRegisters registers;
        TileScratch scratch;
        const std::unique_ptr<uint16_t[]> right(new uint16_t[panel * width]);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < chunks * panels; ++task) {
            const int64_t first = task % panels * panel, groups = round_up(std::min(panel, part.rows - first), SIDE) / SIDE;
            const auto row_of = [&](int64_t group) {  // gates and what they multiply take turns
                const int64_t at = first / SIDE + group;
                return SIDE * (gated ? at / 2 + at % 2 * (outputs / SIDE) : at);
            };
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t row = row_of(group), some = std::min(SIDE, part.rows - row);
                const uint16_t *rows = static_cast<const uint16_t *>(part.data) + row * width;
                if (part.kind != PLAIN) {
                    scratch.rows.resize(SIDE * width), rows = scratch.rows.data();
                    unpack(part, row, row + some, reinterpret_cast<BFloat16 *>(scratch.rows.data()));
                }
                pack_right(rows, some, width, width, right.get() + group * steps * TILE);
            }
            const int64_t start = task / panels * tokens, end = std::min(call.count, start + tokens);
            for (int64_t token = start; token < end; token += PAIR) {
                const int64_t count = std::min(PAIR, end - token);
                const LeftRows left = left_rows(call.x + token * width, count, width, width, scratch.left);
                const auto emit = [&](int64_t tile, int64_t group, const float *sums) {
                    if (gated && group % 2 == 0) return;
                    const int64_t row = row_of(group), output = gated ? row - outputs : row;
                    const __mmask16 mask = first_lanes(outputs - output);
                    const auto bias = [&](int64_t from) {
                        return part.bias ? (Floats)_mm512_maskz_loadu_ps(mask, part.bias + from) : Floats{};
                    };
                    const Floats own_bias = bias(row), gate_bias = bias(gated ? output : row);
                    for (int64_t at = 0; at < std::min(SIDE, count - tile * SIDE); ++at) {
                        const Floats gate = gated ? load(sums - SIDE * SIDE + at * SIDE) + gate_bias : Floats{};
                        write(call, token + tile * SIDE + at, output, mask, load(sums + at * SIDE) + own_bias, gate);
                    }
                };
                multiply_rows(left, count, right.get(), groups, steps, steps, emit);
            }
        }
    }
}

inline void linear_on_tiles(const LinearCall &call) {
    if (call.count <= PAIR)
        few_rows_on_tiles(call);
    else
        many_rows_on_tiles(call);
}

// Attention of rows of queries (tokens, heads, size) over the blocks first[row] .. first[row + 1] - 1 of keys and values, of
// which the last are the row's own. Tokens of a row are `starts[row]` .. `starts[row + 1]` - 1 of the queries.
struct AttentionCall {
    int64_t rows, heads, kv_heads, size, layer, causal, query_stride, token_stride, threads;
    double scale;
    const int64_t *starts, *first;
    const KVBlock *blocks;
    const uint16_t *query;
    uint16_t *out;  // (tokens, heads, size)
};

struct PromptAttention {
    const AttentionCall &call;
    std::vector<uint16_t> keys, values, weights, copy;
    std::vector<float> scores;
    std::vector<Range> seen;  // tokens of the blocks, each from a multiple of 32 on
    int64_t pitch = 0;        // tokens for which there is room

    // Attention of the rows of a group for one key head: the blocks that they have in common are packed once.
    void run(Range rows, int64_t head) {
        const int64_t own = call.first[rows.first + 1] - 1, group = call.heads / call.kv_heads;
        int64_t end = 0, longest = 0;
        seen.clear();
        for (int64_t at = call.first[rows.first]; at < own; end = round_up(seen.back().last, DEPTH), ++at)
            seen.push_back({end, end + call.blocks[at].tokens});
        for (int64_t row = rows.first; row < rows.last; ++row)
            longest = std::max(longest, call.blocks[call.first[row + 1] - 1].tokens);
        pitch = round_up(end + longest, DEPTH);
        keys.resize(pitch * round_up(call.size, DEPTH)), values.resize(pitch * call.size);
        weights.resize(PAIR * pitch), scores.resize(PAIR * pitch);
        for (size_t at = 0; at < seen.size(); ++at) pack(call.blocks[call.first[rows.first] + at], head, seen[at].first);
        seen.push_back({end, end});
        for (int64_t row = rows.first; row < rows.last; ++row) {
            const KVBlock &block = call.blocks[call.first[row + 1] - 1];
            seen.back().last = end + block.tokens;
            pack(block, head, end);
            const int64_t count = call.starts[row + 1] - call.starts[row];
            for (int64_t at = head * group; at < (head + 1) * group; ++at)
                for (int64_t first = 0; first < count; first += PAIR)
                    attend(call.starts[row] + first, at, first, std::min(PAIR, count - first));
        }
    }

  private:
    // Packs the keys and values of one head, as tokens from `first` on.
    void pack(const KVBlock &block, int64_t head, int64_t first) {
        const int64_t size = call.size, padded = round_up(size, DEPTH);
        const auto *data = static_cast<const uint16_t *>(block.data) + call.layer * block.layer_stride;
        data += head * block.head_stride;
        for (int64_t token = 0; token < round_up(block.tokens, DEPTH); token += SIDE)
            pack_right(data + token * call.token_stride, std::max<int64_t>(0, std::min(SIDE, block.tokens - token)),
                       call.token_stride, size, keys.data() + (first + token) * padded);
        pack_values(data + block.kv_stride, block.tokens, call.token_stride, size, pitch / DEPTH,
                    values.data() + first / DEPTH * TILE);
    }

    // Queries first .. first + count - 1 of a row, which are tokens from `token` on, for one head.
    void attend(int64_t token, int64_t head, int64_t first, int64_t count) {
        const int64_t size = call.size, steps = round_up(size, DEPTH) / DEPTH, end = pitch;
        const int64_t own = seen.back().first, known = seen.back().last - own;
        const int64_t width = own + round_up(call.causal ? std::min(known, first + count) : known, DEPTH);
        const uint16_t *query = call.query + token * call.query_stride + head * size;
        const LeftRows left = left_rows(query, count, call.query_stride, size, copy);
        for (int64_t at = 0; at < width; at += PAIR)  // which is a multiple of 32
            multiplier(count, 2)(left, keys.data() + at * steps * DEPTH, steps, steps, scores.data() + at, end);
        float totals[PAIR];
        for (int64_t row = 0; row < count; ++row) {
            float *at = scores.data() + row * end;
            for (size_t block = 0; block + 1 < seen.size(); ++block)
                std::fill(at + seen[block].last, at + seen[block + 1].first, -1e30f);
            std::fill(at + own + (call.causal ? std::min(known, first + row + 1) : known), at + width, -1e30f);
            totals[row] = softmax(at, width, weights.data() + row * end);
        }
        auto *out = reinterpret_cast<BFloat16 *>(call.out) + (token * call.heads + head) * size;
        const auto divide = [&](int64_t tile, int64_t group, const float *sums) {
            for (int64_t row = tile * SIDE; row < std::min(count, (tile + 1) * SIDE); ++row)
                store_weights(out + row * call.heads * size + group * SIDE, load(sums + row % SIDE * SIDE) / totals[row]);
        };
        const LeftRows each = {weights.data(), end, nullptr};
        multiply_rows(each, count, values.data(), size / SIDE, end / DEPTH, width / DEPTH, divide);
    }

    float softmax(const float *row, int64_t width, uint16_t *out) const {
        const __m512 scale = _mm512_set1_ps(static_cast<float>(call.scale * 1.4426950408889634));
        __m512 largest = _mm512_loadu_ps(row), sums = _mm512_setzero_ps();
        for (int64_t at = LANES; at < width; at += LANES) largest = _mm512_max_ps(largest, _mm512_loadu_ps(row + at));
        const __m512 top = _mm512_mul_ps(_mm512_set1_ps(_mm512_reduce_max_ps(largest)), scale);
        for (int64_t at = 0; at < width; at += LANES) {
            const __m512 found = power_of_two(_mm512_fmsub_ps(_mm512_loadu_ps(row + at), scale, top));
            sums = _mm512_add_ps(sums, found);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + at), (__m256i)_mm512_cvtneps_pbh(found));
        }
        return _mm512_reduce_add_ps(sums);
    }
};

inline void attend_prompts(const AttentionCall &call) {
    std::vector<Range> groups;  // adjacent rows that differ in their last block only, so that every thread gets some
    const int64_t most = std::max<int64_t>(1, call.rows * call.kv_heads / (4 * call.threads));
    for (int64_t row = 0; row < call.rows; ++row)
        if (row && row - groups.back().first < most && same_prefix(call.first, call.blocks, row - 1, row))
            groups.back().last = row + 1;
        else
            groups.push_back({row, row + 1});
    const int64_t tasks = static_cast<int64_t>(groups.size()) * call.kv_heads;
#pragma omp parallel num_threads(call.threads)
    {
        const TileRegisters registers;
        PromptAttention attention{call};
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < tasks; ++task) attention.run(groups[task / call.kv_heads], task % call.kv_heads);
    }
}
#endif

}  // namespace
