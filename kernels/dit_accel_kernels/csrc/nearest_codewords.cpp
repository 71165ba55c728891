// The nearest codeword of each vector on a CPU: the smallest |c|^2 / 2 - v . c, or with weights the smallest
// sum w (c^2 / 2 - v c); the first of equals wins, as in argmin. Accumulates in float32. No library beyond C++17.
//
// Both scores are a bias plus a product with a table: [v] times [-c], or [w, w v] times [c^2 / 2, -c]. A panel of vectors
// is transposed, so that each lane holds a vector of its own, and multiplied with a block of codewords at a time; only
// the smallest score of a block is kept, and which block it was. In the end the winning block of each vector is scored
// once more, one lane a codeword, to find the codeword in it. So a codeword costs its products and one minimum, and not
// the compare and the blend of an index as well.
//
// A vector's scores do not depend on its place or on threads. Vectors with NaN, infinity or vast numbers are scored one
// by one, as then a score may be NaN, which counts as the smallest of all, as in argmin.
//
// The compiler's vector extensions are used instead of intrinsics, so the source builds for any instruction set; only
// LANES, ROWS and HOLD below depend on it, and `first_equal`, which has a way of its own with AVX.

#include <cstdint>

#include "share.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 8;  // 8 x 3 accumulators + 3 of a panel = 27 of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 4;  // 4 x 3 accumulators + 3 of a panel + 1 of a codeword = 16 of 16
#define HOLD(x) asm volatile("" : "+x"(x))  // in a register: else GCC loads it for each product, and loads are the limit
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 8;  // 8 x 3 accumulators + 3 of a panel + 2 of codewords = 29 of 32
#else
constexpr int LANES = 4, ROWS = 4;  // 16 of 16
#endif
#if !defined(HOLD)
#define HOLD(x)
#endif
constexpr int PANEL = 6 * LANES;          // vectors of a panel
constexpr int BLOCK = 8;                  // codewords of a block, a multiple of ROWS
constexpr int PANELS = 64;                // that a thread takes at a time
constexpr float LIMIT = 0x1p50f;          // below it no score overflows
constexpr int64_t THREAD_WORK = 1 << 19;  // multiply-adds below which another thread is not worth its start

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef int32_t Numbers __attribute__((vector_size(LANES * 4)));
typedef float Word __attribute__((vector_size(BLOCK * 4)));  // one lane a codeword
typedef Vector Memory __attribute__((may_alias, aligned(4)));
typedef Numbers NumbersMemory __attribute__((may_alias, aligned(4)));
typedef Word WordMemory __attribute__((may_alias, aligned(4)));

inline Vector load(const float* from) { return *reinterpret_cast<const Memory*>(from); }
inline Vector every(float x) { return x - Vector{}; }  // x + 0 would take an addition, for the sake of -0
inline Vector smaller(Vector a, Vector b) { return a < b ? a : b; }
inline bool vast(float x) { return !(x < LIMIT && x > -LIMIT); }  // NaN too

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded(int64_t floats) { return divide_up(floats, 16) * 16; }

}  // namespace

// The C interface; nearest.py holds the same structure. All tensors are contiguous.
struct Arguments {
    const float* vectors;    // [count, width]
    const float* codewords;  // [entries, width]
    const float* weights;    // [count, width] or null
    int64_t* found;          // [count]
    float* scratch;
    int64_t count, entries, width;
    int32_t threads;
};

