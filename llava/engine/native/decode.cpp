// A LLaMA on the CPU: one decode step, in which all threads read every weight once, in one parallel region; and parts of a
// prefill: norms, keys and values, and linear layers of few rows.
//
// A step of a small batch is bound by memory bandwidth and by the overhead between operations. Keys and values are
// float32 or bfloat16; weights are too, or int8 or 4-bit as packed by bitsandbytes. All arithmetic is float32, but the
// products of bfloat16 weights, keys and values run on the tiles of Intel AMX where there are some, with inputs in
// bfloat16 and float32 sums. The sums of a row are computed in the same order for every batch size, so its tokens do not
// depend on its neighbours. See `llava/engine/native/decoder.py`.

#include <initializer_list>
#include <optional>

#include "amx.h"
#include "common.h"

namespace {

struct Layer {
    const float *norm, *mlp_norm;
    const Part *qkv, *out, *gate_up, *down;
};

struct Model {
    int64_t is_bf16, tiles, num_layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary;
    double eps;
    const float *norm;
    const Part *head;
    const Layer *layers;
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
// the data of up[k] (rank, rows); both have no data where a part is not adapted.
struct LowRank {
    int64_t parts, rank;
    const Part *down, *up;  // only `up` is transposed
};

// Rows first .. first + count - 1 of a step use an adapter: four linear layers per decoder layer.
struct Adapted {
    int64_t first, count;
    const LowRank *layers;
};

template <class L, class R>
inline float dot(const L *left, const R *right, int64_t width) {
    Floats total = {};
    for (int64_t at = 0; at < width; at += LANES) total += load(left + at) * load(right + at);
    return sum(total);
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

// Buffers of one thread: inputs in the order of the codes, the scales of a tile, and for AMX.
struct Scratch {
    bool tiles;
    std::vector<float> inputs, scales;
    TileScratch rows;
    TileInputs packed;
};

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

// The same on the tiles of AMX; `scratch.packed` keeps the inputs for the next part.
inline void multiply_on_tiles(const float *x, int64_t count, const Part &part, Range range, float *out, int64_t stride,
                              Scratch &scratch) {
#if LLAVA_AMX
    if (!scratch.packed.count) pack_inputs(x, count, part.width, scratch.packed);
    tile_linear(scratch.packed, part, range, scratch.rows, [=](int64_t row, int64_t at, __m512 sums, __mmask16 mask) {
        _mm512_mask_storeu_ps(out + row * stride + at, mask, sums);
    });
#endif
}

// out (count, stride) = x (count, width) weight^T + bias, for the outputs in `ranges`, counted over all parts.
template <class T>
void linear(const float *x, int64_t count, const Part *parts, std::initializer_list<Range> ranges, float *out,
            int64_t stride, Scratch &scratch) {
    scratch.packed.count = 0;
    for (Range range : ranges) {
        float *to = out;
        for (const Part *part = parts; range.last > 0; to += part++->rows) {
            const Range own = {std::max(range.first, int64_t{0}), std::min(range.last, part->rows)};
            range = {range.first - part->rows, range.last - part->rows};
            if (own.first >= own.last) continue;
            if (scratch.tiles && part->kind == PLAIN) {
                multiply_on_tiles(x, count, *part, own, to, stride, scratch);
            } else if (part->kind == FOUR_BIT) {
                const FourBitRows rows(*part, scratch);
                multiply(rows, rows.prepare(x, count), count, own, to, stride);
            } else if (part->kind == INT8) {
                multiply(PlainRows<int8_t>{*part}, x, count, own, to, stride);
            } else {
                multiply(PlainRows<T>{*part}, x, count, own, to, stride);
            }
        }
    }
}

// Inner products of the adapted rows of x (rows, width), for each adapter (parts, count, rank). All threads call it: it has
// a barrier.
template <class T>
void low_rank_inputs(const Step &step, int64_t layer, const float *x, int64_t width, float *inner) {
    for (const Adapted *rows = step.adapted; rows != step.adapted + step.num_adapted; ++rows) {
        const LowRank &terms = rows->layers[layer];
        for (int64_t k = 0; k < terms.parts; ++k, inner += rows->count * terms.rank)
            if (terms.down[k].data)
                multiply(PlainRows<T>{terms.down[k]}, x + rows->first * width, rows->count, thread_range(terms.rank), inner,
                         terms.rank);
    }
#pragma omp barrier
}

// out (N, stride) += inner (N, rank) times V vectors of each of the `rank` rows of a transposed weight.
template <int V, int N, class T>
inline void add_terms(const T *weight, int64_t pitch, const float *inner, int64_t rank, float *out, int64_t stride) {
    Floats total[N][V];
    for (int n = 0; n < N; ++n)
        for (int v = 0; v < V; ++v) total[n][v] = load(out + n * stride + v * LANES);
    for (int64_t at = 0; at < rank; ++at, weight += pitch)
        for (int v = 0; v < V; ++v) {
            const Floats column = load(weight + v * LANES);
            for (int n = 0; n < N; ++n) total[n][v] += column * inner[n * rank + at];
        }
    for (int n = 0; n < N; ++n)
        for (int v = 0; v < V; ++v) store(out + n * stride + v * LANES, total[n][v]);
}

// out (rows, stride) += the low-rank terms of the outputs in `range`, from their inner products.
template <class T>
void low_rank_outputs(const Step &step, int64_t layer, const float *inner, Range range, float *out, int64_t stride) {
    for (const Adapted *rows = step.adapted; rows != step.adapted + step.num_adapted; ++rows) {
        const LowRank &terms = rows->layers[layer];
        int64_t offset = 0;
        for (int64_t k = 0; k < terms.parts; offset += terms.up[k++].rows, inner += rows->count * terms.rank) {
            const Part &up = terms.up[k];
            const Range own = {std::max(range.first - offset, int64_t{0}), std::min(range.last - offset, up.rows)};
            if (!up.data || own.first >= own.last) continue;
            const auto add = [&](auto vectors, int64_t at) {
                constexpr int V = decltype(vectors)::value;
                const T *weight = static_cast<const T *>(up.data) + at;
                float *to = out + rows->first * stride + offset + at;
                int64_t row = 0;
                for (; row + 4 <= rows->count; row += 4)
                    add_terms<V, 4>(weight, up.rows, inner + row * terms.rank, terms.rank, to + row * stride, stride);
                for (; row < rows->count; ++row)
                    add_terms<V, 1>(weight, up.rows, inner + row * terms.rank, terms.rank, to + row * stride, stride);
            };
            int64_t at = own.first;
            for (; at + 4 * LANES <= own.last; at += 4 * LANES) add(std::integral_constant<int, 4>{}, at);
            for (; at < own.last; at += LANES) add(std::integral_constant<int, 1>{}, at);
        }
    }
}

template <class T>
void rms_norm(const T *x, int64_t count, int64_t width, const T *weight, double eps, T *out) {
    for (int64_t n = 0; n < count; ++n, x += width, out += width) {
        const Floats scale = Floats{} + static_cast<float>(1 / std::sqrt(dot(x, x, width) / width + eps));
        for (int64_t at = 0; at < width; at += LANES) store(out + at, load(x + at) * scale * load(weight + at));
    }
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
    float top = -INFINITY;
    for (const KVBlock *part = block; part != end; ++part) {
        const T *keys = static_cast<const T *>(part->data) + layer * part->layer_stride + head * part->head_stride;
        const int64_t tokens = part->tokens + (part + 1 == end);
        for (int64_t at = 0; at < tokens; ++at) {
            scores[count] = dot(query, keys + at * size, size);
            top = std::max(top, scores[count++]);
        }
    }
    const int64_t padded = (count + LANES - 1) / LANES * LANES;
    std::fill(scores + count, scores + padded, -INFINITY);
    Floats sums = {};
    for (int64_t at = 0; at < padded; at += LANES) {
        const Floats found = exponential(load(scores + at) - top);
        sums += found;
        store(scores + at, found);
    }
    const float total = sum(sums);
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

// First rows of the groups of adjacent rows with one prefix, and the number of rows. A row without a prefix is a group.
std::vector<int64_t> prefix_groups(const Step &step) {
    std::vector<int64_t> starts = {0};
    for (int64_t row = 1; row < step.rows; ++row)
        if (!same_prefix(step.first, step.blocks, row - 1, row)) starts.push_back(row);
    starts.push_back(step.rows);
    return starts;
}

#if LLAVA_AMX
// Attention of the rows of a group and one key head: their common prefix is read once. Writes to context (rows, inner).
void attend_on_tiles(const Model &model, const Step &step, Range rows, int64_t layer, int64_t head, const float *qkv,
                     float *context, TileAttention &attention) {
    const int64_t size = model.head_dim, inner = model.heads * size, group = model.heads / model.kv_heads;
    const int64_t count = rows.last - rows.first, row_size = group * size;
    const float scale = 1 / std::sqrt(static_cast<float>(size));
    std::vector<float> query(count * row_size), out(count * row_size), top(count * group, -INFINITY), total(count * group);
    for (int64_t row = rows.first; row < rows.last; ++row)
        for (int64_t at = 0; at < group; ++at) {
            float *to = query.data() + (row - rows.first) * row_size + at * size;
            rotate(qkv + row * (inner + 2 * model.kv_heads * size) + (head * group + at) * size, step.cos + row * size,
                   step.sin + row * size, size, to);
            for (int64_t lane = 0; lane < size; ++lane) to[lane] *= scale;
        }
    const auto keys_of = [&](const KVBlock &block) {
        return static_cast<const uint16_t *>(block.data) + layer * block.layer_stride + head * block.head_stride;
    };
    pack_inputs(query.data(), count * group, size, attention.queries);
    for (int64_t at = step.first[rows.first]; at + 1 < step.first[rows.first + 1]; ++at) {
        const KVBlock &block = step.blocks[at];
        const uint16_t *keys = keys_of(block);
        attention.add(keys, keys + block.kv_stride, block.tokens, size, out.data(), top.data(), total.data());
    }
    for (int64_t row = 0; row < count; ++row) {
        const KVBlock &own = step.blocks[step.first[rows.first + row + 1] - 1];
        const uint16_t *keys = keys_of(own);
        for (int64_t at = row * group; at < (row + 1) * group; ++at)
            attention.add_one(keys, keys + own.kv_stride, own.tokens + 1, size, &query[at * size], &out[at * size], top[at],
                              total[at]);
        float *to = context + (rows.first + row) * inner + head * row_size;
        for (int64_t at = 0; at < row_size; ++at) to[at] = out[row * row_size + at] / total[row * group + at / size];
    }
}
#endif

template <class T>
void run(const Model &model, const Step &step) {
    const int64_t rows = step.rows, hidden = model.hidden, size = model.head_dim, inner = model.heads * size;
    const int64_t qkv_size = inner + 2 * model.kv_heads * size, group = model.heads / model.kv_heads;
    const int64_t intermediate = model.intermediate;
    const bool tiles = LLAVA_AMX && model.tiles && std::is_same<T, BFloat16>::value;
    const std::vector<int64_t> starts = prefix_groups(step);
    [[maybe_unused]] const int64_t groups = static_cast<int64_t>(starts.size()) - 1;
    const float scale = 1 / std::sqrt(static_cast<float>(size));
    std::vector<float> qkv(rows * qkv_size), context(rows * inner);
    std::vector<float> gate_up(rows * 2 * intermediate), activations(rows * intermediate);
    std::vector<float> terms(step.num_adapted ? 3 * rows * step.max_rank : 0);  // of a layer of at most three parts
#pragma omp parallel num_threads(step.threads)
    {
        std::vector<float> normed(rows * hidden), sums(rows * hidden), scores(step.longest + LANES), query(size);
        const auto own_range = [](int64_t count) { return thread_range(count, 2 * LANES); };
        const Range hidden_range = own_range(hidden), qkv_range = own_range(qkv_size);
        const Range intermediate_range = own_range(intermediate), vocab_range = own_range(model.vocabulary);
        Scratch scratch{tiles};
#if LLAVA_AMX
        std::optional<TileRegisters> registers;
        if (tiles) registers.emplace();
        TileAttention on_tiles;
#endif
        // states += x weight^T + bias, for this thread's part of the outputs
        const auto add = [&](const float *x, const Part *parts) {
            linear<T>(x, rows, parts, {hidden_range}, sums.data(), hidden, scratch);
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t at = hidden_range.first; at < hidden_range.last; ++at)
                    step.states[row * hidden + at] += sums[row * hidden + at];
        };
        // out += the terms of the rows' adapters of linear layer `number`, for this thread's `ranges` of the outputs
        const auto low_rank = [&](int64_t number, const float *x, int64_t width, std::initializer_list<Range> ranges,
                                  float *out, int64_t stride) {
            if (!step.num_adapted) return;
            low_rank_inputs<T>(step, number, x, width, terms.data());
            for (const Range &range : ranges) low_rank_outputs<T>(step, number, terms.data(), range, out, stride);
        };
        for (int64_t index = 0; index < model.num_layers; ++index) {
            const Layer &layer = model.layers[index];
            rms_norm(step.states, rows, hidden, layer.norm, model.eps, normed.data());
            linear<T>(normed.data(), rows, layer.qkv, {qkv_range}, qkv.data(), qkv_size, scratch);
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
            if (tiles) {
#if LLAVA_AMX
#pragma omp for schedule(dynamic)
                for (int64_t task = 0; task < groups * model.kv_heads; ++task) {
                    const Range group = {starts[task % groups], starts[task % groups + 1]};
                    attend_on_tiles(model, step, group, index, task / groups, qkv.data(), context.data(), on_tiles);
                }
#endif
            } else {
#pragma omp for schedule(static)
                for (int64_t task = 0; task < rows * model.heads; ++task) {  // rows of one head are adjacent
                    const int64_t row = task % rows, head = task / rows;
                    const float *unrotated = qkv.data() + row * qkv_size + head * size;
                    rotate(unrotated, step.cos + row * size, step.sin + row * size, size, query.data());
                    for (float &value : query) value *= scale;
                    attend<T>(query.data(), step.blocks + step.first[row], step.blocks + step.first[row + 1], index,
                              head / group, size, scores.data(), context.data() + row * inner + head * size);
                }
            }
            add(context.data(), layer.out);
            low_rank(4 * index + 1, context.data(), inner, {hidden_range}, step.states, hidden);
#pragma omp barrier
            rms_norm(step.states, rows, hidden, layer.mlp_norm, model.eps, normed.data());
            const Range gates = intermediate_range, ups = {intermediate + gates.first, intermediate + gates.last};
            linear<T>(normed.data(), rows, layer.gate_up, {gates, ups}, gate_up.data(), 2 * intermediate, scratch);
            low_rank(4 * index + 2, normed.data(), hidden, {gates, ups}, gate_up.data(), 2 * intermediate);
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t at = intermediate_range.first; at < intermediate_range.last; at += LANES) {
                    const Floats gate = load(&gate_up[row * 2 * intermediate + at]);
                    const Floats up = load(&gate_up[(row * 2 + 1) * intermediate + at]);
                    store(&activations[row * intermediate + at], gate / (1.0f + exponential(-gate)) * up);
                }
#pragma omp barrier
            add(activations.data(), layer.down);
            low_rank(4 * index + 3, activations.data(), intermediate, {hidden_range}, step.states, hidden);
#pragma omp barrier
        }
        rms_norm(step.states, rows, hidden, model.norm, model.eps, normed.data());
        linear<T>(normed.data(), rows, model.head, {vocab_range}, step.logits, model.vocabulary, scratch);
    }
}

// RMS norm of x (count, width), with float32 sums, on several threads.
template <class T>
void parallel_rms_norm(const void *x, int64_t count, int64_t width, const void *weight, double eps, void *out,
                       int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        const Range own = thread_range(count);
        const int64_t at = own.first * width;
        rms_norm(static_cast<const T *>(x) + at, own.last - own.first, width, static_cast<const T *>(weight), eps,
                 static_cast<T *>(out) + at);
    }
}

// Rotates the queries of qkv (tokens, heads + 2 kv_heads, size) in place and stores rotated keys, and values, in a layer of
// the cache. Row r has tokens starts[r] .. starts[r + 1] - 1; the rest of its `slots` becomes zero.
struct StoreCall {
    int64_t is_bf16, rows, heads, kv_heads, size, slots, row_stride, kv_stride, head_stride, threads;
    const int64_t *starts;
    const void *cos, *sin;  // (tokens, size); the first half of sin is negative
    void *qkv, *data;
};

template <class T>
void store_tokens(const StoreCall &call) {
    const int64_t size = call.size, heads = call.heads + call.kv_heads;
#pragma omp parallel num_threads(call.threads)
    {
        std::vector<float> buffer(4 * size);
        float *cos = buffer.data(), *sin = cos + size, *x = sin + size, *rotated = x + size;
        const auto widen = [&](const void *from, int64_t row, float *to) {
            for (int64_t at = 0; at < size; at += LANES) store(to + at, load(static_cast<const T *>(from) + row * size + at));
        };
        const Range own = thread_range(call.starts[call.rows]);
        for (int64_t row = 0; row < call.rows; ++row)
            for (int64_t token = std::max(own.first, call.starts[row]); token < std::min(own.last, call.starts[row + 1]); ++token) {
                T *data = static_cast<T *>(call.data) + row * call.row_stride + (token - call.starts[row]) * size;
                T *qkv = static_cast<T *>(call.qkv) + token * (heads + call.kv_heads) * size;
                widen(call.cos, token, cos), widen(call.sin, token, sin);
                for (int64_t head = 0; head < heads; ++head) {
                    T *to = head < call.heads ? qkv + head * size : data + (head - call.heads) * call.head_stride;
                    widen(qkv, head, x);
                    rotate(x, cos, sin, size, rotated);
                    for (int64_t at = 0; at < size; at += LANES) store_weights(to + at, load(rotated + at));
                }
                for (int64_t head = 0; head < call.kv_heads; ++head)
                    std::copy_n(qkv + (heads + head) * size, size, data + call.kv_stride + head * call.head_stride);
            }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < call.rows * call.kv_heads; ++task) {
            const int64_t row = task / call.kv_heads, used = call.starts[row + 1] - call.starts[row];
            T *data = static_cast<T *>(call.data) + row * call.row_stride + task % call.kv_heads * call.head_stride;
            for (T *rest : {data + used * size, data + call.kv_stride + used * size})
                std::fill_n(rest, (call.slots - used) * size, T{});
        }
    }
}

}  // namespace

