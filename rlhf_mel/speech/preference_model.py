"""A network that scores speech, learnt from preferences (rewards/bradley_terry.py): an ensemble of n members.

    mel       x = max(mel - log L, -9)                                  score = w . pool(ConvNeXt blocks(x))
    whisper   x = sum_l softmax(a)_l norm(layer l of a frozen encoder)  score = w . pool(MLP(x))

    pool: mean and deviation over an item's own frames, weighted by attention (Okabe et al., "Attentive statistics
    pooling", arXiv 1803.10963); the weighted sum of layers is that of ELMo (1802.05365) and SUPERB (2105.01051)

Level. People asked for the better of two clips take the louder one, and what learns from them learns that. Here a score
cannot: the loud level is taken out of the input,

    L = sum_t a_t^2 / sum_t a_t,    a_t = mean over bands of exp(mel_t),

the mean magnitude weighted by itself, so that silence has no part in it. A gain g moves every log mel and log L by
log g, which cancels; what lies 9 nats (78 dB) or more below L is cut there, so that the floor of a log mel, where a
gain moves nothing, is not seen. Exact, up to rounding (LEVEL_TOLERANCE), for clips louder than about -50 dBFS: of
quieter ones L is taken to be 9 nats above the floor. speech/whisper_features.py does the like with the waveform.

Members begin at different weights. Only differences of scores are learnt, so a member's scores have any centre: it is
measured on the clips of the training (`centre`) and subtracted, and what is left of the members' spread is uncertainty.
An item in a batch scores as it does alone: no batch statistics, padding is never heard. float32 even under autocast.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rlhf_mel.masked import lengths_to_mask
from rlhf_mel.speech.audio import MEL_FLOOR, MelSpec, resample, resampled_length
from rlhf_mel.speech.recognizer import Block
from rlhf_mel.speech.whisper_features import SAMPLE_RATE_HZ, WhisperFeatures, load_whisper_features
from rlhf_mel.storage import write_tensors, write_whole
from rlhf_mel.types import Audio

BODIES = ("mel", "whisper")

DYNAMIC_RANGE = 9.0
"""Nats below the loud level at which a mel is cut."""
LEVEL_TOLERANCE = 1e-3
"""How far a gain of 12 dB may move a score, of clips and copies louder than -50 dBFS."""

_CENTRE, _SCALE = -3.0, 3.0
"""What is left lies between -9 and 4; members see -2 to 2."""


def level_free(mel: Float[Tensor, "b n m"], lengths_frames: Int[Tensor, " b"]) -> Float[Tensor, "b n m"]:
    """A log mel without its level; see the module. Beyond an item's length nothing is read, and what is there stays."""
    beyond = ~lengths_to_mask(lengths_frames, mel.shape[1])
    log_magnitude = mel.masked_fill(beyond[..., None], 0.0).logsumexp(-1).masked_fill(beyond, -torch.inf)
    bands = torch.tensor(float(mel.shape[-1]), dtype=mel.dtype, device=mel.device).log()
    loud = (2 * log_magnitude).logsumexp(1) - log_magnitude.logsumexp(1) - bands
    floor = torch.tensor(MEL_FLOOR, dtype=mel.dtype, device=mel.device).log()
    return (mel - loud.clamp(min=floor + DYNAMIC_RANGE)[:, None, None]).clamp(min=-DYNAMIC_RANGE)


