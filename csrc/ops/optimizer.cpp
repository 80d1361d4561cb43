// AdamW over lists of tensors on the CPU, with master weights and the clip factor inside, and the sum of squares of a list.
//
//   g = grad · clip;  m += (1 − b1)(g − m);  v = b2 v + (1 − b2) g²;  p = p (1 − lr·wd) − lr/(1 − b1^t) · m / (√(v/(1 − b2^t)) + eps)
//
// torch's fused AdamW does the same for one type; it has no master weights for 16-bit parameters. Source: arXiv:1711.05101.
#include "common.h"

namespace opencoder {
namespace {

constexpr int64_t kChunk = 1 << 15;  // values a thread takes at a time: small tensors do not leave a thread idle
constexpr int64_t kBlock = 1024;

struct Chunk {
    int64_t tensor, begin, end;
};

std::vector<Chunk> chunks_of(const std::vector<Tensor>& tensors) {
    std::vector<Chunk> chunks;
    for (size_t i = 0; i < tensors.size(); ++i)
        for (int64_t at = 0; at < tensors[i].numel(); at += kChunk)
            chunks.push_back({static_cast<int64_t>(i), at, std::min(at + kChunk, tensors[i].numel())});
    return chunks;
}

template <typename Real>
struct Settings {
    Real clip, beta1, beta2, eps, decay, step_size, inverse_root;  // 1 − lr·wd; lr/(1 − b1^t); 1/√(1 − b2^t)
};

template <typename T>
struct Update {
    T* param;
    RealOf<T>* master;  // param itself if that is wide
    const T* grad;
    const RealOf<T>* wide_grad;  // instead of grad, if not null
    RealOf<T>* exp_avg;
    RealOf<T>* exp_avg_sq;
    Settings<RealOf<T>> s;
};

template <typename T>
INLINE void update_range(const Update<T>& a, int64_t begin, int64_t end) {
    using Real = RealOf<T>;
    const Settings<Real> s = a.s;
    Real scratch[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
        const int64_t n = std::min(kBlock, end - at);
        const Real* g = a.wide_grad ? a.wide_grad + at : load<Real>(a.grad + at, scratch, n);
        Real* __restrict p = a.master + at;
        Real* __restrict m = a.exp_avg + at;
        Real* __restrict v = a.exp_avg_sq + at;
        SIMD for (int64_t i = 0; i < n; ++i) {
            const Real clipped = g[i] * s.clip;
            m[i] += (Real(1) - s.beta1) * (clipped - m[i]);
            v[i] = s.beta2 * v[i] + (Real(1) - s.beta2) * clipped * clipped;
            p[i] = p[i] * s.decay - s.step_size * m[i] / (std::sqrt(v[i]) * s.inverse_root + s.eps);
        }
        store(static_cast<const Real*>(p), a.param + at, n, false);
    }
}
CLONED_RANGE(update_range, Update)

void check_lists(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& m,
                 const std::vector<Tensor>& v, const std::vector<Tensor>& masters) {
    STD_TORCH_CHECK(grads.size() == params.size() && m.size() == params.size() && v.size() == params.size() &&
                        (masters.empty() || masters.size() == params.size()),
                    "adamw_step: lists of different lengths");
    for (size_t i = 0; i < params.size(); ++i) {
        for (const Tensor* t : {&params[i], &grads[i], &m[i], &v[i]})
            STD_TORCH_CHECK(t->is_contiguous() && t->numel() == params[i].numel(), "adamw_step: the tensors of parameter ",
                            i, " must be contiguous and of one size");
        STD_TORCH_CHECK(m[i].scalar_type() == statistics_type(params[i]) && v[i].scalar_type() == m[i].scalar_type(),
                        "adamw_step: the state of parameter ", i, " must be fp32 (fp64 for fp64)");
        STD_TORCH_CHECK(grads[i].scalar_type() == params[i].scalar_type() || grads[i].scalar_type() == m[i].scalar_type(),
                        "adamw_step: the gradient of parameter ", i, " must have its type or fp32");
        const Tensor& updated = masters.empty() ? params[i] : masters[i];
        STD_TORCH_CHECK(updated.is_contiguous() && updated.numel() == params[i].numel() &&
                            updated.scalar_type() == m[i].scalar_type(),
                        "adamw_step: parameter ", i, " needs a contiguous fp32 master of its size if it is 16-bit");
    }
}

template <typename Real>
Settings<Real> settings(double clip, double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
    const double t = static_cast<double>(step);
    return {static_cast<Real>(clip),
            static_cast<Real>(beta1),
            static_cast<Real>(beta2),
            static_cast<Real>(eps),
            static_cast<Real>(1.0 - lr * weight_decay),
            static_cast<Real>(lr / (1.0 - std::pow(beta1, t))),
            static_cast<Real>(1.0 / std::sqrt(1.0 - std::pow(beta2, t)))};
}

void adamw_step(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avgs,
                std::vector<Tensor> exp_avg_sqs, std::vector<Tensor> masters, const Tensor& clip_coef, double lr,
                double beta1, double beta2, double eps, double weight_decay, int64_t step) {
    check_lists(params, grads, exp_avgs, exp_avg_sqs, masters);
    STD_TORCH_CHECK(clip_coef.scalar_type() == ScalarType::Double && clip_coef.numel() == 1,
                    "adamw_step: clip must be one fp64 value");
    const double clip = *data<double>(clip_coef);
    const auto chunks = chunks_of(params);
    torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
            const int64_t i = chunks[c].tensor;
            DISPATCH("adamw_step", params[i], {
                using Real = RealOf<T>;
                const bool wide = grads[i].scalar_type() == exp_avgs[i].scalar_type();
                const Update<T> a{mutable_data<T>(params[i]),
                                  mutable_data<Real>(masters.empty() ? params[i] : masters[i]),
                                  wide ? nullptr : data<T>(grads[i]),
                                  wide ? data<Real>(grads[i]) : nullptr,
                                  mutable_data<Real>(exp_avgs[i]),
                                  mutable_data<Real>(exp_avg_sqs[i]),
                                  settings<Real>(clip, lr, beta1, beta2, eps, weight_decay, step)};
                update_range_cloned(a, chunks[c].begin, chunks[c].end);
            })
        }
    });
}

