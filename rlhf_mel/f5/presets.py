"""The models that F5-TTS publishes, by name: what a checkpoint does not say of itself, and where it is kept.

Sizes and flags are those of f5-tts 1.1.22's configs/NAME.yaml. F5TTS_v1_Base and F5TTS_Base have the same tensors, so
only the name tells which flags (`text_mask_padding`, `pe_attn_head`) a file was trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.storage import download


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """One F5-TTS configuration."""

    arch: Mapping[str, Any]
    backbone: str = "DiT"
    tokenizer: str = "pinyin"
    mel_spec: MelSpec = field(default_factory=MelSpec)
    repo: str | None = None
    """Hub repository; None: the configuration is published, weights are not."""
    weights: str = ""
    """File in `repo`; its vocab.txt is in the same folder."""


V1: Mapping[str, Any] = dict(text_mask_padding=True, pe_attn_head=None)


V0: Mapping[str, Any] = dict(text_mask_padding=False, pe_attn_head=1)


BASE: Mapping[str, Any] = dict(dim=1024, depth=22, heads=16, ff_mult=2, text_dim=512, conv_layers=4)


SMALL: Mapping[str, Any] = dict(dim=768, depth=18, heads=12, ff_mult=2, text_dim=512, conv_layers=4)


E2_BASE: Mapping[str, Any] = dict(dim=1024, depth=24, heads=16, ff_mult=4)


E2_SMALL: Mapping[str, Any] = dict(dim=768, depth=20, heads=12, ff_mult=4)


PUBLISHED: Mapping[str, PublishedModel] = {
    "F5TTS_v1_Base": PublishedModel(
        arch={**BASE, **V1}, repo="SWivid/F5-TTS", weights="F5TTS_v1_Base/model_1250000.safetensors"
    ),
    "F5TTS_v1_Base_no_zero_init": PublishedModel(
        arch={**BASE, **V1}, repo="SWivid/F5-TTS", weights="F5TTS_v1_Base_no_zero_init/model_1250000.safetensors"
    ),
    "F5TTS_Base": PublishedModel(
        arch={**BASE, **V0}, repo="SWivid/F5-TTS", weights="F5TTS_Base/model_1200000.safetensors"
    ),
    "F5TTS_Base_bigvgan": PublishedModel(
        arch={**BASE, **V0},
        mel_spec=MelSpec(kind="bigvgan"),
        repo="SWivid/F5-TTS",
        weights="F5TTS_Base_bigvgan/model_1250000.pt",
    ),
    "E2TTS_Base": PublishedModel(
        backbone="UNetT", arch={**E2_BASE, **V0}, repo="SWivid/E2-TTS", weights="E2TTS_Base/model_1200000.safetensors"
    ),
    "F5TTS_v1_Small": PublishedModel(arch={**SMALL, **V1}, tokenizer="char"),
    "F5TTS_Small": PublishedModel(arch={**SMALL, **V0}),
    "E2TTS_Small": PublishedModel(backbone="UNetT", arch={**E2_SMALL, **V0}),
}


def find_model(name: str) -> PublishedModel:
    """The model called `name`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in PUBLISHED:
        raise ValueError(f"model: expected one of {list(PUBLISHED)}, got {name!r}")
    return PUBLISHED[name]


def download_model(name: str) -> tuple[Path, Path]:
    """Weights and vocab.txt of a published model, from the hub or its cache (HF_HUB_OFFLINE: from the cache only).

    Raises:
        FileNotFoundError: no weights of that name are published, or the hub cannot be reached.
    """
    model = find_model(name)
    if model.repo is None:
        with_weights = [known for known, published in PUBLISHED.items() if published.repo]
        raise FileNotFoundError(
            f"{name}: expected published weights ({with_weights}), but F5-TTS published only its configuration;"
            f" load your own with load_policy(path, model={name!r}, vocab=...)"
        )
    vocab = str(Path(model.weights).with_name("vocab.txt"))
    remedy = f"a local file: load_policy(path, model={name!r}, vocab=...)"
    return download(model.repo, model.weights, remedy=remedy), download(model.repo, vocab, remedy=remedy)
