"""Time and memory of sampling and of gradients through it, beside f5-tts's own classes, in one run on one device.

    python recipes/benchmark.py                      # a GPU, the shape of F5TTS_v1_Base; f5-tts 1.1.22 installed
    python recipes/benchmark.py --device cpu         # small, minutes on two cores
    python recipes/benchmark.py --cases sample draft1 --ours   # some cases, without f5-tts

Both run the same random weights on the same inputs and noise, f5-tts's under autocast as its inference does. Before
anything is timed, mel and gradient of both are compared with float32: the fast way may not be further off than
f5-tts's own bfloat16 by more than a quarter. Upstream's gradients are taken in the two ways there are: F5-TTS's pull
request 1299 (no_grad taken off `sample`, nothing cached) and the same with torch's checkpoint around each velocity.

Times are medians after a warm-up, between synchronisations; GiB are the most that PyTorch had reserved at once, warm-up
and memory of CUDA graphs included, over the weights that were there before; TFLOP/s count products, convolutions and
attention of the velocities once (a gradient three times, what runs again in backward not at all), beside the rate of a
large product of matrices, measured in the same run.

Leaves out: vocoder and reward in all cases but `update`; other GPUs than the one it runs on; batches of mixed lengths.
Number to expect: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache, partial
from pathlib import Path
from typing import Any

# Before torch loads OpenMP: threads that wait for each other by spinning make a busy machine 15 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from rlhf_mel.f5.backbones.dit import DiT
from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.presets import PUBLISHED

GIB = 2**30
SEED = 0


@cache
def import_f5_tts(names: tuple[str, ...] = ("DiT", "CFM")) -> dict[str, Any]:
    """f5-tts's classes by name, without running the __init__ of its packages (trainer, wandb, gradio)."""
    spec = importlib.util.find_spec("f5_tts")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("f5_tts: expected f5-tts 1.1.22 on sys.path; pip install f5-tts==1.1.22")
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in ("f5_tts", "f5_tts.model"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = package
    where = {name: "cfm" if name == "CFM" else f"backbones.{name.lower()}" for name in names}
    return {name: getattr(importlib.import_module(f"f5_tts.model.{module}"), name) for name, module in where.items()}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    who: str
    seconds: float
    spread: float
    """Slowest over fastest repetition."""
    gib: float | None
    tflops: float | None


@dataclass
class Bench:
    """Weights, inputs and a stopwatch."""

    device: torch.device
    arch: dict[str, Any]
    frames: int
    reference_frames: int
    repeats: int
    amp: bool

    def __post_init__(self) -> None:
        torch.manual_seed(SEED)
        with self.device:
            backbone = DiT(**self.arch)
        for name, weight in backbone.named_parameters():
            if weight.ndim > 1 and not weight.any():  # AdaLN starts from zero, and would hide every mistake
                nn.init.normal_(weight, std=0.02)
            elif name.endswith(("gamma", "beta")):
                nn.init.normal_(weight, std=0.1)
        self.weights = backbone.state_dict()
        self.rows: list[Row] = []

    def ours(self, *, fast: bool) -> CFM:
        policy = self._loaded(DiT, CFM)
        return policy.speed_up() if fast else policy

    def compiled(self) -> CFM:
        """Compiled blocks, and nothing else."""
        policy = self.ours(fast=False).speed_up()
        policy.fast = None
        return policy

    def upstream(self) -> Any:
        classes = import_f5_tts()
        return self._loaded(classes["DiT"], classes["CFM"])

    def _loaded(self, backbone: Any, cfm: Any) -> Any:
        with self.device:  # random numbers are drawn much sooner there
            model = backbone(**self.arch)
        model.load_state_dict(self.weights, strict=False)
        return cfm(model, mel_spec_kwargs={"mel_spec_type": "vocos"}).to(self.device).eval()

    def inputs(self, batch: int, frames: int | None = None) -> dict[str, Any]:
        """Arguments of `sample`: reference mels, token ids, the total duration."""
        frames = frames or self.frames
        generator = torch.Generator().manual_seed(SEED)
        mel = 2 * torch.randn(batch, self.reference_frames, 100, generator=generator) - 4
        ids = torch.randint(self.arch["text_num_embeds"], (batch, frames // 5), generator=generator)
        return {"cond": mel.to(self.device), "text": ids.to(self.device), "duration": frames, "seed": SEED}

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(
        self,
        case: str,
        who: str,
        make: Callable[[], Any],
        run: Callable[[Any], Any],
        *,
        flops: float | None = None,
        repeats: int | None = None,
    ) -> None:
        """Time `run` of a new model of `make`, and its peak memory; out of memory is a row without numbers."""
        model = make()
        self._forget()
        before = torch.cuda.memory_allocated() if self.device.type == "cuda" else 0
        try:
            run(model)  # warm-up
            self.synchronize()
            seconds = []
            for _ in range(repeats or self.repeats):
                start = time.perf_counter()
                run(model)
                self.synchronize()
                seconds.append(time.perf_counter() - start)
        except torch.cuda.OutOfMemoryError:
            row = Row(case, who, float("nan"), float("nan"), float("nan"), None)
        else:
            median = statistics.median(seconds)
            peak = (torch.cuda.max_memory_reserved() - before) / GIB if self.device.type == "cuda" else None
            rate = None if flops is None else flops / median / 1e12
            row = Row(case, who, median, max(seconds) / min(seconds), peak, rate)
        self.rows.append(row)
        print(format_row(row), flush=True)
        del model
        self._forget()

    def _forget(self) -> None:
        """Free what models that are gone have left."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def flops(self, batch: int, steps: int, frames: int | None = None) -> float:
        """Of `steps` velocities with guidance: products, convolutions, attention."""
        inputs = self.inputs(1, frames)
        policy = self.ours(fast=False)
        with FlopCounterMode(display=False) as counter, self.autocast():
            policy.sample(**inputs, steps=1, cfg_strength=2.0)
        return float(counter.get_total_flops()) * batch * steps


def format_row(row: Row) -> str:
    memory = "" if row.gib is None else f"{row.gib:8.2f} GiB"
    rate = "" if row.tflops is None else f"{row.tflops:7.1f} TFLOP/s"
    return f"{row.case:28} {row.who:34} {row.seconds:8.3f} s (x{row.spread:.2f}) {memory} {rate}"


def matrix_rate(device: torch.device, size: int) -> float:
    """FLOP/s of a product of two random bfloat16 matrices [size, size] (float32 on a CPU); the median of ten."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[3:])


def sample(bench: Bench, model: Any, inputs: dict[str, Any], steps: int, **options: Any) -> Tensor:
    with bench.autocast():
        return model.sample(**inputs, steps=steps, cfg_strength=2.0, sway_sampling_coef=-1.0, **options)[0]


def with_gradients(upstream: Callable[[], Any], *, checkpointed: bool) -> Any:
    """f5-tts's CFM in the way of its pull request 1299: `sample` without no_grad and without a cache."""
    model = upstream()
    forward = model.transformer.forward

    def run(*args: Any, cache: bool = True, **kwargs: Any) -> Tensor:
        call = partial(forward, *args, cache=False, **kwargs)
        return checkpoint(call, use_reentrant=False) if checkpointed else call()

    model.transformer.forward = run
    model.sample = types.MethodType(type(model).sample.__wrapped__, model)
    return model


def backward_of(mel: Tensor, model: nn.Module) -> list[Tensor]:
    """Gradients of a fixed weighting of the mel, into .grad, and there cleared."""
    ramp = torch.linspace(0.5, 1.5, mel.numel(), device=mel.device).view_as(mel)
    (mel.float() * ramp).mean().backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    for weight in model.parameters():
        weight.grad = None
    return gradients


def relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """|found - expected| / |expected| over all tensors together."""
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected, strict=True))
    return (error / sum(float(b.double().square().sum()) for b in expected)) ** 0.5


def check_values(bench: Bench, steps: int, *, upstream: bool) -> dict[str, float]:
    """Distance from float32 of mels and gradients, one item; raises if ours is further off than it may be."""
    inputs = bench.inputs(1)
    exact = bench.ours(fast=False)
    plain = Bench(bench.device, bench.arch, bench.frames, bench.reference_frames, 1, amp=False)
    mel = sample(plain, exact, inputs, steps, cache=False)
    gradient = backward_of(mel, exact)
    mel = mel.detach()

    def distance(model: Any, **options: Any) -> tuple[float, float]:
        spoken = sample(bench, model, inputs, steps, **options)
        found = backward_of(spoken, model)
        return relative([spoken.detach()], [mel]), relative(found, gradient)

    fast = bench.ours(fast=True)
    errors = {"mel, fast, no gradient": relative([sample(bench, fast, inputs, steps)], [mel])}
    errors["mel, fast"], errors["gradient, fast"] = distance(fast, cache=False)
    errors["mel, plain"], errors["gradient, plain"] = distance(exact, cache=False)
    if upstream:
        theirs = with_gradients(bench.upstream, checkpointed=True)
        names = {id(weight): name for name, weight in theirs.named_parameters()}
        assert len(names) == len(list(exact.parameters()))
        errors["mel, f5-tts"], errors["gradient, f5-tts"] = distance(theirs)
    for name, error in errors.items():
        print(f"error against float32: {name:24} {error:.2e}", flush=True)
        other = errors.get(name.split(",")[0] + (", f5-tts" if upstream else ", plain"))
        if other is not None and error > max(1.25 * other, 1e-5):
            raise SystemExit(f"benchmark: {name}: expected at most 1.25 times {other:.2e}, got {error:.2e}")
    return errors


def case_sample(bench: Bench, steps: int, batch: int, *, upstream: bool) -> None:
    """Sampling without gradients, and what each part of the fast way brings."""
    ways: dict[str, Callable[[], Any]] = {
        "f5-tts": bench.upstream,
        "plain": partial(bench.ours, fast=False),
        "compiled": bench.compiled,
        "compiled, cast once": lambda: bench.ours(fast=False).speed_up(cuda_graphs=False),
        "cast once, CUDA graph": lambda: bench.ours(fast=False).speed_up(compiled=False),
        "fast (all of it)": partial(bench.ours, fast=True),
    }
    if not upstream:
        del ways["f5-tts"]
    for size in dict.fromkeys((batch, 1)):
        inputs, flops = bench.inputs(size), bench.flops(size, steps)
        run = partial(sample, bench, inputs=inputs, steps=steps)
        for name, make in ways.items():
            bench.measure(f"sample, batch {size}", name, make, run, flops=flops)


def case_gradient(bench: Bench, steps: int, batch: int, *, upstream: bool) -> None:
    """The exact gradient through all steps."""

    def measure(case: str, who: str, make: Callable[[], Any], size: int, count: int, **options: Any) -> None:
        inputs, flops = bench.inputs(size), 3 * bench.flops(size, count)

        def run(model: Any) -> None:
            backward_of(sample(bench, model, inputs, count, **options), model)

        repeats = 1 if count > 4 * steps else bench.repeats
        bench.measure(case, who, make, run, flops=flops, repeats=repeats)

    fast, case = partial(bench.ours, fast=True), f"gradient, batch {batch}"
    if upstream:
        checkpointed = partial(with_gradients, bench.upstream, checkpointed=True)
        measure(case, "f5-tts, checkpoint each step", checkpointed, batch, steps)
    for who, make in {
        "fast": fast,
        "fast without CUDA graphs": lambda: bench.ours(fast=False).speed_up(cuda_graphs=False),
        "compiled": bench.compiled,
        "plain": partial(bench.ours, fast=False),
    }.items():
        measure(case, who, make, batch, steps, cache=False)
    for count in (4, 8 * steps):
        measure(f"{case}, {count} steps", "fast", fast, batch, count, cache=False)
    if upstream:
        whole = partial(with_gradients, bench.upstream, checkpointed=False)
        measure("gradient, batch 1", "f5-tts, pull request 1299", whole, 1, steps)
    measure("gradient, batch 1", "fast", fast, 1, steps, cache=False)
    measure(f"gradient, batch 1, {2 * steps} steps", "fast", fast, 1, 2 * steps, cache=False)


def case_cache(bench: Bench, steps: int, batch: int, *, upstream: bool) -> None:
    """The forward pass with gradients on, beside the one without."""
    for cached in (True, False, True, False):
        run = partial(sample, bench, inputs=bench.inputs(batch), steps=steps, cache=cached)
        bench.measure(f"forward, batch {batch}", f"fast, cache={cached}", partial(bench.ours, fast=True), run)


def case_draft1(bench: Bench, steps: int, batch: int, *, upstream: bool) -> None:
    """DRaFT-1: all steps, the gradient of the last."""
    inputs = bench.inputs(batch)

    def theirs(model: Any) -> None:
        forward, calls = model.transformer.forward, iter(range(steps))

        def last_with_gradient(*args: Any, **kwargs: Any) -> Tensor:
            with torch.set_grad_enabled(next(calls) == steps - 1):
                return forward(*args, **kwargs)

        model.transformer.forward = last_with_gradient
        try:
            backward_of(sample(bench, model, inputs, steps), model)
        finally:
            model.transformer.forward = forward

    def ours(model: Any) -> None:
        backward_of(sample(bench, model, inputs, steps, cache=False, grad_steps=1, checkpoint=False), model)

    case = f"DRaFT-1, batch {batch}"
    if upstream:
        bench.measure(case, "f5-tts", partial(with_gradients, bench.upstream, checkpointed=False), theirs)
    for name, fast in (("plain", False), ("fast", True)):
        bench.measure(case, name, partial(bench.ours, fast=fast), ours)


def case_update(bench: Bench, steps: int, batch: int, *, upstream: bool) -> None:
    """RLHFTrainer with DRaFT-1 and DistillMOS on prompts of the bundled set: where the time of an update goes.

    The rollouts of an update are of one prompt, and so of one length; four prompts, so that lengths come again. What is
    not in a part is the trainer's: data, logging, callbacks.
    """
    from rlhf_mel import RLHFConfig, RLHFTrainer, load_prompts
    from rlhf_mel.speech.text import load_tokenizer

    prompts = load_prompts("tiny", split="train").head(4)
    letters = sorted(
        {letter for row in range(4) for letter in f"{prompts[row]['text']}{prompts[row]['reference_text']}"}
    )
    policy = CFM(
        DiT(**bench.arch),
        mel_spec_kwargs={"mel_spec_type": "vocos"},
        vocab_char_map={letter: index for index, letter in enumerate(letters)},
        tokenizer=load_tokenizer("char"),
    )
    policy.transformer.load_state_dict(bench.weights)
    seconds: dict[str, list[float]] = defaultdict(list)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            bench.synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            bench.synchronize()
            seconds[name].append(time.perf_counter() - start)
            return result

        return run

    class Clock(TrainerCallback):
        last = 0.0

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            bench.synchronize()
            now = time.perf_counter()
            seconds["update"].append(now - self.last)
            self.last = now

    updates = 8 + 3 * bench.repeats
    with tempfile.TemporaryDirectory() as folder:
        trainer = RLHFTrainer(
            policy,
            reward_models=["mos"],
            vocoder="tiny",
            recognizer="none",
            train_dataset=prompts,
            callbacks=[Clock()],
            args=RLHFConfig(
                output_dir=folder,
                algorithm="draft",
                algorithm_kwargs={"grad_steps": 1},
                learning_rate=1e-7,
                bf16=bench.amp,
                torch_compile=bench.amp,
                use_cpu=bench.device.type == "cpu",
                optim="adamw_torch_fused",
                num_generations=batch,
                per_device_train_batch_size=batch,
                sampling_steps=steps,
                max_steps=updates,
                num_eval_prompts=0,
                save_strategy="no",
                disable_tqdm=True,
            ),
        )
        pipeline = trainer.pipeline
        for name, part in {"rollout": "rollout", "vocoder and reward": "score"}.items():
            object.__setattr__(pipeline, part, timed(name, getattr(pipeline, part)))
        trainer.accelerator.backward = timed("backward", trainer.accelerator.backward)
        trainer.accelerator.clip_grad_norm_ = timed("gradient clipping", trainer.accelerator.clip_grad_norm_)
        trainer.create_optimizer()
        trainer.optimizer.step = timed("optimizer", trainer.optimizer.step)
        trainer.train()
    parts = {name: statistics.median(values[8:]) for name, values in seconds.items()}
    parts["trainer, logging, data"] = statistics.median(
        whole - sum(values) for whole, *values in list(zip(seconds.pop("update"), *seconds.values(), strict=True))[8:]
    )
    for name, median in parts.items():
        bench.rows.append(Row(f"DRaFT-1 in RLHFTrainer, batch {batch}", name, median, 1.0, None, None))
        print(format_row(bench.rows[-1]), flush=True)


def case_long(bench: Bench, steps: int, batch: int, *, upstream: bool) -> None:
    """Twice the batch, twice the length, twice the steps, the full gradient."""
    frames = 2 * bench.frames - 5
    inputs = bench.inputs(2 * batch, frames)

    def run(model: Any) -> None:
        backward_of(sample(bench, model, inputs, 2 * steps, cache=False), model)

    case = f"gradient, batch {2 * batch}, {frames} frames, {2 * steps} steps"
    bench.measure(case, "fast", partial(bench.ours, fast=True), run, repeats=1)


def case_warmup(bench: Bench, steps: int, batch: int, *, upstream: bool) -> None:
    """The first calls of a process: run it alone, and with an empty compiler cache."""
    inputs, fast = bench.inputs(batch), bench.ours(fast=True)
    for name, run in {
        "sample": lambda: sample(bench, fast, inputs, steps),
        "gradient": lambda: backward_of(sample(bench, fast, inputs, steps, cache=False), fast),
        "sample, other length": lambda: sample(bench, fast, bench.inputs(batch, bench.frames - 37), steps),
        "sample, third length": lambda: sample(bench, fast, bench.inputs(batch, bench.frames - 74), steps),
        "sample again": lambda: sample(bench, fast, inputs, steps),
    }.items():
        start = time.perf_counter()
        run()
        bench.synchronize()
        bench.rows.append(Row(f"first call: {name}", "fast", time.perf_counter() - start, 1.0, None, None))
        print(format_row(bench.rows[-1]), flush=True)


CASES: dict[str, Callable[..., None]] = {
    "warmup": case_warmup,
    "sample": case_sample,
    "cache": case_cache,
    "draft1": case_draft1,
    "gradient": case_gradient,
    "update": case_update,
    "long": case_long,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="F5TTS_v1_Base", help="a published shape; on a CPU a small one is used")
    parser.add_argument("--frames", type=int, default=940, help="reference and generated: 10 s")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--ours", action="store_true", help="without f5-tts's rows")
    parser.add_argument("--no_check", action="store_true", help="do not compare values first")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark.json"))
    args = parser.parse_args()

    device = torch.device(args.device)
    arch = {**PUBLISHED[args.model].arch, "text_num_embeds": 2545, "mel_dim": 100}
    if device.type == "cpu":
        arch |= {"dim": 128, "depth": 4, "heads": 2, "text_dim": 64}
        args.frames, args.steps, args.batch = min(args.frames, 200), min(args.steps, 8), min(args.batch, 4)
    reference_frames = args.frames // 3
    bench = Bench(device, arch, args.frames, reference_frames, args.repeats, amp=device.type == "cuda")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rate = matrix_rate(device, 8192 if device.type == "cuda" else 1024)
    print(f"{name}, torch {torch.__version__}, {args.frames} frames, {args.steps} steps: {rate / 1e12:.1f} TFLOP/s")
    for case in args.cases:
        if case == "warmup":  # before anything else compiles
            CASES[case](bench, args.steps, args.batch, upstream=False)
    errors = {} if args.no_check else check_values(bench, args.steps, upstream=not args.ours)
    for case in args.cases:
        if case != "warmup":
            CASES[case](bench, args.steps, args.batch, upstream=not args.ours)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps(
            {
                "device": name,
                "torch": torch.__version__,
                "date": date.today().isoformat(),
                "frames": args.frames,
                "steps": args.steps,
                "matrix_tflops": rate / 1e12,
                "errors": errors,
                "rows": [asdict(row) for row in bench.rows],
            },
            indent=1,
        )
    )
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
