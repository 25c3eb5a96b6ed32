// One decode step of a LLaMA on the CPU: all threads read every weight once, in one parallel region.
//
// A step of a small batch is bound by memory bandwidth and by the overhead between operations. Weights, keys and values
// are float32 or bfloat16, all arithmetic is float32. The sums of a row are computed in the same order for every batch
// size, so its tokens do not depend on its neighbours. See `llava/engine/native/decoder.py`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

namespace {

constexpr int64_t LANES = 16, ROWS = 4;  // floats per vector, weight rows per tile
using Floats = float __attribute__((vector_size(64)));
using UInt32s = uint32_t __attribute__((vector_size(64)));
using UInt16s = uint16_t __attribute__((vector_size(32)));
struct BFloat16 { uint16_t bits; };

// Sizes and strides are in elements. As in PyTorch a weight is (out, in); fused layers are concatenated along out.
struct Layer {
    const float *norm, *mlp_norm, *qkv_bias, *out_bias, *gate_up_bias, *down_bias;  // biases may be null
    const void *qkv, *out, *gate_up, *down;
};

struct Model {
    int64_t is_bf16, num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary;
    double eps;
    const float *norm, *head_bias;
    const void *head;
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

// R weight rows times N inputs; prefetches the F rows that start at `ahead`.
template <int R, int N, int F, class T>
inline void tile(const float *x, int64_t width, const T *weight, const float *bias, float *out, int64_t stride, const T *ahead) {
    Floats total[R][N] = {};
    for (int64_t at = 0; at < width; at += LANES) {
        Floats input[N];
        for (int n = 0; n < N; ++n) input[n] = load(x + n * width + at);
        for (int f = 0; f < F; ++f) __builtin_prefetch(ahead + f * width + at, 0, 2);  // into L2
        for (int r = 0; r < R; ++r) {
            const Floats row = load(weight + r * width + at);
            for (int n = 0; n < N; ++n) total[r][n] += row * input[n];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) out[n * stride + r] = sum(total[r][n]) + (bias ? bias[r] : 0);
}

// R weight rows times all inputs; each tile prefetches F of the next R rows.
template <int R, int F, class T>
inline void tiles(const float *x, int64_t count, int64_t width, const T *weight, const float *bias, float *out, int64_t stride) {
    int64_t turn = 0;
    for (int64_t n = 0; n < count; turn += F) {
        const float *input = x + n * width;
        const T *ahead = weight + (R + turn % R) * width;
        if (count - n >= 4)
            tile<R, 4, F>(input, width, weight, bias, out + n * stride, stride, ahead), n += 4;
        else if (count - n >= 2)
            tile<R, 2, F>(input, width, weight, bias, out + n * stride, stride, ahead), n += 2;
        else
            tile<R, 1, F>(input, width, weight, bias, out + n * stride, stride, ahead), n += 1;
    }
}

template <class T>
inline void multiply_rows(const float *x, int64_t count, int64_t width, const T *weight, const float *bias, float *out,
                          int64_t stride) {
    if (count <= 4)
        tiles<ROWS, ROWS>(x, count, width, weight, bias, out, stride);
    else if (count <= 8)
        tiles<ROWS, ROWS / 2>(x, count, width, weight, bias, out, stride);
    else
        tiles<ROWS, 1>(x, count, width, weight, bias, out, stride);
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

// out (count, stride) = x (count, width) weight^T + bias, for the outputs in `range`.
template <class T>
void linear(const float *x, int64_t count, int64_t width, const void *weight, const float *bias, Range range, float *out,
            int64_t stride) {
    const T *rows = static_cast<const T *>(weight);
    int64_t at = range.first;
    for (; at + ROWS <= range.last; at += ROWS)
        multiply_rows(x, count, width, rows + at * width, bias ? bias + at : bias, out + at, stride);
    for (; at < range.last; ++at) tiles<1, 1>(x, count, width, rows + at * width, bias ? bias + at : bias, out + at, stride);
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
#pragma omp parallel num_threads(step.threads)
    {
        std::vector<float> normed(rows * hidden), sums(rows * hidden), scores(step.longest), query(size);
        const Range hidden_range = thread_range(hidden), qkv_range = thread_range(qkv_size);
        const Range intermediate_range = thread_range(intermediate), vocab_range = thread_range(model.vocabulary);
        // states += x weight^T + bias, for this thread's part of the outputs
        const auto add = [&](const float *x, int64_t in, const void *weight, const float *bias) {
            linear<T>(x, rows, in, weight, bias, hidden_range, sums.data(), hidden);
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t at = hidden_range.first; at < hidden_range.last; ++at)
                    step.states[row * hidden + at] += sums[row * hidden + at];
        };
        for (int64_t index = 0; index < model.num_layers; ++index) {
            const Layer &layer = model.layers[index];
            rms_norm(step.states, rows, hidden, layer.norm, model.eps, normed.data());
            linear<T>(normed.data(), rows, hidden, layer.qkv, layer.qkv_bias, qkv_range, qkv.data(), qkv_size);
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
            add(context.data(), inner, layer.out, layer.out_bias);
#pragma omp barrier
            rms_norm(step.states, rows, hidden, layer.mlp_norm, model.eps, normed.data());
            for (const int64_t at : {int64_t{0}, intermediate})  // gates, then ups
                linear<T>(normed.data(), rows, hidden, layer.gate_up, layer.gate_up_bias,
                          {at + intermediate_range.first, at + intermediate_range.last}, gate_up.data(), 2 * intermediate);
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t at = intermediate_range.first; at < intermediate_range.last; ++at) {
                    const float gate = gate_up[row * 2 * intermediate + at], up = gate_up[(row * 2 + 1) * intermediate + at];
                    activations[row * intermediate + at] = gate / (1 + std::exp(-gate)) * up;
                }
#pragma omp barrier
            add(activations.data(), intermediate, layer.down, layer.down_bias);
#pragma omp barrier
        }
        rms_norm(step.states, rows, hidden, model.norm, model.eps, normed.data());
        linear<T>(normed.data(), rows, hidden, model.head, model.head_bias, vocab_range, step.logits, model.vocabulary);
    }
}

}  // namespace

extern "C" void llava_decode_step(const Model *model, const Step *step) {
    if (model->is_bf16)
        run<BFloat16>(*model, *step);
    else
        run<float>(*model, *step);
}
