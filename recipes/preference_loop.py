"""The whole loop of preferences, measured offline: takes, answers, a reward learnt from them, two ways to train.

The annotator is a script with a hidden rule, and no person: DNSMOS overall q (speech/measures.py) of a clip,

    |q(left) - q(right)| < least_difference: tie,  else the clip of the higher q,  turned around with probability wrong

It answers on the labelling page's own storage (rlhf_mel/annotate: order, sides, attention checks, export). For each
seed, with takes, slips and noise of its own:

    answers     two takes of a training prompt make a pair, `--pairs` of them are answered; of the tuning prompts all
                pairs of `--heldout_takes` takes are answered without slips; both are exported
    reward      recipes/reward_model.py learns from the first and is judged by the second
    draft       recipes/drlx.py: DRaFT through all of the solve, towards that reward alone
    flow_dpo    recipes/flow_dpo.py on the same pairs, without the reward

The last two hear the same held-out prompts before and after. DNSMOS is the judge of every run, so the hidden rule's
rise stands in summary.json; training hears neither it nor DistillMOS, which is there as a reward of weight 0. The rows
"all" are of each prompt's mean over the seeds. table.md and table.json say which bars are met: the reward's accuracy at
least 0.85; its choice of a copy at +6 dB at most 0.55, ties counted half; the hidden rule's rise above 0; the guards of
measures.py on words, voice, level and pitch; Flow-DPO's updates within 180 s.

Leaves out: people, whom no rule is like; the control arm (recipes/flow_dpo.py --algorithm sft_chosen).
Hardware: a GPU and 16 cores, minutes for three seeds; two CPU cores, an hour a seed. A finished stage is not run again.
    python recipes/preference_loop.py --out runs/preference_loop --seeds 1 2 3 --jobs 3
    python recipes/preference_loop.py --out runs/whisper_loop --encoder models/whisper-base      the body "whisper"
    python recipes/preference_loop.py --out runs/other --dpo_args="--learning_rate 3e-4"         any option of a stage
Numbers so far, of one part: docs/preferences.md.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reward_report import as_audio
from torch import Tensor

from rlhf_mel import load_policy, load_prompts, load_vocoder
from rlhf_mel.annotate.agreement import annotators
from rlhf_mel.annotate.export import export
from rlhf_mel.annotate.labelling import Labelling, is_check
from rlhf_mel.annotate.store import Answers
from rlhf_mel.annotate.tasks import load_pairs
from rlhf_mel.data.prompts import PromptDataset
from rlhf_mel.evaluation.evaluate import EvaluationResult
from rlhf_mel.evaluation.verdict import OK, WORSE, verdict
from rlhf_mel.pipeline import Sampling
from rlhf_mel.samplers.pairs import PairMaker, PairOptions, write_pairs
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.speech.measures import JUDGE, MEASURES, dnsmos, measure
from rlhf_mel.training.run_folder import write_json

RECIPES = Path(__file__).parent
ACCELERATE = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
STAGES = ("answers", "reward", "draft", "flow_dpo")
WAYS = ("draft", "flow_dpo")
ANNOTATOR = "the rule"
MOS = "rewards/mos"
ACCURACY, PLUS_6_DB_WINS, TRAINING_S = 0.85, 0.55, 180.0
"""The bars that are not guards of measures.py."""
GUARDS = ("cer", "voice_similarity", "level_dbfs", "f0_std_semitones")
DRAFT = (
    *("--algorithm", "draft", "--algorithm_kwargs", '{"grad_steps": null}', "--learning_rate", "1e-3"),
    *("--max_steps", "12", "--per_device_train_batch_size", "12", "--gradient_accumulation_steps", "1"),
)
WHISPER = ("--window_s", "4", "--num_train_epochs", "4")

Rule = Callable[[Tensor, int], float]
"""Samples [S] and their rate in Hz to a quality; higher is better."""


# The annotator.


def hidden_rule(clip: Tensor, rate_hz: int) -> float:
    """DNSMOS overall."""
    return float(dnsmos(as_audio([clip], rate_hz, MelSpec()))["dnsmos_ovrl"])


@dataclass(frozen=True, kw_only=True)
class Annotator:
    """Answers by a rule, with slips; see the module."""

    rule: Rule
    least_difference: float = 0.0
    """Clips whose qualities differ by less are a tie."""
    wrong: float = 0.0
    """Probability that an answer for one clip is turned around."""
    seed: int = 0

    def slips(self, task: str) -> bool:
        """Whether the answer to a task is turned around, where it is no tie: by seed and task, whenever it is asked."""
        return random.Random(f"{self.seed} {task}").random() < self.wrong

    def choice(self, task: str, left: float, right: float) -> str:
        """Of labelling.CHOICES, by the qualities."""
        if abs(left - right) < self.least_difference or left == right:
            return "tie"
        return "left" if (left > right) != self.slips(task) else "right"

    def answer_all(self, labelling: Labelling, jobs: int = 1) -> dict[str, int]:
        """Answer what is left to answer; how many answers there are, and of which kinds."""
        step = labelling.next_step(ANNOTATOR)
        qualities = {} if step is None else heard(labelling, self.rule, jobs)
        while step is not None:
            task = step.task.id
            labelling.answer(step, self.choice(task, qualities[task, "left"], qualities[task, "right"]))
            step = labelling.next_step(ANNOTATOR)
        (said,) = annotators(labelling.answers.all(), labelling.axes)
        decided = (one for one in labelling.answers.all() if one.answer in ("a", "b") and not is_check(one.task))
        return {
            "answers": said.answers,
            "ties": said.ties,
            "turned_around": sum(self.slips(one.task) for one in decided),
            "checks": said.checks,
            "failed_checks": said.failed_checks,
        }


def heard(labelling: Labelling, rule: Rule, jobs: int) -> dict[tuple[str, str], float]:
    """The quality of the "left" and the "right" clip of every task, by the task's id; equal clips are heard once."""
    clips: dict[str, tuple[Tensor, int]] = {}
    places: dict[tuple[str, str], str] = {}
    for task in labelling.plan(ANNOTATOR):
        shown = labelling.clips(task)
        for side in ("left", "right"):
            digest = hashlib.sha256(shown[side][0].numpy().tobytes()).hexdigest()
            clips[digest], places[task.id, side] = shown[side], digest
    with ThreadPoolExecutor(jobs) as pool:
        qualities = dict(zip(clips, pool.map(lambda clip: rule(*clip), clips.values()), strict=True))
    return {place: qualities[digest] for place, digest in places.items()}


