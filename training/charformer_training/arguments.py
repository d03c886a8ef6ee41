"""Settings of the programs: of the model, the data, the run, the Trainer and the evaluation."""

import inspect
import re
import sysconfig
import types
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from modeling_charformer import CharformerConfig
from modeling_charformer.configuration_charformer import OWN_FIELDS
from modeling_charformer.loss_settings import LossFields

from .checks import check_ranges, check_type, shown
from .metrics import lower_is_better
from .strict_yaml import read_yaml
from .terminal import one_line
from .trainer_options import check_optimizer_arguments


STANDARD_LIBRARY = "python-stdlib"
SPLIT_NAMES = ("train", "validation", "test")
SHARES = (0.9, 0.05)  # of the train and the validation split
_LAYER_WORDS = ("all", "none", "thirds")  # the last only for classifiers


def _command_line_type(hint: Any) -> Any:
    """What the command line reads for a field of the configuration: one type, or a list of one."""
    members = set(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else {hint}
    lists = [get_args(member)[0] for member in members if get_origin(member) is list]
    if any(get_origin(member) is dict for member in members):
        return str
    if lists:
        return list[str] if str in members else list[_command_line_type(lists[0])]  # type: ignore[misc]  # made at run time
    return next(kind for kind in (bool, float, int, str) if kind in members)


def _described_fields(config: type) -> dict[str, str]:
    """The fields' descriptions, from the docstring's `Args`."""
    described: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", inspect.cleandoc((config.__doc__ or "").partition("Args:")[2])):
        names, _, text = entry.partition(":")
        described |= dict.fromkeys(re.split(r",\s*", names.strip()), " ".join(text.split()))
    return described


def _config_fields() -> list[tuple[str, Any, Any]]:
    """Each field of `CharformerConfig` as a field of the command line, left out by default."""
    help_texts = _described_fields(LossFields) | _described_fields(CharformerConfig)
    # `use_cache` is left out: training has no cache, and `TrainingArguments` has a field of this name.
    known = {item.name for item in fields(TrainingArguments)}
    return [
        (
            item.name,
            _command_line_type(item.type) | None,
            field(default=None, metadata={"help": help_texts.get(item.name, "").replace("%", "%%")}),
        )
        for item in fields(CharformerConfig)
        if item.name in OWN_FIELDS and item.name not in known
    ]


# Made from the configuration, so that a field added there is a field here too.
_ConfigFields: Any = make_dataclass("_ConfigFields", _config_fields())


@dataclass
class ModelArguments(_ConfigFields):
    """Fields of `CharformerConfig`. A field left out keeps its default, which is that of the paper's T12."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Begin with this trained model instead of a new one (fine-tuning)."}
    )

    def __post_init__(self) -> None:
        if self.model_name_or_path is not None and not self.model_name_or_path.strip():
            raise ValueError("model_name_or_path is empty; give a folder or a Hub id, or leave it out")
        if self.vocab_size is not None and self.vocab_size < 256:
            raise ValueError(f"vocab_size is {self.vocab_size}; text is bytes, so it must be 256 or more")

    def config_fields(self) -> dict[str, Any]:
        """The given fields, as `CharformerConfig` takes them.

        Raises:
            ValueError: If a field is given as text, like the weights of terms on the command line, that cannot be read.
        """
        given = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "model_name_or_path"}
        return {name: _config_value(name, value) for name, value in given.items() if value is not None}


# Recipes are checked against the types that the configuration declares.
CONFIG_TYPES: dict[str, Any] = {
    item.name: item.type for item in fields(CharformerConfig) if item.name in {name for name, *_ in _config_fields()}
}


def _config_value(name: str, value: Any) -> Any:
    members = get_args(CONFIG_TYPES[name])
    has_list = any(get_origin(member) is list for member in members)
    if any(get_origin(member) is dict for member in members) and isinstance(value, str):
        value = read_yaml(value, name)
        check_type(name, value, CONFIG_TYPES[name])
        return value
    if has_list and str in members:
        return _layer_choice(name, value)
    if has_list and int in members and isinstance(value, list) and len(value) == 1:
        return value[0]
    return value


def _layer_choice(name: str, value: str | list[str | int]) -> str | list[int] | None:
    words = [value] if isinstance(value, str | int) else list(value)
    if len(words) == 1 and words[0] in _LAYER_WORDS:
        return None if words[0] == "none" else str(words[0])
    try:
        return [int(word) for word in words]
    except ValueError:
        # Those who write `2,9` want the numbers in it.
        numbers = re.findall(r"\d+", " ".join(map(str, words)), re.ASCII) or ["1", "2"]
        raise ValueError(
            f"{name} is {shown(name, words[0] if len(words) == 1 else words)}; give 'all', 'none', or layer numbers, on the command line as --{name}"
            f" {' '.join(numbers)}, in a recipe as [{', '.join(numbers)}]"
        ) from None


@dataclass
class DataArguments:
    """Where the text comes from and how it is split."""

    data_path: str | None = field(
        default=None,
        metadata={
            "help": "The text: a text file, a table (JSON lines, CSV, parquet) with a text_column, a folder of such files,"
            f" or '{STANDARD_LIBRARY}' for the sources of Python's standard library."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "The text, instead of data_path: a dataset's Hub id, or any other name that datasets.load_dataset takes."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "The dataset's configuration."})
    dataset_split: str = field(default="train", metadata={"help": "The dataset's split to read."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Read the dataset while it downloads, without keeping a copy of it."}
    )
    text_column: str = field(
        default="text", metadata={"help": "The column of a dataset or a table that holds the text."}
    )
    document_separator: str = field(
        default="\n",
        metadata={"help": "Text put between two files of a folder, or between two rows of a dataset or table."},
    )
    train_share: float = field(
        default=SHARES[0], metadata={"help": "Share of the text to train on, taken from its beginning."}
    )
    validation_share: float = field(
        default=SHARES[1],
        metadata={
            "help": "Share of the text to evaluate on, taken after the train split; the rest is the test split, never read."
        },
    )
    max_eval_bytes: int | None = field(
        default=None,
        metadata={
            "help": "Evaluate on this many bytes from the start of the validation split; by default on all of it."
        },
    )

    def __post_init__(self) -> None:
        for name in ("data_path", "dataset_name"):
            if getattr(self, name) is not None and not getattr(self, name).strip():
                raise ValueError(f"{name} is empty; give the text to train on, or leave it out")
        if (self.data_path is None) == (self.dataset_name is None):
            given = "neither is given" if self.data_path is None else "both are given"
            raise ValueError(f"give one of data_path and dataset_name, the text to train on; {given}")
        check_text("document_separator", self.document_separator)
        check_shares(self.train_share, self.validation_share)
        if self.max_eval_bytes is not None and self.max_eval_bytes < 2:
            raise ValueError(f"max_eval_bytes is {self.max_eval_bytes}; it must be 2 or more")

    @property
    def source(self) -> str:
        """A name of the corpus for logs and cards, safe to print and to write in UTF-8."""
        if self.data_path == STANDARD_LIBRARY:
            return f"Python {sysconfig.get_python_version()} standard library sources"
        if self.data_path is not None:
            return _name_of(self.data_path)
        name = self.dataset_name or ""
        name = (
            _name_of(name) if Path(name).exists() else one_line(name)
        )  # a local folder's place is its owner's business
        return "/".join(part for part in (name, self.dataset_config, self.dataset_split) if part)


def _name_of(path: str) -> str:
    return one_line(Path(path).name or Path(path).expanduser().resolve().name or "/")


def check_text(name: str, value: str) -> None:
    """Refuse text that is not UTF-8, like an argument of raw bytes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is {shown(name, value)}; it must be text in UTF-8") from None


def check_shares(train: float, validation: float) -> None:
    """Refuse shares that do not split a corpus in three.

    Raises:
        ValueError: If one is out of its range, or their sum is above 1.
    """
    if not 0 < train < 1:
        raise ValueError(f"train_share is {train}; it must be above 0 and below 1")
    if not 0 < validation <= 1:
        raise ValueError(f"validation_share is {validation}; it must be above 0, and 1 at most")
    if train + validation > 1 + 1e-9:
        raise ValueError(f"train_share ({train}) and validation_share ({validation}) come to more than 1")


@dataclass
class RunArguments:
    """What a run does in addition to training."""

    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Delete the model and checkpoints that output_dir already holds."}
    )
    resume: str = field(
        default="never",
        metadata={
            "help": "'auto' resumes from the newest good checkpoint of output_dir, or begins if there is none, or does"
            " nothing if the run is complete; a checkpoint's folder resumes from that one; 'never' begins anew."
        },
    )
    accept_changes: list[str] = field(
        default_factory=list,
        metadata={"help": "Settings, such as learning_rate, that may differ from those of the resumed run."},
    )
    sample_prompt: str = field(default="\n", metadata={"help": "Prompt of the sample texts."})
    sample_length: int = field(
        default=200, metadata={"help": "Length of a sample text in bytes; 0 for no sample texts."}
    )
    compare_ngrams: bool = field(
        default=False,
        metadata={
            "help": "Also report the bits per character of a unigram and a trigram model, counted on the train split."
        },
    )

    def __post_init__(self) -> None:
        check_ranges({"sample_length": self.sample_length})
        check_text("sample_prompt", self.sample_prompt)


