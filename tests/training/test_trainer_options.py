"""Options of the Trainer that it would ignore, or refuse late: each is refused before anything is read."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Trainer

from charformer_training.arguments import AuxiliaryLossTrainingArguments
from charformer_training.recipes import parse_arguments
from tests.helpers import QUICKSTART


@pytest.fixture
def recipe(tmp_path: Path):
    """Writes a recipe, and returns its path."""

    def write(**fields: Any) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"data_path": "text.txt", "output_dir": "out", "max_steps": 5} | fields))
        return str(path)

    return write


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--torch_compile_backend nonsense", "torch_compile_backend is 'nonsense'; it must be one of ['aot_eager', "),
        ("--torch_compile_backend no", "torch_compile_backend is 'no'; it must be one of"),
        ("--torch_compile_backend onnxrt", "torch_compile_backend is 'onnxrt'; it must be one of"),  # fails at a step
        (
            "--torch_compile_backend eager --torch_compile_mode max-autotune",
            "only torch_compile_backend 'inductor' has",
        ),
        ("--optim adamw_torch_xla", "optim is 'adamw_torch_xla'; "),
        (
            "--optim_args momentum=0.9",
            "optim_args names 'momentum', which optim 'adamw_torch_fused' does not take; it takes",
        ),
        ("--optim sgd --optim_args momentm=0.9", "takes dampening, momentum, nesterov"),
        ("--optim sgd --optim_args momentum=-1", "optim is 'sgd', which does not accept its settings (optim_args is"),
        ("--optim sgd --optim_args nesterov=true", "Nesterov momentum requires a momentum"),
        ("--optim sgd --optim_args momentum=x", "optim is 'sgd'; could not convert string to float: 'x'"),
        ("--optim sgd --optim_args momentum", "optim_args is 'momentum'; it must be name=value pairs"),
        ("--optim sgd --optim_args momentum=0.9,momentum=0.8", "each name once"),
        ("--optim sgd --optim_args weight_decay=0.1", "optim_args names weight_decay, which the field weight_decay"),
        ("--optim sgd --adam_beta1 0.5", "adam_beta1 is 0.5; optim 'sgd' does not use it"),
        ("--optim_target_modules all-linear", "optim_target_modules is given; optim 'adamw_torch_fused' takes none"),
        ("--dataloader_num_workers 1000000", "dataloader_num_workers is 1000000; it must be from 0 to "),
        ("--gradient_accumulation_steps 1000000000000", "gradient_accumulation_steps is 1,000,000,000,000: with"),
        ("--debug x", "debug is 'x'; it must be 'underflow_overflow'"),
        ("--debug tpu_metrics_debug", "debug is 'tpu_metrics_debug'; it must be one of"),
        ("--fsdp x", "fsdp is 'x'; it must be one of ['full_shard'"),
        ('--fsdp_config {"version":2}', "fsdp_config is given; it needs fsdp"),
        ("--deepspeed x.json", "deepspeed is 'x.json'; it must be a mapping in JSON, or a file of one"),
        ('--deepspeed {"a":1}', "deepspeed is given; the package deepspeed is not installed"),
        ("--accelerator_config x.json", "accelerator_config is 'x.json'; it must be a mapping in JSON, or a file"),
        ('--accelerator_config {"x":1}', "accelerator_config has no entry 'x'; it takes dispatch_batches,"),
        (
            '--accelerator_config {"split_batches":1}',
            "accelerator_config: split_batches is 1; it must be true or false",
        ),
        ('--accelerator_config {"gradient_accumulation_kwargs":1}', "gradient_accumulation_kwargs is 1; it must be"),
        ('--accelerator_config {"gradient_accumulation_kwargs":{"num_steps":3}}', "give gradient_accumulation_steps"),
        ("--parallelism_config x", "parallelism_config is 'x'; it must be left out"),
        ("--ddp_backend gloo", "ddp_backend is 'gloo'; it must be left out: this is a single process"),
        ("--dataloader_multiprocessing_context fork", "needs dataloader_num_workers of 1 or more"),
        ("--use_liger_kernel true", "use_liger_kernel is given; it must be left out"),
        ("--do_predict true", "do_predict is true; it must be left out"),
        ("--disable_tqdm x", "disable_tqdm is 'x'; it must be true or false"),
        ('--gradient_checkpointing_kwargs {"use_reentrant":true}', "it needs gradient_checkpointing"),
        (
            '--gradient_checkpointing --gradient_checkpointing_kwargs {"x":1}',
            "gradient_checkpointing_kwargs has no entry",
        ),
        ("--save_strategy best", "save_strategy is 'best'; it needs metric_for_best_model"),
        ("--save_strategy best --metric_for_best_model eval_bpc --eval_strategy no", "it needs eval_strategy 'steps'"),
        (
            '--lr_scheduler_type warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":100000}',
            "more than max_steps=",
        ),
    ],
)
def test_an_option_without_use_is_refused_with_what_is_accepted(words, message):
    with pytest.raises(ValueError) as caught:
        parse_arguments([QUICKSTART, "--muon", "false", *words.split()])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_another_optimizer_or_schedule_leaves_the_recipes_arguments(recipe):
    path = recipe(
        optim="sgd", optim_args="momentum=0.5", lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 2}
    )
    kept = parse_arguments([path]).training
    assert (kept.optim_args, kept.lr_scheduler_kwargs) == ("momentum=0.5", {"power": 2})
    other = parse_arguments([path, "--optim", "adamw_torch", "--lr_scheduler_type", "linear"]).training
    assert (other.optim_args, other.lr_scheduler_kwargs) == (None, None)


def test_arguments_of_an_optimizer_are_checked_without_a_recipe_too(tmp_path):
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "optim": "sgd"}
    with pytest.raises(
        ValueError, match="optim_args names 'momentm', which optim 'sgd' does not take; it takes .*momentum"
    ):
        AuxiliaryLossTrainingArguments(**settings, optim_args="momentm=0.9")
    taken = AuxiliaryLossTrainingArguments(**settings, optim_args="momentum=0.9, nesterov=true")
    optimizer, found = Trainer.get_optimizer_cls_and_kwargs(taken)
    assert optimizer is torch.optim.SGD and (found["momentum"], found["nesterov"]) == (0.9, True)
