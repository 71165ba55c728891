// Products with a vector-quantised weight on a CPU: y = rotate(x) W'^T + low rank + bias, where a row of W' is a scale
// times the sum of codewords that packed codes name. Accumulates in float32. No library beyond C++17.
//
// Many tokens: a block of tokens is rotated and packed once into panels [inputs][PANEL tokens]; then each block of rows
// decodes a strip of inputs into the cache, as plain rows, and multiplies it with every panel while it is there. The
// weight is thus decoded once for a block of tokens and never exists as a whole.
// Few tokens: a row's codewords are multiplied with each token as they are looked up. (To table the products of all
// codewords with some inputs, for rows to look up and add, was slower: 1.2 to 2.2 times with one token.)
//
// Whatever memory is needed comes with the arguments as one scratch buffer. The compiler's vector extensions are used
// instead of intrinsics, so the source builds for any instruction set; only LANES and ROWS below depend on it, and two
// places for few tokens that have a way of their own with AVX and BMI2.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "half.h"
#include "share.h"

#if defined(__AVX__) || defined(__BMI2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 12;  // 12 x 2 accumulators + 2 of a panel + 1 of a row = 27 of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8, ROWS = 6;  // 6 x 2 accumulators + 2 + 1 = 15 of 16
#elif defined(__aarch64__)
constexpr int LANES = 4, ROWS = 12;  // 12 x 2 accumulators + 2 + 1 = 27 of 32
#else
constexpr int LANES = 4, ROWS = 6;  // 15 of 16
#endif
constexpr int PANEL = 2 * LANES;          // tokens of a panel
constexpr int BLOCK = 192;                // rows of W decoded at a time at most, a multiple of ROWS
constexpr int STRIP = 256;                // inputs decoded at a time, about: 192 x 256 floats fit the L2 cache
constexpr int FEW_STRIP = 1024;           // the same for few tokens, of one row: 4 KiB
constexpr int LARGEST_PANELS = 1024 / PANEL;  // of one block of tokens
constexpr int FEW = 4;                    // tokens up to which a row is multiplied with each of them by itself
constexpr int FEW_ROWS = 32;              // rows a thread takes at a time there
constexpr int64_t THREAD_WORK = 1 << 19;  // multiply-adds below which another thread is not worth its start

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef Vector Memory __attribute__((may_alias, aligned(4)));  // floats seen as vectors

inline Vector load(const float* from) { return *reinterpret_cast<const Memory*>(from); }
inline void store(float* to, Vector x) { *reinterpret_cast<Memory*>(to) = x; }

template <int D>
struct WordOf {
    typedef float type __attribute__((vector_size(D * 4), may_alias, aligned(4)));
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded(int64_t floats) { return divide_up(floats, 16) * 16; }

}  // namespace

// The C interface; vq_cpu.py holds the same structure. Strides count elements; the last dimension has stride 1.
struct Arguments {
    const void* x;            // [tokens, inputs] of `type`
    void* out;                // of `type`
    const uint8_t* codes;     // [outputs, bytes]
    const float* row_scale;   // [outputs]
    const float* table;       // [stages, 2 ** bits, width]: no code is out of range
    const uint8_t* signs;     // packed, bit set for -1; or null: no rotation
    const float *low_a, *low_b;  // [rank, inputs], [outputs, rank], contiguous; or null
    const float* bias;        // [outputs] or null
    float* scratch;
    int64_t scratch_floats;
    int64_t x_stride, out_stride, codes_stride;
    int64_t tokens, inputs, outputs, width, stages, bits, block, rank;
    int32_t type;             // 0: float32, 1: bfloat16, 2: float16
    int32_t threads;
};