template <typename T>
struct Squares {
    const T* x;
    double* sum;
};

template <typename T>
INLINE void squares_range(const Squares<T>& a, int64_t begin, int64_t end) {
    using Real = RealOf<T>;
    Real scratch[kBlock];
    double total = 0;
    for (int64_t at = begin; at < end; at += kBlock) {
        const int64_t n = std::min(kBlock, end - at);
        const Real* x = load<Real>(a.x + at, scratch, n);
        // fp64 throughout: the square of a large fp32 gradient would overflow, and reading is what takes the time.
        _Pragma("omp simd reduction(+ : total)") for (int64_t i = 0; i < n; ++i) total +=
            static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
    *a.sum = total;
}
CLONED_RANGE(squares_range, Squares)

// 0-dim fp64: the sum of squares of all values, in a fixed order.
Tensor square_sum(std::vector<Tensor> tensors) {
    STD_TORCH_CHECK(!tensors.empty(), "grad_norm: no tensors");
    for (Tensor& t : tensors) t = torch::stable::contiguous(t);
    const auto chunks = chunks_of(tensors);
    std::vector<double> sums(chunks.size());
    torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
            const Tensor& t = tensors[chunks[c].tensor];
            DISPATCH("grad_norm", t, {
                const Squares<T> a{data<T>(t), &sums[c]};
                squares_range_cloned(a, chunks[c].begin, chunks[c].end);
            })
        }
    });
    double total = 0;
    for (const double s : sums) total += s;
    Tensor result = torch::stable::new_empty(tensors[0], {}, ScalarType::Double);
    *mutable_data<double>(result) = total;
    return result;
}

// ---- some rows of a matrix ----

