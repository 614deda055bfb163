"""With f5-tts 1.1.22 importable (`pytest -m f5_tts`): the fixtures are what it computes; it loads what we export."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from problems import MEL, VOCABULARY, call_sample, case_inputs, tiny_backbone
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.checkpoints import save_policy
from rlhf_mel.f5.export import export_f5
from rlhf_mel.flow.lora import add_lora
from rlhf_mel.speech.durations import f5_total_frames
from rlhf_mel.speech.text import load_tokenizer, load_vocab

FIXTURES = Path(__file__).parents[1] / "fixtures"
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


def lora_policy(backbone: str) -> CFM:
    policy: Any = CFM(
        tiny_backbone(backbone),
        mel_spec_kwargs=MEL,
        vocab_char_map=dict(VOCABULARY),
        tokenizer=load_tokenizer("char"),
    )
    add_lora(policy)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


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


@pytest.fixture(scope="module")
def inference(make_fixtures: Any) -> Any:
    for name in ("pydub", "pypinyin", "rjieba"):
        pytest.importorskip(name)
    return make_fixtures.import_inference()


@pytest.mark.parametrize("backbone", ["DiT", "UNetT", "MMDiT"])
@pytest.mark.parametrize(
    ("file", "layout", "use_ema"),
    [
        ("model.safetensors", "raw", True),
        ("model.safetensors", "raw", False),
        ("model.safetensors", "ema", True),
        ("model.pt", "raw", True),
        ("model.pt", "raw", False),
    ],
)
def test_f5_tts_loads_what_we_export(
    upstream: Any, inference: Any, tmp_path: Path, backbone: str, file: str, layout: str, use_ema: bool
) -> None:
    """f5-tts's own load_checkpoint, then its own sample(): a LoRA policy's speech, merged."""
    policy = lora_policy(backbone)
    path = export_f5(policy, tmp_path / file, layout=layout)
    stock = inference.load_checkpoint(upstream.cfm(backbone, {}), str(path), "cpu", use_ema=use_ema)
    calls = [(cfm, dict(rows=2, seed=3)) for cfm in (policy, stock)]
    ours, theirs = (call_sample(cfm, case_inputs(), **call)[0] for cfm, call in calls)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_ema", [True, False])
def test_f5_tts_loads_what_save_policy_writes(upstream: Any, inference: Any, tmp_path: Path, use_ema: bool) -> None:
    policy = lora_policy("DiT")
    path = save_policy(policy, tmp_path) / "policy.safetensors"
    stock = inference.load_checkpoint(upstream.cfm("DiT", {}), str(path), "cpu", use_ema=use_ema)
    assert torch.equal(stock.transformer.proj_out.weight, policy.transformer.proj_out.weight)
    vocab, size = importlib.import_module("f5_tts.model.utils").get_tokenizer(str(tmp_path / "vocab.txt"), "custom")
    assert vocab == policy.vocab_char_map and size == len(vocab)


@pytest.mark.parametrize("file", ["model.safetensors", "model.pt"])
def test_the_average_of_f5_tts_s_trainer_starts_from_what_we_export(upstream: Any, tmp_path: Path, file: str) -> None:
    """Trainer.load_checkpoint gives the EMA dictionary to ema_pytorch, strictly."""
    ema_pytorch = pytest.importorskip("ema_pytorch")
    path = export_f5(lora_policy("DiT"), tmp_path / file, layout="ema")
    content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    average = ema_pytorch.EMA(upstream.cfm("DiT", {}), include_online_model=False)
    average.load_state_dict(content.get("ema_model_state_dict", content))


class Listener:
    """Stands in for f5-tts's CFM and vocoder, and keeps what its inference asks for."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def sample(self, **call: Any) -> tuple[Tensor, None]:
        self.calls.append(call)
        return torch.zeros(1, call["duration"], 100), None

    def decode(self, mel: Tensor) -> Tensor:
        return torch.zeros(1, 1000)


@pytest.mark.parametrize(
    ("reference_text", "text"),
    [
        ("Hello there.", "Good morning, everyone."),
        ("Hello there", "No."),
        ("What?", "It is a fine day."),
        ("早上好。", "今天天气不错。"),
        ("你好", "Mixed 文本 here"),
    ],
)
def test_prompts_are_joined_and_timed_as_its_inference_does(
    inference: Any, tmp_path: Path, reference_text: str, text: str
) -> None:
    soundfile.write(tmp_path / "a.wav", 0.2 * torch.randn(30_000, generator=torch.Generator().manual_seed(0)), 24_000)
    path, closed = inference.preprocess_ref_audio_text(str(tmp_path / "a.wav"), reference_text, show_info=str)
    samples = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
    listener = Listener()
    next(inference.infer_batch_process((samples[None], 24_000), closed, [text], listener, listener, progress=None))
    (call,) = listener.calls
    assert call["duration"] == f5_total_frames(len(samples), 256, reference_text, text)
    assert call["text"] == [load_tokenizer("pinyin").prompt(reference_text, text, 0, 0)]


def test_vocabulary_of_f5_tts_is_read_as_it_reads_it(make_fixtures: Any, inference: Any) -> None:
    vocab = load_vocab(Path(inference.__file__).parent / "examples/vocab.txt")
    assert vocab == make_fixtures.packaged_vocab() and len(vocab) == 2545


def test_pinyin(make_fixtures: Any, upstream: Any) -> None:
    pytest.importorskip("pypinyin")
    lines = (FIXTURES / "f5_tts_pinyin.jsonl").read_text(encoding="utf-8").splitlines()
    assert make_fixtures.record_pinyin() == [json.loads(line) for line in lines]
