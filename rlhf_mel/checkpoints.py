"""Policies on disk: a directory that says what its weights are.

    policy.json          {"backbone": "DiT", "arch": {..}, "mel_spec": {..}, "tokenizer": "char", "vocab": "vocab.txt"}
    policy.safetensors   weights under F5-TTS's names, `ema_model.transformer.*`
    vocab.txt            a token a line, id = line number

An F5-TTS weight file does not say which flags it was trained with (v0 and v1 have the same keys and shapes), so
policy.json must. What `save_policy` writes loads in stock F5-TTS tools (`use_ema=True`), and F5-TTS's own files
(.safetensors, or .pt with an EMA) load here, beside a policy.json.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module, resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .audio import MelSpec
from .cfm import CFM
from .nn import rotary_frequencies
from .policy import lora_layers
from .text import load_tokenizer, load_vocab

BUNDLED = {"tiny": "assets"}
"""Name to directory inside the package."""

CONFIG, WEIGHTS, VOCAB = "policy.json", "policy.safetensors", "vocab.txt"
EMA_PREFIX = "ema_model."
NOT_WEIGHTS = (
    "initted",
    "step",
    "update",
    "mel_spec.mel_stft.mel_scale.fb",
    "mel_spec.mel_stft.spectrogram.window",
)
"""What F5-TTS files hold besides weights: EMA counters, and a mel filterbank in the oldest."""


def load_policy(name_or_path: str | Path = "tiny", *, device: torch.device | str | None = None) -> CFM:
    """The policy called "tiny" (bundled), or the one in a directory; eval mode, float32.

    Raises:
        FileNotFoundError: no such name, or a file of the directory is missing.
        ValueError: policy.json lacks something, or describes a model that the weights do not fit.
    """
    directory = _find(name_or_path)
    config = _read_config(directory / CONFIG)
    vocab = load_vocab(directory / config["vocab"])
    mel_spec = MelSpec(**config["mel_spec"])
    arch = {"text_num_embeds": len(vocab), "mel_dim": mel_spec.n_mels, **config["arch"]}
    with torch.device("meta"):  # the weights follow at once: drawing random ones for F5-TTS takes seconds
        backbone = load_backbone(config["backbone"])(**arch)
    tokenizer = load_tokenizer(config["tokenizer"])
    policy = CFM(backbone, mel_spec_module=mel_spec, vocab_char_map=vocab, tokenizer=tokenizer)
    weights = directory / config.get("weights", WEIGHTS)
    load_weights(policy, read_weights(weights), source=str(weights))
    return policy.to(device).eval() if device is not None else policy.eval()


def save_policy(policy: CFM, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the policy where load_policy and stock F5-TTS find it; LoRA is merged into what is written only.

    Each file appears whole or not at all, policy.json last.
    """
    if policy.tokenizer is None or policy.vocab_char_map is None:
        raise ValueError("save_policy: expected a policy with tokenizer and vocabulary; pass both to CFM")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "backbone": type(policy.transformer).__name__,
        "arch": policy.transformer.arch,
        "mel_spec": asdict(policy.mel_spec),
        "tokenizer": policy.tokenizer.name,
        "vocab": VOCAB,
    }
    state = {
        EMA_PREFIX + name: tensor.to("cpu", tensor.dtype if name.endswith("inv_freq") else dtype).contiguous()
        for name, tensor in merged_state(policy).items()
    }
    vocab = "".join(f"{token}\n" for token, _ in sorted(policy.vocab_char_map.items(), key=lambda item: item[1]))

    def write_weights(path: Path) -> None:
        save_file(state, path, {"format": "pt"})
        shutil.copymode(directory / VOCAB, path)  # safetensors lets only the owner read

    _write(directory / VOCAB, lambda path: path.write_text(vocab, encoding="utf-8"))
    _write(directory / WEIGHTS, write_weights)
    _write(directory / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))
    return directory


def load_backbone(name: str) -> Callable[..., nn.Module]:
    """The backbone class `DiT` of models/dit.py, and so on: the file's name is the registry."""
    known = sorted(path.stem for path in (Path(__file__).parent / "models").glob("[!_]*.py"))
    if name.lower() not in known:
        raise ValueError(f"backbone: expected one of {known} (in any case), got {name!r}")
    module = import_module(f"{__package__}.models.{name.lower()}")
    return getattr(module, name)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights by F5-TTS's names without the EMA prefix, float32, from .safetensors or .pt (EMA where it has one)."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the policy's weights, found no file")
    try:
        if path.suffix == ".safetensors":
            state: dict[str, Any] = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: expected weights, got a damaged file ({error}); copy it again") from error
    for key in ("ema_model_state_dict", "model_state_dict"):
        if key in state:
            state = state[key]
            break
    state = {name.removeprefix(EMA_PREFIX): value for name, value in state.items()}
    return {name: value.float() for name, value in state.items() if name not in NOT_WEIGHTS}


def load_weights(policy: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Put `state` in place of the policy's weights; raise with the first differences unless it fits exactly."""
    wanted = {name: tuple(value.shape) for name, value in policy.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    differences = [
        f"{name}: expected {wanted.get(name, 'nothing')}, got {found.get(name, 'nothing')}"
        for name in sorted(wanted.keys() | found.keys())
        if wanted.get(name) != found.get(name)
    ]
    if differences:
        raise ValueError(
            f"{source}: weights of another architecture, {len(differences)} of {len(wanted)} tensors differ:\n  "
            + "\n  ".join(differences[:5])
            + f"\nset backbone, arch and vocab in {CONFIG} to those of its training"
        )
    fresh = dict(state)
    for name in state:
        if name.endswith("rotary_embed.inv_freq"):  # may have been rounded to half precision on its way
            fresh[name] = rotary_frequencies(2 * len(state[name]))
    policy.load_state_dict(fresh, assign=True)


def merged_state(policy: nn.Module) -> dict[str, Tensor]:
    """The state_dict of the policy as if its LoRA adapters had been merged; the policy itself stays as it is."""
    adapted = {id(layer) for layer in lora_layers(policy)}
    merged: dict[str, Tensor] = {}
    prefixes = []
    for name, module in policy.named_modules():
        if id(module) in adapted:
            layer: Any = copy.deepcopy(module)
            if not layer.merged:
                layer.merge()
            prefixes.append(f"{name}.")
            merged |= {f"{name}.{key}": value for key, value in layer.get_base_layer().state_dict().items()}
    plain = {name: x for name, x in policy.state_dict().items() if not name.startswith(tuple(prefixes))}
    return {name: value.detach() for name, value in (plain | merged).items()}


def _find(name_or_path: str | Path) -> Path:
    if str(name_or_path) in BUNDLED:
        return Path(str(resources.files(__package__).joinpath(BUNDLED[str(name_or_path)])))
    directory = Path(name_or_path)
    if not directory.is_dir():
        raise FileNotFoundError(
            f"policy {str(name_or_path)!r}: expected one of {sorted(BUNDLED)} or a directory with {CONFIG},"
            " found neither"
        )
    return directory


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected what the weights are (backbone, arch, mel_spec, tokenizer, vocab), found no file;"
            " save_policy writes one"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error})") from error
    required = ("backbone", "arch", "mel_spec", "tokenizer", "vocab")
    missing = [key for key in required if key not in config]
    if missing:
        raise ValueError(f"{path}: expected {list(required)}, got no {missing}; add them")
    return config


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Write to a temporary file beside `path`, then rename: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
