"""The file of the auxiliary heads beside a saved plain model: writing, finding and loading it."""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from modeling_charformer.auxiliary_heads import TRAINING_ONLY
from modeling_charformer.loss_settings import LAST_POSITION, AuxiliaryLossSettings

from .models import HEADS_FILE, OLD_HEADS_FILE, saved_heads, unwrap_peft


VOCABULARY = "auxiliary_heads.draft_vocabulary"


class SavesHeads(PreTrainedModel):
    """A model that saves its auxiliary heads in a file of their own, apart from the plain model."""

    loss_settings: AuxiliaryLossSettings
    is_saved_beside_adapter = False
    """Whether the PEFT model around this one saves the heads too."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the plain model, like `save_pretrained` of any model, and the auxiliary heads in a subfolder."""
        weights = kwargs.pop("state_dict", None) or self.state_dict()
        plain = {name: weight for name, weight in weights.items() if not name.startswith(TRAINING_ONLY)}
        with self._set_aside():
            super().save_pretrained(save_directory, *args, **kwargs, state_dict=plain)  # type: ignore[misc]  # the plain class takes state_dict, which kwargs no longer holds
        if kwargs.get("is_main_process", True):
            self.save_auxiliary_heads(save_directory, weights)

    @contextlib.contextmanager
    def _set_aside(self) -> Iterator[None]:
        """Take the heads out of a quantized model, whose quantizer saves all of it, whatever weights it is given."""
        modules = self._modules
        taken = [name for name in modules if f"{name}." in TRAINING_ONLY and getattr(self, "is_quantized", False)]
        heads = {name: modules.pop(name) for name in taken}
        try:
            yield
        finally:
            modules.update(heads)

    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save the heads first, since `save_pretrained(push_to_hub=True)` pushes before it returns."""
        self.save_auxiliary_heads(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def save_auxiliary_heads(
        self, folder: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write the weights that only training needs into `folder`, as `auxiliary_heads/model.safetensors`."""
        weights = self.state_dict() if state_dict is None else state_dict
        heads = {name: weight.contiguous() for name, weight in weights.items() if name.startswith(TRAINING_ONLY)}
        path = Path(folder, HEADS_FILE)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        # An adapter is saved without the configuration of its model.
        settings = json.dumps(getattr(self.config, "auxiliary_losses", None))
        save_file(heads, unfinished, metadata={"format": "pt", "auxiliary_losses": settings})
        os.replace(unfinished, path)
        Path(folder, OLD_HEADS_FILE).unlink(missing_ok=True)  # of an earlier version; engines would load it

    def load_auxiliary_heads(self, folder: str | os.PathLike[str]) -> None:
        """Load the heads that `save_auxiliary_heads` wrote.

        Raises:
            ValueError: If the file is missing or was written with other settings.
        """
        path = saved_heads(folder)
        if path is None:
            raise ValueError(f"{folder} has no {HEADS_FILE}: it holds a model without auxiliary heads")
        self.load_heads_file(path)

    def load_heads_file(self, path: Path) -> None:
        saved = load_file(path)
        if not self.loss_settings.has_last_position:  # a classifier's, saved by earlier versions but never trained
            saved.pop(f"loss_uncertainty.log_variances.{LAST_POSITION}", None)
        own = {name: weight for name, weight in self.state_dict().items() if name.startswith(TRAINING_ONLY)}
        if saved.keys() != own.keys():
            different = sorted(saved.keys() ^ own.keys())
            raise ValueError(f"{path} was saved with other auxiliary losses; {different[:4]} are not in both")
        for name, weight in own.items():
            if weight.shape != saved[name].shape:
                raise ValueError(
                    f"{path} was saved with another model: its {name} has the shape {tuple(saved[name].shape)}, that of this"
                    f" model, by its width and vocabulary, {tuple(weight.shape)}"
                )
        if VOCABULARY in saved and not saved[VOCABULARY].equal(own[VOCABULARY].cpu()):
            raise ValueError(
                f"{path} was saved with another draft_vocabulary, of {len(saved[VOCABULARY])} tokens; give add_auxiliary_losses that"
                " one, or use load_auxiliary_losses"
            )
        self.load_state_dict(saved, strict=False)


def vocabulary_of_heads(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as saved:
        if VOCABULARY not in saved.keys():  # noqa: SIM118  # it is no mapping
            raise ValueError(
                f"{path} has no {VOCABULARY}; the model's configuration says that its heads have one. Give a folder that"
                " save_pretrained wrote"
            )
        return cast(Tensor, saved.get_tensor(VOCABULARY))


class SavesHeadsBesideAdapter(nn.Module):
    """A PEFT model that writes the auxiliary heads of the model in it beside its adapter."""

    _made_of: type[nn.Module]

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save the adapters, like any PEFT model, and the auxiliary heads in a subfolder."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]  # the PEFT class's
        if kwargs.get("is_main_process", True):
            cast(Any, self).get_base_model().save_auxiliary_heads(save_directory)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return (_empty_beside_adapter, (self._made_of,), *cast(tuple[Any, ...], super().__reduce_ex__(protocol))[2:])


@functools.cache
def class_beside_adapter(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the PEFT class `kind`, with its name, whose `save_pretrained` keeps auxiliary heads."""
    content = {"__module__": kind.__module__, "_made_of": kind}
    return type(kind.__name__, (SavesHeadsBesideAdapter, kind), content)


def keep_heads_beside_adapter(model: nn.Module | None) -> None:
    """Let a PEFT model's `save_pretrained` keep the auxiliary heads of the model in it; any other model stays as it is."""
    wrapper: Any = getattr(model, "_orig_mod", model)  # of a compiled model
    base = None if wrapper is None else unwrap_peft(wrapper)
    if base is wrapper or not isinstance(base, SavesHeads) or isinstance(wrapper, SavesHeadsBesideAdapter):
        return
    wrapper.__class__ = class_beside_adapter(cast(Any, type(wrapper)))
    base.is_saved_beside_adapter = True


def _empty_beside_adapter(kind: type[nn.Module]) -> nn.Module:
    made: Any = class_beside_adapter(cast(Any, kind))
    return cast(nn.Module, made.__new__(made))


def saved_settings(path: Path) -> dict[str, Any] | None:
    """The arguments of `add_auxiliary_losses` that a file of heads was saved with; `None` from earlier versions."""
    with safe_open(path, "pt") as file:
        settings: dict[str, Any] | None = json.loads((file.metadata() or {}).get("auxiliary_losses", "null"))
    return settings


def cached_heads(name_or_path: str) -> Path:
    """The file of the heads in a folder, or in a repository on the Hub.

    Raises:
        OSError: If there is none. Beside an adapter, the message says where else the heads may be.
    """
    try:
        return Path(str(cached_file(name_or_path, Path(HEADS_FILE).name, subfolder=str(Path(HEADS_FILE).parent))))
    except OSError as error:  # raised whatever is missing
        try:
            return Path(str(cached_file(name_or_path, OLD_HEADS_FILE)))
        except OSError:
            if Path(name_or_path, "adapter_config.json").is_file():
                raise OSError(
                    f"{name_or_path} holds an adapter without {HEADS_FILE}. If its base model has auxiliary heads, give the"
                    " base model's folder or id"
                ) from error
            raise error from None
