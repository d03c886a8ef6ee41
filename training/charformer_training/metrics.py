"""Whether a figure of an evaluation is better when it is lower or when it is higher, judged by its name."""

import re


_LOWER = set(
    "bpb bpc bpd bpp bpt bpw bits nats loss losses nll perplexity perplexities pplx ppl cost ce xent kl kld divergence"
    " deviance regret distance err errs error errors eer cer mer ter wer mae mape mse msle nmse nrmse rmse rmsle smape brier"
    " runtime latency".split()
)
_HIGHER = set(
    "acc accs accuracy accuracies f1 fbeta precision recall sensitivity specificity auc auroc auprc ap map mrr ndcg iou miou"
    " dice jaccard bleu sacrebleu chrf meteor rouge rougel rougelsum bertscore cider em mcc matthews pearson pearsonr"
    " spearman spearmanr correlation kappa r2 psnr ssim reward rewards margins throughput".split()
)
# Names of several words, and a word of the lists above for each.
_ONE_WORD = {"cross_entropy": "ce", "exact_match": "em", "win_rate": "acc", "per_second": "throughput"}
# scikit-learn's scorers of this form are errors with their sign changed, but a set of evaluation may be called `neg` too.
_SIGN_CHANGED = re.compile(r"neg_(?:log_loss|max_error|brier|mean_|median_|root_)")


def lower_is_better(metric: str) -> bool | None:
    """Whether a lower value of a metric is better; `None` if its name does not tell.

    The metric may have any prefix, such as `eval_` and the name of one of several evaluation sets.
    """
    name = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", metric).lower()).strip("_")
    if _SIGN_CHANGED.search(name):
        return None
    if re.search(r"(?:^|_)(?:log_?)?likelihood$", name):
        return re.search(r"neg(?:ative)?_(?:log_?)?likelihood$", name) is not None
    for several, one in _ONE_WORD.items():
        name = re.sub(rf"(?:^|(?<=_)){several}(?=_|$)", one, name)
    words = name.split("_")
    lower = max((place for place, word in enumerate(words) if _is_lower(word)), default=-1)
    higher = max((place for place, word in enumerate(words) if _without_number(word) in _HIGHER), default=-1)
    if lower > higher:  # the name of an evaluation set, which may be any word, stands before that of the metric
        return True
    return False if lower < 0 <= higher else None


def _is_lower(word: str) -> bool:
    return _without_number(word) in _LOWER or word.endswith(("loss", "losses", "entropyloss", "crossentropy"))


def _without_number(word: str) -> str:
    """A word without the number of its variant, like `rouge1` and `top5`; `f1` and `r2` are names of their own."""
    return word if word in _HIGHER else word.rstrip("0123456789")
