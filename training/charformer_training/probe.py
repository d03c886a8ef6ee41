"""The structure of a model of Transformers, found by running it on a small input and not by its name."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from .models import evaluating


class Call(NamedTuple):
    """A call of a module that is not inside a layer: its name, its first input and its output."""

    name: str
    given: Tensor
    returned: Tensor


@dataclass(frozen=True)
class Trace:
    """What a model did with `inputs` in evaluation mode."""

    inputs: dict[str, Tensor]
    outputs: ModelOutput
    layer_lists: dict[str, list[Tensor]]
    """The outputs of the modules of each module list, by the list's name, in the order of the calls."""
    calls: list[Call]
    embeddings_input: Tensor | None
    """What the output embeddings were given, where the last hidden state has other positions, like the streams of Gemma 3n."""

    @property
    def last(self) -> Tensor:
        """What the model's own head reads."""
        return self.states[-1] if self.embeddings_input is None else self.embeddings_input

    @property
    def states_name(self) -> str:
        """The field of the output that holds the outputs of the layers that heads may read."""
        return "decoder_hidden_states" if "decoder_hidden_states" in self.outputs else "hidden_states"

    @property
    def states(self) -> tuple[Tensor, ...]:
        return cast(tuple[Tensor, ...], self.outputs[self.states_name])

    @property
    def ids_name(self) -> str | None:
        """The input that holds the ids of the tokens at the positions of `states`; `None` if there are no tokens."""
        return next((name for name in ("decoder_input_ids", "input_ids") if name in self.inputs), None)

    def described(self) -> str:
        """The inputs in words, like `input_ids (1, 6)`."""
        return ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.inputs.items())

    @property
    def logits(self) -> Tensor:
        return cast(Tensor, self.outputs["logits"])


def trace_of(model: PreTrainedModel) -> Trace:
    """Run the model on a small input.

    Raises:
        ValueError: If it does not run on ids, an image or sounds alone, or does not return logits and hidden states.
    """
    name, inputs = type(model).__name__, probe_inputs(model)
    with looking_at(model), _watched(model) as (layer_lists, calls):
        try:
            outputs: Any = model(**inputs, **no_cache(model), output_hidden_states=True, return_dict=True)
        except Exception as error:
            raise ValueError(
                f"{name} does not run on {' and '.join(inputs)} alone, so its layers cannot be found:"
                f" {type(error).__name__}: {error}"
            ) from error
    if not isinstance(outputs, ModelOutput) or not isinstance(outputs.get("logits"), Tensor):
        raise ValueError(f"{name} returns no logits, so there is no main loss that the auxiliary losses could go with")
    trace = Trace(inputs, outputs, layer_lists, calls, None)
    states = outputs.get(trace.states_name)
    if not isinstance(states, tuple | list) or not states or not all(isinstance(state, Tensor) for state in states):
        raise ValueError(f"{name} returns no hidden states, so heads on its layers have no input")
    embeddings = model.get_output_embeddings()
    own = next((module_name for module_name, module in model.named_modules() if module is embeddings), None)
    positions, given = trace.logits.shape[:-1], [call.given for call in calls if call.name == own]
    if given and given[-1].shape[:-1] == positions != states[-1].shape[:-1]:
        return replace(trace, embeddings_input=given[-1])
    return trace


# ---- Small inputs ----


def probe_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """The smallest inputs on which the model runs: six ids, one image, or a sound; a decoder gets six ids beside them."""
    accepted = inspect.signature(model.forward).parameters
    name = "input_ids" if "input_ids" in accepted else model.main_input_name
    if "decoder_input_ids" in accepted:
        ids = probe_ids(model)
        if isinstance(end := getattr(model.config, "eos_token_id", None), int):
            ids[0, -2] = end  # where sequence classifiers of encoder-decoders read the decoder
        return {**_encoder_inputs(model, name, ids), "decoder_input_ids": ids}
    return {"pixel_values": _image(model)} if name == "pixel_values" else {"input_ids": probe_ids(model)}


def _encoder_inputs(model: PreTrainedModel, name: str, ids: Tensor) -> dict[str, Tensor]:
    """What an encoder reads: the ids, an image, the spectrogram of a sound, or its samples."""
    config: Any = model.config
    if name == "pixel_values":
        return {name: _image(model)}
    if name == "input_features" and hasattr(config, "num_mel_bins"):  # Whisper accepts one length
        shape: tuple[int, ...] = (1, config.num_mel_bins, 2 * config.max_source_positions)
    elif name == "input_features" and hasattr(config, "input_feat_per_channel"):
        shape = (1, 64, config.input_feat_per_channel)
    elif name in ("input_values", "inputs"):  # half a second
        name, shape = "input_values", (1, 8000)
    else:
        return {"input_ids": ids.clone()}
    return {name: _noise(model, shape)}


