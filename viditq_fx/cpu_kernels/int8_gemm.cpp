// Exact int8 GEMM for x86 CPUs whose 8-bit dot product saturates (AVX2 or AVX-512BW, no VNNI).
//
//     acc[m, n] = sum_k X[m, k] W[n, k],   X, W int8 in [-127, 127],   acc written as fp32
//
// Two ways to multiply; both keep 32-bit sums that are exact:
//
// PAIRS   (8-bit X)  both operands are widened to int16; vpmaddwd adds two products into int32.
//
// QUADS   (7-bit X, |X| <= 63)  X + 64 is unsigned, so that vpmaddubsw multiplies bytes and adds two
//         products in saturating int16: at most 2 * 127 * 127 < 2^15. Where the weights themselves prove
//         that four products cannot leave int16 either, two such sums are added before the widening
//         vpmaddwd, which spares a quarter of the multiplier's work. `pack` checks every group of four
//         weights and flags the few that prove nothing; 64 * sum_k W[n, k] is subtracted at the end.
//
// Given scales, the result is acc * s_x[m] * s_w[n] + bias[n] in fp32, rounded after each step as the reference is
// (compiled with -ffp-contract=off), and the accumulators never go through memory on their own.
//
// A packed weight is panels of NR channels (width), GROUP values of K side by side for each channel:
// [panel][K / GROUP][NR][GROUP], zero-padded; QUADS appends its flags and its column sums.
// The blocks of X that a core works on are sized for its second-level cache.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

