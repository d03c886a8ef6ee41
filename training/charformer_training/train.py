"""`charformer-train RECIPE.yaml [--field value ...]`: train a Charformer from a recipe, end to end."""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import PartialState
from huggingface_hub.errors import StrictDataclassError
from transformers import default_data_collator, set_seed
from transformers.utils import logging

from modeling_charformer import CharformerConfig, CharformerForCausalLM, CharformerTokenizer

from .arguments import Arguments, AuxiliaryLossTrainingArguments, ModelArguments, RunArguments
from .callbacks import SampleText, sample_text, show_in_use
from .checkpoints import last_complete_checkpoint
from .command_help import how_to_begin
from .data import ConsecutiveWindows, RandomWindows, Split, load_corpus, split_corpus
from .files import whole_files
from .history import is_evaluation
from .ngrams import ngram_bits_per_byte
from .plots import PICTURE
from .pretrained import load_language_model, read_config
from .recipes import USAGE, parse_arguments
from .terminal import error_message, printable, use_safe_streams
from .trainer import AuxiliaryLossTrainer
from .units import count_characters, is_utf8


logger = logging.get_logger(__name__)


# What fine-tuning cannot change: the weights' shapes and what they were trained to do.
SHAPE_FIELDS = {
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "norm_placement",
}
# What a run leaves in its folder, apart from checkpoint-* folders.
MODEL_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")


def check_output_dir(run: RunArguments, training: AuxiliaryLossTrainingArguments) -> list[Path]:
    """Refuse to write over another model, unless the run goes on from there or was asked to.

    Sets `resume_from_checkpoint` when `resume_from_last` is asked for. Returns what a run that was asked to overwrite
    is to delete, once nothing else can be wrong.

    Raises:
        FileExistsError: If the folder holds a model or checkpoints.
        ValueError: If it holds no complete checkpoint to resume from.
    """
    folder = Path(str(training.output_dir))
    if run.resume_from_last:
        training.resume_from_checkpoint = last_complete_checkpoint(folder)
        if training.resume_from_checkpoint is None:
            raise ValueError(f"resume_from_last: {folder} holds no complete checkpoint")
    held = [path for name in MODEL_FILES if (path := folder / name).exists()] + sorted(folder.glob("checkpoint-*"))
    resumed = training.resume_from_checkpoint
    if not held or (resumed and Path(resumed).resolve().parent == folder.resolve()):
        return []
    if not run.overwrite_output_dir:
        raise FileExistsError(
            f"output_dir {folder} already holds a model ({held[0].name}). Give another output_dir, go on from its last"
            " checkpoint with --resume_from_last, or replace it with --overwrite_output_dir"
        )
    return [*held, folder / "samples.jsonl"]


