"""Train the bundled vocoder "tiny": a Vocos of 2.8 M parameters for 24 kHz, 100-band log mels.

Two phases, both as CUDA graphs where there is a GPU:
1. `--warmup_share` of the time: mels of seven resolutions only; large batches, cheap steps;
2. the rest: the same, plus Vocos's two discriminators (hinge loss, feature matching) at Vocos's weights.
A third of the mels is blurred or noisy, as generated mels are; the weights saved are a moving average.

Losses: Siuzdak, Vocos (2023); seven mel resolutions: Kumar et al., Descript Audio Codec (2023); periods: Kong et
al., HiFi-GAN (2020).

Leaves out: other sample rates, music, unseen speakers (three synthetic voices are all it hears), a validation curve.
Hardware: one H100, 30.8 adversarial updates a second. A CPU runs it, for a smoke test only.
Number to expect: printed at the end for held-out clips, and kept in vocoder.json: DistillMOS of the recording and of
recording -> mel -> vocoder for each voice (aim: at most 0.4 apart), and the mel distance between the two. 0.5 to 1.0
apart after 5,855 adversarial updates, 0.35 to 0.6 after 17,570, 0.2 to 0.3 after 38,603.
    PYTHONPATH=. python recipes/train_vocoder.py --data data/corpus --out rlhf_mel/assets --minutes 25

`--resume FOLDER` starts from the vocoder in FOLDER (and its discriminators.pt, if it is there); optimizers are fresh.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchaudio
from corpus_data import Average, Clock, Corpus, Crops, adamw, cosine, load_corpus, set_lr
from torch import Tensor, nn
from vocos.discriminators import MultiPeriodDiscriminator, MultiResolutionDiscriminator
from vocos.loss import DiscriminatorLoss, FeatureMatchingLoss, GeneratorLoss

from rlhf_mel.speech.audio import MelSpec, frames_to_samples, log_mel, resample
from rlhf_mel.vocoders.vocos import VocosVocoder, load, save

MEL_WEIGHT = 45.0
"""Of the mel loss, against 1 for the period discriminators' losses (Vocos)."""
RESOLUTION_WEIGHT = 0.1
"""Of the resolution discriminators' losses (Vocos)."""
MEL_RESOLUTIONS = ((2048, 160), (1024, 100), (512, 80), (256, 40), (128, 20), (64, 10), (32, 5))
"""(window in samples, bands) of the mel loss."""
MAX_GRADIENT_NORM = 500.0
"""Only against accidents: usual norms stay below it."""