template <typename T>
struct SgdRows {
    T* weight;
    T* buffer;
    const T* grad;
    const int64_t* rows;
    int64_t width;
    T lr, momentum, decay, clip;
};

template <typename T>
INLINE void sgd_rows_range(const SgdRows<T>& a, int64_t begin, int64_t end) {
    const int64_t width = a.width;
    const T lr = a.lr, momentum = a.momentum, decay = a.decay, clip = a.clip;
    for (int64_t i = begin; i < end; ++i) {
        T* __restrict w = a.weight + a.rows[i] * width;
        T* __restrict b = a.buffer + a.rows[i] * width;
        const T* __restrict g = a.grad + i * width;
        SIMD for (int64_t j = 0; j < width; ++j) {
            const T moved = b[j] * momentum + g[j] * clip + w[j] * decay;
            b[j] = moved;
            w[j] -= lr * moved;
        }
    }
}
CLONES void sgd_rows_f32(const SgdRows<float>& a, int64_t begin, int64_t end) { sgd_rows_range(a, begin, end); }
CLONES void sgd_rows_f64(const SgdRows<double>& a, int64_t begin, int64_t end) { sgd_rows_range(a, begin, end); }

template <typename T>
SgdRows<T> sgd_rows_of(Tensor& weight, Tensor& buffer, const Tensor& grad, const Tensor& rows, double lr, double momentum,
                       double decay, double clip) {
    return {mutable_data<T>(weight), mutable_data<T>(buffer), data<T>(grad), data<int64_t>(rows), weight.size(1),
            static_cast<T>(lr), static_cast<T>(momentum), static_cast<T>(decay), static_cast<T>(clip)};
}

// Each row is read and written once: copies of the rows, updated and put back, would pass through memory four times.
void sgd_rows_step(Tensor weight, Tensor buffer, const Tensor& grad, const Tensor& rows, double lr, double momentum,
                   double decay, double clip) {
    const ScalarType type = weight.scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "sgd_rows_step: rows must be fp32 or fp64");
    STD_TORCH_CHECK(buffer.scalar_type() == type && grad.scalar_type() == type && rows.scalar_type() == ScalarType::Long,
                    "sgd_rows_step: weight, momentum and gradient must be of one type, row numbers int64");
    STD_TORCH_CHECK(weight.dim() == 2 && grad.dim() == 2 && grad.size(1) == weight.size(1) && rows.numel() == grad.size(0) &&
                        buffer.numel() == weight.numel(),
                    "sgd_rows_step: weight and momentum (N, D), gradient (m, D) and rows (m,) do not fit");
    for (const Tensor* t : std::initializer_list<const Tensor*>{&weight, &buffer, &grad, &rows})
        STD_TORCH_CHECK(t->is_contiguous(), "sgd_rows_step: all tensors must be contiguous");
    const int64_t* ids = data<int64_t>(rows);
    const int64_t count = rows.numel(), classes = weight.size(0);
    for (int64_t i = 0; i < count; ++i)
        STD_TORCH_CHECK(ids[i] >= 0 && ids[i] < classes, "sgd_rows_step: row ", ids[i], " of ", classes);
    const int64_t few = std::max<int64_t>(1, kChunk / std::max<int64_t>(1, weight.size(1)));
    torch::stable::parallel_for(0, count, few, [&](int64_t begin, int64_t end) {
        if (type == ScalarType::Float)
            sgd_rows_f32(sgd_rows_of<float>(weight, buffer, grad, rows, lr, momentum, decay, clip), begin, end);
        else
            sgd_rows_f64(sgd_rows_of<double>(weight, buffer, grad, rows, lr, momentum, decay, clip), begin, end);
    });
}

}  // namespace
}  // namespace opencoder

STABLE_TORCH_LIBRARY_IMPL(opencoder, CPU, m) {
    m.impl("adamw_step_", TORCH_BOX(&opencoder::adamw_step));
    m.impl("sgd_rows_step_", TORCH_BOX(&opencoder::sgd_rows_step));
    m.impl("square_sum", TORCH_BOX(&opencoder::square_sum));
}
