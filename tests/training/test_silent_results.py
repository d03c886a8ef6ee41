"""Input that once gave wrong figures, or none, without a word: now right, or refused."""

from typing import Any

import peft
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, GPT2Config, GPT2LMHeadModel

from charformer_training import AuxiliaryLossTrainer, add_auxiliary_losses
from modeling_charformer import CharformerConfig
from tests.helpers import TINY, assert_same_logs, loss_logs


LENGTHS = (9, 4, 7)


@pytest.fixture
def documents(make_ids):
    return [make_ids(1, length, seed=length) for length in LENGTHS]


def packed(documents) -> dict[str, torch.Tensor]:
    """One row of several documents, whose positions begin anew with each."""
    return DataCollatorWithFlattening()([{"input_ids": document[0].tolist()} for document in documents])


def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=256,
        n_embd=16,
        n_layer=3,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return add_auxiliary_losses(GPT2LMHeadModel(config), "own", num_targets=2).train()


class TestPackedRows:
    @pytest.mark.parametrize("kind", ["charformer", "gpt2"])
    def test_terms_are_those_of_the_documents_apart(self, make_model, documents, kind):
        model = make_model() if kind == "charformer" else gpt2()
        together = model(**packed(documents), use_cache=False).loss_dict
        apart = [model(document, labels=document, use_cache=False).loss_dict for document in documents]
        assert {"target_2", "layer_1", "layer_1_target_2", "last_position"} <= together.keys() == apart[0].keys()
        for name, value in together.items():
            lost = 2 if name.endswith("target_2") else 1  # the symbols of a document that are no such target
            counts = [1 if name == "last_position" else length - lost for length in LENGTHS]
            values = [terms[name].item() for terms in apart]
            mean = sum(count * one for count, one in zip(counts, values, strict=True)) / sum(counts)
            assert value.item() == pytest.approx(mean, rel=1e-5), name

    def test_without_positions_targets_lie_beyond_the_border(self, make_model, documents):
        model, row = make_model(), packed(documents)
        labels = row["input_ids"]  # no -100 marks a border either
        together = model(labels, labels=labels).loss_dict
        apart = model(**row).loss_dict
        assert all(together[name] != value for name, value in apart.items())

    @pytest.mark.parametrize("use_cache", [None, True])
    def test_a_cache_changes_nothing_in_training(self, make_model, documents, use_cache):
        model, row = make_model(), packed(documents)
        expected = model(**row, use_cache=False)
        output = model(**row, use_cache=use_cache)
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.loss_dict, expected.loss_dict)


def test_every_term_of_a_charformer_follows_shift_labels(make_model, make_ids):
    model, ids = make_model(num_targets=3), make_ids()
    expected = model(ids, labels=ids).loss_dict
    aligned = F.pad(ids, (0, 1), value=-100)[:, 1:]
    torch.testing.assert_close(model(ids, labels=ids, shift_labels=aligned).loss_dict, expected)
    torch.testing.assert_close(model(ids, shift_labels=aligned).loss_dict, expected)
    other = aligned.clone()
    other[:, 8:11] = 4
    changed = model(ids, labels=ids, shift_labels=other).loss_dict
    # the last position has the same target in both
    assert {name for name, value in expected.items() if changed[name] == value} == {"last_position"}


class TestSchedules:
    @pytest.mark.parametrize("schedule", ["random", "rotate_4"])
    def test_a_choice_among_layers_is_refused_for_targets(self, schedule):
        message = f"target_schedule is '{schedule}', which chooses among the intermediate layers"
        with pytest.raises(StrictDataclassError, match=message):
            CharformerConfig(**TINY, target_schedule=schedule)

    @pytest.mark.parametrize("schedule", ["random", "rotate_4"])
    def test_a_choice_among_no_layers_leaves_the_final_one(self, schedule):
        config = CharformerConfig(**TINY, intermediate_layers=None, intermediate_schedule=schedule)
        weights = config.language_model_losses().weights_at(0.5, 3)
        assert weights == {"next_char": 1.0, "last_position": 0.0, "target_2": 0.5}


class TestTrainer:
    @pytest.mark.slow
    def test_a_compute_loss_of_ones_own_trains_the_terms(self, make_trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).loss

        expected, trainer = make_trainer(), make_trainer()
        trainer.__class__ = type("Mine", (AuxiliaryLossTrainer,), {"compute_loss": compute_loss})
        expected.train()
        trainer.train()
        assert_same_logs(loss_logs(expected), loss_logs(trainer))

    def test_a_compute_loss_that_takes_the_labels_out_is_refused_at_the_first_step(self, make_trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        trainer = make_trainer()
        trainer.__class__ = type("Mine", (AuxiliaryLossTrainer,), {"compute_loss": compute_loss})
        with pytest.raises(ValueError, match="compute_loss of Mine calls the model without labels"):
            trainer.train()
        assert trainer.state.global_step == 0

    def test_compute_loss_func_is_refused(self, make_trainer):
        plain = make_trainer()
        with pytest.raises(ValueError, match="compute_loss_func would replace the model's own losses"):
            AuxiliaryLossTrainer(plain.model, plain.args, compute_loss_func=lambda outputs, labels, **kwargs: 0.0)

    def test_compute_loss_before_training_is_the_models_loss_at_its_beginning(self, make_trainer):
        trainer = make_trainer()
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
        expected = trainer.model(**batch, training_progress=0.0, training_step=0)
        assert "layer_1" in outputs.loss_dict
        torch.testing.assert_close(loss, expected.loss)

    @pytest.mark.slow
    def test_a_first_step_that_ran_out_of_memory_is_logged_once(self, make_trainer, monkeypatch):
        trainer = make_trainer(auto_find_batch_size=True, max_steps=2)
        backward, sizes = trainer.accelerator.backward, []

        def fails_once(loss, **kwargs):
            sizes.append(trainer._train_batch_size)
            if len(sizes) == 1:
                raise RuntimeError("CUDA out of memory.")
            backward(loss, **kwargs)

        monkeypatch.setattr(trainer.accelerator, "backward", fails_once)
        trainer.train()
        assert sizes[0] == 8 > sizes[1]
        expected = make_trainer(per_device_train_batch_size=sizes[1], max_steps=2)
        expected.train()
        assert loss_logs(trainer)[0] == loss_logs(expected)[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_without_auxiliary_heads_of_a_peft_model_has_the_adapters_merged(make_model, make_ids):
    ids = make_ids()
    plain = make_model().eval()(ids).logits
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: Any = peft.get_peft_model(make_model(), adapters).eval()
    logits = model(ids).logits
    assert (logits - plain).abs().max() > 1e-3
    smaller = model.without_auxiliary_heads()
    assert not [name for name in smaller.state_dict() if "lora" in name or name.startswith("auxiliary_heads")]
    torch.testing.assert_close(smaller(ids).logits, logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(ids).logits, logits)  # which is left as it was
