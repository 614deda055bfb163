"""F5-TTS's own weight files: every layout in the wild, flags from the model's name, and what is refused."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import E2, TINY, TINY_UNETT, V0, V1, VOCABULARY, tiny_backbone, tiny_dit, tiny_policy
from safetensors.torch import save_file
from torch import Tensor

from rlhf_mel.f5 import checkpoints, presets
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.checkpoints import load_policy, save_policy
from rlhf_mel.f5.export import export_f5
from rlhf_mel.f5.presets import PUBLISHED, PublishedModel
from rlhf_mel.speech.audio import MelSpec

MEL = MelSpec(n_mels=8, n_fft=256, hop_length=64, win_length=256)
NARROW = {**TINY, "dim": 16, "heads": 1}
MODELS: Mapping[str, PublishedModel] = {
    name: PublishedModel(backbone=backbone, arch=arch, tokenizer="char", mel_spec=MEL, repo=repo, weights=weights)
    for name, backbone, arch, repo, weights in (
        ("F5TTS_v1_Base", "DiT", {**TINY, **V1}, "SWivid/F5-TTS", "F5TTS_v1_Base/model_1250000.safetensors"),
        ("F5TTS_Base", "DiT", {**TINY, **V0}, "SWivid/F5-TTS", "F5TTS_Base/model_1200000.safetensors"),
        ("F5TTS_Small", "DiT", {**NARROW, **V0}, None, ""),
        ("E2TTS_Base", "UNetT", {**TINY_UNETT, **E2}, "SWivid/E2-TTS", "E2TTS_Base/model_1200000.safetensors"),
    )
}
"""F5-TTS's table with tiny sizes: `mel_dim` and `text_num_embeds` are left to the mel and the vocabulary."""


def small() -> Mapping[str, PublishedModel]:
    sizes = ("mel_dim", "text_num_embeds")
    return {
        name: replace(model, arch={key: value for key, value in model.arch.items() if key not in sizes})
        for name, model in MODELS.items()
    }


@pytest.fixture(autouse=True)
def tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (presets, checkpoints):
        monkeypatch.setattr(module, "PUBLISHED", small())


def write_vocab(folder: Path, tokens: list[str] | None = None, newline: str = "\n") -> Path:
    path = folder / "vocab.txt"
    path.write_bytes("".join(token + newline for token in tokens or list(VOCABULARY)).encode())
    return path


def raw_state(scale: float = 1.0) -> dict[str, Tensor]:
    return {f"transformer.{name}": scale * value for name, value in tiny_dit().state_dict().items()}


