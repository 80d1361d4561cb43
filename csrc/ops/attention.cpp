// Attention on the CPU for what SDPA there cannot do or does slowly: packed documents, sliding windows, softcap, a
// log-sum-exp, as many or as few keys as queries; forward and backward.
//
// A task is one head of one document, so documents never meet, the result does not depend on the number of threads, and
// short documents cost what they contain. Tiles of queries by keys that the mask excludes are skipped. Online softmax
// (arXiv:2205.14135); causal is aligned bottom-right, a window is inclusive, a row without keys gives 0 and −inf.
#include <atomic>

#include "tiles.h"

namespace opencoder {
namespace {

constexpr int64_t kTile = 64;  // queries, and keys, of a tile

struct Document {
    int64_t q_begin, q_length, k_begin, k_length;
};

struct Mask {
    bool causal;
    int64_t left, right;  // −1: unbounded
    // Keys [first, last) that query i of a document may see.
    INLINE int64_t first(const Document& d, int64_t i) const {
        return left < 0 ? 0 : std::max<int64_t>(0, i + d.k_length - d.q_length - left);
    }
    INLINE int64_t last(const Document& d, int64_t i) const {
        const int64_t at = i + d.k_length - d.q_length;
        int64_t end = d.k_length;
        if (causal) end = std::min(end, at + 1);
        if (right >= 0) end = std::min(end, at + right + 1);
        return std::max<int64_t>(end, 0);
    }
};

template <typename T>
struct Case {
    const T* q;
    const T* k;
    const T* v;
    const T* out;          // backward
    const T* dout;         // backward
    T* out_forward;        // forward
    T* dq;
    T* dk;
    T* dv;
    const RealOf<T>* lse_given;  // backward; (H, T) packed, (B, H, S) dense
    const RealOf<T>* dlse;       // backward; the gradient of lse, or null
    RealOf<T>* lse;
    const Document* documents;
    int64_t heads, kv_heads, dim;
    int64_t lse_stride;     // between heads
    bool dense;             // lse starts at document · heads · lse_stride instead of at the document's tokens
    Mask mask;
    RealOf<T> softcap, scale;
};

template <typename T>
INLINE int64_t lse_offset(const Case<T>& a, int64_t document, int64_t head) {
    return a.dense ? (document * a.heads + head) * a.lse_stride
                   : head * a.lse_stride + a.documents[document].q_begin;
}

// Rows [begin, begin + rows) of one head, times `factor`, into (rows, width) with zeros from dim on; tokens are `stride`
// values apart. Rows up to a multiple of kRows are zero.
template <typename T, typename Real>
INLINE void gather(const T* x, int64_t stride, int64_t rows, int64_t dim, int64_t width, Real factor, Real* out) {
    for (int64_t i = 0; i < rows; ++i) {
        SIMD for (int64_t j = 0; j < dim; ++j) out[i * width + j] = widen(x[i * stride + j]) * factor;
        for (int64_t j = dim; j < width; ++j) out[i * width + j] = 0;
    }
    for (int64_t i = rows * width; i < rounded_up(rows, kRows) * width; ++i) out[i] = 0;
}

// The same transposed, tile by tile of keys: tile t is (dim, kTile), zero beyond the last key.
template <typename T, typename Real>
INLINE void gather_transposed(const T* x, int64_t stride, int64_t rows, int64_t dim, Real* out) {
    for (int64_t start = 0; start < rows; start += kTile) {
        Real* tile = out + start * dim;
        const int64_t n = std::min(kTile, rows - start);
        for (int64_t j = 0; j < dim; ++j) {
            for (int64_t i = 0; i < n; ++i) tile[j * kTile + i] = widen(x[(start + i) * stride + j]);
            for (int64_t i = n; i < kTile; ++i) tile[j * kTile + i] = 0;
        }
    }
}

template <typename T, typename Real>
INLINE void scatter(const Real* x, int64_t rows, int64_t dim, int64_t width, Real factor, T* out, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i)
        SIMD for (int64_t j = 0; j < dim; ++j) out[i * stride + j] = narrow<T>(x[i * width + j] * factor);
}

// scores (rows, kTile) of a tile: products, capped; `tanhs` keeps tanh where a backward needs it.
template <typename Real>
INLINE void scores_of(const Real* q, int64_t width, const Real* k_transposed, int64_t rows, int64_t dim, Real softcap,
                      Real* scores, Real* tanhs) {
    std::fill(scores, scores + rounded_up(rows, kRows) * kTile, Real(0));
    multiply_add(scores, kTile, q, width, 1, k_transposed, kTile, rounded_up(rows, kRows), kTile, dim);
    if (softcap == Real(0)) return;
    SIMD for (int64_t i = 0; i < rows * kTile; ++i) {
        const Real t = fast_tanh(scores[i] / softcap);
        if (tanhs) tanhs[i] = t;
        scores[i] = softcap * t;
    }
}

// One query row of a tile: probabilities in place (0 outside [from, to)), largest score and sum carried on; returns what
// the row's earlier sums must be multiplied by.
template <typename Real>
INLINE Real softmax_row(Real* s, int64_t from, int64_t to, Real& highest, Real& sum) {
    constexpr Real kNegative = -std::numeric_limits<Real>::infinity();
    Real top = highest;
    _Pragma("omp simd reduction(max : top)") for (int64_t j = from; j < to; ++j) top = s[j] > top ? s[j] : top;
    const Real shift = top == kNegative ? Real(0) : top;
    for (int64_t j = 0; j < from; ++j) s[j] = 0;
    for (int64_t j = std::max(from, to); j < kTile; ++j) s[j] = 0;
    Real add = 0;
    _Pragma("omp simd reduction(+ : add)") for (int64_t j = from; j < to; ++j) {
        s[j] = fast_exp_nonpositive(s[j] - shift);
        add += s[j];
    }
    const Real rescale = highest == kNegative ? Real(0) : std::exp(highest - shift);
    sum = sum * rescale + add;
    highest = top;
    return rescale;
}

// Tasks are (document, query head).
template <typename T>
INLINE void forward_tasks(const Case<T>& a, int64_t begin, int64_t end) {
    using Real = RealOf<T>;
    constexpr Real kNegative = -std::numeric_limits<Real>::infinity();
    const int64_t width = rounded_up(a.dim, kLanes<Real>);
    std::vector<Real> q(kTile * width), sums(kTile * width), scores(kTile * kTile), keys, values;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t document = task / a.heads, head = task % a.heads;
        const Document d = a.documents[document];
        const int64_t kv_head = head / (a.heads / a.kv_heads), q_stride = a.heads * a.dim, k_stride = a.kv_heads * a.dim;
        const int64_t k_at = (d.k_begin * a.kv_heads + kv_head) * a.dim;
        keys.resize(rounded_up(d.k_length, kTile) * a.dim);
        values.resize(rounded_up(d.k_length, kTile) * width);
        gather_transposed(a.k + k_at, k_stride, d.k_length, a.dim, keys.data());
        gather(a.v + k_at, k_stride, d.k_length, a.dim, width, Real(1), values.data());
        Real* lse = a.lse + lse_offset(a, document, head);
        for (int64_t i0 = 0; i0 < d.q_length; i0 += kTile) {
            const int64_t rows = std::min(kTile, d.q_length - i0), padded = rounded_up(rows, kRows);
            const int64_t q_at = ((d.q_begin + i0) * a.heads + head) * a.dim;
            gather(a.q + q_at, q_stride, rows, a.dim, width, a.scale, q.data());
            std::fill(sums.begin(), sums.end(), Real(0));
            Real highest[kTile], sum[kTile];
            std::fill(highest, highest + kTile, kNegative);
            std::fill(sum, sum + kTile, Real(0));
            const int64_t first = a.mask.first(d, i0) / kTile * kTile, last = a.mask.last(d, i0 + rows - 1);
            for (int64_t j0 = first; j0 < last; j0 += kTile) {
                scores_of<Real>(q.data(), width, keys.data() + j0 * a.dim, rows, a.dim, a.softcap, scores.data(), nullptr);
                for (int64_t i = 0; i < rows; ++i) {
                    const int64_t from = std::clamp<int64_t>(a.mask.first(d, i0 + i) - j0, 0, kTile);
                    const int64_t to = std::clamp<int64_t>(a.mask.last(d, i0 + i) - j0, 0, kTile);
                    const Real rescale = softmax_row(scores.data() + i * kTile, from, to, highest[i], sum[i]);
                    if (rescale != Real(1))
                        SIMD for (int64_t c = 0; c < width; ++c) sums[i * width + c] *= rescale;
                }
                const int64_t n = std::min(kTile, d.k_length - j0);
                multiply_add(sums.data(), width, scores.data(), kTile, int64_t{1}, values.data() + j0 * width, width, padded,
                             width, n);
            }
            for (int64_t i = 0; i < rows; ++i) {
                const bool empty = highest[i] == kNegative;
                lse[i0 + i] = empty ? kNegative : highest[i] + std::log(sum[i]);
                scatter(sums.data() + i * width, 1, a.dim, width, empty ? Real(0) : Real(1) / sum[i],
                        a.out_forward + q_at + i * q_stride, q_stride);
            }
        }
    }
}
CLONED_RANGE(forward_tasks, Case)