namespace {

// ---- codes -----------------------------------------------------------------------------------------------------

// Codes [first, first + count) of a row of `length` bytes, as 16-bit numbers; for what the fast ways leave.
void unpack(const uint8_t* row, int64_t length, int64_t bits, int64_t first, int64_t count, uint16_t* to) {
    for (int64_t i = 0; i < count; ++i) {
        const int64_t bit = (first + i) * bits;
        uint32_t word = row[bit / 8];
        if (bit / 8 + 1 < length) word |= uint32_t(row[bit / 8 + 1]) << 8;
        to[i] = uint16_t(word >> bit % 8 & ((1u << bits) - 1));
    }
}

// Bytes as a number. Six are read as four and two: copied into eight, they would wait for each other in memory.
template <int BYTES>
inline uint64_t number(const uint8_t* from) {
    if constexpr (BYTES == 6) return number<4>(from) | number<2>(from + 4) << 32;
    std::conditional_t<BYTES == 2, uint16_t, std::conditional_t<BYTES == 4, uint32_t, uint64_t>> word;
    std::memcpy(&word, from, sizeof word);
    return word;
}

// Eight codes from a byte's start, in registers.
template <int BITS>
struct Eight {
    uint64_t words[2];
    explicit Eight(const uint8_t* from) {
        words[0] = number<BITS == 12 ? 6 : BITS>(from);
        words[1] = BITS == 12 ? number<6>(from + 6) : 0;
#if defined(__BMI2__)
        if constexpr (BITS == 4) words[0] = _pdep_u64(words[0], 0x0f0f0f0f0f0f0f0full);
        if constexpr (BITS == 6) words[0] = _pdep_u64(words[0], 0x3f3f3f3f3f3f3f3full);
#endif
    }
    int64_t operator[](int i) const {
        if constexpr (BITS == 12) return int64_t(words[i / 4] >> (12 * (i % 4)) & 4095);
#if defined(__BMI2__)
        return int64_t(words[0] >> (8 * i) & 255);
#else
        return int64_t(words[0] >> (BITS * i) & ((1 << BITS) - 1));
#endif
    }
};

// What becomes of the codewords of a strip: they are written, or added to what is there, as they are or scaled.
enum Way { COPY, ADD, COPY_SCALED, ADD_SCALED };

template <typename Place, Way WAY>
inline void put(const Place& word, float factor, Place& to) {
    if constexpr (WAY == COPY) to = word;
    if constexpr (WAY == ADD) to += word;
    if constexpr (WAY == COPY_SCALED) to = word * factor;
    if constexpr (WAY == ADD_SCALED) to += word * factor;
}

template <int BITS, int D, Way WAY>
void copy_words(const float* table, const uint8_t* from, int64_t eights, float factor, float* to) {
    typedef typename WordOf<D>::type Word;
    for (int64_t i = 0; i < eights; ++i, from += BITS, to += 8 * D) {
        const Eight<BITS> codes(from);
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j)
            put<Word, WAY>(*reinterpret_cast<const Word*>(table + D * codes[j]), factor,
                           *reinterpret_cast<Word*>(to + D * j));
    }
}

template <Way WAY>
void copy_any(const float* table, const uint16_t* codes, int64_t count, int64_t width, float factor, float* to) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < width; ++j) put<float, WAY>(table[codes[i] * width + j], factor, to[i * width + j]);
}

template <int BITS, Way WAY>
bool copy_fast(const float* table, const uint8_t* from, int64_t eights, int64_t width, float factor, float* to) {
    switch (width) {
        case 2: return copy_words<BITS, 2, WAY>(table, from, eights, factor, to), true;
        case 4: return copy_words<BITS, 4, WAY>(table, from, eights, factor, to), true;
        case 8: return copy_words<BITS, 8, WAY>(table, from, eights, factor, to), true;
        default: return false;
    }
}

