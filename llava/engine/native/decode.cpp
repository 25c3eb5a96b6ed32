// One decode step of a LLaMA on the CPU: every weight is read once, by all threads, in one parallel region.
//
// A step of a small batch is bound by the memory's speed and by the overhead between operations; both are the least
// here. Weights, keys and values are float32 or bfloat16, all arithmetic is float32. The sums of a row are made in the
// same order whatever shares the batch, so its tokens do not depend on its neighbours. See `llava/engine/native`.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>

namespace {

constexpr int64_t LANES = 16, ROWS = 4;  // floats of a vector, rows of weights taken together
using Floats = float __attribute__((vector_size(64)));
using Words = uint32_t __attribute__((vector_size(64)));
using Halves = uint16_t __attribute__((vector_size(32)));
struct BFloat16 { uint16_t bits; };

// All counts are of elements. Layouts as PyTorch has them: a weight is (out, in), the outputs of fused layers lie below each other.
struct Layer {
    const float *norm, *mlp_norm, *qkv_bias, *out_bias, *gate_up_bias, *down_bias;  // biases may be null
    const void *qkv, *out, *gate_up, *down;
};

struct Model {
    int64_t half, layers, width, heads, kv_heads, head_dim, intermediate, vocabulary;  // half: bfloat16
    double eps;
    const float *norm, *head_bias;
    const void *head;
    const Layer *layer;
};

// `tokens` columns (.., head_dim) of keys and values, with the distances of layers, of keys and values, and of heads.
struct Span {
    void *data;
    int64_t tokens, layer, kind, head;
};

// Row r stands behind spans first[r] .. first[r + 1] - 1; the last is its own, and has room for one column more.
struct Step {
    int64_t rows, threads, longest;  // longest: columns of the longest row, with the new one
    float *states;                   // (rows, width): embeddings in, last states out
    const float *cos, *sin;          // (rows, head_dim); the first half of sin is negative
    float *logits;                   // (rows, vocabulary)
    const int64_t *first;
    const Span *spans;
};

inline Floats load(const float *at) {
    Floats found;
    std::memcpy(&found, at, sizeof found);
    return found;
}

inline Floats load(const BFloat16 *at) {
    Halves bits;
    std::memcpy(&bits, at, sizeof bits);
    const Words wide = __builtin_convertvector(bits, Words) << 16;
    Floats found;
    std::memcpy(&found, &wide, sizeof found);
    return found;
}

inline void store(float *at, Floats value) { std::memcpy(at, &value, sizeof value); }

inline void store(BFloat16 *at, Floats value) {  // to the nearest, ties to even; NaN stays NaN
    Words bits;
    std::memcpy(&bits, &value, sizeof bits);
    const Words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const Halves half = __builtin_convertvector(value == value ? rounded : (bits >> 16) | 0x40, Halves);
    std::memcpy(at, &half, sizeof half);
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

// R rows of weights times N inputs. Meanwhile the F rows that begin at `ahead` are fetched.
template <int R, int N, int F, class T>
inline void tile(const float *x, int64_t width, const T *weight, const float *bias, float *out, int64_t stride, const T *ahead) {
    Floats total[R][N] = {};
    for (int64_t at = 0; at < width; at += LANES) {
        Floats input[N];
        for (int n = 0; n < N; ++n) input[n] = load(x + n * width + at);
        for (int f = 0; f < F; ++f) __builtin_prefetch(ahead + f * width + at, 0, 2);  // into the second cache
        for (int r = 0; r < R; ++r) {
            const Floats row = load(weight + r * width + at);
            for (int n = 0; n < N; ++n) total[r][n] += row * input[n];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int n = 0; n < N; ++n) out[n * stride + r] = sum(total[r][n]) + (bias ? bias[r] : 0);
}

// R rows of weights times all inputs, in tiles that take turns in fetching the next R rows, F each.
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
inline void inputs(const float *x, int64_t count, int64_t width, const T *weight, const float *bias, float *out, int64_t stride) {
    if (count <= 4)
        tiles<ROWS, ROWS>(x, count, width, weight, bias, out, stride);
    else if (count <= 8)
        tiles<ROWS, ROWS / 2>(x, count, width, weight, bias, out, stride);
    else
        tiles<ROWS, 1>(x, count, width, weight, bias, out, stride);
}

// out (count, stride) = x (count, width) weight^T + bias, for the outputs `first` to `last`.
template <class T>
void product(const float *x, int64_t count, int64_t width, const void *weight, const float *bias, int64_t first,
             int64_t last, float *out, int64_t stride) {
    const T *rows = static_cast<const T *>(weight);
    int64_t at = first;
    for (; at + ROWS <= last; at += ROWS) inputs(x, count, width, rows + at * width, bias ? bias + at : bias, out + at, stride);
    for (; at < last; ++at) tiles<1, 1>(x, count, width, rows + at * width, bias ? bias + at : bias, out + at, stride);
}

void normalise(const float *x, int64_t count, int64_t width, const float *weight, double eps, float *out) {
    for (int64_t n = 0; n < count; ++n, x += width, out += width) {
        const Floats scale = Floats{} + static_cast<float>(1 / std::sqrt(dot(x, x, width) / width + eps));
        for (int64_t at = 0; at < width; at += LANES) store(out + at, load(x + at) * scale * load(weight + at));
    }
}

// out (head_dim) = x turned by its position.
inline void rotate(const float *x, const float *cos, const float *sin, int64_t size, float *out) {
    for (int64_t at = 0; at < size; ++at) out[at] = x[at] * cos[at] + x[(at + size / 2) % size] * sin[at];
}

// out (N * LANES) = the sum of `rows`, `stride` apart, by `weights`.
template <int N, class T>
inline void mix(const float *weights, const T *rows, int64_t count, int64_t stride, float *out) {
    Floats total[N];
    for (int n = 0; n < N; ++n) total[n] = load(out + n * LANES);
    for (int64_t at = 0; at < count; ++at, rows += stride)
        for (int n = 0; n < N; ++n) total[n] += load(rows + n * LANES) * weights[at];
    for (int n = 0; n < N; ++n) store(out + n * LANES, total[n]);
}

// Softmax attention of one query (head_dim, already turned and scaled) over all columns of its row.
template <class T>
void attend(const float *query, const Span *span, const Span *end, int64_t layer, int64_t head, int64_t size,
            float *scores, float *out) {
    int64_t count = 0;
    float top = -INFINITY, total = 0;
    for (const Span *part = span; part != end; ++part) {
        const T *keys = static_cast<const T *>(part->data) + layer * part->layer + head * part->head;
        const int64_t tokens = part->tokens + (part + 1 == end);
        for (int64_t at = 0; at < tokens; ++at) {
            scores[count] = dot(query, keys + at * size, size);
            top = std::max(top, scores[count++]);
        }
    }
    for (int64_t at = 0; at < count; ++at) total += scores[at] = std::exp(scores[at] - top);
    for (int64_t at = 0; at < count; ++at) scores[at] /= total;
    std::fill(out, out + size, 0.0f);
    for (const Span *part = span; part != end; ++part) {
        const T *values = static_cast<const T *>(part->data) + layer * part->layer + part->kind + head * part->head;
        const int64_t tokens = part->tokens + (part + 1 == end);
        int64_t at = 0;
        for (; at + 4 * LANES <= size; at += 4 * LANES) mix<4>(scores, values + at, tokens, size, out + at);
        for (; at < size; at += LANES) mix<1>(scores, values + at, tokens, size, out + at);
        scores += tokens;
    }
}

// This thread's part of `count` things.
struct Share {
    int64_t first, last;
    Share(int64_t count) {
        const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
        first = count * thread / threads, last = count * (thread + 1) / threads;
    }
};

template <class T>
void run(const Model &model, const Step &step) {
    const int64_t rows = step.rows, width = model.width, size = model.head_dim, inner = model.heads * size;
    const int64_t all = inner + 2 * model.kv_heads * size, middle = model.intermediate, group = model.heads / model.kv_heads;
    const float scale = 1 / std::sqrt(static_cast<float>(size));
    std::vector<float> qkv(rows * all), context(rows * inner), gate_up(rows * 2 * middle), hidden(rows * middle);
#pragma omp parallel num_threads(step.threads)
    {
        std::vector<float> normed(rows * width), sums(rows * width), scores(step.longest), query(size);
        const Share wide(width), every(all), between(middle), words(model.vocabulary);
        // states += x weight^T + bias, each thread its part of the width
        const auto add = [&](const float *x, int64_t in, const void *weight, const float *bias) {
            product<T>(x, rows, in, weight, bias, wide.first, wide.last, sums.data(), width);
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t at = wide.first; at < wide.last; ++at) step.states[row * width + at] += sums[row * width + at];
        };
        for (int64_t index = 0; index < model.layers; ++index) {
            const Layer &layer = model.layer[index];
            normalise(step.states, rows, width, layer.norm, model.eps, normed.data());
            product<T>(normed.data(), rows, width, layer.qkv, layer.qkv_bias, every.first, every.last, qkv.data(), all);
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t task = 0; task < rows * model.kv_heads; ++task) {  // new keys and values join the cache
                const int64_t row = task / model.kv_heads, head = task % model.kv_heads;
                const Span &own = step.spans[step.first[row + 1] - 1];
                T *key = static_cast<T *>(own.data) + index * own.layer + head * own.head + own.tokens * size;
                const float *keys = qkv.data() + row * all + inner + head * size;
                rotate(keys, step.cos + row * size, step.sin + row * size, size, query.data());
                for (int64_t at = 0; at < size; at += LANES) {
                    store(key + at, load(query.data() + at));
                    store(key + own.kind + at, load(keys + model.kv_heads * size + at));
                }
            }
#pragma omp for schedule(static)
            for (int64_t task = 0; task < rows * model.heads; ++task) {  // rows of one head next to each other
                const int64_t row = task % rows, head = task / rows;
                rotate(qkv.data() + row * all + head * size, step.cos + row * size, step.sin + row * size, size, query.data());
                for (float &value : query) value *= scale;
                attend<T>(query.data(), step.spans + step.first[row], step.spans + step.first[row + 1], index, head / group,
                          size, scores.data(), context.data() + row * inner + head * size);
            }
            add(context.data(), inner, layer.out, layer.out_bias);
#pragma omp barrier
            normalise(step.states, rows, width, layer.mlp_norm, model.eps, normed.data());
            for (const int64_t at : {int64_t{0}, middle})  // gates, then ups
                product<T>(normed.data(), rows, width, layer.gate_up, layer.gate_up_bias, at + between.first, at + between.last,
                           gate_up.data(), 2 * middle);
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t at = between.first; at < between.last; ++at) {
                    const float gate = gate_up[row * 2 * middle + at];
                    hidden[row * middle + at] = gate / (1 + std::exp(-gate)) * gate_up[(row * 2 + 1) * middle + at];
                }
#pragma omp barrier
            add(hidden.data(), middle, layer.down, layer.down_bias);
#pragma omp barrier
        }
        normalise(step.states, rows, width, model.norm, model.eps, normed.data());
        product<T>(normed.data(), rows, width, model.head, model.head_bias, words.first, words.last, step.logits, model.vocabulary);
    }
}

}  // namespace

extern "C" void llava_decode_step(const Model *model, const Step *step) {
    if (model->half)
        run<BFloat16>(*model, *step);
    else
        run<float>(*model, *step);
}