// Tasks are (document, key head): its dk and dv are summed over the query heads of its group in a fixed order.
template <typename T>
INLINE void backward_tasks(const Case<T>& a, int64_t begin, int64_t end) {
    using Real = RealOf<T>;
    constexpr Real kNegative = -std::numeric_limits<Real>::infinity();
    const int64_t width = rounded_up(a.dim, kLanes<Real>), group = a.heads / a.kv_heads;
    std::vector<Real> q(kTile * width), g(kTile * width), dq(kTile * width), p(kTile * kTile), ds(kTile * kTile);
    std::vector<Real> tanhs(kTile * kTile), keys_t, values_t, keys, dk, dv;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t document = task / a.kv_heads, kv_head = task % a.kv_heads;
        const Document d = a.documents[document];
        const int64_t q_stride = a.heads * a.dim, k_stride = a.kv_heads * a.dim;
        const int64_t k_at = (d.k_begin * a.kv_heads + kv_head) * a.dim, k_rows = rounded_up(d.k_length, kTile);
        keys_t.resize(k_rows * a.dim);
        values_t.resize(k_rows * a.dim);
        keys.resize(k_rows * width);
        gather_transposed(a.k + k_at, k_stride, d.k_length, a.dim, keys_t.data());
        gather_transposed(a.v + k_at, k_stride, d.k_length, a.dim, values_t.data());
        gather(a.k + k_at, k_stride, d.k_length, a.dim, width, Real(1), keys.data());
        dk.assign(k_rows * width, Real(0));
        dv.assign(k_rows * width, Real(0));
        for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
            for (int64_t i0 = 0; i0 < d.q_length; i0 += kTile) {
                const int64_t rows = std::min(kTile, d.q_length - i0), padded = rounded_up(rows, kRows);
                const int64_t q_at = ((d.q_begin + i0) * a.heads + head) * a.dim;
                const Real* lse = a.lse_given + lse_offset(a, document, head) + i0;
                gather(a.q + q_at, q_stride, rows, a.dim, width, a.scale, q.data());
                gather(a.dout + q_at, q_stride, rows, a.dim, width, Real(1), g.data());
                std::fill(dq.begin(), dq.end(), Real(0));
                Real delta[kTile];
                for (int64_t i = 0; i < rows; ++i) {
                    delta[i] = a.dlse ? -a.dlse[lse_offset(a, document, head) + i0 + i] : Real(0);
                    for (int64_t c = 0; c < a.dim; ++c) delta[i] += g[i * width + c] * widen(a.out[q_at + i * q_stride + c]);
                }
                const int64_t first = a.mask.first(d, i0) / kTile * kTile, last = a.mask.last(d, i0 + rows - 1);
                for (int64_t j0 = first; j0 < last; j0 += kTile) {
                    const int64_t n = std::min(kTile, d.k_length - j0);
                    scores_of(q.data(), width, keys_t.data() + j0 * a.dim, rows, a.dim, a.softcap, p.data(), tanhs.data());
                    std::fill(ds.begin(), ds.end(), Real(0));
                    multiply_add(ds.data(), kTile, g.data(), width, int64_t{1}, values_t.data() + j0 * a.dim, kTile, padded,
                                 kTile, a.dim);
                    for (int64_t i = 0; i < padded; ++i) {
                        Real* pi = p.data() + i * kTile;
                        Real* si = ds.data() + i * kTile;
                        const bool live = i < rows && lse[i] != kNegative;
                        const int64_t from = live ? std::clamp<int64_t>(a.mask.first(d, i0 + i) - j0, 0, kTile) : 0;
                        const int64_t to = live ? std::clamp<int64_t>(a.mask.last(d, i0 + i) - j0, from, kTile) : 0;
                        for (int64_t j = 0; j < from; ++j) pi[j] = si[j] = 0;
                        for (int64_t j = to; j < kTile; ++j) pi[j] = si[j] = 0;
                        SIMD for (int64_t j = from; j < to; ++j) {
                            pi[j] = fast_exp(pi[j] - lse[i]);
                            si[j] = pi[j] * (si[j] - delta[i]);
                        }
                        if (a.softcap != Real(0)) {
                            const Real* ti = tanhs.data() + i * kTile;
                            SIMD for (int64_t j = from; j < to; ++j) si[j] *= Real(1) - ti[j] * ti[j];
                        }
                    }
                    const int64_t n_padded = rounded_up(n, kRows);
                    multiply_add(dv.data() + j0 * width, width, p.data(), int64_t{1}, kTile, g.data(), width, n_padded,
                                 width, rows);
                    multiply_add(dk.data() + j0 * width, width, ds.data(), int64_t{1}, kTile, q.data(), width, n_padded,
                                 width, rows);
                    multiply_add(dq.data(), width, ds.data(), kTile, int64_t{1}, keys.data() + j0 * width, width, padded,
                                 width, n);
                }
                scatter(dq.data(), rows, a.dim, width, a.scale, a.dq + q_at, q_stride);
            }
        scatter(dk.data(), d.k_length, a.dim, width, Real(1), a.dk + k_at, k_stride);
        scatter(dv.data(), d.k_length, a.dim, width, Real(1), a.dv + k_at, k_stride);
    }
}
CLONED_RANGE(backward_tasks, Case)

