// A linear layer in fp32 by products of whole numbers, for x86 processors with AMX (see digits.py).
//
// Every number of a row is a fraction of the row's largest: Digits signed digits in base 256, the first one
// counting most. The product of two such numbers is a sum over pairs of digits; pairs (i, j) with
// i + j >= Digits count less than what fp32 rounds away and are left out. AMX multiplies tiles of digits and adds
// them up without any rounding, one sum for each i + j; fp32 comes in only when the sums are put together.
//
// Tiles of the input are `height` <= 16 rows by 64 features, tiles of the weight 64 features by 16 outputs
// with four features of one output side by side, as AMX wants them. Both lie in memory one after the other.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace {

constexpr int kDepth = 64;                    // features of a tile
constexpr int kWide = 16;                     // outputs of a tile
constexpr int kTile = kDepth * kWide;         // bytes of a weight tile
constexpr int kLine = 64;                     // bytes of a cache line
constexpr size_t kBand = size_t{1} << 20;     // bytes of input digits to keep in the second-level cache
constexpr float kSmallest = 1e-30f;           // the largest of a row below which the row counts as zero

// How rows are cut into blocks of equal height: 49 rows are four blocks of 13, not three of 16 and one of 1.
struct Blocks {
    int count, height, steps, band;
    size_t bytes;  // digits of one block

    Blocks(int digits, int rows, int features)
        : count((rows + 15) / 16),
          height((rows + count - 1) / count),
          steps((features + kDepth - 1) / kDepth),
          bytes(size_t(steps) * digits * height * kDepth) {
        band = int(std::clamp<size_t>(kBand / bytes, 1, count));
    }
};

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    explicit TileConfig(int height) {
        // 0 to 2: sums; 3 to 5: input digits; 6 and 7: weight digits.
        for (int tile = 0; tile < 8; ++tile) {
            row_bytes[tile] = kDepth;
            rows[tile] = uint8_t(tile < 6 ? height : kDepth / 4);
        }
    }
};

// Writes a row's digits into its block and returns what they have to be multiplied by.
template <int Digits>
float split_row(const float* row, int features, int height, int8_t* block) {
    const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
    __m512i top = _mm512_setzero_si512();
    const auto load = [&](int k) {
        const int left = features - k;
        return _mm512_maskz_loadu_ps(left >= 16 ? 0xffff : (left > 0 ? (1 << left) - 1 : 0), row + k);
    };
    // Without their sign, fp32 numbers are in the order of their bits, and what is no number comes last.
    for (int k = 0; k < features; k += 16) {
        top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(load(k)), no_sign));
    }
    const int32_t bits = _mm512_reduce_max_epi32(top);
    const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(bits)));
    const bool finite = bits < 0x7f800000;
    constexpr int32_t kHalf = 0x808080 >> (8 * (3 - Digits));   // 128 in every digit
    constexpr int32_t kTop = 0x7f7f7f >> (8 * (3 - Digits));    // 127 in every digit
    const float limit = float(kTop) * (1.0f - 0x1p-22f);        // rounding must not carry beyond the first digit
    const __m512 factor = _mm512_set1_ps(finite && largest >= kSmallest ? limit / largest : 0.0f);
    const __m512i half = _mm512_set1_epi32(kHalf);
    const int padded = (features + kDepth - 1) / kDepth * kDepth;
    for (int k = 0; k < padded; k += 16) {
        __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load(k), factor));
        whole = _mm512_xor_si512(_mm512_add_epi32(whole, half), half);  // its bytes are now signed digits
        int8_t* target = block + size_t(k / kDepth) * Digits * height * kDepth + k % kDepth;
        for (int digit = Digits - 1; digit >= 0; --digit) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(target + digit * height * kDepth),
                             _mm512_cvtepi32_epi8(whole));
            whole = _mm512_srli_epi32(whole, 8);
        }
    }
    constexpr float kFirst = float(1 << (8 * (Digits - 1)));    // what the first digit counts
    return finite ? largest / limit * kFirst : std::numeric_limits<float>::quiet_NaN();
}

// The sums of one block of rows and one panel of outputs, in tiles 0 to Digits - 1; `ahead` bytes from `next`
// on are fetched meanwhile, in equal parts a step.
template <int Digits>
void multiply_block(const int8_t* rows, int height, const int8_t* panel, int steps, const int8_t* next,
                    int lines) {
    const int step_bytes = height * kDepth;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    for (int step = 0; step < steps; ++step) {
        _tile_loadd(6, panel, kDepth);
        _tile_loadd(3, rows, kDepth);
        _tile_dpbssd(0, 3, 6);
        if constexpr (Digits > 1) {
            _tile_loadd(4, rows + step_bytes, kDepth);
            _tile_dpbssd(1, 4, 6);
            _tile_loadd(7, panel + kTile, kDepth);
            _tile_dpbssd(1, 3, 7);
        }
        if constexpr (Digits > 2) {
            _tile_loadd(5, rows + 2 * step_bytes, kDepth);
            _tile_dpbssd(2, 5, 6);
            _tile_dpbssd(2, 4, 7);
            _tile_loadd(6, panel + 2 * kTile, kDepth);
            _tile_dpbssd(2, 3, 6);
        }
        for (int line = 0; line < lines; ++line) {
            _mm_prefetch(reinterpret_cast<const char*>(next + line * kLine), _MM_HINT_T1);
        }
        rows += Digits * step_bytes;
        panel += Digits * kTile;
        next += Digits * kTile;
    }
}

