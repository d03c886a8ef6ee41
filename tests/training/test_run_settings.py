"""Settings that differ from those of the run that wrote a checkpoint: refused, or accepted by name."""

from pathlib import Path

import pytest

from charformer_training.run_settings import check_accepted
from tests.helpers import SAVING


class TestOtherSettings:
    @pytest.mark.parametrize(
        ("change", "named"),
        [
            ({"seed": 1}, "seed: 42 there, 1 now"),
            ({"max_steps": 9}, "max_steps: 8 there, 9 now"),
            ({"learning_rate": 1e-3}, "learning_rate: 0.01 there, 0.001 now"),
            (
                {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
                "gradient_accumulation_steps: 1 there",
            ),
            ({"lr_scheduler_type": "cosine"}, 'lr_scheduler_type: "linear" there, "cosine" now'),
            ({"optim": "adafactor"}, "optim: "),
            ({"max_grad_norm": 0.5}, "max_grad_norm: 1.0 there, 0.5 now"),
            ({"muon": True}, "muon: false there, true now"),
            ({"model": {"activation_dropout": 0.1}}, "activation_dropout: 0.0 there, 0.1 now"),
            ({"model": {"intermediate_weight": 0.5}}, "intermediate_weight: 1.0 there, 0.5 now"),
            ({"model": {"hidden_size": 32}}, "hidden_size: 16 there, 32 now"),
        ],
    )
    def test_are_named_and_refused(self, make_trainer, checkpoint, change, named):
        with pytest.raises(ValueError, match="had other settings") as refused:
            make_trainer(**SAVING | change).train(resume_from_checkpoint=str(checkpoint))
        assert named in str(refused.value) and "accept_changes" in str(refused.value)

    def test_other_data_are_refused(self, make_trainer, checkpoint, corpus):
        data = corpus["train"].data.copy()
        data[5] ^= 1
        trainer = make_trainer(**SAVING)
        trainer.train_dataset.split = type(corpus["train"])("train", data)
        with pytest.raises(ValueError, match="train_data: .*sha256"):
            trainer.train(resume_from_checkpoint=str(checkpoint))

    def test_another_text_to_test_on_is_refused(self, make_trainer, corpus):
        trainer = make_trainer(**SAVING | {"max_steps": 4})
        trainer.test_dataset = corpus["validation"]
        trainer.train()
        trainer.test_dataset = corpus["train"]
        checkpoint = Path(trainer.args.output_dir) / "checkpoint-3"
        for dataset, accepted in ((None, []), (corpus["validation"], []), (corpus["train"], ["test_data"])):
            again = make_trainer(**SAVING | {"max_steps": 4})
            again.test_dataset = dataset
            again.train(resume_from_checkpoint=str(checkpoint), accept_changes=accepted)
        again = make_trainer(**SAVING | {"max_steps": 4})
        again.test_dataset = corpus["train"]
        with pytest.raises(ValueError, match=f"test_data: .*sha256 {corpus['validation'].sha256}.* there, .*sha256"):
            again.train(resume_from_checkpoint=str(checkpoint))

    def test_what_changes_no_result_is_free(self, make_trainer, checkpoint):
        free = {
            "eval_steps": 2,
            "save_steps": 4,
            "logging_steps": 1,
            "per_device_eval_batch_size": 3,
            "run_name": "other",
        }
        make_trainer(**SAVING | free).train(resume_from_checkpoint=str(checkpoint))

    @pytest.mark.slow
    def test_an_accepted_learning_rate_holds_from_the_first_step(self, make_trainer, checkpoint):
        rates = {}
        for rate in (1e-2, 1e-3):
            trainer = make_trainer(**SAVING | {"learning_rate": rate, "logging_steps": 1})
            trainer.train(resume_from_checkpoint=str(checkpoint), accept_changes=["learning_rate"])
            logged = [entry for entry in trainer.state.log_history if "learning_rate" in entry and entry["step"] > 6]
            rates[rate] = [entry["learning_rate"] for entry in logged]
        assert rates[1e-3] == pytest.approx([rate / 10 for rate in rates[1e-2]]) and rates[1e-2][-1] > 0

    def test_a_name_that_is_none_of_a_setting_is_refused(self, make_trainer, checkpoint):
        with pytest.raises(
            ValueError, match="accept_changes names learning_rat; it takes settings of a run: meant learning_rate\\?$"
        ):
            make_trainer(**SAVING).train(resume_from_checkpoint=str(checkpoint), accept_changes=["learning_rat"])
        trainer = make_trainer()
        with pytest.raises(
            ValueError, match="accept_changes names learning_rat; it takes settings of a run: meant learning_rate\\?$"
        ):
            trainer.train(accept_changes=["learning_rat"])  # nothing is resumed
        assert trainer.state.global_step == 0

    @pytest.mark.parametrize(
        ("accepted", "message"),
        [
            (
                ["max_steps", "eval_steps", "logging_steps"],
                "names eval_steps, logging_steps, which may change freely; leave",
            ),
            (["max_step"], "names max_step; it takes settings of a run: meant max_steps\\?$"),
            (["zzz"], "names zzz; it takes settings of a run, which are max_steps, seed, train_data$"),
            (
                ["log_loss_terms", "sample_prompt"],
                "names log_loss_terms, sample_prompt, which may change freely; leave",
            ),
            (["eval_step"], "meant eval_steps \\(it may change freely, without being named\\)\\?$"),
            (["data_path"], "names data_path; a text is compared by its bytes: give those of train_data that differ$"),
        ],
        ids=str,
    )
    def test_the_hint_fits_the_name(self, accepted, message):
        with pytest.raises(ValueError, match=message):
            check_accepted(accepted, {"max_steps", "seed", "train_data"})
