"""Load trained models from a folder or the Hub, after a check that they fit into memory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedConfig, TrainingArguments

from modeling_charformer import CharformerConfig, CharformerForCausalLM
from modeling_charformer.configuration_charformer import SIZES, parameter_counts

from .checks import shown
from .terminal import one_line


_SIZES = (*SIZES, "num_targets")
# The paper's largest model has 64. Building a layer takes time and memory even if it is tiny.
_MAX_LAYERS = 2_000


def check_size(fields: Mapping[str, Any]) -> None:
    """Refuse an architecture whose weights this machine cannot hold, before anything is built.

    Args:
        fields: Fields of a `CharformerConfig`. Those that are missing have its defaults.

    Raises:
        ValueError: Names the fields, their values and what is accepted.
    """
    sizes = {name: fields.get(name, getattr(CharformerConfig, name)) for name in _SIZES}
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {shown(name, value)}; it must be a whole number of 1 or more")
    if sizes["num_hidden_layers"] > _MAX_LAYERS:
        raise ValueError(f"num_hidden_layers is {sizes['num_hidden_layers']:,}; it must be {_MAX_LAYERS:,} or fewer")
    parameters = sum(parameter_counts(fields).values())
    needed, memory = 4 * parameters, _memory()
    if needed > memory:
        given = ", ".join(
            f"{name}={sizes[name]:,}" for name in _SIZES if sizes[name] != getattr(CharformerConfig, name)
        )
        raise ValueError(
            f"a model with {given} has about {parameters:,} parameters, {needed / 1e9:,.0f} GB in float32; it must fit into"
            f" the {memory / 1e9:,.0f} GB of memory here"
        )


def check_batches(fields: Mapping[str, Any], training: TrainingArguments) -> None:
    """Refuse batches that this machine cannot hold: the ids and labels of a whole step, and on a CPU one batch's logits.

    Raises:
        ValueError: Names the fields, their values and what is accepted.
    """
    window, vocab_size = (
        fields.get(name, getattr(CharformerConfig, name)) for name in ("max_position_embeddings", "vocab_size")
    )
    batch_size, accumulated = training.per_device_train_batch_size, training.gradient_accumulation_steps
    of_logits = 4 * vocab_size if training.device.type == "cpu" else 0
    needed, memory = batch_size * window * (16 * accumulated + of_logits), _memory()
    if needed > memory:
        steps = f" and gradient_accumulation_steps is {accumulated:,}" if accumulated > 1 else ""
        raise ValueError(
            f"per_device_train_batch_size is {batch_size:,}{steps}: with max_position_embeddings={window:,} a step needs more"
            f" than {needed / 1e9:,.0f} GB; it must fit into the {memory / 1e9:,.0f} GB of memory here"
        )


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not a POSIX system
        return 1 << 40


def read_config(name: str, field: str = "model") -> CharformerConfig:
    """The configuration of a trained Charformer language model.

    Args:
        name: A folder or a Hub id.
        field: The name of the option that gives it, for errors.

    Raises:
        FileNotFoundError: If there is no such folder, and the Hub has no such model or cannot be reached.
        ValueError: If it is another model, its `config.json` is damaged, or the model is too large for this machine.
    """
    if not name.strip():
        raise ValueError(f"{field} is empty; give a folder or a Hub id")
    label, path = one_line(name), Path(name).expanduser()
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        raise FileNotFoundError(f"{field}: {label} is not the folder of a model: it holds no config.json")
    try:
        values, _ = PreTrainedConfig.get_config_dict(str(path) if path.is_dir() else name)
        kind, heads = values.get("model_type"), values.get("architectures") or []
    except HFValidationError:
        raise FileNotFoundError(f"{field}: there is no folder {label!r} (from {one_line(os.getcwd())})") from None
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{field}: the config.json of {label} is damaged: {_first_line(error)}") from error
    except OSError as error:
        if path.is_dir():
            raise ValueError(f"{field}: the config.json of {label} is damaged: {_first_line(error)}") from error
        raise FileNotFoundError(
            f"{field}: there is no folder {label!r} (from {one_line(os.getcwd())}), and the Hub has no such model or"
            " cannot be reached"
        ) from error
    if kind != "charformer":
        raise ValueError(f"{field}: {label} is a model of type {shown('', kind)}; it must be a Charformer")
    if heads and CharformerForCausalLM.__name__ not in heads:
        raise ValueError(
            f"{field}: {label} is a {shown('', heads[0])}; it must be a language model, CharformerForCausalLM"
        )
    try:
        check_size(values)
        return CharformerConfig.from_pretrained(str(path) if path.is_dir() else name)
    except (AttributeError, KeyError, OSError, StrictDataclassError, TypeError, ValueError) as error:
        raise ValueError(f"{field}: the config.json of {label} is not accepted: {_first_line(error)}") from error


def load_language_model(name: str, field: str = "model", **settings: Any) -> CharformerForCausalLM:
    """The trained language model of a folder or Hub id, with all the weights that it needs.

    Args:
        name: A folder or a Hub id.
        field: The name of the option that gives it, for errors.
        settings: Keyword arguments of `from_pretrained`, such as `dtype` or fields of the configuration.

    Raises:
        FileNotFoundError: Like `read_config`.
        ValueError: Like `read_config`; if the weights are missing, damaged, or of another architecture.
    """
    read_config(name, field)
    label, path = one_line(name), Path(name).expanduser()
    try:
        loaded: Any = CharformerForCausalLM.from_pretrained(
            str(path) if path.is_dir() else name, output_loading_info=True, **settings
        )
    except StrictDataclassError as error:
        raise ValueError(_first_line(error)) from error
    except SafetensorError as error:
        raise ValueError(f"{field}: the weights of {label} are damaged or truncated ({_first_line(error)})") from error
    except OSError as error:
        raise FileNotFoundError(f"{field}: the weights of {label} cannot be read: {_first_line(error)}") from error
    except RuntimeError as error:
        reason = "their shapes differ" if "ignore_mismatched_sizes" in str(error) else _first_line(error)
        raise ValueError(f"{field}: the weights of {label} are not those of its config.json: {reason}") from error
    except (ImportError, MemoryError, ValueError):
        raise
    except Exception as error:  # pickles and indices raise errors of many kinds
        raise ValueError(
            f"{field}: the weights of {label} cannot be read: {type(error).__name__}, {_first_line(error)}"
        ) from error
    model: CharformerForCausalLM
    model, info = loaded
    missing = [key for key in info["missing_keys"] if key.startswith(("model.", "lm_head."))]
    if missing:
        raise ValueError(
            f"{field}: {label} lacks weights of a language model: {missing[0]} and {len(missing) - 1} more"
        )
    return model


def _first_line(error: BaseException) -> str:
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # this error's message begins with the name of a check
    return one_line(str(error).strip().split("\n")[0])[:500] or type(error).__name__
