// Rotary embedding on the CPU: q and k in one pass, half-split pairs, out of place or in place. The backward is the same
// rotation with the angle negated.
//
//   (a, b) -> (a · cos − b · sin, b · cos + a · sin), a = x[i], b = x[i + R/2], i < R/2; dims from R on pass unchanged
#include "common.h"

namespace opencoder {
namespace {

template <typename T>
struct Turn {
    const T* q;
    const T* k;
    T* q_out;  // may be q itself
    T* k_out;
    const float* cos;
    const float* sin;
    int64_t q_heads, k_heads, head_dim, half;
    int64_t positions;  // S; tokens are (B, S)
    bool per_batch;     // cos and sin are (B, S, R/2), not (S, R/2)
    float direction;    // +1, or −1 for the inverse
};

template <typename T>
INLINE void turn_head(const T* x, T* out, const float* cos, const float* sin, float direction, int64_t half,
                      int64_t head_dim) {
    using Real = RealOf<T>;
    SIMD for (int64_t i = 0; i < half; ++i) {
        const Real a = widen(x[i]), b = widen(x[half + i]);
        const Real c = cos[i], s = direction * sin[i];
        out[i] = narrow<T>(a * c - b * s);
        out[half + i] = narrow<T>(b * c + a * s);
    }
    if (out != x)
        for (int64_t i = 2 * half; i < head_dim; ++i) out[i] = x[i];
}

template <typename T>
INLINE void turn_tokens(const Turn<T>& a, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
        const int64_t at = (a.per_batch ? token : token % a.positions) * a.half;
        for (int64_t head = 0; head < a.q_heads; ++head) {
            const int64_t offset = (token * a.q_heads + head) * a.head_dim;
            turn_head(a.q + offset, a.q_out + offset, a.cos + at, a.sin + at, a.direction, a.half, a.head_dim);
        }
        for (int64_t head = 0; head < a.k_heads; ++head) {
            const int64_t offset = (token * a.k_heads + head) * a.head_dim;
            turn_head(a.k + offset, a.k_out + offset, a.cos + at, a.sin + at, a.direction, a.half, a.head_dim);
        }
    }
}
CLONED_RANGE(turn_tokens, Turn)

void turn(const Tensor& q, const Tensor& k, Tensor& q_out, Tensor& k_out, const Tensor& cos_in, const Tensor& sin_in,
          bool inverse) {
    const Tensor cos = torch::stable::contiguous(cos_in), sin = torch::stable::contiguous(sin_in);
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(0) == k.size(0) && q.size(1) == k.size(1) &&
                        q.size(3) == k.size(3) && q.scalar_type() == k.scalar_type(),
                    "rotary: q and k must be (B,S,H,D) and (B,S,G,D) of one type");
    STD_TORCH_CHECK(cos.scalar_type() == ScalarType::Float && sin.scalar_type() == ScalarType::Float,
                    "rotary: cos and sin must be fp32");
    const int64_t half = cos.size(cos.dim() - 1), tokens = q.size(0) * q.size(1);
    const bool per_batch = cos.dim() == 3 && cos.size(0) > 1;
    STD_TORCH_CHECK(2 * half <= q.size(3) && cos.numel() == sin.numel() &&
                        cos.numel() == half * (per_batch ? tokens : q.size(1)),
                    "rotary: cos and sin must be (S, R/2) or (B, S, R/2) with R <= D");
    DISPATCH("rotary", q, {
        const Turn<T> a{data<T>(q),        data<T>(k),        mutable_data<T>(q_out),
                        mutable_data<T>(k_out), data<float>(cos), data<float>(sin),
                        q.size(2),         k.size(2),         q.size(3),
                        half,              q.size(1),         per_batch,
                        inverse ? -1.0f : 1.0f};
        PARALLEL(turn_tokens, a, tokens, (q.size(2) + k.size(2)) * q.size(3) * sizeof(T));
    })
}

std::tuple<Tensor, Tensor> rotary(const Tensor& q_in, const Tensor& k_in, const Tensor& cos, const Tensor& sin,
                                  bool inverse) {
    const Tensor q = torch::stable::contiguous(q_in), k = torch::stable::contiguous(k_in);
    Tensor q_out = torch::stable::empty_like(q), k_out = torch::stable::empty_like(k);
    turn(q, k, q_out, k_out, cos, sin, inverse);
    return {q_out, k_out};
}

void rotary_in_place(Tensor q, Tensor k, const Tensor& cos, const Tensor& sin, bool inverse) {
    STD_TORCH_CHECK(q.is_contiguous() && k.is_contiguous(), "rotary: in place needs contiguous q and k");
    turn(q, k, q, k, cos, sin, inverse);
}

}  // namespace
}  // namespace opencoder

STABLE_TORCH_LIBRARY_IMPL(opencoder, CPU, m) {
    m.impl("rotary", TORCH_BOX(&opencoder::rotary));
    m.impl("rotary_", TORCH_BOX(&opencoder::rotary_in_place));
}