def ema(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ema_pytorch's state_dict, in f5-tts's oldest files with a mel filterbank inside."""
    return {
        "initted": torch.tensor(True),
        "step": torch.tensor(7),
        **{f"ema_model.{name}": value for name, value in state.items()},
        "ema_model.mel_spec.mel_stft.mel_scale.fb": torch.zeros(129, 8),
        "ema_model.mel_spec.mel_stft.spectrogram.window": torch.zeros(256),
    }


def trainer_checkpoint() -> dict[str, Any]:
    """What f5-tts's Trainer.save_checkpoint writes; online weights are twice the average's."""
    model = tiny_dit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    return dict(
        model_state_dict={**raw_state(2.0), "mel_spec.mel_stft.mel_scale.fb": torch.zeros(129, 8)},
        optimizer_state_dict=optimizer.state_dict(),
        ema_model_state_dict=ema(raw_state()),
        scheduler_state_dict=schedule.state_dict(),
        update=1200,
    )


LAYOUTS: Mapping[str, Any] = {
    "EMA .safetensors, as published": ("model_1250000.safetensors", lambda: ema(raw_state())),
    "raw .safetensors": ("model.safetensors", raw_state),
    "half precision": ("model.safetensors", lambda: {name: value.half() for name, value in ema(raw_state()).items()}),
    "trainer's .pt": ("model_last.pt", trainer_checkpoint),
    "reduced to its EMA": ("model.pt", lambda: {"ema_model_state_dict": ema(raw_state())}),
    "reduced to its online weights": ("model.pt", lambda: {"ema_model_state_dict": raw_state()}),
    "online weights": ("model.pt", lambda: {"model_state_dict": raw_state()}),
    "bare state_dict": ("model.pt", raw_state),
    "before updates were counted": ("model.pt", lambda: {"model_state_dict": raw_state(), "step": 5}),
}


def write(path: Path, content: Any) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(layout: str, tmp_path: Path) -> None:
    name, content = LAYOUTS[layout]
    write_vocab(tmp_path, newline="\r\n")
    policy = load_policy(write(tmp_path / name, content()), model="F5TTS_v1_Base")
    expected = tiny_dit().state_dict()
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32} and not policy.training
    for key, value in policy.transformer.state_dict().items():
        # the weights of the fixtures are representable in half precision, the rotary frequencies are made anew
        assert torch.equal(value, expected[key]), key
    assert policy.vocab_char_map == VOCABULARY and policy.mel_spec == MEL


def test_online_weights_and_their_average_are_told_apart(tmp_path: Path) -> None:
    write_vocab(tmp_path)
    path = write(tmp_path / "model_last.pt", trainer_checkpoint())
    bias = tiny_dit().proj_out.bias
    for use_ema, factor in ((None, 1.0), (True, 1.0), (False, 2.0)):
        found = load_policy(path, model="F5TTS_v1_Base", use_ema=use_ema).transformer.proj_out.bias
        assert torch.equal(found, factor * bias)
    only_average = write(tmp_path / "model.safetensors", ema(raw_state()))
    with pytest.raises(ValueError, match=r"expected online weights for use_ema=False, got an EMA alone"):
        load_policy(only_average, model="F5TTS_v1_Base", use_ema=False)
    only_online = write(tmp_path / "model.pt", {"model_state_dict": raw_state()})
    with pytest.raises(ValueError, match=r"expected ema_model_state_dict for use_ema=True, got \['model_state_dict'\]"):
        load_policy(only_online, model="F5TTS_v1_Base", use_ema=True)


@pytest.mark.parametrize(("model", "flags"), [("F5TTS_v1_Base", V1), ("F5TTS_Base", V0)])
def test_flags_come_from_the_name(model: str, flags: Mapping[str, Any], tmp_path: Path) -> None:
    write_vocab(tmp_path)
    policy = load_policy(write(tmp_path / "model.safetensors", raw_state()), model=model)
    assert {name: policy.transformer.arch[name] for name in flags} == dict(flags)


def test_a_file_that_does_not_say_what_it_is_needs_a_name(tmp_path: Path) -> None:
    write_vocab(tmp_path)
    path = write(tmp_path / "model.safetensors", raw_state())
    with pytest.raises(ValueError, match=r"expected model=NAME, .* fit \['F5TTS_v1_Base', 'F5TTS_Base'\]"):
        load_policy(path)
    with pytest.raises(ValueError, match=r"model: expected one of \['F5TTS_v1_Base', .* got 'F6'"):
        load_policy(path, model="F6")


@pytest.mark.parametrize("model", ["F5TTS_Small", "E2TTS_Base"])
def test_a_wrong_guess_is_refused_and_the_right_one_named(model: str, tmp_path: Path) -> None:
    write_vocab(tmp_path)
    path = write(tmp_path / "model.safetensors", raw_state())
    with pytest.raises(ValueError) as caught:
        load_policy(path, model=model)
    lines = str(caught.value).splitlines()
    assert f"expected {model}, got other tensors" in lines[0]
    assert len(lines) == 7 and all(": expected " in line and ", got " in line for line in lines[1:6])
    assert "they fit ['F5TTS_v1_Base', 'F5TTS_Base']; pass that as model=" in lines[6]


def test_a_folder_of_another_name_is_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "F5TTS_Base"
    folder.mkdir()
    write_vocab(folder)
    path = write(folder / "model.safetensors", raw_state())
    with pytest.warns(UserWarning, match="the folder says F5TTS_Base, model= says F5TTS_v1_Base: their flags differ"):
        load_policy(path, model="F5TTS_v1_Base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_policy(path, model="F5TTS_Base")


def test_what_we_export_knows_its_flags(tmp_path: Path) -> None:
    policy = tiny_policy(dict(V0))
    path = export_f5(policy, tmp_path / "mine.safetensors")
    assert load_policy(path).transformer.arch["pe_attn_head"] == 1
    load_policy(path, model="F5TTS_Base")
    message = r"expected text_mask_padding=True for model='F5TTS_v1_Base', got False; leave model= out"
    with pytest.raises(ValueError, match=message):
        load_policy(path, model="F5TTS_v1_Base")
    assert load_policy(save_policy(policy, tmp_path / "folder") / "policy.safetensors").transformer.arch == (
        policy.transformer.arch
    )


def test_another_vocabulary_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", raw_state())
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt: expected the vocabulary that model\.safetensors"):
        load_policy(path, model="F5TTS_v1_Base")
    vocab = write_vocab(tmp_path, list(" abc"))
    with pytest.raises(ValueError, match=r"expected 5 rows for the 4 tokens of .*vocab\.txt .* got 21: .* 20 tokens"):
        load_policy(path, model="F5TTS_v1_Base", vocab=vocab)


def test_bytes_need_no_vocabulary(tmp_path: Path) -> None:
    backbone = tiny_backbone("UNetT", **E2, text_num_embeds=256)
    state = {f"transformer.{name}": value for name, value in backbone.state_dict().items()}
    path = write(tmp_path / "model.safetensors", state)
    with pytest.raises(FileNotFoundError, match=r"vocab\.txt"):
        load_policy(path, model="E2TTS_Base")
    policy = load_policy(path, model="E2TTS_Base", tokenizer="byte")
    upstream = CFM(backbone, mel_spec_module=MEL)  # f5-tts without a vocabulary
    mel = torch.zeros(1, 9, 8)
    spoken = [cfm.eval().sample(mel, ["hé"], 20, steps=1, seed=0)[0] for cfm in (policy, upstream)]
    torch.testing.assert_close(*spoken)


# Bad files.


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    write_vocab(tmp_path)
    path = write(tmp_path / "model.pt", {"model_state_dict": raw_state()})
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.pt: expected weights, got a damaged file .* copy it again"):
        load_policy(path, model="F5TTS_v1_Base")
    empty = tmp_path / "empty.safetensors"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.safetensors: expected weights, got a damaged file"):
        load_policy(empty, model="F5TTS_v1_Base")
    other = write(tmp_path / "other.pt", {"model_state_dict": {"a": 1}})
    with pytest.raises(ValueError, match=r"other\.pt: expected names and tensors"):
        load_policy(other, model="F5TTS_v1_Base")
    with pytest.raises(ValueError, match=r"expected a weight file with \['model'\], got a name or folder"):
        load_policy("tiny", model="F5TTS_v1_Base")


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    write_vocab(tmp_path)
    path = write(tmp_path / "model.pt", {"model_state_dict": raw_state(), "extra": Evil()})
    with pytest.raises(ValueError, match=r"a pickle that holds code or other objects; it was not run\. Convert it"):
        load_policy(path, model="F5TTS_v1_Base")
    assert not (tmp_path / "ran").exists()


# The hub.


def cached(cache: Path, repo: str, files: Mapping[str, Path]) -> None:
    """Files as huggingface_hub keeps them once downloaded."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs/main").write_text("0" * 40)
    for name, source in files.items():
        target = folder / "snapshots" / ("0" * 40) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())


