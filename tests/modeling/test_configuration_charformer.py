import json
from typing import Any

import pytest
import yaml
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig

from modeling_charformer import (
    CharformerConfig,
    CharformerForCausalLM,
    ScheduleContext,
    configuration_charformer,
    register_schedule,
    schedule_names,
)
from modeling_charformer.configuration_charformer import OTHER_NAMES
from tests.helpers import CONFIGS


def test_defaults_are_the_papers_t12():
    config = CharformerConfig()
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (12, 512, 2048)
    assert (config.num_attention_heads, config.max_position_embeddings, config.vocab_size) == (2, 512, 256)
    assert (config.hidden_act, config.attention_dropout, config.activation_dropout) == ("relu", 0.55, 0.55)
    assert (config.num_targets, config.target_weights, config.intermediate_layers) == (2, None, "all")
    assert (config.intermediate_weight, config.intermediate_schedule, config.position_loss) == (1.0, "paper", "all")


def test_recommended_losses_and_dropout_are_those_of_the_recipes():
    recipes = {
        "shakespeare-cpu.yaml": "much_text",
        "shakespeare-gpu.yaml": "little_text",
        "drafting.yaml": "drafting",
    }
    for recipe, purpose in recipes.items():
        fields = yaml.safe_load((CONFIGS / recipe).read_text())
        config = CharformerConfig.recommended(purpose, num_hidden_layers=fields["num_hidden_layers"])
        of_recipe = CharformerConfig(**{name: fields[name] for name in fields if hasattr(config, name)})
        assert config.language_model_losses() == of_recipe.language_model_losses()
        assert config.target_heads == of_recipe.target_heads
        assert config.attention_dropout == of_recipe.attention_dropout < 0.55
        assert config.activation_dropout == of_recipe.activation_dropout < 0.55
    own = CharformerConfig.recommended(num_targets=3, attention_dropout=0.1)
    assert (own.num_targets, own.attention_dropout, own.activation_dropout) == (3, 0.1, 0.0)
    with pytest.raises(ValueError, match="purpose is 'speed'; it must be one of .*'little_text'"):
        CharformerConfig.recommended("speed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_attention_heads": 3}, r"num_attention_heads \(3\) does not divide hidden_size \(512\)"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be 1 or more"),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0"),
        ({"initializer_range": 0.0}, "initializer_range is 0.0"),
        ({"hidden_act": "rleu"}, "hidden_act is 'rleu'; Transformers knows .*'relu'"),
        ({"norm_placement": "middle"}, "norm_placement is 'middle'; it must be 'pre' or 'post'"),
        ({"num_targets": 0}, "num_targets is 0"),
        ({"num_targets": 8, "max_position_embeddings": 8}, r"num_targets is 8.*max_position_embeddings"),
        ({"num_targets": 3, "target_weights": [0.5]}, r"target_weights has 1 entries \(\[0.5\]\).* needs 2"),
        ({"target_weights": [-0.5]}, "target_weights contains -0.5"),
        ({"target_weights": [float("nan")]}, "target_weights contains nan"),
        ({"intermediate_weight": -1.0}, "intermediate_weight is -1.0"),
        ({"intermediate_weight": float("inf")}, "intermediate_weight is inf"),
        ({"intermediate_layers": [0, 3]}, r"intermediate_layers contains \[0\].* 1 to 11"),
        ({"intermediate_layers": [12]}, r"intermediate_layers contains \[12\].* 1 to 11"),
        ({"intermediate_layers": [3, 3]}, "names a layer twice"),
        ({"intermediate_layers": "some"}, "intermediate_layers is 'some'"),
        ({"intermediate_layers": [1], "num_hidden_layers": 1}, "there are none"),
        ({"intermediate_schedule": "papr"}, r"'papr'; known schedules: \['constant', 'cosine', .*'paper'"),
        ({"target_schedule": "papr"}, "target_schedule is 'papr'"),
        ({"target_heads": "mlp"}, "target_heads is 'mlp'; it must be one of"),
        ({"term_weights": {"layer_12": 1.0}}, r"term_weights names \['layer_12'\]; the terms"),
        ({"loss_weighting": "free"}, "loss_weighting is 'free'"),
        ({"classifier_layers": [12]}, r"classifier_layers contains \[12\].* 1 to 11"),
        ({"classifier_weight": float("nan")}, "classifier_weight is nan"),
        ({"classifier_schedule": "papr"}, "classifier_schedule is 'papr'"),
        ({"layer_dropout": 1.0}, "layer_dropout is 1.0; it must be in the range from 0 to below 1"),
        ({"layer_dropout": -0.1}, "layer_dropout is -0.1"),
        ({"layer_dropout": float("nan")}, "layer_dropout is nan"),
        ({"layer_dropout": 0.1, "num_hidden_layers": 1, "intermediate_layers": None}, "a model of 1 layer has none"),
        ({"layer_dropout_schedule": "cosine"}, "layer_dropout_schedule is 'cosine'; it must be 'constant' or"),
        ({"position_loss": "first"}, "position_loss is 'first'; it must be 'all' or 'last'"),
    ],
)
def test_wrong_value_names_field_and_what_is_accepted(settings, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        CharformerConfig(**settings)


@pytest.mark.parametrize("settings", [{"hidden_size": 1.5}, {"norm_placement": None}, {"intermediate_layers": [1.5]}])
def test_wrong_type_raises(settings):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(settings))):
        CharformerConfig(**settings)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("num_target", "num_targets"),
        ("intermediate_layer", "intermediate_layers"),
        ("hiden_size", "hidden_size"),
        ("num_layers", "num_hidden_layers"),
        ("n_embd", "hidden_size"),
        ("n_head", "num_attention_heads"),
        ("d_ff", "intermediate_size"),
        ("block_size", "max_position_embeddings"),
        ("dropout", "attention_dropout and activation_dropout"),
    ],
)
def test_misspelt_field_or_another_models_name_suggests_the_right_one(misspelt: Any, meant: str):
    with pytest.raises(ValueError, match=f"no field '{misspelt}'.*meant {meant}[?]"):
        settings: dict[str, Any] = {misspelt: 3}
        CharformerConfig(**settings)
    with pytest.raises(ValueError, match=f"no field '{misspelt}'.*meant {meant}[?]"):
        CharformerConfig.from_dict({}, **settings)  # as `from_pretrained` does


