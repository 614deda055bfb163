"""Names of bundles of models: which folder each is, and what is said where it is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from rlhf_mel import load_policy, load_vocoder
from rlhf_mel.speech.recognizer import load_recognizer
from rlhf_mel.storage import ASSETS, bundle


def test_bundles_by_name() -> None:
    assert bundle("tiny") == ASSETS
    assert bundle("F5TTS_v1_Base") is None and bundle(ASSETS) is None


@pytest.mark.parametrize("load", [load_policy, load_vocoder, load_recognizer])
def test_the_former_bundle_is_named_where_it_is_not_there(
    load: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"recipes/former_bundle\.py"):
        load("tiny-v0")  # type: ignore[operator]


def test_the_former_bundle_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle of other durations: the policy reads them from its own policy.json."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "rlhf_mel/tiny-v0"
    shutil.copytree(ASSETS, folder, ignore=shutil.ignore_patterns("prompts", "cmudict*"))
    card = {"units_per_phoneme": 3.0, "weights": {"OW1": 4.0, "N": 1.0, " ": 1.0, ".": 1.0}}
    config = json.loads((folder / "policy.json").read_text()) | {"durations": card}
    (folder / "policy.json").write_text(json.dumps(config))
    policy, bundled = load_policy("tiny-v0"), load_policy("tiny")
    assert policy.tokenizer("no").count("OW1") == 12  # (1 + 1 + 4 + 1) of 3 units each, in proportion
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), bundled.parameters(), strict=True))
    load_vocoder("tiny-v0"), load_recognizer("tiny-v0")
