"""Every algorithm on the bundled policy at equal cost: held-out reward over seconds, as a table and a plot.

    python recipes/compare.py train --tune --out runs/tune           which learning rate suits which algorithm
    python recipes/compare.py train --out runs/compare --settings runs/tune/settings.json
    python recipes/compare.py judge --out runs/compare [--whisper models/whisper-tiny.en]

Reward: DistillMOS plus the recognizer's log-likelihood a character, weights 1: within a group of rollouts the two
spread by 0.18 and 0.14. All runs share LoRA of rank 16, AdamW, the sampler (7 EPSS steps, no guidance) and the 24
rollouts of an update, of three prompts: rollouts of one prompt share a duration, so they are solved together, and on a
GPU eight cost hardly more than one.

Equal cost: `train` first runs each algorithm's updates alone on an idle device, and takes their mean time, data and
logging included, evaluations not, as the price of one. A run then has as many updates as --seconds pay for. What shares
the device with it afterwards (--workers) cannot change that. The seed of a run is also that of the noise of its
evaluations: it is compared with the base and with the best of 8 that heard the same.

`train` needs no judge but the rewards and the recognizer. It writes to --out as it goes, and a second call does what is
missing: prices.json; runs.jsonl, a line a run; logs/; sounds/NAME_SEED/ROW.ogg, what the trained policy says (Opus at
86 kbit/s, about 1.3 MB a run). `judge` runs anywhere, hears these sounds (DNSMOS, pitch, level, silence; Whisper's word
errors if a model is named), and writes judged.jsonl, table.md, comparison.json and comparison.png. The table
says on which judges a method is worse than the base (`worse_than_base` has the rule), and which guards of
rlhf_mel/speech/measures.py, which have slack, fail in how many runs; cer is no independent judge here, wer is.

--tune listens to the 32 tuning prompts instead of the held-out ones, once for each of VARIANTS and of --factors
of its learning rate; it prints which did best without losing the words (CER at most 0.02 above the base), and writes
these to settings.json as it goes.

Leaves out: full fine-tuning, guidance, several updates from one batch of rollouts, learning rate schedules.
Hardware: a GPU or several, and for each worker a core and about 6 GiB of a GPU's memory. For a look on two CPU cores,
about two minutes:
    python recipes/compare.py train --out runs/look --algorithms draft flow_grpo --seeds 0 --seconds 20 --prompts 4 \\
        --rollouts 4 --generations 2 --priced_updates 2 --workers 1 --device cpu
Number to expect: docs/comparison.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: see drlx.py

import jiwer
import numpy as np
import soundfile
import torch
from comparison import (
    BASE,
    affordable_updates,
    best_settings,
    evaluation_points,
    from_base,
    markdown,
    plot,
    summary,
)
from listen import letters, load_whisper, transcript
from peft import LoraConfig
from transformers import TrainerCallback

from rlhf_mel import Rewards, RLHFConfig, RLHFTrainer, load_policy, load_prompts, load_recognizer, load_vocoder
from rlhf_mel.evaluation.evaluate import EvaluationResult, Sampler, evaluate, plain
from rlhf_mel.pipeline import Sampling
from rlhf_mel.samplers.best_of_n import BestOfN
from rlhf_mel.samplers.noise_optimisation import NoiseOptimisation
from rlhf_mel.samplers.step_guidance import StepGuidance
from rlhf_mel.speech.measures import default_judges
from rlhf_mel.types import Audio

REWARDS = ("mos", "intelligibility")
SAMPLING: Mapping[str, Any] = {"steps": 7, "cfg_strength": 0.0, "sway_sampling_coef": -1.0, "method": "euler"}
SAMPLERS: Mapping[str, Callable[..., Sampler]] = {
    "best_of_8": functools.partial(BestOfN, n=8),
    "noise_optimisation": functools.partial(NoiseOptimisation, updates=7),
    "step_guidance": StepGuidance,
}
"""Better speech from the base as it is: by eight solves, by eight with gradients, by one with a gradient a step."""
CER_SLACK = 0.02
WARM_UP = 3
"""Updates before those that are timed."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is chosen for an algorithm; the rest is its own default."""

    learning_rate: float
    algorithm: str | None = None
    """None: as the row is called."""
    beta: float | None = None
    """None: the algorithm's default."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of its Config."""


