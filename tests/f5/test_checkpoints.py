"""Policies on disk: what is saved is what speaks, here and in stock F5-TTS; what does not fit is named."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import TINY, VOCABULARY, tiny_cfm, tiny_policy, tiny_prompts
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from rlhf_mel.f5 import checkpoints
from rlhf_mel.f5.backbones.dit import DiT
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.checkpoints import load_policy, save_policy
from rlhf_mel.flow.lora import add_lora
from rlhf_mel.flow.policy import rollout
from rlhf_mel.speech.text import TOKENS, PhonemeTokenizer, Timing


def speech(policy: CFM) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return rollout(policy, tiny_prompts(), steps=2, grad_steps=0, generator=generator).mel


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_policy(tiny_policy(), tmp_path / "policy")


def test_a_saved_policy_speaks_as_before(saved: Path) -> None:
    loaded = load_policy(saved)
    assert torch.equal(speech(loaded), speech(tiny_policy()))
    assert not loaded.training and loaded.dtype == torch.float32
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.vocab_char_map == VOCABULARY and loaded.mel_spec == tiny_policy().mel_spec
    assert loaded.transformer.arch == tiny_policy().transformer.arch


def test_a_policy_keeps_the_durations_that_it_was_trained_with(tmp_path: Path) -> None:
    """Not those of the package it is loaded by: vowels of "no" here last three times as long as its consonant."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    tokenizer = PhonemeTokenizer({"N": 1.0, "OW1": 3.0, " ": 1.0, ".": 1.0}, 2.0, Timing(0.1, 0.2, -0.1))
    backbone = DiT(**{**TINY, "text_num_embeds": len(vocabulary)})
    save_policy(CFM(backbone, vocab_char_map=vocabulary, tokenizer=tokenizer), tmp_path)
    loaded = load_policy(tmp_path).tokenizer
    assert isinstance(loaded, PhonemeTokenizer)
    assert loaded("no", 24) == [" "] * 2 + ["N"] * 2 + ["OW1"] * 6 + ["."] * 2
    assert loaded.timing == tokenizer.timing and loaded.units_per_phoneme == 2.0


