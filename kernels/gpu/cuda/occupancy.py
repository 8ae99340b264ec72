"""How many clusters run at once, as the driver says: GPCs differ in size, and so this is less than
the multiprocessors would have room for."""

import ctypes
from functools import cache
from typing import Any

import torch

from ...plan import CLUSTERS
from .launch import NON_PORTABLE_CLUSTER_SIZE, build

PROBE = 'extern "C" __global__ void probe() {}'
THREADS = 256
# CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
DYNAMIC_SHARED_BYTES = 8
CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_...
INVALID_CLUSTER_SIZE = 912  # CUDA_ERROR_...


class _LaunchAttribute(ctypes.Structure):
    """The driver's CUlaunchAttribute, for a cluster's size: a union of 64 bytes."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("size", ctypes.c_uint * 16),
    )


class _LaunchConfig(ctypes.Structure):
    """The driver's CUlaunchConfig."""

    _fields_ = (
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def active_clusters(capability: int, shared: int) -> tuple[int, ...]:
    """Of clusters of 2, 4, 8 and 16 blocks, each with `shared` bytes, on the current device; 0 for
    a size that the driver refuses. Empty where it does not answer."""
    try:
        driver = _driver()
        cubin = build(PROBE, capability)[0]
    # no driver, or a compiler that does not know the device
    except (OSError, RuntimeError):
        return ()
    module = ctypes.c_void_p()
    if not _has_context(driver) or driver.cuModuleLoadData(ctypes.byref(module), cubin):
        return ()
    try:
        return _counts(driver, module, shared)
    finally:
        driver.cuModuleUnload(module)


def _has_context(driver: Any) -> bool:
    """Whether this thread has a context now: the device's, where it had none. The runtime, and so
    torch, gives a thread one at its first call, which may be yet to come; the driver does not."""
    context = ctypes.c_void_p()
    if driver.cuCtxGetCurrent(ctypes.byref(context)):
        return False
    if context:
        return True
    device = ctypes.c_int()
    return not (
        driver.cuDeviceGet(ctypes.byref(device), torch.cuda.current_device())
        or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        or driver.cuCtxSetCurrent(context)
    )


def _counts(driver: Any, module: ctypes.c_void_p, shared: int) -> tuple[int, ...]:
    probe = ctypes.c_void_p()
    if driver.cuModuleGetFunction(ctypes.byref(probe), module, b"probe"):
        return ()
    for attribute, value in ((DYNAMIC_SHARED_BYTES, shared), (NON_PORTABLE_CLUSTER_SIZE, 1)):
        if driver.cuFuncSetAttribute(probe, attribute, value):
            return ()
    found = []
    for blocks in CLUSTERS:
        size = (ctypes.c_uint * 16)(blocks, 1, 1)
        attribute_of_size = _LaunchAttribute(CLUSTER_DIMENSION, 0, size)
        pointer = ctypes.pointer(attribute_of_size)
        config = _LaunchConfig(blocks, 1, 1, THREADS, 1, 1, shared, None, pointer, 1)
        count = ctypes.c_int()
        status = driver.cuOccupancyMaxActiveClusters(
            ctypes.byref(count), probe, ctypes.byref(config)
        )
        if status not in (0, INVALID_CLUSTER_SIZE):
            return ()
        found.append(0 if status else count.value)
    return tuple(found)
