"""The large products in float32, in the precision of the plan.

torch.nn does all of a layer's products as `torch.backends.cudnn.rnn` says, by default in TF32; but
`torch.mm` follows `torch.backends.cuda.matmul`, by default to full precision. Where the two differ
the product goes to the cuBLAS that torch has loaded, by torch's own handle (its stream, its
workspace), with the precision as an argument: torch's switch is the whole process', and other
threads compute meanwhile."""

import ctypes
import os
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..notices import warn

CUDA_R_32F = 0
# cublasComputeType_t: whatever the handle's own mode is
COMPUTE_TYPES = dict(tf32=77, ieee=69)
DEFAULT_ALGORITHM = -1
_SWITCH: Any = torch.backends.cuda.matmul


@cache
def _library() -> Any:
    """cuBLAS, if it is a library that torch has loaded; None where it is part of torch's own."""
    major = (torch.version.cuda or "").partition(".")[0]
    # the library that is loaded, whose handle torch has, or none
    mode = getattr(os, "RTLD_NOLOAD", 0) | getattr(os, "RTLD_LAZY", 0)
    try:
        return ctypes.CDLL(f"libcublas.so.{major}", mode)
    except OSError as error:
        warn(
            "rnn: float32 products with the input and for the gradients follow "
            f"torch.backends.cuda.matmul, as cuBLAS cannot be called: {error}"
        )
        return None


def differing(x: Tensor, precision: str) -> str:
    """The precision of a plan where torch's own products with `x` would have another, or ""."""
    if x.dtype != torch.float32 or not x.is_cuda:
        return ""
    differs = (precision == "tf32") != (_SWITCH.fp32_precision == "tf32")
    return precision if differs and _library() is not None else ""


def _gemm(a: Tensor, b: Tensor, out: Tensor, precision: str, add: bool) -> Tensor:
    """out [M, N] = a b, or out + a b; `a` and `b` are matrices or transposed ones."""
    M, N = out.shape
    if not out.numel():
        return out
    if not a.shape[1]:
        return out if add else out.zero_()
    # cuBLAS has columns first: out^T = b^T a^T
    factors = [t if 1 in t.stride() else t.contiguous() for t in (b, a)]
    transposed = [t.stride(1) != 1 for t in factors]
    # from one row, or column, to the next; no less than its length, also where there is one alone
    pitches = [
        max(t.stride(0), t.shape[1]) if t.stride(1) == 1 else max(t.stride(1), t.shape[0])
        for t in factors
    ]
    alpha = ctypes.c_float(1)
    beta = ctypes.c_float(add)
    integer = ctypes.c_int64
    operands = [
        part
        for t, pitch in zip(factors, pitches)
        for part in (ctypes.c_void_p(t.data_ptr()), CUDA_R_32F, integer(pitch))
    ]
    status = _library().cublasGemmEx_64(
        ctypes.c_void_p(torch.cuda.current_blas_handle()),
        *map(int, transposed),
        integer(N),
        integer(M),
        integer(a.shape[1]),
        ctypes.byref(alpha),
        *operands,
        ctypes.byref(beta),
        ctypes.c_void_p(out.data_ptr()),
        CUDA_R_32F,
        integer(N),
        COMPUTE_TYPES["tf32" if precision == "tf32" else "ieee"],
        DEFAULT_ALGORITHM,
    )
    if status:
        raise RuntimeError(f"cublasGemmEx failed with status {status}")
    return out


def linear(x: Tensor, w: Tensor, b: Tensor | None, precision: str) -> Tensor:
    """x [R, I] times w^T [I, K], plus b; here and below `precision` is that of `differing`."""
    if not precision:
        return F.linear(x, w, b)
    if b is None:
        return _gemm(x, w.T, x.new_empty(len(x), len(w)), precision, False)
    return _gemm(x, w.T, b.repeat(len(x), 1), precision, True)


def mm(a: Tensor, b: Tensor, precision: str, out: Tensor | None = None) -> Tensor:
    """[M, K] times [K, N], into `out`."""
    if not precision:
        return torch.mm(a, b, out=out)
    if out is None:
        out = a.new_empty(a.shape[0], b.shape[1])
    return _gemm(a, b, out, precision, False)


def add_mm(out: Tensor, a: Tensor, b: Tensor, precision: str) -> None:
    """`out` += a b."""
    if not precision:
        torch.addmm(out, a, b, out=out)
        return
    _gemm(a, b, out, precision, True)


def bmm(a: Tensor, b: Tensor, out: Tensor, precision: str) -> None:
    """`out` [N, M, J] = a b, each of N products."""
    if not precision:
        torch.bmm(a, b, out=out)
        return
    for a_n, b_n, out_n in zip(a, b, out):
        _gemm(a_n, b_n, out_n, precision, False)
