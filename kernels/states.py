"""States and weights of N recurrences in two forms: tensors with a storage of their own, as
torch.nn has them, S states [N, B, H], and w_ih to b_hh of one recurrence after the other; and
joined in one, states [N*S, B, H], those of each recurrence together, and w_ih [N*G*H, I], w_hh
[N*G*H, H] and biases [N*G*H]."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .types import Weights


def join_states(states: Sequence[Tensor], N: int) -> Tensor:
    if len(states) == 1:
        return states[0]
    return torch.cat([state[n : n + 1] for n in range(N) for state in states])


def part_states(joined: Tensor, S: int) -> list[Tensor]:
    if S == 1:
        return [joined]
    return [joined[k::S].clone(memory_format=torch.contiguous_format) for k in range(S)]


def part_views(s0: Tensor | None, S: int) -> list[Tensor] | None:
    """Joined states as S views."""
    if s0 is None or S == 1:
        return None if s0 is None else [s0]
    return [s0[k::S] for k in range(S)]


def join_weights(weights: Sequence[Any]) -> Weights:
    if len(weights) == 4:
        return Weights(*weights)
    joined = [None if weights[k] is None else torch.cat([*weights[k::4]]) for k in range(4)]
    return Weights._make(joined)


def part_weights(joined: Sequence[Any], N: int) -> list[Any]:
    parts = [[None] * N if t is None else [part.clone() for part in t.chunk(N)] for t in joined]
    return [part for own in zip(*parts) for part in own]