def no_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Training has no cache; with one, FSMT's decoder reads in both directions."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def probe_ids(model: PreTrainedModel) -> Tensor:
    """Six different ids `(1, 6)`, without those that have a role, like padding, if the vocabulary is large enough."""
    parts = (model.config.get_text_config(), model.config)
    vocab_size = next((size for part in parts if isinstance(size := getattr(part, "vocab_size", None), int)), 20)
    with_role = {0} | {
        value for name, value in vars(parts[0]).items() if name.endswith("_token_id") and isinstance(value, int)
    }
    plain = [number for number in range(min(vocab_size, 20)) if number not in with_role]
    ids = plain if len(plain) >= 6 else [*range(1, 7)]
    return torch.tensor([ids[:6]], device=model.device) % vocab_size


def _image(model: PreTrainedModel) -> Tensor:
    """An image `(1, channels, height, width)` of random numbers, of the size that the configuration names, or 64 x 64."""
    parts: list[Any] = [
        model.config,
        getattr(model.config, "vision_config", None),
        getattr(model.config, "backbone_config", None),
        getattr(model.config, "encoder", None),
    ]
    size = next((part.image_size for part in parts if getattr(part, "image_size", None)), 64)
    channels = next((part.num_channels for part in parts if getattr(part, "num_channels", None)), 3)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return _noise(model, (1, channels, height, width))


def _noise(model: PreTrainedModel, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)


# ---- Running ----


@contextmanager
def looking_at(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; what a run changes in the model, and in torch's generator, is put back."""
    before = [(module, dict(module._modules), _plain_attributes(module)) for module in model.modules()]
    try:
        with evaluating(model), torch.random.fork_rng(devices=[]):
            yield
    finally:
        # BigBird, on a short input, replaces its attention for good.
        for module, children, attributes in before:
            if any(module._modules.get(name) is not child for name, child in children.items()):
                module._modules.update(children)
            for name, value in attributes.items():
                if vars(module).get(name, value) != value:
                    setattr(module, name, value)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    kinds = (bool, int, float, str)
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, kinds) and name != "training" and not name.startswith("_")
    }


@contextmanager
def _watched(model: nn.Module) -> Iterator[tuple[dict[str, list[Tensor]], list[Call]]]:
    """Record the outputs of the modules in each module list, and the calls of modules in no list."""
    layer_lists: dict[str, list[Tensor]] = {
        name: [] for name, module in model.named_modules() if isinstance(module, nn.ModuleList)
    }
    calls: list[Call] = []

    def watch(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        returned = output if isinstance(output, Tensor) else next(iter(_tensors(output)), None)
        if returned is None:
            return
        if name.rpartition(".")[0] in layer_lists:
            layer_lists[name.rpartition(".")[0]].append(returned)
        elif inputs and isinstance(output, Tensor):
            calls.append(Call(name, inputs[0], output))

    hooks = []
    for name, module in model.named_modules():
        inside = [one for one in layer_lists if name.startswith(f"{one}.")]
        if not inside or name.rpartition(".")[0] in inside:
            hook = lambda module, args, kwargs, output, name=name: watch(name, module, args, kwargs, output)  # noqa: E731
            hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield layer_lists, calls
    finally:
        for handle in hooks:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return (value for value in values if isinstance(value, Tensor))


# ---- Comparing ----


def same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and bool(one.equal(other)))


def close(one: Tensor, other: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether two tensors differ by rounding alone, compared with the largest number."""
    if one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def chain(model: PreTrainedModel, calls: list[Call], start: Tensor, end: Tensor) -> tuple[str, ...] | None:
    """Names of the fewest modules that turn `start` into `end`, position by position; `None` if there are none."""
    found = next((names for reached, names in chains(calls, start) if same(reached, end)), None)
    if not found:
        return found
    with looking_at(model):
        try:  # a module may take further arguments
            made = through(model, found, start)
            # The losses of language models run the modules on some of the positions, as rows.
            rows = through(model, found, start.flatten(0, 1)[::2]) if start.dim() == 3 else made
        except Exception:
            return None
    of_rows = end.flatten(0, 1)[::2] if start.dim() == 3 else end
    return found if close(made, end) and close(rows, of_rows) else None


def through(model: nn.Module, names: Iterable[str], value: Tensor) -> Tensor:
    """What a chain of modules makes of a tensor."""
    for name in names:
        value = model.get_submodule(name)(value)
    return value


def chains(
    calls: list[Call], start: Tensor, follows: Callable[[Tensor, Tensor], bool] | None = None
) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """All tensors that modules make from `start`, each with the names of a shortest chain of modules that does.

    Args:
        follows: Whether to go on from the first tensor to the second; by default if the positions are the same.
    """
    follows = follows or (lambda given, returned: given.shape[:-1] == returned.shape[:-1])
    reached: list[tuple[Tensor, tuple[str, ...]]] = [(start, ())]
    for tensor, names in reached:  # which grows
        yield tensor, names
        for name, given, returned in calls:
            if same(given, tensor) and follows(given, returned):
                if not any(same(returned, one) for one, _ in reached):
                    reached.append((returned, (*names, name)))
