"""Training with auxiliary losses: a Trainer that logs every term, data as bytes, recipes.

`AuxiliaryLossTrainer` works with any Transformers model; the rest is for Charformer.
"""

from .any_model import add_auxiliary_losses, load_auxiliary_losses
from .arguments import AuxiliaryLossTrainingArguments
from .data import ConsecutiveWindows, RandomWindows, Split, load_corpus, split_corpus
from .draft_heads import export_draft_heads, frequent_tokens
from .evaluation import Evaluation, bits_per_character
from .loss_terms import LossTerms
from .mixin import AuxiliaryLossMixin
from .plots import plot_loss_terms
from .pushing import push_folder
from .terms_callback import LossTermsCallback
from .trainer import AuxiliaryLossTrainer


__all__ = [
    "AuxiliaryLossMixin",
    "AuxiliaryLossTrainer",
    "AuxiliaryLossTrainingArguments",
    "ConsecutiveWindows",
    "Evaluation",
    "LossTerms",
    "LossTermsCallback",
    "RandomWindows",
    "Split",
    "add_auxiliary_losses",
    "bits_per_character",
    "export_draft_heads",
    "frequent_tokens",
    "load_auxiliary_losses",
    "load_corpus",
    "plot_loss_terms",
    "push_folder",
    "split_corpus",
]