def build_model(arguments: ModelArguments) -> CharformerForCausalLM:
    """A new model from the given fields, or the model to fine-tune with the given losses.

    Raises:
        ValueError: If a field of the architecture is not that of the model to fine-tune.
    """
    settings, name = arguments.config_fields(), arguments.model_name_or_path
    if name is None:
        return CharformerForCausalLM(CharformerConfig(**settings))
    config = read_config(name, "model_name_or_path")
    # Blocks begin as the identity, so linear heads can be given some; blocks that were trained have no other shape.
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
    metric = training.metric_for_best_model or ""
    if metric.endswith("bpc") and not is_utf8(splits["validation"].data[: data.max_eval_bytes]):
        raise ValueError(
            f"metric_for_best_model is {metric!r}; the text is not UTF-8, so it must be eval_bpb or eval_loss"
        )
    show_in_use(trainer, window * num_windows // training.max_steps)
    if run.sample_length:
        length = len(run.sample_prompt.encode())
        if not 1 <= length < window:
            raise ValueError(
                f"sample_prompt has {length} bytes; it needs 1 to {window - 1}, fewer than max_position_embeddings={window}"
            )
        samples = Path(str(training.output_dir)) / "samples.jsonl"
        trainer.add_callback(SampleText(tokenizer, samples, run.sample_prompt, run.sample_length, training.seed))
    return trainer


def _holds_special_symbols(corpus: np.ndarray) -> bool:
    """Whether a corpus, of bytes, has some that stand for pad, eos or bos and that no UTF-8 text contains."""
    step = 2**24
    return any(bool((corpus[start : start + step] >= 0xFD).any()) for start in range(0, len(corpus), step))


def train(arguments: Arguments) -> dict[str, Any]:
    """Run a recipe: data, model, training, evaluation, and the folder with all results. Returns the metrics."""
    model_arguments, data, run, training = arguments
    set_seed(training.seed)
    model = build_model(model_arguments)  # wrong settings raise before the text is read
    replaced = check_output_dir(run, training)
    with training.main_process_first(desc="reading the corpus"):
        corpus = load_corpus(data, training.local_process_index == 0, training.output_dir)
    splits = split_corpus(corpus, data.train_share, data.validation_share, data.source)
    name = model_arguments.model_name_or_path
    if name is None and _holds_special_symbols(corpus):
        for settings in (model.config, model.generation_config):
            settings.pad_token_id = settings.eos_token_id = settings.bos_token_id = None
        if training.process_index == 0:
            print("The corpus is no UTF-8 text: its bytes 253 to 255 are not pad, eos and bos, so the model has none")
    tokenizer = CharformerTokenizer.for_model(model.config)
    if name is not None:
        tokenizer = CharformerTokenizer.from_pretrained(name, model_max_length=tokenizer.model_max_length)
    trainer = build_trainer(arguments, model, tokenizer, splits)
    Path(str(training.output_dir)).mkdir(parents=True, exist_ok=True)

    if trainer.is_world_process_zero():
        print(f"Corpus: {data.source}, {len(corpus):,} bytes, split by position")
        for name, split in splits.items():
            print(f"  {name:<10} {len(split.data):>13,} bytes  sha256 {split.sha256}")
        heads = model.num_parameters() - model.without_auxiliary_heads().num_parameters()
        print(
            f"Model: {model.num_parameters():,} parameters, {heads:,} of them for training only, on {training.device}",
            flush=True,
        )
        for path in replaced:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    metrics = _final_evaluation(trainer)
    if not math.isfinite(metrics["eval_loss"]):
        raise FloatingPointError("the trained model's validation loss is not finite; the model is not saved")
    evaluated = splits["validation"].data[: data.max_eval_bytes]
    metrics["eval_bytes"] = len(evaluated)
    if run.compare_ngrams:
        metrics |= _compare_ngrams(splits["train"].data, evaluated)
    _save_results(arguments, trainer, tokenizer, splits, metrics)
    if training.push_to_hub:
        commit = trainer.push_to_hub()
        if commit is not None:
            print(f"\nOn the Hub: {commit.commit_url}", flush=True)
    return metrics


def _final_evaluation(trainer: AuxiliaryLossTrainer) -> dict[str, Any]:
    step = trainer.state.global_step
    if trainer.args.load_best_model_at_end:  # the weights are not those of the last step
        return {"step": trainer.state.best_global_step, **trainer.evaluate()}
    done = [entry for entry in trainer.state.log_history if entry["step"] == step and is_evaluation(entry)]
    return {"step": step, **(done[-1] if done else trainer.evaluate())}


def _compare_ngrams(train: np.ndarray, text: np.ndarray) -> dict[str, float]:
    per_byte, unit = (count_characters(text) / (len(text) - 1), "bpc") if is_utf8(text) else (1.0, "bpb")
    return {
        f"{name}_{unit}": ngram_bits_per_byte(train, text, order) / per_byte
        for name, order in (("unigram", 1), ("trigram", 3))
    }


def _save_results(
    arguments: Arguments,
    trainer: AuxiliaryLossTrainer,
    tokenizer: CharformerTokenizer,
    splits: dict[str, Split],
    metrics: dict[str, Any],
) -> None:
    """Everything a run leaves in its folder; the files appear only when all of them are written."""
    _, data, run, training = arguments
    folder = Path(str(training.output_dir))
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.config.use_cache = True  # the Trainer switches it off, also for those who load the model
    if not training.should_save:
        trainer.save_model(str(folder), _internal_call=True)  # joins in where weights are gathered from all processes
        return
    with whole_files(folder) as scratch:
        trainer.save_model(str(scratch), _internal_call=True)
        trainer.state.save_to_json(str(scratch / "trainer_state.json"))
        described = {name: (len(split.data), split.sha256) for name, split in splits.items()}
        results = {**metrics, "data": data.source, "splits": described}
        (scratch / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        trainer.write_card(scratch)
    text = (
        sample_text(model, tokenizer, run.sample_prompt, run.sample_length, training.seed) if run.sample_length else ""
    )
    print(_summary(folder, metrics, text), flush=True)


def _summary(folder: Path, metrics: dict[str, Any], text: str) -> str:
    unit, of = ("bpc", "character") if "eval_bpc" in metrics else ("bpb", "byte")
    bits = metrics[f"eval_{unit}"]
    lines = ["", f"Validation: {bits:.3f} bits per {of} (first {metrics['eval_bytes']:,} bytes of the split)"]
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
    arguments = None
    words = sys.argv[1:] if argv is None else argv
    use_safe_streams()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()  # a log file holds lines
    if not words:
        print(how_to_begin(USAGE), file=sys.stderr)
        return 2
    try:
        arguments = parse_arguments(words)
        train(arguments)
        # Left to the end of the interpreter, threads of gloo that still hold tensors now and then abort the process.
        PartialState().destroy_process_group()
    except KeyboardInterrupt:
        print(f"\nInterrupted. {_how_to_resume(arguments)}", file=sys.stderr)
        return 130
    except (StrictDataclassError, FloatingPointError, OSError, ValueError) as error:
        logger.debug("traceback", exc_info=True)
        print(
            f"\ncharformer-train: error: {error_message(error)}", file=sys.stderr
        )  # a progress bar may hold the line
        return 1
    return 0


def _how_to_resume(arguments: Arguments | None) -> str:
    if arguments is None:
        return "Nothing had begun."
    folder = str(arguments.training.output_dir)
    last = last_complete_checkpoint(folder)
    if last is None:
        return f"No checkpoint had been written to {folder} yet (save_steps={arguments.training.save_steps})."
    return f"The last checkpoint is {last}; give the same command with --resume_from_last to go on from there."


if __name__ == "__main__":
    sys.exit(main())
