// SwiGLU on the CPU: silu(gate) · up, forward and backward, each input read once and each output written once.
//
//   dgate = dout · up · s · (1 + gate · (1 − s)),  dup = dout · gate · s,  s = sigmoid(gate)
#include "common.h"

namespace opencoder {
namespace {

constexpr int64_t kBlock = 1024;  // values converted at a time for 16-bit storage

template <typename T>
struct Forward {
    const T* gate;
    const T* up;
    T* out;
    int64_t size;
    bool stream;
};

template <typename T>
INLINE void forward_blocks(const Forward<T>& a, int64_t begin, int64_t end) {
    using Real = RealOf<T>;
    Real scratch[3][kBlock];
    for (int64_t block = begin; block < end; ++block) {
        const int64_t at = block * kBlock, n = std::min(kBlock, a.size - at);
        const Real* gate = load<Real>(a.gate + at, scratch[0], n);
        const Real* up = load<Real>(a.up + at, scratch[1], n);
        Real* __restrict out = destination<Real>(a.out + at, scratch[2], a.stream);
        SIMD for (int64_t i = 0; i < n; ++i) out[i] = gate[i] / (Real(1) + fast_exp(-gate[i])) * up[i];
        store(static_cast<const Real*>(out), a.out + at, n, a.stream);
    }
}
CLONED_RANGE(forward_blocks, Forward)

template <typename T>
struct Backward {
    const T* dout;
    const T* gate;
    const T* up;
    T* dgate;
    T* dup;
    int64_t size;
    bool stream;
};

template <typename T>
INLINE void backward_blocks(const Backward<T>& a, int64_t begin, int64_t end) {
    using Real = RealOf<T>;
    Real scratch[5][kBlock];
    for (int64_t block = begin; block < end; ++block) {
        const int64_t at = block * kBlock, n = std::min(kBlock, a.size - at);
        const Real* dout = load<Real>(a.dout + at, scratch[0], n);
        const Real* gate = load<Real>(a.gate + at, scratch[1], n);
        const Real* up = load<Real>(a.up + at, scratch[2], n);
        Real* __restrict dgate = destination<Real>(a.dgate + at, scratch[3], a.stream);
        Real* __restrict dup = destination<Real>(a.dup + at, scratch[4], a.stream);
        SIMD for (int64_t i = 0; i < n; ++i) {
            const Real s = Real(1) / (Real(1) + fast_exp(-gate[i]));
            dup[i] = dout[i] * gate[i] * s;
            dgate[i] = dout[i] * up[i] * s * (Real(1) + gate[i] * (Real(1) - s));
        }
        store(static_cast<const Real*>(dgate), a.dgate + at, n, a.stream);
        store(static_cast<const Real*>(dup), a.dup + at, n, a.stream);
    }
}
CLONED_RANGE(backward_blocks, Backward)

void check(const Tensor& a, const Tensor& b) {
    STD_TORCH_CHECK(a.numel() == b.numel() && a.scalar_type() == b.scalar_type(),
                    "swiglu: all tensors must have one shape and type");
}

int64_t blocks_of(const Tensor& x) { return (x.numel() + kBlock - 1) / kBlock; }

Tensor swiglu_fwd(const Tensor& gate_in, const Tensor& up_in) {
    const Tensor gate = torch::stable::contiguous(gate_in), up = torch::stable::contiguous(up_in);
    check(gate, up);
    Tensor out = torch::stable::empty_like(gate);
    DISPATCH("swiglu", gate, {
        const bool stream = streams(3 * gate.numel() * sizeof(T), {mutable_data<T>(out)}, kBlock * sizeof(T));
        const Forward<T> a{data<T>(gate), data<T>(up), mutable_data<T>(out), gate.numel(), stream};
        PARALLEL(forward_blocks, a, blocks_of(gate), kBlock * sizeof(T));
    })
    return out;
}

std::tuple<Tensor, Tensor> swiglu_bwd(const Tensor& dout_in, const Tensor& gate_in, const Tensor& up_in) {
    const Tensor dout = torch::stable::contiguous(dout_in), gate = torch::stable::contiguous(gate_in);
    const Tensor up = torch::stable::contiguous(up_in);
    check(gate, up);
    check(gate, dout);
    Tensor dgate = torch::stable::empty_like(gate), dup = torch::stable::empty_like(gate);
    DISPATCH("swiglu", gate, {
        const bool stream =
            streams(5 * gate.numel() * sizeof(T), {mutable_data<T>(dgate), mutable_data<T>(dup)}, kBlock * sizeof(T));
        const Backward<T> a{data<T>(dout), data<T>(gate), data<T>(up), mutable_data<T>(dgate), mutable_data<T>(dup), gate.numel(), stream};
        PARALLEL(backward_blocks, a, blocks_of(gate), kBlock * sizeof(T));
    })
    return {dgate, dup};
}

}  // namespace
}  // namespace opencoder

STABLE_TORCH_LIBRARY_IMPL(opencoder, CPU, m) {
    m.impl("swiglu_fwd", TORCH_BOX(&opencoder::swiglu_fwd));
    m.impl("swiglu_bwd", TORCH_BOX(&opencoder::swiglu_bwd));
}
