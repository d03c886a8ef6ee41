"""The direction in which a figure is better."""

from typing import Any

import pytest
from transformers import TrainingArguments

from charformer_training import AuxiliaryLossTrainingArguments
from charformer_training.metrics import lower_is_better


LOWER = (
    "loss bpc eval_x_nll nll eval_ppl eval_word_perplexity val/loss eval_valLoss eval_hinge_loss eval_hingeloss error_rate"
    " eval_err eval_wer eval_de_cer eval_WER eval_mse RMSE eval_mean_absolute_error eval_mae eval_kl eval_cross_entropy"
    " eval_negative_log_likelihood eval_brier_score eval_bits_per_byte nats_per_token eval_runtime eval_edit_distance"
    " eval_loss_target_2 eval_loss2 eval_CrossEntropyLoss"
    # evaluation sets with any name
    " eval_accuracy_loss eval_neg_loss eval_map_loss_layer_3 eval_f1_bpc eval_negative_bpb eval_exact_match_nll"
).split()
HIGHER = (
    "accuracy eval_top5_accuracy eval_balanced_accuracy_score eval_mean_token_accuracy f1 eval_macro_f1 eval_rouge1"
    " eval_rougeL eval_sacrebleu bleu4 eval_roc_auc eval_map50 eval_r2 eval_pearsonr eval_exact_match eval_mrr@10"
    " eval_rewards/margins eval_rewards/accuracies eval_samples_per_second eval_log_likelihood matthews_correlation"
).split()
UNCLEAR = "eval_score neg_mean_squared_error eval_neg_log_loss eval_entropy eval_loss_free_accuracy x eval_ _ eval_lossless".split()


@pytest.mark.parametrize(
    ("metric", "lower"),
    [(name, lower) for names, lower in ((LOWER, True), (HIGHER, False), (UNCLEAR, None)) for name in names],
)
def test_the_name_of_a_metric_tells_the_better_direction_or_is_unclear(metric, lower):
    assert lower_is_better(metric) is lower


def test_a_metric_whose_name_does_not_tell_needs_greater_is_better(tmp_path):
    settings: dict[str, Any] = {"output_dir": str(tmp_path), "use_cpu": True, "metric_for_best_model": "eval_score"}
    with pytest.raises(ValueError, match="metric_for_best_model is 'eval_score'.*give greater_is_better"):
        AuxiliaryLossTrainingArguments(**settings)
    for given in (True, False):
        assert AuxiliaryLossTrainingArguments(**settings, greater_is_better=given).greater_is_better is given
    assert TrainingArguments(**settings).greater_is_better  # what would have been guessed
    assert AuxiliaryLossTrainingArguments(str(tmp_path), use_cpu=True).greater_is_better is None
