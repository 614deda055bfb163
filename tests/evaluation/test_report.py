"""report.html: everything inside one well-formed file, and what it shows is what the run's files say."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import soundfile
import torch
from matplotlib.image import imread

from rlhf_mel.evaluation.report import MAX_BYTES, write_report

RATE_HZ = 24_000
VERDICT = {
    "overall": "reward up, judge not convinced",
    "reward": {
        "change": 1.25,
        "low": 1.05,
        "high": 1.45,
        "status": "ok",
        "prompts": 50,
        "clusters": 3,
        "by_voice": {"joe": {"change": 1.0}, "slt": {"change": 1.5}},
    },
    "judge": {
        "measure": "dnsmos_ovrl",
        "change": 0.1,
        "low": 0.066,
        "high": 0.134,
        "limit": "above 0; effect asked for: 0.05",
        "status": "ok",
    },
    "guards": {
        "cer": {"change": 0.05, "low": 0.03, "high": 0.07, "limit": "rise of at most 0.01", "status": "worse"},
        "duration_s": {"change": -0.125, "low": -0.2, "high": -0.05, "limit": "within ±10 %", "status": "undecided"},
        "voice_similarity": {"limit": "drop of at most 0.02", "status": "not measured"},
    },
    "noise_floor": {
        "reward": {"change": 0.02, "low": -0.1, "high": 0.14},
        "dnsmos_ovrl": {"change": -0.004, "low": -0.03, "high": 0.022},
        "duration_s": {"change": 0.01, "low": -0.01, "high": 0.03},
    },
}


def tone(frequency_hz: float, duration_s: float) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(int(duration_s * RATE_HZ)) / RATE_HZ)


def write_run(folder: Path, *, samples: int = 2, duration_s: float = 1.0) -> Path:
    """A run's folder as training/run_folder.py leaves it, with tones for speech."""
    before = {
        "reward": 3.25,
        "reward_std": 0.2,
        "rewards/mos/mean": 3.25,
        "rewards/mos/std": 0.2,
        "dropped_rollouts": 0,
    }
    before |= {"dnsmos_ovrl": 2.75, "cer": 0.10, "duration_s": 2.0, "my_judge": 7.0, "f0_std_semitones": None}
    after = {**before, "reward": 4.5, "rewards/mos/mean": 4.5, "dnsmos_ovrl": 2.85, "cer": 0.15, "duration_s": 1.75}
    summary = {"algorithm": "draft", "seed": 3, "steps": 20, "seconds": 90.0, "device": "cpu", "policy": "out/policy"}
    folder.joinpath("summary.json").write_text(
        json.dumps({**summary, "before": before, "after": after, "verdict": VERDICT})
    )
    lines = [{"step": step, "reward": 3.0 + step / 20, "reward_std": 0.1} for step in (5, 10, 15, 20)]
    folder.joinpath("metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    folder.joinpath("config.yaml").write_text("algorithm: draft\n")
    write_samples(folder / "samples", samples, duration_s)
    return folder


def write_samples(folder: Path, samples: int, duration_s: float) -> None:
    folder.mkdir()
    index: list[dict[str, Any]] = []
    for row in range(samples):
        names = {kind: f"{kind}_{row:03d}.wav" for kind in ("before", "after", "reference")}
        for frequency_hz, kind in ((300, "before"), (600, "after"), (900, "reference")):
            length_s = 7.0 if kind == "reference" else duration_s
            soundfile.write(folder / names[kind], tone(frequency_hz + row, length_s), RATE_HZ)
        scores = {"rewards/mos": 3.25, "dnsmos_ovrl": 2.75, "cer": None}
        index.append({"id": row, "text": "Cats & <b>dogs</b>", "voice": None, **names})
        index[-1] |= {"scores_before": scores, "scores_after": scores}
    folder.joinpath("index.json").write_text(json.dumps(index))


class Page(HTMLParser):
    """Tags in balance, text of table rows, sources of media."""

    EMPTY = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.sources: dict[str, list[str]] = {"img": [], "audio": []}
        self.links: list[str] = []
        self.bold: list[str] = []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        for name, value in attrs:
            if tag in self.sources and name == "src":
                self.sources[tag].append(value or "")
            if name in ("src", "href", "xlink:href", "action"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open if tag in self.EMPTY else self.open[:-1]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "b":
            self.bold.append(data)
        if any(tag in self.open for tag in ("td", "th")):
            self.rows[-1][-1] += data


def decoded(source: str, kind: str) -> io.BytesIO:
    prefix = f"data:{kind};base64,"
    assert source.startswith(prefix)
    return io.BytesIO(base64.b64decode(source.removeprefix(prefix)))


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = write_report(write_run(tmp_path_factory.mktemp("run")))
    assert path.name == "report.html"
    return path.read_text()


def test_the_table_says_what_the_summary_says(html: str) -> None:
    rows = {row[0]: row[1:] for row in Page(html).rows}
    # before, after, change, its interval, what another seed does, limit, status
    assert rows["mos"] == ["3.250", "4.500", "+1.250", "+1.050 to +1.450", "+0.020", "", "ok"]
    judge = ["2.750", "2.850", "+0.100", "+0.066 to +0.134", "−0.004", "above 0; effect asked for: 0.05", "ok"]
    assert rows["DNSMOS overall"] == judge
    errors = ["0.100", "0.150", "+0.050", "+0.030 to +0.070", "–", "rise of at most 0.01", "worse"]
    assert rows["Character error rate"] == errors
    # From 2.00 to 1.75 s: a share of the mean, as the limit is.
    seconds = ["2.00", "1.75", "−12.5 %", "−20.0 % to −5.0 %", "+1.0 %", "within ±10 %", "undecided"]
    assert rows["Seconds of speech"] == seconds
    assert rows["Voice similarity to the reference"] == [*[""] * 5, "drop of at most 0.02", "not measured"]
    assert rows["Pitch variation, semitones"][:3] == ["–", "–", "–"]
    assert rows["my_judge"][0] == "7.000"
    assert "Paired over 50 prompts in 3 voices, by which the intervals are clustered." in html


def test_the_trained_reward_stands_apart(html: str) -> None:
    firsts = [row[0] for row in Page(html).rows]
    trained, judges = firsts.index("Trained on: the reward"), firsts.index("Never trained on: judges and guards")
    assert firsts[trained + 1 : judges] == ["mos"]
    assert "mos" not in firsts[judges:] and "DNSMOS overall" in firsts[judges:]


def test_the_headline(html: str) -> None:
    assert "Reward up, judge not convinced</h1>" in html
    assert {"3.25 → 4.50", "2.75 → 2.85"} <= set(Page(html).bold)
    assert "By voice: trained reward (joe +1, slt +1.5)." in html
    assert "+1.05 to +1.45" in html and "+0.07 to +0.13" in html
    assert "Limit not met: Character error rate." in html and "Undecided: Seconds of speech." in html


def test_too_few_prompts_is_said_with_how_many_would_do(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    summary["verdict"] |= {
        "overall": "reward up, too few prompts to tell",
        "prompts_needed": 400,
        "clusters_needed": 24,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    html = write_report(folder).read_text()
    assert "About 400 prompts in 24 voices would tell (here: 50 in 3)." in html and "That is no confirmation." in html


def test_a_voice_without_a_finite_change_is_a_dash(tmp_path: Path) -> None:
    """As a run writes it: NaN is null in summary.json."""
    folder = write_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())
    summary["verdict"]["reward"]["by_voice"]["joe"] = {"change": None, "low": None, "high": None}
    summary["verdict"]["judge"]["reason"] = "falls in joe"
    (folder / "summary.json").write_text(json.dumps(summary))
    html = write_report(folder).read_text()
    assert "trained reward (joe –, slt +1.5)" in html and "ok: falls in joe</td>" in html
    assert "Not measured, so not guarded: Voice similarity to the reference." in html


def test_colour_says_only_what_is_not_noise(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    summary = json.loads((folder / "summary.json").read_text())

    def tone_of_the_judge(status: str) -> str:
        summary["verdict"]["judge"] |= {"status": status}
        (folder / "summary.json").write_text(json.dumps(summary))
        html = write_report(folder).read_text()
        return re.search(r'DNSMOS overall</td><td>2.750</td><td>2.850</td><td class="(\w*)">', html)[1]  # type: ignore[index]

    # The judge rose by 0.1 each time.
    assert [tone_of_the_judge(status) for status in ("ok", "undecided", "no rise")] == ["good", "", "bad"]


def test_nothing_is_fetched(html: str) -> None:
    assert all(link.startswith(("data:", "#")) for link in Page(html).links)
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import|<script|<link", html)


def test_texts_are_escaped(html: str) -> None:
    assert "Cats &amp; &lt;b&gt;dogs&lt;/b&gt;" in html and "<b>dogs" not in html


def test_the_players_hold_the_wav_files(html: str, tmp_path: Path) -> None:
    players = Page(html).sources["audio"]
    assert len(players) == 6  # before, after, reference; twice
    for source, frequency_hz in zip(players[:2], (300, 600), strict=True):
        samples, rate_hz = soundfile.read(decoded(source, "audio/flac"))
        assert rate_hz == RATE_HZ
        np.testing.assert_allclose(samples, tone(frequency_hz, 1.0), atol=1 / 32768)  # 16 bits, lossless after that
    reference, _ = soundfile.read(decoded(players[2], "audio/flac"))
    assert len(reference) == 5 * RATE_HZ and "first 5 s" in html  # of 7 s


def test_the_pictures_show_the_tones(html: str) -> None:
    pictures = [imread(decoded(source, "image/png")) for source in Page(html).sources["img"]]
    assert [picture.shape[:2] for picture in pictures] == [(100, 94)] * 4  # mels, 24,000 // 256 + 1 frames
    # HTK mel m = 2595 log10(1 + f / 700) from 0 to 12 kHz in 101 steps: the brightest channel, from the bottom.
    top = 2595 * math.log10(1 + 12_000 / 700)
    for picture, frequency_hz in zip(pictures, (300, 600), strict=False):
        channel = 2595 * math.log10(1 + frequency_hz / 700) / top * 101 - 1
        brightness = torch.from_numpy(picture[::-1, 47, :3].sum(-1).copy())
        assert abs(int(brightness.argmax()) - channel) <= 1


def test_the_curves_are_svg_in_the_colour_of_the_page(html: str) -> None:
    svg = ElementTree.fromstring(html[html.index("<svg") : html.index("</svg>") + 6])
    texts = {"".join(element.itertext()) for element in svg.iter("{http://www.w3.org/2000/svg}text")}
    assert {"reward (trained)", "DNSMOS overall (judge)", "update"} <= texts
    assert "currentColor" in html and "#010203" not in html


def test_the_file_stays_small(tmp_path: Path) -> None:
    # 8 prompts of 12 s of noise do not fit: FLAC cannot shrink them.
    folder = write_run(tmp_path, samples=10)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 12 * RATE_HZ)
    for path in (folder / "samples").glob("[ba]*.wav"):
        soundfile.write(path, noise, RATE_HZ)
    page = write_report(folder)
    assert page.stat().st_size < MAX_BYTES + 100_000
    shown = len(Page(page.read_text()).sources["audio"]) // 3
    assert 1 <= shown < 8 and f"{10 - shown} more are in" in page.read_text()


def test_a_run_without_heldout_prompts(tmp_path: Path) -> None:
    summary = {"algorithm": "draft", "steps": 2, "seconds": 1.0, "before": {}, "after": {}, "verdict": {}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n{"step": 2, "reward": null}\n')
    html = write_report(tmp_path).read_text()
    Page(html)
    assert "No held-out prompts" in html and "not measured" in html


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the summary of a finished run"):
        write_report(tmp_path)