# The stage "answers".


def paired_takes(
    make: Callable[[PairOptions], PairMaker], prompts: PromptDataset, takes: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Unranked rows without an end: all pairs of `takes` takes of each prompt, then of as many others, and so on."""
    for number in itertools.count():
        options = PairOptions(n=takes, choose="all", seed=seed + number * takes)
        yield from make(options).rows(prompts)


def answers(args: argparse.Namespace, seed: int) -> None:
    """Sample, answer and export the pairs of a seed; what is there already is kept."""
    folder = folder_of(args, seed)
    folder.mkdir(parents=True, exist_ok=True)
    policy, vocoder = load_policy("tiny", device=args.device), load_vocoder("tiny").to(args.device)
    sampling = Sampling(steps=args.sampling_steps, cfg_strength=args.cfg_strength)

    def make(options: PairOptions) -> PairMaker:
        return PairMaker(policy, vocoder, None, options, sampling, device=args.device)

    counts = {}
    for name, split, count, takes, wrong in (
        ("train", "train", args.pairs, 2, args.wrong),
        ("heldout", "tuning", args.heldout_pairs, args.heldout_takes, 0.0),
    ):
        unranked, exported = folder / f"pairs_{name}", folder / name
        if not has_data(unranked):
            rows = paired_takes(make, load_prompts("tiny", split=split), takes, 1000 * seed)
            about = f"Takes of the bundled policy, {args.sampling_steps} steps, guidance {args.cfg_strength:g}."
            write_pairs(itertools.islice(rows, count), unranked, ranked=False, about=about)
        labelling = Labelling(load_pairs(str(unranked)), Answers(folder / f"answers_{name}.sqlite"), seed=seed)
        annotator = Annotator(rule=hidden_rule, least_difference=args.least_difference, wrong=wrong, seed=seed)
        counts[name] = annotator.answer_all(labelling, args.threads)
        if not has_data(exported):
            about = f"Answers of a script: DNSMOS overall, {wrong:.0%} turned around. No people."
            print("\n".join(export(labelling, exported, about=about)), flush=True)
    write_json(folder / "counts.json", counts)


def has_data(folder: Path) -> bool:
    """Whether a data set lies there."""
    return any(folder.glob("data/*.parquet"))


# Stages as commands.


def folder_of(args: argparse.Namespace, seed: int) -> Path:
    return Path(args.out) / f"seed_{seed}"


def command(stage: str, args: argparse.Namespace, seed: int, argv: Sequence[str]) -> list[str]:
    """What runs a stage of a seed, in a process of its own."""
    folder = folder_of(args, seed)
    if stage == "answers":
        return [sys.executable, str(RECIPES / "preference_loop.py"), *argv, "--stage", stage, "--seeds", str(seed)]
    common = ["--seed", str(seed), "--output_dir", str(folder / stage)]
    if stage == "reward":
        body = ["--body", "whisper", "--encoder", args.encoder, *WHISPER] if args.encoder else []
        data = ["--train_preferences", str(folder / "train"), "--eval_preferences", str(folder / "heldout")]
        return [sys.executable, str(RECIPES / "reward_model.py"), *data, *body, *common, *shlex.split(args.reward_args)]
    common += ["--cfg_strength", str(args.cfg_strength), "--sampling_steps", str(args.sampling_steps)]
    common += ["--num_eval_prompts", str(args.eval_prompts), "--noise_floor", "false"]
    common += ["--cpu_threads", str(args.threads)]
    if stage == "draft":
        rewards = ["--reward_models", str(folder / "reward"), "mos", "--reward_weights", "1", "0"]
        return [*ACCELERATE, str(RECIPES / "drlx.py"), *rewards, *DRAFT, *common, *shlex.split(args.draft_args)]
    pairs = ["--train_preferences", str(folder / "train"), "--reward_models", "mos"]
    return [*ACCELERATE, str(RECIPES / "flow_dpo.py"), *pairs, *common, *shlex.split(args.dpo_args)]


def finish(stage: str, args: argparse.Namespace, seed: int, argv: Sequence[str]) -> None:
    """Run a stage of a seed, its output to a file, unless it is finished; then its seconds are in STAGE.json.

    Raises:
        RuntimeError: it failed; the end of its output.
    """
    folder = folder_of(args, seed)
    folder.mkdir(parents=True, exist_ok=True)
    finished, log = folder / f"{stage}.json", folder / f"{stage}.log"
    if finished.exists():
        return
    started = time.monotonic()
    with log.open("w") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(
            command(stage, args, seed, argv), stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    if done.returncode:
        raise RuntimeError(
            f"{stage} of seed {seed} ended with {done.returncode}; {log} ends:\n{log.read_text()[-2000:]}"
        )
    seconds = time.monotonic() - started
    write_json(finished, {"seconds": seconds})
    print(f"seed {seed}: {stage} in {seconds:.0f} s", flush=True)


def run_all(args: argparse.Namespace, argv: Sequence[str]) -> None:
    """Every stage of every seed, `--jobs` at a time: the answers first, then each way by itself."""
    chains = [(("reward", "draft"), seed) for seed in args.seeds] + [(("flow_dpo",), seed) for seed in args.seeds]

    def run(stages: Sequence[str], seed: int) -> None:
        for stage in stages:
            finish(stage, args, seed, argv)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: run(["answers"], seed), args.seeds))
        list(pool.map(lambda chain: run(*chain), chains))


# The table.


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a way did with a seed."""

    summary: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]
    updates_s: float
    """Of the updates alone: not of listening, nor of reading the pairs."""
    whole_s: float
    """Of the whole command."""


