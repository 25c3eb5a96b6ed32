// One decode step of a LLaMA on the CPU: all threads read every weight once, in one parallel region.
//
// A step of a small batch is bound by memory bandwidth and by the overhead between operations. Keys and values are
// float32 or bfloat16; weights are too, or int8 or 4-bit as packed by bitsandbytes. All arithmetic is float32. The
// sums of a row are computed in the same order for every batch size, so its tokens do not depend on its neighbours. See
// `llava/engine/native/decoder.py`.

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

struct Layer {
    const float *norm, *mlp_norm;
    const Part *qkv, *out, *gate_up, *down;
};

struct Model {
    int64_t is_bf16, num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary;
    double eps;
    const float *norm;
    const Part *head;
    const Layer *layers;
};

// Keys and values (layers, 2, kv_heads, tokens, head_dim); kv_stride is the distance of values from keys.
struct KVBlock {
    void *data;
    int64_t tokens, layer_stride, kv_stride, head_stride;
};

// Row r attends to blocks first[r] .. first[r + 1] - 1; the last is its own and has room for one more token.
struct Step {
    int64_t rows, threads, longest;  // longest: tokens of the longest row, with the new one
    float *states;                   // (rows, hidden): embeddings in, last states out
    const float *cos, *sin;          // (rows, head_dim); the first half of sin is negative
    float *logits;                   // (rows, vocabulary)
    const int64_t *first;
    const KVBlock *blocks;
    int64_t num_adapted, max_rank;
    const struct Adapted *adapted;
};

// LoRA adapter of a linear layer of `parts` parts: part k of its outputs gets up[k] (down[k] x). down[k] is (rank, width),
// up[k] (rows, rank); both have no data where a part is not adapted.
struct LowRank {
    int64_t parts, rank;
    const Part *down, *up;
};

// Rows first .. first + count - 1 of a step use an adapter: four linear layers per decoder layer.
struct Adapted {
    int64_t first, count;
    const LowRank *layers;
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

template <class T>
inline float dot(const float *left, const T *right, int64_t width) {
    Floats total = {};
    for (int64_t at = 0; at < width; at += LANES) total += load(left + at) * load(right + at);
    return sum(total);
}

// Outputs first .. last - 1.
struct Range {
    int64_t first, last;
};

// The outputs of this thread among `count`.
inline Range thread_range(int64_t count) {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    return {count * thread / threads, count * (thread + 1) / threads};
}

// The rows of a part in the model's dtype or in int8. `tile` multiplies R of them, from `first` on, with N inputs, and
// prefetches the F rows from `ahead` on, which are `distance` rows further.
template <class T>
struct PlainRows {
    static constexpr bool packed = std::is_same<T, int8_t>::value;
    const Part &part;

    int64_t distance(int64_t rows) const { return packed ? std::max(rows, AHEAD / part.width) : rows; }

    template <int R, int N, int F>
    inline void tile(const float *x, int64_t first, int64_t ahead, float *out, int64_t stride) const {
        const int64_t width = part.width;
        const T *weight = static_cast<const T *>(part.data) + first * width;
        const T *next = static_cast<const T *>(part.data) + ahead * width;
        Floats total[R][N] = {};
        for (int64_t at = 0; at < width; at += LANES) {
            Floats input[N];
            for (int n = 0; n < N; ++n) input[n] = load(x + n * width + at);
            if (!packed || at % 64 == 0)  // once per cache line
                for (int f = 0; f < F; ++f) __builtin_prefetch(next + f * width + at, 0, 2);  // into L2
            for (int r = 0; r < R; ++r) {
                const Floats row = load(weight + r * width + at);
                for (int n = 0; n < N; ++n) total[r][n] += row * input[n];
            }
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) out[n * stride + r] = scaled(sum(total[r][n]), first + r);
    }

    inline float scaled(float value, int64_t row) const {
        if constexpr (packed) value *= part.scales[row] * (1 / 127.0f);
        return value + (part.bias ? part.bias[row] : 0);
    }
};

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

// Buffers of one thread, for the inputs in the order of the codes and the scales of a tile.
struct Scratch { std::vector<float> inputs, scales, sums; };

// The rows of a 4-bit part in float32. The weights equal those that bitsandbytes dequantizes.
struct FourBitRows {
    const Part &part;
    Scratch &scratch;

    FourBitRows(const Part &part, Scratch &scratch) : part(part), scratch(scratch) {
        scratch.scales.resize(ROWS * part.width / BLOCK);
    }

    int64_t distance(int64_t rows) const { return std::max(rows, 2 * AHEAD / part.width); }

