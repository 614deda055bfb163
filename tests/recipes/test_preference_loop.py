"""The loop of preferences, measured: the annotator and its storage, bars and tables by hand, stages, one whole loop."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import preference_loop as loop
import reward_report

from rlhf_mel.annotate.export import export
from rlhf_mel.annotate.labelling import Labelling
from rlhf_mel.annotate.store import Answers
from rlhf_mel.annotate.tasks import Pairs
from rlhf_mel.data.preferences.load import load_preferences
from rlhf_mel.evaluation.intervals import mean_interval
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.speech.preference_model import PreferenceModel, save_preference_model
from rlhf_mel.training.arguments import parse_arguments

LEVELS_DB = ((-20, -30), (-30, -20), (-20, -20.5), (-40, -20), (-25, -35), (-35, -25), (-20.5, -20), (-30, -40))
"""Of the first and the second clip; two of the eight pairs differ by less than 1 dB."""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def noise(level_db: float, seed: int) -> dict[str, Any]:
    samples = np.random.default_rng(seed).standard_normal(6000)
    file = io.BytesIO()
    soundfile.write(file, samples / samples.std() * 10 ** (level_db / 20), 24_000, format="WAV", subtype="FLOAT")
    return {"bytes": file.getvalue(), "path": None}


def pairs() -> Pairs:
    of_all = {"seed_a": 10, "seed_b": 11}
    rows = [
        {"prompt": f"text {n % 4}", "audio_a": noise(a, 2 * n), "audio_b": noise(b, 2 * n + 1), "row": n, **of_all}
        for n, (a, b) in enumerate(LEVELS_DB)
    ]
    return Pairs(rows)


def level_db(clip: torch.Tensor, rate_hz: int) -> float:
    assert rate_hz == 24_000
    return 10 * math.log10(float(clip.square().mean()))


def small_model() -> PreferenceModel:
    return PreferenceModel(PreferenceModel.Config(dim=16, num_layers=1, num_members=1), mel_spec=MelSpec(), seed=1)


def labelling(folder: Path) -> Labelling:
    return Labelling(pairs(), Answers(folder / "answers.sqlite"), check_share=0.25)


# The annotator.


def test_the_annotator_by_hand() -> None:
    never, always = (loop.Annotator(rule=level_db, least_difference=0.15, wrong=wrong) for wrong in (0.0, 1.0))
    for left, right, want, turned in (
        (2.0, 2.5, "right", "left"),
        (2.5, 2.0, "left", "right"),
        (2.0, 2.14, "tie", "tie"),
        (2.0, 2.16, "right", "left"),
        (2.0, 2.0, "tie", "tie"),
    ):
        assert (never.choice("t", left, right), always.choice("t", left, right)) == (want, turned)
    assert loop.Annotator(rule=level_db).choice("t", 2.0, 2.0) == "tie"  # without a least difference, too


def test_slips_are_a_tenth_and_stay_what_they_are() -> None:
    # 2000 draws of a tenth: 200 with a deviation of 13.4
    tasks = [f"pair{n}" for n in range(2000)]
    slips = [[loop.Annotator(rule=level_db, wrong=0.1, seed=seed).slips(task) for task in tasks] for seed in (0, 0, 1)]
    assert slips[0] == slips[1] != slips[2]
    assert all(abs(sum(one) - 200) < 4 * 13.4 for one in slips)


def test_answers_go_through_the_storage_of_the_page(tmp_path: Path) -> None:
    """Of each decided pair the louder clip is chosen, except where it slipped; ties are ties, pair 6 despite a slip."""
    annotator = loop.Annotator(rule=level_db, least_difference=1.0, wrong=0.4, seed=2)
    asked = labelling(tmp_path)
    counts = annotator.answer_all(asked)
    export(asked, tmp_path / "preferences")
    rows = load_preferences(tmp_path / "preferences", ties="keep", require_text=False).rows
    found = {row["row"]: (row["chosen_seed"], row["soft_label"]) for row in rows}
    decided = [n for n, (a, b) in enumerate(LEVELS_DB) if abs(a - b) >= 1]
    assert counts["answers"] == len(LEVELS_DB) == len(found) and counts["ties"] == 2
    ids = {row: task for task, row in asked.pairs.ids.items()}
    turned = [n for n in decided if annotator.slips(ids[n])]
    assert counts["turned_around"] == len(turned) and 0 < len(turned) < len(decided)
    for n, (a, b) in enumerate(LEVELS_DB):
        louder, quieter = (10, 11) if a > b else (11, 10)
        assert found[n] == (quieter if n in turned else louder, 1.0) if n in decided else found[n][1] == 0.5
    assert counts["checks"] == 2  # a quarter of eight; a copy with noise is as loud or louder


def test_an_annotator_goes_on_and_hears_every_clip_once(tmp_path: Path) -> None:
    heard: list[float] = []

    def rule(clip: torch.Tensor, rate_hz: int) -> float:
        heard.append(level_db(clip, rate_hz))
        return heard[-1]

    annotator = loop.Annotator(rule=rule, least_difference=1.0, wrong=0.4, seed=2)
    step = labelling(tmp_path).next_step(loop.ANNOTATOR)
    assert step is not None
    labelling(tmp_path).answer(step, "both_bad")
    counts = annotator.answer_all(labelling(tmp_path), jobs=2)
    assert len(heard) == 16 + 2  # the clips of eight pairs, and the degraded copy of each of two checks
    assert counts["answers"] == 8
    assert annotator.answer_all(labelling(tmp_path)) == counts and len(heard) == 18  # nothing left to hear
    (first, *_) = labelling(tmp_path).answers.all()
    assert first.answer == "both_bad"  # what was answered before stays


def test_what_is_exported_measures_a_known_scorer(tmp_path: Path) -> None:
    """Without slips the rule itself is always right, its negative never; with slips right but where it was turned."""
    for wrong, name in ((0.0, "right"), (0.4, "slips")):
        folder = tmp_path / name
        folder.mkdir()
        annotator = loop.Annotator(rule=level_db, least_difference=1.0, wrong=wrong, seed=2)
        counts = annotator.answer_all(labelling(folder))
        export(labelling(folder), folder / "preferences")
        data = load_preferences(folder / "preferences")
        numbered = reward_report.Numbered(data, range(len(data)))
        assert len(data) == 6

        def power(audio: Any, _: Any) -> torch.Tensor:
            rows = zip(audio.waveform, audio.lengths_samples.tolist(), strict=True)
            return torch.stack([row[:length].square().mean() for row, length in rows])[:, None]

        found = reward_report.score_pairs(power, numbered, 4)
        accuracy = (found.chosen > found.rejected).double().mean().item()
        assert accuracy == pytest.approx(1 - counts["turned_around"] / 6)
        assert (accuracy == 1) == (wrong == 0)


def test_a_score_without_level_wins_half_of_the_time_and_loudness_always() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = [0.05 * torch.randn(12_000, generator=generator) for _ in range(4)]
    prompts: Any = type("P", (), {"select": lambda self, rows: self, "to": lambda self, device: self})()
    network = small_model()

    def blind(audio: Any, _: Any) -> torch.Tensor:
        scores: torch.Tensor = network.eval()(audio)
        return scores

    def loud(audio: Any, _: Any) -> torch.Tensor:
        return audio.waveform.square().mean(1, keepdim=True)

    wins = [
        loop.wins_of_a_louder_copy({"audit": reward_report.audit(score, clips, prompts, MelSpec())})
        for score in (blind, loud, lambda *heard: -loud(*heard))
    ]
    assert wins == [0.5, 1.0, 0.0]
    assert loop.wins_of_a_louder_copy({"audit": {"plus_6_db": {"wins": 0.2, "losses": 0.5, "ties": 0.3}}}) == 0.35


# The table.


def run_of(*values: tuple[float, float], cer: tuple[float, float] = (0.2, 0.2), seconds: float = 10.0) -> loop.Run:
    """A run that took DNSMOS of each prompt from the one value to the other, and MOS by twice as much."""
    names = {
        "voice_similarity": 0.9,
        "level_dbfs": -20.0,
        "f0_std_semitones": 2.0,
        "silence_ratio": 0.2,
        "duration_s": 2.0,
    }
    samples = [
        {
            "voice": f"v{n % 2}",
            **{
                f"scores_{when}": {"rewards/mos": 2 * pair[k], "dnsmos_ovrl": pair[k], "cer": cer[k], **names}
                for k, when in enumerate(("before", "after"))
            },
        }
        for n, pair in enumerate(values)
    ]
    entry = {"change": 0.0, "low": -1.0, "high": 1.0, "status": "ok", "by_voice": {}}
    said = {"judge": entry, "guards": dict.fromkeys(loop.GUARDS, entry)}
    return loop.Run(summary={"verdict": said, "device": "cpu"}, samples=samples, updates_s=seconds, whole_s=30.0)


def test_all_seeds_are_the_mean_of_each_prompt() -> None:
    """Changes 0.1, 0.3, 0.4 and 0.3, 0.5, of the third prompt NaN: 0.2, 0.4, 0.4 on average."""
    runs = [run_of((2.0, 2.1), (3.0, 3.3), (2.0, 2.4)), run_of((2.2, 2.5), (3.0, 3.5), (math.nan, 2.0))]
    pooled = loop.over_seeds(runs)
    want = mean_interval([0.2, 0.4, 0.4])
    for entry, times in ((pooled["judge"], 1), (pooled["reward"], 2)):
        assert [entry[name] for name in ("change", "low", "high")] == pytest.approx(
            [times * end for end in (want.change, want.low, want.high)]
        )
    assert pooled["judge"]["before"] == pytest.approx((2.1 + 3.0 + 2.0) / 3)
    assert pooled["guards"]["cer"]["change"] == 0 and pooled["guards"]["f0_std_semitones"]["status"] == "ok"
    nothing = loop.mean_over_seeds([run_of((math.nan, 1.0), (1.0, 1.0))], "dnsmos_ovrl")
    assert math.isnan(nothing[0][0]) and math.isnan(nothing[1][0]) and nothing[0][1] == 1


def report_of(accuracy: float, wins: float) -> dict[str, Any]:
    shares = {"wins": wins, "losses": 1 - wins, "ties": 0.0}
    return {"accuracy": accuracy, "accuracy_interval": [accuracy - 0.1, accuracy], "audit": {"plus_6_db": shares}}


@pytest.mark.parametrize(
    ("accuracies", "wins", "rise", "cer", "seconds", "met"),
    [
        ((0.8, 0.91), 0.55, 0.1, 0.2, 180.0, [True, True, True, True, True]),
        ((0.8, 0.89), 0.56, -0.1, 0.22, 181.0, [False, False, False, False, False]),
    ],
)
def test_bars_at_their_edges(
    accuracies: tuple[float, float], wins: float, rise: float, cer: float, seconds: float, met: list[bool]
) -> None:
    """Accuracy on average; a CER up by 0.02 on every prompt lies beyond what its guard allows, 0.01."""
    values = [(2.0, 2.0 + rise), (2.5, 2.5 + 1.2 * rise), (3.0, 3.0 + 0.9 * rise)]
    runs = {way: [run_of(*values, cer=(0.2, cer), seconds=s) for s in (1.0, seconds)] for way in loop.WAYS}
    found = {bar["bar"]: bar["met"] for bar in loop.bars([report_of(a, wins) for a in accuracies], runs)}
    names = ["accuracy on held-out pairs", "a copy at +6 dB wins", "draft: hidden rule", "flow_dpo: CER"]
    assert [found[name] for name in [*names, "flow_dpo: seconds of updates"]] == met
    assert len(found) == 2 + 2 * (1 + 4) + 1


def test_an_interval_around_0_is_no_rise_and_one_around_a_limit_undecided() -> None:
    values = [(2.0, 2.5), (2.0, 1.6), (2.0, 2.1)]
    runs = {way: [run_of(*values)] for way in loop.WAYS}
    for way in loop.WAYS:
        for place, sample in enumerate(runs[way][0].samples):
            sample["scores_after"]["cer"] = 0.2 + (-0.1, 0.05, 0.08)[place]  # type: ignore[index]
    found = {bar["bar"]: bar["met"] for bar in loop.bars([report_of(0.9, 0.5)], runs)}
    assert found["draft: hidden rule"] is False and found["draft: CER"] is None


def test_the_tables_say_shares_in_percent_and_what_is_not_known() -> None:
    entry = {"change": -0.123, "low": -0.2514, "high": 0.0, "status": "ok"}
    assert loop.change(entry) == "-0.123 [-0.251, +0.000]"
    assert loop.change(entry, "f0_std_semitones") == "-12 % [-25, +0]" and loop.change(entry, "cer")[:6] == "-0.123"
    assert loop.change({**entry, "low": None}) == "-0.123 [?, +0.000]"
    assert loop.change({"status": "not measured"}) == loop.change({**entry, "change": None, "status": "not measured"})
    values = [(2.0, 2.5), (2.0, 1.6), (2.0, 2.1)]
    runs = {way: [run_of(*values), run_of(*values, seconds=200.0)] for way in loop.WAYS}
    found = {"seeds": [3, 4], "bars": loop.bars([report_of(0.9, 0.5), report_of(0.6, 0.5)], runs), "answers": []}
    found |= {"results": [row for way, own in runs.items() for row in loop.results(way, [3, 4], own)]}
    lines = loop.markdown(found).splitlines()
    assert lines[0] == "| bar | asked for | seed 3 | seed 4 | all | met |"
    assert lines[2] == "| accuracy on held-out pairs | >= 0.85 | 0.900 | 0.600 | 0.750 | **no** |"
    assert "| flow_dpo: seconds of updates | <= 180 | 10 | 200 | 105 | **no** |" in lines
    assert sum(line.startswith("| draft | all | +0.067 [") for line in lines) == 1  # (0.5 - 0.4 + 0.1) / 3


def test_the_seconds_of_updates_are_read_from_the_log(tmp_path: Path) -> None:
    """Lines after 2, 4 and 5 updates, of 1, 2 and 3 s each: 2 + 4 + 3."""
    folder = tmp_path / "draft"
    (folder / "samples").mkdir(parents=True)
    lines = [{"step": 2, "step_time": 1.0}, {"step": 4, "step_time": 2.0}, {"step": 4, "eval_reward": 1.0}]
    lines += [{"step": 5, "step_time": 3.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file, value in (
        ("draft/summary.json", {}),
        ("draft/samples/index.json", []),
        ("draft.json", {"seconds": 20.0}),
    ):
        (tmp_path / file).write_text(json.dumps(value))
    run = loop.read_run(tmp_path, "draft")
    assert (run.updates_s, run.whole_s) == (9.0, 20.0)


# Stages.


def test_both_ways_train_as_the_takes_were_sampled(tmp_path: Path) -> None:
    save_preference_model(small_model(), tmp_path / "seed_2/reward", trained_on={})
    args = loop.parse(["--out", str(tmp_path), "--cfg_strength", "0.5", "--sampling_steps", "5", "--eval_prompts", "3"])
    args.dpo_args = "--learning_rate 3e-4 --algorithm_kwargs '{\"sft_weight\": 5}'"
    configs = {}
    for way, script, file in (("draft", "drlx.py", "demo"), ("flow_dpo", "flow_dpo.py", "flow_dpo")):
        command = loop.command(way, args, 2, [])
        start = command.index(str(loop.RECIPES / script)) + 1
        given = ["--config", str(loop.RECIPES / f"configs/{file}.yaml"), *command[start:], "--use_cpu", "true"]
        config, _ = parse_arguments(given)
        configs[way] = config
        assert (config.cfg_strength, config.sampling_steps, config.num_eval_prompts, config.seed) == (0.5, 5, 3, 2)
        assert config.policy == "tiny" and config.output_dir == str(tmp_path / "seed_2" / way)
    draft, dpo = configs["draft"], configs["flow_dpo"]
    assert (draft.reward_models, draft.reward_weights) == ([str(tmp_path / "seed_2/reward"), "mos"], [1, 0])
    assert (draft.algorithm, draft.algorithm_options, draft.max_steps) == ("draft", {"grad_steps": None}, 12)
    assert draft.train_batch_size * draft.gradient_accumulation_steps == 12  # rollouts an update, whatever the demo has
    assert (dpo.algorithm, dpo.algorithm_options, dpo.learning_rate) == ("flow_dpo", {"sft_weight": 5}, 3e-4)
    assert dpo.train_preferences == str(tmp_path / "seed_2/train") and dpo.reward_models == ["mos"]


def test_a_finished_stage_is_not_run_again_and_a_failed_one_says_why(tmp_path: Path, monkeypatch: Any) -> None:
    args = loop.parse(["--out", str(tmp_path)])
    code = "import sys; open(sys.argv[1], 'a').write('x'); sys.exit(len(open(sys.argv[1]).read()) < 2 and 'not yet')"
    monkeypatch.setattr(loop, "command", lambda *_: [sys.executable, "-c", code, str(tmp_path / "ran")])
    with pytest.raises(RuntimeError, match=r"reward of seed 1 ended with 1; .*\n.*not yet"):
        loop.finish("reward", args, 1, [])
    loop.finish("reward", args, 1, [])
    loop.finish("reward", args, 1, [])
    assert (tmp_path / "ran").read_text() == "xx"
    assert json.loads((tmp_path / "seed_1/reward.json").read_text())["seconds"] > 0


def test_other_options_than_those_of_finished_stages_are_refused(tmp_path: Path) -> None:
    loop.settle(loop.parse(["--out", str(tmp_path), "--pairs", "20"]))
    loop.settle(loop.parse(["--out", str(tmp_path), "--pairs", "20", "--seeds", "4", "--jobs", "2"]))
    with pytest.raises(SystemExit, match=r"expected \{'pairs': 20\}, got \{'pairs': 21\}"):
        loop.main(["--out", str(tmp_path), "--pairs", "21", "--stage", "table"])


@pytest.mark.slow
def test_the_whole_loop_at_its_smallest(tmp_path: Path) -> None:
    argv = [
        "--out",
        str(tmp_path),
        "--seeds",
        "1",
        "2",
        "--pairs",
        "6",
        "--heldout_pairs",
        "6",
        "--sampling_steps",
        "2",
    ]
    argv += ["--eval_prompts", "2", "--least_difference", "0.01", "--device", "cpu"]
    argv += ["--reward_args=--max_steps 2 --dim 16 --num_layers 1 --num_members 2"]
    argv += ["--draft_args=--max_steps 1 --per_device_train_batch_size 2"]
    argv += ["--dpo_args=--max_steps 2 --per_device_train_batch_size 2 --warmup_steps 0"]
    loop.main(argv)
    found = json.loads((tmp_path / "table.json").read_text())
    assert [(row["way"], row["seed"]) for row in found["results"]] == [
        (way, seed) for way in loop.WAYS for seed in (1, 2, "all")
    ]
    assert [row["train"]["answers"] for row in found["answers"]] == [6, 6]
    for row in found["results"]:
        for entry in (row["judge"], row["mos"], *(row["guards"][guard] for guard in ("cer", "voice_similarity"))):
            assert entry["low"] <= entry["change"] <= entry["high"] and entry["prompts"] == 2
    assert len(found["bars"]) == 13
    # both ways heard the same takes before they trained
    for seed in (1, 2):
        before = [json.loads((tmp_path / f"seed_{seed}/{way}/summary.json").read_text())["before"] for way in loop.WAYS]
        assert before[0]["dnsmos_ovrl"] == pytest.approx(before[1]["dnsmos_ovrl"], abs=1e-4)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("seed_*/*.json")}
    loop.main(argv)  # nothing is run again
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.glob("seed_*/*.json")} and len(times) == 10