def test_published_names_and_our_own_repositories_load_from_the_cache_when_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub reads HF_HUB_OFFLINE when it is imported: hence its constants are set here."""
    vocab = write_vocab(tmp_path)
    weights = write(tmp_path / "w.safetensors", ema(raw_state()))
    cache = tmp_path / "hub"
    cached(cache, "SWivid/F5-TTS", {"F5TTS_Base/model_1200000.safetensors": weights, "F5TTS_Base/vocab.txt": vocab})
    mine = save_policy(tiny_policy(), tmp_path / "mine")
    cached(cache, "me/mine", {path.name: path for path in mine.iterdir()})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_OFFLINE", True)
    policy = load_policy("F5TTS_Base")
    assert policy.transformer.arch["pe_attn_head"] == 1 and policy.vocab_char_map == VOCABULARY
    assert load_policy("me/mine").transformer.arch == tiny_policy().transformer.arch
    with pytest.raises(FileNotFoundError) as caught:
        load_policy("F5TTS_v1_Base")
    message = str(caught.value)
    assert "SWivid/F5-TTS/F5TTS_v1_Base/model_1250000.safetensors: expected it on the Hugging Face hub" in message
    assert "unset HF_HUB_OFFLINE" in message and "load_policy(path, model='F5TTS_v1_Base', vocab=...)" in message
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing/policy\.json: expected it on the Hugging Face hub"):
        load_policy("nobody/nothing")


def test_a_configuration_without_weights_says_so() -> None:
    with pytest.raises(FileNotFoundError, match=r"F5TTS_Small: expected published weights \(\['F5TTS_v1_Base'"):
        load_policy("F5TTS_Small")


def test_the_table_names_files_of_the_repositories() -> None:
    """From f5-tts 1.1.22's api.py: repository, step and type of each."""
    files = {name: (model.repo, model.weights) for name, model in PUBLISHED.items() if model.repo}
    assert files == {
        "F5TTS_v1_Base": ("SWivid/F5-TTS", "F5TTS_v1_Base/model_1250000.safetensors"),
        "F5TTS_v1_Base_no_zero_init": ("SWivid/F5-TTS", "F5TTS_v1_Base_no_zero_init/model_1250000.safetensors"),
        "F5TTS_Base": ("SWivid/F5-TTS", "F5TTS_Base/model_1200000.safetensors"),
        "F5TTS_Base_bigvgan": ("SWivid/F5-TTS", "F5TTS_Base_bigvgan/model_1250000.pt"),
        "E2TTS_Base": ("SWivid/E2-TTS", "E2TTS_Base/model_1200000.safetensors"),
    }
