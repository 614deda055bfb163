"""Policies on disk: our folders, F5-TTS's own files, and both on the Hugging Face hub.

A folder says what its weights are:

    policy.json          {"backbone": "DiT", "arch": {..}, "mel_spec": {..}, "tokenizer": "char", "vocab": "vocab.txt"},
                         "voices": ["joe", ..] where it speaks in these alone, "durations" for the tokenizer "phoneme"
    policy.safetensors   weights under F5-TTS's names, `transformer.*`
    vocab.txt            a token a line, id = line number

An F5-TTS weight file does not say which flags it was trained with (v0 and v1 have the same keys and shapes); the name
of its model does: `load_policy(path, model="F5TTS_v1_Base", vocab="vocab.txt")` (presets.py). Files read are those
of f5-tts's trainer (.pt with online weights and their EMA), its reduced ones (one of the two), and .safetensors, with
or without the `ema_model.` prefix; tensors only, never pickled code. What `save_policy` writes loads in stock F5-TTS
tools, with `use_ema` True and False; its trainer goes on from files of export.py.
"""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.layers import rotary_frequencies
from rlhf_mel.f5.presets import PUBLISHED, PublishedModel, download_model, find_model
from rlhf_mel.flow.lora import lora_layers
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.speech.f5_text import byte_vocab
from rlhf_mel.speech.text import PhonemeTokenizer, load_tokenizer, load_vocab
from rlhf_mel.storage import BUNDLES, bundle, download, write_tensors, write_whole

CONFIG, WEIGHTS, VOCAB = "policy.json", "policy.safetensors", "vocab.txt"


EMA_PREFIX = "ema_model."


EMBEDDING = "transformer.text_embed.text_embed.weight"


METADATA = "rlhf_mel"
"""Key in the header of a .safetensors under which policy.json's words stand, so that the file alone can be loaded."""


NOT_WEIGHTS = (
    "initted",
    "step",
    "update",
    "mel_spec.mel_stft.mel_scale.fb",
    "mel_spec.mel_stft.spectrogram.window",
)
"""What F5-TTS files hold besides weights: EMA counters, and a mel filterbank in the oldest."""


def load_policy(
    name_or_path: str | Path = "tiny",
    *,
    model: str | None = None,
    vocab: str | Path | None = None,
    tokenizer: str | None = None,
    use_ema: bool | None = None,
    device: torch.device | str | None = None,
) -> CFM:
    """A policy in eval mode, float32.

    Args:
        name_or_path: "tiny" (bundled), a model that F5-TTS publishes ("F5TTS_v1_Base", from the hub), a folder that
            save_policy wrote or the hub id of one, or a weight file of F5-TTS (.safetensors, .pt).
        model: for a weight file, the name of what it is or was fine-tuned from; its flags come from there.
        vocab: for a weight file, its vocab.txt; the one beside it unless given.
        tokenizer: another one than the model's.
        use_ema: for a .pt that holds online weights and their moving average, which of them; the average unless False.

    Raises:
        FileNotFoundError: no such name, a file is missing, or the hub cannot be reached.
        ValueError: the weights are damaged, or of another model or vocabulary.
    """
    asked = dict(model=model, vocab=vocab, tokenizer=tokenizer, use_ema=use_ema)
    path, config, state = _locate(str(name_or_path), asked)
    policy = _build(config, state, source=str(path))
    return policy.to(device).eval() if device is not None else policy.eval()


def _locate(name: str, asked: Mapping[str, Any]) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Path of the weights, their config, and the weights; `asked`: load_policy's options."""
    if name in PUBLISHED and not Path(name).exists():
        if asked["model"] not in (None, name):
            raise ValueError(f"model: expected {name!r} or none for a published name, got {asked['model']!r}")
        path, vocab = download_model(name)
        return _read_f5(path, **{**asked, "model": name, "vocab": asked["vocab"] or vocab})
    if Path(name).is_file():
        return _read_f5(Path(name), **asked)
    if given := [option for option in ("model", "vocab", "use_ema") if asked[option] is not None]:
        raise ValueError(f"{name}: expected a weight file with {given}, got a name or folder; leave them out")
    directory = _find(name)
    config = _read_config(directory / CONFIG)
    weights = directory / config.get("weights", WEIGHTS)
    text = {"vocab": directory / config["vocab"], "tokenizer": asked["tokenizer"] or config["tokenizer"]}
    return weights, {**config, **text}, read_weights(weights)