def read_run(folder: Path, way: str) -> Run:
    lines = [json.loads(line) for line in (folder / way / "metrics.jsonl").read_text().splitlines()]
    steps = [0, *(line["step"] for line in lines if "step_time" in line)]
    times = [line["step_time"] for line in lines if "step_time" in line]
    return Run(
        summary=read_json(folder / way / "summary.json"),
        samples=read_json(folder / way / "samples/index.json"),
        updates_s=sum((last - first) * mean for first, last, mean in zip(steps, steps[1:], times, strict=False)),
        whole_s=read_json(folder / f"{way}.json")["seconds"],
    )


def over_seeds(runs: Sequence[Run]) -> dict[str, Any]:
    """The verdict on each prompt's mean over the seeds that it was measured in both times; `reward` is DistillMOS."""
    names = [MOS, *(name for name in MEASURES if name in runs[0].samples[0]["scores_before"])]
    columns = {name: mean_over_seeds(runs, name) for name in names}
    voices = [str(sample["voice"]) for sample in runs[0].samples]
    closed = "by_voice" in runs[0].summary["verdict"]["judge"]
    before, after = (
        EvaluationResult(
            {"reward": columns[MOS][place], **{name: values[place] for name, values in columns.items()}},
            [],
            MelSpec().sample_rate_hz,
            [],
            voices,
            closed,
        )
        for place in range(2)
    )
    return verdict(before, after)


