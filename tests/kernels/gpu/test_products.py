"""The large products of float32 layers, in the precision of the plan and not of torch's switch; by
a stand-in for cuBLAS."""

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rnn.kernels.gpu import products

TF32 = 77
PEDANTIC = 69


class Cublas:
    """cublasGemmEx_64 by its documentation: matrices column by column, C = alpha op(A) op(B) +
    beta C."""

    def __init__(self) -> None:
        self.types = list[int]()
        self.status = 0

    def cublasGemmEx_64(
        self,
        handle: Any,
        transa: int,
        transb: int,
        m: Any,
        n: Any,
        k: Any,
        alpha: Any,
        a: Any,
        a_type: int,
        lda: Any,
        b: Any,
        b_type: int,
        ldb: Any,
        beta: Any,
        c: Any,
        c_type: int,
        ldc: Any,
        compute: int,
        algorithm: int,
    ) -> int:
        assert handle.value == 5 and algorithm == -1 and a_type == b_type == c_type == 0
        self.types.append(compute)
        m, n, k = (size.value for size in (m, n, k))

        def columns(at: Any, rows: int, count: int, pitch: Any) -> np.ndarray[Any, Any]:
            """[rows, count], its columns `pitch` numbers apart."""
            assert pitch.value >= max(1, rows)
            pointer = ctypes.cast(at, ctypes.POINTER(ctypes.c_float))
            flat = np.ctypeslib.as_array(pointer, (pitch.value * (count - 1) + rows,))
            return np.lib.stride_tricks.as_strided(flat, (rows, count), (4, 4 * pitch.value))

        left = columns(a, k, m, lda).T if transa else columns(a, m, k, lda)
        right = columns(b, n, k, ldb).T if transb else columns(b, k, n, ldb)
        found = columns(c, m, n, ldc)
        product = left.astype(np.float64) @ right.astype(np.float64)
        found[:] = alpha._obj.value * product + (beta._obj.value and beta._obj.value * found)
        return self.status


@pytest.fixture
def cublas(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cublas]:
    library = Cublas()
    switch: Any = torch.backends.cuda.matmul
    before = switch.fp32_precision
    monkeypatch.setattr(products, "_library", lambda: library)
    monkeypatch.setattr(torch.cuda, "current_blas_handle", lambda: 5)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    yield library
    switch.fp32_precision = before


def product(function: Any, precision: str, *tensors: Tensor) -> Tensor:
    """In this precision of a plan."""
    found: Tensor = function(*tensors, products.differing(tensors[0], precision))
    return found


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(7, 3, 5), (1, 3, 5), (7, 1, 5), (7, 3, 1), (1, 1, 1), (0, 3, 5)])
def test_linear(size: tuple[int, int, int], bias: bool, cublas: Cublas) -> None:
    R, I, K = size
    x, w, b = randn(R, I), randn(K, I), randn(K) if bias else None
    right = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    before = None if b is None else b.clone()
    found = products.linear(x, w, b, products.differing(x, "tf32"))
    torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=1e-6)
    assert found.is_contiguous() and cublas.types == [TF32] * bool(R)
    assert b is None or (before is not None and torch.equal(b, before))


@pytest.mark.parametrize("size", [(7, 3, 5), (1, 3, 5), (7, 1, 5), (7, 3, 1), (1, 1, 1), (7, 0, 5)])
def test_gradients(size: tuple[int, int, int], cublas: Cublas) -> None:
    """Of rows of one of several directions, transposed, a block of steps of them, and in sums."""
    R, K, H = size
    for d in (randn(R, K), randn(R, 3 * K).chunk(3, 1)[1] if K else randn(R, K)):
        h = randn(R, 2 * H).chunk(2, 1)[1]
        w = randn(K, H)
        exact = d.double().T @ h.double()
        torch.testing.assert_close(product(products.mm, "tf32", d.T, h).double(), exact)
        more = randn(*exact.shape)
        right = more.double() + exact
        products.add_mm(more, d.T, h, products.differing(d, "tf32"))
        torch.testing.assert_close(more.double(), right)
        right = d.double() @ w.double()
        torch.testing.assert_close(product(products.mm, "tf32", d, w).double(), right)


@pytest.mark.parametrize("N", [1, 2])
def test_products_of_a_step(N: int, cublas: Cublas) -> None:
    """Scope library's, forward and of the adjoint."""
    B, G, H = 5, 3, 4
    h = randn(N, B, H)
    dr = randn(N, B, G * H)
    w = randn(N, G * H, H)
    for a, b in ((h, w.mT), (dr, w)):
        out = torch.full((N, B, b.shape[2]), float("nan"))
        products.bmm(a, b, out, products.differing(a, "tf32"))
        torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)
        products.bmm(a, b, out.fill_(float("nan")), products.differing(a, "tf32x3"))
        torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)
    assert cublas.types == [TF32] * 2 * N


@pytest.mark.parametrize(
    ("switch", "precision", "types"),
    [
        ("none", "tf32", [TF32]),
        ("ieee", "tf32", [TF32]),
        ("tf32", "tf32", []),
        ("none", "tf32x3", []),
        ("ieee", "tf32x3", []),
        ("tf32", "tf32x3", [PEDANTIC]),
        ("tf32", "ieee", [PEDANTIC]),
    ],
)
def test_who_multiplies(switch: str, precision: str, types: list[int], cublas: Cublas) -> None:
    """torch itself, where its switch says the same; the switch stays as it is."""
    matmul: Any = torch.backends.cuda.matmul
    if switch != "none":
        matmul.fp32_precision = switch
    state = matmul.fp32_precision
    product(products.mm, precision, randn(3, 4), randn(4, 5))
    assert cublas.types == types and matmul.fp32_precision == state
    product(products.mm, precision, randn(3, 4).double(), randn(4, 5).double())
    product(products.mm, "ieee", randn(3, 4).half(), randn(4, 5).half())
    assert cublas.types == types


def test_the_older_switch(cublas: Cublas) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        product(products.mm, "tf32", randn(3, 4), randn(4, 5))
        assert cublas.types == []
        product(products.mm, "tf32x3", randn(3, 4), randn(4, 5))
        assert cublas.types == [PEDANTIC]
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_cublas_refuses(cublas: Cublas) -> None:
    cublas.status = 13
    with pytest.raises(RuntimeError, match="cublasGemmEx failed with status 13"):
        product(products.mm, "tf32", randn(3, 4), randn(4, 5))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own product, and a word once."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    products._library.cache_clear()

    def missing(*_: Any) -> None:
        raise OSError("cannot open libcublas")

    monkeypatch.setattr(products.ctypes, "CDLL", missing)
    a, b = randn(3, 4), randn(4, 5)
    with pytest.warns(UserWarning, match=r"follow torch.backends.cuda.matmul.*cannot open"):
        found = product(products.mm, "tf32", a, b)
    assert torch.equal(found, torch.mm(a, b))
    assert torch.equal(product(products.mm, "tf32", a, b), found)
    products._library.cache_clear()