// Inputs of codes [first, first + count) of one stage of a row -> to [count * width].
template <Way WAY>
void decode_stage(const Arguments& a, int64_t row, int64_t stage, int64_t first, int64_t count, uint16_t* codes,
                  float* to) {
    const int64_t per_stage = a.inputs / a.width, length = divide_up(per_stage * a.stages * a.bits, 8);
    const uint8_t* from = a.codes + row * a.codes_stride;
    const float *table = a.table + stage * (int64_t(1) << a.bits) * a.width, factor = a.row_scale[row];
    first += stage * per_stage;
    if (first * a.bits % 8 == 0) {
        const uint8_t* at = from + first * a.bits / 8;
        const int64_t eights = count / 8;
        bool done = false;
        if (a.bits == 4) done = copy_fast<4, WAY>(table, at, eights, a.width, factor, to);
        if (a.bits == 6) done = copy_fast<6, WAY>(table, at, eights, a.width, factor, to);
        if (a.bits == 8) done = copy_fast<8, WAY>(table, at, eights, a.width, factor, to);
        if (a.bits == 12) done = copy_fast<12, WAY>(table, at, eights, a.width, factor, to);
        if (done) first += 8 * eights, count -= 8 * eights, to += 8 * eights * a.width;
    }
    if (!count) return;
    unpack(from, length, a.bits, first, count, codes);
    copy_any<WAY>(table, codes, count, a.width, factor, to);
}

// Codes that one strip of about so many inputs holds: whole bytes of any of the widths of codes.
inline int64_t strip_codes(const Arguments& a, int64_t inputs) {
    const int64_t codes = inputs / a.width / 8 * 8;
    return codes > 8 ? codes : 8;
}
// Floats between strips of neighbouring rows; not a multiple of a large power of two, for the cache sets.
inline int64_t strip_stride(const Arguments& a, int64_t inputs) {
    return padded(strip_codes(a, inputs) * a.width) + 16;
}

// Inputs of codes [first, first + count) of one row, times its scale if `scaled` -> to [count * width].
void decode(const Arguments& a, int64_t row, int64_t first, int64_t count, bool scaled, uint16_t* codes, float* to) {
    for (int64_t stage = 0; stage < a.stages; ++stage) {
        if (scaled)
            stage ? decode_stage<ADD_SCALED>(a, row, stage, first, count, codes, to)
                  : decode_stage<COPY_SCALED>(a, row, stage, first, count, codes, to);
        else
            stage ? decode_stage<ADD>(a, row, stage, first, count, codes, to)
                  : decode_stage<COPY>(a, row, stage, first, count, codes, to);
    }
}

// ---- rotation --------------------------------------------------------------------------------------------------

template <int HALF>
void butterflies(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += 2 * HALF)
        for (int64_t j = i; j < i + HALF; ++j) {
            const float a = x[j], b = x[j + HALF];
            x[j] = a + b;
            x[j + HALF] = a - b;
        }
}

// Walsh-Hadamard transform of each block of x [count], in place, not normalised.
void transform(float* x, int64_t count, int64_t block) {
    if (block > 1) butterflies<1>(x, count);
    if (block > 2) butterflies<2>(x, count);
    if (block > 4) butterflies<4>(x, count);
    if (block > 8) butterflies<8>(x, count);
    for (int64_t start = 0; start < count; start += block)  // a block stays in the first-level cache
        for (int64_t half = 16; half < block; half *= 2)
            for (int64_t i = start; i < start + block; i += 2 * half)
                for (int64_t j = i; j < i + half; j += LANES) {
                    const Vector a = load(x + j), b = load(x + j + half);
                    store(x + j, a + b);
                    store(x + j + half, a - b);
                }
}

// factors [inputs]: the signs, with what makes the transform orthonormal.
void write_factors(const Arguments& a, float* factors) {
    const float scale = float(1.0 / std::sqrt(double(a.block)));
    for (int64_t i = 0; i < a.inputs; ++i) factors[i] = a.signs[i / 8] >> i % 8 & 1 ? -scale : scale;
}

// One row of x in rotated inputs -> to [inputs].
template <typename T>
void rotate(const Arguments& a, const T* x, const float* factors, float* to) {
    if (!a.signs) {
        for (int64_t i = 0; i < a.inputs; ++i) to[i] = widen(x[i]);
        return;
    }
    for (int64_t i = 0; i < a.inputs; ++i) to[i] = widen(x[i]) * factors[i];
    transform(to, a.inputs, a.block);
}

