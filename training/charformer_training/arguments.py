"""Settings of the programs: of the model, the data, the run, the Trainer and the evaluation."""

import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames


STANDARD_LIBRARY = "python-stdlib"
SPLIT_NAMES = ("train", "validation", "test")


@dataclass
class ModelArguments:
    """Fields of `CharformerConfig`; one that is not given keeps that class's default (the paper's T12)."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Begin with this trained model instead of a new one (fine-tuning)."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the layers."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Width of the feed-forward layers."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Number of layers."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Number of attention heads."})
    max_position_embeddings: int | None = field(default=None, metadata={"help": "The window, in characters."})
    hidden_act: str | None = field(default=None, metadata={"help": "Activation of the feed-forward layers."})
    attention_dropout: float | None = field(default=None, metadata={"help": "Dropout of attention weights."})
    activation_dropout: float | None = field(default=None, metadata={"help": "Dropout after the activation."})
    initializer_range: float | None = field(default=None, metadata={"help": "Deviation of the initial weights."})
    norm_placement: str | None = field(default=None, metadata={"help": "Layer norms 'pre' or 'post'."})
    num_targets: int | None = field(default=None, metadata={"help": "Characters predicted at each position."})
    target_weights: list[float] | None = field(default=None, metadata={"help": "Weights of targets 2, 3, ..."})
    target_schedule: str | None = field(
        default=None,
        metadata={"help": "How these change: constant, forward (one target after the other comes in), ..."},
    )
    target_heads: str | None = field(
        default=None,
        metadata={"help": "What predicts them: linear, residual, or sequential (the best drafts for generation)."},
    )
    intermediate_layers: list[str] | None = field(
        default=None, metadata={"help": "Layers with losses of their own: 'all', 'none', or their numbers."}
    )
    intermediate_weight: float | None = field(default=None, metadata={"help": "Factor on these losses."})
    intermediate_schedule: str | None = field(
        default=None, metadata={"help": "How it changes: paper, constant, linear, cosine, random, rotate_4, ..."}
    )
    position_loss: str | None = field(default=None, metadata={"help": "Positions that count: 'all' or 'last'."})
    loss_weights: str | None = field(
        default=None, metadata={"help": "Weights of terms by name: {target_2: 0.4, layer_1: 0.8}, as YAML or JSON."}
    )
    loss_weighting: str | None = field(
        default=None, metadata={"help": "'fixed', or 'uncertainty': weights are learned (Kendall et al. 2018)."}
    )

    def config_fields(self) -> dict[str, Any]:
        """The given fields, as `CharformerConfig` takes them."""
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "model_name_or_path"}
        given = {name: value for name, value in given.items() if value is not None}
        if "intermediate_layers" in given:
            given["intermediate_layers"] = _layer_choice(given["intermediate_layers"])
        if isinstance(given.get("loss_weights"), str):
            given["loss_weights"] = yaml.safe_load(given["loss_weights"])
        return given


def _layer_choice(value: str | Sequence[str | int]) -> str | list[int] | None:
    words = [value] if isinstance(value, str | int) else list(value)
    if words in (["all"], ["none"]):
        return "all" if words == ["all"] else None
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ValueError(f"intermediate_layers is {value!r}; it must be 'all', 'none', or layer numbers") from None


@dataclass
class DataArguments:
    """Where the text comes from and how it is split."""

    data_path: str | None = field(
        default=None,
        metadata={
            "help": "A text file, a folder of text files (read in the order of their paths, binary and hidden files left"
            f" out), or '{STANDARD_LIBRARY}': the Python sources of the running interpreter's standard library."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Instead of data_path: what datasets.load_dataset takes, such as a Hub id."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The dataset's configuration."})
    dataset_split: str = field(default="train", metadata={"help": "The dataset's split to read."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the dataset while it downloads: for one too large to store twice."}
    )
    text_column: str = field(default="text", metadata={"help": "The dataset's column that holds the text."})
    document_separator: str = field(
        default="\n", metadata={"help": "What stands between two files of a folder or two rows of a dataset."}
    )
    train_share: float = field(default=0.9, metadata={"help": "The first part of the text, to train on."})
    validation_share: float = field(
        default=0.05, metadata={"help": "The part after it, to evaluate on; the rest is the test split, never read."}
    )
    max_eval_bytes: int | None = field(
        default=None, metadata={"help": "Evaluate on so many bytes from the start of the validation split only."}
    )

    def __post_init__(self):
        if (self.data_path is None) == (self.dataset_name is None):
            raise ValueError(
                f"give one of data_path ({self.data_path!r}) and dataset_name ({self.dataset_name!r}): the text to train on"
            )
        if not 0 < self.train_share < 1 or not 0 < self.validation_share <= 1:
            raise ValueError(
                f"train_share is {self.train_share} and validation_share {self.validation_share}; both are above 0, and"
                " train_share below 1"
            )
        if self.train_share + self.validation_share > 1 + 1e-9:
            raise ValueError(
                f"train_share ({self.train_share}) and validation_share ({self.validation_share}) come to more than 1"
            )
        if self.max_eval_bytes is not None and self.max_eval_bytes < 2:
            raise ValueError(f"max_eval_bytes is {self.max_eval_bytes}; it must be 2 or more")

    @property
    def source(self) -> str:
        """The corpus in words, for logs and cards."""
        if self.data_path == STANDARD_LIBRARY:
            return f"Python {sysconfig.get_python_version()} standard library sources"
        if self.data_path is not None:
            return Path(self.data_path).name
        name = self.dataset_name or ""
        name = Path(name).name if Path(name).exists() else name  # a local folder's place is nobody else's business
        return "/".join(part for part in (name, self.dataset_config, self.dataset_split) if part)


@dataclass
class RunArguments:
    """What a run does beside training."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the model and checkpoints that output_dir already holds."}
    )
    resume: str = field(
        default="never",
        metadata={
            "help": "'auto' goes on from the newest good checkpoint of output_dir, begins if there is none, and does"
            " nothing if the run is complete: a command that can always be given again. Or a checkpoint's folder, or"
            " 'never'."
        },
    )
    accept_changes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Settings that may differ from those of the run that is gone on with, such as learning_rate."
        },
    )
    sample_prompt: str = field(default="\n", metadata={"help": "What sample texts begin with."})
    sample_length: int = field(default=200, metadata={"help": "Length of sample texts; 0 for none."})
    compare_ngrams: bool = field(
        default=False, metadata={"help": "Report a unigram and a trigram model, counted on the train split, beside."}
    )


