// Exact GEMM of int8 by 4-bit weights for x86 CPUs, which reads the weights as they are stored.
//
//     acc[m, n] = sum_k X[m, k] W[n, k]        X int8 in [-127, 127], W in [-8, 7], acc written as fp32
//     with scales of W's groups of 128 or 64 of K, of X's blocks of 128, or of both:
//     acc[m, n] = sum_g s_x[m, block of g] * s_w[g, n] * (the sum over group g)
//     each sum exact in each lane of a vector, then scaled and added in fp32
//
// W [N, H] bytes: byte j of a row holds weight j low and weight j + H high, two's complement (ops/pack.py). H is a
// multiple of 64. A weight plus 8 is a byte without sign in [0, 15], which is what both byte products want:
//
//   VNNI    vpdpbusd adds four products into int32
//   else    vpmaddubsw adds two into int16, at most 2 * 15 * 127 = 3810: eight of them stay in int16 before they
//           are widened. With 8-bit weights not even two do, so 4-bit weights are the faster ones here.
//
// What 8 adds is taken off again: 8 * sum_k X[m, k] at the end, and with groups in each lane before its products are
// added, so that no fp32 sum holds it. K is the inner loop (a dot product of rows): nothing is packed, and no int8 copy
// of W exists.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

#if defined(__AVX512BW__)
using Vec = __m512i;
using Floats = __m512;
constexpr int64_t BYTES = 64;
constexpr int ROWS = 4, COLUMNS = 4;
constexpr int GROUP_ROWS = 3, GROUP_COLUMNS = 3;  // two sums each, in integers and in fp32: fastest of six tried
inline Vec load(const void* p) { return _mm512_loadu_si512(p); }
inline Vec zero() { return _mm512_setzero_si512(); }
inline Vec all8(char value) { return _mm512_set1_epi8(value); }
inline Vec bits_and(Vec a, Vec b) { return _mm512_and_si512(a, b); }
inline Vec bits_xor(Vec a, Vec b) { return _mm512_xor_si512(a, b); }
inline Vec right4(Vec a) { return _mm512_srli_epi16(a, 4); }
inline Vec add32(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
inline Vec sub32(Vec a, Vec b) { return _mm512_sub_epi32(a, b); }
inline Vec add16(Vec a, Vec b) { return _mm512_add_epi16(a, b); }
inline Vec sub16(Vec a, Vec b) { return _mm512_sub_epi16(a, b); }
inline Vec multiply8(Vec u, Vec s) { return _mm512_maddubs_epi16(u, s); }
inline Vec widen16(Vec a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
inline Floats no_floats() { return _mm512_setzero_ps(); }
inline Floats scaled(Vec a, float s, Floats sum) { return _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), _mm512_set1_ps(s), sum); }
inline int32_t total(Vec a) { return _mm512_reduce_add_epi32(a); }
inline float total(Floats a) { return _mm512_reduce_add_ps(a); }
#else
using Vec = __m256i;
using Floats = __m256;
constexpr int64_t BYTES = 32;
constexpr int ROWS = 4, COLUMNS = 2;
constexpr int GROUP_ROWS = 3, GROUP_COLUMNS = 3;
inline Vec load(const void* p) { return _mm256_loadu_si256((const Vec*)p); }
inline Vec zero() { return _mm256_setzero_si256(); }
inline Vec all8(char value) { return _mm256_set1_epi8(value); }
inline Vec bits_and(Vec a, Vec b) { return _mm256_and_si256(a, b); }
inline Vec bits_xor(Vec a, Vec b) { return _mm256_xor_si256(a, b); }
inline Vec right4(Vec a) { return _mm256_srli_epi16(a, 4); }
inline Vec add32(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
inline Vec sub32(Vec a, Vec b) { return _mm256_sub_epi32(a, b); }
inline Vec add16(Vec a, Vec b) { return _mm256_add_epi16(a, b); }
inline Vec sub16(Vec a, Vec b) { return _mm256_sub_epi16(a, b); }
inline Vec multiply8(Vec u, Vec s) { return _mm256_maddubs_epi16(u, s); }
inline Vec widen16(Vec a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
inline Floats no_floats() { return _mm256_setzero_ps(); }
inline Floats scaled(Vec a, float s, Floats sum) { return _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), _mm256_set1_ps(s), sum); }
inline __m128i fold(Vec a) { return _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)); }
inline int32_t total(Vec a) {
  const __m128i four = fold(a), two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
inline float total(Floats a) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#endif

constexpr int64_t BLOCK = 128;  // of X; the largest group of W
constexpr int64_t PANEL_BYTES = 256 * 1024;  // of W: rows that a core multiplies by tile after tile of X from its L2
constexpr int64_t TASK_ROWS = 64;

int64_t up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Weights plus 8, of the low or the high halves of bytes; `flipped` has bit 3 of both turned over already.
template <bool HIGH>
inline Vec weights_of(Vec flipped) {
  return bits_and(HIGH ? right4(flipped) : flipped, all8(15));
}

inline Vec flipped(const uint8_t* w) { return bits_xor(load(w), all8(char(0x88))); }

#if defined(__AVX512VNNI__)
inline Vec dot(Vec sum, Vec u, Vec s) { return _mm512_dpbusd_epi32(sum, u, s); }
#endif

// The products of one group: in int32, or in int16, which holds 8 * 127 * 2 to take off and 3810 for each vector.
#if defined(__AVX512VNNI__)
inline Vec group_dot(Vec sum, Vec u, Vec s) { return dot(sum, u, s); }
inline Vec group_negative(Vec sum) { return sub32(zero(), sum); }
inline Vec group_total(Vec sum) { return sum; }
#else
static_assert(128 / BYTES * (3810 + 2032) < 32768);
inline Vec group_dot(Vec sum, Vec u, Vec s) { return add16(sum, multiply8(u, s)); }
inline Vec group_negative(Vec sum) { return sub16(zero(), sum); }
inline Vec group_total(Vec sum) { return widen16(sum); }
#endif

// One output channel each: acc[m][n] += the products of `depth` bytes from `j` on, both halves.
template <int M, int N>
inline void multiply(const int8_t* x, int64_t x_stride, const uint8_t* w, int64_t half, Vec (&acc)[M][N]) {
#if defined(__AVX512VNNI__)
  for (int64_t j = 0; j < half; j += BYTES) {
    Vec low[N], high[N];
    for (int n = 0; n < N; ++n) {
      const Vec both = flipped(w + n * half + j);
      low[n] = weights_of<false>(both), high[n] = weights_of<true>(both);
    }
    for (int m = 0; m < M; ++m) {
      const Vec x0 = load(x + m * x_stride + j), x1 = load(x + m * x_stride + half + j);
      for (int n = 0; n < N; ++n) acc[m][n] = dot(dot(acc[m][n], low[n], x0), high[n], x1);
    }
  }
#else
  constexpr int64_t RUN = 4 * BYTES;  // eight sums of two products
  for (int64_t start = 0; start < half; start += RUN) {
    Vec short_acc[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) short_acc[m][n] = zero();
    for (int64_t j = start; j < std::min(half, start + RUN); j += BYTES) {
      Vec low[N], high[N];
      for (int n = 0; n < N; ++n) {
        const Vec both = flipped(w + n * half + j);
        low[n] = weights_of<false>(both), high[n] = weights_of<true>(both);
      }
      for (int m = 0; m < M; ++m) {
        const Vec x0 = load(x + m * x_stride + j), x1 = load(x + m * x_stride + half + j);
        for (int n = 0; n < N; ++n) {
          short_acc[m][n] = add16(short_acc[m][n], add16(multiply8(low[n], x0), multiply8(high[n], x1)));
        }
      }
    }
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) acc[m][n] = add32(acc[m][n], widen16(short_acc[m][n]));
  }
#endif
}

