// RMSNorm on the CPU, forward and backward, with the residual addition fused in.
//
//   total = x + residual;  rstd = 1 / sqrt(mean(total²) + eps);  y = total · rstd · weight
//
// Memory traffic is the point: eager torch passes over the rows six or seven times, this reads each input and writes
// each output once. The weight may have another type than x (fp32 weight beside bf16 activations).
#include "common.h"

namespace opencoder {
namespace {

constexpr int64_t kParts = 16;  // dW is summed in this many fixed parts, whatever the number of threads

template <typename T>
struct Forward {
    const T* x;
    const T* residual;  // may be null
    const RealOf<T>* weight;
    T* y;
    T* total;  // null without residual
    RealOf<T>* rstd;
    double eps;
    int64_t n;
    bool stream;
};

template <typename T>
INLINE void forward_rows(const Forward<T>& a, int64_t begin, int64_t end) {
    using Real = RealOf<T>;
    const int64_t n = a.n;
    std::vector<Real> scratch(4 * n);
    const Real* __restrict w = a.weight;
    for (int64_t row = begin; row < end; ++row) {
        const Real* v = load<Real>(a.x + row * n, scratch.data(), n);
        Real sum = 0;
        if (a.residual) {
            const Real* r = load<Real>(a.residual + row * n, scratch.data() + n, n);
            Real* t = destination<Real>(a.total + row * n, scratch.data() + 2 * n, a.stream);
            _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; ++i) {
                const Real s = v[i] + r[i];
                t[i] = s;
                sum += s * s;
            }
            store(static_cast<const Real*>(t), a.total + row * n, n, a.stream);
            v = t;  // the unrounded sum feeds the norm
        } else {
            _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; ++i) sum += v[i] * v[i];
        }
        const Real rstd = Real(1) / std::sqrt(sum / Real(n) + Real(a.eps));
        a.rstd[row] = rstd;
        Real* y = destination<Real>(a.y + row * n, scratch.data() + 3 * n, a.stream);
        SIMD for (int64_t i = 0; i < n; ++i) y[i] = v[i] * rstd * w[i];
        store(static_cast<const Real*>(y), a.y + row * n, n, a.stream);
    }
}
CLONED_RANGE(forward_rows, Forward)

template <typename T>
struct Backward {
    const T* dy;
    const T* dtotal;  // may be null
    const T* x;
    const RealOf<T>* weight;
    const RealOf<T>* rstd;
    T* dx;
    RealOf<T>* parts;  // (kParts, n), zero on entry
    int64_t n, rows;
    bool stream;
    WriteAhead ahead;
};

// A range of parts, not of rows: the same bits come out for any number of threads.
template <typename T>
INLINE void backward_parts(const Backward<T>& a, int64_t begin, int64_t end) {
    using Real = RealOf<T>;
    const int64_t n = a.n;
    std::vector<Real> scratch(4 * n);
    const Real* __restrict w = a.weight;
    for (int64_t part = begin; part < end; ++part) {
        Real* __restrict dw = a.parts + part * n;
        for (int64_t row = a.rows * part / kParts; row < a.rows * (part + 1) / kParts; ++row) {
            a.ahead(a.dx + row * n, n);
            const Real* g = load<Real>(a.dy + row * n, scratch.data(), n);
            const Real* x = load<Real>(a.x + row * n, scratch.data() + n, n);
            const Real rstd = a.rstd[row];
            Real dot = 0;
            _Pragma("omp simd reduction(+ : dot)") for (int64_t i = 0; i < n; ++i) dot += g[i] * w[i] * x[i];
            const Real c = dot * rstd * rstd * rstd / Real(n);
            Real* __restrict dx = destination<Real>(a.dx + row * n, scratch.data() + 3 * n, a.stream);
            if (a.dtotal) {
                const Real* t = load<Real>(a.dtotal + row * n, scratch.data() + 2 * n, n);
                SIMD for (int64_t i = 0; i < n; ++i) {
                    dw[i] += g[i] * x[i] * rstd;
                    dx[i] = t[i] + rstd * g[i] * w[i] - x[i] * c;
                }
            } else {
                SIMD for (int64_t i = 0; i < n; ++i) {
                    dw[i] += g[i] * x[i] * rstd;
                    dx[i] = rstd * g[i] * w[i] - x[i] * c;
                }
            }
            store(static_cast<const Real*>(dx), a.dx + row * n, n, a.stream);
        }
    }
}
CLONED_RANGE(backward_parts, Backward)

template <typename Real>
std::vector<Real> weight_as(const Tensor& weight) {
    std::vector<Real> out(weight.numel());
    DISPATCH("rms_norm", weight, {
        const T* w = data<T>(weight);
        for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<Real>(w[i]);
    })
    return out;
}

