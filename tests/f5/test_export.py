"""What leaves: files for F5-TTS (which itself reads them in test_parity.py), LoRA as peft has it, the hub's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel
from problems import tiny_policy, tiny_prompts
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.checkpoints import load_policy, merged_state
from rlhf_mel.f5.export import export_f5, load_lora, model_card, push_to_hub, save_lora, write_upload
from rlhf_mel.flow.lora import add_lora, lora_layers
from rlhf_mel.flow.policy import rollout


def lora_policy(config: LoraConfig | None = None) -> CFM:
    policy: Any = add_lora(tiny_policy(), config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def speech(policy: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return rollout(policy, tiny_prompts(), steps=2, grad_steps=0, generator=generator).mel


def test_names_in_each_layout(tmp_path: Path) -> None:
    policy = lora_policy()
    merged = merged_state(policy)
    raw = load_file(export_f5(policy, tmp_path / "raw.safetensors"))
    ema = load_file(export_f5(policy, tmp_path / "ema.safetensors", layout="ema"))
    both = torch.load(export_f5(policy, tmp_path / "both.pt"), weights_only=True)
    assert raw.keys() == both["model_state_dict"].keys() == merged.keys()
    assert ema.keys() == both["ema_model_state_dict"].keys()
    assert ema.keys() == {f"ema_model.{name}" for name in merged} | {"initted", "step"}
    assert all(torch.equal(raw[name], merged[name]) for name in merged)
    assert (tmp_path / "vocab.txt").is_file()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_what_is_exported_loads_here(name: str, tmp_path: Path) -> None:
    policy = lora_policy()
    if name.endswith(".pt"):
        with pytest.raises(ValueError, match="expected model=NAME"):
            load_policy(export_f5(policy, tmp_path / name))
    else:
        assert_close(speech(load_policy(export_f5(policy, tmp_path / name))), speech(policy), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [("a.bin", "raw", r"expected a name in \.safetensors or \.pt"), ("a.pt", "flat", r"layout: expected one of")],
)
def test_other_files_are_refused(name: str, layout: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_f5(tiny_policy(), tmp_path / name, layout=layout)


# LoRA.


def test_peft_reads_and_merges_our_adapter(tmp_path: Path) -> None:
    policy = lora_policy()
    save_lora(policy, tmp_path, base="F5TTS_v1_Base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "F5TTS_v1_Base"
    read: Any = PeftModel.from_pretrained(tiny_policy(), str(tmp_path))
    merged = read.merge_and_unload().state_dict()
    for name, value in merged_state(policy).items():
        assert_close(merged[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("written_by", ["us", "peft"])
def test_an_adapter_comes_back_and_trains_on(written_by: str, tmp_path: Path) -> None:
    policy = lora_policy(LoraConfig(r=4, lora_alpha=12))
    if written_by == "us":
        save_lora(policy, tmp_path)
    else:
        save_lora(policy, tmp_path / "ours")
        model: Any = PeftModel.from_pretrained(tiny_policy(), str(tmp_path / "ours"))
        model.save_pretrained(str(tmp_path))
    loaded = load_lora(tiny_policy(), tmp_path)
    assert_close(speech(loaded), speech(policy), rtol=1e-5, atol=1e-5)
    trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * len(lora_layers(policy)) and all("lora_" in name for name in trained)


def test_adapters_that_are_none_or_another_model_s_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a policy with LoRA adapters"):
        save_lora(tiny_policy(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json: expected a LoRA adapter"):
        load_lora(tiny_policy(), tmp_path)
    save_lora(lora_policy(), tmp_path, base="the other")
    shallow = tiny_policy(dict(depth=1))
    message = r"12 of 24 tensors have no place in it, first .*transformer_blocks\.1.*\(the other\)"
    with pytest.raises(ValueError, match=message):
        load_lora(shallow, tmp_path)


# The hub.

SUMMARY = {
    "algorithm": "draft",
    "seed": 3,
    "steps": 40,
    "before": {"reward": 2.5, "rewards/mos/mean": 2.5, "wer": 0.125},
    "after": {"reward": 3.25, "rewards/mos/mean": 3.25, "wer": 0.1},
    "verdict": {"overall": "confirmed"},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "run/config.yaml").write_text("reward_models: [mos, speaker]\n")
    return tmp_path / "run"


def test_the_card_states_base_algorithm_rewards_and_numbers(run: Path) -> None:
    text = model_card(tiny_policy(), base="SWivid/F5-TTS", repo_id="me/mine", license="cc-by-nc-4.0", run=run)
    card = ModelCard(text)
    assert card.data.base_model == "SWivid/F5-TTS" and card.data.license == "cc-by-nc-4.0"
    assert "draft" in card.data.tags and card.data.pipeline_tag == "text-to-speech"
    for line in (
        "# mine",
        "| Base | SWivid/F5-TTS |",
        "| Algorithm | draft |",
        "| Rewards | mos, speaker |",
        "| Updates | 40 |",
        "| rewards/mos/mean | 2.5 | 3.25 |",
        "| wer | 0.125 | 0.1 |",
        "Verdict: confirmed",
        'policy = load_policy("me/mine")',
    ):
        assert line in text.splitlines()


def test_a_card_without_a_run_claims_nothing() -> None:
    text = model_card(tiny_policy(), base="tiny")
    assert "Nothing: no held-out prompts were listened to" in text and "| Algorithm | not stated |" in text
    with pytest.raises(FileNotFoundError, match=r"summary\.json: expected the summary of a finished run"):
        model_card(tiny_policy(), base="tiny", run="nowhere")


def test_push_uploads_the_folder_that_load_policy_reads(
    tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            assert token is None

        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append(("create", {"repo_id": repo_id, **options}))

        def upload_folder(self, **options: Any) -> str:
            calls.append(("upload", options))
            return "https://hub/me/mine"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    folder, policy = tmp_path / "upload", lora_policy()
    address = push_to_hub(policy, "me/mine", base="tiny", folder=folder, run=run)
    assert address == "https://hub/me/mine" and [name for name, _ in calls] == ["create", "upload"]
    assert calls[0][1] == {"repo_id": "me/mine", "private": True, "exist_ok": True}
    assert calls[1][1]["folder_path"] == folder and calls[1][1]["repo_id"] == "me/mine"
    assert {path.name for path in folder.iterdir()} == {"README.md", "policy.json", "policy.safetensors", "vocab.txt"}
    assert_close(speech(load_policy(folder)), speech(policy), rtol=1e-4, atol=1e-4)


def test_the_folder_can_be_written_without_the_hub(tmp_path: Path) -> None:
    folder = write_upload(tiny_policy(), tmp_path / "upload", base="tiny")
    assert (folder / "README.md").read_text().startswith("---\n")