std::vector<Document> documents_of(const Tensor& q, const Tensor& k, const std::optional<Tensor>& bounds_q,
                                   const std::optional<Tensor>& bounds_k) {
    std::vector<Document> documents;
    if (!bounds_q) {
        for (int64_t b = 0; b < q.size(0); ++b)
            documents.push_back({b * q.size(1), q.size(1), b * k.size(1), k.size(1)});
        return documents;
    }
    const Tensor cq = torch::stable::contiguous(*bounds_q), ck = torch::stable::contiguous(bounds_k ? *bounds_k : *bounds_q);
    STD_TORCH_CHECK(cq.scalar_type() == ScalarType::Int && ck.scalar_type() == ScalarType::Int && cq.numel() == ck.numel(),
                    "attention: document bounds must be int32 and as many for keys as for queries");
    const int32_t* pq = data<int32_t>(cq);
    const int32_t* pk = data<int32_t>(ck);
    for (int64_t i = 0; i + 1 < cq.numel(); ++i) {
        STD_TORCH_CHECK(0 <= pq[i] && pq[i] <= pq[i + 1] && pq[i + 1] <= q.size(0) && 0 <= pk[i] && pk[i] <= pk[i + 1] &&
                            pk[i + 1] <= k.size(0),
                        "attention: document bounds must rise within the tokens");
        documents.push_back({pq[i], pq[i + 1] - pq[i], pk[i], pk[i + 1] - pk[i]});
    }
    return documents;
}