extern "C" int64_t llava_has_tiles() { return request_amx(); }

extern "C" void llava_decode_step(const Model *model, const Step *step) {
    if (model->is_bf16)
        run<BFloat16>(*model, *step);
    else
        run<float>(*model, *step);
}

#if LLAVA_AMX
extern "C" void llava_linear(const LinearCall *call) { linear_on_tiles(*call); }

extern "C" void llava_attention(const AttentionCall *call) { attend_prompts(*call); }
#endif

extern "C" void llava_store(const StoreCall *call) {
    if (call->is_bf16)
        store_tokens<BFloat16>(*call);
    else
        store_tokens<float>(*call);
}

extern "C" void llava_rms_norm(const void *x, int64_t count, int64_t width, const void *weight, double eps,
                               int64_t is_bf16, void *out, int64_t threads) {
    if (is_bf16)
        parallel_rms_norm<BFloat16>(x, count, width, weight, eps, out, threads);
    else
        parallel_rms_norm<float>(x, count, width, weight, eps, out, threads);
}

// out (count, rows) = x (count, width) weight^T + bias in float32, for few rows of x.
extern "C" void llava_few_rows(const Part *part, const float *x, int64_t count, float *out, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch{};
        linear<float>(x, count, part, {thread_range(part->rows, ROWS)}, out, part->rows, scratch);
    }
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
