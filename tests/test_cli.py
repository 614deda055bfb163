"""rlhf-mel sample: what it writes is what the policy says, whatever the batch; what is missing is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from problems import reference_of, tiny_policy

from rlhf_mel import cli
from rlhf_mel.data.prompts import load_prompts
from rlhf_mel.f5.checkpoints import load_policy, save_policy
from rlhf_mel.flow.noise import item_generator
from rlhf_mel.flow.policy import rollout
from rlhf_mel.pipeline import vocode
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.vocoders import load_vocoder

ONE = ["--text", "good morning", "--reference", str(reference_of("slt")), "--reference_text", "Hello there."]


def sample(*arguments: str) -> int:
    return cli.main(["sample", "--steps", "2", "--device", "cpu", *arguments])


def test_one_text_is_what_the_policy_says(tmp_path: Path) -> None:
    assert sample(*ONE, "--duration_s", "0.5", "--cfg", "1.5", "--seed", "3", "--out", str(tmp_path / "a.wav")) == 0
    found, rate_hz = soundfile.read(tmp_path / "a.wav", dtype="float32")
    row = {"text": ONE[1], "reference_audio": ONE[3], "reference_text": ONE[5], "duration_s": 0.5}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    prompts = load_prompts(tmp_path / "p.jsonl", split="heldout")
    generator = [item_generator(3, 0)]  # that of an evaluation with the same seed and row
    options: dict[str, Any] = dict(steps=2, cfg_strength=1.5, grad_steps=0, generator=generator)
    said = rollout(load_policy("tiny"), prompts.collate([prompts[0]]), **options)
    expected = vocode(load_vocoder("tiny"), said).waveform[0].clamp(-1, 1)  # a wav ends there
    # 0.5 s are 46.9 frames, 47 in all, and 46 hops of 256 samples
    assert rate_hz == 24_000 and len(found) == 46 * 256
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1.01 / 32768, rtol=0)


def test_a_list_is_spoken_in_order_whatever_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": f"n{n}", "text": text, "reference_audio": str(reference_of("joe")), "reference_text": "Hello."}
        | {"duration_s": 0.2 + 0.1 * (n % 2)}
        for n, text in enumerate(("one", "two", "three"))
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    heard = []
    for batch_size in ("1", "3"):
        out = tmp_path / batch_size
        assert sample("--prompts", str(tmp_path / "p.jsonl"), "--out", str(out), "--batch_size", batch_size) == 0
        assert sorted(path.name for path in out.iterdir()) == ["n0.wav", "n1.wav", "n2.wav"]
        heard.append([torch.from_numpy(soundfile.read(out / f"n{n}.wav", dtype="float32")[0]) for n in range(3)])
    for alone, together in zip(*heard, strict=True):
        torch.testing.assert_close(alone, together, atol=1e-3, rtol=0)
    assert [len(clip) for clip in heard[0]] == [18 * 256, 28 * 256, 18 * 256]  # 19 and 29 frames
    assert not torch.equal(heard[0][0], heard[0][2])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[0].endswith("n0.wav  0.19 s")


def test_rows_without_names_of_their_own_are_numbered(tmp_path: Path) -> None:
    row = {"reference_audio": str(reference_of("joe")), "reference_text": "Hello."}
    for ids, names in ((("a", "a"), ["00000.wav", "00001.wav"]), (("a", "../b"), ["00000.wav", "00001.wav"])):
        lines = [json.dumps({**row, "id": name, "text": "one"}) for name in ids]
        (tmp_path / "p.jsonl").write_text("\n".join(lines))
        prompts = load_prompts(tmp_path / "p.jsonl", split="heldout")
        assert [path.name for path in cli._file_names(tmp_path, prompts)] == names


def build_policy() -> Any:
    return load_policy("tiny")


def test_a_policy_of_one_s_own(tmp_path: Path) -> None:
    out = tmp_path / "a.wav"
    arguments = ["--duration_s", "0.4", "--out", str(out)]
    assert sample(*ONE, *arguments, "--policy", "test_cli:build_policy", "--vocoder", "tiny") == 0
    own = out.read_bytes()
    assert sample(*ONE, *arguments) == 0
    assert out.read_bytes() == own


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either --text or --prompts, got both or none"),
        (["--text", "a"], "expected --reference and --reference_text with it"),
        ([*ONE, "--steps", "0"], "--steps, --batch_size: expected at least 1, got 0"),
        (["--prompts", "gone.jsonl"], "no prompts at gone.jsonl"),
        ([*ONE, "--policy", "huge"], "policy 'huge': expected one of"),
        ([*ONE[:2], "--reference", "gone.wav", *ONE[4:]], "reference audio not found: gone.wav"),
        (["--text", "7", *ONE[2:]], "write numbers and symbols out as words"),
    ],
)
def test_what_is_missing_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample("--out", str(tmp_path / "a.wav"), *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("rlhf-mel sample: ") and message in captured.err
    assert not (tmp_path / "a.wav").exists()


def test_a_vocoder_for_other_mels_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_policy(tiny_policy(), tmp_path / "policy")
    assert sample(*ONE, "--policy", str(tmp_path / "policy"), "--vocoder", "tiny", "--out", "a.wav") == 2
    assert "expected mels as the policy makes them" in capsys.readouterr().err
    assert tiny_policy().mel_spec != MelSpec()


def test_the_console_command_is_this_module() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'[project.scripts]\nrlhf-mel = "{cli.__name__}:{cli.main.__name__}"\n' in text