@dataclass
class AuxiliaryLossTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, with what `AuxiliaryLossTrainer` adds."""

    log_loss_terms: str = field(
        default="each",
        metadata={
            "help": "'each' logs every term of the loss by name; 'groups', meant for deep models, logs means over the"
            " intermediate layers (loss_layers, loss_layers_target_2).",
            "choices": ["each", "groups"],
        },
    )
    log_term_gradients: int = field(
        default=0,
        metadata={
            "help": "Every so many steps, log the norm of the gradient of each term on the model's body, and its cosine to that"
            " of the main term; 0 for never. It takes about one step more for each term."
        },
    )
    gradient_aggregator: str | None = field(
        default=None,
        metadata={
            "help": "'upgrad' combines the gradients of the terms on the model's body so that none opposes another, with the"
            " package TorchJD; left out, they are added up.",
            "choices": ["upgrad"],
        },
    )
    eval_head_accuracy: bool = field(
        default=False,
        metadata={
            "help": "Whether an evaluation also reports how often each head of a language model is right, and how many tokens a"
            " pass of drafting by the heads would yield. It takes one more forward pass, and that of the heads."
        },
    )
    eval_loss_terms: bool = field(
        default=True,
        metadata={
            "help": "Whether an evaluation also reports the active terms of the auxiliary heads, like"
            " eval_loss_target_2. The heads then run in each evaluation; eval_loss is that of the main head either way."
        },
    )
    log_group_prefix: str = field(
        default="loss_",
        metadata={
            "help": "Prefix of the groups in which TensorBoard, W&B, trackio, MLflow and other loggers show the terms"
            " (loss_terms), their weights, accuracies and gradient norms; 'none' leaves the names to Transformers"
            " (train/loss_next_char)."
        },
    )
    muon: bool = field(
        default=False,
        metadata={
            "help": "Whether Muon trains the linear layers of the model's body, and AdamW the rest, with the same"
            " learning_rate and weight_decay. Each step costs more, but fewer are needed."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Whether nan and inf losses are left out of the logged loss. Off by default: AuxiliaryLossTrainer"
            " stops at such a loss, and looking for it at every step would stall the device."
        },
    )

    enable_jit_checkpoint: bool = field(
        default=True,
        metadata={
            "help": "Whether SIGTERM, SIGHUP and Ctrl-C end the step, write a checkpoint and exit with status 128 + the"
            " signal's number; a second signal exits at once."
        },
    )

    def __post_init__(self) -> None:
        metric = self.metric_for_best_model
        if self.greater_is_better is None and metric:
            lower = lower_is_better(metric)
            if lower is None:
                raise ValueError(
                    f"metric_for_best_model is {shown('', metric)}, a name that does not tell whether higher or lower is"
                    " better; give greater_is_better too, true or false"
                )
            self.greater_is_better = not lower
        numbers = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "max_steps"}
        check_ranges(numbers)  # TrainingArguments checks few numbers itself
        super().__post_init__()
        if self.log_loss_terms not in ("each", "groups"):
            raise ValueError(f"log_loss_terms is {self.log_loss_terms!r}; it must be 'each' or 'groups'")
        if re.fullmatch(r"[\w.-]*", self.log_group_prefix) is None:
            raise ValueError(
                f"log_group_prefix is {shown('', self.log_group_prefix)}; it may hold letters, digits, '_', '-' and '.'"
            )
        if self.muon and self.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
            raise ValueError(
                f"optim is {OptimizerNames(self.optim).value!r} and muon is on: AdamW trains the weights that Muon does"
                " not, so that optim must be 'adamw_torch' or 'adamw_torch_fused'"
            )
        if self.muon and self.optim_args:
            raise ValueError(f"optim_args is {self.optim_args!r} and muon is on, which takes none; leave it out")
        check_optimizer_arguments(self)


@dataclass
class EvaluateArguments:
    """What is evaluated, and how."""

    stride: list[int] = field(
        default_factory=lambda: [1],
        metadata={
            "help": "Number of bytes by which the window slides: 1 is the papers' protocol. Several strides give a table."
        },
    )
    window: int | None = field(
        default=None, metadata={"help": "Length of the window in bytes; by default the longest that the model takes."}
    )
    split: str | None = field(
        default=None,
        metadata={
            "help": f"Part of the text to evaluate on: all, {', '.join(SPLIT_NAMES)}; by default validation for the text that"
            " the model was trained on, and all of any other text.",
            "choices": ["all", *SPLIT_NAMES],
        },
    )
    train_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of the train split, at the beginning of the text; by default as in training, or 0.9."
        },
    )
    validation_share: float | None = field(
        default=None,
        metadata={"help": "Share of the validation split, after the train split; by default as in training, or 0.05."},
    )
    text_column: str = field(default="text", metadata={"help": "The column of a table that holds the text."})
    max_bytes: int | None = field(
        default=None,
        metadata={"help": "Evaluate on this many bytes from the start of the part; by default on all of it."},
    )
    batch_size: int = field(default=32, metadata={"help": "Number of windows in a batch."})
    device: str | None = field(
        default=None, metadata={"help": "Device, such as cpu or cuda; by default the fastest that is available."}
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Type of the model's weights.", "choices": ["float32", "bfloat16", "float16"]},
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write the results to."})
    plots: str | None = field(
        default=None,
        metadata={"help": "A PNG file: bits by position in the window, and by layer, for its classifiers."},
    )
    state_file: str | None = field(
        default=None,
        metadata={"help": "File for the progress, so that the same command continues after an interruption."},
    )

    def __post_init__(self) -> None:
        if self.split not in (None, "all", *SPLIT_NAMES):
            raise ValueError(f"split is {self.split!r}; it must be 'all' or one of {list(SPLIT_NAMES)}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be 'float32', 'bfloat16' or 'float16'")
        for name in ("window", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if wrong := [stride for stride in self.stride if stride < 1]:
            raise ValueError(f"stride is {wrong[0]}; it must be 1 or more")
        if self.max_bytes is not None and self.max_bytes < 2:
            raise ValueError(f"max_bytes is {self.max_bytes}; it must be 2 or more")
        given = (self.train_share, self.validation_share)
        check_shares(*(default if share is None else share for share, default in zip(given, SHARES, strict=True)))
        for name in ("output", "plots", "state_file", "device"):
            if getattr(self, name) == "":
                raise ValueError(f"{name} is empty; leave it out, or give a value")


class Arguments(NamedTuple):
    """The settings of a training run."""

    model: ModelArguments
    data: DataArguments
    run: RunArguments
    training: AuxiliaryLossTrainingArguments
