"""Recipes and the command line: every value is checked, whatever is given is a run or one clear error."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from charformer_training import evaluate_cli
from charformer_training.arguments import (
    CONFIG_TYPES,
    Arguments,
    AuxiliaryLossTrainingArguments,
    DataArguments,
    EvaluateArguments,
    ModelArguments,
    RunArguments,
)
from charformer_training.pretrained import load_language_model, read_config
from charformer_training.recipes import field_types, parse_arguments
from charformer_training.strict_yaml import read_yaml, write_yaml
from charformer_training.train import build_model, main
from modeling_charformer import CharformerConfig, CharformerForCausalLM
from modeling_charformer.configuration_charformer import OWN_FIELDS
from tests.helpers import QUICKSTART


BASE: dict[str, Any] = {"data_path": "text.txt", "output_dir": "out", "max_steps": 5}


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a recipe, and returns its path."""

    def write(text: str | bytes | None = None, **fields: Any) -> str:
        path = tmp_path / "recipe.yaml"
        content = yaml.safe_dump(BASE | fields) if text is None else text
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def refused(words: list[str]) -> str:
    """The error, which is one line."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        parse_arguments(words)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_field_of_the_configuration_is_a_field_of_recipes_and_the_command_line(recipe):
    trainers = AuxiliaryLossTrainingArguments.__dataclass_fields__  # use_cache is one of theirs
    own = [name for name in OWN_FIELDS if name not in trainers]
    assert list(CONFIG_TYPES) == own and set(own) < set(field_types())
    assert {item for item in ModelArguments.__dataclass_fields__} == {*own, "model_name_or_path"}
    assert all(ModelArguments.__dataclass_fields__[name].metadata["help"] for name in own)
    changed = {
        "tie_word_embeddings": True,
        "layer_norm_eps": 0.001,
        "classifier_layers": [1],
        "eos_token_id": 10,
        "pad_token_id": 3,
        "classifier_weight": 0.5,
    }
    words = [word for name, value in changed.items() for word in (f"--{name}", str(value).strip("[]"))]
    for recipe_fields, further in ((changed, []), ({}, words)):
        config = CharformerConfig(**parse_arguments([recipe(**recipe_fields), *further]).model.config_fields())
        assert {name: getattr(config, name) for name in changed} == changed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"overwrite_output_dir": 2}, "overwrite_output_dir is 2; it must be true or false"),
        ({"max_steps": True}, "max_steps is True; it must be a whole number"),
        ({"max_steps": 3.0}, "max_steps is 3.0; it must be a whole number: 3 without a point"),
        ({"max_steps": 1.0e3}, "max_steps is 1000.0; it must be a whole number: 1000 without a point"),
        ({"max_steps": "5"}, "max_steps is '5'; it must be a whole number"),
        (
            {"intermediate_layers": [1.5]},
            "intermediate_layers is [1.5]; it must be text or a list of whole numbers or null",
        ),
        ({"output_dir": ["a"]}, "output_dir is ['a']; it must be text or null"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"data_path": 5}, "data_path is 5; it must be text or null"),
        ({"data_path": None}, "give one of data_path and dataset_name"),
        ({"data_path": ""}, "data_path is empty"),
        ({"sample_prompt": None}, "sample_prompt is None; it must be text"),
        ({"seed": None}, "seed is None; it must be a whole number"),
        ({"seed": [1]}, "seed is [1]; it must be a whole number"),
        ({"train_share": [0.9]}, "train_share is [0.9]; it must be a number"),
        ({"document_separator": 7}, "document_separator is 7; it must be text"),
        ({"eval_strategy": False}, "eval_strategy is False; it must be one of ['no', 'steps', 'epoch']"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type is 'cosin'; it must be one of ['linear'"),
        ({"target_weights": ["a"]}, "target_weights is ['a']; it must be a list of numbers or null"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a number"),
        ({"hub_token": ["SECRET"]}, "hub_token is (hidden); it must be text or null"),
        ({"log_level": "loud"}, "log_level is 'loud'; it must be one of ['detail', 'debug', 'info'"),
        ({"pad_token_id": 256}, "pad_token_id is 256; it must be null or from 0 to below vocab_size, 256"),
        ({"eos_token_id": [1, -3]}, "eos_token_id is [1, -3]; it must be null or from 0 to below vocab_size, 256"),
        ({"num_target": 3}, "there is no field 'num_target'; meant num_targets?"),
        ({"do_train": False}, "do_train is false; it must be true or left out: charformer-train trains"),
        ({"do_eval": False}, "do_eval is false; it must be true or left out: a run ends with an evaluation"),
        ({"eval_steps": 5}, "eval_steps is 5; it has an effect only with eval_strategy 'steps'"),
        ({"hub_model_id": "a/b"}, "hub_model_id is 'a/b'; it has an effect only with push_to_hub true"),
        ({"dataset_split": "test"}, "dataset_split is 'test'; it has an effect only with dataset_name"),
        ({"warmup_steps": 6}, "warmup_steps is 6, and max_steps=5 ends before the learning rate is reached; give 5"),
    ],
    ids=str,
)
def test_recipe_values_are_checked_for_their_type(recipe, fields, message):
    found = refused([recipe(**fields)])
    assert message in found and "SECRET" not in found


def test_yaml_numbers_without_a_point_and_words_for_choices_are_taken_as_meant(recipe):
    text = "data_path: a\noutput_dir: b\nmax_steps: 5\nlearning_rate: 1e-3\neval_strategy: 'no'\nterm_weights: {layer_1: 2e-1}\n"
    settings = parse_arguments([recipe(text)])
    assert settings.training.learning_rate == 0.001 and settings.training.eval_strategy == "no"
    assert settings.model.config_fields()["term_weights"] == {"layer_1": 0.2}
    written = {"output_dir": "1e3", "learning_rate": 1e-5, "run_name": "12:30", "seed": 7}
    assert read_yaml(write_yaml(written), "recipe") == written  # text that looks like a number stays text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", "not valid YAML in line 2, column 1: 'seed' is given twice"),
        ("term: {a: 1, a: 2}\n", "'a' is given twice"),
        ("a: &x [1]\nb: [*x, *x]\n", "an alias (*name) is not accepted"),
        ("hub_token: 'SECRET\n", "not valid YAML in line 2"),
        ("x: " + "[" * 5000, "nested too deep"),
        ("x: 2024-99-99\n", "a value cannot be read"),
        ("seed: 010\n", "line 1, column 7: a whole number must be decimal and not begin with 0"),
        ("seed: 12:30\n", "a whole number must be decimal"),
        ("seed: 0x10\n", "a whole number must be decimal"),
        ("learning_rate: 1:30.5\n", "line 1, column 16: a number must be decimal"),
        ("<<: {seed: 1}\n", "a merge (<<) is not accepted; write its fields out"),
        ("x: !!python/object:os.system y\n", "could not determine a constructor"),
        (b"sample_prompt: caf\xe9\n", "is not text in UTF-8 (byte 18)"),
        ("max_steps: 3\0\n", "not valid YAML"),
        ("- max_steps\n", "must hold 'field: value' lines"),
        ("", "must hold 'field: value' lines"),
        ("[1]: 2\n", "not valid YAML"),
        ("1: 2\n", "there is no field 1"),
        ("x: y" * 400_000, "1,000,000 or fewer"),
    ],
)
def test_text_that_is_no_recipe_is_refused(recipe, text, message):
    found = refused([recipe(text)])
    assert message in found and "SECRET" not in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gradient_accumulation_steps 0", "gradient_accumulation_steps is 0; it must be 1 or more"),
        ("--gradient_accumulation_steps -1", "gradient_accumulation_steps is -1; it must be 1 or more"),
        ("--save_steps -1", "save_steps is -1.0; it must be a whole number of 1 or more"),
        ("--save_steps 0", "save_steps is 0.0; it must be a whole number of 1 or more"),
        ("--save_steps 2.5", "save_steps is 2.5; it must be a whole number of 1 or more"),
        ("--save_total_limit 0", "save_total_limit is 0; it must be 1 or more"),
        ("--max_grad_norm nan", "max_grad_norm is nan; it must be a finite number, 0 or more"),
        ("--learning_rate inf", "learning_rate is inf; it must be a finite number, 0 or more"),
        ("--weight_decay -1", "weight_decay is -1.0; it must be 0 or more"),
        ("--adam_beta1 1", "adam_beta1 is 1.0; it must be from 0 to below 1"),
        ("--eval_delay nan", "eval_delay is nan; it must be a finite number, 0 or more"),
        ("--dataloader_num_workers -2", "dataloader_num_workers is -2; it must be from 0 to "),
        ("--warmup_steps 1.5", "warmup_steps is 1.5; it must be a whole number of 0 or more"),
        ("--seed -1", "seed is -1; it must be from 0"),
        ("--max_steps 3.0", "max_steps is '3.0'; it must be a whole number"),
        ("--max_steps -1", "max_steps is -1; give the number of optimizer steps"),
        ("--max_eval_bytes -5", "max_eval_bytes is -5"),
        ("--train_share 2", "train_share is 2.0; it must be above 0 and below 1"),
        ("--train_share nan", "train_share is nan"),
        ("--sample_length -1", "sample_length is -1; it must be 0 or more"),
        ("--dataloader_drop_last true", "dataloader_drop_last is true; it must be false"),
        ("--label_names x", "label_names is ['x']; it must be left out"),
        ("--hidden_size 1000000000", "GB of memory here"),
        ("--num_hidden_layers 10000000", "num_hidden_layers is 10,000,000; it must be 2,000 or fewer"),
        ("--num_targets 1000000000", "GB of memory here"),
        ("--num_targets 0", "num_targets is 0; it must be a whole number of 1 or more"),
        ("--vocab_size 100", "vocab_size is 100; text is bytes"),
        ("--data_path=", "data_path is empty"),
        ("--dataset_name=", "dataset_name is empty"),
        ("--model_name_or_path=", "model_name_or_path is empty"),
        ("--metric_for_best_model eval_loss_other", "it must be one of eval_loss,"),
        ("--report_to nonsense", "report_to is 'nonsense'"),
        ("--metric_for_best_model f1", "metric_for_best_model is 'f1'; it must be one of eval_loss,"),
        (
            "--metric_for_best_model eval_bpc --greater_is_better true",
            "greater_is_better is true; it must be left out",
        ),
        ("--lr_scheduler_kwargs {", "lr_scheduler_kwargs is '{'; it must be a mapping in JSON"),
        ("--lr_scheduler_type cosine_with_min_lr", "lr_scheduler_type 'cosine_with_min_lr' does not accept"),
        ('--lr_scheduler_kwargs {"power":2}', "lr_scheduler_kwargs is {'power': 2}, which lr_scheduler_type 'linear'"),
        ("--optim adamw_bnb_8bit", "optim is 'adamw_bnb_8bit'"),
        ("--dataloader_persistent_workers true", "it needs dataloader_num_workers of 1 or more"),
        ("--ignore_data_skip true", "ignore_data_skip is true; it must be false"),
        ("--do_predict", "do_predict is true; it must be left out: charformer-evaluate measures a text"),
        ("--num_train_epochs 5", "num_train_epochs is 5.0; it must be left out: windows are drawn at random"),
        ("--eval_strategy epoch", "eval_strategy is 'epoch'; it must be 'steps' or 'no'"),
        ("--include_for_metrics loss", "include_for_metrics is ['loss']; it must be left out: it is for metrics"),
        ("--bf16_full_eval", "bf16_full_eval is true; it must be left out: evaluations during training"),
        ("--use_cpu --fp16", "fp16 is true; on a CPU it would have no effect"),
        ("--lr_scheduler_type constant", "lr_scheduler_type is 'constant', which has no warm-up; warmup_steps is 100"),
        ("--load_best_model_at_end --eval_strategy no", "it needs eval_strategy 'steps', and save_strategy"),
        ("--load_best_model_at_end --save_steps 1000", "save_steps is 1000; it must be eval_steps, 500"),
        ("--load_best_model_at_end --eval_delay 1001", "the first evaluation would be at step 1500"),
        ("--save_strategy best --metric_for_best_model eval_bpb --eval_steps 2e3", "max_steps=1000 ends before it"),
        ("--train_sampling_strategy group_by_length", "train_sampling_strategy is 'group_by_length'; leave it out"),
        (f"--output_dir {QUICKSTART}", "a file; give a folder"),
        ("--torch_compile_mode fast", "torch_compile_mode is 'fast'; it must be one of"),
        ("--per_device_train_batch_size 1000000000", "a step needs more than"),
        ("--seed 1 --learning_rate 1 --seed 2", "seed is given twice; give it once"),
        ("--hub-token SECRET --hub_token=SECRET", "hub_token is given twice; give it once"),
        ("--hub_tokn SECRET", "there is no option --hub_tokn; meant --hub_token?"),
        ("--hub-tokn=SECRET", "there is no option --hub-tokn; meant --hub_token?"),
        ("--seed 1 other.yaml", "a word belongs to no option (after --seed); the recipe stands first"),
        ("--hub_token a SECRET", "a word belongs to no option (after --hub_token)"),
    ],
)
def test_values_on_the_command_line_are_checked_for_their_range(words, message):
    found = refused([QUICKSTART, *words.split()])
    assert message in found and "SECRET" not in found


@pytest.mark.parametrize(
    "fields",
    [
        {"eval_strategy": "no", "eval_steps": 5, "save_strategy": "no", "save_steps": 9},  # what is off is off
        {"push_to_hub": False, "hub_model_id": "a/b"},
        {"warmup_steps": 5, "do_train": True, "do_predict": False, "dataset_split": "train", "num_train_epochs": 3.0},
        {"lr_scheduler_type": "constant", "warmup_steps": 0, "include_num_input_tokens_seen": "all"},
        {"eval_strategy": "steps", "eval_steps": 0.4, "save_steps": 0.4, "load_best_model_at_end": True},
    ],
    ids=str,
)
def test_fields_that_do_what_they_say_are_accepted(recipe, fields):
    settings = parse_arguments([recipe(**fields)])
    assert all(getattr(settings.training, name, value) == value for name, value in fields.items())


def weights_field() -> str:
    """The field of weights by the names of terms."""
    (name,) = [name for name, kind in CONFIG_TYPES.items() if "dict" in str(kind)]
    return name


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{a: [", "is not valid YAML in line 1"),
        ("[1]", "is [1]; it must be a mapping or null"),
        ("{next_char: .nan}", "next_char"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]", "an alias (*name) is not accepted"),
        ("{no_term: 1}", "no_term"),
    ],
)
def test_weights_of_terms_are_checked(value, message):
    name = weights_field()
    found = refused([QUICKSTART, f"--{name}", value])
    assert name in found and message in found


def test_weights_that_are_all_0_are_refused():
    changes = ["--num_targets", "1", "--intermediate_layers", "none", f"--{weights_field()}", "{next_char: 0}"]
    assert "the weights of all loss terms are 0 (next_char" in refused([QUICKSTART, *changes])
    parse_arguments([QUICKSTART, *changes[:-2]])  # the control


def test_either_spelling_of_an_option_replaces_the_recipes_text(recipe):
    data = parse_arguments([recipe(), "--dataset-name", "some/set"]).data
    assert data.data_path is None and data.dataset_name == "some/set"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([""], "the recipe is empty; give a path"),
        ([" "], "the recipe is empty; give a path"),
        (["."], ". is not a recipe, but a folder, a device or a pipe"),
        (["/dev/null"], "/dev/null is not a recipe, but a folder, a device or a pipe"),
        (["x" * 300], "the recipe is 'xxx"),
        (["x\0y"], "a path holds no zero byte"),
        ([QUICKSTART, "--output_dir", "x" * 300], "output_dir is 'xxx"),
        ([QUICKSTART, "-x"], "options begin with two"),
    ],
)
def test_names_that_no_recipe_or_folder_can_have_are_refused(words, message):
    assert message in refused(words)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers is 10,000,000; it must be 2,000 or fewer"),
        ({"hidden_size": 10**9, "num_attention_heads": 1}, "GB of memory here"),
        ({"num_targets": 10**9}, "GB of memory here"),
        ({"vocab_size": 10**12}, "GB of memory here"),
        ({"max_position_embeddings": 10**12}, "GB of memory here"),
    ],
    ids=str,
)
def test_a_downloaded_configuration_of_any_size_is_refused_before_a_model_is_built(
    tmp_path, monkeypatch, fields, message
):
    config = {**CharformerConfig().to_dict(), "architectures": ["CharformerForCausalLM"], **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(CharformerForCausalLM, "__init__", lambda *_, **__: pytest.fail("a model was built"))
    for load in (read_config, load_language_model):
        with pytest.raises(ValueError, match=message):
            load(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        build_model(ModelArguments(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize("name", ["output", "plots", "state_file"])
@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/proc/a.png", "the folder of /proc/a.png cannot be written to"),
        ("/dev/full", "is a device or a pipe"),
        (f"{'x' * 300}.png", "304 bytes long"),
        (" ", "is empty; give a path"),
    ],
)
def test_results_that_cannot_be_written_are_refused_before_the_evaluation(name, path, message):
    if path.startswith("/proc") and not Path("/proc").is_dir():
        pytest.skip("no such file system here")
    with pytest.raises((OSError, ValueError), match=message) as found:
        evaluate_cli.check_places(EvaluateArguments(**{name: path}))
    assert str(found.value).startswith(name)


@pytest.mark.parametrize(
    "settings", [{"save_steps": -1}, {"max_grad_norm": float("nan")}, {"adam_beta2": 2.0}], ids=str
)
def test_a_trainers_settings_are_checked_without_a_recipe_too(tmp_path, settings):
    (name,) = settings
    with pytest.raises(ValueError, match=f"{name} is .*; it must be"):
        AuxiliaryLossTrainingArguments(str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be 1 or more"),
        ({"stride": [16, -1]}, "stride is -1"),
        ({"max_bytes": 1}, "max_bytes is 1"),
        ({"split": "tail"}, "split is 'tail'"),
        ({"train_share": 1.0}, "train_share is 1.0"),
        ({"output": ""}, "output is empty"),
    ],
    ids=str,
)
def test_settings_of_an_evaluation_are_checked(settings, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        EvaluateArguments(**settings)


def test_names_and_texts_that_are_not_utf8_are_shown_or_refused():
    assert DataArguments(data_path="/data/caf\udce9\x1b[2J.txt").source == r"caf\xe9\x1b[2J.txt"
    assert DataArguments(data_path=".").source == Path.cwd().name
    with pytest.raises(ValueError, match="sample_prompt is .*; it must be text in UTF-8"):
        RunArguments(sample_prompt="\udcff")


def test_help_begins_with_an_example_and_the_recipes_and_names_every_field(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    headings = (
        "usage:",
        "quickstart.yaml --data_path",
        "Recipes in training/configs:",
        "Data:",
        "Model:",
        "Losses:",
        "Training:",
    )
    assert [text.index(heading) for heading in headings] == sorted(text.index(heading) for heading in headings)
    assert all(f"  --{name}" in text for name in field_types())
    losses = text[text.index("Losses:") : text.index("Training:")]
    assert "--target_weights" in losses and "--intermediate_size" not in losses and "--hidden_size" not in losses


def test_without_arguments_the_program_says_how_to_begin(capsys):
    assert main([]) == 2
    assert "charformer-train training/configs/quickstart.yaml" in capsys.readouterr().err


# A run, or one clear error: never a traceback, never a hang.
fuzzed = settings(
    max_examples=120, deadline=5000, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
NAMES = sorted(
    set(field_types()) - {"output_dir", "logging_dir", "parallelism_config", "deepspeed", "full_determinism"}
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 70)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["none", "all", "no", "steps", "{", "{}", "1e-3", "1.0e+3", "../x", "eval_loss", "\x1b[2J"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def a_run_or_a_clear_error(words: list[str]) -> None:
    try:
        arguments = parse_arguments(words)
    except (ValueError, FileNotFoundError) as error:
        assert str(error).strip() and "\x1b" not in str(error) and "\n" not in str(error)
    else:
        assert isinstance(arguments, Arguments) and arguments.training.max_steps >= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of fields that are going out of use
@fuzzed
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
@example({"max_steps": 10**40})
@example({"hidden_size": 10**30})
@example({"learning_rate": float("nan")})
@example({"accelerator_config": {"a": 1}})
@example({"lr_scheduler_kwargs": "[1]"})
@example({"report_to": ["none", "x"]})
def test_any_recipe_is_a_run_or_a_clear_error(tmp_path_factory, fields):
    path = tmp_path_factory.getbasetemp() / "fuzzed.yaml"
    path.write_text(yaml.safe_dump(BASE | fields), encoding="utf-8")
    a_run_or_a_clear_error([str(path), "--use_cpu", "true"])


@pytest.mark.filterwarnings("ignore")  # of fields that are going out of use
@fuzzed
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin-1")))
@example("!!timestamp x: 1")
@example("!!float x")
@example("? [a]\n: b")
@example("<<: 1")
def test_any_text_is_a_recipe_or_a_clear_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    a_run_or_a_clear_error([str(path)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of fields that are going out of use
@fuzzed
@given(st.lists(st.tuples(st.sampled_from(NAMES), SCALARS.map(str)), max_size=3))
@example([("data_path", "")])
@example([("intermediate_layers", "²")])
@example([("max_steps", "٣")])
def test_any_command_line_is_a_run_or_a_clear_error(options):
    words = [word for name, value in options for word in (f"--{name}", value)]
    a_run_or_a_clear_error([QUICKSTART, "--use_cpu", "true", *words])


@pytest.mark.filterwarnings("ignore")  # of fields that are going out of use
@fuzzed
@given(
    st.lists(st.tuples(st.sampled_from(sorted(EvaluateArguments.__dataclass_fields__)), SCALARS.map(str)), max_size=3)
)
@example([("stride", "0")])
@example([("max_bytes", "9" * 5000)])
def test_any_command_line_of_an_evaluation_is_one_or_a_clear_error(options):
    try:
        _, _, found = evaluate_cli.parse_arguments(
            ["m", "t", *(w for name, value in options for w in (f"--{name}", value))]
        )
    except ValueError as error:
        assert str(error).strip() and "\x1b" not in str(error) and "\n" not in str(error)
    else:
        assert found.batch_size >= 1 and min(found.stride) >= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of fields that are going out of use
@fuzzed
@given(st.dictionaries(st.sampled_from(sorted(CONFIG_TYPES)), VALUES, max_size=4))
def test_any_fields_make_a_configuration_or_a_clear_error(tmp_path_factory, fields):
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(json.dumps(BASE | fields), encoding="utf-8")
    a_run_or_a_clear_error([str(path), "--use_cpu", "true"])
