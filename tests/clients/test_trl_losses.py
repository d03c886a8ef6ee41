"""TRL's Trainers train and log auxiliary losses as `AuxiliaryLossTrainer` does, or refuse at the first step."""

import functools
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    set_seed,
)

from charformer_training import (  # noqa: E402
    AuxiliaryLossMixin,
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
)
from charformer_training.fused_head import check_same_heads  # noqa: E402
from modeling_charformer import CharformerForSequenceClassification  # noqa: E402, F401
from tests.clients import trl_program as program  # noqa: E402
from tests.clients.trl_program import MODELS, TEXTS  # noqa: E402
from tests.helpers import ROOT, assert_same_logs, loss_logs  # noqa: E402


pytestmark = pytest.mark.filterwarnings("ignore")
QUESTIONS: dict[str, list[str]] = {"prompt": TEXTS, "completion": [" yes", " no", " sat down"] * 5 + [" é"]}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "packing": {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "completion only": {"rows": QUESTIONS, "completion_only_loss": True},
}


def ours(trainer: Any, model: Any, folder: Path) -> tuple[list[dict[str, float]], dict[str, float]]:
    """What `AuxiliaryLossTrainer` logs on the batches of a Trainer of TRL, and the losses of its evaluation."""
    fields = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    same = {name: getattr(trainer.args, name) for name in fields}
    args = AuxiliaryLossTrainingArguments(**program.settings(folder / "ours", **same), remove_unused_columns=False)
    other = AuxiliaryLossTrainer(
        model,
        args,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        data_collator=trainer.data_collator,
    )
    other.train()
    return loss_logs(other), evaluated(other)


def with_adapter(model: Any, trainer: Any, config: Any) -> Any:
    """The model with an adapter that begins like that of a Trainer of TRL."""
    set_seed(trainer.args.seed)
    return peft.get_peft_model(model, config)


def evaluated(trainer: Any) -> dict[str, float]:
    """The losses of an evaluation, without a model of bytes' figures in bits."""
    return {name: value for name, value in trainer.evaluate().items() if "loss" in name}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_sft_has_the_figures_of_our_trainer(kind, way, tmp_path):
    trainer = program.sft(tmp_path, MODELS[kind](), **WAYS[way], eval=True)
    trainer.train()
    logs, metrics = loss_logs(trainer), evaluated(trainer)
    assert {"loss_target_2", "loss_layer_1", "loss_last_position"} <= logs[0].keys()
    assert {"eval_loss_target_2", "eval_loss_last_position"} <= metrics.keys()
    expected, expected_metrics = ours(trainer, MODELS[kind](), tmp_path)
    assert_same_logs(logs, expected)
    assert_same_logs([metrics], [expected_metrics])