def _read_f5(
    path: Path, *, model: str | None, vocab: str | Path | None, tokenizer: str | None, use_ema: bool | None
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A weight file: what it says of itself, or what `model` says of it."""
    state = read_weights(path, use_ema=use_ema)
    config = _described(path) or _config_of(path, model, state)
    if model is not None:
        _check_model(path, model, config, state)
    tokenizer = tokenizer or config["tokenizer"]
    if vocab is None and tokenizer != "byte":
        vocab = path.with_name(VOCAB)
        if not vocab.is_file():
            raise FileNotFoundError(
                f"{vocab}: expected the vocabulary that {path.name} was trained with, found no file; pass vocab=PATH"
                " (a fine-tune of a published model has that model's vocab.txt)"
            )
    return path, {**config, "vocab": vocab, "tokenizer": tokenizer}, state


def _described(path: Path) -> dict[str, Any] | None:
    """What export.py and save_policy wrote into a .safetensors of what it holds."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        described = (file.metadata() or {}).get(METADATA)
    return None if described is None else json.loads(described)


def _config_of(path: Path, model: str | None, state: Mapping[str, Tensor]) -> dict[str, Any]:
    if model is None:
        raise ValueError(
            f"{path}: expected model=NAME, since the file does not say which flags it was trained with; its tensors fit"
            f" {fitting_models(state) or 'no published model (write a policy.json beside it)'}"
        )
    published = find_model(model)
    return {
        "backbone": published.backbone,
        "arch": dict(published.arch),
        "mel_spec": asdict(published.mel_spec),
        "tokenizer": published.tokenizer,
    }


def _check_model(path: Path, model: str, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Refuse a wrong guess, as far as anything can tell: the file's own words, its tensors, its folder's name."""
    wanted = find_model(model)
    for name, value in wanted.arch.items():
        if (actual := config["arch"].get(name)) != value:
            raise ValueError(f"{path}: expected {name}={value!r} for model={model!r}, got {actual!r}; leave model= out")
    if model not in (fits := fitting_models(state)):
        fitting = f"fit {fits}" if fits else "fit no published model"
        differences = _differences(_shapes(wanted, state), state)
        raise ValueError(
            f"{path}: expected {model}, got other tensors: {_listed(differences)}\nthey {fitting}; pass that as model="
        )
    others = [
        name for name in fits if (PUBLISHED[name].arch, PUBLISHED[name].mel_spec) != (wanted.arch, wanted.mel_spec)
    ]
    if named := [name for name in others if name in path.parts[:-1]]:
        warnings.warn(f"{path}: the folder says {named[0]}, model= says {model}: their flags differ", stacklevel=4)


def fitting_models(state: Mapping[str, Tensor]) -> list[str]:
    """The published models whose tensors have these names and shapes, whatever the vocabulary."""
    return [name for name, model in PUBLISHED.items() if not _differences(_shapes(model, state), state)]


def _shapes(model: PublishedModel, state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published model with the vocabulary size of `state`."""
    embedding = state.get(EMBEDDING)
    tokens = 256 if embedding is None else len(embedding) - 1
    with torch.device("meta"):
        backbone = load_backbone(model.backbone)(**model.arch, mel_dim=model.mel_spec.n_mels, text_num_embeds=tokens)
    return {f"transformer.{name}": tuple(value.shape) for name, value in backbone.state_dict().items()}


def _build(config: Mapping[str, Any], state: Mapping[str, Tensor], *, source: str) -> CFM:
    tokenizer = load_tokenizer(config["tokenizer"], config.get("durations"))
    vocab = byte_vocab() if config["vocab"] is None else load_vocab(config["vocab"])
    mel_spec = MelSpec(**config["mel_spec"])
    arch = {"text_num_embeds": len(vocab), "mel_dim": mel_spec.n_mels, **config["arch"]}
    with torch.device("meta"):  # the weights follow at once: drawing random ones for F5-TTS takes seconds
        backbone = load_backbone(config["backbone"])(**arch)
    policy = CFM(backbone, mel_spec_module=mel_spec, vocab_char_map=vocab, tokenizer=tokenizer)
    _check_vocab(len(vocab), state, source=source, vocab=config["vocab"])
    load_weights(policy, state, source=source)
    policy.voices = tuple(config.get("voices", ()))
    return policy


def _check_vocab(tokens: int, state: Mapping[str, Tensor], *, source: str, vocab: object) -> None:
    rows = len(state[EMBEDDING]) if EMBEDDING in state else tokens + 1
    if rows != tokens + 1:
        raise ValueError(
            f"{source}: {EMBEDDING} expected {tokens + 1} rows for the {tokens} tokens of {vocab} and the filler, got"
            f" {rows}: weights of another vocabulary, of {rows - 1} tokens; pass the vocab.txt that it was trained with"
        )


def save_policy(policy: CFM, directory: str | Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write the policy where load_policy and stock F5-TTS find it; LoRA is merged into what is written only.

    Each file appears whole or not at all, policy.json last.
    """
    require_text(policy, "save_policy")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {**describe(policy), "vocab": VOCAB}
    write_vocab(policy, directory / VOCAB)
    write_safetensors(portable_state(policy, dtype), directory / WEIGHTS, policy)
    write_whole(directory / CONFIG, lambda path: path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))
    return directory


def require_text(policy: CFM, caller: str) -> None:
    """Raise for a policy that could not read text once loaded again."""
    if policy.tokenizer is None or policy.vocab_char_map is None:
        raise ValueError(f"{caller}: expected a policy with tokenizer and vocabulary; pass both to CFM")


def describe(policy: CFM) -> dict[str, Any]:
    """What the weights are: backbone, arch, mel_spec and tokenizer of policy.json."""
    tokenizer = policy.tokenizer
    durations = tokenizer.durations_card if isinstance(tokenizer, PhonemeTokenizer) and tokenizer.weights else None
    return {
        "backbone": type(policy.transformer).__name__,
        "arch": policy.transformer.arch,
        "mel_spec": asdict(policy.mel_spec),
        "tokenizer": tokenizer.name if tokenizer else None,
        **({"durations": durations} if durations else {}),
        **({"voices": list(policy.voices)} if policy.voices else {}),
    }


def portable_state(policy: CFM, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """F5-TTS's names to weights on the CPU, LoRA merged; rotary frequencies are never rounded."""
    return {
        name: tensor.to("cpu", tensor.dtype if name.endswith("inv_freq") else dtype).contiguous()
        for name, tensor in merged_state(policy).items()
    }


def write_vocab(policy: CFM, path: Path) -> None:
    """A token a line, in the order of ids; whole or not at all."""
    tokens = sorted((policy.vocab_char_map or {}).items(), key=lambda item: item[1])
    text = "".join(f"{token}\n" for token, _ in tokens)
    write_whole(path, lambda path: path.write_text(text, encoding="utf-8"))


def write_safetensors(state: dict[str, Tensor], path: Path, policy: CFM) -> None:
    """Weights with a description of `policy` in the header; whole or not at all."""
    # one entry: safetensors writes several in any order, and equal weights should be equal files
    write_tensors(path, state, {METADATA: json.dumps(describe(policy))})


def load_backbone(name: str) -> Callable[..., nn.Module]:
    """The backbone class `DiT` of backbones/dit.py, and so on: the file's name is the registry."""
    known = sorted(path.stem for path in (Path(__file__).parent / "backbones").glob("[!_]*.py"))
    if name.lower() not in known:
        raise ValueError(f"backbone: expected one of {known} (in any case), got {name!r}")
    classes = vars(import_module(f"{__package__}.backbones.{name.lower()}"))
    backbone: type[nn.Module] = next(value for key, value in classes.items() if key.lower() == name.lower())
    return backbone


def read_weights(path: Path, *, use_ema: bool | None = None) -> dict[str, Tensor]:
    """Weights by F5-TTS's names without the EMA prefix, float32, from .safetensors or .pt.

    Args:
        use_ema: True the moving average, False the online weights; None: the average where the file has both.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the policy's weights, found no file")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            # mapped where that is possible: of a trainer's 5 GB of F5TTS_v1_Base only the chosen 1.3 are read
            mapped = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: expected weights and nothing else, got a pickle that holds code or other objects; it was not run."
            " Convert it to .safetensors where you trust it"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: expected weights, got a damaged file ({error}); copy it again") from error
    state = _choose(path, state, use_ema)
    if use_ema is False and any(name.startswith(EMA_PREFIX) for name in state):
        raise ValueError(f"{path}: expected online weights for use_ema=False, got an EMA alone; leave use_ema out")
    state = {name.removeprefix(EMA_PREFIX): value for name, value in state.items()}
    # copies: the file may be written again while the policy lives
    return {name: value.to(torch.float32, copy=True) for name, value in state.items() if name not in NOT_WEIGHTS}


def _choose(path: Path, content: Any, use_ema: bool | None) -> dict[str, Any]:
    """The EMA or the online weights of a .pt, or all of a file that holds one of them."""
    kinds = ("ema_model_state_dict", "model_state_dict")
    present = [kind for kind in kinds if isinstance(content, dict) and kind in content]
    if present:
        wanted = present[0] if use_ema is None else kinds[not use_ema]
        if wanted not in present:
            raise ValueError(f"{path}: expected {wanted} for use_ema={use_ema}, got {present}; leave use_ema out")
        content = content[wanted]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(
            f"{path}: expected names and tensors, got {type(content).__name__} of other things; see {CONFIG}"
        )
    return content


def load_weights(policy: nn.Module, state: Mapping[str, Tensor], *, source: str) -> None:
    """Put `state` in place of the policy's weights; raise with the first differences unless it fits exactly."""
    wanted = {name: tuple(value.shape) for name, value in policy.state_dict().items()}
    if differences := _differences(wanted, state):
        raise ValueError(
            f"{source}: weights of another architecture, {len(differences)} of {len(wanted)} tensors differ:"
            f"{_listed(differences)}\nset backbone, arch and vocab in {CONFIG} to those of its training"
        )
    fresh = dict(state)
    for name in state:
        if name.endswith("rotary_embed.inv_freq"):  # may have been rounded to half precision on its way
            fresh[name] = rotary_frequencies(2 * len(state[name]))
    policy.load_state_dict(fresh, assign=True)


def _differences(wanted: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> list[str]:
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return [
        f"{name}: expected {wanted.get(name, 'nothing')}, got {shapes.get(name, 'nothing')}"
        for name in sorted(wanted.keys() | shapes.keys())
        if wanted.get(name) != shapes.get(name)
    ]


def _listed(differences: list[str]) -> str:
    return "".join(f"\n  {difference}" for difference in differences[:5])


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


def _find(name: str) -> Path:
    """The folder of a policy: bundled, local, or a copy of the hub's."""
    if folder := bundle(name):
        return folder
    if Path(name).is_dir():
        return Path(name)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).suffix:
        return _download_folder(name)
    raise FileNotFoundError(
        f"policy {name!r}: expected one of {[*BUNDLES, *PUBLISHED]}, a directory with {CONFIG}, a weight file, or"
        " a hub id 'owner/name', found none of these"
    )


def _download_folder(repo: str) -> Path:
    """policy.json and what it names, from the hub or its cache."""
    remedy = "a local folder"
    config = download(repo, CONFIG, remedy=remedy)
    for file in (_read_config(config)["vocab"], _read_config(config).get("weights", WEIGHTS)):
        download(repo, file, remedy=remedy)
    return config.parent


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected what the weights are (backbone, arch, mel_spec, tokenizer, vocab), found no file;"
            " save_policy writes one"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got something else ({error})") from error
    required = ("backbone", "arch", "mel_spec", "tokenizer", "vocab")
    missing = [key for key in required if key not in config]
    if missing:
        raise ValueError(f"{path}: expected {list(required)}, got no {missing}; add them")
    return config
