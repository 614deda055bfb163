"""Flows that are no CFM, that of docs/foreign_flows.md and Matcha: trained, resumed, judged, saved, loaded, sampled."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import soundfile
import tiny_matcha
import torch
from peft import LoraConfig
from problems import reference_of
from safetensors.torch import load_file
from torch import Tensor

from rlhf_mel import RLHFConfig, RLHFTrainer, cli, policies
from rlhf_mel.adapters.matcha import MatchaPolicy
from rlhf_mel.flow.policy import Policy, PolicyWrapper, rollout
from rlhf_mel.types import Audio, Prompts

PAGE = Path(__file__).parents[1] / "docs/foreign_flows.md"
CLIP = reference_of("joe")


@pytest.fixture(autouse=True)
def my_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's example as a module that can be imported."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "class MyFlow" in block]
    (tmp_path / "my_flow.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_flow", None)


@dataclass(frozen=True)
class Flow:
    """A policy by the function that makes it, a vocoder of its mels, and what a saved one says it is."""

    policy: str
    vocoder: str
    saved_as: str


OWN = Flow("my_flow:build", "tiny", "my_flow.MyFlow")
MATCHA = Flow("tiny_matcha:build", "tiny_matcha:Tone", "rlhf_mel.adapters.matcha.MatchaPolicy")
SHAPED = Flow("tiny_matcha:build_shaped", "tiny_matcha:Tone", "rlhf_mel.adapters.matcha.MatchaPolicy")


@pytest.fixture(params=[OWN, MATCHA, SHAPED], ids=["own", "matcha", "matcha_shaped"])
def flow(request: pytest.FixtureRequest) -> Flow:
    """Matcha itself where its package is installed, else what has its seams alone."""
    if request.param is MATCHA:
        pytest.importorskip("matcha")
    chosen: Flow = request.param
    return chosen


class Louder:
    """The mean of the waveform's square."""

    name, differentiable, domain, sample_rate_hz = "louder", True, "waveform", None
    needs: frozenset[str] = frozenset()
    range = (0.0, 1.0)

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        return audio.waveform.square().sum(-1) / audio.lengths_samples


def run(folder: Path, flow: Flow, lora: bool, algorithm: str = "draft", **options: Any) -> RLHFTrainer:
    args = RLHFConfig(
        output_dir=str(folder),
        use_cpu=True,
        policy=flow.policy,
        vocoder=flow.vocoder,
        recognizer="none",
        algorithm=algorithm,
        num_eval_prompts=1,
        sampling_steps=2,
        learning_rate=1e-2,
        disable_tqdm=True,
        **{"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1, "save_total_limit": 2, **options},
    )
    peft = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.0) if lora else None
    torch.manual_seed(0)  # the example draws its first weights as PyTorch does
    return RLHFTrainer(reward_models=[Louder()], args=args, peft_config=peft)


def said_by(policy: Any, text: str) -> Tensor:
    """Log mel [T, M] of one text after a clip of noise."""
    clip = 0.1 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(1))
    prompts = Prompts([text], clip, torch.tensor([4000]), ["One."], policy.mel_spec.sample_rate_hz)
    options: dict[str, Any] = dict(steps=2, grad_steps=0, generator=torch.Generator().manual_seed(0))
    return rollout(policy, prompts, **options).mel[0]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_it_trains_resumes_is_judged_saved_and_speaks(tmp_path: Path, flow: Flow, lora: bool) -> None:
    trained = run(tmp_path / "run", flow, lora)
    first = {name: weight.clone() for name, weight in trained.policy.named_parameters()}
    trained.train()
    moved = [name for name, weight in trained.policy.named_parameters() if not torch.equal(weight, first[name])]
    assert moved and all(("lora_" in name) == lora for name in moved)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {"reward", "dnsmos_ovrl"} <= summary["after"].keys() and summary["verdict"]["overall"]

    resumed = run(tmp_path / "resumed", flow, lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    for name, weight in trained.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], weight), name

    saved = tmp_path / "run/policy"
    assert json.loads((saved / "policy.json").read_text()) == {"flow": flow.saved_as}
    torch.manual_seed(0)
    fresh = policies.load(flow.policy)
    loaded = policies.load(flow.policy, weights=saved)
    mel = said_by(loaded, "Well then.")
    torch.testing.assert_close(mel, said_by(trained.policy, "Well then."), rtol=1e-4, atol=1e-4)
    untrained = said_by(fresh, "Well then.")  # Matcha's durations are trained too, through its encoder
    assert untrained.shape != mel.shape or (mel - untrained).abs().max() > 1e-2

    out = tmp_path / "said.wav"
    what = ["--text", "Well then.", "--reference", str(CLIP), "--reference_text", "One.", "--out", str(out)]
    how = ["--policy", flow.policy, "--weights", str(saved), "--vocoder", flow.vocoder, "--device", "cpu"]
    assert cli.main(["sample", *what, *how, "--steps", "2"]) == 0
    # six frames a letter and centred frames in the page's example; the last frame of Matcha's mels is a whole hop
    frames = 6 * len("Well then.") - 1 if flow is OWN else len(mel)
    assert soundfile.info(out).frames == frames * 256
    assert soundfile.info(out).samplerate == loaded.mel_spec.sample_rate_hz


