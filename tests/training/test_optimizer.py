"""Muon and AdamW as one optimizer."""

import copy
from typing import Any

import peft
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration

from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments, add_auxiliary_losses
from charformer_training.optimizer import muon_adamw
from tests.helpers import loss_logs


def names_of_matrices(model: torch.nn.Module) -> set[str]:
    optimizer = muon_adamw(model, [], lr=0.1)
    ids = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    everything = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(p) for p in everything} == {id(p) for p in model.parameters() if p.requires_grad}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def small_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=24, vocab_size=256))


class TestWhatIsTrainedByMuon:
    def test_linear_layers_below_the_heads(self, make_model):
        linear = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.fc1", "mlp.fc2")
        expected = {f"model.layers.{layer}.{name}.weight" for layer in range(3) for name in linear}
        assert names_of_matrices(make_model(target_heads="sequential")) == expected

    def test_convolutions_of_gpt2(self):
        linear = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        assert names_of_matrices(small_gpt2()) == {f"transformer.h.0.{name}.weight" for name in linear}

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's
    def test_adapters_of_lora(self):
        adapted = peft.get_peft_model(
            small_gpt2(), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        )
        names = names_of_matrices(adapted)
        assert len(names) == 2 and all("lora_" in name for name in names)

    def test_neither_heads_nor_embeddings_of_a_model_whose_base_is_itself(self):
        sizes: dict[str, Any] = {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
            "vocab_size": 256,
        }
        names = names_of_matrices(T5ForConditionalGeneration(T5Config(**sizes)))
        assert "encoder.block.0.layer.0.SelfAttention.q.weight" in names
        assert not names & {"shared.weight", "lm_head.weight", "encoder.embed_tokens.weight"}

    def test_auxiliary_heads_are_not(self):
        model = add_auxiliary_losses(small_gpt2(), num_targets=3, intermediate_layers=None)
        assert not any("auxiliary" in name for name in names_of_matrices(model))

    def test_models_without_matrices_or_of_others_are_refused(self, make_model):
        model = make_model()
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
        with pytest.raises(ValueError, match="CharformerForCausalLM has no linear layer in its body that is trained"):
            muon_adamw(model, [], lr=0.1)
        with pytest.raises(ValueError, match="the body of this LayerNorm is not known"):
            muon_adamw(torch.nn.LayerNorm(4), [], lr=0.1)


class TestSteps:
    @pytest.mark.slow
    def test_are_those_of_torchs_two_optimizers(self, make_trainer):
        trainer = make_trainer(
            muon=True, weight_decay=0.1, max_grad_norm=1e9, lr_scheduler_type="constant", adam_beta2=0.9
        )
        model = copy.deepcopy(trainer.model)
        body = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
        rest = {name: p for name, p in model.named_parameters() if all(p is not weight for weight in body)}
        decays = [p for name, p in rest.items() if not ("norm" in name or "bias" in name)]
        others = [p for name, p in rest.items() if "norm" in name or "bias" in name]
        groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizers = [
            torch.optim.Muon(body, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.9), fused=True),
        ]
        model.train()
        for step in range(8):
            rows = [trainer.train_dataset[8 * step + row] for row in range(8)]
            batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
            model(**batch, training_progress=step / 8).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        trainer.train()
        for (name, expected), found in zip(model.named_parameters(), trainer.model.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4, msg=name)

    def test_all_groups_follow_the_learning_rate(self, make_trainer):
        schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}}
        trainer = make_trainer(muon=True, **schedule)
        trainer.train()
        rates = [group["lr"] for group in trainer.optimizer.param_groups]
        assert rates == pytest.approx([1e-3] * 3)

    @pytest.mark.slow
    def test_a_resumed_run_goes_on_as_if_never_stopped(self, make_trainer):
        whole = make_trainer(muon=True, save_strategy="steps", save_steps=3)
        whole.train()
        resumed = make_trainer(muon=True, save_strategy="steps", save_steps=3)
        resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
        assert loss_logs(resumed) == loss_logs(whole)
        for expected, found in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(found, expected)

    def test_a_copy_steps_too(self, make_model):
        model = make_model()
        pair = copy.deepcopy((model, muon_adamw(model, [], lr=0.1)))
        copied, optimizer = pair
        for parameter in copied.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        for before, after in zip(model.parameters(), copied.parameters(), strict=True):
            assert not torch.equal(before, after)

    def test_further_parameters_are_refused(self, make_model):
        optimizer = muon_adamw(make_model(), [], lr=0.1)
        with pytest.raises(NotImplementedError, match="takes no further parameters"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})


def test_an_optimizer_given_beside_muon_is_refused(make_trainer):
    trainer = make_trainer()
    args = AuxiliaryLossTrainingArguments(
        output_dir=trainer.args.output_dir, muon=True, use_cpu=True, report_to="none"
    )
    sgd = torch.optim.SGD(trainer.model.parameters())
    for given in ({"optimizers": (sgd, None)}, {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}):
        with pytest.raises(ValueError, match="muon is on, and the Trainer was given an optimizer too"):
            AuxiliaryLossTrainer(model=trainer.model, args=args, **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim": "sgd"}, "optim is 'sgd' and muon is on"),
        ({"optim_args": "momentum=0.9"}, "optim_args is 'momentum=0.9' and muon is on"),
    ],
)
def test_settings_that_muon_has_no_use_for_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        AuxiliaryLossTrainingArguments(output_dir=str(tmp_path), muon=True, **changes)
