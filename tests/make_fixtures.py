"""Record what f5-tts 1.1.22 computes, for the parity tests: `python tests/make_fixtures.py`.

Needs f5-tts 1.1.22 and x-transformers importable, which the tests do not: they compare with the recorded numbers
in tests/fixtures/. Only f5_tts.model.{cfm,modules,utils,backbones.dit} run; the packages' own __init__ (trainer,
wandb, gradio) are bypassed. Run it again only when a case in tests/problems.py is added.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import torch
from problems import (
    DIT_CASES,
    EVERYTHING,
    MEL,
    SAMPLE_CASES,
    TINY,
    TRAINING_CASES,
    VOCABULARY,
    call_dit,
    call_sample,
    case_inputs,
    reinitialise,
    with_weights,
)
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"


def import_f5_tts() -> tuple[type, type]:
    """f5-tts's DiT and CFM, without running the __init__ of its packages."""
    spec = importlib.util.find_spec("f5_tts")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("f5_tts: expected f5-tts 1.1.22 on sys.path; pip install f5-tts==1.1.22")
    root = Path(spec.submodule_search_locations[0])
    for name in ("f5_tts", "f5_tts.model"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    dit = importlib.import_module("f5_tts.model.backbones.dit").DiT
    return dit, importlib.import_module("f5_tts.model.cfm").CFM


def main() -> None:
    dit_class, cfm_class = import_f5_tts()
    inputs = case_inputs()
    donor = dit_class(**{**TINY, **EVERYTHING})
    reinitialise(donor)
    weights = {name: weight.half() for name, weight in donor.named_parameters()}

    def make_dit(flags):
        return with_weights(dit_class(**{**TINY, **flags}), weights)

    def make_cfm(flags, options):
        return cfm_class(make_dit(flags), **{"mel_spec_kwargs": MEL, "vocab_char_map": dict(VOCABULARY), **options})

    recorded = {}
    with torch.no_grad():
        for name, (flags, call) in DIT_CASES.items():
            recorded[f"dit/{name}"] = call_dit(make_dit(flags).eval(), inputs, **call)
        for name, (flags, options, call) in SAMPLE_CASES.items():
            out, trajectory = call_sample(make_cfm(flags, options), inputs, **call)
            recorded[f"sample/{name}/out"] = out
            recorded[f"sample/{name}/state 3"] = trajectory[3]
            recorded[f"sample/{name}/last"] = trajectory[-1]
        for name, (flags, options) in TRAINING_CASES.items():
            torch.manual_seed(9)
            lens = torch.tensor([24, 19])
            loss, cond, pred = make_cfm(flags, options).eval()(inputs["x"], inputs["ids"], lens=lens)
            recorded.update(
                {
                    f"training/{name}/loss": loss,
                    f"training/{name}/cond": cond,
                    f"training/{name}/pred": pred,
                }
            )
    FIXTURES.mkdir(exist_ok=True)
    inputs = {f"input/{name}": value for name, value in inputs.items()}
    tensors = {name: value.contiguous() for name, value in {**recorded, **inputs}.items()}
    save_file(tensors, FIXTURES / "f5_tts.safetensors", {"f5-tts": "1.1.22", "torch": torch.__version__})
    save_file(weights, FIXTURES / "f5_tts_weights.safetensors")
    for path in FIXTURES.glob("f5_tts*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
