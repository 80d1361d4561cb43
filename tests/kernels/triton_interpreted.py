"""Run by test_rms_norm.py with TRITON_INTERPRET=1: the Triton kernels against the reference in fp64."""

import torch

from opencoder import kernels as K

EPS = 1e-5
CAPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}


def run(impl, x, w, r, gy, gt):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    r = None if r is None else r.clone().requires_grad_()
    out = K.rms_norm(x, w, eps=EPS, residual=r, impl=impl)
    y, total = out if r is not None else (out, None)
    loss = (y * gy.to(y.dtype)).sum()
    if r is not None:
        loss = loss + (total * gt.to(y.dtype)).sum()
    loss.backward()
    found = [y, x.grad, w.grad]
    return found + ([total, r.grad] if r is not None else [])


cases = 0
for dtype, cap in CAPS.items():
    for shape in [(1, 8), (3, 8), (5, 41), (2, 3, 128), (7, 760)]:
        for with_residual in (False, True):
            g = torch.Generator().manual_seed(cases)
            x, r, gy, gt = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(4))
            w = (1 + 0.1 * torch.randn(shape[-1], generator=g, dtype=torch.float64)).to(dtype)
            r = r if with_residual else None
            wide = [None if t is None else t.double() for t in (x, w, r, gy, gt)]
            for mine, truth in zip(run("triton", x, w, r, gy, gt), run("reference", *wide), strict=True):
                assert mine.dtype == dtype
                assert (mine.double() - truth).norm() <= cap * truth.norm(), (dtype, shape, with_residual)
            cases += 1
x, w = torch.randn(2, 3, dtype=torch.float64).requires_grad_(), torch.randn(3, dtype=torch.float64).requires_grad_()
assert torch.autograd.gradcheck(lambda x, w: K.rms_norm(x, w, eps=EPS, impl="triton"), (x, w))
try:
    K.rms_norm(x.bfloat16(), w, eps=EPS, impl="triton")
except K.UnsupportedKernel as error:
    refusal = str(error)
assert "bf16" in refusal
assert "reference" in refusal
print(cases, "cases equal")