#if defined(__AVX512BW__)
using Vec = __m512i;
constexpr int LANES = 16, VECTORS = 2, ROWS_PAIRS = 8, ROWS_QUADS = 8;
inline Vec load(const void* p) { return _mm512_loadu_si512(p); }
inline Vec zero() { return _mm512_setzero_si512(); }
inline Vec all(int32_t value) { return _mm512_set1_epi32(value); }
inline Vec ones16() { return _mm512_set1_epi16(1); }
inline Vec widen(const void* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p)); }
inline Vec multiply16(Vec a, Vec b) { return _mm512_madd_epi16(a, b); }
inline Vec multiply8(Vec u, Vec s) { return _mm512_maddubs_epi16(u, s); }
inline Vec add16(Vec a, Vec b) { return _mm512_add_epi16(a, b); }
inline Vec add32(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
inline void store(void* p, Vec v) { _mm512_storeu_si512(p, v); }
#else
using Vec = __m256i;
constexpr int LANES = 8, VECTORS = 2, ROWS_PAIRS = 4, ROWS_QUADS = 4;
inline Vec load(const void* p) { return _mm256_loadu_si256((const Vec*)p); }
inline Vec zero() { return _mm256_setzero_si256(); }
inline Vec all(int32_t value) { return _mm256_set1_epi32(value); }
inline Vec ones16() { return _mm256_set1_epi16(1); }
inline Vec widen(const void* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)); }
inline Vec multiply16(Vec a, Vec b) { return _mm256_madd_epi16(a, b); }
inline Vec multiply8(Vec u, Vec s) { return _mm256_maddubs_epi16(u, s); }
inline Vec add16(Vec a, Vec b) { return _mm256_add_epi16(a, b); }
inline Vec add32(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
inline void store(void* p, Vec v) { _mm256_storeu_si256((Vec*)p, v); }
#endif

constexpr int64_t NR = LANES * VECTORS;
constexpr int64_t STEP = 8;           // K is padded to this, and blocks of K are multiples of it
constexpr int64_t DEPTH_BLOCK = 2304; // K per block of X: 16 channels of it stay in a first-level cache or near it
constexpr int64_t BLOCK_BYTES = 192 * 1024;

int64_t up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Pairs {
  static constexpr int ROWS = ROWS_PAIRS;
  static constexpr int64_t GROUP = 2;  // values of K in one 32-bit lane
  using Element = int16_t;             // of a packed X
  static Element convert(int8_t x) { return x; }

  template <int M>
  static void multiply(const Element* x, const int8_t* w, const uint8_t*, int64_t depth, Vec (&acc)[M][VECTORS]) {
    for (int64_t k = 0; k < depth; k += GROUP, x += M * GROUP, w += NR * GROUP) {
      Vec weights[VECTORS];
      for (int v = 0; v < VECTORS; ++v) weights[v] = widen(w + v * LANES * GROUP);
      for (int m = 0; m < M; ++m) {
        int32_t pair;
        std::memcpy(&pair, x + m * GROUP, sizeof pair);
        const Vec xs = all(pair);
        for (int v = 0; v < VECTORS; ++v) acc[m][v] = add32(acc[m][v], multiply16(xs, weights[v]));
      }
    }
  }
};

struct Quads {
  static constexpr int ROWS = ROWS_QUADS;
  static constexpr int64_t GROUP = 4;
  using Element = uint8_t;
  static Element convert(int8_t x) { return Element(x + 64); }

  // Two groups of K at a time; `flags` has one byte for each such step.
  template <int M>
  static void multiply(const Element* x, const int8_t* w, const uint8_t* flags, int64_t depth,
                       Vec (&acc)[M][VECTORS]) {
    const Vec ones = ones16();
    for (int64_t k = 0; k < depth; k += 2 * GROUP, x += 2 * M * GROUP, w += 2 * NR * GROUP) {
      const bool apart = *flags++;
      for (int m = 0; m < M; ++m) {
        int32_t first, second;
        std::memcpy(&first, x + m * GROUP, sizeof first);
        std::memcpy(&second, x + (M + m) * GROUP, sizeof second);
        const Vec x0 = all(first), x1 = all(second);
        for (int v = 0; v < VECTORS; ++v) {
          const Vec low = multiply8(x0, load(w + v * LANES * GROUP));
          const Vec high = multiply8(x1, load(w + (NR + v * LANES) * GROUP));
          if (__builtin_expect(apart, 0)) {
            acc[m][v] = add32(acc[m][v], add32(multiply16(low, ones), multiply16(high, ones)));
          } else {
            acc[m][v] = add32(acc[m][v], multiply16(add16(low, high), ones));
          }
        }
      }
    }
  }
};

// Where the parts of a packed weight lie.
template <class Kind>
struct Packed {
  int64_t width, depth, panels, padded;
  const int8_t* values;
  const uint8_t* flags = nullptr;
  const int32_t* sums = nullptr;

  Packed(const uint8_t* base, int64_t width, int64_t depth)
      : width(width), depth(depth), panels(up(width, NR) / NR), padded(up(depth, STEP)), values((const int8_t*)base) {
    if (Kind::GROUP == 4) {
      sums = (const int32_t*)(base + panels * NR * padded);
      flags = (const uint8_t*)(sums + panels * NR);
    }
  }
  int64_t bytes() const {
    return panels * NR * padded + (Kind::GROUP == 4 ? panels * NR * 4 + panels * padded / STEP : 0);
  }
  int64_t at(int64_t n, int64_t k) const {
    constexpr int64_t G = Kind::GROUP;
    return ((n / NR * (padded / G) + k / G) * NR + n % NR) * G + k % G;
  }
};

// Whether |sum of four products| stays in int16 for every X + 64 in [1, 127].
bool proves_nothing(const int8_t* four_of_k) {
  for (int half = 0; half < 2; ++half) {  // the int16 lanes: k 0, 1, 4, 5 and k 2, 3, 6, 7
    int positive = 0, negative = 0;
    for (int k : {2 * half, 2 * half + 1, 2 * half + 4, 2 * half + 5}) {
      (four_of_k[k] > 0 ? positive : negative) += four_of_k[k];
    }
    if (127 * positive > 32767 || 127 * negative < -32768) return true;
  }
  return false;
}

template <class Kind>
void pack(const int8_t* w, int64_t width, int64_t depth, uint8_t* out) {
  const Packed<Kind> to(out, width, depth);
  std::memset(out, 0, to.bytes());
#pragma omp parallel for
  for (int64_t panel = 0; panel < to.panels; ++panel) {
    for (int64_t n = panel * NR; n < std::min(width, (panel + 1) * NR); ++n) {
      int32_t sum = 0;
      for (int64_t k = 0; k < depth; ++k) {
        out[to.at(n, k)] = uint8_t(w[n * depth + k]);
        sum += w[n * depth + k];
      }
      if (Kind::GROUP != 4) continue;
      const_cast<int32_t*>(to.sums)[n] = sum;
      for (int64_t k = 0; k < depth; k += STEP) {
        int8_t eight[STEP] = {};
        std::memcpy(eight, w + n * depth + k, std::min(STEP, depth - k));
        const_cast<uint8_t*>(to.flags)[panel * (to.padded / STEP) + k / STEP] |= proves_nothing(eight);
      }
    }
  }
}

template <class Kind>
void unpack(const uint8_t* packed, int64_t width, int64_t depth, int8_t* out) {
  const Packed<Kind> from(packed, width, depth);
#pragma omp parallel for
  for (int64_t n = 0; n < width; ++n) {
    for (int64_t k = 0; k < depth; ++k) out[n * depth + k] = from.values[from.at(n, k)];
  }
}

// X[0:rows, 0:depth] -> [K / GROUP][M][GROUP]; `depth` is padded with what the weight's zeros make nothing of.
template <class Kind>
void pack_rows(const int8_t* x, int64_t stride, int rows, int64_t depth, int64_t padded, typename Kind::Element* out) {
  constexpr int64_t G = Kind::GROUP;
  for (int m = 0; m < rows; ++m) {
    const int8_t* row = x + m * stride;
    typename Kind::Element* to = out + m * G;
    int64_t k = 0;
    for (; k + G <= depth; k += G, to += rows * G) {
      for (int64_t i = 0; i < G; ++i) to[i] = Kind::convert(row[k + i]);
    }
    for (; k < padded; k += G, to += rows * G) {
      for (int64_t i = 0; i < G; ++i) to[i] = k + i < depth ? Kind::convert(row[k + i]) : 0;
    }
  }
}

struct Block {  // of K: [start, start + depth) of the padded K
  int64_t start, depth;
  bool first, last;
};

// What follows the sums; without scales they are the result.
struct Epilogue {
  const float *x_scale, *w_scale, *bias;
};

// One tile of M x NR results. Between blocks of K they are kept as int32 where the fp32 result will be.
template <class Kind, int M>
void tile(const typename Kind::Element* x, const Packed<Kind>& w, int64_t panel, Block block, float* out,
          int64_t out_stride, Epilogue epilogue) {
  Vec acc[M][VECTORS];
  const int64_t columns = std::min<int64_t>(NR, w.width - panel * NR);
  const int64_t from = panel * NR * w.padded + block.start * NR;
  const uint8_t* flags = w.flags ? w.flags + (panel * w.padded + block.start) / STEP : nullptr;
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < VECTORS; ++v) acc[m][v] = zero();
  Kind::template multiply<M>(x, w.values + from, flags, block.depth, acc);
  for (int m = 0; m < M; ++m) {
    alignas(64) int32_t sums[NR];
    float* row = out + m * out_stride + panel * NR;
    for (int v = 0; v < VECTORS; ++v) store(sums + v * LANES, acc[m][v]);
    if (!block.first) {
      int32_t before[NR];
      std::memcpy(before, row, columns * 4);
      for (int64_t n = 0; n < columns; ++n) sums[n] += before[n];
    }
    if (!block.last) {
      std::memcpy(row, sums, columns * 4);
      continue;
    }
    if (w.sums) {
      for (int64_t n = 0; n < columns; ++n) sums[n] -= 64 * w.sums[panel * NR + n];
    }
    if (!epilogue.x_scale) {
      for (int64_t n = 0; n < columns; ++n) row[n] = float(sums[n]);
      continue;
    }
    const float scale = epilogue.x_scale[m];
    const float* widths = epilogue.w_scale + panel * NR;
    for (int64_t n = 0; n < columns; ++n) row[n] = float(sums[n]) * scale * widths[n];
    if (epilogue.bias) {
      for (int64_t n = 0; n < columns; ++n) row[n] += epilogue.bias[panel * NR + n];
    }
  }
}