def mean_over_seeds(runs: Sequence[Run], name: str) -> list[list[float]]:
    """Before and after [2, prompts]; NaN where no seed measured a prompt both times."""
    scores = [
        [[sample[f"scores_{when}"][name] for sample in run.samples] for when in ("before", "after")] for run in runs
    ]
    values = np.ma.masked_invalid(np.array(scores, dtype=float))
    values.mask = np.broadcast_to(np.ma.getmaskarray(values).any(1, keepdims=True), values.shape)
    means: list[list[float]] = values.mean(0).filled(np.nan).tolist()
    return means


def bars(rewards: Sequence[Mapping[str, Any]], runs: Mapping[str, Sequence[Run]]) -> list[dict[str, Any]]:
    """Each bar: what is asked for, what each seed reached, what all did, and whether that is enough (None: unsure)."""
    accuracies = [report["accuracy"] for report in rewards]
    louder = [wins_of_a_louder_copy(report) for report in rewards]
    training = [run.updates_s for run in runs["flow_dpo"]]
    found = [
        bar("accuracy on held-out pairs", f">= {ACCURACY}", accuracies, np.mean(accuracies) >= ACCURACY),
        bar("a copy at +6 dB wins", f"<= {PLUS_6_DB_WINS}", louder, np.mean(louder) <= PLUS_6_DB_WINS),
    ]
    for way, own in runs.items():
        pooled = over_seeds(own)
        rises = [run.summary["verdict"]["judge"] for run in own]
        found.append(bar(f"{way}: hidden rule", "above 0", rises, pooled["judge"]["low"] > 0, pooled["judge"]))
        for guard in GUARDS:
            entry, each = pooled["guards"][guard], [run.summary["verdict"]["guards"][guard] for run in own]
            met = {OK: True, WORSE: False}.get(entry["status"])
            found.append({**bar(f"{way}: {measure(guard).name}", entry["limit"], each, met, entry), "guard": guard})
    return [*found, bar("flow_dpo: seconds of updates", f"<= {TRAINING_S:g}", training, max(training) <= TRAINING_S)]


