"""Any policy: F5-TTS's kin by name, and flows of one's own by "package.module:function", loaded and saved alike.

A flow of one's own is made by a function of its user's, which no file may name in their place: a saved policy says what
it is of, and is loaded by `load("my_module:build", weights="runs/mine/policy")`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.checkpoints import CONFIG, WEIGHTS, load_policy, merged_state, require_text, save_policy
from rlhf_mel.flow.policy import DEFAULTS
from rlhf_mel.lookup import load_object
from rlhf_mel.storage import write_tensors, write_whole


def load(
    name: str | Path,
    *,
    model: str | None = None,
    vocab: str | Path | None = None,
    weights: str | Path | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """A policy in eval mode.

    Args:
        name: what `checkpoints.load_policy` takes, model and vocab as there; or "package.module:function" that makes
            one.
        weights: for such a function, a folder that `save` wrote.

    Raises:
        FileNotFoundError: no such name or folder.
        TypeError: what the function made is not a policy.
        ValueError: no such module or function, or the weights are of another policy.
    """
    if ":" not in str(name) or Path(name).exists():
        if weights is not None:
            raise ValueError(f"policy {name}: expected 'package.module:function' with weights of its own, got a name")
        _refuse_own(Path(name))
        return load_policy(name, model=model, vocab=vocab, device=device)
    policy = load_object(str(name), "policy")()
    check(policy, str(name))
    if weights is not None:
        _read(policy, Path(weights))
    return policy.to(device).eval()


def _refuse_own(folder: Path) -> None:
    """Say how a folder is loaded whose policy a function of its user's makes."""
    config = folder / CONFIG
    if config.is_file() and "flow" in (found := json.loads(config.read_text(encoding="utf-8"))):
        raise ValueError(
            f"{folder}: expected weights of F5-TTS or its kin, got those of {found['flow']}; name the function that "
            "makes it, and the folder: --policy package.module:function --policy_weights FOLDER (of `rlhf-mel sample`: "
            "--weights FOLDER)"
        )


def check(policy: Any, name: str) -> None:
    """Raise if `policy` is none, or could not be saved once it is trained; what it leaves out gets its default."""
    if isinstance(policy, CFM):
        require_text(policy, name)
        return
    absent = [method for method in METHODS if not hasattr(policy, method)]
    if not isinstance(policy, nn.Module) or absent:
        raise TypeError(
            f"policy {name}: expected an nn.Module with {list(METHODS)}, got {type(policy).__name__} without {absent}; "
            "see docs/foreign_flows.md"
        )
    if not hasattr(policy, "mel_spec"):
        raise TypeError(f"policy {name}: expected an attribute mel_spec, what its mels mean, got none; add it")
    if lost := [key for key, value in policy.state_dict().items() if not isinstance(value, Tensor)]:
        raise TypeError(f"policy {name}: expected a state_dict of tensors, got others in {lost}; they cannot be saved")
    for attribute, default in DEFAULTS.items():
        if not hasattr(policy, attribute):
            setattr(policy, attribute, default)


METHODS = ("durations", "encode", "prior", "velocity", "timesteps", "finalize")
"""Of the protocol `Policy`."""


def save(policy: Any, directory: str | Path) -> Path:
    """Write the policy so that `load` finds it, LoRA merged in what is written; each file whole or not at all."""
    if isinstance(policy, CFM):
        return save_policy(policy, directory)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: value.to("cpu").contiguous().clone() for name, value in merged_state(policy).items()}
    config = {"flow": f"{type(policy).__module__}.{type(policy).__qualname__}"}
    write_tensors(directory / WEIGHTS, state)
    write_whole(directory / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))
    return directory


def _read(policy: nn.Module, folder: Path) -> None:
    file = folder / WEIGHTS
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected weights that a run saved, found no file")
    state, wanted = load_file(file), policy.state_dict()
    if wrong := _differences(state, wanted):
        raise ValueError(f"{file}: expected the tensors of {type(policy).__name__}, got others: {'; '.join(wrong[:5])}")
    policy.load_state_dict(state)


def _differences(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Names that one has, and shapes that differ."""
    lines = [f"no {name}" for name in wanted if name not in state]
    lines += [f"{name}, which it does not have" for name in state if name not in wanted]
    shared = [name for name in state if name in wanted and state[name].shape != wanted[name].shape]
    return lines + [f"{name} {list(state[name].shape)} for {list(wanted[name].shape)}" for name in shared]