// ---- products --------------------------------------------------------------------------------------------------

// sums[r][0..V * LANES) (+)= sum over k of rows[r][k] * panel[k][0..V * LANES)
template <int R, int V>
void multiply(const float* rows, int64_t row_stride, const float* panel, int64_t depth, bool add, float* sums) {
    Vector totals[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) totals[r][v] = Vector{};
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k) {
        Vector tokens[V];
        for (int v = 0; v < V; ++v) tokens[v] = load(panel + k * PANEL + v * LANES);
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) totals[r][v] += rows[r * row_stride + k] * tokens[v];
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            float* to = sums + r * PANEL + v * LANES;
            store(to, add ? load(to) + totals[r][v] : totals[r][v]);
        }
}

template <int R, typename Call>
void with_rows(int rows, const Call& call) {
    if constexpr (R > 0) {
        if (rows == R)
            call(std::integral_constant<int, R>());
        else
            with_rows<R - 1>(rows, call);
    }
}

// sums [rows][PANEL] (+)= rows [rows][depth] x panel [depth][PANEL]; `half`: its upper tokens are none. Meanwhile
// `next`, of the size of the panel, is brought into the L2 cache.
void multiply_rows(const float* rows, int64_t row_stride, int64_t count, const float* panel, int64_t depth, bool add,
                   bool half, float* sums, const float* next = nullptr) {
    if (half) {
        for (int64_t first = 0; first < count; first += 2 * ROWS)
            with_rows<2 * ROWS>(int(least(2 * ROWS, count - first)), [&](auto R) {
                multiply<R, 1>(rows + first * row_stride, row_stride, panel, depth, add, sums + first * PANEL);
            });
        return;
    }
    const int64_t ahead = divide_up(depth * PANEL, divide_up(count, ROWS));
    for (int64_t first = 0; first < count; first += ROWS) {
        if (next)
            for (int64_t i = 0; i < ahead; i += 16) __builtin_prefetch(next + first / ROWS * ahead + i, 0, 2);
        with_rows<ROWS>(int(least(ROWS, count - first)), [&](auto R) {
            multiply<R, 2>(rows + first * row_stride, row_stride, panel, depth, add, sums + first * PANEL);
        });
    }
}

inline float sum(Vector x) {
    float total = 0;
    for (int i = 0; i < LANES; ++i) total += x[i];
    return total;
}

inline float dot(const float* a, const float* b, int64_t count) {
    Vector totals[4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int v = 0; v < 4; ++v) totals[v] += load(a + i + v * LANES) * load(b + i + v * LANES);
    float total = sum((totals[0] + totals[1]) + (totals[2] + totals[3]));
    for (; i < count; ++i) total += a[i] * b[i];
    return total;
}

// ---- threads ---------------------------------------------------------------------------------------------------

inline int64_t threads_for(const Arguments& a, int64_t work) {
    const int64_t useful = divide_up(work, THREAD_WORK);
    return least(a.threads > 1 ? a.threads : 1, useful > 1 ? useful : 1);
}

// ---- few tokens ------------------------------------------------------------------------------------------------

int64_t strip_floats(const Arguments& a) {  // of one thread: a decoded strip, and its codes
    return strip_stride(a, FEW_STRIP) + padded(strip_codes(a, FEW_STRIP));
}

int64_t few_floats(const Arguments& a) {
    const int64_t factors = a.signs ? padded(a.inputs) : 0;
    return factors + a.tokens * (padded(a.inputs) + padded(a.rank)) + a.threads * strip_floats(a);
}

