"""RLHFConfig: its defaults are the demo, YAML under the command line, and what cannot be meant raises."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig

from rlhf_mel.training.arguments import lora_config, parse_arguments
from rlhf_mel.training.config import RLHFConfig, resolved, save_config

RECIPES = Path(__file__).parents[2] / "recipes"


def test_no_arguments_is_the_bundled_demo() -> None:
    config, model_config = parse_arguments([])
    assert (config.policy, config.vocoder, config.recognizer) == ("tiny", "tiny", "tiny")
    assert (config.train_prompts, config.eval_prompts, config.reward_models) == ("tiny", "tiny", ["mos"])
    assert config.report_to == [] and config.remove_unused_columns is False
    assert lora_config(model_config) is None


def test_the_demo_is_bundled_and_trains_all_weights_towards_mos_words_level_and_pitch() -> None:
    config, model_config = parse_arguments(["--config", str(RECIPES / "configs/demo.yaml")])
    assert (config.policy, config.algorithm, config.algorithm_options) == ("tiny", "draft", {"grad_steps": None})
    assert config.reward_models == ["mos", "intelligibility", "level", "prosody"] and lora_config(model_config) is None


def test_the_recipe_without_config_is_the_demo_and_flags_go_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    drlx = runpy.run_path(str(RECIPES / "drlx.py"))
    seen: list[tuple[RLHFConfig, ModelConfig]] = []

    def no_trainer(*, args: RLHFConfig, peft_config: object) -> None:
        seen.append((args, peft_config))  # type: ignore[arg-type]
        raise SystemExit

    monkeypatch.setitem(drlx["main"].__globals__, "RLHFTrainer", no_trainer)
    demo = yaml.safe_load((RECIPES / "configs/demo.yaml").read_text())
    with pytest.raises(SystemExit):
        drlx["main"](["--max_steps", "3"])
    args, peft_config = seen[0]
    assert (args.max_steps, args.sampling_steps) == (3, demo["sampling_steps"]) and peft_config is None
    assert args.algorithm_options == {"grad_steps": None}
    for flags, options in (
        (["--algorithm=refl"], {}),
        (["--algorithm", "draft", "--algorithm_kwargs", '{"grad_steps": 2}'], {"grad_steps": 2}),
    ):
        with pytest.raises(SystemExit):
            drlx["main"](flags)
        assert seen[-1][0].algorithm_options == options


def test_the_command_line_goes_over_yaml_goes_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nmax_steps: 7\nalgorithm_kwargs: {grad_steps: 3}\n")
    config, _ = parse_arguments(["--config", str(file), "--max_steps", "9", "--reward_models", "mos", "mos"])
    assert (config.learning_rate, config.max_steps, config.sampling_steps) == (1e-4, 9, 16)
    assert config.reward_models == ["mos", "mos"]
    assert config.algorithm_options == {"grad_steps": 3}


def test_algorithm_options_on_the_command_line_are_json() -> None:
    config, _ = parse_arguments(["--algorithm_kwargs", '{"grad_steps": 4}'])
    assert config.algorithm_options == {"grad_steps": 4}


@pytest.mark.parametrize("argv", [["--learning_rat", "1"], ["--learn", "1"]])
def test_an_unknown_flag_raises_and_suggests(argv: list[str]) -> None:
    with pytest.raises(ValueError, match=r"unknown option 'learn\w*'"):
        parse_arguments(argv)


def test_an_unknown_yaml_key_raises_and_suggests(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lerning_rate: 1.0\n")
    with pytest.raises(ValueError, match="unknown option 'lerning_rate', did you mean learning_rate"):
        parse_arguments(["--config", str(file)])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"algorithm": "grpoo"}, r"unknown algorithm 'grpoo': expected one of .*draft.*refl"),
        ({"algorithm_kwargs": {"grad_stepz": 2}}, r"unknown option 'grad_stepz' of algorithm 'draft': .*grad_steps"),
        ({"algorithm_kwargs": '{"grad_steps": 0}'}, "grad_steps"),
        ({"algorithm_kwargs": "grad_steps=2"}, "algorithm_kwargs must be a mapping"),
        ({"reward_models": []}, "reward_models is empty"),
        ({"reward_models": ["moss"]}, r"unknown reward 'moss': expected one of .*mos.*, did you mean mos"),
        ({"reward_weights": [1.0, 2.0]}, "expected 1 for .'mos'., got .1.0, 2.0."),
        ({"num_generations": 3}, "multiple of num_generations"),
        ({"num_generations": 2.5}, "num_generations must be a whole number"),
        ({"sampling_steps": 0}, "sampling_steps must be a whole number of at least 1, got 0"),
        ({"beta": "high"}, "beta must be a number"),
        ({"num_iterations": 0}, "num_iterations must be a whole number of at least 1, got 0"),
        ({"train_cfg_strength": -1.0}, "train_cfg_strength must be a number of at least 0"),
        ({"epsilon": 0.1}, "unknown option 'epsilon' of algorithm 'draft'"),
        ({"epsilon": 0.1, "algorithm_kwargs": {"epsilon": 0.2}}, r"\['epsilon'\] given twice"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is of language models: expected 0.0, got 0.1"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is of language models"),
        ({"accelerator_config": {"dispatch_batches": True}}, "expected dispatch_batches off"),
    ],
)
def test_what_cannot_be_meant_raises(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RLHFConfig(**fields)


def test_language_model_fields_of_model_config_raise() -> None:
    with pytest.raises(ValueError, match=r"\['model_name_or_path'\] have no effect.*--policy"):
        parse_arguments(["--model_name_or_path", "gpt2"])


def test_lora_is_trls_without_a_task_of_language_models() -> None:
    _, model_config = parse_arguments(["--use_peft", "--lora_r", "4"])
    lora = lora_config(model_config)
    assert lora is not None and lora.r == 4 and lora.lora_alpha == ModelConfig().lora_alpha
    assert lora.task_type is None
    _, model_config = parse_arguments(["--use_peft", "--lora_target_modules", "to_q"])
    one = lora_config(model_config)
    assert one is not None and one.target_modules == {"to_q"}


def test_the_saved_config_reproduces_the_run(tmp_path: Path) -> None:
    config, model_config = parse_arguments(
        ["--learning_rate", "3e-4", "--adam_beta2", "0.9", "--algorithm_kwargs", '{"grad_steps": 2}', "--use_peft"]
    )
    save_config(tmp_path / "config.yaml", config, lora_config(model_config))
    again, model_again = parse_arguments(["--config", str(tmp_path / "config.yaml")])
    assert resolved(again, lora_config(model_again)) == resolved(config, lora_config(model_config))
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["adam_beta2"] == 0.9 and written["use_peft"] is True
    assert not {"adam_beta1", "include_for_metrics"} & written.keys(), (
        "an inherited default says nothing and only makes the file longer"
    )


def test_a_compiled_run_is_saved_as_one() -> None:
    assert resolved(RLHFConfig(output_dir="unused", torch_compile=True))["torch_compile"] is True
    assert resolved(RLHFConfig(output_dir="unused"))["torch_compile"] is False


def test_options_of_rewards_are_of_rewards_that_are_named() -> None:
    config, _ = parse_arguments(["--output_dir", "unused", "--reward_kwargs", '{"mos": {"compression_eps": 0.001}}'])
    assert config.reward_kwargs == {"mos": {"compression_eps": 0.001}}
    with pytest.raises(ValueError, match=r"expected options of \['mos'\], got those of \['level'\]"):
        RLHFConfig(output_dir="unused", reward_kwargs={"level": {}})
    with pytest.raises(ValueError, match="expected a mapping a reward"):
        RLHFConfig(output_dir="unused", reward_kwargs={"mos": 3})
