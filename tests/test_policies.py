"""A flow of one's own, that of docs/foreign_flows.md: trained, resumed, saved, loaded, sampled on the command line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from rlhf_mel import RLHFConfig, RLHFTrainer, cli, policies
from rlhf_mel.flow.policy import Policy, PolicyWrapper
from rlhf_mel.storage import ASSETS
from rlhf_mel.types import Audio, Prompts

PAGE = Path(__file__).parents[1] / "docs/foreign_flows.md"
CLIP = ASSETS / "prompts/references/joe_00108.flac"


@pytest.fixture(autouse=True)
def my_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The page's example as a module that can be imported."""
    (code,) = [
        code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL) if "build()" in code
    ]
    (tmp_path / "my_flow.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_flow", None)


class Louder:
    """The mean of the waveform's square."""

    name, differentiable, domain, sample_rate_hz = "louder", True, "waveform", None
    needs: frozenset[str] = frozenset()
    range = (0.0, 1.0)

    def score(self, audio: Audio, prompts: Prompts) -> Tensor:
        return audio.waveform.square().sum(-1) / audio.lengths_samples


def run(folder: Path, lora: bool, algorithm: str = "draft", **options: Any) -> RLHFTrainer:
    args = RLHFConfig(
        output_dir=str(folder),
        use_cpu=True,
        policy="my_flow:build",
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


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_it_trains_resumes_is_saved_and_speaks(tmp_path: Path, lora: bool) -> None:
    trained = run(tmp_path / "run", lora)
    first = {name: weight.clone() for name, weight in trained.policy.named_parameters()}
    trained.train()
    moved = [name for name, weight in trained.policy.named_parameters() if not torch.equal(weight, first[name])]
    assert moved and all(("lora_" in name) == lora for name in moved)
    assert {"reward", "dnsmos_ovrl"} <= json.loads((tmp_path / "run/summary.json").read_text())["after"].keys()

    resumed = run(tmp_path / "resumed", lora)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-1"))
    for name, weight in trained.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], weight), name

    saved = tmp_path / "run/policy"
    assert json.loads((saved / "policy.json").read_text()) == {"flow": "my_flow.MyFlow"}
    loaded = policies.load("my_flow:build", weights=saved)
    x, t = torch.randn(1, 7, 100, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
    cond = sys.modules["my_flow"].Condition(torch.zeros(1, 100), torch.ones(1, 7, dtype=torch.bool))
    torch.testing.assert_close(loaded.velocity(x, t, cond), trained.policy.velocity(x, t, cond), rtol=1e-5, atol=1e-5)

    out = tmp_path / "said.wav"
    said = [
        "--text",
        "Well then.",
        "--reference",
        str(CLIP),
        "--reference_text",
        "One.",
        "--steps",
        "2",
        "--out",
        str(out),
    ]
    how = ["--policy", "my_flow:build", "--weights", str(saved), "--vocoder", "tiny", "--device", "cpu"]
    assert cli.main(["sample", *said, *how]) == 0
    assert soundfile.info(out).frames == (6 * len("Well then.") - 1) * 256


def test_a_black_box_algorithm_trains_it_too(tmp_path: Path) -> None:
    trained = run(tmp_path, True, "diffusion_nft", num_generations=2, max_steps=1, save_strategy="no")
    trained.train()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["grad_norm"] > 0


def test_what_a_flow_leaves_out_is_declared_and_passed_on_by_wrappers() -> None:
    flow = policies.load("my_flow:build")
    assert flow.voices == () and flow.tokenizer is None and isinstance(flow, Policy)
    flow.voices, flow.tokenizer = ("joe",), list
    policies.check(flow, "mine")
    for seen in (flow, PolicyWrapper(flow), PolicyWrapper(PolicyWrapper(flow))):
        assert seen.voices == ("joe",) and seen.tokenizer is list


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