def test_a_black_box_algorithm_trains_it_too(tmp_path: Path, flow: Flow) -> None:
    trained = run(tmp_path, flow, True, "diffusion_nft", num_generations=2, max_steps=1, save_strategy="no")
    trained.train()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"] > 0


def test_what_a_flow_leaves_out_is_declared_and_passed_on_by_wrappers() -> None:
    flow = policies.load("my_flow:build")
    assert flow.voices == () and flow.tokenizer is None and isinstance(flow, Policy)
    flow.voices, flow.tokenizer = ("joe",), list
    policies.check(flow, "mine")
    for seen in (flow, PolicyWrapper(flow), PolicyWrapper(PolicyWrapper(flow))):
        assert seen.voices == ("joe",) and seen.tokenizer is list


class WithCounts(tiny_matcha.ShapedMatcha):
    """A Matcha that keeps in its state_dict what is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"counts": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_what_could_not_be_saved_is_refused_before_the_first_update(tmp_path: Path) -> None:
    policy = MatchaPolicy(WithCounts(), tiny_matcha.to_ids, mel_spec=tiny_matcha.SPEC)
    args = RLHFConfig(output_dir=str(tmp_path), use_cpu=True, recognizer="none", vocoder="tiny_matcha:Tone")
    with pytest.raises(TypeError, match=r"expected a state_dict of tensors, got others in \['model\._extra_state'\]"):
        RLHFTrainer(policy, reward_models=[Louder()], args=args)


def test_what_is_no_policy_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "others.py").write_text("import torch\ndef half():\n    return torch.nn.Linear(2, 2)\n")
    with pytest.raises(
        TypeError, match=r"got Linear without \['durations', 'encode', 'prior', 'velocity', 'timesteps'"
    ):
        policies.load("others:half")
    with pytest.raises(ValueError, match="no module 'absent'; put its folder on the path"):
        policies.load("absent:build")
    with pytest.raises(ValueError, match="module others has no 'nope'"):
        policies.load("others:nope")
    flow = policies.load("my_flow:build")
    del flow.mel_spec
    with pytest.raises(TypeError, match="expected an attribute mel_spec"):
        policies.check(flow, "mine")
    flow = policies.load("my_flow:build")
    flow.get_extra_state = lambda: {"counts": 3}
    flow.__class__.get_extra_state = lambda self: {"counts": 3}
    with pytest.raises(TypeError, match=r"expected a state_dict of tensors, got others in \['_extra_state'\]"):
        policies.check(flow, "mine")


def test_folders_and_functions_are_not_mixed_up(tmp_path: Path) -> None:
    saved = policies.save(policies.load("my_flow:build"), tmp_path / "policy")
    with pytest.raises(
        ValueError, match=r"got those of my_flow\.MyFlow; name the function that makes it, and the folder"
    ):
        policies.load(saved)
    with pytest.raises(ValueError, match=r"policy tiny: expected 'package\.module:function' with weights"):
        policies.load("tiny", weights=saved)
    with pytest.raises(FileNotFoundError, match="expected weights that a run saved"):
        policies.load("my_flow:build", weights=tmp_path)
    state = load_file(saved / "policy.safetensors")
    assert set(state) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
    other = policies.load("my_flow:build")
    other.net[2] = torch.nn.Linear(64, 50)
    policies.save(other, saved)
    with pytest.raises(ValueError, match=r"net\.2\.weight \[50, 64\] for \[100, 64\]"):
        policies.load("my_flow:build", weights=saved)