SETTINGS = {
    "draft": Setting(learning_rate=2e-3, beta=1.0),
    "flow_grpo": Setting(learning_rate=1e-3, options={"shared_prior": True}),
    "draft_lv": Setting(learning_rate=2e-3, beta=1.0),
    "ddpo": Setting(learning_rate=1e-3),
    "alignprop": Setting(learning_rate=3e-3, beta=1.0),
    "orw_cfm": Setting(learning_rate=3e-3),
    "refl": Setting(learning_rate=2e-3, beta=1.0),
    "diffusion_nft": Setting(learning_rate=1e-3),
    "adjoint_matching": Setting(learning_rate=1e-3, beta=0.01, options={"max_push": 1.0}),
    "awm": Setting(learning_rate=1e-3),
    "ram": Setting(learning_rate=3e-3),
    "adjoint_matching_ode": Setting(
        learning_rate=1e-3, algorithm="adjoint_matching", options={"dynamics": "ode", "last_steps": 3}
    ),
    "flow_cps": Setting(
        learning_rate=1e-3,
        algorithm="flow_grpo",
        options={"sde": "flow_cps", "noise_level": 0.8, "shared_prior": True},
    ),
    "grpo_guard": Setting(
        learning_rate=1e-3, algorithm="flow_grpo", options={"guard": True, "epsilon": 2e-6, "shared_prior": True}
    ),
    "mixgrpo": Setting(
        learning_rate=1e-3,
        algorithm="flow_grpo",
        options={"window_range": [0, 6], "window_shift_every": 6, "shared_prior": True},
    ),
}
"""What a row is called, and its setting: every algorithm, and forms of two of them that have papers of their own.

In this order they share a device well: those that need most of its memory are not side by side.
"""
VARIANTS: Mapping[str, Sequence[Setting]] = {
    "adjoint_matching": [Setting(learning_rate=1e-3, beta=beta, options={"max_push": 1.0}) for beta in (0.01, 0.1)],
    "adjoint_matching_ode": [replace(SETTINGS["adjoint_matching_ode"], beta=beta) for beta in (0.003, 0.01, 0.1)],
}
"""Where tuning begins from more than the setting above."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to be made; without a setting it is one evaluation and no update."""

    name: str
    seed: int
    setting: Setting | None = None
    price_s: float = 0.0
    updates: int = 0
    variant: str = ""

    @property
    def key(self) -> str:
        return f"{self.name}{self.variant}_{self.seed}"


class Listen(TrainerCallback):
    """Evaluates after some of the updates."""

    def __init__(self, bench: Bench, seed: int, points: Sequence[int]) -> None:
        self.bench, self.seed, self.points = bench, seed, points
        self.curve: list[dict[str, float]] = []
        self.last: EvaluationResult | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.points:
            self.last = self.bench.listen(model.policy, self.seed)
            self.curve.append({"updates": state.global_step, **self.last.metrics})


class Clock(TrainerCallback):
    """When each update ended."""

    def __init__(self) -> None:
        self.ends_s: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends_s.append(time.perf_counter())


