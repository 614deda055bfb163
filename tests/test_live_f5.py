"""What the fixtures hold is what the installed f5-tts computes: `pytest -m f5_tts`, with f5-tts 1.1.22 importable."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import case_inputs
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

FIXTURES = Path(__file__).parent / "fixtures"
pytestmark = [
    pytest.mark.f5_tts,
    pytest.mark.skipif(importlib.util.find_spec("f5_tts") is None, reason="f5-tts is not installed"),
]


@pytest.fixture(scope="module")
def make_fixtures() -> Any:
    import make_fixtures

    return make_fixtures


@pytest.fixture(scope="module")
def upstream(make_fixtures: Any) -> Any:
    return make_fixtures.Upstream()


def assert_recorded(file: str, found: Mapping[str, Tensor]) -> None:
    recorded = {name: value for name, value in load_file(FIXTURES / file).items() if not name.startswith("input/")}
    assert found.keys() == recorded.keys()
    for name, value in found.items():
        assert_close(value, recorded[name], rtol=1e-5, atol=1e-5 * float(recorded[name].abs().max()), msg=name)


def test_dit_and_cfm(make_fixtures: Any, upstream: Any) -> None:
    with torch.no_grad():
        assert_recorded("f5_tts.safetensors", make_fixtures.record_dit(upstream, case_inputs()))


def test_other_backbones(make_fixtures: Any, upstream: Any) -> None:
    with torch.no_grad():
        assert_recorded("f5_tts_backbones.safetensors", make_fixtures.record_backbones(upstream, case_inputs()))


def test_gradients(make_fixtures: Any, upstream: Any) -> None:
    assert_recorded("f5_tts_gradients.safetensors", make_fixtures.record_gradients(upstream, case_inputs()))


def test_pinyin(make_fixtures: Any, upstream: Any) -> None:
    pytest.importorskip("pypinyin")
    lines = (FIXTURES / "f5_tts_pinyin.jsonl").read_text(encoding="utf-8").splitlines()
    assert make_fixtures.record_pinyin() == [json.loads(line) for line in lines]