def bar(
    name: str, asked: str, seeds: Sequence[Any], met: Any, pooled: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    return {"bar": name, "asked": asked, "seeds": seeds, "all": pooled, "met": None if met is None else bool(met)}


def wins_of_a_louder_copy(report: Mapping[str, Any]) -> float:
    """How often a reward prefers the copy at +6 dB; a tie is half a win."""
    shares = report["audit"]["plus_6_db"]
    return float(shares["wins"] + shares["ties"] / 2)


def markdown(found: Mapping[str, Any]) -> str:
    """The three tables of table.md."""
    said = {True: "yes", False: "**no**", None: "undecided"}
    lines = [["bar", "asked for", *(f"seed {seed}" for seed in found["seeds"]), "all", "met"]]
    for one in found["bars"]:
        values = [*one["seeds"], float(np.mean(one["seeds"])) if one["all"] is None else one["all"]]
        cells = [number(value) if isinstance(value, float) else change(value, one.get("guard", "")) for value in values]
        lines.append([one["bar"], one["asked"], *cells, said[one["met"]]])
    names = [measure(JUDGE).name, "DistillMOS", *(measure(guard).name for guard in GUARDS)]
    reached = [["way", "seed", *names, "seconds of updates", "of the command"]]
    reached += [result(row) for row in found["results"]]
    answered = [["seed", "pairs", "ties", "turned around", "held-out pairs", "ties", "accuracy, 95 % interval"]]
    answered += [learnt(row) for row in found["answers"]]
    return "\n".join(table(rows) for rows in (lines, reached, answered))


def result(row: Mapping[str, Any]) -> list[str]:
    cells = [change(row["judge"]), change(row["mos"]), *(change(row["guards"][guard], guard) for guard in GUARDS)]
    times = ["" if row[name] is None else f"{row[name]:.0f}" for name in ("updates_s", "whole_s")]
    return [row["way"], str(row["seed"]), *cells, *times]


def learnt(row: Mapping[str, Any]) -> list[str]:
    counts = [row[split][name] for split, name in (("train", "answers"), ("train", "ties"), ("train", "turned_around"))]
    counts += [row["heldout"]["answers"], row["heldout"]["ties"]]
    low, high = row["accuracy_interval"]
    return [str(row["seed"]), *map(str, counts), f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]"]


def change(entry: Mapping[str, Any], guard: str = "") -> str:
    """A change with its interval, in percent where the guard is a share; what could not be measured is said."""
    if entry.get("change") is None:
        return str(entry["status"])
    known = MEASURES[guard].guard if guard else None
    unit, digits, scale = (" %", 0, 100) if known is not None and known.relative else ("", 3, 1)
    ends = [
        "?" if end is None else f"{scale * end:+.{digits}f}" for end in (entry[n] for n in ("change", "low", "high"))
    ]
    return f"{ends[0]}{unit} [{ends[1]}, {ends[2]}]"


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.0f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def found_in(args: argparse.Namespace) -> dict[str, Any]:
    """What table.json holds, from the folders of all seeds."""
    folders = [folder_of(args, seed) for seed in args.seeds]
    reports = [read_json(folder / "reward/report.json") for folder in folders]
    runs = {way: [read_run(folder, way) for folder in folders] for way in WAYS}
    kept = ("accuracy", "accuracy_interval", "audit")
    return {
        "device": runs["draft"][0].summary["device"],
        "seeds": args.seeds,
        "bars": bars(reports, runs),
        "results": [row for way, own in runs.items() for row in results(way, args.seeds, own)],
        "answers": [
            {"seed": seed, **read_json(folder / "counts.json"), **{name: report[name] for name in kept}}
            for seed, folder, report in zip(args.seeds, folders, reports, strict=True)
        ],
    }


def results(way: str, seeds: Sequence[int], runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """A row a seed: judge and guards as the run's own verdict has them, DistillMOS; and a row of all seeds."""
    for seed, run in zip(seeds, runs, strict=True):
        said, seconds = run.summary["verdict"], {"updates_s": run.updates_s, "whole_s": run.whole_s}
        yield {"way": way, "seed": seed, **outcome(said, over_seeds([run])["reward"]), **seconds}
    pooled = over_seeds(runs)
    yield {"way": way, "seed": "all", **outcome(pooled, pooled["reward"]), "updates_s": None, "whole_s": None}


def outcome(said: Mapping[str, Any], mos: Mapping[str, Any]) -> dict[str, Any]:
    return {"judge": said["judge"], "mos": mos, "guards": said["guards"]}


# Files and options.


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="stages at a time")
    parser.add_argument("--stage", default="all", choices=("all", *STAGES, "table"), help="one alone, of each seed")
    parser.add_argument("--pairs", type=int, default=300, help="to answer, ties included")
    parser.add_argument("--heldout_pairs", type=int, default=192)
    parser.add_argument("--heldout_takes", type=int, default=4, help="of a tuning prompt, all paired")
    parser.add_argument("--wrong", type=float, default=0.1, help="share of the answers that are turned around")
    parser.add_argument("--least_difference", type=float, default=0.15, help="of DNSMOS; less is a tie")
    parser.add_argument("--cfg_strength", type=float, default=0.0, help="of takes, training and evaluation")
    parser.add_argument("--sampling_steps", type=int, default=8, help="the same")
    parser.add_argument("--eval_prompts", type=int, default=50, help="held-out prompts heard before and after")
    parser.add_argument("--encoder", help="a Whisper's folder (transformers): the reward is of the body 'whisper'")
    for stage, script in (("reward", "reward_model.py"), ("draft", "drlx.py"), ("dpo", "flow_dpo.py")):
        parser.add_argument(f"--{stage}_args", default="", help=f'more for {script}: --{stage}_args="--seed 3"')
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the takes")
    args = parser.parse_args(argv)
    cores = max(1, (os.cpu_count() or 1) // args.jobs)
    args.threads = int(os.environ.get("OMP_NUM_THREADS", cores))
    return args


def settle(args: argparse.Namespace) -> None:
    """Keep the options that finished stages were run with, or raise a ValueError where they are others now."""
    free = {"out", "seeds", "jobs", "stage", "device", "threads"}
    options, file = (
        {name: value for name, value in vars(args).items() if name not in free},
        Path(args.out) / "options.json",
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        write_json(file, options)
    kept = read_json(file)
    if others := sorted(name for name in options if kept.get(name) != options[name]):
        raise ValueError(
            f"{file}: expected { ({name: kept.get(name) for name in others}) }, got "
            f"{ ({name: options[name] for name in others}) }; go on with those, or name another --out"
        )


def main(argv: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if argv is None else argv)
    args = parse(given)
    try:
        settle(args)
        if args.stage == "answers":
            for seed in args.seeds:
                answers(args, seed)
        elif args.stage == "all":
            run_all(args, given)
        elif args.stage != "table":
            for seed in args.seeds:
                finish(args.stage, args, seed, given)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"preference_loop.py: {error}") from None
    if args.stage in ("all", "table"):
        found = found_in(args)
        write_json(Path(args.out) / "table.json", found)
        (Path(args.out) / "table.md").write_text(markdown(found), encoding="utf-8")
        print(markdown(found))


if __name__ == "__main__":
    main()