class Bench:
    """What all runs of a process share: prompts, and the frozen models on the device."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        torch.set_float32_matmul_precision("high")  # TF32; log-probabilities are no matrix products
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.workers) if self.device.type == "cpu" else 1)
        self.vocoder = load_vocoder("tiny").to(self.device)
        self.rewards = Rewards(list(REWARDS)).to(self.device)
        self.recognizer = load_recognizer("tiny", device=self.device)
        self.train = load_prompts("tiny", split="train")
        judged = load_prompts("tiny", split="tuning") if args.tune else load_prompts("tiny", split="heldout")
        rows = range(len(judged) if args.tune else min(args.prompts, len(judged)))
        self.judged = judged.collate([judged[row] for row in rows]).to(self.device)

    def listen(self, policy: Any, seed: int, sampler: Sampler = plain) -> EvaluationResult:
        return evaluate(
            policy,
            self.vocoder,
            self.rewards,
            self.judged,
            sampling=Sampling(**SAMPLING),
            seed=seed,
            recognizer=self.recognizer,
            judges=(),
            batch_size=8 if self.device.type == "cpu" else 16,
            sampler=sampler,
        )

    def fit(self, job: Job, folder: Path, *callbacks: TrainerCallback) -> None:
        """Train a fresh policy; what the trainer writes and says is left in `folder`."""
        assert job.setting is not None
        config = RLHFConfig(
            output_dir=str(folder),
            use_cpu=self.device.type == "cpu",
            disable_tqdm=True,
            save_strategy="no",
            num_eval_prompts=0,
            reward_models=list(REWARDS),
            algorithm=job.setting.algorithm or job.name,
            algorithm_kwargs=dict(job.setting.options),
            beta=job.setting.beta,
            learning_rate=job.setting.learning_rate,
            max_steps=job.updates,
            cuda_graphs=False if self.args.no_cuda_graphs else None,
            per_device_train_batch_size=self.args.rollouts,
            num_generations=self.args.generations,
            seed=job.seed,
            sampling_steps=SAMPLING["steps"],
            cfg_strength=SAMPLING["cfg_strength"],
        )
        with (folder / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
            gc.collect()  # the last run's trainer is full of cycles, and holds memory of the device
            RLHFTrainer(
                load_policy("tiny"),
                reward_models=list(self.rewards.models),
                args=config,
                vocoder=self.vocoder,
                recognizer="none",
                train_dataset=self.train,
                peft_config=LoraConfig(r=16, lora_alpha=32),
                callbacks=list(callbacks),
            ).train()


def _begin(args: argparse.Namespace, begun: Any) -> None:
    """In a new process, before it knows of a GPU: the next one is all it sees."""
    with begun.get_lock():
        number, begun.value = begun.value, begun.value + 1
    if args.device == "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = args.gpus[number % len(args.gpus)]
    global BENCH
    BENCH = Bench(args)


BENCH: Bench
"""Of a worker process."""


def price(job: Job) -> float:
    """Seconds of one update: the mean of those after WARM_UP, which begin where the last one ended."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        BENCH.fit(job, Path(folder), clock)
    return float(np.diff(clock.ends_s[WARM_UP - 1 :]).mean())


def run(job: Job) -> dict[str, Any]:
    """The line of runs.jsonl; its log and sounds are written here."""
    started = time.perf_counter()
    points = [job.updates] if BENCH.args.tune else evaluation_points(job.updates)
    ear = Listen(BENCH, job.seed, points if job.updates else [])
    line: dict[str, Any] = dataclasses.asdict(job) | {"key": job.key}
    if job.setting is None:
        policy = load_policy("tiny").to(BENCH.device)
        models = {"vocoder": BENCH.vocoder, "rewards": BENCH.rewards}
        sampler = SAMPLERS[job.name](**models) if job.name in SAMPLERS else plain
        ear.last = BENCH.listen(policy, job.seed, sampler)
        ear.curve.append({"updates": 0, **ear.last.metrics})
    else:
        with tempfile.TemporaryDirectory() as folder:
            try:
                BENCH.fit(job, Path(folder), ear)
            except (
                FloatingPointError
            ) as error:  # a policy that no longer says anything: the end of this run, no other's
                line["error"] = str(error)
            logs = Path(BENCH.args.out) / "logs"
            if (Path(folder) / "metrics.jsonl").exists():
                shutil.copy(Path(folder) / "metrics.jsonl", logs / f"{job.key}.jsonl")
    if ear.last is not None and not BENCH.args.tune:
        keep_sounds(Path(BENCH.args.out) / "sounds" / job.key, ear.last)
    measures = {} if ear.last is None else {name: list(values) for name, values in ear.last.measures.items()}
    return line | {"curve": ear.curve, "measures": measures, "wall_s": time.perf_counter() - started}


def attempt(job: Job) -> dict[str, Any]:
    """`run`, or how it failed: hours of others do not end with it."""
    try:
        return run(job)
    except Exception:
        return {"key": job.key, "failure": traceback.format_exc()}


def keep_sounds(folder: Path, heard: EvaluationResult) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for row, waveform in enumerate(heard.waveforms):
        file = folder / f"{row:03d}.ogg"
        soundfile.write(
            file, waveform.numpy(), heard.sample_rate_hz, format="OGG", subtype="OPUS", compression_level=0.7
        )


