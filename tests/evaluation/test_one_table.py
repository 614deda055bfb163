"""MEASURES is the one table of measures: a line of it is an evaluation's column, and all that shows or guards one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from small_runs import trainer, write_dataset
from test_evaluate import Hum, Listener, as_audio, tiny_prompts, tone
from torch import Tensor

from rlhf_mel.speech import measures
from rlhf_mel.speech.measures import MEASURES, Guard, Measure, default_judges, recognized, recognizer_judges
from rlhf_mel.types import Audio

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import comparison


def test_a_line_names_the_judge_that_measures_it() -> None:
    assert default_judges() == [measures.dnsmos, measures.signal] and recognizer_judges() == [recognized]
    for judge in default_judges():
        measured = judge(as_audio(tone(200, 1.0)))
        assert set(measured) == {name for name, known in MEASURES.items() if known.judge is judge}
    prompts, mel = tiny_prompts().select([0]), torch.rand(1, 4, 8)
    audio = Audio(torch.zeros(1, 500), torch.tensor([500]), 24_000, mel, torch.tensor([4]))
    heard = recognized(Listener(Hum.mel_spec), audio, prompts, ["a fig"])  # type: ignore[arg-type]
    assert set(heard) == {name for name, known in MEASURES.items() if known.recognizer_judge is recognized}


@pytest.mark.parametrize(
    ("known", "worse"),
    [
        (Measure("a", "higher"), "lower"),
        (Measure("a", "lower", guard=Guard(low=-1)), "higher"),
        (Measure("a", guard=Guard(high=1)), "higher"),
        (Measure("a", guard=Guard(low=-1)), "lower"),
        (Measure("a", guard=Guard(low=-1, high=1)), "either"),
        (Measure("a"), ""),
    ],
)
def test_which_change_is_one_for_the_worse(known: Measure, worse: str) -> None:
    assert known.worse == worse


def test_a_judge_is_added_in_one_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A measure that is 2.5 before and 4 after training, of which a rise of 0.2 is allowed."""
    values = iter([2.5, 4.0])

    def brightness(audio: Audio) -> dict[str, Tensor]:
        return {"brightness": torch.full((len(audio.waveform),), next(values))}

    line = Measure("Brightness of the voice", "lower", 1, short="bright", guard=Guard(high=0.2), judge=brightness)
    monkeypatch.setitem(MEASURES, "brightness", line)  # type: ignore[arg-type]
    run = trainer(tmp_path / "run", write_dataset(tmp_path / "data"), num_eval_prompts=2, noise_floor=False)
    run.train()

    console = capsys.readouterr().out
    before, after = (
        next(text for text in console.splitlines() if f"{when}: 2 held" in text) for when in ("before", "after")
    )
    assert "  brightness 2.5  (" in before and "  brightness 4  (" in after
    assert "brightness +1.5 [+1.5, +1.5]: worse; limit: rise of at most 0.2" in console

    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["before"]["brightness"], summary["after"]["brightness"]) == (2.5, 4.0)
    assert summary["verdict"]["guards"]["brightness"]["status"] == "worse"

    report = (tmp_path / "run/report.html").read_text()
    assert "<td>Brightness of the voice</td><td>2.5</td><td>4.0</td>" in report
    assert "<b>2.50</b> bright</span>" in report and "<b>4.00</b> bright</span>" in report

    def compared(name: str, reward: float, brightness: float) -> dict[str, object]:
        curve = [{"updates": 0, "reward": reward}]
        kept = {"reward": [reward, reward], "brightness": [brightness, brightness]}
        return {"name": name, "seed": 0, "price_s": 1.0, "updates": 0, "curve": curve, "measures": kept}

    table = comparison.markdown(comparison.summary([compared("base", 1.0, 2.5), compared("draft", 2.0, 4.0)]))
    heads, _, draft, _ = ([cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines())
    row = dict(zip(heads, draft, strict=True))
    assert (row["bright"], row["worse than base"], row["guards that fail"]) == ("4.0", "bright +1.5", "brightness 1/1")