    // Every 32 inputs in two vectors, those at even and those at odd places.
    const float *prepare(const float *x, int64_t count) const {
        scratch.inputs.resize(count * part.width);
        float *out = scratch.inputs.data();
        for (int64_t at = 0; at < count * part.width; at += 2 * LANES)
            for (int64_t lane = 0; lane < LANES; ++lane)
                out[at + lane] = x[at + 2 * lane], out[at + LANES + lane] = x[at + 2 * lane + 1];
        return out;
    }

    template <int R, int N, int F>
    inline void tile(const float *x, int64_t first, int64_t ahead, float *out, int64_t stride) const {
        const int64_t width = part.width, bytes = width / 2, blocks = width / BLOCK;
        const uint8_t *data = static_cast<const uint8_t *>(part.data), *weight = data + first * bytes;
        const Floats values = load(part.values);
        float *scales = scratch.scales.data();
        block_scales(part, first * blocks, R * blocks, scales);
        Floats total[R][N] = {};
        for (int64_t block = 0; block < blocks; ++block) {
            if (block % 2 == 0)  // once per cache line
                for (int f = 0; f < F; ++f) __builtin_prefetch(data + (ahead + f) * bytes + block * BLOCK / 2, 0, 2);
            for (int r = 0; r < R; ++r) {
                const Floats table = values * scales[r * blocks + block];
                for (int half = 0; half < 2; ++half) {
                    const int64_t at = block * BLOCK + half * 2 * LANES;
                    const Pair pair = lookup_pair(table, weight + r * bytes + at / 2);
                    for (int n = 0; n < N; ++n) {
                        total[r][n] += pair.even * load(x + n * width + at);
                        total[r][n] += pair.odd * load(x + n * width + at + LANES);
                    }
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int n = 0; n < N; ++n) out[n * stride + r] = sum(total[r][n]) + (part.bias ? part.bias[first + r] : 0);
    }
};

// R rows times all inputs; each tile prefetches F of R rows further on.
template <int R, int F, class Rows>
inline void tiles(const Rows &rows, const float *x, int64_t count, int64_t first, float *out, int64_t stride) {
    int64_t turn = 0;
    for (int64_t n = 0; n < count; turn += F) {
        const float *input = x + n * rows.part.width;
        const int64_t ahead = first + rows.distance(R) + turn % R;
        if (count - n >= 4)
            rows.template tile<R, 4, F>(input, first, ahead, out + n * stride, stride), n += 4;
        else if (count - n >= 2)
            rows.template tile<R, 2, F>(input, first, ahead, out + n * stride, stride), n += 2;
        else
            rows.template tile<R, 1, F>(input, first, ahead, out + n * stride, stride), n += 1;
    }
}

template <class Rows>
void multiply(const Rows &rows, const float *x, int64_t count, Range range, float *out, int64_t stride) {
    int64_t at = range.first;
    for (; at + ROWS <= range.last; at += ROWS)
        if (count <= 4)
            tiles<ROWS, ROWS>(rows, x, count, at, out + at, stride);
        else if (count <= 8)
            tiles<ROWS, ROWS / 2>(rows, x, count, at, out + at, stride);
        else
            tiles<ROWS, 1>(rows, x, count, at, out + at, stride);
    for (; at < range.last; ++at) tiles<1, 1>(rows, x, count, at, out + at, stride);
}

// out (count, stride) = x (count, width) weight^T + bias, for the outputs in `range`, counted over all parts.
template <class T>
void linear(const float *x, int64_t count, const Part *part, Range range, float *out, int64_t stride, Scratch &scratch) {
    for (; range.last > 0; range.first -= part->rows, range.last -= part->rows, out += part->rows, ++part) {
        const Range own = {std::max(range.first, int64_t{0}), std::min(range.last, part->rows)};
        if (own.first >= own.last) continue;
        if (part->kind == FOUR_BIT) {
            const FourBitRows rows(*part, scratch);
            multiply(rows, rows.prepare(x, count), count, own, out, stride);
        } else if (part->kind == INT8) {
            multiply(PlainRows<int8_t>{*part}, x, count, own, out, stride);
        } else {
            multiply(PlainRows<T>{*part}, x, count, own, out, stride);
        }
    }
}

// Inner products of the adapted rows of x (rows, width), for each adapter (parts, count, rank). All threads call it: it has
// a barrier.
template <class T>
void low_rank_inputs(const Step &step, int64_t layer, const float *x, int64_t width, float *inner, Scratch &scratch) {
    for (const Adapted *rows = step.adapted; rows != step.adapted + step.num_adapted; ++rows) {
        const LowRank &terms = rows->layers[layer];
        for (int64_t k = 0; k < terms.parts; ++k, inner += rows->count * terms.rank)
            if (terms.down[k].data)
                linear<T>(x + rows->first * width, rows->count, terms.down + k, thread_range(terms.rank), inner, terms.rank, scratch);
    }
#pragma omp barrier
}

// out (rows, stride) += the low-rank terms of the outputs in `range`, from their inner products.
template <class T>
void low_rank_outputs(const Step &step, int64_t layer, const float *inner, Range range, float *out, int64_t stride,
                      Scratch &scratch) {
    std::vector<float> &sums = scratch.sums;
    for (const Adapted *rows = step.adapted; rows != step.adapted + step.num_adapted; ++rows) {
        const LowRank &terms = rows->layers[layer];
        int64_t offset = 0;
        for (int64_t k = 0; k < terms.parts; offset += terms.up[k++].rows, inner += rows->count * terms.rank) {
            const Part &up = terms.up[k];
            const Range own = {std::max(range.first - offset, int64_t{0}), std::min(range.last - offset, up.rows)};
            if (!up.data || own.first >= own.last) continue;
            sums.resize(std::max<int64_t>(sums.size(), rows->count * up.rows));
            linear<T>(inner, rows->count, &up, own, sums.data(), up.rows, scratch);
            for (int64_t row = 0; row < rows->count; ++row)
                for (int64_t at = own.first; at < own.last; ++at)
                    out[(rows->first + row) * stride + offset + at] += sums[row * up.rows + at];
        }
    }
}

void rms_norm(const float *x, int64_t count, int64_t width, const float *weight, double eps, float *out) {
    for (int64_t n = 0; n < count; ++n, x += width, out += width) {
        const Floats scale = Floats{} + static_cast<float>(1 / std::sqrt(dot(x, x, width) / width + eps));
        for (int64_t at = 0; at < width; at += LANES) store(out + at, load(x + at) * scale * load(weight + at));
    }
}

// Rotary embedding: out (head_dim) = x rotated by its position.
inline void rotate(const float *x, const float *cos, const float *sin, int64_t size, float *out) {
    for (int64_t at = 0; at < size; ++at) out[at] = x[at] * cos[at] + x[(at + size / 2) % size] * sin[at];
}

// out (N * LANES) += sum of rows[at * stride] * weights[at].
template <int N, class T>
inline void weighted_sum(const float *weights, const T *rows, int64_t count, int64_t stride, float *out) {
    Floats total[N];
    for (int n = 0; n < N; ++n) total[n] = load(out + n * LANES);
    for (int64_t at = 0; at < count; ++at, rows += stride)
        for (int n = 0; n < N; ++n) total[n] += load(rows + n * LANES) * weights[at];
    for (int n = 0; n < N; ++n) store(out + n * LANES, total[n]);
}

// Softmax attention of one query (head_dim), rotated and scaled, over all tokens of its row.
template <class T>
void attend(const float *query, const KVBlock *block, const KVBlock *end, int64_t layer, int64_t head, int64_t size,
            float *scores, float *out) {
    int64_t count = 0;
    float top = -INFINITY, total = 0;
    for (const KVBlock *part = block; part != end; ++part) {
        const T *keys = static_cast<const T *>(part->data) + layer * part->layer_stride + head * part->head_stride;
        const int64_t tokens = part->tokens + (part + 1 == end);
        for (int64_t at = 0; at < tokens; ++at) {
            scores[count] = dot(query, keys + at * size, size);
            top = std::max(top, scores[count++]);
        }
    }
    for (int64_t at = 0; at < count; ++at) total += scores[at] = std::exp(scores[at] - top);
    for (int64_t at = 0; at < count; ++at) scores[at] /= total;
    std::fill(out, out + size, 0.0f);
    for (const KVBlock *part = block; part != end; ++part) {
        const T *values = static_cast<const T *>(part->data) + part->kv_stride + layer * part->layer_stride +
                          head * part->head_stride;
        const int64_t tokens = part->tokens + (part + 1 == end);
        int64_t at = 0;
        for (; at + 4 * LANES <= size; at += 4 * LANES) weighted_sum<4>(scores, values + at, tokens, size, out + at);
        for (; at < size; at += LANES) weighted_sum<1>(scores, values + at, tokens, size, out + at);
        scores += tokens;
    }
}

template <class T>
void run(const Model &model, const Step &step) {
    const int64_t rows = step.rows, hidden = model.hidden, size = model.head_dim, inner = model.heads * size;
    const int64_t qkv_size = inner + 2 * model.kv_heads * size, group = model.heads / model.kv_heads;
    const int64_t intermediate = model.intermediate;
    const float scale = 1 / std::sqrt(static_cast<float>(size));
    std::vector<float> qkv(rows * qkv_size), context(rows * inner);
    std::vector<float> gate_up(rows * 2 * intermediate), activations(rows * intermediate);
    std::vector<float> terms(step.num_adapted ? 3 * rows * step.max_rank : 0);  // of a layer of at most three parts
#pragma omp parallel num_threads(step.threads)
    {
        std::vector<float> normed(rows * hidden), sums(rows * hidden), scores(step.longest), query(size);
        const Range hidden_range = thread_range(hidden), qkv_range = thread_range(qkv_size);
        const Range intermediate_range = thread_range(intermediate), vocab_range = thread_range(model.vocabulary);
        Scratch scratch;
        // states += x weight^T + bias, for this thread's part of the outputs
        const auto add = [&](const float *x, const Part *parts) {
            linear<T>(x, rows, parts, hidden_range, sums.data(), hidden, scratch);
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t at = hidden_range.first; at < hidden_range.last; ++at)
                    step.states[row * hidden + at] += sums[row * hidden + at];
        };
        // out += the terms of the rows' adapters of linear layer `number`, for this thread's `ranges` of the outputs
        const auto low_rank = [&](int64_t number, const float *x, int64_t width, std::initializer_list<Range> ranges,
                                  float *out, int64_t stride) {
            if (!step.num_adapted) return;
            low_rank_inputs<T>(step, number, x, width, terms.data(), scratch);
            for (const Range &range : ranges) low_rank_outputs<T>(step, number, terms.data(), range, out, stride, scratch);
        };
        for (int64_t index = 0; index < model.num_layers; ++index) {
            const Layer &layer = model.layers[index];
            rms_norm(step.states, rows, hidden, layer.norm, model.eps, normed.data());
            linear<T>(normed.data(), rows, layer.qkv, qkv_range, qkv.data(), qkv_size, scratch);
            low_rank(4 * index, normed.data(), hidden, {qkv_range}, qkv.data(), qkv_size);
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t task = 0; task < rows * model.kv_heads; ++task) {  // write new keys and values to the cache
                const int64_t row = task / model.kv_heads, head = task % model.kv_heads;
                const KVBlock &own = step.blocks[step.first[row + 1] - 1];
                T *key = static_cast<T *>(own.data) + index * own.layer_stride + head * own.head_stride + own.tokens * size;
                const float *keys = qkv.data() + row * qkv_size + inner + head * size;
                rotate(keys, step.cos + row * size, step.sin + row * size, size, query.data());
                for (int64_t at = 0; at < size; at += LANES) {
                    store(key + at, load(query.data() + at));
                    store(key + own.kv_stride + at, load(keys + model.kv_heads * size + at));
                }
            }
#pragma omp for schedule(static)
            for (int64_t task = 0; task < rows * model.heads; ++task) {  // rows of one head are adjacent
                const int64_t row = task % rows, head = task / rows;
                const float *unrotated = qkv.data() + row * qkv_size + head * size;
                rotate(unrotated, step.cos + row * size, step.sin + row * size, size, query.data());
                for (float &value : query) value *= scale;
                attend<T>(query.data(), step.blocks + step.first[row], step.blocks + step.first[row + 1], index, head / group,
                          size, scores.data(), context.data() + row * inner + head * size);
            }
            add(context.data(), layer.out);
            low_rank(4 * index + 1, context.data(), inner, {hidden_range}, step.states, hidden);
#pragma omp barrier
            rms_norm(step.states, rows, hidden, layer.mlp_norm, model.eps, normed.data());
            const Range gates = intermediate_range, ups = {intermediate + gates.first, intermediate + gates.last};
            for (const Range &range : {gates, ups})
                linear<T>(normed.data(), rows, layer.gate_up, range, gate_up.data(), 2 * intermediate, scratch);
            low_rank(4 * index + 2, normed.data(), hidden, {gates, ups}, gate_up.data(), 2 * intermediate);
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t at = intermediate_range.first; at < intermediate_range.last; ++at) {
                    const float gate = gate_up[row * 2 * intermediate + at], up = gate_up[(row * 2 + 1) * intermediate + at];
                    activations[row * intermediate + at] = gate / (1 + std::exp(-gate)) * up;
                }
#pragma omp barrier
            add(activations.data(), layer.down);
            low_rank(4 * index + 3, activations.data(), intermediate, {hidden_range}, step.states, hidden);
#pragma omp barrier
        }
        rms_norm(step.states, rows, hidden, model.norm, model.eps, normed.data());
        linear<T>(normed.data(), rows, model.head, vocab_range, step.logits, model.vocabulary, scratch);
    }
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

extern "C" void llava_decode_step(const Model *model, const Step *step) {
    if (model->is_bf16)
        run<BFloat16>(*model, *step);
    else
        run<float>(*model, *step);
}

extern "C" void llava_unpack(const Part *part, int64_t first, int64_t last, int64_t is_bf16, void *out, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        const Range range = thread_range(last - first);
        if (is_bf16)
            unpack(*part, first + range.first, first + range.last, static_cast<BFloat16 *>(out) + range.first * part->width);
        else
            unpack(*part, first + range.first, first + range.last, static_cast<float *>(out) + range.first * part->width);
    }
}