@pytest.mark.parametrize("value", [5, "8bit", [1], True])
def test_quantization_that_is_no_mapping_is_refused(tmp_path, value):
    CharformerConfig().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": value}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="quantization_config is .*; it must be a mapping"):
        AutoConfig.from_pretrained(tmp_path)


def test_unrelated_field_is_kept():
    extra: dict[str, Any] = {"note_of_mine": "x", "num_labels": 5}
    assert CharformerConfig(**extra).note_of_mine == "x"


def test_no_other_name_is_a_name_of_transformers():
    standard = [name for names in OTHER_NAMES.values() for name in names if hasattr(CharformerConfig(), name)]
    assert not standard


def test_saved_attribute_with_another_models_name_loads_with_a_warning(tmp_path, monkeypatch):
    config = CharformerConfig(num_hidden_layers=3)
    warnings: list[str] = []
    config.num_layers = 7
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(configuration_charformer.logger, "warning_once", warnings.append)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.num_layers, loaded.num_hidden_layers) == (7, 3)
    assert (
        "'num_layers', which is no field of a Charformer and changes nothing; it has num_hidden_layers" in warnings[0]
    )


def test_value_assigned_later_is_checked_when_a_model_is_built():
    config = CharformerConfig()
    config.num_attention_heads = 3
    with pytest.raises(StrictDataclassClassValidationError, match="does not divide"):
        CharformerForCausalLM(config)


def test_override_in_from_pretrained_is_checked(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassClassValidationError, match="intermediate_layers contains"):
        CharformerForCausalLM.from_pretrained(tmp_path, intermediate_layers=[3])


def test_round_trip(tmp_path):
    config = CharformerConfig(
        num_targets=3,
        target_weights=(0.5, 0.25),
        target_schedule="forward",
        intermediate_layers=[2, 4],
        intermediate_schedule="cosine",
        term_weights={"target_2": 0.4, "layer_4": 0.8},
        loss_weighting="uncertainty",
        classifier_layers=[3],
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, CharformerConfig)
    for progress in (0.0, 0.2, 0.5):
        for kind in (CharformerConfig.language_model_losses, CharformerConfig.classifier_losses):
            assert kind(loaded).terms == kind(config).terms
        assert loaded.language_model_losses().weights_at(progress) == config.language_model_losses().weights_at(
            progress
        )
    assert loaded.loss_weighting == "uncertainty"


def test_auto_map_is_complete():
    assert set(CharformerConfig().auto_map) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }


def test_registered_schedule_is_known_and_its_name_stays_taken():
    def halves(at: ScheduleContext) -> float:
        return 0.5

    register_schedule("halves", halves)
    register_schedule("halves", halves)  # again, as a reloaded notebook cell does
    assert "halves" in schedule_names()
    assert CharformerConfig(intermediate_schedule="halves").intermediate_schedule == "halves"
    with pytest.raises(ValueError, match="'halves' is registered already"):
        register_schedule("halves", lambda at: 1.0)
    with pytest.raises(ValueError, match="'paper' is registered already"):
        register_schedule("paper", halves)