#if defined(__AVX__)
// Eight floats: the codewords of codes j, j + 1, ...
template <int D, int BITS>
inline __m256 words(const float* table, const Eight<BITS>& codes, int j) {
    auto at = [&](int i) { return table + D * codes[j + i]; };
    if constexpr (D == 2) {
        auto two = [&](int i) {
            const __m128 low = _mm_castpd_ps(_mm_load_sd(reinterpret_cast<const double*>(at(i))));
            return _mm_loadh_pi(low, reinterpret_cast<const __m64*>(at(i + 1)));
        };
        return _mm256_insertf128_ps(_mm256_castps128_ps256(two(0)), two(2), 1);
    } else if constexpr (D == 4) {
        return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(at(0))), _mm_loadu_ps(at(1)), 1);
    } else {
        return _mm256_loadu_ps(at(0));
    }
}

// sums[t] += codewords of `eights` times 8 codes, end to end, times x[t]. They go through registers, not a strip.
template <int BITS, int D, int TOKENS>
void dot_words(const float* table, const uint8_t* from, int64_t eights, const float* x, int64_t x_stride, float* sums) {
    __m256 totals[TOKENS][2];
    for (auto& total : totals) total[0] = total[1] = _mm256_setzero_ps();
    for (int64_t i = 0; i < eights; ++i, from += BITS, x += 8 * D) {
        const Eight<BITS> codes(from);
#pragma GCC unroll 8
        for (int j = 0; j < D; ++j) {
            const __m256 word = words<D, BITS>(table, codes, j * 8 / D);
            for (int t = 0; t < TOKENS; ++t) totals[t][j % 2] += word * _mm256_loadu_ps(x + t * x_stride + 8 * j);
        }
    }
    for (int t = 0; t < TOKENS; ++t) {
        const __m256 total = totals[t][0] + totals[t][1];
        for (int i = 0; i < 8; ++i) sums[t] += total[i];
    }
}

template <int BITS, int D>
void dot_tokens(const Arguments& a, const float* table, const uint8_t* from, int64_t eights, const float* x,
                float* sums) {
    with_rows<FEW>(int(a.tokens), [&](auto TOKENS) {
        dot_words<BITS, D, TOKENS>(table, from, eights, x, padded(a.inputs), sums);
    });
}

template <int BITS>
bool dot_width(const Arguments& a, const float* table, const uint8_t* from, int64_t eights, const float* x,
               float* sums) {
    switch (a.width) {
        case 2: return dot_tokens<BITS, 2>(a, table, from, eights, x, sums), true;
        case 4: return dot_tokens<BITS, 4>(a, table, from, eights, x, sums), true;
        case 8: return dot_tokens<BITS, 8>(a, table, from, eights, x, sums), true;
        default: return false;
    }
}
#endif

// Adds a row's codewords of one stage times each token to sums [tokens]; returns how many codes it took, if any.
int64_t dot_stage(const Arguments& a, int64_t row, int64_t stage, const float* x, float* sums) {
#if defined(__AVX__)
    const int64_t per_stage = a.inputs / a.width, bit = stage * per_stage * a.bits, eights = per_stage / 8;
    const float* table = a.table + stage * (int64_t(1) << a.bits) * a.width;
    const uint8_t* from = a.codes + row * a.codes_stride + bit / 8;
    bool done = false;
    if (bit % 8 == 0) {
        if (a.bits == 4) done = dot_width<4>(a, table, from, eights, x, sums);
        if (a.bits == 6) done = dot_width<6>(a, table, from, eights, x, sums);
        if (a.bits == 8) done = dot_width<8>(a, table, from, eights, x, sums);
        if (a.bits == 12) done = dot_width<12>(a, table, from, eights, x, sums);
    }
    return done ? 8 * eights : 0;
#else
    (void)a, (void)row, (void)stage, (void)x, (void)sums;
    return 0;
#endif
}

