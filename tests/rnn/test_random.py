"""Random layers and operators: outputs and all gradients, as exact as torch's own."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from tests.cases import FORMS, LAYER_NAMES, NAMES, Case, check, check_recurrence, thrice
from tests.kernels.cpu.test_cpu import PLANS, suited

SETTINGS: dict[str, Any] = dict(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[*HealthCheck],
    phases=[Phase.generate, Phase.shrink],
)


@st.composite
def layers(draw: Any) -> Case:
    form = draw(st.sampled_from(FORMS))
    mode = draw(st.sampled_from(LAYER_NAMES))
    least = 1 if form in ("packed", "unsorted") else 0
    H = draw(st.integers(1, 20))
    flag = st.booleans()
    return Case(
        T=draw(st.integers(1, 9)),
        B=1 if form == "unbatched" else draw(st.integers(least, 9)),
        I=draw(st.integers(1, 9)),
        H=H,
        form=form,
        layers=draw(st.integers(1, 3)),
        bidirectional=draw(flag),
        nonlinearity=draw(st.sampled_from(["tanh", "relu"])),
        bias=draw(flag),
        batch_first=draw(flag),
        hx=draw(flag),
        dtype=draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])),
        mode=mode,
        proj=draw(st.integers(0, H - 1)) if mode == "LSTM" else 0,
    )


def test_layers(request: pytest.FixtureRequest) -> None:
    @settings(max_examples=request.config.getoption("--cases"), **SETTINGS)
    @given(case=layers(), plan=st.sampled_from(PLANS))
    def run(case: Case, plan: Any) -> None:
        thrice(lambda seed: check(case, suited(plan, case.dtype), seed=seed))

    run()


def test_operator(request: pytest.FixtureRequest) -> None:
    """Resets too, which no layer of torch has."""

    @settings(max_examples=request.config.getoption("--cases"), **SETTINGS)
    @given(
        name=st.sampled_from(NAMES),
        T=st.integers(1, 7),
        B=st.integers(1, 7),
        I=st.integers(1, 7),
        H=st.integers(1, 20),
        reverse=st.sampled_from([(False,), (True,), (False, True)]),
        form=st.sampled_from(["padded", "lengths", "packed"]),
        resets=st.booleans(),
        bias=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.float64]),
        plan=st.sampled_from(PLANS),
    )
    def run(
        name: str,
        T: int,
        B: int,
        I: int,
        H: int,
        reverse: Any,
        form: str,
        resets: bool,
        bias: bool,
        dtype: Any,
        plan: Any,
    ) -> None:
        chosen = suited(plan, dtype)
        sizes = (T, B, I, H)
        thrice(
            lambda seed: check_recurrence(
                name, chosen, sizes, reverse, form, resets, bias, dtype, seed=seed
            )
        )

    run()
