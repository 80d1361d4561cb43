// What the CPU operators share: instruction-set clones, storage types, an exp that vectorises, and grain sizes.
//
// Written against torch's stable ABI only: one binary serves every torch from the version in setup.py on. Arithmetic is
// fp32 for fp32 and 16-bit storage, fp64 for fp64, with one rounding on store.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#if defined(__SSE2__)
#include <emmintrin.h>
#include <unistd.h>
#endif

// One function body, compiled for three instruction sets and chosen when the library is loaded. Templates cannot be
// cloned, so the loops are INLINE templates and the cloned functions, one per storage type, only call them.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))
#define SIMD _Pragma("omp simd")

namespace opencoder {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainBytes = 1 << 16;  // below this much work per thread, starting one costs more than it saves

// Work items of `bytes` each that one thread takes at least.
inline int64_t grain(int64_t bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, bytes)); }

inline ScalarType statistics_type(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// exp in fp32: powers of two taken out, then a polynomial fitted to e^r on ±ln(2)/2 with p(0) = 1 (relative error 9e-8,
// 2e-7 with rounding); vectorises without -ffast-math. Below −87.7 the result is 0 (it would be subnormal), above 88.3 it
// is infinite; NaN stays NaN. Both come out of the exponent bits without a branch: 2^−127 is written as 0 and 2^128 as
// infinity. The order of the operands of the comparisons is that of the machine's max and min, which pass a NaN on.
INLINE float exp_of_remainder(float r) {
    float p = 8.2901438e-3f;
    p = p * r + 4.1898853e-2f;
    p = p * r + 1.6667644e-1f;
    p = p * r + 4.9999143e-1f;
    p = p * r + 9.9999970e-1f;
    return p * r + 1.0f;
}
INLINE float fast_exp(float x) {
    const float raised = -88.02f > x ? -88.02f : x;
    const float clamped = 89.0f < raised ? 89.0f : raised;
    // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits, here with the exponent's bias already added.
    constexpr float kRound = 12582912.0f + 127.0f;
    const float shifted = clamped * 1.44269504088896341f + kRound;
    const float n = shifted - kRound;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
    return exp_of_remainder(r) * std::bit_cast<float>(std::bit_cast<int32_t>(shifted) << 23);
}
INLINE double fast_exp(double x) { return std::exp(x); }

// The same for x at most a rounding error above 0, as after subtracting a maximum: one comparison fewer.
INLINE float fast_exp_nonpositive(float x) {
    const float clamped = -88.02f > x ? -88.02f : x;
    constexpr float kRound = 12582912.0f + 127.0f;
    const float shifted = clamped * 1.44269504088896341f + kRound;
    const float n = shifted - kRound;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    return exp_of_remainder(r) * std::bit_cast<float>(std::bit_cast<int32_t>(shifted) << 23);
}
INLINE double fast_exp_nonpositive(double x) { return std::exp(x); }

// tanh through exp; absolute error of an ulp of 1.
template <typename Real>
INLINE Real fast_tanh(Real x) {
    if constexpr (std::is_same_v<Real, double>) return std::tanh(x);
    else return Real(1) - Real(2) / (fast_exp(Real(2) * x) + Real(1));
}

// Asks for the lines of a row that is about to be written while its inputs are still being read, so that the first store
// does not wait for them. `pays` tells where that was measured to gain (8 to 20 % in the RMSNorm backward): rows that stay in
// the first-level cache with their inputs, tensors that the last level holds; beyond, it is in the way of the reading.
struct WriteAhead {
    bool pays;
    WriteAhead(int64_t touched, int64_t row_bytes) : pays(touched <= int64_t{128} << 20 && row_bytes <= 9216) {}
    template <typename T>
    INLINE void operator()(T* row, int64_t n) const {
#if defined(__GNUC__)
        if (pays)
            for (int64_t i = 0; i < n; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, 1, 3);
#endif
    }
};

// Storage to arithmetic type and back. bf16 by shifts, which vectorise everywhere; the rounding is to nearest even.
INLINE float widen(float x) { return x; }
INLINE double widen(double x) { return x; }
INLINE float widen(Half x) { return static_cast<float>(x); }
INLINE float widen(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }

template <typename T, typename Real>
INLINE T narrow(Real x) {
    if constexpr (std::is_same_v<T, BFloat16>) {
        const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(x));
        const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
        const uint32_t quiet = (bits >> 16) | 0x40u;
        BFloat16 y;
        y.x = static_cast<uint16_t>(x != x ? quiet : rounded);
        return y;
    } else {
        return static_cast<T>(x);
    }
}

