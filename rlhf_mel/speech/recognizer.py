"""A small listener: what a mel says (CTC over letters) and who says it (a voice embedding), differentiable in the mel.

    h = blocks(stem(mel)),  22 ms a frame;   log p(character | frame) = log_softmax(W h)
    -log p(text) = -log sum over alignments of prod p    (Graves et al., "Connectionist temporal classification", 2006)
    voice = unit(V [mean_t, std_t](h of a middle block))

ConvNeXt blocks (Liu et al. 2022) in one dimension, with layer norm per frame: no frame knows of the batch, or of
padding, so an item in a batch gets what it gets alone; and no attention, so letters come from what is heard within a
second, not from a language model that would forgive mumbling. float32 even under autocast.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_mel.masked import lengths_to_mask
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.storage import bundle, write_tensors, write_whole

ALPHABET = " 'abcdefghijklmnopqrstuvwxyz"
"""Character k of it is class k + 1; class 0 is CTC's blank."""


CLASSES = len(ALPHABET) + 1


VOICE_DIM = 64


SUBSAMPLING = 2


_MEL_CENTRE, _MEL_SCALE = -4.0, 4.0
"""Log mels of speech lie between -11.5 and 3; the stem sees about -2 to 2."""


def normalize_text(text: str) -> str:
    """Lower-case words of a-z and inner apostrophes, single spaces; accents and punctuation are dropped.

    Raises ValueError for what cannot be spelled so, digits for instance, and where nothing is left.
    """
    text = unicodedata.normalize("NFKD", text.lower().replace("’", "'"))
    text = "".join(character for character in text if not unicodedata.combining(character))
    text = re.sub(r"(?<![a-z])'|'(?![a-z])", " ", text)
    words = "".join(character if character.isalnum() or character == "'" else " " for character in text).split()
    if foreign := sorted({character for word in words for character in word if character not in ALPHABET}):
        raise ValueError(f"text: expected letters a-z, got {foreign} in {text!r}; spell numbers and symbols out")
    if not words:
        raise ValueError(f"text: expected words, got {text!r}")
    return " ".join(words)


class Block(nn.Module):
    """ConvNeXt: x + scale * MLP(norm(depthwise convolution(x))), padded frames of x at zero."""

    def __init__(self, dim: int, hidden_dim: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.mix = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden_dim)
        self.down = nn.Linear(hidden_dim, dim)
        self.scale = nn.Parameter(torch.full((dim,), 0.3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "b k d"]) -> Float[Tensor, "b k d"]:
        """See the class; padded frames of what comes back are not zero."""
        mixed = self.norm(self.mix(x.transpose(1, 2)).transpose(1, 2))
        update: Tensor = self.scale * self.dropout(self.down(F.gelu(self.up(mixed))))
        return x + update


