"""Operators of weight_gradients.py keep what they declare: schema, shapes, dtypes, strides (torch.library.opcheck)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_mel.f5.layers import rotary_table
from rlhf_mel.f5.speed import weight_gradients

pytestmark = pytest.mark.rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def arguments(name: str) -> tuple[Any, ...]:
    x, row = drawn(2, 10, 16), drawn(2, 1, 32)[..., 16:]
    across = drawn(2, 16, 10).transpose(1, 2)  # as products of matrices may come
    cos, sin = (table.to(DEVICE) for table in rotary_table(10, 8))
    return {
        "add_weight_gradient_": (drawn(16, 16), x, across),
        "turned_projections": (x, drawn(48, 16), drawn(48), cos, sin, 4),
        "turned_back": (x, across, x, cos, sin, 4),
        "gelu_gradient": (x, across),
        "norm_gradient": (x, row, across, x, 1e-6),
        "gate_gradient": (across, row, x, torch.ones(2, 10, dtype=torch.bool, device=DEVICE)),
    }[name]


@pytest.mark.parametrize(
    "name",
    ["add_weight_gradient_", "turned_projections", "turned_back", "gelu_gradient", "norm_gradient", "gate_gradient"],
)
def test_operators_are_as_they_say(name: str) -> None:
    torch.library.opcheck(getattr(weight_gradients, name), arguments(name))


def test_parts_of_one_tensor_stay_where_they_are() -> None:
    whole = drawn(6, 4)
    assert weight_gradients.side_by_side(whole.chunk(3)).data_ptr() == whole.data_ptr()
    assert torch.equal(weight_gradients.side_by_side(whole.chunk(3)), whole)
    exchanged = [whole[2:4], whole[:2], whole[4:]]
    assert torch.equal(weight_gradients.side_by_side(exchanged), torch.cat(exchanged))


def test_neighbours_in_memory_are_not_parts_of_one_tensor() -> None:
    memory = bytearray(torch.arange(6.0).numpy().tobytes())
    parts = [torch.frombuffer(memory, dtype=torch.float32, count=2, offset=8 * k) for k in range(3)]
    assert parts[1].data_ptr() == parts[0].data_ptr() + 8
    found = weight_gradients.side_by_side(parts)
    assert torch.equal(found, torch.arange(6.0)) and found.data_ptr() != parts[0].data_ptr()