// A row in the arithmetic type: the storage itself if it is of that type, otherwise a converted copy in `scratch`.
template <typename Real, typename T>
INLINE const Real* load(const T* row, Real* scratch, int64_t n) {
    if constexpr (std::is_same_v<Real, T>) {
        return row;
    } else {
        SIMD for (int64_t i = 0; i < n; ++i) scratch[i] = widen(row[i]);
        return scratch;
    }
}
// Where to compute a row that goes to `row`, and the step that puts it there. With `stream` the row passes the cache by
// (`streams` says when that pays); other storage types are converted on the way.
template <typename Real, typename T>
INLINE Real* destination(T* row, Real* scratch, bool stream) {
    if constexpr (std::is_same_v<Real, T>) return stream ? scratch : row;
    else return scratch;
}
template <typename Real, typename T>
INLINE void store(const Real* values, T* row, int64_t n, bool stream) {
    if constexpr (!std::is_same_v<Real, T>) {
        SIMD for (int64_t i = 0; i < n; ++i) row[i] = narrow<T>(values[i]);
    } else if (stream) {
#if defined(__SSE2__)
        constexpr int64_t kStep = 16 / sizeof(Real);
        int64_t i = 0;
        for (; i + kStep <= n; i += kStep)
            _mm_stream_si128(reinterpret_cast<__m128i*>(row + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + i)));
        for (; i < n; ++i) row[i] = values[i];
#endif
    }
}

// Whether outputs of `written` bytes, in an operator that touches `touched`, should pass the cache by: they would not be
// in it when the next operator comes, and an ordinary store first reads the line it is to overwrite. Each row must start
// at a multiple of 16 bytes.
inline bool streams(int64_t touched, std::initializer_list<const void*> outputs, int64_t row_bytes) {
#if defined(__SSE2__)
    static const int64_t cache = [] {
        const int64_t found = sysconf(_SC_LEVEL3_CACHE_SIZE);
        return found > 0 ? found : int64_t{32} << 20;
    }();
    if (touched <= cache || row_bytes % 16) return false;
    return std::all_of(outputs.begin(), outputs.end(),
                       [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
#else
    return false;
#endif
}

template <typename T>
using RealOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
const T* data(const Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data(Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace opencoder

// Runs the body with T the storage type of `x`.
#define DISPATCH(operator_name, x, ...)                                                              \
    switch ((x).scalar_type()) {                                                                     \
        case ScalarType::Float: { using T = float; __VA_ARGS__; break; }                             \
        case ScalarType::Double: { using T = double; __VA_ARGS__; break; }                           \
        case ScalarType::BFloat16: { using T = BFloat16; __VA_ARGS__; break; }                       \
        case ScalarType::Half: { using T = Half; __VA_ARGS__; break; }                               \
        default: STD_TORCH_CHECK(false, operator_name ": tensors must be fp64, fp32, bf16 or fp16"); \
    }

// `function`_cloned(arguments, begin, end): the template `function<T>`, for each storage type, cloned per instruction set.
#define CLONED_RANGE(function, Arguments)                                                                              \
    CLONES void function##_f32(const Arguments<float>& a, int64_t begin, int64_t end) { function(a, begin, end); }     \
    CLONES void function##_f64(const Arguments<double>& a, int64_t begin, int64_t end) { function(a, begin, end); }    \
    CLONES void function##_bf16(const Arguments<BFloat16>& a, int64_t begin, int64_t end) { function(a, begin, end); } \
    CLONES void function##_f16(const Arguments<Half>& a, int64_t begin, int64_t end) { function(a, begin, end); }      \
    inline void function##_cloned(const Arguments<float>& a, int64_t b, int64_t e) { function##_f32(a, b, e); }        \
    inline void function##_cloned(const Arguments<double>& a, int64_t b, int64_t e) { function##_f64(a, b, e); }       \
    inline void function##_cloned(const Arguments<BFloat16>& a, int64_t b, int64_t e) { function##_bf16(a, b, e); }    \
    inline void function##_cloned(const Arguments<Half>& a, int64_t b, int64_t e) { function##_f16(a, b, e); }

// Runs `function`_cloned over [0, total) on torch's threads.
#define PARALLEL(function, arguments, total, item_bytes)                                       \
    torch::stable::parallel_for(0, total, grain(item_bytes), [&](int64_t begin, int64_t end) { \
        function##_cloned(arguments, begin, end);                                              \
    })