def lower_is_better(metric: str) -> bool:
    """Whether an evaluation's figure is a loss, a number of bits or a perplexity, by a part of its name."""
    return re.search(r"(?:^|_)(?:loss|losses|bpc|bpb|bits|nats|perplexity|ppl)(?:_|$)", metric) is not None


@dataclass
class AuxiliaryLossTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, with what `AuxiliaryLossTrainer` adds."""

    log_loss_terms: str = field(
        default="each",
        metadata={
            "help": "'each' logs every term of the loss under its own name; 'groups' logs the mean over the layers of"
            " terms that differ in the layer only (loss_layers, loss_layers_target_2): for deep models.",
            "choices": ["each", "groups"],
        },
    )
    muon: bool = field(
        default=False,
        metadata={
            "help": "Whether Muon trains the linear layers of the model's body, scaled so that learning_rate and"
            " weight_decay mean what they do for AdamW, which trains the rest. Dearer steps, and fewer of them."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Whether nan and inf losses are left out of the logged loss. Off here: AuxiliaryLossTrainer stops"
            " at them, and looking at every loss would stall the device at every step."
        },
    )

    enable_jit_checkpoint: bool = field(
        default=True,
        metadata={
            "help": "Whether SIGTERM, SIGHUP and Ctrl-C end the step, write a checkpoint and leave with the status 128 +"
            " the signal's number; a second signal leaves at once."
        },
    )

    def __post_init__(self):
        if self.greater_is_better is None and lower_is_better(self.metric_for_best_model or ""):
            self.greater_is_better = False
        super().__post_init__()
        if self.log_loss_terms not in ("each", "groups"):
            raise ValueError(f"log_loss_terms is {self.log_loss_terms!r}; it must be 'each' or 'groups'")
        if self.muon and self.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
            raise ValueError(
                f"optim is {OptimizerNames(self.optim).value!r} and muon is on: what Muon leaves is trained by AdamW, so"
                " that optim must be 'adamw_torch' or 'adamw_torch_fused'"
            )
        if self.muon and self.optim_args:
            raise ValueError(f"optim_args is {self.optim_args!r} and muon is on, which has none; leave it out")


@dataclass
class EvaluateArguments:
    """What is evaluated, and how."""

    stride: list[int] = field(
        default_factory=lambda: [1],
        metadata={
            "help": "By how many bytes the window slides: 1 is the papers' protocol. Several give a table to choose from."
        },
    )
    window: int | None = field(default=None, metadata={"help": "Bytes the model sees at once; by default all it can."})
    split: str = field(
        default="all", metadata={"help": f"The part of the text: all, or {', '.join(SPLIT_NAMES)} as in training."}
    )
    train_share: float = field(default=0.9, metadata={"help": "The first part of the text, that was trained on."})
    validation_share: float = field(default=0.05, metadata={"help": "The part after it; the rest is the test split."})
    max_bytes: int | None = field(default=None, metadata={"help": "Only so many bytes from the start of the part."})
    batch_size: int = field(default=32, metadata={"help": "Windows at a time."})
    device: str | None = field(
        default=None, metadata={"help": "Such as cpu or cuda; by default the fastest there is."}
    )
    dtype: str = field(default="float32", metadata={"help": "Of the model's weights: float32, bfloat16 or float16."})
    output: str | None = field(default=None, metadata={"help": "A JSON file for the results."})
    plots: str | None = field(
        default=None,
        metadata={"help": "A PNG file: bits by position in the window, and by layer, for its classifiers."},
    )
    state_file: str | None = field(
        default=None, metadata={"help": "Where to keep what is done, so that the same command goes on from there."}
    )

    def __post_init__(self):
        if self.split not in ("all", *SPLIT_NAMES):
            raise ValueError(f"split is {self.split!r}; it must be 'all' or one of {list(SPLIT_NAMES)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be 'float32', 'bfloat16' or 'float16'")


class Arguments(NamedTuple):
    """The settings of a training run."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    training: AuxiliaryLossTrainingArguments