def test_half_precision_on_disk_is_float32_in_memory(tmp_path: Path) -> None:
    """These weights are representable in float16, so nothing is lost; rotary frequencies are never rounded."""
    save_policy(tiny_policy(), tmp_path, dtype=torch.float16)
    on_disk = load_file(tmp_path / "policy.safetensors")
    assert on_disk["transformer.proj_out.weight"].dtype == torch.float16
    assert on_disk["transformer.rotary_embed.inv_freq"].dtype == torch.float32
    loaded = load_policy(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert torch.equal(speech(loaded), speech(tiny_policy()))


def test_rotary_frequencies_rounded_by_others_are_restored(saved: Path) -> None:
    state = load_file(saved / "policy.safetensors")
    save_file({name: value.half() for name, value in state.items()}, saved / "policy.safetensors")
    found = load_policy(saved).transformer.rotary_embed.inv_freq
    assert torch.equal(found, tiny_policy().transformer.rotary_embed.inv_freq)


@pytest.mark.parametrize("use_ema", [True, False])
def test_stock_f5_tts_reads_it(saved: Path, use_ema: bool) -> None:
    """What f5_tts.infer.utils_infer.load_checkpoint does with a .safetensors file."""
    state = load_file(saved / "policy.safetensors")
    assert (saved / "vocab.txt").read_text().split("\n") == [*VOCABULARY, ""]
    if use_ema:
        state = {name.replace("ema_model.", ""): value for name, value in state.items()}
    model = CFM(DiT(**TINY), mel_spec_kwargs=dict(n_mel_channels=8), vocab_char_map=dict(VOCABULARY))
    model.load_state_dict(state)
    assert torch.equal(model.transformer.proj_out.weight, tiny_policy().transformer.proj_out.weight)


@pytest.mark.parametrize("key", ["ema_model_state_dict", "model_state_dict"])
def test_training_checkpoints_of_f5_tts_load(saved: Path, key: str) -> None:
    state = load_file(saved / "policy.safetensors")
    if key == "ema_model_state_dict":
        state = {f"ema_model.{name}": value for name, value in state.items()}
    extra = {"initted": torch.tensor(True), "step": torch.tensor(5), "mel_spec.mel_stft.mel_scale.fb": torch.zeros(3)}
    torch.save({key: {**state, **extra}, "update": 7}, saved / "model_7.pt")
    (saved / "policy.safetensors").unlink()
    config = json.loads((saved / "policy.json").read_text())
    (saved / "policy.json").write_text(json.dumps({**config, "weights": "model_7.pt"}))
    assert torch.equal(speech(load_policy(saved)), speech(tiny_policy()))


# LoRA.


def lora_policy() -> CFM:
    policy: Any = add_lora(tiny_policy()).eval()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return policy


def test_lora_is_merged_on_disk_and_stays_apart_in_memory(tmp_path: Path) -> None:
    policy = lora_policy()
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    save_policy(policy, tmp_path)
    after = policy.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    loaded = load_policy(tmp_path)
    assert loaded.state_dict().keys() == tiny_policy().state_dict().keys()
    assert_close(speech(loaded), speech(policy), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(speech(loaded), speech(tiny_policy()), atol=1e-2)


# What does not fit.


def test_another_architecture_is_named(saved: Path) -> None:
    config = json.loads((saved / "policy.json").read_text())
    config["arch"]["depth"] = 3
    (saved / "policy.json").write_text(json.dumps(config))
    message = (
        r"policy\.safetensors: weights of another architecture, 14 of 78 tensors differ:\n"
        r"  transformer\.transformer_blocks\.2\.attn\.to_k\.bias: expected \(32,\), got nothing\n"
        r"(.*\n)+set backbone, arch and vocab in policy\.json"
    )
    with pytest.raises(ValueError, match=message):
        load_policy(saved)


def test_another_vocabulary_is_named(saved: Path) -> None:
    config = json.loads((saved / "policy.json").read_text())
    del config["arch"]["text_num_embeds"]
    (saved / "policy.json").write_text(json.dumps(config))
    load_policy(saved)
    (saved / "vocab.txt").write_text("\n".join(" abc") + "\n")
    with pytest.raises(ValueError, match=r"expected 5 rows for the 4 tokens of .*vocab.txt .* got 21: .* of 20 tokens"):
        load_policy(saved)


def test_unknown_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"policy 'huge': expected one of \['tiny', 'tiny-v0', 'F5TTS_v1_Base', .*a directory"
    ):
        load_policy("huge")
    with pytest.raises(FileNotFoundError, match=r"policy\.json: expected what the weights are"):
        load_policy(tmp_path)
    with pytest.raises(ValueError, match=r"backbone: expected one of \[.*'dit'.*\] .* got 'Mamba'"):
        checkpoints.load_backbone("Mamba")
    assert checkpoints.load_backbone("DiT") is checkpoints.load_backbone("dit") is DiT


def test_damaged_files_are_named(saved: Path) -> None:
    whole = (saved / "policy.safetensors").read_bytes()
    (saved / "policy.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"policy\.safetensors: expected weights, got a damaged file"):
        load_policy(saved)
    (saved / "policy.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"policy\.safetensors: expected the policy's weights"):
        load_policy(saved)
    (saved / "policy.json").write_text('{"backbone": "DiT"')
    with pytest.raises(ValueError, match=r"policy\.json: expected JSON"):
        load_policy(saved)
    (saved / "policy.json").write_text('{"backbone": "DiT", "arch": {}, "vocab": "vocab.txt"}')
    with pytest.raises(ValueError, match=r"got no \['mel_spec', 'tokenizer'\]; add them"):
        load_policy(saved)


def test_pickled_code_is_not_run(saved: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return print, ("run",)

    torch.save({"model_state_dict": Evil()}, saved / "policy.pt")
    with pytest.raises(ValueError, match=r"policy\.pt: expected weights"):
        checkpoints.read_weights(saved / "policy.pt")


def test_a_policy_that_could_not_be_loaded_again_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a policy with tokenizer and vocabulary"):
        save_policy(tiny_cfm(), tmp_path)


def test_a_failed_save_leaves_the_old_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(state: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(OSError, match="disk full"):
        save_policy(lora_policy(), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_saved_files_are_as_readable_as_any(saved: Path) -> None:
    (saved / "other").write_text("")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()}
    assert len(modes) == 1


def test_saving_again_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    again = save_policy(load_policy(saved), tmp_path / "again")
    for path in saved.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
