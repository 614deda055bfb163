"""The console command `rlhf-mel`.

    rlhf-mel sample --text "Good morning." --reference me.wav --reference_text "What I say there." --out hello.wav
    rlhf-mel sample --prompts prompts.jsonl --out folder --policy F5TTS_v1_Base --steps 32 --seed 1 --device cuda
    rlhf-mel pairs --texts hard --n 8 --rank_by mos,cer --out runs/pairs
    rlhf-mel annotate runs/pairs --answers answers.sqlite --axes naturalness,similarity
    rlhf-mel doctor --config my.yaml --json checks.json
    rlhf-mel rewards

`sample` speaks one text or a list of prompts (prompt_files.py) with any policy: bundled, published, a file, a folder, a
hub id, or "package.module:function" that builds one (adapters/). Noise depends on seed and row alone, so the batch size
changes nothing but the time. `pairs` makes pairs of such samples, ranked or for people (samplers/pairs.py), whom
`annotate` gives a page to label them on (annotate/). `doctor` examines a run before it begins (doctor/checks.py).
`rewards` lists the rewards that a run can name, and their options.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float

from rlhf_mel import policies
from rlhf_mel.data.prompts import DURATION_RULES, PromptDataset, PromptOptions, load_prompts
from rlhf_mel.flow.noise import item_generator
from rlhf_mel.flow.policy import rollout
from rlhf_mel.pipeline import Sampling, vocode
from rlhf_mel.rewards.load import find_reward, known_rewards
from rlhf_mel.rewards.options import describe
from rlhf_mel.speech.audio import MelSpec
from rlhf_mel.vocoders import Vocoder, load_vocoder

# Before torch loads OpenMP: threads that wait for each other by spinning make a busy machine 15 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


VOCODERS = {"vocos": "charactr/vocos-mel-24khz", "bigvgan": "nvidia/bigvgan_v2_24khz_100band_256x"}
"""For each kind of mel, the vocoder that F5-TTS uses."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, 1 if the doctor found a fault, or 2 for input that cannot be used."""
    parser = build_parser()
    args, of_the_run = parser.parse_known_args(argv)
    if of_the_run and args.command != "doctor":
        parser.error(f"unrecognized arguments: {' '.join(of_the_run)}")
    args.of_the_run = of_the_run
    try:
        return args.run(args) or 0
    except (ValueError, OSError, ImportError) as error:
        print(f"rlhf-mel {args.command}: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of what it returns is the function that carries one out."""
    parser = argparse.ArgumentParser(prog="rlhf-mel", description="RLHF for generated mel spectrograms.")
    commands = parser.add_subparsers(dest="command", required=True)
    sample = commands.add_parser("sample", help="speak a text, or a list of prompts, in the voice of a reference clip")
    sample.set_defaults(run=run_sample)
    what = sample.add_argument_group("what to say")
    what.add_argument("--text", help="one text; needs --reference and --reference_text")
    what.add_argument("--reference", type=Path, help="clip of the voice, at most 12 s (longer: --prepare)")
    what.add_argument("--reference_text", help="what is said in the clip")
    what.add_argument("--duration_s", type=float, help="seconds to generate; default: the duration rule")
    what.add_argument("--prompts", type=Path, help="instead: .jsonl, .csv, or .lst of seed-tts or LibriSpeech-PC")
    what.add_argument("--prepare", action="store_true", help="shorten, trim and raise references as F5-TTS does")
    what.add_argument("--duration_rule", choices=DURATION_RULES, default="policy", help="where no duration is given")
    _add_sampling(sample)
    sample.add_argument("--out", type=Path, required=True, help="a .wav for --text, a folder for --prompts")
    _add_pairs(commands.add_parser("pairs", help="sample each prompt several times, and pair the samples"))
    _add_annotate(commands.add_parser("annotate", help="let people label pairs on a page, or export their answers"))
    doctor = commands.add_parser(
        "doctor",
        help="check policy, rewards and configuration before a run",
        description="Check policy, rewards and configuration before a run; exit code 1 if a check fails.",
        epilog="Everything else is of the run: --config FILE, and any field of RLHFConfig over it.",
        allow_abbrev=False,
    )
    doctor.set_defaults(run=run_doctor)
    doctor.add_argument("--json", type=Path, help="write what was measured to this file")
    rewards = commands.add_parser("rewards", help="list the rewards that --reward_models can name, and their options")
    rewards.set_defaults(run=run_rewards)
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    who = parser.add_argument_group("who says it")
    who.add_argument("--policy", default="tiny", help="name, file, folder, hub id or package.module:function")
    who.add_argument("--model", help="for a weight file of F5-TTS: the model it is, F5TTS_v1_Base for instance")
    who.add_argument("--vocab", type=Path, help="for a weight file: its vocab.txt, if not beside it")
    who.add_argument("--weights", type=Path, help="for a package.module:function: a folder policy/ that a run saved")
    who.add_argument("--vocoder", help="default: the bundled one for tiny, else F5-TTS's")
    how = parser.add_argument_group("how")
    how.add_argument("--steps", type=int, default=16, help="steps of the ODE solve (16)")
    how.add_argument("--cfg", type=float, default=2.0, help="classifier-free guidance (2)")
    how.add_argument("--sway", type=float, default=-1.0, help="sway of the time grid (-1)")
    how.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    how.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    how.add_argument("--batch_size", type=int, default=8)


def _add_pairs(pairs: argparse.ArgumentParser) -> None:
    pairs.set_defaults(run=run_pairs)
    what = pairs.add_argument_group("what to say")
    what.add_argument("--prompts", default="tiny", help="tiny (bundled), or a list as of sample")
    what.add_argument(
        "--texts", help="hard (bundled), or a file with a text a line: said in the prompts' voices in turn"
    )
    what.add_argument("--limit", type=int, help="the first so many prompts or texts")
    what.add_argument("--prepare", action="store_true", help="shorten, trim and raise references as F5-TTS does")
    what.add_argument("--duration_rule", choices=DURATION_RULES, default="policy", help="where no duration is given")
    _add_sampling(pairs)
    rank = pairs.add_argument_group("which samples make a pair")
    rank.add_argument("--n", type=int, default=4, help="samples of each prompt, with seeds from --seed on (4)")
    rank.add_argument("--rank_by", help="rewards and measures: mos,cer; without it the pairs are for people to label")
    rank.add_argument("--reward_weights", help="of what --rank_by names, 1,0.5; default: 1 each")
    rank.add_argument("--reward_kwargs", type=json.loads, help="options of rewards, as in a run: a JSON mapping")
    rank.add_argument("--choose", choices=("extremes", "all", "adjacent"), default="extremes", help="in order of rank")
    rank.add_argument("--min_margin", type=float, default=0.0, help="least difference of the scores, exclusive (0)")
    pairs.add_argument("--out", type=Path, required=True, help="a new folder for the data set")
    pairs.add_argument("--push_to_hub", metavar="REPO", help="upload it to this repository; without it nothing is")


def _add_annotate(annotate: argparse.ArgumentParser) -> None:
    annotate.set_defaults(run=run_annotate)
    annotate.add_argument(
        "pairs", help="folder, parquet file or hub id with prompt, audio_a, audio_b or chosen, rejected"
    )
    annotate.add_argument("--split", default="train", help="of the pairs (train)")
    annotate.add_argument("--columns", help="our names to theirs: prompt=text,audio_a=first,audio_b=second")
    annotate.add_argument("--answers", type=Path, required=True, help="SQLite file; answers there are gone on from")
    asked = annotate.add_argument_group("what is asked, settled by the first start")
    asked.add_argument("--axes", help="questions about each pair: naturalness,similarity; default: overall")
    asked.add_argument("--checks", type=float, help="attention checks for each pair (0.1)")
    asked.add_argument("--seed", type=int, help="of orders and sides (0)")
    page = annotate.add_argument_group("the page")
    page.add_argument("--host", default="127.0.0.1", help="beyond localhost a token is needed, which is printed")
    page.add_argument("--port", type=int, default=7860)
    instead = annotate.add_argument_group("instead of the page")
    instead.add_argument("--report", action="store_true", help="print progress, agreement and attention checks")
    instead.add_argument("--export", type=Path, metavar="FOLDER", help="write the answers as a data set of preferences")
    instead.add_argument(
        "--drop_failed", type=float, metavar="SHARE", help="leave out who failed more checks than that"
    )
    instead.add_argument("--push_to_hub", metavar="REPO", help="upload what --export wrote; without it nothing is")


def run_pairs(args: argparse.Namespace) -> None:
    """Sample, rank, write a data set; print how many pairs there are, and what was left out."""
    from rlhf_mel.samplers.judges import ranking
    from rlhf_mel.samplers.pairs import PairMaker, PairOptions, check_folder, push_dataset, write_pairs

    check_folder(args.out)
    chosen = {name: getattr(args, name) for name in ("n", "choose", "min_margin", "seed", "batch_size")}
    options = PairOptions(**chosen)
    policy = _load_policy(args)
    vocoder = _load_vocoder(args, policy.mel_spec)
    prompts = _prompts_of_pairs(args, policy)
    rewards = None
    if args.rank_by:
        weights = [float(weight) for weight in _listed(args.reward_weights)] or None
        where: Any = dict(mel_spec=policy.mel_spec, device=args.device)
        rewards = ranking(_listed(args.rank_by), weights, args.reward_kwargs, **where)
    sampling = Sampling(steps=args.steps, cfg_strength=args.cfg, sway_sampling_coef=args.sway)
    maker = PairMaker(policy, vocoder, rewards, options, sampling, device=args.device)
    rows = maker.rows(prompts, shown_as="samples")
    write_pairs(rows, args.out, ranked=rewards is not None, about=_about_pairs(args))
    print(f"{args.out}: {maker.counts.pop('pairs')} pairs of {len(prompts)} prompts, {args.n} samples of each")
    for reason, count in sorted(maker.counts.items()):
        print(f"  left out: {count} {reason}")
    if args.push_to_hub:
        print(push_dataset(args.out, args.push_to_hub))


def _prompts_of_pairs(args: argparse.Namespace, policy: Any) -> PromptDataset:
    from rlhf_mel.samplers.pairs import HARD_TEXTS, read_texts, with_texts

    options = PromptOptions(prepare_references=args.prepare, duration_rule=args.duration_rule)
    prompts = load_prompts(args.prompts, split="train", mel_spec=policy.mel_spec, options=options)
    if args.texts:
        prompts = with_texts(prompts, read_texts(HARD_TEXTS if args.texts == "hard" else args.texts))
    if args.limit is not None:
        prompts = prompts.head(args.limit)
    if policy.tokenizer is not None:
        prompts.check_texts(policy.tokenizer)
    return prompts


def _about_pairs(args: argparse.Namespace) -> str:
    """The settings that make the same clips again, for the card."""
    names = ("policy", "vocoder", "prompts", "texts", "steps", "cfg", "sway", "seed", "n", "choose", "rank_by")
    said = ", ".join(f"{name} {value}" for name in names if (value := getattr(args, name)) is not None)
    return f"Samples of one policy by `rlhf-mel pairs`: {said}."


def run_annotate(args: argparse.Namespace) -> None:
    """Serve the labelling page, or report or export what was labelled."""
    from rlhf_mel.annotate.agreement import report
    from rlhf_mel.annotate.export import export
    from rlhf_mel.annotate.labelling import Labelling
    from rlhf_mel.annotate.store import Answers
    from rlhf_mel.annotate.tasks import load_pairs
    from rlhf_mel.samplers.pairs import push_dataset

    if args.export is None and (args.push_to_hub or args.drop_failed is not None):
        raise ValueError("--push_to_hub, --drop_failed: expected --export FOLDER with it, got none")
    pairs = load_pairs(args.pairs, split=args.split, columns=_mapping(args.columns))
    for note in pairs.notes():
        print(f"{pairs.name}: {note}", file=sys.stderr)
    answers = Answers(args.answers)
    given = {"axes": _listed(args.axes) or None, "check_share": args.checks, "seed": args.seed}
    settings = answers.settings() | {name: value for name, value in given.items() if value is not None}
    labelling = Labelling(pairs, answers, **settings)
    if args.report or args.export:
        print(report(labelling))
    if args.export:
        print("\n".join(export(labelling, args.export, drop_failed=args.drop_failed)))
        if args.push_to_hub:
            print(push_dataset(args.export, args.push_to_hub))
    elif not args.report:
        from rlhf_mel.annotate.server import serve

        serve(labelling, host=args.host, port=args.port)


def _listed(names: str | None) -> list[str]:
    """Names between commas; none of None."""
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _mapping(pairs: str | None) -> dict[str, str]:
    """{"ours": "theirs"} of "ours=theirs,..."."""
    parts = [pair.partition("=") for pair in _listed(pairs)]
    if any(not ours or not theirs for ours, _, theirs in parts):
        raise ValueError(f"--columns: expected ours=theirs,ours=theirs, got {pairs!r}")
    return {ours: theirs for ours, _, theirs in parts}


def run_rewards(args: argparse.Namespace) -> None:
    """Print each reward of reward_models/, and its options with their defaults: what --reward_kwargs takes."""
    for name in known_rewards():
        reward = find_reward(name)
        gradient = "with a gradient" if reward.differentiable else "without a gradient"
        print(f"{name}: {(inspect.getdoc(reward) or '').splitlines()[0]} Hears the {reward.domain}, {gradient}.")
        for option in describe(reward):
            default = "" if option.default is inspect.Parameter.empty else f" = {option.default!r}"
            print(f"    {option.name}{default}\n        {option.meaning}")
    print("""Options of a run: --reward_kwargs '{"NAME": {"OPTION": VALUE}}', in YAML a mapping.""")


def run_doctor(args: argparse.Namespace) -> int:
    """Examine the run that the remaining arguments describe; 1 if a check failed, else 0."""
    from rlhf_mel.doctor.checks import doctor
    from rlhf_mel.training.arguments import lora_config, parse_arguments

    config, model_config = parse_arguments(args.of_the_run)
    if config.device.type == "cpu":  # as recipes/drlx.py, so that the seconds are the run's
        torch.set_num_threads(config.cpu_threads or min(os.cpu_count() or 1, 8))
    return doctor(config, lora_config(model_config), args.json)


def run_sample(args: argparse.Namespace) -> None:
    """Speak and write wav files; a bar on stderr, a line for each file on stdout."""
    from tqdm import tqdm

    _check_request(args)
    policy = _load_policy(args)
    vocoder = _load_vocoder(args, policy.mel_spec)
    prompts = _load_prompts(args, policy.mel_spec)
    files = [args.out] if args.text is not None else _file_names(args.out, prompts)
    with tqdm(total=len(prompts), unit="clip", disable=len(prompts) == 1) as bar:
        for file, waveform in zip(files, speak(args, policy, vocoder, prompts), strict=True):
            _write_wav(file, waveform, vocoder.sample_rate_hz)
            bar.update()
            bar.write(f"{file}  {len(waveform) / vocoder.sample_rate_hz:.2f} s", file=sys.stdout)


def speak(
    args: argparse.Namespace, policy: Any, vocoder: Vocoder, prompts: PromptDataset
) -> Iterator[Float[torch.Tensor, " _"]]:
    """Waveforms of all prompts, in their order."""
    for first in range(0, len(prompts), args.batch_size):
        rows = range(first, min(first + args.batch_size, len(prompts)))
        said = rollout(
            policy,
            prompts.collate([prompts[row] for row in rows]).to(args.device),
            steps=args.steps,
            cfg_strength=args.cfg,
            sway_sampling_coef=args.sway,
            grad_steps=0,
            generator=[item_generator(args.seed, row) for row in rows],
        )
        with torch.no_grad():
            audio = vocode(vocoder, said)
        for waveform, samples in zip(audio.waveform.cpu(), audio.lengths_samples.tolist(), strict=True):
            yield waveform[:samples]


def _check_request(args: argparse.Namespace) -> None:
    if (args.text is None) == (args.prompts is None):
        raise ValueError("expected either --text or --prompts, got both or none")
    if args.text is not None and (args.reference is None or args.reference_text is None):
        raise ValueError("--text: expected --reference and --reference_text with it, got one or none of them")
    if args.text is not None and args.out.suffix.lower() != ".wav":
        raise ValueError(f"--out: expected a .wav file for --text, got {args.out}")
    if args.steps < 1 or args.batch_size < 1:
        raise ValueError(f"--steps, --batch_size: expected at least 1, got {args.steps}, {args.batch_size}")


def _load_policy(args: argparse.Namespace) -> Any:
    options = {"model": args.model, "vocab": args.vocab, "weights": args.weights}
    return policies.load(args.policy, **options, device=args.device)


def _load_vocoder(args: argparse.Namespace, mel_spec: MelSpec) -> Vocoder:
    name = args.vocoder or ("tiny" if args.policy == "tiny" else VOCODERS[mel_spec.kind])
    vocoder = load_vocoder(name, device=args.device)
    if vocoder.mel_spec != mel_spec:
        raise ValueError(
            f"--vocoder {name}: expected mels as the policy makes them, {mel_spec}, got {vocoder.mel_spec}"
        )
    return vocoder


def _load_prompts(args: argparse.Namespace, mel_spec: MelSpec) -> PromptDataset:
    options = PromptOptions(prepare_references=args.prepare, duration_rule=args.duration_rule)
    if args.prompts is not None:
        return load_prompts(args.prompts, split="heldout", mel_spec=mel_spec, options=options)
    row = {"text": args.text, "reference_audio": str(args.reference), "reference_text": args.reference_text}
    if args.duration_s is not None:
        row["duration_s"] = args.duration_s
    return PromptDataset([row], name="--text", mel_spec=mel_spec, options=options)


def _file_names(folder: Path, prompts: PromptDataset) -> list[Path]:
    """A row's id, where every row has one of its own that can be a file name; else its number."""
    ids = [str(row.get("id") or "") for row in prompts.rows]
    usable = len(set(ids)) == len(ids) and all(name and name == Path(name).name for name in ids)
    return [folder / f"{name}.wav" for name in (ids if usable else (f"{row:05d}" for row in range(len(ids))))]


def _write_wav(path: Path, waveform: torch.Tensor, sample_rate_hz: int) -> None:
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, waveform.clamp(-1, 1).numpy(), sample_rate_hz)


if __name__ == "__main__":
    raise SystemExit(main())
