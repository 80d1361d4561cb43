// RMSNorm on the CPU, forward and backward, with the residual addition fused in.
//
//   total = x + residual;  rstd = 1 / sqrt(mean(total²) + eps);  y = total · rstd · weight
//
// Memory traffic is the point: eager torch passes over the rows six or seven times, this reads each input and writes
// each output once. Arithmetic is fp32 for fp32 and 16-bit storage, fp64 for fp64; one rounding on store. The weight
// may have another type than x (fp32 weight beside bf16 activations).
//
// Written against torch's stable ABI only: one binary serves every torch from the version in setup.py on.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

// One function body, compiled for three instruction sets and chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainBytes = 1 << 16;  // below this much work per thread, starting one costs more than it saves
constexpr int64_t kParts = 16;            // dW is summed in this many fixed parts, whatever the number of threads

// The loops, once per arithmetic type (templates cannot be cloned for several targets).
#define DEFINE_ROWS(REAL, SUFFIX)                                                                              \
    CLONES REAL add_and_square_##SUFFIX(const REAL* x, const REAL* r, REAL* total, int64_t n) {                \
        REAL sum = 0;                                                                                          \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; ++i) {                               \
            const REAL t = x[i] + r[i];                                                                        \
            total[i] = t;                                                                                      \
            sum += t * t;                                                                                      \
        }                                                                                                      \
        return sum;                                                                                            \
    }                                                                                                          \
    CLONES REAL square_##SUFFIX(const REAL* x, int64_t n) {                                                    \
        REAL sum = 0;                                                                                          \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];             \
        return sum;                                                                                            \
    }                                                                                                          \
    CLONES void scale_##SUFFIX(const REAL* x, const REAL* w, REAL rstd, REAL* y, int64_t n) {                  \
        _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) y[i] = x[i] * rstd * w[i];                         \
    }                                                                                                          \
    CLONES REAL weighted_dot_##SUFFIX(const REAL* dy, const REAL* w, const REAL* x, int64_t n) {               \
        REAL sum = 0;                                                                                          \
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; ++i) sum += dy[i] * w[i] * x[i];     \
        return sum;                                                                                            \
    }                                                                                                          \
    CLONES void backward_##SUFFIX(const REAL* dy, const REAL* w, const REAL* x, const REAL* dtotal, REAL rstd, \
                                  REAL c, REAL* dx, REAL* dw, int64_t n) {                                     \
        if (dtotal) {                                                                                          \
            _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) {                                              \
                dw[i] += dy[i] * x[i] * rstd;                                                                  \
                dx[i] = dtotal[i] + rstd * dy[i] * w[i] - x[i] * c;                                            \
            }                                                                                                  \
        } else {                                                                                               \
            _Pragma("omp simd") for (int64_t i = 0; i < n; ++i) {                                              \
                dw[i] += dy[i] * x[i] * rstd;                                                                  \
                dx[i] = rstd * dy[i] * w[i] - x[i] * c;                                                        \
            }                                                                                                  \
        }                                                                                                      \
    }

DEFINE_ROWS(float, f32)
DEFINE_ROWS(double, f64)

// A row as Real: the storage itself if it is of that type, otherwise a converted copy in `scratch`.
template <typename Real, typename T>
const Real* load(const T* row, Real* scratch, int64_t n) {
    if constexpr (std::is_same_v<Real, T>) {
        return row;
    } else {
        for (int64_t i = 0; i < n; ++i) scratch[i] = static_cast<Real>(row[i]);
        return scratch;
    }
}
template <typename Real, typename T>
Real* target(T* row, Real* scratch) {
    if constexpr (std::is_same_v<Real, T>) return row;
    else return scratch;
}
template <typename Real, typename T>
void store(const Real* values, T* row, int64_t n) {
    if constexpr (!std::is_same_v<Real, T>)
        for (int64_t i = 0; i < n; ++i) row[i] = static_cast<T>(values[i]);
}