template <class Kind, int M>
void tile_of(int rows, const typename Kind::Element* x, const Packed<Kind>& w, int64_t panel, Block block, float* out,
             int64_t out_stride, Epilogue epilogue) {
  if (rows == M) return tile<Kind, M>(x, w, panel, block, out, out_stride, epilogue);
  if constexpr (M > 1) tile_of<Kind, M - 1>(rows, x, w, panel, block, out, out_stride, epilogue);
}

struct Range {
  int64_t begin, end;
};

Range share(int64_t total, int64_t part, int64_t parts) { return {total * part / parts, total * (part + 1) / parts}; }

template <class Kind>
void multiply_share(const int8_t* x, const Packed<Kind>& w, float* out, Range rows, Range panels,
                    typename Kind::Element* buffer, int64_t block_rows, Epilogue epilogue) {
  constexpr int ROWS = Kind::ROWS;
  for (int64_t k = 0; k < w.padded; k += DEPTH_BLOCK) {
    const int64_t depth = std::min(DEPTH_BLOCK, w.padded - k);
    const Block block{k, depth, k == 0, k + depth == w.padded};
    for (int64_t m = rows.begin; m < rows.end; m += block_rows) {
      const int64_t end = std::min(rows.end, m + block_rows);
      for (int64_t i = m; i < end; i += ROWS) {
        const int count = int(std::min<int64_t>(ROWS, end - i));
        pack_rows<Kind>(x + i * w.depth + k, w.depth, count, std::min(depth, w.depth - k), depth,
                        buffer + (i - m) * depth);
      }
      for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
        for (int64_t i = m; i < end; i += ROWS) {
          const int count = int(std::min<int64_t>(ROWS, end - i));
          const Epilogue here{epilogue.x_scale ? epilogue.x_scale + i : nullptr, epilogue.w_scale, epilogue.bias};
          tile_of<Kind, ROWS>(count, buffer + (i - m) * depth, w, panel, block, out + i * w.width, w.width, here);
        }
      }
    }
  }
}