template <typename T>
Case<T> case_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::vector<Document>& documents, bool dense,
                bool causal, int64_t left, int64_t right, double softcap, double scale) {
    const int64_t heads = q.size(q.dim() - 2), kv_heads = k.size(k.dim() - 2);
    STD_TORCH_CHECK(kv_heads > 0 && heads % kv_heads == 0, "attention: ", heads, " query heads over ", kv_heads);
    Case<T> a{};
    a.q = data<T>(q);
    a.k = data<T>(k);
    a.v = data<T>(v);
    a.documents = documents.data();
    a.heads = heads;
    a.kv_heads = kv_heads;
    a.dim = q.size(q.dim() - 1);
    a.dense = dense;
    a.lse_stride = dense ? q.size(1) : q.size(0);
    a.mask = {causal, left, right};
    a.softcap = static_cast<RealOf<T>>(softcap);
    a.scale = static_cast<RealOf<T>>(scale);
    return a;
}

// Threads take the next task as they become free: documents differ in length.
template <typename Run>
void take_turns(int64_t tasks, Run run) {
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t, int64_t) {
        for (int64_t task = next++; task < tasks; task = next++) run(task);
    });
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                         const std::optional<Tensor>& bounds_q, const std::optional<Tensor>& bounds_k,
                                         int64_t, bool causal, int64_t left, int64_t right, double softcap, double scale) {
    const Tensor q = torch::stable::contiguous(q_in), k = torch::stable::contiguous(k_in);
    const Tensor v = torch::stable::contiguous(v_in);
    const bool dense = !bounds_q;
    const auto documents = documents_of(q, k, bounds_q, bounds_k);
    Tensor out = torch::stable::empty_like(q);
    const int64_t heads = q.size(q.dim() - 2);
    Tensor lse = dense ? torch::stable::new_empty(q, {q.size(0), heads, q.size(1)}, statistics_type(q))
                       : torch::stable::new_empty(q, {heads, q.size(0)}, statistics_type(q));
    DISPATCH("attention", q, {
        Case<T> a = case_of<T>(q, k, v, documents, dense, causal, left, right, softcap, scale);
        a.out_forward = mutable_data<T>(out);
        a.lse = mutable_data<RealOf<T>>(lse);
        take_turns(static_cast<int64_t>(documents.size()) * a.heads,
                   [&](int64_t task) { forward_tasks_cloned(a, task, task + 1); });
    })
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> attention_bwd(const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in,
                                                 const Tensor& v_in, const Tensor& out_in, const Tensor& lse_in,
                                                 const std::optional<Tensor>& dlse_in,
                                                 const std::optional<Tensor>& bounds_q,
                                                 const std::optional<Tensor>& bounds_k, int64_t, bool causal, int64_t left,
                                                 int64_t right, double softcap, double scale) {
    const Tensor dout = torch::stable::contiguous(dout_in), q = torch::stable::contiguous(q_in);
    const Tensor k = torch::stable::contiguous(k_in), v = torch::stable::contiguous(v_in);
    const Tensor out = torch::stable::contiguous(out_in);
    const Tensor lse = torch::stable::contiguous(torch::stable::to(lse_in, statistics_type(q)));
    std::optional<Tensor> dlse;
    if (dlse_in) dlse = torch::stable::contiguous(torch::stable::to(*dlse_in, statistics_type(q)));
    const auto documents = documents_of(q, k, bounds_q, bounds_k);
    Tensor dq = torch::stable::empty_like(q), dk = torch::stable::empty_like(k), dv = torch::stable::empty_like(v);
    DISPATCH("attention", q, {
        Case<T> a = case_of<T>(q, k, v, documents, !bounds_q, causal, left, right, softcap, scale);
        a.out = data<T>(out);
        a.dout = data<T>(dout);
        a.lse_given = data<RealOf<T>>(lse);
        a.dlse = dlse ? data<RealOf<T>>(*dlse) : nullptr;
        a.dq = mutable_data<T>(dq);
        a.dk = mutable_data<T>(dk);
        a.dv = mutable_data<T>(dv);
        take_turns(static_cast<int64_t>(documents.size()) * a.kv_heads,
                   [&](int64_t task) { backward_tasks_cloned(a, task, task + 1); });
    })
    return {dq, dk, dv};
}

}  // namespace
}  // namespace opencoder

STABLE_TORCH_LIBRARY_IMPL(opencoder, CPU, m) {
    m.impl("attention_fwd", TORCH_BOX(&opencoder::attention_fwd));
    m.impl("attention_bwd", TORCH_BOX(&opencoder::attention_bwd));
}