@contextlib.contextmanager
def workers(args: argparse.Namespace, count: int) -> Iterator[Any]:
    """Processes that have loaded what runs share."""
    context = multiprocessing.get_context("spawn")
    shared = args, context.Value("i", 0)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_begin, initargs=shared) as pool:
        yield pool


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def prices(args: argparse.Namespace, settings: Mapping[str, Setting]) -> dict[str, float]:
    """Seconds of an update of each algorithm, from prices.json or measured now, one after another."""
    file = args.out / "prices.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    updates = WARM_UP + args.priced_updates
    jobs = [
        Job(name=name, seed=0, setting=settings[name], updates=updates) for name in args.algorithms if name not in known
    ]
    if jobs:
        with workers(args, max(1, len(args.gpus))) as pool:  # each alone on its device
            for job, seconds in zip(jobs, pool.map(price, jobs), strict=True):
                known[job.name] = seconds
                print(f"{job.name:18} {seconds:.3f} s an update", flush=True)
                file.write_text(json.dumps(known, indent=1) + "\n")
    return known


def jobs_of(args: argparse.Namespace, settings: Mapping[str, Setting], known: Mapping[str, float]) -> list[Job]:
    """The baselines, and the runs, all of about one length."""
    jobs = []
    for seed in args.seeds[:1] if args.tune else args.seeds:
        jobs += [Job(name=name, seed=seed) for name in ([BASE] if args.tune else [BASE, *SAMPLERS])]
        for name in args.algorithms:
            shared = {"seed": seed, "price_s": known[name], "updates": affordable_updates(args.seconds, known[name])}
            if not args.tune:
                jobs.append(Job(name=name, setting=settings[name], **shared))
                continue
            for number, setting in enumerate(variants(name, settings[name], args.factors)):
                jobs.append(Job(name=name, setting=setting, variant=f"_{number}", **shared))
    return jobs


def variants(name: str, setting: Setting, factors: Sequence[float]) -> list[Setting]:
    return [
        replace(start, learning_rate=factor * start.learning_rate)
        for start in VARIANTS.get(name, [setting])
        for factor in factors
    ]


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "logs").mkdir(exist_ok=True)
    args.gpus = visible_gpus()
    settings = SETTINGS | read_settings(args.settings)
    jobs = jobs_of(args, settings, prices(args, settings))
    done = {line["key"] for line in read_lines(args.out / "runs.jsonl")}
    todo = [job for job in jobs if job.key not in done]
    failed = []
    with workers(args, args.workers) as pool, (args.out / "runs.jsonl").open("a") as file:
        for done_job in as_completed([pool.submit(attempt, job) for job in todo]):
            line = done_job.result()
            if "failure" in line:
                failed.append(line["key"])
                print(line["failure"], flush=True)
                continue
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(_said(line), flush=True)
            if args.tune:
                write_settings(args.out, read_lines(args.out / "runs.jsonl"))
    if failed:
        raise SystemExit(f"compare.py: {failed} failed; a second call tries them again")


def _said(line: Mapping[str, Any]) -> str:
    end = line["curve"][-1] if line["curve"] else {"reward": np.nan, "cer": np.nan}
    setting = line["setting"] or {}
    return (
        f"{line['key']:22} {line['updates']:5} updates  reward {end['reward']:.3f}  cer {end['cer']:.3f}  "
        f"{line['wall_s']:.0f} s  {setting.get('learning_rate', 0):.2g} {setting.get('beta')} "
        f"{setting.get('options') or ''} {line.get('error', '')}"
    )