template <class Kind>
int multiply(const int8_t* x, const uint8_t* packed, float* out, int64_t rows, int64_t width, int64_t depth,
             int threads, Epilogue epilogue) {
  using Element = typename Kind::Element;
  const Packed<Kind> w(packed, width, depth);
  const int64_t down = std::min<int64_t>(threads, std::max<int64_t>(1, rows / (4 * Kind::ROWS)));
  const int64_t across = std::min<int64_t>(threads / down, w.panels);
  const int64_t block_depth = std::min(DEPTH_BLOCK, w.padded);
  const int64_t fit = BLOCK_BYTES / (block_depth * int64_t(sizeof(Element)));
  const int64_t block_rows = std::max<int64_t>(Kind::ROWS, fit / Kind::ROWS * Kind::ROWS);
  const int64_t bytes = up(block_rows * block_depth * int64_t(sizeof(Element)), 64);
  uint8_t* buffers = (uint8_t*)std::aligned_alloc(64, bytes * down * across);
  if (!buffers) return 1;
#pragma omp parallel for num_threads(int(down * across)) schedule(static, 1)
  for (int64_t part = 0; part < down * across; ++part) {
    multiply_share<Kind>(x, w, out, share(rows, part / across, down), share(w.panels, part % across, across),
                         (Element*)(buffers + part * bytes), block_rows, epilogue);
  }
  std::free(buffers);
  return 0;
}

}  // namespace

extern "C" {

int64_t viditq_packed_bytes(int bits, int64_t width, int64_t depth) {
  return bits == 7 ? Packed<Quads>(nullptr, width, depth).bytes() : Packed<Pairs>(nullptr, width, depth).bytes();
}

void viditq_pack(int bits, const int8_t* w, int64_t width, int64_t depth, uint8_t* out) {
  bits == 7 ? pack<Quads>(w, width, depth, out) : pack<Pairs>(w, width, depth, out);
}

void viditq_unpack(int bits, const uint8_t* packed, int64_t width, int64_t depth, int8_t* out) {
  bits == 7 ? unpack<Quads>(packed, width, depth, out) : unpack<Pairs>(packed, width, depth, out);
}

// 0, or 1 where there is no memory for the blocks of X. Scales may be null (both), and so may the bias.
int viditq_multiply(int bits, const int8_t* x, const uint8_t* packed, float* out, int64_t rows, int64_t width,
                    int64_t depth, int threads, const float* x_scale, const float* w_scale, const float* bias) {
  const Epilogue epilogue{x_scale, w_scale, bias};
  return bits == 7 ? multiply<Quads>(x, packed, out, rows, width, depth, threads, epilogue)
                   : multiply<Pairs>(x, packed, out, rows, width, depth, threads, epilogue);
}
}
