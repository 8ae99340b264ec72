"""rnn.RNN and rnn.RNNCell take the place of torch.nn's."""
import pytest
import torch
from cases import CASES, Case, check, random_case
from rnn.kernels.plan import Plan

HOST = [Plan("numpy"), Plan("torch")]


@pytest.mark.parametrize("plan", HOST, ids=lambda plan: plan.backend)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, plan: Plan) -> None:
    half = case.dtype in (torch.float16, torch.bfloat16)
    check(case, None if half else plan)


def test_random_cases(seed: int) -> None:
    check(random_case(seed), HOST[seed % 2])