namespace {

// Rows of the product: one for each number of a vector, two with weights.
inline int64_t depth_of(const Arguments& a) { return a.weights ? 2 * a.width : a.width; }
inline int64_t block_floats(const Arguments& a) { return BLOCK * (1 + depth_of(a)); }
inline int64_t table_floats(const Arguments& a) { return padded(divide_up(a.entries, BLOCK) * block_floats(a)); }

// table [blocks][1 + depth][BLOCK], the bias first; lanes without a codeword have a bias of infinity. Returns true where
// all numbers are below LIMIT.
bool write_table(const Arguments& a, float* table) {
    const int64_t depth = depth_of(a);
    bool tame = true;
    for (int64_t k = 0; k < divide_up(a.entries, BLOCK) * BLOCK; ++k) {
        float* const to = table + k / BLOCK * block_floats(a) + k % BLOCK;
        if (k >= a.entries) {
            to[0] = __builtin_inff();
            for (int64_t j = 0; j < depth; ++j) to[(1 + j) * BLOCK] = 0;
            continue;
        }
        const float* const word = a.codewords + k * a.width;
        float bias = 0;
        for (int64_t j = 0; j < a.width; ++j) {
            const float half = word[j] * word[j] / 2;
            if (a.weights) to[(1 + j) * BLOCK] = half;
            to[(1 + depth - a.width + j) * BLOCK] = -word[j];
            bias += half;
            tame = tame && !vast(half) && !vast(word[j]);
        }
        to[0] = a.weights ? 0 : bias;
        tame = tame && !vast(bias);
    }
    return tame;
}

// Vectors [first, first + count), with weights those and their products -> panel [depth][PANEL]; absent ones are zero.
template <int D>
void write_panel(const Arguments& a, int64_t first, int64_t count, float* panel) {
    const int64_t width = D ? D : a.width;
    const float* const from = a.vectors + first * width;
    if (a.weights) {
        const float* const costs = a.weights + first * width;
        for (int64_t t = 0; t < PANEL; ++t)
            for (int64_t j = 0; j < width; ++j) {
                const float cost = t < count ? costs[t * width + j] : 0;
                panel[j * PANEL + t] = cost;
                panel[(width + j) * PANEL + t] = t < count ? cost * from[t * width + j] : 0;
            }
    } else if (count == PANEL) {
        for (int64_t t = 0; t < PANEL; ++t)
            for (int64_t j = 0; j < width; ++j) panel[j * PANEL + t] = from[t * width + j];
    } else {
        for (int64_t t = 0; t < PANEL; ++t)
            for (int64_t j = 0; j < width; ++j) panel[j * PANEL + t] = t < count ? from[t * width + j] : 0;
    }
}

// Smallest scores [G * LANES] of a block of codewords. D is the depth where that is small: `held` [D][G] is the panel.
template <int D, int G>
inline void score_few(const float* words, const Vector (&held)[D][G], Vector (&lowest)[G]) {
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK; ++r) {
        Vector sums[G];
        for (int g = 0; g < G; ++g) sums[g] = every(words[r]);
        for (int j = 0; j < D; ++j)
            for (int g = 0; g < G; ++g) sums[g] += words[(1 + j) * BLOCK + r] * held[j][g];
        for (int g = 0; g < G; ++g) lowest[g] = r ? smaller(sums[g], lowest[g]) : sums[g];
    }
}

// The same for any depth.
template <int G>
inline void score_many(const float* words, int64_t depth, const float* panel, Vector (&lowest)[G]) {
#pragma GCC unroll 2
    for (int part = 0; part < BLOCK; part += ROWS) {
        Vector sums[ROWS][G];
        for (int r = 0; r < ROWS; ++r)
            for (int g = 0; g < G; ++g) sums[r][g] = every(words[part + r]);
        for (int64_t j = 0; j < depth; ++j) {
            Vector x[G];
            for (int g = 0; g < G; ++g) x[g] = load(panel + j * PANEL + g * LANES);
            for (int g = 0; g < G; ++g) HOLD(x[g]);
            for (int r = 0; r < ROWS; ++r)
                for (int g = 0; g < G; ++g) sums[r][g] += words[(1 + j) * BLOCK + part + r] * x[g];
        }
        for (int r = 0; r < ROWS; ++r)
            for (int g = 0; g < G; ++g) lowest[g] = part || r ? smaller(sums[r][g], lowest[g]) : sums[r][g];
    }
}

// Smallest score of each vector of a panel and the block it is in. D: the depth, 0 where it is not known beforehand.
template <int D>
void search(const float* table, int64_t blocks, int64_t given, const float* panel, float* scores, int32_t* places) {
    constexpr int G = D == 4 ? 2 : 3, FEW = D <= 4 ? D : 0;  // so many that what is held fits the registers
    const int64_t depth = D ? D : given;
    for (int first = 0; first < PANEL; first += G * LANES, panel += G * LANES) {
        Vector held[FEW ? FEW : 1][G], best[G], lowest[G];
        Numbers place[G];
        for (int g = 0; g < G; ++g) best[g] = every(__builtin_inff()), place[g] = Numbers{};
        for (int j = 0; j < FEW; ++j)
            for (int g = 0; g < G; ++g) held[j][g] = load(panel + j * PANEL + g * LANES);
        const float* words = table;
        for (int64_t block = 0; block < blocks; ++block, words += BLOCK * (1 + depth)) {
            if constexpr (FEW)
                score_few<FEW, G>(words, held, lowest);
            else
                score_many<G>(words, depth, panel, lowest);
            for (int g = 0; g < G; ++g) {
                place[g] = lowest[g] < best[g] ? Numbers{} + int32_t(block) : place[g];
                best[g] = smaller(lowest[g], best[g]);
            }
        }
        for (int g = 0; g < G; ++g) {
            *reinterpret_cast<Memory*>(scores + first + g * LANES) = best[g];
            *reinterpret_cast<NumbersMemory*>(places + first + g * LANES) = place[g];
        }
    }
}