struct Problem {
  const int8_t* x;
  const uint8_t* w;
  const float* scales;    // of W's groups [groups, width], or none
  const float* x_scales;  // of X's blocks [rows, blocks], or none
  float* out;
  int64_t rows, width, depth, half, group, groups, blocks;
};

// The scales of one group, and of the block that it lies in, for a tile.
template <int M, int N>
struct GroupScales {
  float x[M], w[N];
  GroupScales(const Problem& p, int64_t m0, int64_t n0, int64_t group, int64_t block) {
    for (int m = 0; m < M; ++m) x[m] = p.x_scales ? p.x_scales[(m0 + m) * p.blocks + block] : 1.0f;
    for (int n = 0; n < N; ++n) w[n] = p.scales ? p.scales[group * p.width + n0 + n] : 1.0f;
  }
};

// `STEPS` vectors of bytes from `j` on, all of one group, in one half: an exact sum of each lane, then fp32.
template <bool HIGH, int STEPS, int M, int N>
inline void multiply_run(const Problem& p, const int8_t* x, const uint8_t* w, const GroupScales<M, N>& s, int64_t j,
                         Floats (&acc)[M][N]) {
  Vec sums[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    Vec eights = zero();
#pragma GCC unroll 8
    for (int i = 0; i < STEPS; ++i) {
      eights = group_dot(eights, all8(8), load(x + (2 * m + HIGH) * p.half + j + i * BYTES));
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[m][n] = group_negative(eights);
  }
#pragma GCC unroll 8
  for (int i = 0; i < STEPS; ++i) {
    Vec weights[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) weights[n] = weights_of<HIGH>(flipped(w + n * p.half + j + i * BYTES));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec xs = load(x + (2 * m + HIGH) * p.half + j + i * BYTES);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[m][n] = group_dot(sums[m][n], weights[n], xs);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m][n] = scaled(group_total(sums[m][n]), s.x[m] * s.w[n], acc[m][n]);
  }
}

