"""What CUDA refuses, or finds broken, as a RuntimeError that names the plan."""

import re
from types import TracebackType

import torch

from ..plan import Plan, plan_text

# As CuPy has the driver's names, and Triton its texts.
_REFUSALS = re.compile(
    "CUDA_ERROR_(INVALID_CLUSTER_SIZE|COOPERATIVE_LAUNCH_TOO_LARGE|NOT_SUPPORTED|INVALID_VALUE"
    "|LAUNCH_OUT_OF_RESOURCES)|cluster|cooperative|not supported|too many resources"
)


class Refused(RuntimeError):
    """A cluster, or a cooperative launch, that the device does not run."""


class faults_of:
    """A context around what loads or launches a plan's kernel on a device.

    A cluster or a cooperative launch that is refused, too little shared memory, and what an earlier
    kernel left broken: the process' other tensors stay usable after all but the last."""

    __slots__ = ("device", "plan")

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self.device = device

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is None or issubclass(kind, torch.OutOfMemoryError):
            return
        # Triton's own error is none of Python's kinds
        if issubclass(kind, RuntimeError) or kind.__name__ == "OutOfResources":
            together = self.plan.scope in ("cluster", "grid")
            refused = together and _REFUSALS.search(str(error)) is not None
            raise (Refused if refused else RuntimeError)(
                f"{self.device} does not run the plan {plan_text(self.plan)}: {error}. Another can "
                "be given as plan="
            ) from error
