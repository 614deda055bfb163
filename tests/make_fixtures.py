"""Record what f5-tts 1.1.22 computes, for the parity tests: `python tests/make_fixtures.py`.

Needs f5-tts 1.1.22 and x-transformers importable, which the tests do not: they compare with the recorded numbers
in tests/fixtures/. Only f5_tts.model.{cfm,modules,utils,backbones} run; the packages' own __init__ (trainer,
wandb, gradio) are bypassed. Run it again only when a case in tests/problems.py is added.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from problems import (
    BACKBONE_CASES,
    BACKBONE_SAMPLES,
    BACKBONES,
    DIT_CASES,
    E2,
    EVERYTHING,
    GRADIENT_CASES,
    IN_FLOAT64,
    MEL,
    PINYIN_TEXTS,
    SAMPLE_CASES,
    TRAINING_CASES,
    VOCABULARY,
    call_dit,
    call_sample,
    case_inputs,
    gradient_summary,
    ramp_loss,
    reinitialise,
    with_weights,
)
from safetensors.torch import save_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


@functools.cache
def import_f5_tts() -> dict[str, Any]:
    """f5-tts's backbones and CFM by name, without running the __init__ of its packages."""
    spec = importlib.util.find_spec("f5_tts")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("f5_tts: expected f5-tts 1.1.22 on sys.path; pip install f5-tts==1.1.22")
    root = Path(spec.submodule_search_locations[0])
    for name in ("f5_tts", "f5_tts.model"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = package
    where = {name: f"backbones.{name.lower()}" for name in BACKBONES} | {"CFM": "cfm"}
    return {name: getattr(importlib.import_module(f"f5_tts.model.{module}"), name) for name, module in where.items()}


@functools.cache
def import_inference() -> Any:
    """f5-tts's infer/utils_infer.py: load_checkpoint, load_model, preprocess_ref_audio_text. Needs pydub too."""
    sys.modules["f5_tts.model"].CFM = import_f5_tts()["CFM"]
    package = types.ModuleType("f5_tts.infer")
    package.__path__ = [str(Path(sys.modules["f5_tts"].__path__[0]) / "infer")]
    sys.modules["f5_tts.infer"] = package
    return importlib.import_module("f5_tts.infer.utils_infer")


def packaged_vocab() -> dict[str, int]:
    """The 2,545 tokens of Emilia, as f5-tts reads them."""
    path = Path(import_inference().__file__).parent / "examples/vocab.txt"
    return importlib.import_module("f5_tts.model.utils").get_tokenizer(str(path), "custom")[0]


def donor_weights(backbone: type, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    donor = backbone(**arguments)
    reinitialise(donor)
    return {name: weight.half() for name, weight in donor.named_parameters()}


class Upstream:
    """f5-tts's models with the weights of the fixtures."""

    def __init__(self) -> None:
        self.classes = import_f5_tts()
        every_layer = {"DiT": EVERYTHING, "UNetT": dict(qk_norm="rms_norm"), "MMDiT": dict(qk_norm="rms_norm")}
        self.weights = {
            name: donor_weights(self.classes[name], {**arguments, **every_layer[name]})
            for name, (_, arguments) in BACKBONES.items()
        }

    def backbone(self, name: str, flags: Mapping[str, Any]) -> Any:
        return with_weights(self.classes[name](**{**BACKBONES[name][1], **flags}), self.weights[name])

    def cfm(self, name: str, flags: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Any:
        options = {"mel_spec_kwargs": MEL, "vocab_char_map": dict(VOCABULARY), **(options or {})}
        return self.classes["CFM"](self.backbone(name, flags), **options)


def in_float64() -> Any:
    """Noise as a model in float32 draws it."""
    randn = torch.randn
    return mock.patch("torch.randn", lambda *size, dtype, **options: randn(*size, **options).to(dtype))


def record_dit(upstream: Upstream, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    recorded = {}
    for name, (flags, call) in DIT_CASES.items():
        recorded[f"dit/{name}"] = call_dit(upstream.backbone("DiT", flags).eval(), inputs, **call)
    for name, (flags, options, call) in SAMPLE_CASES.items():
        with in_float64() if name in IN_FLOAT64 else contextlib.nullcontext():
            cfm = upstream.cfm("DiT", flags, options)
            out, trajectory = call_sample(cfm.double() if name in IN_FLOAT64 else cfm, inputs, **call)
        recorded[f"sample/{name}/out"] = out
        recorded[f"sample/{name}/state 3"] = trajectory[3]
        recorded[f"sample/{name}/last"] = trajectory[-1]
    for name, (flags, options) in TRAINING_CASES.items():
        torch.manual_seed(9)
        lens = torch.tensor([24, 19])
        loss, cond, pred = upstream.cfm("DiT", flags, options).eval()(inputs["x"], inputs["ids"], lens=lens)
        recorded |= {f"training/{name}/{part}": value for part, value in zip(TRAINED, (loss, cond, pred), strict=True)}
    return recorded


TRAINED = ("loss", "cond", "pred")


def record_backbones(upstream: Upstream, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    recorded = {}
    for name, (backbone, flags, call) in BACKBONE_CASES.items():
        recorded[f"forward/{name}"] = call_dit(upstream.backbone(backbone, flags).eval(), inputs, **call)
    for backbone, flags in (("UNetT", E2), ("MMDiT", {})):
        for name, call in BACKBONE_SAMPLES.items():
            out, trajectory = call_sample(upstream.cfm(backbone, flags), inputs, **call)
            recorded[f"sample/{backbone}/{name}/out"] = out
            recorded[f"sample/{backbone}/{name}/last"] = trajectory[-1]
    return recorded


def record_gradients(upstream: Upstream, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """f5-tts's sample() with its @torch.no_grad() taken off, in float64, from the noise it draws in float32."""
    recorded = {}
    for name, (backbone, flags, call) in GRADIENT_CASES.items():
        cfm = upstream.cfm(backbone, flags).double()
        cfm.sample = functools.partial(type(cfm).sample.__wrapped__, cfm)
        with in_float64():
            out, _ = call_sample(cfm, inputs, **{"steps": 3, **call})
        ramp_loss(out).backward()
        recorded |= {f"gradient/{name}/{part}": value for part, value in gradient_summary(cfm).items()}
    return recorded


def record_pinyin() -> list[dict[str, Any]]:
    convert = importlib.import_module("f5_tts.model.utils").convert_char_to_pinyin
    return [{"text": text, "tokens": convert([text])[0]} for text in PINYIN_TEXTS]


def write(name: str, tensors: Mapping[str, Tensor]) -> None:
    path = FIXTURES / f"{name}.safetensors"
    whole = {key: value.contiguous() for key, value in tensors.items()}
    save_file(whole, path, {"f5-tts": "1.1.22", "torch": torch.__version__})
    path.chmod(0o644)


def main() -> None:
    upstream, inputs = Upstream(), case_inputs()
    FIXTURES.mkdir(exist_ok=True)
    with torch.no_grad():
        write("f5_tts", record_dit(upstream, inputs) | {f"input/{name}": value for name, value in inputs.items()})
        write("f5_tts_backbones", record_backbones(upstream, inputs))
    write("f5_tts_gradients", record_gradients(upstream, inputs))
    for name, weights in upstream.weights.items():
        write("f5_tts_weights" if name == "DiT" else f"f5_tts_weights_{name.lower()}", weights)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in record_pinyin())
    (FIXTURES / "f5_tts_pinyin.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