// The cloned functions are ifuncs, so they are reached through ordinary calls rather than constant pointers.
template <typename Real>
struct Kernel {
    static Real add_and_square(const Real* x, const Real* r, Real* t, int64_t n) {
        if constexpr (std::is_same_v<Real, float>) return add_and_square_f32(x, r, t, n);
        else return add_and_square_f64(x, r, t, n);
    }
    static Real square(const Real* x, int64_t n) {
        if constexpr (std::is_same_v<Real, float>) return square_f32(x, n);
        else return square_f64(x, n);
    }
    static void scale(const Real* x, const Real* w, Real rstd, Real* y, int64_t n) {
        if constexpr (std::is_same_v<Real, float>) scale_f32(x, w, rstd, y, n);
        else scale_f64(x, w, rstd, y, n);
    }
    static Real weighted_dot(const Real* dy, const Real* w, const Real* x, int64_t n) {
        if constexpr (std::is_same_v<Real, float>) return weighted_dot_f32(dy, w, x, n);
        else return weighted_dot_f64(dy, w, x, n);
    }
    static void backward(const Real* dy, const Real* w, const Real* x, const Real* dt, Real rstd, Real c, Real* dx,
                         Real* dw, int64_t n) {
        if constexpr (std::is_same_v<Real, float>) backward_f32(dy, w, x, dt, rstd, c, dx, dw, n);
        else backward_f64(dy, w, x, dt, rstd, c, dx, dw, n);
    }
};

template <typename Real>
std::vector<Real> weight_as(const Tensor& weight) {
    const int64_t n = weight.numel();
    std::vector<Real> out(n);
    const void* p = weight.const_data_ptr();
    const auto fill = [&](const auto* w) { for (int64_t i = 0; i < n; ++i) out[i] = static_cast<Real>(w[i]); };
    switch (weight.scalar_type()) {
        case ScalarType::Double: fill(static_cast<const double*>(p)); break;
        case ScalarType::Float: fill(static_cast<const float*>(p)); break;
        case ScalarType::BFloat16: fill(static_cast<const torch::headeronly::BFloat16*>(p)); break;
        case ScalarType::Half: fill(static_cast<const torch::headeronly::Half*>(p)); break;
        default: STD_TORCH_CHECK(false, "rms_norm: weight must be a floating-point tensor");
    }
    return out;
}

int64_t rows_of(const Tensor& x, const Tensor& weight) {
    STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1, "rms_norm: x must have at least one dim and weight exactly one, got ",
                    x.dim(), " and ", weight.dim());
    STD_TORCH_CHECK(x.size(x.dim() - 1) == weight.size(0), "rms_norm: weight has ", weight.size(0),
                    " values, the rows of x have ", x.size(x.dim() - 1));
    return weight.size(0) ? x.numel() / weight.size(0) : 0;
}

int64_t grain(int64_t n, int64_t bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, n * bytes)); }

template <typename T, typename Real>
void forward_rows(const Tensor& x, const Tensor* residual, const std::vector<Real>& w, double eps, Tensor& y,
                  Tensor* total, Tensor& rstd, int64_t rows) {
    const int64_t n = static_cast<int64_t>(w.size());
    const T* xp = static_cast<const T*>(x.const_data_ptr());
    const T* rp = residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr;
    T* yp = static_cast<T*>(y.mutable_data_ptr());
    T* tp = total ? static_cast<T*>(total->mutable_data_ptr()) : nullptr;
    Real* sp = static_cast<Real*>(rstd.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, grain(n, sizeof(T)), [&](int64_t begin, int64_t end) {
        std::vector<Real> a(n), b(n), c(n);
        for (int64_t row = begin; row < end; ++row) {
            const Real* v = load<Real>(xp + row * n, a.data(), n);
            Real sum;
            if (rp) {
                const Real* r = load<Real>(rp + row * n, b.data(), n);
                Real* t = target<Real>(tp + row * n, c.data());
                sum = Kernel<Real>::add_and_square(v, r, t, n);
                store(t, tp + row * n, n);
                v = t;  // the unrounded sum feeds the norm
            } else {
                sum = Kernel<Real>::square(v, n);
            }
            const Real scale = Real(1) / std::sqrt(sum / Real(n) + Real(eps));
            sp[row] = scale;
            Real* out = target<Real>(yp + row * n, a.data());
            Kernel<Real>::scale(v, w.data(), scale, out, n);
            store(out, yp + row * n, n);
        }
    });
}