// One half of the bytes with groups. As H is a multiple of 64, a run that lies in one group is 64 or 128 bytes; with
// groups of 64 each is 64.
template <bool HIGH, int64_t GROUP, int M, int N>
inline void multiply_groups(const Problem& p, const int8_t* x, const uint8_t* w, int64_t m0, int64_t n0,
                            Floats (&acc)[M][N]) {
  const int64_t first = HIGH ? p.half : 0;
  for (int64_t j = 0; j < p.half;) {
    const int64_t k = first + j, block = std::min(k / BLOCK, p.blocks - 1);  // past the last K all weights are zero
    const int64_t group = GROUP == BLOCK ? block : std::min(k / GROUP, p.groups - 1);
    const GroupScales<M, N> s(p, m0, n0, group, block);
    if (GROUP == BLOCK && k % BLOCK == 0 && j + BLOCK <= p.half) {
      multiply_run<HIGH, BLOCK / BYTES>(p, x, w, s, j, acc);
      j += BLOCK;
    } else {
      multiply_run<HIGH, BLOCK / BYTES / 2>(p, x, w, s, j, acc);
      j += BLOCK / 2;
    }
  }
}

template <int M, int N>
void tile(const Problem& p, const int8_t* x, const int32_t* sums, int64_t m0, int64_t n0) {
  const uint8_t* w = p.w + n0 * p.half;
  float* out = p.out + m0 * p.width + n0;
  if (sums) {
    Vec acc[M][N];
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) acc[m][n] = zero();
    multiply(x, 2 * p.half, w, p.half, acc);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) out[m * p.width + n] = float(total(acc[m][n]) - 8 * sums[m]);
    return;
  }
  Floats acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) acc[m][n] = no_floats();
  if (p.group == BLOCK) {
    multiply_groups<false, BLOCK>(p, x, w, m0, n0, acc);
    multiply_groups<true, BLOCK>(p, x, w, m0, n0, acc);
  } else {
    multiply_groups<false, BLOCK / 2>(p, x, w, m0, n0, acc);
    multiply_groups<true, BLOCK / 2>(p, x, w, m0, n0, acc);
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) out[m * p.width + n] = total(acc[m][n]);
}