ADAPTERS = {
    "lora": program.CASES["adapter"]["peft_config"],
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_sft_of_an_adapter_has_the_figures_of_our_trainer(kind, adapter, tmp_path):
    trainer = program.sft(tmp_path, MODELS[kind](), eval=True, peft_config=ADAPTERS[adapter])
    trainer.train()
    expected, metrics = ours(trainer, with_adapter(MODELS[kind](), trainer, ADAPTERS[adapter]), tmp_path)
    assert_same_logs(loss_logs(trainer), expected)
    assert_same_logs([evaluated(trainer)], [metrics])


@pytest.mark.parametrize(
    "heads",
    [{"heads": "own"}, {"heads": "sequential", "num_targets": 3}, {"draft_vocabulary": range(32, 128)}],
    ids=lambda heads: next(iter(heads.values())) if "heads" in heads else "draft vocabulary",
)
def test_sft_of_other_heads_has_the_figures_of_our_trainer(heads, tmp_path):
    trainer = program.sft(tmp_path, program.llama(**heads), eval=True, gradient_accumulation_steps=2)
    trainer.train()
    expected, metrics = ours(trainer, program.llama(**heads), tmp_path)
    assert_same_logs(loss_logs(trainer), expected)
    assert_same_logs([evaluated(trainer)], [metrics])


CONFIGS = ROOT / "training" / "accelerate"
# How the two processes are started, and what they train.
LAUNCHES: dict[str, tuple[list[str], list[str]]] = {
    "torchrun": (["torch.distributed.run", "--standalone", "--nproc_per_node=2"], list(program.CASES)),
    "accelerate": (["accelerate.commands.launch", "--config_file", str(CONFIGS / "one_node.yaml")], ["accumulated"]),
    "FSDP2": (
        ["accelerate.commands.launch", "--config_file", str(CONFIGS / "fsdp2.yaml")],
        ["plain", "accumulated", "checkpointed", "packing", "dpo"],
    ),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """The results of a launch, which happens once."""

    @functools.cache
    def launch(name: str) -> dict[str, Any]:
        command, cases = LAUNCHES[name]
        folder = tmp_path_factory.mktemp("launched")
        done = subprocess.run(
            [sys.executable, "-m", *command, program.__file__, str(folder), *cases],
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        return json.loads((folder / "results.json").read_text())

    return launch


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("launch", "case"), [(name, case) for name, (_, cases) in LAUNCHES.items() for case in cases])
def test_sft_on_two_processes_has_the_figures_of_our_trainer_on_one(launch, case, kind, launched, tmp_path):
    settings = program.case_settings(case, 1)
    for without_effect in ("torch_compile", "torch_compile_backend", "gradient_checkpointing"):
        settings.pop(without_effect, None)
    if case == "dpo":
        trainer = program.dpo(tmp_path, MODELS[kind](), MODELS[kind](), **settings)
        trainer.train()
    else:
        trainer = program.sft(tmp_path, MODELS[kind](), eval=True, **settings)
    found = launched(launch)[f"{case}-{kind}"]
    assert found["kind"] == ("FSDP" if launch == "FSDP2" else "MULTI_CPU")
    model, adapter = MODELS[kind](), program.CASES[case].get("peft_config")
    if case == "dpo":
        expected, metrics = loss_logs(trainer), evaluated(trainer)
    else:
        expected, metrics = ours(trainer, with_adapter(model, trainer, adapter) if adapter else model, tmp_path)
    assert_same_logs(found["logs"], expected)
    assert_same_logs([found["metrics"]], [metrics])


def experts() -> Any:
    set_seed(0)
    experts: dict[str, Any] = {"num_local_experts": 4, "num_key_value_heads": 2, "output_router_logits": True}
    ids: dict[str, Any] = {"vocab_size": 256, "pad_token_id": 255, "eos_token_id": 254, "bos_token_id": None}
    return MixtralForCausalLM(MixtralConfig(**program.SIZES, **experts, **ids))


def test_sft_of_a_model_without_auxiliary_losses_is_that_of_trl(tmp_path):
    logs = []
    changes: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_eval_batch_size": 8}
    for kind in (trl.SFTTrainer, program.SFTTrainer):
        trainer = program.sft(tmp_path, experts(), kind=kind, eval=True, **changes)
        trainer.train()
        metrics = trainer.evaluate()
        times = ("runtime", "per_second")
        logs.append([{**trainer.state.log_history[0]}, {k: v for k, v in metrics.items() if not k.endswith(times)}])
    for stock, mixed in zip(*logs, strict=True):
        assert {name: mixed[name] for name in stock} == pytest.approx(stock, rel=1e-5)
    assert logs[1][0]["loss_aux_loss"] == pytest.approx(logs[0][0]["aux_loss"], rel=1e-5)


class KeepGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.sizes = {name: p.grad is not None and float(p.grad.abs().sum()) for name, p in model.named_parameters()}


def test_every_head_has_a_gradient_and_the_output_matrix_makes_no_logits_of_all_positions(tmp_path):
    trainer = program.sft(tmp_path, MODELS["charformer"](intermediate_schedule="constant"), max_steps=1)
    calls: list[str] = []
    trainer.model.lm_head.register_forward_hook(lambda *_: calls.append("lm_head"))
    trainer.add_callback(keep := KeepGradients())
    trainer.train()
    heads = {name: size for name, size in keep.sizes.items() if name.startswith("auxiliary_heads")}
    assert len(heads) == 10 and all(heads.values())
    assert not calls


def test_the_best_model_of_sft_goes_by_a_term(tmp_path):
    trainer = program.sft(
        tmp_path,
        MODELS["llama"](),
        eval=True,
        learning_rate=0.2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss_target_2",
    )
    trainer.train()
    values = [entry["eval_loss_target_2"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(values) == 4 and min(values) < max(values)
    assert trainer.state.best_metric == min(values)
    assert evaluated(trainer)["eval_loss_target_2"] == pytest.approx(min(values), rel=1e-5)


def preferences(**more: Any) -> Any:
    return datasets.Dataset.from_dict({"prompt": TEXTS[:8], "chosen": [" sat"] * 8, "rejected": [" xqzé"] * 8, **more})


def answers(model: Any, prompts: list[str], completions: list[str]) -> dict[str, float]:
    """The terms on completions, as means over one batch, from the model's own forward."""
    tokenizer = program.tokenizer()
    rows = [
        (list(prompt.encode()), [*completion.encode(), tokenizer.eos_token_id])
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    width = max(len(one) + len(other) for one, other in rows)
    ids = torch.tensor([[*one, *other, *[255] * (width - len(one) - len(other))] for one, other in rows])
    mask = torch.tensor([[1] * (len(one) + len(other)) + [0] * (width - len(one) - len(other)) for one, other in rows])
    labels = torch.tensor(
        [[-100] * len(one) + other + [-100] * (width - len(one) - len(other)) for one, other in rows]
    )
    return {
        f"loss_{name}": value.item()
        for name, value in model.train()(ids, attention_mask=mask, labels=labels).loss_dict.items()
    }


def assert_evaluates(trainer: Any, expected: dict[str, float]) -> None:
    """That an evaluation reports the terms that are active at the end, with these values."""
    found = {name.removeprefix("eval_"): value for name, value in evaluated(trainer).items() if "_loss_" in name}
    assert {"loss_target_2", "loss_last_position"} <= found.keys() <= expected.keys()
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_dpo_adds_the_terms_of_the_chosen_answers(kind, tmp_path):
    trainer: Any = program.DPOTrainer(
        MODELS[kind](),
        MODELS[kind](),
        args=trl.DPOConfig(**program.settings(tmp_path, max_steps=1, learning_rate=0.0), max_length=64),
        train_dataset=preferences(),
        eval_dataset=preferences().select(range(4)),
        processing_class=program.tokenizer(),
    )
    trainer.train()
    [entry] = loss_logs(trainer)
    expected = answers(MODELS[kind](), TEXTS[:4], [" sat"] * 4)
    assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    weights = trainer.model.loss_settings.weights_at(0.0)
    added = sum(
        weight * entry[f"loss_{name}"] for name, weight in weights.items() if name not in ("next_char", "next_token")
    )
    assert entry["loss"] == pytest.approx(0.6931 + added, rel=1e-4)
    assert_evaluates(trainer, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_dpo_of_an_adapter_evaluates_the_policy_and_not_the_reference(kind, tmp_path):
    trainer: Any = program.DPOTrainer(
        MODELS[kind](),
        args=trl.DPOConfig(**program.settings(tmp_path, max_steps=2, learning_rate=0.1), max_length=64),
        train_dataset=preferences(),
        eval_dataset=preferences().select(range(4)),
        processing_class=program.tokenizer(),
        **program.CASES["adapter"],
    )
    trainer.train()
    expected = answers(trainer.model, TEXTS[:4], [" sat"] * 4)
    with trainer.model.disable_adapter():
        reference = answers(trainer.model, TEXTS[:4], [" sat"] * 4)
    assert abs(expected["loss_target_2"] - reference["loss_target_2"]) > 0.01
    assert_evaluates(trainer, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_kto_adds_the_terms_of_the_desirable_answers(kind, tmp_path):
    rows = {"prompt": TEXTS[:4], "completion": [" sat", " xqz", " y", " é"], "label": [True, False, True, False]}
    trainer: Any = program.KTOTrainer(
        MODELS[kind](),
        MODELS[kind](),
        args=trl.KTOConfig(**program.settings(tmp_path, max_steps=1, max_length=64, learning_rate=0.0)),
        train_dataset=datasets.Dataset.from_dict(rows),
        eval_dataset=datasets.Dataset.from_dict(rows),
        processing_class=program.tokenizer(),
    )
    trainer.train()
    [entry] = loss_logs(trainer)
    expected = answers(MODELS[kind](), [TEXTS[0], TEXTS[2]], [" sat", " y"])
    assert {name: entry[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert_evaluates(trainer, expected)


@pytest.mark.parametrize("sharding", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_kto_is_refused_where_all_processes_have_to_run_the_same_heads(sharding):
    for kind in (program.KTOTrainer, program.DPOTrainer):
        trainer = kind.__new__(kind)
        trainer.is_fsdp_enabled = trainer.is_deepspeed_enabled = False
        check_same_heads(trainer)
        setattr(trainer, sharding, True)
        if kind is program.KTOTrainer:
            with pytest.raises(
                ValueError, match="does not work with FSDP or DeepSpeed: heads do not run on a process"
            ):
                check_same_heads(trainer)
        else:
            check_same_heads(trainer)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
@pytest.mark.parametrize("kind", MODELS)
def test_grpo_and_rloo_add_the_terms_of_the_completions(kind, name, tmp_path):
    given: list[str] = []

    def share_of_letters(completions: list[str], **_: Any) -> list[float]:
        given.extend(completions)
        return [sum(character.isalpha() for character in text) / 8 for text in completions]

    changes = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = getattr(program, f"{name}Trainer")(
        MODELS[kind](),
        reward_funcs=share_of_letters,
        args=getattr(trl, f"{name}Config")(
            **program.settings(tmp_path, **changes), num_generations=2, max_completion_length=8, beta=0.0
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS}),
        processing_class=program.tokenizer(),
    )
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    [entry] = loss_logs(trainer)
    weights = trainer.model.loss_settings.weights_at(0.0)
    added = sum(
        weight * entry[f"loss_{name}"] for name, weight in weights.items() if name not in ("next_char", "next_token")
    )
    assert entry["loss"] == pytest.approx(added, abs=0.01)  # the policy's own loss is 0 in the first step
    changed = {name for name, weight in trainer.model.named_parameters() if not weight.equal(before[name])}
    assert {name for name in before if name.startswith("auxiliary_heads") and "bias" in name} <= changed


def test_reward_is_refused_at_the_first_step(make_folder, tmp_path):
    folder = make_folder("CharformerForSequenceClassification", num_labels=1)
    trainer: Any = program.RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(folder),
        args=trl.RewardConfig(**program.settings(tmp_path), max_length=64),
        train_dataset=preferences(),
        processing_class=program.tokenizer(),
    )
    with pytest.raises(ValueError, match="compute_loss of RewardTrainer calls the model without labels"):
        trainer.train()


def test_distillation_is_refused_at_the_first_step(tmp_path):
    mixed: Any = type("Distillation", (AuxiliaryLossMixin, trl.DistillationTrainer), {})
    trainer = mixed(
        program.llama(),
        program.llama(),
        args=trl.DistillationConfig(**program.settings(tmp_path)),
        train_dataset=datasets.Dataset.from_dict({"prompt": TEXTS[:4]}),
        processing_class=program.tokenizer(),
    )
    with pytest.raises(ValueError, match="Distillation runs a function of its own in place of the model's forward"):
        trainer.train()


@pytest.mark.parametrize("kind", MODELS)
def test_without_the_mixin_the_model_says_that_its_losses_are_not_trained(kind, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    program.sft(tmp_path, MODELS[kind](), kind=trl.SFTTrainer).train()
    told = [message for message in caplog.messages if message.startswith("The auxiliary losses of this")]
    assert len(told) == 1 and "not trained: without labels" in told[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_weighting": "uncertainty"}, "loss_weighting is 'uncertainty'.*SFTTrainer computes"),
        ({"distillation": 1.0}, "distillation is 1.0: heads learn from the logits.* It must be 0"),
        ({"position_loss": "last"}, "the weights {'next_char': 0.0, 'last_position': 1.0}; SFTTrainer computes"),
    ],
)
def test_what_does_not_fit_beside_a_foreign_main_loss_is_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        program.sft(tmp_path, MODELS["charformer"](**changes)).train()