template <typename T>
void few_rows(const Arguments& a, int64_t first_row, int64_t last_row, const float* x, const float* z, float* strip) {
    const int64_t per_stage = a.inputs / a.width, step = strip_codes(a, FEW_STRIP);
    uint16_t* const codes = reinterpret_cast<uint16_t*>(strip + strip_stride(a, FEW_STRIP));
    for (int64_t row = first_row; row < last_row; ++row) {
        float sums[FEW] = {};
        for (int64_t stage = 0; stage < a.stages; ++stage)
            for (int64_t first = dot_stage(a, row, stage, x, sums); first < per_stage; first += step) {
                const int64_t count = least(step, per_stage - first);
                decode_stage<COPY>(a, row, stage, first, count, codes, strip);
                for (int64_t t = 0; t < a.tokens; ++t)
                    sums[t] += dot(strip, x + t * padded(a.inputs) + first * a.width, count * a.width);
            }
        for (int64_t t = 0; t < a.tokens; ++t) {
            float result = sums[t] * a.row_scale[row] + (a.bias ? a.bias[row] : 0.0f);
            if (a.rank) result += dot(a.low_b + row * a.rank, z + t * padded(a.rank), a.rank);
            narrow(result, static_cast<T*>(a.out)[t * a.out_stride + row]);
        }
    }
}

template <typename T>
void few_tokens(const Arguments& a) {
    float *const factors = a.scratch, *const x = factors + (a.signs ? padded(a.inputs) : 0);
    float *const z = x + a.tokens * padded(a.inputs), *const strips = z + a.tokens * padded(a.rank);
    if (a.signs) write_factors(a, factors);
    for (int64_t t = 0; t < a.tokens; ++t) {
        float* const token = x + t * padded(a.inputs);
        rotate(a, static_cast<const T*>(a.x) + t * a.x_stride, factors, token);
        for (int64_t r = 0; r < a.rank; ++r)
            z[t * padded(a.rank) + r] = dot(a.low_a + r * a.inputs, token, a.inputs);
    }
    share(threads_for(a, a.outputs * a.inputs), divide_up(a.outputs, FEW_ROWS), [&](int64_t worker, int64_t part) {
        const int64_t first = part * FEW_ROWS;
        few_rows<T>(a, first, least(a.outputs, first + FEW_ROWS), x, z, strips + worker * strip_floats(a));
    });
}

// ---- many tokens -----------------------------------------------------------------------------------------------

// Where things lie in the scratch buffer; all counts are floats.
struct Layout {
    int64_t factors, panel, low_panel, block, rows, codes, sums, worker, panels, total;
    Layout(const Arguments& a, int64_t limit)
        : factors(a.signs ? padded(a.inputs) : 0), panel(a.inputs * PANEL), low_panel(a.rank * PANEL) {
        // Rows decoded at a time: many where many panels use them, and few enough for every thread to get its share.
        block = least(BLOCK, 2 * ROWS * least(divide_up(a.tokens, PANEL), divide_up(a.outputs, 8 * ROWS * a.threads)));
        const int64_t decoded = block * strip_stride(a, STRIP);
        rows = decoded > padded(a.inputs) ? decoded : padded(a.inputs);
        codes = padded(strip_codes(a, STRIP));
        const int64_t fixed = factors + a.threads * (rows + codes);
        const int64_t each = panel + low_panel + a.threads * block * PANEL;
        panels = least(divide_up(a.tokens, PANEL), least((limit - fixed) / each, LARGEST_PANELS));
        if (panels < 1) panels = 1;
        const int64_t blocks = divide_up(divide_up(a.tokens, PANEL), panels);
        panels = divide_up(divide_up(a.tokens, PANEL), blocks);  // blocks of like size
        sums = panels * block * PANEL;
        worker = rows + codes + sums;
        total = factors + panels * (panel + low_panel) + a.threads * worker;
    }
};

// Tokens [first, first + count) rotated and packed -> panel [inputs][PANEL]; absent tokens are zero.
template <typename T>
void pack_panel(const Arguments& a, int64_t first, int64_t count, const float* factors, float* row, float* panel) {
    for (int64_t t = 0; t < PANEL; ++t) {
        if (t < count)
            rotate(a, static_cast<const T*>(a.x) + (first + t) * a.x_stride, factors, row);
        else
            std::memset(row, 0, size_t(a.inputs) * 4);
        for (int64_t i = 0; i < a.inputs; ++i) panel[i * PANEL + t] = row[i];
    }
}