def write_settings(out: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """settings.json: the best of the tuning so far, as --settings reads it."""
    base = next((line for line in lines if line["name"] == BASE), None)
    if base is None:
        return
    best = best_settings([line for line in lines if line["name"] != BASE], base, cer_slack=CER_SLACK)
    (out / "settings.json").write_text(json.dumps({name: line["setting"] for name, line in best.items()}, indent=1))


def read_settings(file: Path | None) -> dict[str, Setting]:
    return {} if file is None else {name: Setting(**values) for name, values in json.loads(file.read_text()).items()}


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def judge(args: argparse.Namespace) -> None:
    lines = read_lines(args.out / "runs.jsonl")
    for line in (line for line in lines if not line["curve"]):
        print(f"left out: {line['key']} ended before its first evaluation: {line['error']}")
    lines = [line for line in lines if line["curve"]]
    cache = args.out / "judged.jsonl"
    judged: dict[str, dict[str, list[float]]] = {line["key"]: {} for line in lines}
    for line in read_lines(cache):
        judged[line["key"]] |= line["measures"]
    todo = [key for key, measures in judged.items() if not set(measures) - {"wer"}]
    todo_wer = [key for key, measures in judged.items() if args.whisper and "wer" not in measures]
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool, cache.open("a") as file:
        heard = zip(todo, pool.imap(functools.partial(heard_measures, args.out), todo), strict=True)
        words = zip(todo_wer, pool.imap(functools.partial(word_errors, args.out, args.whisper), todo_wer), strict=True)
        for key, measures in itertools.chain(heard, words):
            judged[key] |= measures
            file.write(json.dumps({"key": key, "measures": measures}) + "\n")
            file.flush()
            print(key, {name: round(float(np.nanmean(values)), 3) for name, values in measures.items()}, flush=True)
    whole = from_base([line | {"measures": line["measures"] | judged[line["key"]]} for line in lines])
    rows = summary(whole)
    (args.out / "comparison.json").write_text(json.dumps(rows, indent=1) + "\n")
    (args.out / "table.md").write_text(markdown(rows))
    plot(whole, args.out / "comparison.png")
    print(markdown(rows))


def heard_measures(out: Path, key: str) -> dict[str, list[float]]:
    """What the judges say of a run's sounds, a value a prompt."""
    waveforms, rate_hz = kept_sounds(out, key)
    lengths = torch.tensor([len(waveform) for waveform in waveforms])
    padded = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True)
    unheard = torch.zeros(len(lengths), 1, 1), torch.ones(len(lengths), dtype=torch.long)  # these judges hear no mel
    audio = Audio(padded, lengths, rate_hz, *unheard)
    return {name: values.tolist() for own in default_judges() for name, values in own(audio).items()}


def word_errors(out: Path, whisper: Path, key: str) -> dict[str, list[float]]:
    """Whisper's word error rate, a value a prompt."""
    waveforms, rate_hz = kept_sounds(out, key)
    prompts, listener = load_prompts("tiny", split="heldout"), _whisper(whisper)
    pairs = ((prompts[row]["text"], transcript(listener, heard, rate_hz)) for row, heard in enumerate(waveforms))
    return {"wer": [jiwer.wer(letters(text), letters(heard) or " ") for text, heard in pairs]}


def kept_sounds(out: Path, key: str) -> tuple[list[torch.Tensor], int]:
    torch.set_num_threads(1)
    files = sorted((out / "sounds" / key).glob("*.ogg"))
    waveforms = [torch.from_numpy(soundfile.read(file, dtype="float32")[0]) for file in files]
    return waveforms, soundfile.info(files[0]).samplerate


_whisper = functools.cache(load_whisper)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    training = commands.add_parser("train", help="price, train, evaluate by the reward")
    training.set_defaults(command=train)
    training.add_argument("--algorithms", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    training.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    training.add_argument("--seconds", type=float, default=30.0, help="of updates, for each run")
    training.add_argument("--prompts", type=int, default=50, help="held-out prompts")
    training.add_argument("--rollouts", type=int, default=24, help="of an update")
    training.add_argument("--generations", type=int, default=8, help="rollouts of one prompt")
    training.add_argument("--priced_updates", type=int, default=12, help="updates that the price is the mean of")
    training.add_argument("--settings", type=Path, help="settings.json of a tuning; default: SETTINGS")
    training.add_argument("--tune", action="store_true", help="try VARIANTS on training prompts, for the first seed")
    training.add_argument(
        "--factors", nargs="+", type=float, default=[1 / 3, 1, 3], help="of the learning rate, in --tune"
    )
    training.add_argument("--no_cuda_graphs", action="store_true", help="on a GPU: as it is without them")
    training.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    judging = commands.add_parser("judge", help="hear what was kept, write table and plot")
    judging.set_defaults(command=judge)
    judging.add_argument("--whisper", type=Path, help="Whisper model folder (CTranslate2)")
    for command in (training, judging):
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--workers", type=int, default=2, help="processes")
    args = parser.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    main()
