"""Policies for others: files that stock F5-TTS loads in every setting, LoRA adapters in peft's format, the hub.

F5-TTS's `load_checkpoint` and its trainer each read weights in their own way:

| written by            | names in the file                            | load_checkpoint use_ema | its trainer |
|-----------------------|----------------------------------------------|-------------------------|-------------|
| `export_f5(.. .pt)`   | both of the following, in two dictionaries   | True and False          | yes         |
| `export_f5(.. "ema")` | `ema_model.transformer.*`, initted, step     | True                    | yes         |
| `export_f5(.. "raw")` | `transformer.*`                              | True and False          | no          |
| `save_policy`         | the same as "raw", and policy.json beside it | True and False          | no          |

The weights are those that were trained, not a moving average of them: after a few hundred updates F5-TTS's average
(decay 0.9999) would still be the model before training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_mel.f5.cfm import CFM
from rlhf_mel.f5.checkpoints import (
    EMA_PREFIX,
    VOCAB,
    WEIGHTS,
    portable_state,
    require_text,
    save_policy,
    write_safetensors,
    write_vocab,
)
from rlhf_mel.flow.lora import add_lora, lora_layers
from rlhf_mel.storage import write_tensors, write_whole

if TYPE_CHECKING:
    from peft import LoraConfig

LAYOUTS = ("raw", "ema")


ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


ADAPTER_PREFIX = "base_model.model."


CARD = "README.md"


def export_f5(policy: CFM, path: str | Path, *, layout: str = "raw", dtype: torch.dtype = torch.float32) -> Path:
    """Write the policy, LoRA merged, as a weight file of F5-TTS, and vocab.txt beside it; see the module.

    Args:
        path: ends in .safetensors (then `layout` is "raw" or "ema") or .pt (which holds both).
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pt"):
        raise ValueError(f"{path}: expected a name in .safetensors or .pt, got {path.suffix!r}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout: expected one of {list(LAYOUTS)}, got {layout!r}")
    require_text(policy, "export_f5")
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = portable_state(policy, dtype)
    if path.suffix == ".pt":
        checkpoint = {"model_state_dict": raw, "ema_model_state_dict": _as_ema(raw)}
        write_whole(path, lambda temporary: torch.save(checkpoint, temporary))
    else:
        write_safetensors(raw if layout == "raw" else _as_ema(raw), path, policy)
    write_vocab(policy, path.with_name(VOCAB))
    return path


def _as_ema(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of ema_pytorch, whose counters F5-TTS's trainer asks for."""
    counters = {"initted": torch.tensor(True), "step": torch.tensor(0)}
    return {**{EMA_PREFIX + name: value for name, value in raw.items()}, **counters}


def save_lora(policy: nn.Module, directory: str | Path, *, base: str | None = None) -> Path:
    """Write the policy's LoRA adapter as peft does: adapter_config.json, adapter_model.safetensors.

    `PeftModel.from_pretrained(load_policy(base), directory).merge_and_unload()` reads it, as does `load_lora`.

    Args:
        base: name or path of the policy that it was trained on, for the config.

    Raises:
        ValueError: the policy has no adapter.
    """
    if not lora_layers(policy):
        raise ValueError("save_lora: expected a policy with LoRA adapters (add_lora), got none; use save_policy")
    from peft import get_peft_model_state_dict

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config: Any = policy.peft_config["default"]  # type: ignore[index]
    state = {
        ADAPTER_PREFIX + name: value.detach().cpu().contiguous()
        for name, value in get_peft_model_state_dict(policy).items()
    }
    written = {**config.to_dict(), "base_model_name_or_path": base, "inference_mode": True}
    text = json.dumps(_jsonable(written), indent=2) + "\n"
    write_tensors(directory / ADAPTER_WEIGHTS, state, {"format": "pt"})
    write_whole(directory / ADAPTER_CONFIG, lambda path: path.write_text(text, encoding="utf-8"))
    return directory


def load_lora(policy: nn.Module, directory: str | Path) -> nn.Module:
    """Put the adapter that save_lora or peft wrote into the policy, in place; save_policy then merges it.

    Raises:
        FileNotFoundError: no adapter in the folder.
        ValueError: it is another model's.
    """
    from peft import LoraConfig, set_peft_model_state_dict

    directory = Path(directory)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory / name}: expected a LoRA adapter in peft's format, found no such file")
    config: LoraConfig = LoraConfig.from_pretrained(str(directory))
    config.inference_mode = False
    state = load_file(directory / ADAPTER_WEIGHTS)
    state = {name.removeprefix(ADAPTER_PREFIX): value for name, value in state.items()}
    if strangers := [name for name in state if not _has_place(policy, name)]:
        raise ValueError(
            f"{directory}: expected an adapter of this policy, but {len(strangers)} of {len(state)} tensors have no"
            f" place in it, first {strangers[0]}; load the policy it was trained on ({config.base_model_name_or_path})"
        )
    add_lora(policy, config)
    set_peft_model_state_dict(policy, state)
    return policy