// sums [panel][layout.block][PANEL] of rows [first, first + count) with every panel, low-rank part included.
void multiply_block(const Arguments& a, const Layout& layout, int64_t first, int64_t count, int64_t tokens,
                    const float* panels, const float* low_panels, float* strip, uint16_t* codes, float* sums) {
    const int64_t per_stage = a.inputs / a.width, step = strip_codes(a, STRIP), stride = strip_stride(a, STRIP);
    for (int64_t code = 0; code < per_stage; code += step) {
        const int64_t many = least(step, per_stage - code);
        for (int64_t r = 0; r < count; ++r) decode(a, first + r, code, many, false, codes, strip + r * stride);
        for (int64_t p = 0; p * PANEL < tokens; ++p) {
            const float* panel = panels + p * layout.panel + code * a.width * PANEL;
            const float* next = (p + 1) * PANEL < tokens ? panel + layout.panel : nullptr;
            multiply_rows(strip, stride, count, panel, many * a.width, code > 0, tokens - p * PANEL <= LANES,
                          sums + p * layout.block * PANEL, next);
        }
    }
    for (int64_t p = 0; p * PANEL < tokens; ++p)
        for (int64_t r = 0; r < count; ++r)
            for (int t = 0; t < PANEL; ++t) sums[(p * layout.block + r) * PANEL + t] *= a.row_scale[first + r];
    for (int64_t p = 0; p * PANEL < tokens && a.rank; ++p)
        multiply_rows(a.low_b + first * a.rank, a.rank, count, low_panels + p * layout.low_panel, a.rank, true,
                      tokens - p * PANEL <= LANES, sums + p * layout.block * PANEL);
}

template <typename T>
void write_block(const Arguments& a, const Layout& layout, int64_t first, int64_t count, int64_t first_token,
                 int64_t tokens, const float* sums) {
    for (int64_t t = 0; t < tokens; ++t) {
        const float* from = sums + t / PANEL * layout.block * PANEL + t % PANEL;
        T* to = static_cast<T*>(a.out) + (first_token + t) * a.out_stride + first;
        for (int64_t r = 0; r < count; ++r) narrow(from[r * PANEL] + (a.bias ? a.bias[first + r] : 0.0f), to[r]);
    }
}

template <typename T>
void many_tokens(const Arguments& a) {
    const Layout layout(a, a.scratch_floats);
    float* const panels = a.scratch + layout.factors;
    float* const low_panels = panels + layout.panels * layout.panel;
    float* const workers = low_panels + layout.panels * layout.low_panel;
    if (a.signs) write_factors(a, a.scratch);
    for (int64_t start = 0; start < a.tokens; start += layout.panels * PANEL) {
        const int64_t tokens = least(layout.panels * PANEL, a.tokens - start);
        const int64_t threads = threads_for(a, tokens * a.inputs * a.outputs);
        const int64_t packers = threads_for(a, tokens * a.inputs * (16 + a.rank));
        share(packers, divide_up(tokens, PANEL), [&](int64_t worker, int64_t p) {
            float *const panel = panels + p * layout.panel, *const low_panel = low_panels + p * layout.low_panel;
            const int64_t count = least(PANEL, tokens - p * PANEL);
            pack_panel<T>(a, start + p * PANEL, count, a.scratch, workers + worker * layout.worker, panel);
            for (int64_t i = 0; i < a.inputs && a.rank; i += STRIP)  // in strips, so that no sum is long
                multiply_rows(a.low_a + i, a.inputs, a.rank, panel + i * PANEL, least(STRIP, a.inputs - i), i > 0,
                              false, low_panel);
        });
        share(threads, divide_up(a.outputs, layout.block), [&](int64_t worker, int64_t part) {
            const int64_t first = part * layout.block, count = least(layout.block, a.outputs - first);
            float* const strip = workers + worker * layout.worker;
            float* const sums = strip + layout.rows + layout.codes;
            uint16_t* const codes = reinterpret_cast<uint16_t*>(strip + layout.rows);
            multiply_block(a, layout, first, count, tokens, panels, low_panels, strip, codes, sums);
            write_block<T>(a, layout, first, count, start, tokens, sums);
        });
    }
}