template <int M, int N>
void tile_of(int rows, int columns, const Problem& p, const int8_t* x, const int32_t* sums, int64_t m0, int64_t n0) {
  if constexpr (M > 1) {
    if (rows < M) return tile_of<M - 1, N>(rows, columns, p, x, sums, m0, n0);
  }
  if constexpr (N > 1) {
    if (columns < N) return tile_of<M, N - 1>(rows, columns, p, x, sums, m0, n0);
  }
  tile<M, N>(p, x, sums, m0, n0);
}

// Rows of X with zeros up to 2 * half, and the sum of each.
void copy_rows(const Problem& p, int64_t m0, int rows, int8_t* to, int32_t* sums) {
  for (int m = 0; m < rows; ++m, to += 2 * p.half) {
    const int8_t* from = p.x + (m0 + m) * p.depth;
    int32_t sum = 0;
    for (int64_t k = 0; k < p.depth; ++k) sum += from[k];
    std::memcpy(to, from, p.depth);
    std::memset(to + p.depth, 0, 2 * p.half - p.depth);
    sums[m] = sum;
  }
}

// `M` and `N`: the tile. Where groups are scaled it needs no sums of rows.
template <int M, int N, bool GROUPS>
void multiply_part(const Problem& p, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end, int8_t* buffer) {
  for (int64_t m = row_begin; m < row_end; m += M) {
    const int rows = int(std::min<int64_t>(M, row_end - m));
    int32_t sums[M];
    copy_rows(p, m, rows, buffer, sums);
    for (int64_t n = begin; n < end; n += N) {
      tile_of<M, N>(rows, int(std::min<int64_t>(N, end - n)), p, buffer, GROUPS ? nullptr : sums, m, n);
    }
  }
}

}  // namespace

extern "C" {

// acc fp32 [rows, width]; `scales` fp32 [ceil(depth / group), width] or null, `group` 128 or 64 (128 without scales);
// `x_scales` fp32 [rows, ceil(depth / 128)] or null. 0, or 1 where there is no memory.
int viditq_multiply_int4(const int8_t* x, const uint8_t* w, const float* scales, const float* x_scales, float* out,
                         int64_t rows, int64_t width, int64_t depth, int64_t group, int threads) {
  const int64_t half = up(depth, 128) / 2;
  const int64_t of_w = up(depth, group) / group, of_x = up(depth, BLOCK) / BLOCK;
  const Problem p{x, w, scales, x_scales, out, rows, width, depth, half, group, of_w, of_x};
  const bool groups = scales || x_scales;
  const int64_t columns = groups ? GROUP_COLUMNS : COLUMNS;
  // Enough parts for all threads, each of so many channels as L2 holds.
  int64_t panel = std::max<int64_t>(columns, PANEL_BYTES / half / columns * columns);
  const int64_t tasks_m = (rows + TASK_ROWS - 1) / TASK_ROWS;
  if (tasks_m < threads) panel = std::min(panel, up((width * tasks_m + threads - 1) / threads, columns));
  const int64_t tasks_n = (width + panel - 1) / panel;
  const int64_t bytes = std::max(ROWS, GROUP_ROWS) * 2 * half;  // a multiple of 64, as `half` is
  int8_t* buffers = (int8_t*)std::aligned_alloc(64, bytes * threads);
  if (!buffers) return 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < tasks_m * tasks_n; ++task) {
    const int64_t m = task / tasks_n * TASK_ROWS, n = task % tasks_n * panel;
    const int64_t row_end = std::min(rows, m + TASK_ROWS), end = std::min(width, n + panel);
    int8_t* buffer = buffers + bytes * omp_get_thread_num();
    if (groups) {
      multiply_part<GROUP_ROWS, GROUP_COLUMNS, true>(p, m, row_end, n, end, buffer);
    } else {
      multiply_part<ROWS, COLUMNS, false>(p, m, row_end, n, end, buffer);
    }
  }
  std::free(buffers);
  return 0;
}
}