def _has_place(policy: nn.Module, name: str) -> bool:
    module, _, rest = name.rpartition(".lora_")
    weight = policy.state_dict().get(f"{module}.weight")
    return weight is not None and rest[:1] in ("A", "B")


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def model_card(
    policy: CFM, *, base: str, repo_id: str = "OWNER/NAME", license: str | None = None, run: str | Path | None = None
) -> str:
    """README.md of a trained policy: base, algorithm, rewards, and the numbers that the run measured.

    Args:
        run: folder of the run (its summary.json, config.yaml); without it the card says that nothing was measured.
        license: of the weights; F5-TTS's published ones are cc-by-nc-4.0, and what is made of them must be too.
    """
    from huggingface_hub import ModelCardData

    summary, config = _read_run(run)
    data = ModelCardData(
        base_model=base if "/" in base else None,
        license=license,
        library_name="rlhf-mel",
        pipeline_tag="text-to-speech",
        tags=["f5-tts", "rlhf", str(summary.get("algorithm", "flow-matching"))],
    )
    rewards = config.get("reward_models") or [
        name.split("/")[1]
        for name in summary.get("after", {})
        if name.startswith("rewards/") and name.endswith("/mean")
    ]
    facts = {
        "Base": base,
        "Backbone": f"{type(policy.transformer).__name__}, {sum(p.numel() for p in policy.parameters()):,} parameters",
        "Algorithm": summary.get("algorithm", "not stated"),
        "Rewards": ", ".join(map(str, rewards)) or "not stated",
        "Updates": summary.get("steps", "not stated"),
        "Seed": summary.get("seed", "not stated"),
        "Weights": "the online weights, no moving average; LoRA merged",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return CARD_TEXT.format(
        yaml=data.to_yaml(), name=repo_id.split("/")[-1], facts=table, numbers=_numbers(summary), repo=repo_id,
        weights=WEIGHTS, vocab=VOCAB,
    )  # fmt: skip


CARD_TEXT = """---
{yaml}
---
# {name}
A speech model fine-tuned with rewards by `rlhf-mel`.

| | |
|---|---|
{facts}
## Measured
{numbers}
## Use
```python
from rlhf_mel import load_policy
policy = load_policy("{repo}")
```
F5-TTS's own tools read `{weights}` (`use_ema=True`, their default) with `{vocab}`.
"""


def _read_run(run: str | Path | None) -> tuple[dict[str, Any], dict[str, Any]]:
    if run is None:
        return {}, {}
    import yaml

    summary = Path(run) / "summary.json"
    if not summary.is_file():
        raise FileNotFoundError(f"{summary}: expected the summary of a finished run, found none; pass its output_dir")
    config = Path(run) / "config.yaml"
    read = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return json.loads(summary.read_text(encoding="utf-8")), read or {}


def _numbers(summary: Mapping[str, Any]) -> str:
    before, after = summary.get("before") or {}, summary.get("after") or {}
    rows = [name for name in before if name in after]
    if not rows:
        return "Nothing: no held-out prompts were listened to before and after training.\n"
    lines = [f"| {name} | {_number(before[name])} | {_number(after[name])} |" for name in rows]
    head = "On held-out prompts, before and after training:\n\n| measure | before | after |\n|---|---|---|\n"
    return head + "\n".join(lines) + f"\n\nVerdict: {summary.get('verdict', {}).get('overall', 'none')}\n"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else str(value)


def write_upload(policy: CFM, folder: str | Path, **card: Any) -> Path:
    """The folder that push_to_hub uploads: what save_policy writes, and the model card."""
    folder = save_policy(policy, folder)
    text = model_card(policy, **card)
    write_whole(folder / CARD, lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def push_to_hub(
    policy: CFM,
    repo_id: str,
    *,
    base: str,
    folder: str | Path,
    run: str | Path | None = None,
    license: str | None = None,
    private: bool = True,
    token: str | None = None,
    commit_message: str = "Upload policy",
) -> str:
    """Upload the policy and its card to the Hugging Face hub; `load_policy(repo_id)` reads them. Returns the address.

    Args:
        folder: where the upload is put together, and stays. `base`, `run` and `license`: see model_card.
    """
    from huggingface_hub import HfApi

    folder = write_upload(policy, folder, base=base, repo_id=repo_id, run=run, license=license)
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))
