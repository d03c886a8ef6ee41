"""`AuxiliaryLossTrainer` on models of Transformers."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForObjectDetection,
    AutoModelForSequenceClassification,
    set_seed,
)

from charformer_training import (
    AuxiliaryLossTrainer,
    AuxiliaryLossTrainingArguments,
    add_auxiliary_losses,
)
from modeling_charformer import (
    CharformerConfig,
    CharformerForCausalLM,
    CharformerForSequenceClassification,
    register_schedule,
)
from tests.helpers import TINY, assert_same_logs, loss_logs
from tests.training.any_models import DEPRECATED, build


class Rows(torch.utils.data.Dataset):
    """Texts of different lengths, of random tokens."""

    def __init__(self, labels: str, number: int = 64):
        self.labels, self.number = labels, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 61, (12,), generator=generator)
        if self.labels == "class":
            return {"input_ids": ids, "labels": torch.tensor(index % 3)}
        labels = ids.clone()
        labels[4 + index % 8 :] = -100
        return {"input_ids": ids, "labels": labels}


DETR: dict[str, Any] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": AutoConfig.for_model(
        "resnet",
        embedding_size=8,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    ),
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "dropout": 0.0,
    "num_queries": 5,
    "num_labels": 3,
    "auxiliary_loss": True,
}


class Pictures(torch.utils.data.Dataset):
    """Noise with one box in each."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        box = {"class_labels": torch.tensor([index % 3]), "boxes": 0.2 + 0.3 * torch.rand(1, 4, generator=generator)}
        return {"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": box}

    @staticmethod
    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
            "labels": [row["labels"] for row in rows],
        }


