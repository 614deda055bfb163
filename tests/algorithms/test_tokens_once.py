"""A text is tokenised once, however many policies of an update read it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from rlhf_mel.algorithms.base import load_algorithm
from rlhf_mel.data.prompts import load_prompts
from rlhf_mel.f5.checkpoints import load_policy
from rlhf_mel.flow.reference import ReferencePolicy
from rlhf_mel.pipeline import Pipeline, Sampling
from rlhf_mel.rewards.combine import Rewards
from rlhf_mel.speech.text import Tokenizer
from rlhf_mel.types import Audio, Prompts
from rlhf_mel.vocoders import load_vocoder

CALLS: Counter[tuple[Any, ...]] = Counter()
"""Arguments of each call, those of copies of a tokenizer included."""


class Counted:
    """A tokenizer that counts what it is asked."""

    name = "phoneme"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: str, frames: int | None = None) -> list[str]:
        CALLS["tokens", text, frames] += 1
        return self.tokenizer(text, frames)

    def prompt(self, *arguments: Any) -> list[str]:
        CALLS[("prompt", *arguments)] += 1
        return self.tokenizer.prompt(*arguments)

    def spoken_length(self, text: str) -> float:
        CALLS["spoken_length", text] += 1
        return self.tokenizer.spoken_length(text)


class Loudness:
    name, differentiable, domain, sample_rate_hz, range = "loudness", True, "waveform", None, (0.0, 1.0)
    needs: frozenset[str] = frozenset()

    def score(self, audio: Audio, prompts: Prompts) -> torch.Tensor:
        return audio.waveform.square().mean(1)


@pytest.mark.parametrize("name", ["draft", "flow_grpo"])
def test_an_update_of_the_bundled_policy_tokenises_each_text_once(name: str) -> None:
    policy = load_policy("tiny")
    policy.tokenizer = Counted(policy.tokenizer)
    dataset = load_prompts("tiny", split="train", mel_spec=policy.mel_spec)
    prompts = dataset.collate([dataset[row] for row in (0, 0, 1, 1)])
    algorithm = load_algorithm(name, beta=0.1)
    pipeline = Pipeline(
        policy=policy,
        vocoder=load_vocoder("tiny"),
        rewards=Rewards([Loudness()]),
        reference=ReferencePolicy(policy),
        sampling=Sampling(steps=4, cfg_strength=0.0),
    )
    CALLS.clear()
    with torch.no_grad():
        collected = algorithm.collect(pipeline, prompts, torch.Generator().manual_seed(0))
    algorithm.loss(pipeline, collected, torch.Generator().manual_seed(1))

    texts = {text.strip() for text in (*prompts.texts, *prompts.reference_texts)}
    assert {key[1] for key in CALLS if key[0] == "tokens"} == texts
    assert sum(key[0] == "prompt" for key in CALLS) == 2  # two different prompts, at one duration each
    assert set(CALLS.values()) == {1}
