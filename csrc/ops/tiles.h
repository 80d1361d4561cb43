// Small matrix products for attention tiles, all in cache, in the arithmetic type.
#pragma once

#include "common.h"

namespace opencoder {

constexpr int64_t kRows = 4;  // rows of a register block; buffers have a multiple of it

#if defined(__GNUC__)
// 64 bytes at a time; the compiler splits them where registers are narrower.
template <typename Real>
struct Lanes;
template <>
struct Lanes<float> {
    typedef float V __attribute__((vector_size(64), aligned(4), may_alias));
    static constexpr int64_t n = 16;
};
template <>
struct Lanes<double> {
    typedef double V __attribute__((vector_size(64), aligned(8), may_alias));
    static constexpr int64_t n = 8;
};

// c (4, N·lanes) += a (4, k) · b (k, N·lanes); element (i, l) of a lies at a[i · row_stride + l · step].
template <typename Real, int N>
INLINE void block(Real* c, int64_t ldc, const Real* a, int64_t row_stride, int64_t step, const Real* b, int64_t ldb,
                  int64_t k) {
    using V = typename Lanes<Real>::V;
    constexpr int64_t lanes = Lanes<Real>::n;
    V sum[kRows][N];
#pragma GCC unroll 4
    for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) sum[i][j] = *reinterpret_cast<const V*>(c + i * ldc + j * lanes);
    for (int64_t l = 0; l < k; ++l) {
        V row[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) row[j] = *reinterpret_cast<const V*>(b + l * ldb + j * lanes);
#pragma GCC unroll 4
        for (int64_t i = 0; i < kRows; ++i) {
            const Real x = a[i * row_stride + l * step];
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j) sum[i][j] += x * row[j];
        }
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < kRows; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) *reinterpret_cast<V*>(c + i * ldc + j * lanes) = sum[i][j];
}

template <typename Real>
constexpr int64_t kLanes = Lanes<Real>::n;
#else
template <typename Real>
constexpr int64_t kLanes = 1;
#endif

// c (m, n) += a (m, k) · b (k, n), m a multiple of kRows, n of kLanes; a is read as in `block`.
template <typename Real>
INLINE void multiply_add(Real* c, int64_t ldc, const Real* a, int64_t row_stride, int64_t step, const Real* b,
                         int64_t ldb, int64_t m, int64_t n, int64_t k) {
#if defined(__GNUC__)
    constexpr int64_t lanes = Lanes<Real>::n;
    int64_t j = 0;
    for (; j + 4 * lanes <= n; j += 4 * lanes)
        for (int64_t i = 0; i < m; i += kRows)
            block<Real, 4>(c + i * ldc + j, ldc, a + i * row_stride, row_stride, step, b + j, ldb, k);
    for (; j + 2 * lanes <= n; j += 2 * lanes)
        for (int64_t i = 0; i < m; i += kRows)
            block<Real, 2>(c + i * ldc + j, ldc, a + i * row_stride, row_stride, step, b + j, ldb, k);
    for (; j < n; j += lanes)
        for (int64_t i = 0; i < m; i += kRows)
            block<Real, 1>(c + i * ldc + j, ldc, a + i * row_stride, row_stride, step, b + j, ldb, k);
#else
    for (int64_t i = 0; i < m; ++i)
        for (int64_t l = 0; l < k; ++l)
            for (int64_t j = 0; j < n; ++j) c[i * ldc + j] += a[i * row_stride + l * step] * b[l * ldb + j];
#endif
}

inline int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace opencoder