class MelDistance(nn.Module):
    """Mean over resolutions of the L1 distance between log mels; hop = window / 4."""

    def __init__(self, sample_rate_hz: int) -> None:
        super().__init__()
        for index, (n_fft, n_mels) in enumerate(MEL_RESOLUTIONS):
            filters = torchaudio.functional.melscale_fbanks(
                n_fft // 2 + 1, 0.0, sample_rate_hz / 2, n_mels, sample_rate_hz
            )
            self.register_buffer(f"filters_{index}", filters)
            self.register_buffer(f"window_{index}", torch.hann_window(n_fft))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        both = torch.cat([real, fake])
        distances = []
        for index, (n_fft, _) in enumerate(MEL_RESOLUTIONS):
            window = self.get_buffer(f"window_{index}")
            spectrum = torch.stft(both, n_fft, n_fft // 4, n_fft, window, return_complex=True)
            mel = spectrum.abs().transpose(1, 2) @ self.get_buffer(f"filters_{index}")
            real_mel, fake_mel = mel.clamp(min=1e-5).log().chunk(2)
            distances.append((real_mel - fake_mel).abs().mean())
        return torch.stack(distances).mean()


class Discriminators(nn.Module):
    """Vocos's two families of discriminators and the losses of both players."""

    def __init__(self) -> None:
        super().__init__()
        self.families = nn.ModuleList(
            [MultiPeriodDiscriminator().discriminators, MultiResolutionDiscriminator().discriminators]
        )
        self.weights = (1.0, RESOLUTION_WEIGHT)
        self.hinge_real_fake = DiscriminatorLoss()
        self.hinge_fake = GeneratorLoss()
        self.matching = FeatureMatchingLoss()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(_channels_last)

    def _weighted(self) -> Iterator[tuple[float, list[nn.Module]]]:
        for weight, family in zip(self.weights, self.families, strict=True):
            yield weight, list(family.children())

    def discriminator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """max(0, 1 - D(real)) + max(0, 1 + D(fake)), mean over a family's members."""
        total = real.new_zeros(1)
        both = torch.cat([real, fake])
        for weight, members in self._weighted():
            scores = [member(both)[0].float().chunk(2) for member in members]
            loss = self.hinge_real_fake([score[0] for score in scores], [score[1] for score in scores])[0]
            total = total + weight * loss / len(scores)
        return total.squeeze()

    def generator_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """max(0, 1 - D(fake)) plus the L1 distance of all feature maps, mean over a family's members."""
        total = real.new_zeros(1)
        for weight, members in self._weighted():
            with torch.no_grad():
                real_maps = [member(real)[1] for member in members]
            scores, fake_maps = zip(*(member(fake) for member in members), strict=True)
            loss = self.hinge_fake([score.float() for score in scores])[0]
            loss = loss + self.matching(real_maps, list(fake_maps)).float()
            total = total + weight * loss / len(scores)
        return total.squeeze()


def _channels_last(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    # Tensor cores read channels last; without this cuDNN transposes every feature map, there and back.
    return (inputs[0].contiguous(memory_format=torch.channels_last),)


class Trainer:
    """The two kinds of step, as functions of fixed-shape tensors: no host synchronisation within."""

    def __init__(self, vocoder: VocosVocoder, discriminators: Discriminators, lr: float) -> None:
        self.vocoder = vocoder
        self.discriminators = discriminators
        device = next(vocoder.parameters()).device
        self.mel_distance = MelDistance(vocoder.sample_rate_hz).to(device)
        self.vocoder_optimizer = adamw(vocoder.parameters(), lr, (0.8, 0.99))
        self.discriminator_optimizer = adamw(discriminators.parameters(), lr, (0.8, 0.99))
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
        blur = torch.zeros(vocoder.mel_spec.n_mels, vocoder.mel_spec.n_mels, device=device)
        for offset, weight in ((-1, 0.25), (0, 0.5), (1, 0.25)):
            blur += weight * torch.diag(torch.ones(len(blur) - abs(offset), device=device), offset)
        self.blur = blur / blur.sum(0)

    def damaged_mel(self, real: Tensor, noise: Tensor, blur: Tensor) -> Tensor:
        """Mel of `real`, a share `blur` [B, 1, 1] of it smoothed over bands, plus `noise`."""
        mel = log_mel(real, self.vocoder.mel_spec)
        return mel.lerp(mel @ self.blur, blur) + noise

    def reconstruct(self, real: Tensor, noise: Tensor, blur: Tensor) -> Tensor:
        """One update on the mel distance alone; [distance]."""
        distance = self.mel_distance(real, self.vocoder(self.damaged_mel(real, noise, blur)))
        self._update(self.vocoder_optimizer, MEL_WEIGHT * distance)
        return distance.detach()[None]

    def compete(self, real: Tensor, noise: Tensor, blur: Tensor) -> Tensor:
        """One update of the discriminators, then of the vocoder; [distance, vocoder's, discriminators' loss]."""
        fake = self.vocoder(self.damaged_mel(real, noise, blur))
        self.discriminators.requires_grad_(True)
        with self.autocast:
            discriminator_loss = self.discriminators.discriminator_loss(real, fake.detach())
        self._update(self.discriminator_optimizer, discriminator_loss)
        self.discriminators.requires_grad_(False)
        with self.autocast:
            generator_loss = self.discriminators.generator_loss(real, fake)
        distance = self.mel_distance(real, fake)
        self._update(self.vocoder_optimizer, MEL_WEIGHT * distance + generator_loss)
        return torch.stack([distance, generator_loss, discriminator_loss]).detach()

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parameters = optimizer.param_groups[0]["params"]
        nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
        optimizer.step()


class Captured:
    """`step` as one CUDA graph over static inputs: a replay costs the host microseconds. Three warm-up updates."""

    def __init__(self, step: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        self.inputs = inputs
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = step(*inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for static, new in zip(self.inputs, inputs, strict=True):
            static.copy_(new)
        self.graph.replay()
        return self.output


def maybe_captured(step: Callable[..., Tensor], inputs: tuple[Tensor, ...], wanted: bool) -> Callable[..., Tensor]:
    """`Captured`, or on a CPU, or where capture fails (said aloud), the step itself."""
    if not wanted or inputs[0].device.type != "cuda":
        return step
    try:
        return Captured(step, inputs)
    except RuntimeError as error:
        torch.cuda.synchronize()
        print(f"CUDA graph capture failed, going on without: {error}", flush=True)
        return step


def draw(crops: Crops, batch: int, spec: MelSpec, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Crops at levels of -9 to +3 dB; for each item noise and blur of random strength, zero for two thirds."""
    device = crops.steps.device

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(batch, 1, 1, generator=generator, device=device)

    real = crops.draw(batch, generator) * 10 ** (uniform(-9, 3)[:, 0] / 20)
    damaged = uniform(0, 1) < 1 / 3
    shape = (batch, len(crops.steps) // spec.hop_length + 1, spec.n_mels)
    noise = torch.randn(shape, generator=generator, device=device) * uniform(0, 0.15) * damaged
    return real, noise, uniform(0, 0.7) * damaged


@torch.no_grad()
def evaluate(vocoder: VocosVocoder, corpus: Corpus, clips_per_voice: int = 8) -> dict[str, dict[str, float]]:
    """For each voice, over held-out clips: mel distance, and DistillMOS before and after where it is installed."""
    device = corpus.samples.device
    distance = MelDistance(corpus.sample_rate_hz).to(device)
    try:
        import distillmos

        judge = distillmos.ConvTransformerSQAModel().to(device).eval()
    except ImportError:
        print("distillmos is not installed: no MOS", flush=True)
        judge = None
    report = {}
    for voice in corpus.voice_names:
        rows = [row for row in corpus.rows(held_out=True) if corpus.voices[row] == voice][:clips_per_voice]
        scores: dict[str, list[float]] = {"mel_distance": [], "mos_recording": [], "mos_vocoded": []}
        for row in rows:
            clip = corpus.clip(row)[None]
            vocoded = vocoder(log_mel(clip, vocoder.mel_spec))
            clip = clip[:, : vocoded.shape[1]]
            scores["mel_distance"].append(distance(clip, vocoded).item())
            if judge is not None:
                for name, sound in (("mos_recording", clip), ("mos_vocoded", vocoded)):
                    scores[name].append(judge(resample(sound, corpus.sample_rate_hz, 16_000)).item())
        report[voice] = {name: round(sum(values) / len(values), 3) for name, values in scores.items() if values}
        print(f"held-out {voice} ({len(rows)} clips): {report[voice]}", flush=True)
    return report


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="corpus folder")
    parser.add_argument("--out", type=Path, required=True, help="where vocoder.json and .safetensors go")
    parser.add_argument("--minutes", type=float, default=25.0, help="wall-clock budget, reading the corpus included")
    parser.add_argument("--resume", type=Path, help="folder of an earlier run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dim", type=int, default=224)
    parser.add_argument("--num_layers", type=int, default=8)
    parser.add_argument("--lr", type=float, default=5e-4, help="rate of both players; twice that before")
    parser.add_argument("--warmup_share", type=float, default=0.15, help="share of the time without discriminators")
    parser.add_argument("--warmup_batch", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="crops an adversarial update")
    parser.add_argument("--crop_frames", type=int, default=33, help="mel frames of a crop; 33 are 8192 samples")
    parser.add_argument("--cuda_graph", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cudnn_benchmark", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--keep_discriminators", action="store_true", help="also write discriminators.pt (180 MB), for --resume"
    )
    parser.add_argument("--max_steps", type=int, help="of each phase; for a smoke test")
    return parser.parse_args()


class Run:
    """One training: what the two phases share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.clock = Clock(args.minutes)
        device = torch.device(args.device)
        torch.manual_seed(args.seed)  # for the initial weights; a recipe owns its process
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.corpus = load_corpus(args.data, device)
        print(f"{len(self.corpus)} clips, {self.corpus.duration_h:.2f} h, {self.clock.elapsed_s:.1f} s", flush=True)
        spec = MelSpec(sample_rate_hz=self.corpus.sample_rate_hz)
        crop_samples = frames_to_samples(args.crop_frames, spec)
        self.crops = Crops(self.corpus, self.corpus.rows(held_out=False), crop_samples)
        sizes = {"dim": args.dim, "intermediate_dim": 3 * args.dim, "num_layers": args.num_layers}
        vocoder = load(args.resume) if args.resume else VocosVocoder.trainable(spec, **sizes)
        discriminators = Discriminators()
        if args.resume and (weights := args.resume / "discriminators.pt").is_file():
            discriminators.load_state_dict(torch.load(weights, weights_only=True))
        self.vocoder = vocoder.train().requires_grad_(True).to(device)
        self.trainer = Trainer(self.vocoder, discriminators.to(device), args.lr)
        self.average = Average(self.vocoder)
        self.steps = {"reconstruct": 0, "compete": 0}

    def phase(self, name: str, batch: int, lr: float, until: float) -> None:
        """Repeat the trainer's step `name` until the share `until` of the budget is gone."""

        def inputs() -> tuple[Tensor, Tensor, Tensor]:
            return draw(self.crops, batch, self.vocoder.mel_spec, self.generator)

        step = maybe_captured(getattr(self.trainer, name), inputs(), self.args.cuda_graph)
        begin_s = logged_s = saved_s = self.clock.elapsed_s
        print(f"{name}: ready at {begin_s:.1f} s", flush=True)
        while (fraction := self.clock.fraction) < until and self.steps[name] != self.args.max_steps:
            set_lr(self.trainer.vocoder_optimizer, lr * cosine(fraction))
            set_lr(self.trainer.discriminator_optimizer, lr * cosine(fraction))
            losses = step(*inputs())
            self.average.update()
            self.steps[name] += 1
            if self.steps[name] % 50 == 0 and self.clock.elapsed_s - logged_s > 10:
                values = " ".join(f"{value:.3f}" for value in losses.tolist())  # waits for the device
                logged_s = self.clock.elapsed_s
                speed = self.steps[name] / (logged_s - begin_s)
                print(f"{logged_s:.0f} s, {name} {self.steps[name]} ({speed:.1f}/s): {values}", flush=True)
            if self.clock.elapsed_s - saved_s > 60:
                self.export()
                saved_s = self.clock.elapsed_s

    def export(self, **card: object) -> None:
        """Write the averaged weights."""
        self.average.swap()
        training = {"minutes": self.args.minutes, "seed": self.args.seed, "steps": self.steps}
        save(self.vocoder, self.args.out, training=training, **card)
        self.average.swap()

    def evaluate(self) -> dict[str, dict[str, float]]:
        """`evaluate` of the averaged weights."""
        self.average.swap()
        report = evaluate(self.vocoder, self.corpus)
        self.average.swap()
        return report


def main() -> None:
    args = parse_arguments()
    torch.backends.cudnn.benchmark = args.cudnn_benchmark
    torch.set_float32_matmul_precision("high")
    run = Run(args)
    run.phase("reconstruct", args.warmup_batch, 2 * args.lr, args.warmup_share)
    run.phase("compete", args.batch, args.lr, 1.0)
    run.export()
    if args.keep_discriminators:
        torch.save(run.trainer.discriminators.state_dict(), args.out / "discriminators.pt")
    torch.set_float32_matmul_precision("highest")
    run.export(held_out=run.evaluate())
    print(f"{run.steps}, {run.clock.elapsed_s:.0f} s in all, in {args.out}")


if __name__ == "__main__":
    main()
