// Cross entropy of logits (T, V) on the CPU, whole or as the halves of a split vocabulary.
//
// Forward: one pass; backward: one read, one write, and in place if asked. Where the upstream gradient is known in the forward
// pass up to a factor (a mean, a sum), both are done at once: the row is read from memory once, the second time from cache.
#include "common.h"

namespace opencoder {
namespace {

constexpr int64_t kBlock = 2048;

template <typename T>
struct Rows {
    const T* logits;
    const int64_t* targets;
    int64_t width;
    int64_t vocab_start;
    int64_t ignore_index;
    RealOf<T> softcap;  // 0: none
};

template <typename Real>
struct Statistics {
    Real highest, sum_exp, sum, target;
};

template <typename T, typename Real>
INLINE const Real* capped(const T* row, Real* scratch, int64_t n, Real softcap) {
    const Real* x = load<Real>(row, scratch, n);
    if (softcap == Real(0)) return x;
    SIMD for (int64_t i = 0; i < n; ++i) scratch[i] = softcap * fast_tanh(x[i] / softcap);
    return scratch;
}

// How far above the running largest value a block may reach before the sum is rescaled: e^40 is far from overflow.
constexpr double kHeadroom = 40.0;

// Adds a block to the statistics, in one pass: its exponentials are taken relative to the largest value so far, while its
// own is found. Only a block that reaches far above (the first, as a rule) is gone over again. A NaN reaches sum_exp
// through exp; a row of −inf alone has the sum 0.
template <typename Real>
INLINE void add_block(Statistics<Real>& s, Real& shift, const Real* x, int64_t n, bool with_sum) {
    constexpr Real kNegative = -std::numeric_limits<Real>::infinity();
    Real highest = kNegative, sum = 0;
    if (s.highest != kNegative) {
        const Real from = shift;
        _Pragma("omp simd reduction(+ : sum) reduction(max : highest)") for (int64_t i = 0; i < n; ++i) {
            sum += fast_exp_nonpositive(x[i] - from);
            highest = x[i] > highest ? x[i] : highest;
        }
    }
    if (s.highest == kNegative || highest > shift + Real(kHeadroom)) {
        highest = kNegative;
        _Pragma("omp simd reduction(max : highest)") for (int64_t i = 0; i < n; ++i) highest =
            x[i] > highest ? x[i] : highest;
        const Real top = std::max(highest, s.highest), from = top == kNegative ? Real(0) : top;
        s.sum_exp *= s.highest == kNegative ? Real(0) : std::exp(shift - from);
        shift = from;
        sum = 0;
        _Pragma("omp simd reduction(+ : sum)") for (int64_t i = 0; i < n; ++i) sum += fast_exp_nonpositive(x[i] - from);
    }
    s.sum_exp += sum;
    s.highest = std::max(s.highest, highest);
    if (with_sum) {
        Real plain = 0;
        _Pragma("omp simd reduction(+ : plain)") for (int64_t i = 0; i < n; ++i) plain += x[i];
        s.sum += plain;
    }
}

template <typename T>
INLINE Statistics<RealOf<T>> statistics_of(const Rows<T>& a, int64_t row, bool with_sum) {
    using Real = RealOf<T>;
    constexpr Real kNegative = -std::numeric_limits<Real>::infinity();
    Real scratch[kBlock];
    Statistics<Real> s{kNegative, 0, 0, 0};
    Real shift = 0;
    const T* x_row = a.logits + row * a.width;
    for (int64_t at = 0; at < a.width; at += kBlock) {
        const int64_t n = std::min(kBlock, a.width - at);
        add_block(s, shift, capped(x_row + at, scratch, n, a.softcap), n, with_sum);
    }
    if (s.highest != kNegative) s.sum_exp *= std::exp(shift - s.highest);
    const int64_t local = a.targets[row] - a.vocab_start;
    if (local >= 0 && local < a.width) {
        const Real x = widen(x_row[local]);
        s.target = a.softcap == Real(0) ? x : a.softcap * std::tanh(x / a.softcap);
    }
    return s;
}

// Gradient of one row's loss times `scale`; `grad_row` may be the row of logits itself.
template <typename T>
INLINE void gradient_row(const Rows<T>& rows, int64_t row, RealOf<T> lse, RealOf<T> scale, RealOf<T> z_loss,
                         RealOf<T> smoothing, T* grad_row, bool stream) {
    using Real = RealOf<T>;
    const int64_t width = rows.width, target = rows.targets[row], local = target - rows.vocab_start;
    const Real softcap = rows.softcap;
    Real scratch[kBlock], tanhs[kBlock];
    if (target == rows.ignore_index) {
        std::fill(grad_row, grad_row + width, T(0));
        return;
    }
    const Real whole = scale * (Real(1) + Real(2) * z_loss * lse);
    const Real uniform = scale * smoothing / Real(width), at_target = scale * (Real(1) - smoothing);
    for (int64_t at = 0; at < width; at += kBlock) {
        const int64_t n = std::min(kBlock, width - at);
        const Real* x = load<Real>(rows.logits + row * width + at, scratch, n);
        Real* grad = destination<Real>(grad_row + at, scratch, stream);
        const bool here = local >= at && local < at + n;
        if (softcap == Real(0)) {
            SIMD for (int64_t i = 0; i < n; ++i) grad[i] = whole * fast_exp_nonpositive(x[i] - lse) - uniform;
            if (here) grad[local - at] -= at_target;
        } else {
            SIMD for (int64_t i = 0; i < n; ++i) tanhs[i] = fast_tanh(x[i] / softcap);
            SIMD for (int64_t i = 0; i < n; ++i) grad[i] = whole * fast_exp_nonpositive(softcap * tanhs[i] - lse) - uniform;
            if (here) grad[local - at] -= at_target;
            SIMD for (int64_t i = 0; i < n; ++i) grad[i] *= Real(1) - tanhs[i] * tanhs[i];
        }
        store(static_cast<const Real*>(grad), grad_row + at, n, stream);
    }
}

template <typename T>
struct Forward {
    Rows<T> rows;
    double z_loss, label_smoothing;
    RealOf<T>* loss;
    RealOf<T>* lse;
    T* grad;  // null, or where the gradient goes while the row is still in cache; may be the logits
    RealOf<T> scale;
    bool stream;
};

template <typename T>
INLINE void forward_rows(const Forward<T>& a, int64_t begin, int64_t end) {
    using Real = RealOf<T>;
    const Real smoothing = a.label_smoothing, z_loss = a.z_loss;
    for (int64_t row = begin; row < end; ++row) {
        const auto s = statistics_of(a.rows, row, smoothing != Real(0));
        const bool infinite = s.highest == std::numeric_limits<Real>::infinity();
        const Real lse = infinite ? s.highest : s.highest + std::log(s.sum_exp);
        if (a.lse) a.lse[row] = lse;
        Real loss = 0;
        if (a.rows.targets[row] != a.rows.ignore_index) {
            loss = lse - (Real(1) - smoothing) * s.target + z_loss * lse * lse;
            if (smoothing != Real(0)) loss -= smoothing * s.sum / Real(a.rows.width);
        }
        a.loss[row] = loss;
        if (a.grad) gradient_row(a.rows, row, lse, a.scale, z_loss, smoothing, a.grad + row * a.rows.width, a.stream);
    }
}
CLONED_RANGE(forward_rows, Forward)

template <typename T>
struct Backward {
    Rows<T> rows;
    double z_loss, label_smoothing;
    const RealOf<T>* lse;
    const RealOf<T>* scale;  // (T,) upstream gradients
    T* grad;                 // may be the logits
    bool stream;
};

template <typename T>
INLINE void backward_rows(const Backward<T>& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
        gradient_row<T>(a.rows, row, a.lse[row], a.scale[row], a.z_loss, a.label_smoothing, a.grad + row * a.rows.width,
                        a.stream);
}
CLONED_RANGE(backward_rows, Backward)

template <typename T>
struct Stats {
    Rows<T> rows;
    RealOf<T>* highest;
    RealOf<T>* sum_exp;
    RealOf<T>* target;
};

template <typename T>
INLINE void stats_rows(const Stats<T>& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
        const auto s = statistics_of(a.rows, row, false);
        a.highest[row] = s.highest;
        a.sum_exp[row] = s.sum_exp;
        a.target[row] = s.target;
    }
}
CLONED_RANGE(stats_rows, Stats)

Tensor as_int64(const Tensor& targets) {
    return torch::stable::contiguous(torch::stable::to(targets, ScalarType::Long));
}

void check(const Tensor& logits, const Tensor& targets) {
    STD_TORCH_CHECK(logits.dim() == 2 && targets.dim() == 1 && logits.size(0) == targets.size(0),
                    "cross_entropy: logits must be (T, V) and targets (T,)");
}

template <typename T>
Rows<T> rows_of(const Tensor& logits, const Tensor& targets, int64_t vocab_start, int64_t ignore_index,
                std::optional<double> softcap) {
    return {data<T>(logits), data<int64_t>(targets), logits.size(1), vocab_start, ignore_index,
            static_cast<RealOf<T>>(softcap.value_or(0.0))};
}

Tensor statistics_like(const Tensor& logits) {
    return torch::stable::new_empty(logits, {logits.size(0)}, statistics_type(logits));
}

std::tuple<Tensor, Tensor> ce_forward(const Tensor& logits_in, const Tensor& targets_in, int64_t ignore_index,
                                             double z_loss, double label_smoothing, std::optional<double> softcap) {
    check(logits_in, targets_in);
    const Tensor logits = torch::stable::contiguous(logits_in), targets = as_int64(targets_in);
    Tensor loss = statistics_like(logits), lse = statistics_like(logits);
    DISPATCH("cross_entropy", logits, {
        const Forward<T> a{rows_of<T>(logits, targets, 0, ignore_index, softcap),
                           z_loss,
                           label_smoothing,
                           mutable_data<RealOf<T>>(loss),
                           mutable_data<RealOf<T>>(lse),
                           nullptr,
                           0,
                           false};
        PARALLEL(forward_rows, a, logits.size(0), logits.size(1) * sizeof(T));
    })
    return {loss, lse};
}

// Token losses, and into `grad` the gradient of their sum times `scale`, which is 0-dim.
Tensor forward_with_gradient(const Tensor& logits, const Tensor& targets_in, const Tensor& scale_in, int64_t ignore_index,
                             double z_loss, double label_smoothing, std::optional<double> softcap, Tensor& grad) {
    check(logits, targets_in);
    const Tensor targets = as_int64(targets_in);
    const Tensor scale = torch::stable::to(scale_in, statistics_type(logits));
    STD_TORCH_CHECK(scale.numel() == 1, "cross_entropy: scale must be 0-dim");
    Tensor loss = statistics_like(logits);
    DISPATCH("cross_entropy", logits, {
        const int64_t row_bytes = logits.size(1) * sizeof(T);
        const bool in_place = grad.const_data_ptr() == logits.const_data_ptr();
        const bool stream = !in_place && streams(2 * logits.size(0) * row_bytes, {mutable_data<T>(grad)}, row_bytes);
        const Forward<T> a{rows_of<T>(logits, targets, 0, ignore_index, softcap),
                           z_loss,
                           label_smoothing,
                           mutable_data<RealOf<T>>(loss),
                           nullptr,
                           mutable_data<T>(grad),
                           *data<RealOf<T>>(scale),
                           stream};
        PARALLEL(forward_rows, a, logits.size(0), logits.size(1) * sizeof(T));
    })
    return loss;
}

// The sum of the token losses times `scale`, 0-dim, and its gradient.
std::tuple<Tensor, Tensor> ce_with_gradient(const Tensor& logits_in, const Tensor& targets, const Tensor& scale,
                                            int64_t ignore_index, double z_loss, double label_smoothing,
                                            std::optional<double> softcap) {
    const Tensor logits = torch::stable::contiguous(logits_in);
    Tensor grad = torch::stable::empty_like(logits);
    const Tensor loss = forward_with_gradient(logits, targets, scale, ignore_index, z_loss, label_smoothing, softcap, grad);
    Tensor total = torch::stable::new_empty(logits, {}, statistics_type(logits));
    DISPATCH("cross_entropy", total, {
        const T* each = data<T>(loss);
        double sum = 0;  // in a fixed order
        for (int64_t i = 0; i < loss.numel(); ++i) sum += static_cast<double>(each[i]);
        const Tensor factor = torch::stable::to(scale, total.scalar_type());
        *mutable_data<T>(total) = static_cast<T>(sum * static_cast<double>(*data<T>(factor)));
    })
    return {total, grad};
}

Tensor ce_with_gradient_in_place(Tensor logits, const Tensor& targets, const Tensor& scale, int64_t ignore_index,
                                 double z_loss, double label_smoothing, std::optional<double> softcap) {
    STD_TORCH_CHECK(logits.is_contiguous(), "cross_entropy: in place needs contiguous logits");
    return forward_with_gradient(logits, targets, scale, ignore_index, z_loss, label_smoothing, softcap, logits);
}

void backward(const Tensor& logits, const Tensor& targets_in, const Tensor& lse_in, const Tensor& scale_in,
              int64_t vocab_start, int64_t ignore_index, double z_loss, double label_smoothing,
              std::optional<double> softcap, Tensor& grad) {
    check(logits, targets_in);
    const Tensor targets = as_int64(targets_in);
    const Tensor lse = torch::stable::contiguous(torch::stable::to(lse_in, statistics_type(logits)));
    const Tensor scale = torch::stable::contiguous(torch::stable::to(scale_in, statistics_type(logits)));
    STD_TORCH_CHECK(lse.numel() == logits.size(0) && scale.numel() == logits.size(0),
                    "cross_entropy: the log-sum-exp and the upstream gradient must be (T,)");
    DISPATCH("cross_entropy", logits, {
        const int64_t row_bytes = logits.size(1) * sizeof(T);
        const bool in_place = grad.const_data_ptr() == logits.const_data_ptr();
        const bool stream = !in_place && streams(2 * logits.size(0) * row_bytes, {mutable_data<T>(grad)}, row_bytes);
        const Backward<T> a{rows_of<T>(logits, targets, vocab_start, ignore_index, softcap),
                            z_loss,
                            label_smoothing,
                            data<RealOf<T>>(lse),
                            data<RealOf<T>>(scale),
                            mutable_data<T>(grad),
                            stream};
        PARALLEL(backward_rows, a, logits.size(0), logits.size(1) * sizeof(T));
    })
}

Tensor ce_backward(const Tensor& dloss, const Tensor& logits_in, const Tensor& targets, const Tensor& lse,
                   int64_t vocab_start, int64_t ignore_index, double z_loss, double label_smoothing,
                   std::optional<double> softcap) {
    const Tensor logits = torch::stable::contiguous(logits_in);
    Tensor grad = torch::stable::empty_like(logits);
    backward(logits, targets, lse, dloss, vocab_start, ignore_index, z_loss, label_smoothing, softcap, grad);
    return grad;
}

void ce_backward_in_place(const Tensor& dloss, Tensor logits, const Tensor& targets, const Tensor& lse,
                          int64_t vocab_start, int64_t ignore_index, double z_loss, double label_smoothing,
                          std::optional<double> softcap) {
    STD_TORCH_CHECK(logits.is_contiguous(), "cross_entropy: in place needs contiguous logits");
    backward(logits, targets, lse, dloss, vocab_start, ignore_index, z_loss, label_smoothing, softcap, logits);
}

void ce_backward_out(const Tensor& dloss, const Tensor& logits_in, const Tensor& targets, const Tensor& lse,
                     int64_t vocab_start, int64_t ignore_index, double z_loss, double label_smoothing,
                     std::optional<double> softcap, Tensor out) {
    const Tensor logits = torch::stable::contiguous(logits_in);
    STD_TORCH_CHECK(out.is_contiguous() && out.numel() == logits.numel() && out.scalar_type() == logits.scalar_type(),
                    "cross_entropy: out must be contiguous and like the logits");
    backward(logits, targets, lse, dloss, vocab_start, ignore_index, z_loss, label_smoothing, softcap, out);
}

std::tuple<Tensor, Tensor, Tensor> ce_stats(const Tensor& logits_in, const Tensor& targets_in, int64_t vocab_start,
                                            std::optional<double> softcap) {
    check(logits_in, targets_in);
    const Tensor logits = torch::stable::contiguous(logits_in), targets = as_int64(targets_in);
    Tensor highest = statistics_like(logits), sum_exp = statistics_like(logits), target = statistics_like(logits);
    DISPATCH("ce_stats", logits, {
        const Stats<T> a{rows_of<T>(logits, targets, vocab_start, 0, softcap), mutable_data<RealOf<T>>(highest),
                         mutable_data<RealOf<T>>(sum_exp), mutable_data<RealOf<T>>(target)};
        PARALLEL(stats_rows, a, logits.size(0), logits.size(1) * sizeof(T));
    })
    return {highest, sum_exp, target};
}

}  // namespace
}  // namespace opencoder

STABLE_TORCH_LIBRARY_IMPL(opencoder, CPU, m) {
    m.impl("ce_forward", TORCH_BOX(&opencoder::ce_forward));
    m.impl("ce_with_gradient", TORCH_BOX(&opencoder::ce_with_gradient));
    m.impl("ce_with_gradient_", TORCH_BOX(&opencoder::ce_with_gradient_in_place));
    m.impl("ce_backward", TORCH_BOX(&opencoder::ce_backward));
    m.impl("ce_backward_", TORCH_BOX(&opencoder::ce_backward_in_place));
    m.impl("ce_backward_out", TORCH_BOX(&opencoder::ce_backward_out));
    m.impl("ce_stats", TORCH_BOX(&opencoder::ce_stats));
}
