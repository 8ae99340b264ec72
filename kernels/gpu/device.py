"""What plans have to know of a device."""

from functools import lru_cache

import torch

from ..plan import Gpu


@lru_cache
def describe(device: torch.device, cuda: bool) -> Gpu:
    """The device; `cuda` says that CUDA C++ can be compiled and launched. The driver is asked once
    for each device how many clusters it runs."""
    found = torch.cuda.get_device_properties(device)
    capability = 10 * found.major + found.minor
    shared = getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block)
    gpu = Gpu(capability, found.multi_processor_count, shared, cuda, device=found.name)
    if not cuda or not gpu.active_clusters(2):
        return gpu
    # imported late: CuPy may be missing
    from .cuda.occupancy import active_clusters

    with torch.cuda.device(device):
        return gpu._replace(clusters=active_clusters(capability, shared))