class AttentivePooling(nn.Module):
    """Mean and deviation over frames, weighted by attention: [b, k, d] to [b, 2 d]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.Linear(dim, dim // 2), nn.Tanh(), nn.Linear(dim // 2, 1))

    def forward(self, hidden: Float[Tensor, "b k d"], padded: Bool[Tensor, "b k 1"]) -> Float[Tensor, "b pooled"]:
        """Of frames that are not `padded`; at least one of each item."""
        hidden = hidden.masked_fill(padded, 0.0)
        weights = self.attention(hidden).masked_fill(padded, -torch.inf).softmax(1)
        mean = (weights * hidden).sum(1)
        variance = (weights * (hidden - mean[:, None]).square()).sum(1)
        return torch.cat([mean, (variance + 1e-6).sqrt()], -1)


class MelMember(nn.Module):
    """A whole network on the mel without its level."""

    def __init__(self, config: PreferenceModel.Config, n_mels: int) -> None:
        super().__init__()
        dim = config.dim
        self.widen = nn.Conv1d(n_mels, dim, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(
            Block(dim, 2 * dim, config.kernel_size, config.dropout) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.pool = AttentivePooling(dim)
        self.score = nn.Linear(2 * dim, 1)

    def forward(self, mel: Float[Tensor, "b n m"], lengths_frames: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Scores of mels that `level_free` has been through. Filled, not multiplied: padding may be NaN."""
        padded = ~lengths_to_mask(lengths_frames, mel.shape[1])[..., None]
        scaled = ((mel - _CENTRE) / _SCALE).masked_fill(padded, 0.0)
        hidden = F.gelu(self.widen(scaled.transpose(1, 2))).transpose(1, 2)
        padded = ~lengths_to_mask((lengths_frames + 1) // 2, hidden.shape[1])[..., None]
        for block in self.blocks:
            hidden = block(hidden.masked_fill(padded, 0.0))
        score: Tensor = self.score(self.pool(self.norm(hidden), padded))[:, 0]
        return score


class WhisperMember(nn.Module):
    """A head on the layers of a frozen encoder."""

    def __init__(self, config: PreferenceModel.Config, encoder: WhisperFeatures) -> None:
        super().__init__()
        self.layers = nn.Parameter(torch.zeros(encoder.num_layers))
        self.mlp = nn.Sequential(
            nn.Linear(encoder.dim, config.dim), nn.GELU(), nn.Dropout(config.dropout), nn.Linear(config.dim, config.dim)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.pool = AttentivePooling(config.dim)
        self.score = nn.Linear(2 * config.dim, 1)

    def forward(self, layers: Float[Tensor, "layers b k d"], lengths: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Scores of the layers of WhisperFeatures."""
        normalised = F.layer_norm(layers, layers.shape[-1:])  # layers of large numbers do not outweigh the others
        hidden = torch.einsum("l,lbkd->bkd", self.layers.softmax(0), normalised)
        padded = ~lengths_to_mask(lengths, hidden.shape[1])[..., None]
        score: Tensor = self.score(self.pool(self.norm(self.mlp(hidden)), padded))[:, 0]
        return score


class PreferenceModel(nn.Module):
    """See the module. `threshold` [members] holds what models of ties learn: softplus^-1(eta), or log nu."""

    centre: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Sizes of a preference model."""

        body: str = "mel"
        """What is heard: "mel", or "whisper", the features of a frozen encoder."""
        num_members: int = 1
        """Members of the ensemble."""
        dim: int = 64
        """Channels of a member; even."""
        num_layers: int = 3
        """Blocks of a member on the mel."""
        kernel_size: int = 7
        """Frames that a block's convolution spans (22 ms each); odd."""
        dropout: float = 0.1
        """Probability, in training."""

        def __post_init__(self) -> None:
            if self.body not in BODIES:
                raise ValueError(f"body: expected one of {list(BODIES)}, got {self.body!r}")
            if self.num_members < 1 or self.num_layers < 1 or self.dim < 2 or self.dim % 2:
                raise ValueError(
                    "preference model: expected num_members and num_layers of at least 1 and an even dim, got "
                    f"{self.num_members}, {self.num_layers}, {self.dim}"
                )
            if self.kernel_size % 2 == 0:
                raise ValueError(f"kernel_size: expected an odd number, got {self.kernel_size}")

    def __init__(
        self,
        config: Config | None = None,
        *,
        mel_spec: MelSpec | None = None,
        encoder: WhisperFeatures | None = None,
        seed: int = 0,
    ) -> None:
        """mel_spec: the mels that are heard. encoder: of the body "whisper". seed: of the first weights."""
        super().__init__()
        self.config = config = config or self.Config()
        self.mel_spec = mel_spec or MelSpec()
        if (encoder is None) != (config.body == "mel"):
            raise ValueError(f"body {config.body!r}: expected an encoder for 'whisper' alone; give one, or none")
        self.encoder = encoder
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # modules draw their first weights from the global generator of the CPU
            self.members = nn.ModuleList(
                MelMember(config, self.mel_spec.n_mels) if encoder is None else WhisperMember(config, encoder)
                for _ in range(config.num_members)
            )
        self.threshold = nn.Parameter(torch.zeros(config.num_members))
        self.register_buffer("centre", torch.zeros(config.num_members))

    def forward(self, audio: Audio) -> Float[Tensor, "b members"]:
        """Score of every clip by every member.

        Raises:
            ValueError: mels of another number of channels.
        """
        dtype = self.centre.dtype
        with torch.autocast(audio.mel.device.type, enabled=False):
            if self.encoder is None:
                self._check_mels(audio)
                heard, lengths = level_free(audio.mel.to(dtype), audio.lengths_frames), audio.lengths_frames
            else:
                waveform = resample(audio.waveform.to(dtype), audio.sample_rate_hz, SAMPLE_RATE_HZ)
                samples = resampled_length(audio.lengths_samples, audio.sample_rate_hz, SAMPLE_RATE_HZ)
                heard, lengths = self.encoder(waveform, samples)
            return torch.stack([member(heard, lengths) for member in self.members], 1) - self.centre

    def _check_mels(self, audio: Audio) -> None:
        expected, got = self.mel_spec.n_mels, audio.mel.shape[-1]
        if got != expected:
            raise ValueError(
                f"preference model: expected mels of {expected} channels, got {got}; train one on the policy's mels"
            )

    def own_state(self) -> dict[str, Tensor]:
        """What was learnt: the state without the encoder's."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("encoder.")}


def save_preference_model(model: PreferenceModel, folder: Path | str, **card: Any) -> None:
    """Write `config.json` (with `card` in it), `model.safetensors` and, of the body "whisper", `encoder/`.

    The folder is whole: `--reward_models folder` loads it. A frozen encoder is copied as it is.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.own_state().items()}
    if model.encoder is not None and not (folder / "encoder/config.json").is_file():
        model.encoder.encoder.save_pretrained(folder / "encoder")
    values = {"reward_model": "preference", "arch": asdict(model.config), "mel_spec": asdict(model.mel_spec), **card}
    text = json.dumps(values, indent=1) + "\n"
    write_tensors(folder / "model.safetensors", weights)
    write_whole(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def load_preference_model(folder: Path | str) -> PreferenceModel:
    """What `save_preference_model` wrote; frozen, float32, in evaluation mode, on the CPU.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: config.json is of something else, or the weights do not fit it.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name}: expected a preference model's config and weights, found none; train one with "
                f"recipes/reward_model.py --output_dir {folder}"
            )
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if values.get("reward_model") != "preference":
        raise ValueError(
            f'{folder / "config.json"}: expected "reward_model": "preference", got {values.get("reward_model")!r}; '
            "name a folder that recipes/reward_model.py wrote"
        )
    config = PreferenceModel.Config(**values["arch"])
    encoder = load_whisper_features(folder / "encoder") if config.body == "whisper" else None
    model = PreferenceModel(config, mel_spec=MelSpec(**values["mel_spec"]), encoder=encoder)
    weights = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    expected = model.own_state()
    wrong = sorted(
        name
        for name in expected.keys() | weights.keys()
        if name not in expected or name not in weights or expected[name].shape != weights[name].shape
    )
    if wrong:
        raise ValueError(f"{folder / 'model.safetensors'}: expected the tensors of config.json, got others: {wrong}")
    model.load_state_dict(weights, strict=False)  # the encoder's are loaded already
    return model.eval().requires_grad_(False)