template <typename T>
void forward(const Arguments& a) {
    if (a.tokens <= FEW)
        few_tokens<T>(a);
    else
        many_tokens<T>(a);
}

// ---- parts of the product, for a product that is taken elsewhere --------------------------------------------------

// All rows that `codes` and `row_scale` hold, times their scales -> out [outputs, inputs].
template <typename T>
void decode_rows(const Arguments& a) {
    const int64_t per_stage = a.inputs / a.width, step = strip_codes(a, FEW_STRIP);
    share(threads_for(a, a.outputs * a.inputs), divide_up(a.outputs, FEW_ROWS), [&](int64_t worker, int64_t part) {
        float* const strip = a.scratch + worker * strip_floats(a);
        uint16_t* const codes = reinterpret_cast<uint16_t*>(strip + strip_stride(a, FEW_STRIP));
        for (int64_t row = part * FEW_ROWS; row < least(a.outputs, (part + 1) * FEW_ROWS); ++row)
            for (int64_t first = 0; first < per_stage; first += step) {
                const int64_t count = least(step, per_stage - first);
                T* const to = static_cast<T*>(a.out) + row * a.out_stride + first * a.width;
                if constexpr (std::is_same_v<T, float>) {
                    decode(a, row, first, count, true, codes, to);
                } else {
                    decode(a, row, first, count, true, codes, strip);
                    for (int64_t i = 0; i < count * a.width; ++i) narrow(strip[i], to[i]);
                }
            }
    });
}

// x in rotated inputs -> out [tokens, inputs]; with `back`, the way back.
template <typename T>
void rotate_rows(const Arguments& a, bool back) {
    float* const factors = a.scratch;
    write_factors(a, factors);
    share(threads_for(a, a.tokens * a.inputs * 4), divide_up(a.tokens, 16), [&](int64_t worker, int64_t part) {
        float* const row = factors + (worker + 1) * padded(a.inputs);
        for (int64_t t = part * 16; t < least(a.tokens, (part + 1) * 16); ++t) {
            const T* from = static_cast<const T*>(a.x) + t * a.x_stride;
            T* to = static_cast<T*>(a.out) + t * a.out_stride;
            for (int64_t i = 0; i < a.inputs; ++i) row[i] = back ? widen(from[i]) : widen(from[i]) * factors[i];
            transform(row, a.inputs, a.block);
            for (int64_t i = 0; i < a.inputs; ++i) narrow(back ? row[i] * factors[i] : row[i], to[i]);
        }
    });
}

enum Task { FORWARD = 0, DECODE = 1, ROTATE = 2, UNROTATE = 3 };

template <typename T>
void run(const Arguments& a, int task) {
    switch (task) {
        case FORWARD: return forward<T>(a);
        case DECODE: return decode_rows<T>(a);
        default: return rotate_rows<T>(a, task == UNROTATE);
    }
}

}  // namespace

// Floats of scratch that a task takes; where it can choose, at most `limit`, if one panel of tokens fits into that.
extern "C" int64_t dit_accel_vq_scratch(const Arguments* arguments, int task, int64_t limit) {
    const Arguments& a = *arguments;
    if (task == DECODE) return a.threads * strip_floats(a);
    if (task != FORWARD) return (a.threads + 1) * padded(a.inputs);
    return a.tokens <= FEW ? few_floats(a) : Layout(a, limit).total;
}

// 0: done; 2: unknown type.
extern "C" int dit_accel_vq_run(const Arguments* arguments, int task) {
    switch (arguments->type) {
        case 0: return run<float>(*arguments, task), 0;
        case 1: return run<BFloat16>(*arguments, task), 0;
        case 2: return run<Float16>(*arguments, task), 0;
        default: return 2;
    }
}