def train(
    model,
    tmp_path,
    labels: str = "next",
    batch: int = 8,
    accumulation: int = 1,
    prepare=None,
    data=None,
    data_collator=None,
    **changes,
):
    arguments: dict[str, Any] = {
        "output_dir": str(tmp_path),
        "max_steps": 4,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "train_sampling_strategy": "sequential",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    set_seed(0)
    trainer = AuxiliaryLossTrainer(
        model=model,
        args=AuxiliaryLossTrainingArguments(**(arguments | changes)),
        train_dataset=data or Rows(labels),
        eval_dataset=data or Rows(labels, 10),
        data_collator=data_collator,
    )
    if prepare is not None:
        prepare(trainer)
    trainer.train()
    return trainer


def mixtral(**changes):
    return build("mixtral", num_local_experts=4, num_experts_per_tok=2, output_router_logits=True, **changes)


def unlabelled(model: Any, tmp_path, **row) -> AuxiliaryLossTrainer:
    args = AuxiliaryLossTrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    return AuxiliaryLossTrainer(model, args, train_dataset=[{"input_ids": [5, 6, 7, 8]} | row] * 8)


class TestTrainer:
    @pytest.mark.parametrize("kind", ["plain", "with losses", "Charformer"])
    def test_rows_without_labels_are_refused_with_the_cure(self, kind, tmp_path):
        model = CharformerForCausalLM(CharformerConfig(**TINY)) if kind == "Charformer" else build("gpt2")
        model = add_auxiliary_losses(model) if kind == "with losses" else model
        cure = r"no `labels`: its batches hold \['input_ids'\].*a copy of `input_ids`.*mlm=False"
        with pytest.raises(ValueError, match=cure):
            unlabelled(model, tmp_path).train()
        unlabelled(model, tmp_path, labels=[5, 6, 7, 8]).train()

    def test_a_classifier_without_labels_gets_no_cure_of_language_models(self, tmp_path):
        model = add_auxiliary_losses(build("bert", AutoModelForSequenceClassification, num_labels=3))
        with pytest.raises(ValueError, match=r"Give each row `labels`$"):
            unlabelled(model, tmp_path).train()

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_figures_are_the_same_however_a_batch_is_split(self, kind, tmp_path):
        logs = [
            loss_logs(train(add_auxiliary_losses(build(kind)), tmp_path, batch=batch, accumulation=8 // batch))
            for batch in (8, 2)
        ]
        assert {"loss_next_token", "loss_target_2", "loss_layer_1_target_2", "loss_last_position"} <= set(logs[0][0])
        assert_same_logs(*logs)

    @pytest.mark.slow
    @pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
    def test_figures_of_drawn_positions_are_the_same_however_a_batch_is_split(self, weighting, tmp_path):
        logs = []
        for batch, seed in ((8, 0), (2, 0), (8, 1)):
            model = add_auxiliary_losses(build("gpt2"), position_share=0.2, loss_weighting=weighting)
            logs.append(loss_logs(train(model, tmp_path, batch=batch, accumulation=8 // batch, seed=seed)))
        assert_same_logs(*logs[:2])
        assert logs[0][0]["loss_next_token"] == pytest.approx(logs[2][0]["loss_next_token"])
        assert abs(logs[0][0]["loss_layer_1"] - logs[2][0]["loss_layer_1"]) > 1e-3  # other positions
        whole = loss_logs(train(add_auxiliary_losses(build("gpt2")), tmp_path))
        assert logs[0][0]["loss_next_token"] == pytest.approx(whole[0]["loss_next_token"])
        assert logs[0][0]["loss_layer_1"] == pytest.approx(whole[0]["loss_layer_1"], rel=0.2)

    @pytest.mark.slow
    def test_schedule_that_is_never_on_is_refused_before_the_first_step(self, tmp_path):
        register_schedule("never", lambda at: 0.0)
        for field in ("intermediate_schedule", "target_schedule"):
            settings: dict[str, Any] = {field: "never"}
            model = add_auxiliary_losses(build("gpt2"), **settings)
            with pytest.raises(ValueError, match=f"{field} is 'never', whose factor is 0 at each of the 4 steps"):
                train(model, tmp_path)
        register_schedule("late", lambda at: float(at.progress > 0.7))
        assert (
            "loss_layer_1"
            in loss_logs(train(add_auxiliary_losses(build("gpt2"), intermediate_schedule="late"), tmp_path))[-1]
        )

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["bert", "llama"])
    @pytest.mark.parametrize("added", [False, True])
    def test_a_classifier_that_ignores_the_counts_is_trained_on_means(self, kind, added, tmp_path):
        logs = []
        for batch in (8, 2):
            model = build(kind, AutoModelForSequenceClassification, num_labels=3)
            model = add_auxiliary_losses(model) if added else model
            logs.append(loss_logs(train(model, tmp_path, "class", batch, 8 // batch)))
        assert logs[0][0]["loss"] < 4.0  # a mean, about log 3 and what the auxiliary classifiers add
        assert ("loss_layer_1" in logs[0][0]) == added
        assert_same_logs(*logs)

    @pytest.mark.slow
    @pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
    def test_a_charformer_that_classifies(self, weighting, tmp_path):
        logs = []
        for batch in (8, 2):
            set_seed(0)
            config = CharformerConfig(**(TINY | {"num_labels": 3, "loss_weighting": weighting}))
            model = CharformerForSequenceClassification(config)
            logs.append(loss_logs(train(model, tmp_path, "class", batch, 8 // batch)))
        assert {"loss_classification", "loss_layer_1", "loss_layer_2"} <= set(logs[0][0])
        assert ("loss_uncertainty" in logs[0][0]) == (weighting == "uncertainty")
        assert logs[0][0]["loss_classification"] == pytest.approx(1.0986, rel=0.05)
        assert_same_logs(*logs)

    @pytest.mark.slow
    def test_a_model_with_only_a_loss(self, tmp_path):
        logs = [loss_logs(train(build("gpt2"), tmp_path, batch=batch, accumulation=8 // batch)) for batch in (8, 4)]
        assert set(logs[0][0]) == {"loss", "step", "learning_rate", "grad_norm"}
        assert_same_logs(*logs)
        rows = [Rows("next")[index] for index in range(8)]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        assert logs[0][0]["loss"] == pytest.approx(build("gpt2")(**batch).loss.item(), rel=1e-4)

    @pytest.mark.slow
    def test_losses_beside_the_dict_are_logged_as_means(self, tmp_path):
        """The balancing loss of a mixture of experts is one of a batch, whatever the rest of the step holds."""
        logs = []
        for accumulation in (1, 2):
            trainer = train(mixtral(), tmp_path, batch=4, accumulation=accumulation, learning_rate=0.0, max_steps=2)
            logs.append(loss_logs(trainer))
        model, rows = mixtral(), [Rows("next")[index] for index in range(16)]
        expected = []
        for start in range(0, 16, 4):
            batch = {key: torch.stack([row[key] for row in rows[start : start + 4]]) for key in rows[0]}
            expected.append(model(**batch).aux_loss.item())
        assert [entry["loss_aux_loss"] for entry in logs[0]] == pytest.approx(expected[:2], rel=1e-4)
        assert logs[1][0]["loss_aux_loss"] == pytest.approx((expected[0] + expected[1]) / 2, rel=1e-4)
        assert "eval_loss_aux_loss" in trainer.evaluate()

    @pytest.mark.slow
    def test_detr_logs_each_of_its_losses(self, tmp_path):
        logs = []
        for batch in (4, 2):
            set_seed(0)
            config = AutoConfig.for_model("detr", **DETR)
            settings: dict[str, Any] = {
                "batch": batch,
                "accumulation": 4 // batch,
                "max_steps": 2,
                "learning_rate": 1e-4,
            }
            model = AutoModelForObjectDetection.from_config(config)
            trainer = train(model, tmp_path, data=Pictures(), data_collator=Pictures.collate, **settings)
            logs.append(loss_logs(trainer))
        assert_same_logs(*logs)
        entry = logs[0][0]
        parts = ("loss_ce", "loss_bbox", "loss_giou", "loss_ce_0", "loss_bbox_0", "loss_giou_0")
        assert {*parts, "loss_cardinality_error"} <= set(entry)
        weights = {"ce": 1, "bbox": config.bbox_loss_coefficient, "giou": config.giou_loss_coefficient}
        total = sum(weights[name.split("_")[1]] * entry[name] for name in parts)
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert "eval_loss_giou" in trainer.evaluate()

    @pytest.mark.slow
    def test_a_term_of_ones_own(self, tmp_path):
        def entropy(outputs, inputs):
            p = outputs.logits.softmax(-1)
            return -(p * p.log()).sum(-1).mean()

        def prepare(trainer):
            trainer.add_loss_term("entropy", entropy, weight=0.5, schedule="paper")

        plain = loss_logs(train(build("llama"), tmp_path, learning_rate=0.0))
        logs = []
        for batch in (8, 2):
            trainer = train(
                build("llama"), tmp_path, batch=batch, accumulation=8 // batch, learning_rate=0.0, prepare=prepare
            )
            logs.append(loss_logs(trainer))
        assert_same_logs(*logs)
        for number, (with_term, without) in enumerate(zip(logs[0], plain, strict=True)):
            assert ("loss_entropy" in with_term) == (number < 2)  # dropped after half of training
            extra = 0.5 * with_term.get("loss_entropy", 0.0)
            assert with_term["loss"] == pytest.approx(without["loss"] + extra, rel=1e-5)
            assert (with_term["grad_norm"] != pytest.approx(without["grad_norm"], rel=1e-3)) == (number < 2)

    def test_wrong_terms_are_refused(self, tmp_path):
        def prepare(trainer):
            def one(outputs, inputs):
                return torch.ones(())

            for name, weight, schedule, message in (
                ("layer_1", 1.0, "constant", "'layer_1' exists already"),
                ("own", float("nan"), "constant", "weight of the loss term 'own' is nan"),
                ("own", 1.0, "papr", "'papr'; known schedules"),
            ):
                with pytest.raises(ValueError, match=message):
                    trainer.add_loss_term(name, one, weight, schedule)
            trainer.add_loss_term("own", lambda outputs, inputs: outputs.logits)

        with pytest.raises(ValueError, match=r"'own' returned a tensor of the shape \(8, 12, 61\)"):
            train(add_auxiliary_losses(build("llama")), tmp_path, prepare=prepare)

    @pytest.mark.slow
    @DEPRECATED
    @pytest.mark.parametrize("lora", [False, True])
    def test_a_resumed_run_is_the_uninterrupted_one(self, lora, tmp_path):
        from peft import LoraConfig, get_peft_model

        def make():
            model = build("llama")
            if lora:
                model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
            return add_auxiliary_losses(model, intermediate_schedule="constant")

        whole = train(make(), tmp_path / "whole")
        train(make(), tmp_path / "parts", save_strategy="steps", save_steps=2)
        resumed = AuxiliaryLossTrainer(
            model=make(),
            args=AuxiliaryLossTrainingArguments(**{**whole.args.to_dict(), "output_dir": str(tmp_path / "parts")}),
            train_dataset=Rows("next"),
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
        assert_same_logs(loss_logs(whole), loss_logs(resumed))
        assert whole.model is not None and resumed.model is not None
        for name, weight in whole.model.state_dict().items():
            torch.testing.assert_close(resumed.model.state_dict()[name], weight, msg=name)

    def test_predictions_hold_no_losses(self, tmp_path):
        model = add_auxiliary_losses(build("llama"))
        trainer = train(model, tmp_path)
        assert trainer.predict(Rows("next", 6)).predictions.shape == (6, 12, 61)
