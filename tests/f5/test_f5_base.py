"""F5TTS_v1_Base at its real size, 337 M parameters: from f5-tts's trainer through two DRaFT-1 updates and back.

`pytest -m slow tests/test_f5_base.py` with f5-tts 1.1.22 importable: two minutes on two cores, 9 GB of memory.
"""

from __future__ import annotations

import importlib.util
import math
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_mel.data.prompts import PromptDataset
from rlhf_mel.f5.checkpoints import load_policy
from rlhf_mel.f5.export import export_f5
from rlhf_mel.f5.presets import PUBLISHED
from rlhf_mel.training.config import RLHFConfig
from rlhf_mel.training.trainer import RLHFTrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.f5_tts,
    pytest.mark.skipif(importlib.util.find_spec("f5_tts") is None, reason="f5-tts is not installed"),
]


@pytest.fixture(scope="module")
def upstream() -> Any:
    import make_fixtures

    for name in ("pydub", "ema_pytorch", "pypinyin", "rjieba"):
        pytest.importorskip(name)
    make_fixtures.import_f5_tts()
    return make_fixtures


def stock_cfm(upstream: Any, vocab: dict[str, int]) -> Any:
    """As f5_tts.infer.utils_infer.load_model builds it."""
    classes, arch = upstream.import_f5_tts(), PUBLISHED["F5TTS_v1_Base"].arch
    backbone = classes["DiT"](**arch, text_num_embeds=len(vocab), mel_dim=100)
    return classes["CFM"](backbone, odeint_kwargs=dict(method="euler"), vocab_char_map=vocab)


def write_trainer_checkpoint(upstream: Any, vocab: dict[str, int], path: Path) -> None:
    """The dictionary of Trainer.save_checkpoint, from random weights that AdaLN-zero does not silence."""
    from ema_pytorch import EMA

    torch.manual_seed(0)
    cfm = stock_cfm(upstream, vocab)
    for name, parameter in cfm.named_parameters():
        if "norm" in name or "proj_out" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    average = EMA(cfm, include_online_model=False)
    optimizer = torch.optim.AdamW(cfm.parameters(), lr=1e-5)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer)
    checkpoint = dict(
        model_state_dict=cfm.state_dict(),
        optimizer_state_dict=optimizer.state_dict(),
        ema_model_state_dict=average.state_dict(),
        scheduler_state_dict=schedule.state_dict(),
        update=1250,
    )
    torch.save(checkpoint, path)


def prompts(folder: Path) -> PromptDataset:
    time_s = torch.arange(24_000) / 24_000
    soundfile.write(folder / "voice.wav", (0.3 * torch.sin(2 * math.pi * 220 * time_s)).numpy(), 24_000)
    row = {"reference_audio": "voice.wav", "reference_text": "Hello there.", "duration_s": 1.0}
    return PromptDataset([{"text": "Good morning.", **row}, {"text": "早上好。", **row}], root=folder)


def speak(cfm: Any, mel: Tensor) -> Tensor:
    return cfm.eval().sample(mel, [list("Hello there. Good morning.")], 120, steps=2, cfg_strength=2.0, seed=1)[0]


def test_v1_base_loads_trains_and_goes_back(upstream: Any, tmp_path: Path) -> None:
    inference = upstream.import_inference()
    vocab = upstream.packaged_vocab()
    started = time.monotonic()
    write_trainer_checkpoint(upstream, vocab, tmp_path / "model_last.pt")
    written = time.monotonic()
    packaged = Path(inference.__file__).parent / "examples/vocab.txt"
    policy = load_policy(tmp_path / "model_last.pt", model="F5TTS_v1_Base", vocab=packaged)
    loaded = time.monotonic()
    (tmp_path / "model_last.pt").unlink()
    assert sum(parameter.numel() for parameter in policy.parameters()) == 337_096_804
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters() if "21." in name}
    args = RLHFConfig(
        output_dir=str(tmp_path / "run"),
        algorithm="draft",
        algorithm_kwargs={"grad_steps": 1},
        beta=0.0,
        max_steps=2,
        per_device_train_batch_size=2,
        sampling_steps=4,
        num_eval_prompts=0,
        recognizer="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    result = RLHFTrainer(policy, reward_models=["mos"], args=args, train_dataset=prompts(tmp_path)).train()
    trained = time.monotonic()
    assert result.global_step == 2
    assert all(
        not torch.equal(parameter, before[name]) for name, parameter in policy.named_parameters() if "21." in name
    )
    path = export_f5(policy, tmp_path / "back.safetensors")
    mel = torch.randn(1, 60, 100, generator=torch.Generator().manual_seed(0))
    ours = speak(policy, mel)
    del policy, before
    for use_ema in (True, False):
        stock = inference.load_checkpoint(stock_cfm(upstream, vocab), str(path), "cpu", use_ema=use_ema)
        assert_close(speak(stock, mel), ours, rtol=1e-4, atol=1e-4)
        del stock
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"\nwritten in {written - started:.0f} s, loaded in {loaded - written:.0f} s, two updates in"
        f" {trained - loaded:.0f} s, back in {time.monotonic() - trained:.0f} s, peak {peak_gb:.1f} GB"
    )