// Puts the sums of tiles 0 to Digits - 1 together into `rows` rows of the output.
template <int Digits>
void write_block(const float* row_scales, int rows, __m512 scales, __m512 bias, __mmask16 columns, float* output,
                 int outputs) {
    alignas(64) int32_t sums[3][16][kWide];
    _tile_stored(0, sums[0], kLine);
    if constexpr (Digits > 1) _tile_stored(1, sums[1], kLine);
    if constexpr (Digits > 2) _tile_stored(2, sums[2], kLine);
    const __m512 next = _mm512_set1_ps(1.0f / 256);
    for (int row = 0; row < rows; ++row) {
        __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums[Digits - 1][row]));
        for (int digit = Digits - 2; digit >= 0; --digit) {
            sum = _mm512_fmadd_ps(sum, next, _mm512_cvtepi32_ps(_mm512_load_si512(sums[digit][row])));
        }
        sum = _mm512_fmadd_ps(_mm512_mul_ps(sum, _mm512_set1_ps(row_scales[row])), scales, bias);
        _mm512_mask_storeu_ps(output + size_t(row) * outputs, columns, sum);
    }
}

template <int Digits>
void multiply(const float* input, int rows, int features, const int8_t* weight, const float* scales,
              const float* bias, int outputs, float* output, int8_t* scratch, int threads) {
    const Blocks blocks(Digits, rows, features);
    const int panels = (outputs + kWide - 1) / kWide;
    const int bands = (blocks.count + blocks.band - 1) / blocks.band;
    const size_t panel_bytes = size_t(blocks.steps) * Digits * kTile;
    float* row_scales = reinterpret_cast<float*>(scratch + blocks.count * blocks.bytes);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int row = 0; row < blocks.count * blocks.height; ++row) {
            // Rows that only fill the last block up repeat the last real one.
            const float* source = input + size_t(std::min(row, rows - 1)) * features;
            int8_t* target = scratch + row / blocks.height * blocks.bytes + row % blocks.height * kDepth;
            row_scales[row] = split_row<Digits>(source, features, blocks.height, target);
        }
        const TileConfig config(blocks.height);
        _tile_loadconfig(&config);
#pragma omp for collapse(2) schedule(static)
        for (int band = 0; band < bands; ++band) {
            for (int panel = 0; panel < panels; ++panel) {
                const int first = band * blocks.band, last = std::min(first + blocks.band, blocks.count);
                const int8_t* tiles = weight + panel * panel_bytes;
                const int8_t* next = weight + (panel + 1) % panels * panel_bytes;
                // The blocks of a band share the work of fetching the next panel.
                const int all = Digits * kTile / kLine, lines = (all + last - first - 1) / (last - first);
                const int width = std::min(kWide, outputs - panel * kWide);
                const __mmask16 columns = __mmask16((1u << width) - 1);
                const __m512 panel_scales = _mm512_maskz_loadu_ps(columns, scales + panel * kWide);
                const __m512 panel_bias =
                    bias ? _mm512_maskz_loadu_ps(columns, bias + panel * kWide) : _mm512_setzero_ps();
                for (int block = first; block < last; ++block) {
                    const int fetched = std::min((block - first) * lines, all);
                    multiply_block<Digits>(scratch + block * blocks.bytes, blocks.height, tiles, blocks.steps,
                                           next + fetched * kLine, std::min(lines, all - fetched));
                    const int row = block * blocks.height;
                    write_block<Digits>(row_scales + row, std::min(blocks.height, rows - row), panel_scales,
                                        panel_bias, columns, output + size_t(row) * outputs + panel * kWide,
                                        outputs);
                }
            }
        }
        _tile_release();
    }
}

}  // namespace

extern "C" {

// Asks the kernel for the tile registers; 0 if it gives them.
int digits_begin() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return int(syscall(SYS_arch_prctl, kRequest, kTileData));
}

// Bytes of scratch memory that a product needs.
size_t digits_scratch(int digits, int rows, int features) {
    const Blocks blocks(digits, rows, features);
    return blocks.count * (blocks.bytes + blocks.height * sizeof(float));
}

// output (rows, outputs) = input (rows, features) times the weight whose digits and scales are given, plus
// bias (or null). All fp32 and contiguous; weight and scratch at multiples of 64 bytes.
void digits_linear(int digits, const float* input, int rows, int features, const int8_t* weight,
                   const float* scales, const float* bias, int outputs, float* output, int8_t* scratch,
                   int threads) {
    const auto run = digits == 3 ? multiply<3> : digits == 2 ? multiply<2> : multiply<1>;
    run(input, rows, features, weight, scales, bias, outputs, output, scratch, threads);
}
}
