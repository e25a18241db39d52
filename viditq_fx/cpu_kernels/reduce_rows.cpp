// What calibration keeps of rows [M, K], in one read of them: seven reductions by torch read a row from memory once
// and from the cache six times.
//
//     low[k] = min(low[k], x[m, k])     total[k]  += x[m, k]      over all m, in place
//     high[k] = max(high[k], x[m, k])   square[k] += x[m, k]^2
//     amax[m] = max over k of |x[m, k]|
//
// Sums are fp32 over ROWS rows and fp64 beyond. A NaN is in total and in square, and in no low or high.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

namespace {

constexpr int64_t ROWS = 128;

struct Sums {
    std::vector<float> low, high, total, square;
    std::vector<double> all_total, all_square;
    explicit Sums(int64_t depth)
        : low(depth, std::numeric_limits<float>::infinity()),
          high(depth, -std::numeric_limits<float>::infinity()),
          total(depth), square(depth), all_total(depth), all_square(depth) {}
};

void reduce(const float* __restrict x, int64_t rows, int64_t depth, int64_t stride, Sums& into, float* amax) {
    float* __restrict low = into.low.data();
    float* __restrict high = into.high.data();
    float* __restrict total = into.total.data();
    float* __restrict square = into.square.data();
    for (int64_t first = 0; first < rows; first += ROWS) {
        std::fill_n(total, depth, 0.0f);
        std::fill_n(square, depth, 0.0f);
        for (int64_t m = first; m < std::min(first + ROWS, rows); ++m) {
            const float* __restrict row = x + m * stride;
            int32_t largest = 0;  // bits of |x|: they are ordered as the numbers are, and a NaN is above all
#pragma omp simd reduction(max : largest)
            for (int64_t k = 0; k < depth; ++k) {
                const float v = row[k];
                low[k] = v < low[k] ? v : low[k];
                high[k] = v > high[k] ? v : high[k];
                total[k] += v;
                square[k] += v * v;
                int32_t bits;
                std::memcpy(&bits, &v, sizeof bits);
                bits &= 0x7fffffff;
                largest = bits > largest ? bits : largest;
            }
            std::memcpy(amax + m, &largest, sizeof largest);
        }
        for (int64_t k = 0; k < depth; ++k) into.all_total[k] += total[k];
        for (int64_t k = 0; k < depth; ++k) into.all_square[k] += square[k];
    }
}

}  // namespace

// Rows are `stride` floats apart. 0, or 1 where there is no memory for a thread's sums: nothing is counted then.
extern "C" int viditq_reduce_rows(const float* x, int64_t rows, int64_t depth, int64_t stride, float* low, float* high,
                                  double* total, double* square, float* amax, int threads) {
    const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, rows / ROWS));
    std::vector<Sums> sums;
    try {
        sums.reserve(parts);
        for (int64_t part = 0; part < parts; ++part) sums.emplace_back(depth);
    } catch (const std::bad_alloc&) {
        return 1;
    }
#pragma omp parallel for num_threads(parts) schedule(static)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = rows * part / parts, last = rows * (part + 1) / parts;
        reduce(x + first * stride, last - first, depth, stride, sums[part], amax + first);
    }
    for (const Sums& each : sums) {  // in order: the same sums each time
        for (int64_t k = 0; k < depth; ++k) {
            low[k] = std::min(low[k], each.low[k]);
            high[k] = std::max(high[k], each.high[k]);
            total[k] += each.all_total[k];
            square[k] += each.all_square[k];
        }
    }
    return 0;
}