int64_t rows_of(const Tensor& x, const Tensor& weight) {
    STD_TORCH_CHECK(x.dim() >= 1 && weight.dim() == 1, "rms_norm: x must have at least one dim and weight exactly one, got ",
                    x.dim(), " and ", weight.dim());
    STD_TORCH_CHECK(x.size(x.dim() - 1) == weight.size(0), "rms_norm: weight has ", weight.size(0),
                    " values, the rows of x have ", x.size(x.dim() - 1));
    return weight.size(0) ? x.numel() / weight.size(0) : 0;
}

Tensor statistics_like(const Tensor& x) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
    return torch::stable::new_empty(x, sizes, statistics_type(x));
}

void forward(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, Tensor& y, Tensor* total,
             Tensor& rstd) {
    const int64_t rows = rows_of(x, weight), n = weight.size(0);
    DISPATCH("rms_norm", x, {
        const auto w = weight_as<RealOf<T>>(weight);
        T* total_out = total ? mutable_data<T>(*total) : nullptr;
        const bool stream = streams((total ? 4 : 2) * rows * n * sizeof(T), {mutable_data<T>(y), total_out}, n * sizeof(T));
        const Forward<T> a{data<T>(x), residual ? data<T>(*residual) : nullptr, w.data(), mutable_data<T>(y), total_out,
                           mutable_data<RealOf<T>>(rstd), eps, n, stream};
        PARALLEL(forward_rows, a, rows, n * sizeof(T));
    })
}

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x_in, const Tensor& weight_in, double eps) {
    const Tensor x = torch::stable::contiguous(x_in), weight = torch::stable::contiguous(weight_in);
    Tensor y = torch::stable::empty_like(x), rstd = statistics_like(x);
    forward(x, nullptr, weight, eps, y, nullptr, rstd);
    return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(const Tensor& x_in, const Tensor& residual_in,
                                                    const Tensor& weight_in, double eps) {
    const Tensor x = torch::stable::contiguous(x_in), residual = torch::stable::contiguous(residual_in);
    const Tensor weight = torch::stable::contiguous(weight_in);
    STD_TORCH_CHECK(residual.numel() == x.numel() && residual.scalar_type() == x.scalar_type(),
                    "rms_norm: residual must have the shape and type of x");
    Tensor y = torch::stable::empty_like(x), total = torch::stable::empty_like(x), rstd = statistics_like(x);
    forward(x, &residual, weight, eps, y, &total, rstd);
    return {y, total, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy_in, const std::optional<Tensor>& dtotal_in, const Tensor& x_in,
                                        const Tensor& weight_in, const Tensor& rstd_in) {
    const Tensor dy = torch::stable::contiguous(dy_in), x = torch::stable::contiguous(x_in);
    const Tensor weight = torch::stable::contiguous(weight_in), rstd = torch::stable::contiguous(rstd_in);
    STD_TORCH_CHECK(dy.numel() == x.numel() && dy.scalar_type() == x.scalar_type(),
                    "rms_norm backward: the gradient must have the shape and type of x");
    const int64_t rows = rows_of(x, weight), n = weight.size(0);
    std::optional<Tensor> dtotal;
    if (dtotal_in) dtotal = torch::stable::contiguous(*dtotal_in);
    Tensor dx = torch::stable::empty_like(x);
    Tensor dw = torch::stable::new_empty(weight, {n}, statistics_type(x));
    DISPATCH("rms_norm", x, {
        using Real = RealOf<T>;
        const auto w = weight_as<Real>(weight);
        std::vector<Real> parts(kParts * n, Real(0));
        const int64_t touched = (dtotal ? 4 : 3) * rows * n * sizeof(T), row_bytes = n * sizeof(T);
        const bool stream = streams(touched, {mutable_data<T>(dx)}, row_bytes);
        const Backward<T> a{data<T>(dy), dtotal ? data<T>(*dtotal) : nullptr, data<T>(x), w.data(), data<Real>(rstd),
                            mutable_data<T>(dx), parts.data(), n, rows, stream, {touched, row_bytes}};
        PARALLEL(backward_parts, a, kParts, (rows / kParts + 1) * n * sizeof(T));
        Real* sum = mutable_data<Real>(dw);
        for (int64_t i = 0; i < n; ++i) {
            sum[i] = 0;
            for (int64_t part = 0; part < kParts; ++part) sum[i] += parts[part * n + i];
        }
    })
    return {dx, dw};
}

}  // namespace
}  // namespace opencoder

STABLE_TORCH_LIBRARY_IMPL(opencoder, CPU, m) {
    m.impl("rms_norm_fwd", TORCH_BOX(&opencoder::rms_norm_fwd));
    m.impl("add_rms_norm_fwd", TORCH_BOX(&opencoder::add_rms_norm_fwd));
    m.impl("rms_norm_bwd", TORCH_BOX(&opencoder::rms_norm_bwd));
}