template <typename T, typename Real>
void backward_rows(const Tensor& dy, const Tensor* dtotal, const Tensor& x, const std::vector<Real>& w,
                   const Tensor& rstd, Tensor& dx, Real* dw, int64_t rows) {
    const int64_t n = static_cast<int64_t>(w.size());
    const T* gp = static_cast<const T*>(dy.const_data_ptr());
    const T* xp = static_cast<const T*>(x.const_data_ptr());
    const T* tp = dtotal ? static_cast<const T*>(dtotal->const_data_ptr()) : nullptr;
    const Real* sp = static_cast<const Real*>(rstd.const_data_ptr());
    T* dp = static_cast<T*>(dx.mutable_data_ptr());
    std::vector<Real> parts(kParts * n, Real(0));
    // Fixed parts instead of one per thread: the same bits come out for any number of threads.
    torch::stable::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
        std::vector<Real> a(n), b(n), c(n), d(n);
        for (int64_t part = begin; part < end; ++part)
            for (int64_t row = rows * part / kParts; row < rows * (part + 1) / kParts; ++row) {
                const Real* g = load<Real>(gp + row * n, a.data(), n);
                const Real* v = load<Real>(xp + row * n, b.data(), n);
                const Real* t = tp ? load<Real>(tp + row * n, c.data(), n) : nullptr;
                const Real s = sp[row];
                const Real k = Kernel<Real>::weighted_dot(g, w.data(), v, n) * s * s * s / Real(n);
                Real* out = target<Real>(dp + row * n, d.data());
                Kernel<Real>::backward(g, w.data(), v, t, s, k, out, parts.data() + part * n, n);
                store(out, dp + row * n, n);
            }
    });
    for (int64_t i = 0; i < n; ++i) {
        Real sum = 0;
        for (int64_t part = 0; part < kParts; ++part) sum += parts[part * n + i];
        dw[i] = sum;
    }
}

#define DISPATCH(x, BODY)                                                                               \
    switch ((x).scalar_type()) {                                                                        \
        case ScalarType::Float: { using T = float; using Real = float; BODY; break; }                   \
        case ScalarType::Double: { using T = double; using Real = double; BODY; break; }                \
        case ScalarType::BFloat16: { using T = torch::headeronly::BFloat16; using Real = float; BODY; break; } \
        case ScalarType::Half: { using T = torch::headeronly::Half; using Real = float; BODY; break; }  \
        default: STD_TORCH_CHECK(false, "rms_norm: x must be fp64, fp32, bf16 or fp16");                \
    }

std::vector<int64_t> leading(const Tensor& x) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
    return sizes;
}

ScalarType statistics_type(const Tensor& x) {
    return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x_in, const Tensor& weight_in, double eps) {
    const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
    const int64_t rows = rows_of(x, weight);
    Tensor y = torch::stable::empty_like(x);
    const auto sizes = leading(x);
    Tensor rstd = torch::stable::new_empty(x, sizes, statistics_type(x));
    DISPATCH(x, { const auto w = weight_as<Real>(weight); (forward_rows<T, Real>(x, nullptr, w, eps, y, nullptr, rstd, rows)); })
    return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(const Tensor& x_in, const Tensor& residual_in,
                                                    const Tensor& weight_in, double eps) {
    const Tensor x = torch::stable::contiguous(x_in), residual = torch::stable::contiguous(residual_in);
    const Tensor weight = torch::stable::contiguous(weight_in);
    STD_TORCH_CHECK(residual.numel() == x.numel() && residual.scalar_type() == x.scalar_type(),
                    "rms_norm: residual must have the shape and type of x");
    const int64_t rows = rows_of(x, weight);
    Tensor y = torch::stable::empty_like(x), total = torch::stable::empty_like(x);
    const auto sizes = leading(x);
    Tensor rstd = torch::stable::new_empty(x, sizes, statistics_type(x));
    DISPATCH(x, { const auto w = weight_as<Real>(weight); (forward_rows<T, Real>(x, &residual, w, eps, y, &total, rstd, rows)); })
    return {y, total, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy_in, const std::optional<Tensor>& dtotal_in, const Tensor& x_in,
                                        const Tensor& weight_in, const Tensor& rstd_in) {
    const Tensor dy = torch::stable::contiguous(dy_in), x = torch::stable::contiguous(x_in);
    const Tensor weight = torch::stable::contiguous(weight_in), rstd = torch::stable::contiguous(rstd_in);
    STD_TORCH_CHECK(dy.numel() == x.numel() && dy.scalar_type() == x.scalar_type(),
                    "rms_norm backward: the gradient must have the shape and type of x");
    const int64_t rows = rows_of(x, weight);
    std::optional<Tensor> dtotal;
    if (dtotal_in) dtotal = torch::stable::contiguous(*dtotal_in);
    Tensor dx = torch::stable::empty_like(x);
    Tensor dw = torch::stable::new_empty(weight, {weight.size(0)}, statistics_type(x));
    DISPATCH(x, {
        const auto w = weight_as<Real>(weight);
        (backward_rows<T, Real>(dy, dtotal ? &*dtotal : nullptr, x, w, rstd, dx,
                                static_cast<Real*>(dw.mutable_data_ptr()), rows));
    })
    return {dx, dw};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(opencoder, CPU, m) {
    m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
    m.impl("add_rms_norm_fwd", TORCH_BOX(&add_rms_norm_fwd));
    m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
}
