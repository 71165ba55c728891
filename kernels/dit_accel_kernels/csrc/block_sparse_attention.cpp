// Block-sparse attention on a CPU: softmax(q k^T scale + bias) v over the key blocks that a CSR list keeps for each
// query block. Accumulates in float32; reads and writes float32, bfloat16 or float16. No library beyond C++17.
//
// 1. K and V of a head are packed once into panels of 16: K as [16 keys][dim] transposed, V as [keys][16 dims].
// 2. A tile of up to 64 query rows takes its key blocks in steps of up to 256 keys: scores by a register-tiled matrix
//    product, online softmax in base 2 in place, then the product with V. Scores never leave the cache.
// 3. Tiles are handed out to the threads one by one, since their lists differ in length.
//
// The compiler's vector extensions are used instead of intrinsics, so the source builds for any instruction set; only
// LANES and ROWS below depend on it.

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "half.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 14;  // 14 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;  // 6 x 2 accumulators + 2 of B + 1 of A = 15 of 16 registers
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 6;  // 6 x 4 accumulators of 32 registers
#else
constexpr int LANES = 4, ROWS = 2;  // 2 x 4 accumulators of 16 registers
#endif
constexpr int PANEL = 16;                          // keys or dims that one micro-kernel covers
constexpr int VECTORS = PANEL / LANES;             // of one panel row
constexpr int TILE = 64;                           // query rows
constexpr int STEP = 256;                          // keys of one softmax step: scores of 64 x 256 floats fit the L2 cache
constexpr int STRIDE = STEP + 16;                  // floats between score rows; not a power of two, for the cache sets
constexpr int STEP_BLOCKS = STEP / 16;             // key blocks in a step at most
constexpr int64_t PACKED_BYTES = int64_t(32) << 20;  // packed K and V held at a time, and kept between calls
constexpr int64_t HUGE_PAGE = int64_t(2) << 20;      // bytes
constexpr float LN_2 = 0.69314718055994530942f;

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));
typedef Vector Memory __attribute__((may_alias));  // 64-byte aligned floats seen as vectors

inline Vector load(const float* from) { return *reinterpret_cast<const Memory*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Memory*>(to) = x; }
inline Integers bits(Vector x) { return reinterpret_cast<Integers>(x); }
inline Vector floats(Integers x) { return reinterpret_cast<Vector>(x); }
inline Vector all(float x) { return x - Vector{}; }

}  // namespace

// The C interface; cpu.py holds the same structure. Strides count elements; the last dimension has stride 1.
struct Arguments {
    const void *q, *k, *v;
    void* out;
    float* lse;         // [batch, heads, query_tokens] or null
    const float* bias;  // strided [batch, heads, key_tokens] or null, natural units
    const int32_t *row_pointers, *columns;
    int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3], bias_strides[3];
    int64_t batch, heads, query_tokens, key_tokens, dim;
    int64_t mask_batch, mask_heads, block_q, block_k;
    int32_t type;  // 0: float32, 1: bfloat16, 2: float16
    int32_t threads;
    double scale;
};

namespace {

template <typename T>
void widen_row(const T* from, int64_t count, float factor, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]) * factor;
}

// ---- micro-kernels ---------------------------------------------------------------------------------------------

// scores[r][0..16) = bias + sum over d of q[d][r] * keys[d][0..16)
template <int R>
void score_panel(const float* q, const float* keys, const float* bias, int64_t dim, float* scores) {
    Vector sums[R][VECTORS];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < VECTORS; ++j) sums[r][j] = bias ? load(bias + j * LANES) : Vector{};
#pragma GCC unroll 4
    for (int64_t d = 0; d < dim; ++d) {
        Vector key[VECTORS];
        for (int j = 0; j < VECTORS; ++j) key[j] = load(keys + d * PANEL + j * LANES);
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < VECTORS; ++j) sums[r][j] += q[d * R + r] * key[j];
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < VECTORS; ++j) store(scores + r * STRIDE + j * LANES, sums[r][j]);
}

struct KeyBlock {
    const float *keys, *values, *bias;  // packed
    int64_t count;                      // keys, a multiple of 16
};

