"""`charformer-train RECIPE.yaml [--field value ...]`: train a Charformer from a recipe, end to end."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import PartialState
from safetensors.torch import load_file
from transformers import TrainerState, default_data_collator, set_seed
from transformers.utils import logging

import modeling_charformer
from modeling_charformer import CharformerConfig, CharformerForCausalLM, CharformerTokenizer

from .arguments import Arguments, ModelArguments, RunArguments
from .callbacks import SampleText, sample_text, show_in_use
from .command_help import how_to_begin
from .data import ConsecutiveWindows, RandomWindows, Split, load_corpus, split_corpus
from .files import check_regular, whole_file, whole_files
from .history import is_evaluation
from .locks import LOCK_FILE
from .manifest import newest_good, write_result
from .ngrams import ngram_bits_per_byte
from .plots import PICTURE
from .pretrained import check_batches, load_language_model, read_config
from .pushing import COMMAND, RESULT, card_of
from .recipes import USAGE, parse_arguments
from .resuming import only_run
from .run_folder import METRICS, RUN_FILES, SAMPLES, Start, plan_start, record_run
from .run_settings import check_accepted, check_same_settings
from .stopping import StoppedBySignal
from .terminal import USER_ERRORS, printable, report_error, use_safe_streams
from .trainer import AuxiliaryLossTrainer
from .units import count_characters, is_utf8


logger = logging.get_logger(__name__)

_OWN_FILES = (
    *RUN_FILES,
    "trainer_state.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer_config.json",
)

# Fields that fine-tuning cannot change, since the weights have their shape or were trained with them.
SHAPE_FIELDS = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "norm_placement",
}


def build_model(arguments: ModelArguments) -> CharformerForCausalLM:
    """A new model with the given fields, or a trained model to fine-tune with the given losses.

    Raises:
        ValueError: If a given field differs from the architecture of the model to fine-tune.
    """
    settings, name = arguments.config_fields(), arguments.model_name_or_path
    if name is None:
        return CharformerForCausalLM(CharformerConfig(**settings))
    config = read_config(name, "model_name_or_path")
    # New residual blocks start as the identity, so linear heads can get them. Trained blocks cannot change their shape.
    fixed = SHAPE_FIELDS if config.target_heads == "linear" else SHAPE_FIELDS | {"target_heads"}
    for field_name in fixed & settings.keys():
        if settings[field_name] != getattr(config, field_name):
            raise ValueError(
                f"{field_name} is {settings[field_name]!r}, but the model to fine-tune, {name}, has"
                f" {getattr(config, field_name)!r}; leave its architecture as it is"
            )
    return load_language_model(name, "model_name_or_path", **settings)


def build_trainer(
    arguments: Arguments, model: CharformerForCausalLM, tokenizer: CharformerTokenizer, splits: dict[str, Split]
) -> AuxiliaryLossTrainer:
    """The Trainer of a run, with its windows and callbacks."""
    _, data, run, training = arguments
    window = model.config.max_position_embeddings
    num_windows = (
        training.max_steps
        * training.gradient_accumulation_steps
        * training.train_batch_size
        * max(1, training.world_size)
    )
    seed = training.seed if training.data_seed is None else training.data_seed
    trainer = AuxiliaryLossTrainer(
        model=model,
        args=training,
        train_dataset=RandomWindows(splits["train"], window, num_windows, seed, num_windows // training.max_steps),
        eval_dataset=ConsecutiveWindows(splits["validation"], window, data.max_eval_bytes),
        data_collator=default_data_collator,
        processing_class=tokenizer,
    )
    trainer.test_dataset = splits["test"]
    metric = training.metric_for_best_model or ""
    if metric.endswith("bpc") and not is_utf8(splits["validation"].data[: data.max_eval_bytes]):
        raise ValueError(
            f"metric_for_best_model is {metric!r}; the text is not UTF-8, so it must be eval_bpb or eval_loss"
        )
    if metric.endswith(("bpb", "bpc")) and model.config.vocab_size != 256:
        raise ValueError(
            f"metric_for_best_model is {metric!r}; with vocab_size={model.config.vocab_size} it must be eval_loss, since only"
            " a model of bytes alone is evaluated in bits"
        )
    show_in_use(trainer, window * num_windows // training.max_steps)
    if run.sample_length:
        length = len(run.sample_prompt.encode())
        if not 1 <= length < window:
            raise ValueError(
                f"sample_prompt has {length} bytes; it needs 1 to {window - 1}, fewer than max_position_embeddings={window}"
            )
        samples = Path(str(training.output_dir)) / SAMPLES
        trainer.add_callback(SampleText(tokenizer, samples, run.sample_prompt, run.sample_length, training.seed))
    return trainer


def _holds_special_symbols(corpus: np.ndarray) -> bool:
    """Whether a corpus holds the bytes 253 to 255, which stand for bos, eos and pad and never occur in UTF-8."""
    step = 2**24
    return any(bool((corpus[start : start + step] >= 0xFD).any()) for start in range(0, len(corpus), step))


def train(arguments: Arguments, command: Sequence[str] = ()) -> dict[str, Any]:
    """Train and evaluate, and write all results into the output folder. Returns the metrics.

    Args:
        arguments: The settings.
        command: The command line that gave the settings, to be recorded.

    Raises:
        FileExistsError: If `output_dir` holds a link or a folder in place of a file that the run writes.
        ValueError: If `output_dir` holds a model card that cannot be read.
        RuntimeError: If something failed after the trained model was saved. The message says what.
        StoppedBySignal: If a signal ended training. A checkpoint to resume from has been written.
    """
    folder = Path(str(arguments.training.output_dir))
    code = [path.name for path in Path(str(modeling_charformer.__file__)).parent.glob("*.py")]
    check_regular(folder, (*_OWN_FILES, *code), (COMMAND, LOCK_FILE))
    card_of(folder)
    with only_run(arguments.training) as was_killed:
        if was_killed:
            logger.warning("An earlier run in %s was killed", arguments.training.output_dir)
        return _train_alone(arguments, command)


def _train_alone(arguments: Arguments, command: Sequence[str]) -> dict[str, Any]:
    model_arguments, data, run, training = arguments
    folder = Path(str(training.output_dir))
    set_seed(training.seed)
    model = build_model(model_arguments)  # wrong settings raise before the text is read
    check_batches(model.config.to_dict(), training)
    start = plan_start(arguments)
    with training.main_process_first(desc="reading the corpus"):
        corpus = load_corpus(data, training.local_process_index == 0, training.output_dir)
    splits = split_corpus(corpus, data.train_share, data.validation_share, data.source)
    name = model_arguments.model_name_or_path
    if name is None and _holds_special_symbols(corpus):
        for settings in (model.config, model.generation_config):
            settings.pad_token_id = settings.eos_token_id = settings.bos_token_id = None
        if training.process_index == 0:
            print(
                "The corpus is not UTF-8: its bytes 253 to 255 are not pad, eos and bos, so the model has no such symbols"
            )
    tokenizer = CharformerTokenizer.for_model(model.config)
    if name is not None:
        tokenizer = CharformerTokenizer.from_pretrained(name, model_max_length=tokenizer.model_max_length)
    trainer = build_trainer(arguments, model, tokenizer, splits)
    start = _same_run(start, trainer, run)
    if start.complete:
        print(f"The run in {folder} is complete; nothing is left to do")
        return _read_metrics(folder / METRICS)
    if trainer.is_world_process_zero():
        record_run(arguments, command, start)
        _print_beginning(arguments, corpus, splits, model, start)
    if start.trained:
        _take_up_result(trainer, folder)
    else:
        trainer.train(start.resume_from, accept_changes=run.accept_changes)
        _save_model(trainer, folder)
    return _finish(arguments, trainer, tokenizer, splits)


def _read_metrics(path: Path) -> dict[str, Any]:
    try:
        metrics: Any = json.loads(path.read_text(encoding="utf-8"))
    except (RecursionError, ValueError):
        metrics = None
    if not isinstance(metrics, dict):
        raise ValueError(f"{path} is damaged; delete it, and the same command measures the model again")
    return metrics


def _same_run(start: Start, trainer: AuxiliaryLossTrainer, run: RunArguments) -> Start:
    """`start`, after a check of the settings. If accepted changes differ, training goes on from a checkpoint."""
    if not start.trained:
        if start.resume_from is None and run.accept_changes:  # before an earlier model is replaced
            check_accepted(run.accept_changes, trainer.run_settings())
        return start
    folder = Path(str(trainer.args.output_dir))
    if not check_same_settings(folder, start.settings or {}, trainer.run_settings(), run.accept_changes):
        return start
    good, _ = newest_good(folder, max(1, trainer.args.world_size))
    if good is None:
        raise ValueError(f"accept_changes: {folder} holds a trained model, but no checkpoint to go on from")
    return Start(resume_from=str(good.path))


def _print_beginning(
    arguments: Arguments,
    corpus: np.ndarray,
    splits: dict[str, Split],
    model: CharformerForCausalLM,
    start: Start,
) -> None:
    print(f"Corpus: {arguments.data.source}, {len(corpus):,} bytes, split by position")
    for name, split in splits.items():
        print(f"  {name:<10} {len(split.data):>13,} bytes  sha256 {split.sha256}")
    heads = model.num_parameters() - model.without_auxiliary_heads().num_parameters()
    device = arguments.training.device
    print(f"Model: {model.num_parameters():,} parameters, {heads:,} of them used only in training, on {device}")
    if arguments.model.model_name_or_path is not None:
        print(
            f"Fine-tuning {arguments.model.model_name_or_path}: learning rate and losses follow their schedules from the"
            " beginning"
        )
    training = arguments.training
    if training.logging_strategy == "steps" and training.logging_steps > training.max_steps:
        print(
            f"No loss will be logged: logging_steps is {training.logging_steps:g}, and max_steps={training.max_steps} ends"
            " before"
        )
    if start.trained:
        print(f"The trained model is in {arguments.training.output_dir}; what is missing is its evaluation and card")
    elif start.resume_from is not None:
        print(f"Training goes on from {start.resume_from}")
    sys.stdout.flush()


def _take_up_result(trainer: AuxiliaryLossTrainer, folder: Path) -> None:
    """Load the model of an earlier run that ended before all results were written."""
    trainer.accelerator.unwrap_model(trainer.model).load_state_dict(
        load_file(folder / "model.safetensors"), strict=False
    )
    try:
        trainer.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        if not 1 <= trainer.state.global_step <= trainer.state.max_steps:
            raise ValueError("its steps are not those of a run")
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'trainer_state.json'} is missing or damaged; --overwrite_output_dir begins the run anew"
        ) from error
    trainer.state.init_training_references(trainer, trainer.state.max_steps, trainer.state.num_train_epochs, None)


def _save_model(trainer: AuxiliaryLossTrainer, folder: Path) -> None:
    """Save the trained model before anything else can fail. Its files appear only when all of them are written."""
    trainer.accelerator.unwrap_model(trainer.model).config.use_cache = True  # the Trainer has switched it off
    if not trainer.args.should_save:
        trainer.save_model(
            str(folder), _internal_call=True
        )  # takes part where weights are gathered from all processes
        return
    with whole_files(folder) as scratch:
        trainer.save_model(str(scratch), _internal_call=True)
        trainer.state.save_to_json(str(scratch / "trainer_state.json"))
    write_result(folder / RESULT, trainer.run_settings(), complete=False)


def _finish(
    arguments: Arguments, trainer: AuxiliaryLossTrainer, tokenizer: CharformerTokenizer, splits: dict[str, Split]
) -> dict[str, Any]:
    """Evaluate, then write the metrics and the card, and push. A failure is reported after the rest is done."""
    _, data, run, training = arguments
    folder, failed = Path(str(training.output_dir)), Failures()
    metrics: dict[str, Any] = {}
    with failed.told("the evaluation"):
        metrics = _evaluate(arguments, trainer, splits)
        if not math.isfinite(metrics["eval_loss"]):
            raise FloatingPointError("the trained model's validation loss is not finite")
    if training.should_save and metrics:
        with failed.told(METRICS), whole_file(folder / METRICS) as file:
            described = {name: (len(split.data), split.sha256) for name, split in splits.items()}
            results = {**metrics, "data": data.source, "splits": described}
            file.write((json.dumps(results, indent=2) + "\n").encode())
    if training.should_save:
        with failed.told("the card and its picture"), whole_files(folder) as scratch:
            trainer.state.save_to_json(str(scratch / "trainer_state.json"))
            trainer.write_card(scratch)
    if training.push_to_hub:
        with failed.told("the push"):
            commit = trainer.push_to_hub()
            if commit is not None:
                print(f"\nOn the Hub: {commit.commit_url}", flush=True)
    if metrics:
        with failed.told("the summary"):
            model = trainer.accelerator.unwrap_model(trainer.model)
            length = run.sample_length
            # All processes write the sample, since the weights may be spread over them.
            text = sample_text(model, tokenizer, run.sample_prompt, length, training.seed) if length else ""
            if training.should_save:
                print(_summary(folder, metrics, text), flush=True)
    if training.should_save and not failed.messages:
        write_result(folder / RESULT, trainer.run_settings(), complete=True)
    if failed.messages:
        raise RuntimeError(f"the trained model is whole in {folder}, but " + "; ".join(failed.messages))
    return metrics


class Failures:
    """Collects messages about what failed after training."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextlib.contextmanager
    def told(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any kind: the weights are saved, and the rest must still be written
            logger.debug("traceback", exc_info=True)
            self.messages.append(f"{what} failed: {str(error) or type(error).__name__}")


def _evaluate(arguments: Arguments, trainer: AuxiliaryLossTrainer, splits: dict[str, Split]) -> dict[str, Any]:
    metrics = _final_evaluation(trainer)
    evaluated = splits["validation"].data[: arguments.data.max_eval_bytes]
    metrics["eval_bytes"] = len(evaluated)
    if arguments.run.compare_ngrams:
        metrics |= _compare_ngrams(splits["train"].data, evaluated)
    return metrics


def _final_evaluation(trainer: AuxiliaryLossTrainer) -> dict[str, Any]:
    step = trainer.state.global_step
    if trainer.args.load_best_model_at_end:  # the weights are those of an earlier step
        return {"step": trainer.state.best_global_step, **trainer.evaluate()}
    done = [entry for entry in trainer.state.log_history if entry["step"] == step and is_evaluation(entry)]
    return {"step": step, **(done[-1] if done else trainer.evaluate())}


def _compare_ngrams(train: np.ndarray, text: np.ndarray) -> dict[str, float]:
    per_byte, unit = (count_characters(text) / (len(text) - 1), "bpc") if is_utf8(text) else (1.0, "bpb")
    return {
        f"{name}_{unit}": ngram_bits_per_byte(train, text, order) / per_byte
        for name, order in (("unigram", 1), ("trigram", 3))
    }


def _summary(folder: Path, metrics: dict[str, Any], text: str) -> str:
    unit, of = ("bpc", "bits per character") if "eval_bpc" in metrics else ("bpb", "bits per byte")
    if "eval_bpb" not in metrics:  # of a vocabulary that holds more than the bytes
        unit, of = "loss", "nats per token"
    bits = metrics[f"eval_{unit}"]
    lines = ["", f"Validation: {bits:.3f} {of} (first {metrics['eval_bytes']:,} bytes of the split)"]
    lines += [
        f"  counted {name:<8} {metrics[key]:.3f}" + ("" if bits < metrics[key] else "  (not beaten)")
        for name in ("trigram", "unigram")
        if (key := f"{name}_{unit}") in metrics
    ]
    if text:
        lines += ["", "The model writes:", *(f"  | {line}" for line in printable(text).strip("\n").split("\n"))]
    lines += [
        "",
        f"Every loss term in a picture: {folder / PICTURE}",
        f"Model card:                   {folder / 'README.md'}",
        "",
        "Load it with:",
        "  import modeling_charformer; from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"  model = AutoModelForCausalLM.from_pretrained({str(folder)!r})",
        f"  tokenizer = AutoTokenizer.from_pretrained({str(folder)!r})",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The console program; returns its exit status."""
    arguments, words = None, list(sys.argv[1:] if argv is None else argv)
    use_safe_streams(for_a_run=True)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # a log file holds lines
    if not words:
        print(how_to_begin(USAGE), file=sys.stderr)
        return 2
    try:
        arguments = parse_arguments(words)
        train(arguments, ["charformer-train", *words])
        # Otherwise gloo's threads, which may still hold tensors, can abort the process when the interpreter ends.
        PartialState().destroy_process_group()
    except StoppedBySignal as stopped:
        print(f"\ncharformer-train: {stopped}. {_how_to_resume(arguments)}", file=sys.stderr, flush=True)
        PartialState().destroy_process_group()
        return int(stopped.code or 1)
    except KeyboardInterrupt:
        print(f"\nInterrupted. {_how_to_resume(arguments)}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        report_error("charformer-train", error)
        return 1
    return 0


def _how_to_resume(arguments: Arguments | None) -> str:
    if arguments is None:
        return "Nothing had begun."
    return f"The same command with --resume auto goes on from the last checkpoint in {arguments.training.output_dir}."


if __name__ == "__main__":
    sys.exit(main())