// The first lane that holds `score`, else the first that holds the smallest.
inline int first_equal(const Word& scores, float score) {
#if defined(__AVX__)
    const __m256 equal = _mm256_cmp_ps(__m256(scores), _mm256_set1_ps(score), _CMP_EQ_OQ);
    if (const int lanes = _mm256_movemask_ps(equal)) return __builtin_ctz(unsigned(lanes));
#else
    for (int r = 0; r < BLOCK; ++r)
        if (scores[r] == score) return r;
#endif
    int lowest = 0;
    for (int r = 1; r < BLOCK; ++r)
        if (scores[r] < scores[lowest]) lowest = r;
    return lowest;
}

// Codewords of a panel's vectors within the blocks that `search` found -> found [count].
template <int D>
void settle(const float* table, int64_t given, const float* panel, const float* scores, const int32_t* places,
            int64_t count, int64_t* found) {
    const int64_t depth = D ? D : given;
    for (int64_t t = 0; t < count; ++t) {
        const float* const words = table + places[t] * BLOCK * (1 + depth);
        Word sums = *reinterpret_cast<const WordMemory*>(words);
        for (int64_t j = 0; j < depth; ++j)
            sums += panel[j * PANEL + t] * *reinterpret_cast<const WordMemory*>(words + (1 + j) * BLOCK);
        found[t] = int64_t(places[t]) * BLOCK + first_equal(sums, scores[t]);
    }
}

// One vector of a panel by itself, whatever its numbers: the first NaN, else the first of the smallest scores.
int64_t settle_alone(const Arguments& a, const float* table, const float* panel, int64_t t) {
    const int64_t depth = depth_of(a);
    int64_t found = 0;
    float best = 0;
    for (int64_t k = 0; k < a.entries; ++k) {
        const float* const word = table + k / BLOCK * block_floats(a) + k % BLOCK;
        float score = word[0];
        for (int64_t j = 0; j < depth; ++j) score += panel[j * PANEL + t] * word[(1 + j) * BLOCK];
        if (score != score) return k;
        if (k == 0 || score < best) best = score, found = k;
    }
    return found;
}

// D: the width, or 0.
template <int D>
void run_panels(const Arguments& a, const float* table, bool tame, int64_t first, int64_t last, float* panel) {
    const int64_t depth = depth_of(a), blocks = divide_up(a.entries, BLOCK);
    float scores[PANEL];
    int32_t places[PANEL];
    for (; first < last; first += PANEL) {
        const int64_t count = least(PANEL, last - first);
        int64_t* const found = a.found + first;
        write_panel<D>(a, first, count, panel);
        if (a.weights) {
            search<2 * D>(table, blocks, depth, panel, scores, places);
            settle<2 * D>(table, depth, panel, scores, places, count, found);
        } else {
            search<D>(table, blocks, depth, panel, scores, places);
            settle<D>(table, depth, panel, scores, places, count, found);
        }
        int beyond = !tame;
        for (int64_t i = 0; i < depth * PANEL; ++i) beyond |= vast(panel[i]);
        for (int64_t t = 0; t < count && beyond; ++t) {
            bool alone = !tame;
            for (int64_t j = 0; j < depth; ++j) alone = alone || vast(panel[j * PANEL + t]);
            if (alone) found[t] = settle_alone(a, table, panel, t);
        }
    }
}

void run_some(const Arguments& a, const float* table, bool tame, int64_t first, int64_t last, float* panel) {
    switch (a.width) {
        case 1: return run_panels<1>(a, table, tame, first, last, panel);
        case 2: return run_panels<2>(a, table, tame, first, last, panel);
        case 4: return run_panels<4>(a, table, tame, first, last, panel);
        case 8: return run_panels<8>(a, table, tame, first, last, panel);
        default: return run_panels<0>(a, table, tame, first, last, panel);
    }
}

}  // namespace

// Floats of scratch that a call takes.
extern "C" int64_t dit_accel_nearest_scratch(const Arguments* arguments) {
    const Arguments& a = *arguments;
    return table_floats(a) + a.threads * padded(depth_of(a) * PANEL);
}

extern "C" void dit_accel_nearest_codewords(const Arguments* arguments) {
    const Arguments& a = *arguments;
    float *const table = a.scratch, *const panels = table + table_floats(a);
    const bool tame = write_table(a, table);
    const int64_t useful = divide_up(a.count * a.entries * depth_of(a), THREAD_WORK), step = PANELS * PANEL;
    share(least(a.threads, useful), divide_up(a.count, step), [&](int64_t worker, int64_t part) {
        const int64_t first = part * step;
        run_some(a, table, tame, first, least(a.count, first + step), panels + worker * padded(depth_of(a) * PANEL));
    });
}