// out[r][0..16) = out[r] * decay[r] + sum over the step's keys of weights[r][key] * values[key][0..16)
// A step is summed from zero: added one by one to a long sum, each key would be rounded at the size of that sum.
template <int R>
void value_panel(const float* weights, const KeyBlock* blocks, int block_count, int64_t offset, const float* decay,
                 float* out) {
    Vector sums[R][VECTORS];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < VECTORS; ++j) sums[r][j] = Vector{};
    for (int block = 0; block < block_count; ++block) {
        const float* values = blocks[block].values + offset;
        const int64_t count = blocks[block].count;
#pragma GCC unroll 4
        for (int64_t key = 0; key < count; ++key) {
            Vector value[VECTORS];
            for (int j = 0; j < VECTORS; ++j) value[j] = load(values + key * PANEL + j * LANES);
            for (int r = 0; r < R; ++r)
                for (int j = 0; j < VECTORS; ++j) sums[r][j] += weights[r * STRIDE + key] * value[j];
        }
        weights += count;
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < VECTORS; ++j) {
            float* to = out + r * PANEL + j * LANES;
            store(to, load(to) * decay[r] + sums[r][j]);
        }
}

// Calls `run` with `rows` as a compile-time constant.
template <int R, typename Run>
inline void with_rows(int rows, const Run& run) {
    if (rows == R)
        run(std::integral_constant<int, R>{});
    else if constexpr (R > 1)
        with_rows<R - 1>(rows, run);
}

// 2^x for x <= 0 to about 1e-7 relative; exactly 0 below 2^-126, and NaN stays NaN.
inline Vector power_of_two(Vector x) {
    const Vector magic = all(0x1.8p23f + 127.0f);  // adding it rounds to an integer, kept in the low bits with its bias
    Vector shifted = x + magic;
    Vector f = x - (shifted - magic);  // -0.5 to 0.5
    Vector p = f * 1.5403530393381609954e-4f + 1.3333558146428443423e-3f;
    p = p * f + 9.6181291076284771620e-3f;
    p = p * f + 5.5504108664821579953e-2f;
    p = p * f + 2.4022650695910071233e-1f;
    p = p * f + 6.9314718055994530942e-1f;
    p = p * f + 1.0f;
    Integers too_small = x < all(-126.0f);
    return floats(bits(p * floats(bits(shifted) << 23)) & ~too_small);
}

// One softmax step of one row in place; updates its maximum and sum, gives the factor of what was summed before.
float softmax_step(float* scores, int64_t count, float& maximum, float& sum) {
    Vector high = all(-INFINITY), high_2 = high;
    for (int64_t i = 0; i < count; i += PANEL)
        for (int j = 0; j < VECTORS; ++j) {
            Vector x = load(scores + i + j * LANES);
            Vector& top = j % 2 ? high_2 : high;
            top = x > top ? x : top;
        }
    high = high_2 > high ? high_2 : high;
    float top = maximum;
    for (int lane = 0; lane < LANES; ++lane) top = high[lane] > top ? high[lane] : top;

    const float zero = top == -INFINITY ? 0.0f : top;  // no key so far: all scores are -inf and give 0
    Vector total = all(0.0f), total_2 = total;
    for (int64_t i = 0; i < count; i += PANEL)
        for (int j = 0; j < VECTORS; ++j) {
            Vector weight = power_of_two(load(scores + i + j * LANES) - zero);
            store(scores + i + j * LANES, weight);
            (j % 2 ? total_2 : total) += weight;
        }
    total += total_2;
    const float decay = std::exp2(maximum - zero);
    sum *= decay;
    float step_sum = 0.0f;
    for (int lane = 0; lane < LANES; ++lane) step_sum += total[lane];
    sum += step_sum;
    maximum = top;
    return decay;
}

// ---- packing ---------------------------------------------------------------------------------------------------

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Buffer {
    float* data;
    explicit Buffer(int64_t count)
        : data(static_cast<float*>(std::aligned_alloc(64, size_t(divide_up(count * 4, 64) * 64)))) {
        if (!data) throw std::bad_alloc();
    }
    Buffer(Buffer&& other) noexcept : data(std::exchange(other.data, nullptr)) {}
    ~Buffer() { std::free(data); }
};

// Room for packed K, V and bias. A call takes the room that the last call left, since fresh memory costs a page fault
// every 4 KiB, as much as a tenth of a sparse call; calls at the same time make their own. Never freed at exit.
class Workspace {
    static inline std::mutex mutex;
    static inline float* kept = nullptr;
    static inline int64_t kept_count = 0;

    int64_t count;

public:
    float* data = nullptr;