class Recognizer(nn.Module):
    """See the module docstring; the bundled one has 2.4 M parameters.

    It hears mels of n frames, and answers for each of k = ceil(n / 2) frames with c = 29 classes.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Sizes of a recognizer; the defaults are those of the bundled one."""

        dim: int = 224
        """Channels between the blocks."""
        hidden_dim: int = 560
        """Channels inside a block's MLP."""
        num_layers: int = 8
        """Number of blocks."""
        kernel_size: int = 11
        """Frames that a block's convolution spans; odd."""
        voice_layer: int = 4
        """The block, counted from 1, after which the voice is read."""
        dropout: float = 0.1
        """Probability, at the end of a block."""

        def __post_init__(self) -> None:
            if not 1 <= self.voice_layer <= self.num_layers or self.kernel_size % 2 == 0:
                raise ValueError(
                    "recognizer: expected 1 <= voice_layer <= num_layers and an odd kernel_size, got "
                    f"{self.voice_layer}, {self.num_layers}, {self.kernel_size}"
                )

    def __init__(self, mel_spec: MelSpec | None = None, config: Config | None = None) -> None:
        super().__init__()
        self.mel_spec = mel_spec or MelSpec()
        self.config = config = config or self.Config()
        dim = config.dim
        self.widen = nn.Conv1d(self.mel_spec.n_mels, dim, 5, padding=2)
        self.subsample = nn.Conv1d(dim, dim, 5, stride=SUBSAMPLING, padding=2)
        self.blocks = nn.ModuleList(
            Block(dim, config.hidden_dim, config.kernel_size, config.dropout) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.letters = nn.Linear(dim, CLASSES)
        self.voice = nn.Linear(2 * dim, VOICE_DIM)

    def forward(
        self, mel: Float[Tensor, "b n m"], lengths_frames: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b k c"], Int[Tensor, " b"]]:
        """Log-probabilities of the classes, and how many frames of them are each item's own."""
        log_probs, _, lengths = self.listen(mel, lengths_frames)
        return log_probs, lengths

    def listen(
        self, mel: Float[Tensor, "b n m"], lengths_frames: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b k c"], Float[Tensor, "b voice"], Int[Tensor, " b"]]:
        """Log-probabilities, voices and lengths, of one pass: as `forward` and `voice_embedding`."""
        with torch.autocast(mel.device.type, enabled=False):
            hidden, padded, lengths = self._stem(mel, lengths_frames)
            hidden, middle = self._blocks(hidden, padded)
            log_probs = self.letters(self.norm(hidden)).log_softmax(-1)
            return log_probs, self._pool(middle, padded, lengths), lengths

    def ctc_loss(
        self, mel: Float[Tensor, "b n m"], lengths_frames: Int[Tensor, " b"], texts: Sequence[str]
    ) -> Float[Tensor, " b"]:
        """-log p(text | mel) / characters; see `character_nll`."""
        log_probs, lengths = self(mel, lengths_frames)
        return character_nll(log_probs, lengths, texts)

    @torch.no_grad()
    def transcribe(self, mel: Float[Tensor, "b n m"], lengths_frames: Int[Tensor, " b"]) -> list[str]:
        """The most probable class of every frame, repeats merged, blanks dropped."""
        log_probs, lengths = self(mel, lengths_frames)
        return greedy(log_probs, lengths)

    def voice_embedding(
        self, mel: Float[Tensor, "b n m"], lengths_frames: Int[Tensor, " b"]
    ) -> Float[Tensor, "b voice"]:
        """Unit vectors of VOICE_DIM; the cosine of two is near 1 for one voice. Only the lower blocks run."""
        with torch.autocast(mel.device.type, enabled=False):
            hidden, padded, lengths = self._stem(mel, lengths_frames)
            middle = self._blocks(hidden, padded, upto=self.config.voice_layer)[1]
            return self._pool(middle, padded, lengths)

    def _stem(self, mel: Tensor, lengths_frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B, T', D], padded [B, T', 1], lengths T'. Filled, not multiplied: padding may be NaN."""
        padded = ~lengths_to_mask(lengths_frames, mel.shape[1])[:, None]
        scaled = (mel.to(self.letters.weight.dtype).transpose(1, 2) - _MEL_CENTRE) / _MEL_SCALE
        wide = F.gelu(self.widen(scaled.masked_fill(padded, 0.0)))
        hidden = F.gelu(self.subsample(wide.masked_fill(padded, 0.0))).transpose(1, 2)
        lengths = (lengths_frames + SUBSAMPLING - 1) // SUBSAMPLING
        return hidden, ~lengths_to_mask(lengths, hidden.shape[1])[..., None], lengths

    def _blocks(self, hidden: Tensor, padded: Tensor, upto: int | None = None) -> tuple[Tensor, Tensor]:
        """What leaves the last block, and what leaves block `voice_layer`."""
        middle = hidden
        for index, block in enumerate(self.blocks[:upto], start=1):
            hidden = block(hidden.masked_fill(padded, 0.0))
            middle = hidden if index == self.config.voice_layer else middle
        return hidden, middle

    def _pool(self, hidden: Tensor, padded: Tensor, lengths: Tensor) -> Tensor:
        """unit(V [mean, std]) over an item's own frames (Snyder et al., x-vectors, 2018)."""
        hidden = hidden.masked_fill(padded, 0.0)
        count = lengths[:, None].clamp(min=1)
        mean = hidden.sum(1) / count
        variance = (hidden - mean[:, None]).masked_fill(padded, 0.0).square().sum(1) / count
        return F.normalize(self.voice(torch.cat([mean, (variance + 1e-6).sqrt()], -1)), dim=-1)


def character_nll(
    log_probs: Float[Tensor, "b k c"], lengths: Int[Tensor, " b"], texts: Sequence[str]
) -> Float[Tensor, " b"]:
    """CTC's -log p(text) / characters, of log-probabilities.

    Infinite, with gradient 0, where a text needs more frames than there are: its characters and a blank between any
    two equal neighbours. Texts pass through `normalize_text`; spaces count as characters.
    """
    targets = [encode(text) for text in texts]
    characters = torch.tensor([len(target) for target in targets])
    needed = torch.tensor([frames_needed(target) for target in targets])
    nll = ctc_nll(log_probs, lengths.cpu(), torch.cat(targets), characters)
    feasible = (needed <= lengths.cpu()).to(nll.device)
    return (nll / characters.to(nll.device)).masked_fill(~feasible, torch.inf)


def ctc_nll(
    log_probs: Float[Tensor, "b k c"],
    lengths: Int[Tensor, " b"],
    targets: Int[Tensor, "*targets"],
    target_lengths: Int[Tensor, " b"],
) -> Float[Tensor, " b"]:
    """PyTorch's CTC, -log p; zero where impossible. Lengths on the host spare a synchronisation.

    Targets: one after another, or [B, longest]. The gradient is right only for normalised log-probabilities.
    """
    return F.ctc_loss(
        log_probs.transpose(0, 1),
        targets.to(log_probs.device),
        lengths,
        target_lengths,
        reduction="none",
        zero_infinity=True,
    )


def encode(text: str) -> Int[Tensor, " characters"]:
    """The class of each character of a text, as `normalize_text` spells it."""
    return torch.tensor([ALPHABET.index(character) + 1 for character in normalize_text(text)])


def frames_needed(classes: Int[Tensor, " characters"]) -> int:
    """Frames that the shortest CTC alignment of these classes takes."""
    return len(classes) + int((classes[1:] == classes[:-1]).sum())


def greedy(log_probs: Float[Tensor, "b k c"], lengths: Int[Tensor, " b"]) -> list[str]:
    """The text of the best class of every frame: repeats merged, blanks dropped, outer spaces cut."""
    best = log_probs.argmax(-1).cpu()
    rows = (row[:frames].unique_consecutive() for row, frames in zip(best, lengths.tolist(), strict=True))
    return ["".join(ALPHABET[k - 1] for k in row.tolist() if k > 0).strip() for row in rows]


def load_recognizer(name: str | Path = "tiny", *, device: torch.device | str | None = None) -> Recognizer:
    """The recognizer "tiny" (bundled), or the one in a folder; frozen, float32, in eval mode."""
    from safetensors.torch import load_file

    folder = bundle(name) or Path(name)
    if not folder.is_dir():
        raise ValueError(f"unknown recognizer {str(name)!r}: expected 'tiny' or a folder with recognizer.json")
    for file_name in ("recognizer.json", "recognizer.safetensors"):
        if not (folder / file_name).is_file():
            raise FileNotFoundError(
                f"{folder / file_name}: expected a recognizer's config and weights, found none; train one with "
                f"recipes/train_recognizer.py --out {folder}, or reinstall the package if this is its assets"
            )
    config = json.loads((folder / "recognizer.json").read_text())
    if config["alphabet"] != ALPHABET:
        raise ValueError(f"{folder}: expected the alphabet {ALPHABET!r}, got {config['alphabet']!r}; retrain")
    recognizer = Recognizer(MelSpec(**config["mel_spec"]), Recognizer.Config(**config["arch"]))
    weights = load_file(folder / "recognizer.safetensors")
    recognizer.load_state_dict({key: value.float() for key, value in weights.items()})
    return recognizer.to(device).eval().requires_grad_(False)


def save_recognizer(recognizer: Recognizer, folder: Path, **card: Any) -> None:
    """Write `recognizer.json` (with `card` in it) and fp16 `recognizer.safetensors` to `folder`, each whole or not."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().half().cpu().contiguous() for key, value in recognizer.state_dict().items()}
    spec, arch = asdict(recognizer.mel_spec), asdict(recognizer.config)
    text = json.dumps({"alphabet": ALPHABET, "arch": arch, "mel_spec": spec, **card}, indent=1) + "\n"
    write_tensors(folder / "recognizer.safetensors", weights)
    write_whole(folder / "recognizer.json", lambda path: path.write_text(text, encoding="utf-8"))