    explicit Workspace(int64_t needed) : count(divide_up(needed * 4, HUGE_PAGE) * HUGE_PAGE / 4) {
        {
            std::lock_guard<std::mutex> lock(mutex);
            if (kept_count >= count) {
                count = std::exchange(kept_count, 0);
                data = std::exchange(kept, nullptr);
                return;
            }
        }
        data = static_cast<float*>(std::aligned_alloc(HUGE_PAGE, size_t(count * 4)));
        if (!data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        madvise(data, size_t(count * 4), MADV_HUGEPAGE);
#endif
    }
    ~Workspace() {
        std::lock_guard<std::mutex> lock(mutex);
        if (count > kept_count && count * 4 <= PACKED_BYTES + HUGE_PAGE) {
            std::swap(data, kept);
            std::swap(count, kept_count);
        }
        std::free(data);
    }
    Workspace(const Workspace&) = delete;
};

struct Sizes {
    int64_t key_blocks, value_panels, tiles_per_block, tiles_per_head, keys, values, bias;  // last three: floats a head
    explicit Sizes(const Arguments& a)
        : key_blocks(divide_up(a.key_tokens, a.block_k)),
          value_panels(divide_up(a.dim, PANEL)),
          tiles_per_block(divide_up(a.block_q, TILE)),
          tiles_per_head(divide_up(a.query_tokens, a.block_q) * tiles_per_block),
          keys(key_blocks * a.block_k * a.dim),
          values(key_blocks * a.block_k * value_panels * PANEL),
          bias(key_blocks * a.block_k) {}
};

// A key's bias in base 2. Finite stays finite, since masks hold the lowest float as well, which hides nothing where
// every key has it.
inline float base_2(float bias) {
    if (std::fabs(bias) == INFINITY) return bias;
    const float scaled = bias * 1.44269504088896340736f;
    return scaled < -1e38f ? -1e38f : scaled > 1e38f ? 1e38f : scaled;  // NaN stays NaN
}

// Packed K, V and bias of one key block of one head; `row` is a scratch of 16 rows of `dim`.
template <typename T>
void pack_block(const Arguments& a, const Sizes& sizes, int64_t batch, int64_t head, int64_t block, float* keys,
                float* values, float* bias, float* row) {
    const int64_t first = block * a.block_k, count = least(a.block_k, a.key_tokens - first);
    const T* k = static_cast<const T*>(a.k) + batch * a.k_strides[0] + head * a.k_strides[1] + first * a.k_strides[2];
    const T* v = static_cast<const T*>(a.v) + batch * a.v_strides[0] + head * a.v_strides[1] + first * a.v_strides[2];
    for (int64_t panel = 0; panel < divide_up(count, PANEL); ++panel) {
        float* to = keys + panel * PANEL * a.dim;
        const int64_t filled = least(PANEL, count - panel * PANEL);
        if (filled < PANEL) std::memset(to, 0, size_t(PANEL * a.dim) * 4);
        for (int64_t i = 0; i < filled; ++i)
            widen_row(k + (panel * PANEL + i) * a.k_strides[2], a.dim, 1.0f, row + i * a.dim);
        if (filled == PANEL) {
            for (int64_t d = 0; d < a.dim; ++d)
                for (int64_t i = 0; i < PANEL; ++i) to[d * PANEL + i] = row[i * a.dim + d];
        } else {
            for (int64_t d = 0; d < a.dim; ++d)
                for (int64_t i = 0; i < filled; ++i) to[d * PANEL + i] = row[i * a.dim + d];
        }
    }
    const int64_t padded = divide_up(count, PANEL) * PANEL;
    for (int64_t panel = 0; panel < sizes.value_panels; ++panel) {
        float* to = values + panel * a.block_k * PANEL;
        const int64_t width = least(PANEL, a.dim - panel * PANEL);
        if (count < padded || width < PANEL) std::memset(to, 0, size_t(padded * PANEL) * 4);
        for (int64_t i = 0; i < count; ++i) {
            const T* from = v + i * a.v_strides[2] + panel * PANEL;
            if (width == PANEL)
                widen_row(from, PANEL, 1.0f, to + i * PANEL);
            else
                widen_row(from, width, 1.0f, to + i * PANEL);
        }
    }
    if (a.bias || count < padded) {
        const float* from = a.bias + (a.bias ? batch * a.bias_strides[0] + head * a.bias_strides[1] : 0);
        for (int64_t i = 0; i < count; ++i) bias[i] = a.bias ? base_2(from[(first + i) * a.bias_strides[2]]) : 0.0f;
        for (int64_t i = count; i < padded; ++i) bias[i] = -INFINITY;
    }
}

// Packs `rows` query rows as [group of ROWS][dim][rows of the group], scaled so that the softmax is in base 2.
template <typename T>
void pack_queries(const Arguments& a, const T* q, int64_t rows, float* row, float* to) {
    const float factor = float(a.scale * 1.44269504088896340736);  // rounded once
    for (int64_t first = 0; first < rows; first += ROWS) {
        const int64_t group = least(ROWS, rows - first);
        for (int64_t r = 0; r < group; ++r) {
            widen_row(q + (first + r) * a.q_strides[2], a.dim, factor, row);
            for (int64_t d = 0; d < a.dim; ++d) to[first * a.dim + d * group + r] = row[d];
        }
    }
}

// ---- one tile of queries ---------------------------------------------------------------------------------------

struct Scratch {
    Buffer scores, queries, out, row;
    Scratch(const Arguments& a, const Sizes& sizes)
        : scores(TILE * STRIDE), queries(TILE * a.dim), out(sizes.value_panels * TILE * PANEL), row(PANEL * a.dim) {}
};

void attend_step(const KeyBlock* blocks, int block_count, int rows, int64_t dim, int64_t block_k, int64_t value_panels,
                 Scratch& scratch, float* maximum, float* sum, float* decay) {
    float* scores = scratch.scores.data;
    int64_t keys = 0;
    for (int block = 0; block < block_count; ++block)
        for (int64_t panel = 0; panel < blocks[block].count; panel += PANEL, keys += PANEL) {
            const float* bias = blocks[block].bias ? blocks[block].bias + panel : nullptr;
            for (int first = 0; first < rows; first += ROWS)
                with_rows<ROWS>(int(least(ROWS, rows - first)), [&](auto R) {
                    score_panel<R>(scratch.queries.data + first * dim, blocks[block].keys + panel * dim, bias, dim,
                                   scores + first * STRIDE + keys);
                });
        }
    for (int r = 0; r < rows; ++r) decay[r] = softmax_step(scores + r * STRIDE, keys, maximum[r], sum[r]);
    for (int64_t panel = 0; panel < value_panels; ++panel)
        for (int first = 0; first < rows; first += ROWS)
            with_rows<ROWS>(int(least(ROWS, rows - first)), [&](auto R) {
                value_panel<R>(scores + first * STRIDE, blocks, block_count, panel * block_k * PANEL, decay + first,
                               scratch.out.data + (panel * TILE + first) * PANEL);
            });
}

// Returns whether the result holds NaN.
template <typename T>
bool attend_tile(const Arguments& a, const Sizes& sizes, int64_t batch, int64_t head, int64_t tile, const float* keys,
                 const float* values, const float* bias, Scratch& scratch) {
    const int64_t query_block = tile / sizes.tiles_per_block;
    const int64_t first = query_block * a.block_q + tile % sizes.tiles_per_block * TILE;
    const int64_t block_end = least((query_block + 1) * a.block_q, a.query_tokens);
    const int rows = int(least(TILE, block_end - first));
    if (rows <= 0) return false;
    const T* q = static_cast<const T*>(a.q) + batch * a.q_strides[0] + head * a.q_strides[1] + first * a.q_strides[2];
    pack_queries(a, q, rows, scratch.row.data, scratch.queries.data);
    float maximum[TILE], sum[TILE] = {}, decay[TILE];
    for (float& x : maximum) x = -INFINITY;
    std::memset(scratch.out.data, 0, size_t(sizes.value_panels * TILE * PANEL) * 4);

    const int64_t mask_head = (a.mask_batch > 1 ? batch : 0) * a.mask_heads + (a.mask_heads > 1 ? head : 0);
    const int32_t* row = a.row_pointers + mask_head * (sizes.tiles_per_head / sizes.tiles_per_block) + query_block;
    KeyBlock blocks[STEP_BLOCKS];
    int block_count = 0;
    int64_t step_keys = 0;
    for (int64_t entry = row[0]; entry < row[1]; ++entry) {
        const int64_t column = a.columns[entry], left = a.key_tokens - column * a.block_k;
        const int64_t count = left < a.block_k ? divide_up(left, PANEL) * PANEL : a.block_k;
        if (step_keys + count > STEP) {
            attend_step(blocks, block_count, rows, a.dim, a.block_k, sizes.value_panels, scratch, maximum, sum, decay);
            block_count = 0, step_keys = 0;
        }
        const int64_t start = column * a.block_k;
        const bool biased = a.bias || left < count;
        blocks[block_count++] = {keys + start * a.dim, values + start * sizes.value_panels * PANEL,
                                 biased ? bias + start : nullptr, count};
        step_keys += count;
    }
    if (block_count)
        attend_step(blocks, block_count, rows, a.dim, a.block_k, sizes.value_panels, scratch, maximum, sum, decay);

    T* out = static_cast<T*>(a.out) + batch * a.out_strides[0] + head * a.out_strides[1] + first * a.out_strides[2];
    int32_t nan = 0;
    for (int r = 0; r < rows; ++r) {
        const float share = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
        for (int64_t panel = 0; panel < sizes.value_panels; ++panel) {
            const float* from = scratch.out.data + (panel * TILE + r) * PANEL;
            T* to = out + r * a.out_strides[2] + panel * PANEL;
            const int64_t width = least(PANEL, a.dim - panel * PANEL);
            for (int64_t i = 0; i < width; ++i) {
                const float x = from[i] * share;
                nan |= x != x;
                narrow(x, to[i]);
            }
        }
        if (a.lse)
            a.lse[(batch * a.heads + head) * a.query_tokens + first + r] =
                sum[r] == 0.0f ? -INFINITY : (maximum[r] + std::log2(sum[r])) * LN_2;
    }
    return nan != 0;
}

// ---- threads ---------------------------------------------------------------------------------------------------

// A barrier whose number of threads is known only once all of them could be started.
class Barrier {
    std::mutex mutex;
    std::condition_variable released;
    int64_t expected = INT64_MAX, arrived = 0, generation = 0;

public:
    void expect(int64_t threads) {
        std::lock_guard<std::mutex> lock(mutex);
        expected = threads;
    }
    void wait() {
        std::unique_lock<std::mutex> lock(mutex);
        const int64_t mine = generation;
        if (++arrived == expected) {
            arrived = 0, ++generation;
            released.notify_all();
        } else {
            released.wait(lock, [&] { return generation != mine; });
        }
    }
};

struct Counters {  // of one group of heads: what the next free thread takes
    std::atomic<int64_t> block{0}, tile{0};
};

template <typename T>
bool attend(const Arguments& a) {
    const Sizes sizes(a);
    const int64_t head_bytes = (sizes.keys + sizes.values + sizes.bias) * 4, all_heads = a.batch * a.heads;
    const int64_t group = least(all_heads, PACKED_BYTES / head_bytes > 0 ? PACKED_BYTES / head_bytes : 1);
    const int64_t groups = divide_up(all_heads, group);
    Workspace packed((sizes.keys + sizes.values + sizes.bias) * group);
    float *const keys = packed.data, *const values = keys + sizes.keys * group;
    float* const bias = values + sizes.values * group;
    std::vector<Counters> next(static_cast<size_t>(groups));
    const int64_t threads = least(a.threads > 1 ? a.threads : 1, group * sizes.tiles_per_head);
    std::vector<Scratch> scratch;
    for (int64_t i = 0; i < threads; ++i) scratch.emplace_back(a, sizes);
    Barrier barrier;
    std::atomic<bool> nan{false};

    auto work = [&](Scratch& mine) {
        barrier.wait();
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t first_head = g * group, heads = least(group, all_heads - first_head);
            int64_t i;
            while ((i = next[size_t(g)].block++) < heads * sizes.key_blocks) {
                const int64_t slot = i / sizes.key_blocks, block = i % sizes.key_blocks, head = first_head + slot;
                const int64_t start = block * a.block_k;
                pack_block<T>(a, sizes, head / a.heads, head % a.heads, block,
                              keys + slot * sizes.keys + start * a.dim,
                              values + slot * sizes.values + start * sizes.value_panels * PANEL,
                              bias + slot * sizes.bias + start, mine.row.data);
            }
            barrier.wait();
            while ((i = next[size_t(g)].tile++) < heads * sizes.tiles_per_head) {
                const int64_t slot = i / sizes.tiles_per_head, head = first_head + slot;
                if (attend_tile<T>(a, sizes, head / a.heads, head % a.heads, i % sizes.tiles_per_head,
                                   keys + slot * sizes.keys, values + slot * sizes.values, bias + slot * sizes.bias,
                                   mine))
                    nan = true;
            }
            barrier.wait();
        }
    };

    std::vector<std::thread> helpers;
    helpers.reserve(size_t(threads));
    try {
        for (int64_t i = 1; i < threads; ++i) helpers.emplace_back(work, std::ref(scratch[size_t(i)]));
    } catch (const std::system_error&) {
        // The system gives no more threads: go on with those that were started.
    }
    barrier.expect(int64_t(helpers.size()) + 1);
    work(scratch[0]);
    for (std::thread& helper : helpers) helper.join();
    return nan;
}

}  // namespace

// 0: done; 1: out of memory; 2: unknown type; 3: done, and the result holds NaN.
extern "C" int dit_accel_block_sparse_attention(const Arguments* arguments) {
    try {
        switch (arguments->type) {
            case 0: return attend<float>(*arguments) ? 3 : 0;
            case 1: return attend<BFloat16>(*arguments) ? 3 : 0;
            case 2: return attend<Float16>(*arguments) ? 3 : 0;
            default: return 2;
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
}
