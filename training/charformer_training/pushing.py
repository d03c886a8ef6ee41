"""Push runs to the Hub: complete repositories at every commit, no secrets, and reported failures."""

import logging
import os
import shutil
import tempfile
from collections.abc import Sequence, Sized
from concurrent import futures
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy, SchedulerType, TrainOutput
from transformers.training_args import OptimizerNames
from yaml import YAMLError

import modeling_charformer
from modeling_charformer import CharformerConfig, CharformerTokenizer
from modeling_charformer.auxiliary_heads import TRAINING_ONLY

from .card import RunFacts, is_charformer, merged_card, run_card
from .data import ConsecutiveWindows, RandomWindows
from .files import remove
from .history import drop_steps, final_terms, last_evaluation
from .models import HEADS_FILE, loss_unit
from .plots import PICTURE, plot_loss_terms
from .terminal import one_line


logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
STAGE_PREFIX = "_push-"  # the Trainer's own pushes leave out what begins with an underscore
# Files of a checkpoint that are not part of the model. Pickles can run code when they are loaded.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
RESUME_FILES = ("trainer_state.json", "running_sums.json", "manifest.json", "latest", "zero_to_fp32.py")
# Files that a run does not push: they hold paths of the machine.
RECIPE, COMMAND, RESULT = "recipe.yaml", "command.txt", "_result.json"
PRIVATE = (RECIPE, COMMAND)


class HubTrainer(Trainer):
    """`transformers.Trainer` with reliable pushes to the Hub.

    - Every commit with weights also has the code, configuration and tokenizer that load them. A checkpoint is pushed as one
      commit. It is pushed from links to its files, so that training can delete it meanwhile.
    - `training_args.bin` is neither written nor pushed: it is a pickle of the arguments, with token and paths.
    - A repository without write access is reported when the Trainer is built. A failed background push is reported at the
      next save and when training ends, and the next push uploads what is missing.
    - The model card describes the run. What a person wrote into it is kept.
    """

    hub_model_id: str | None = None  # type: ignore[assignment]  # Trainer declares None

    def __init__(self, *args: Any, **kwargs: Any):
        self._pushes: list[Future[Any]] = []
        super().__init__(*args, **kwargs)
        name = getattr(getattr(self.accelerator.unwrap_model(self.model), "config", None), "_name_or_path", "")
        # Checked now, because the folder may be gone when the card is written.
        self.finetuned_from: str | None = name if name and not Path(name).exists() else None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository if it does not exist, and check that it can be written to.

        Raises:
            OSError: If it cannot be written to, with the reason.
            ValueError: If the output folder holds pickles, which would be pushed.
        """
        if not self.is_world_process_zero():
            return
        self._refuse_pickles()
        output_dir = Path(str(self.args.output_dir))
        for left in output_dir.glob(f"{STAGE_PREFIX}*"):  # of a killed process
            remove(left)
        name = self.args.hub_model_id or output_dir.absolute().name
        try:
            super().init_hf_repo(token, **_given(private=private))
            HfApi().auth_check(str(self.hub_model_id), token=token or self.args.hub_token, write=True)
        except Exception as error:  # the layers below raise many kinds
            raise OSError(push_failed_message(name, error)) from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or str(self.args.output_dir))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        if self.processing_class is None and config is not None and is_charformer(config):
            CharformerTokenizer.for_model(config).save_pretrained(folder)  # it needs no training: ids are bytes

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            output: TrainOutput = super().train(*args, **kwargs)
            return output
        except Exception:
            self._finish_current_push()
            raise
        except BaseException:  # an interrupted run does not wait for its uploads
            self._report_failed_pushes()
            raise

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:  # a CommitInfo or its future, or None in other processes: Trainer declares the first alone
        """Like `Trainer.push_to_hub`.

        Raises:
            ValueError: If the output folder holds pickled weights.
            OSError: If the push fails, with the reason. The output folder stays unchanged.
        """
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self._refuse_pickles()
        try:
            return self._push(commit_message, blocking, token, revision, kwargs)
        except Exception as error:  # as above
            raise OSError(
                f"{push_failed_message(str(self.hub_model_id), error)}. The model is in {self.args.output_dir}"
            ) from error

    def _push(
        self, message: str | None, blocking: bool, token: str | None, revision: str | None, card: dict[str, Any]
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Like `Trainer.push_to_hub`, but links and the files in `PRIVATE` are not pushed."""
        folder = Path(str(self.args.output_dir))
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = card.pop("tags", None) or []
        tags = [*([tags] if isinstance(tags, str) else tags), *(getattr(self.model, "model_tags", None) or [])]
        name = str(self.hub_model_id).split("/")[-1]
        self.create_model_card(**{"model_name": name, **card, "tags": [*dict.fromkeys(tags)]})
        self._finish_current_push()
        links = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink()]
        upload: Any = HfApi().upload_folder  # its overloads want run_as_future as a literal
        commit: CommitInfo | Future[CommitInfo] = upload(
            repo_id=str(self.hub_model_id),
            folder_path=folder,
            commit_message=message,
            token=token or self.args.hub_token,
            run_as_future=not blocking,
            ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*", *PRIVATE, *links],
            revision=revision or self.args.hub_revision,
        )
        return commit

    def _refuse_pickles(self) -> None:
        folder = Path(str(self.args.output_dir))
        pushed = (
            path
            for path in sorted(folder.rglob("*"))
            if not any(part.startswith((PREFIX_CHECKPOINT_DIR, "_")) for part in path.relative_to(folder).parts)
        )
        if pickles := [str(path.relative_to(folder)) for path in pushed if path.suffix in PICKLES]:
            raise ValueError(
                f"output_dir {folder} holds {', '.join(pickles)}, which would be pushed: pickles can run code when they"
                " are loaded. Move them elsewhere; weights are saved as safetensors"
            )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self._report_failed_pushes()
        if self._pushes and not self.args.hub_always_push:
            return  # the next push uploads everything
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        subfolder = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }.get(HubStrategy(self.args.hub_strategy))
        stage = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=str(self.args.output_dir)))
        try:
            stage_checkpoint(Path(checkpoint_folder), stage, subfolder)
            run_card(self.facts(), str(self.hub_model_id).split("/")[-1]).save(stage / CARD_FILE)
            self._draw_loss_terms(stage)
        except OSError as error:  # such as a full disk; the checkpoint itself is complete
            shutil.rmtree(stage, ignore_errors=True)
            self._report(error)
            return
        done = f"step {self.state.global_step}"
        if self.args.save_strategy == SaveStrategy.EPOCH:
            done = f"epoch {int(self.state.epoch or 0)}"
        job = HfApi().run_as_future(
            _push_stage,
            stage,
            repo_id=str(self.hub_model_id),
            commit_message=f"Training in progress, {done}",
            token=self.args.hub_token,
            revision=self.args.hub_revision,
        )
        self._pushes.append(job)

    def _finish_current_push(self) -> None:
        futures.wait(self._pushes)
        self._report_failed_pushes()

    def _report_failed_pushes(self) -> None:
        """Report the background pushes that have failed since the last call, without waiting for running ones."""
        done = [job for job in self._pushes if job.done()]
        self._pushes = [job for job in self._pushes if job not in done]
        for job in done:
            if (error := job.exception()) is not None:
                self._report(error)

    def _report(self, error: BaseException) -> None:
        logger.error(
            "%s. Training and its checkpoints are not affected; the next push uploads what is missing",
            push_failed_message(str(self.hub_model_id), error),
        )

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` and its picture of the loss terms into the output folder.

        The arguments are those of `Trainer.create_model_card`. What a person wrote into the card of the repository, or else
        of the output folder, is kept.
        """
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        source = ", ".join(part for part in (_joined(dataset or dataset_tags), _joined(dataset_args)) if part)
        facts = self.facts()
        card = run_card(
            replace(facts, finetuned_from=finetuned_from or facts.finetuned_from),
            model_name or folder.absolute().name,
            license=license or "apache-2.0",
            tags=[tags] if isinstance(tags, str) else tags or [],
            task=tasks if isinstance(tasks, str) or tasks is None else tasks[0],
            source=source or None,
        )
        for key, value in (("language", language), ("datasets", dataset_tags)):
            if value:
                card.data[key] = value
        self.write_card(folder, card)

    def facts(self) -> RunFacts:
        """The facts about the run so far that a card shows."""
        model = self.accelerator.unwrap_model(self.model)
        datasets = {"training": self.train_dataset, "evaluation": self.eval_dataset}
        evaluated = self.eval_dataset
        heads = sum(weight.numel() for key, weight in model.named_parameters() if key.startswith(TRAINING_ONLY))
        parameters = sum(weight.numel() for weight in model.parameters())
        settings = getattr(model, "loss_settings", None)
        order = [term.name for term in settings.terms] if settings is not None else []
        terms = final_terms(self.state.log_history)
        names = sorted(terms, key=lambda name: (order.index(name) if name in order else len(order), name))
        return RunFacts(
            config=getattr(model, "config", None),
            class_name=type(model).__name__,
            auto_class=getattr(model, "_auto_class", None),
            is_transformers_class=type(model).__module__.startswith("transformers.models."),
            inference_parameters=parameters - heads,
            training_parameters=parameters,
            repo_id=self.hub_model_id,
            finetuned_from=self.finetuned_from,
            splits=[data.split for data in datasets.values() if isinstance(data, RandomWindows | ConsecutiveWindows)],
            num_rows={role: len(data) for role, data in datasets.items() if isinstance(data, Sized)},
            evaluated_bytes=len(evaluated.data) if isinstance(evaluated, ConsecutiveWindows) else None,
            recipe=_recipe(self.args, self.state.max_steps),
            step=self.state.global_step,
            metrics=last_evaluation(self.state.log_history),
            terms={name: terms[name] for name in names},
        )

    def write_card(self, folder: Path, card: ModelCard | None = None) -> None:
        """Write `card`, by default that of the run so far, merged with an existing card, and its picture into `folder`."""
        output_dir = Path(str(self.args.output_dir))
        name = (self.hub_model_id or output_dir.absolute().name).split("/")[-1]
        old = None
        if self.hub_model_id is not None:
            old = _card_on_hub(self.hub_model_id, self.args.hub_token, self.args.hub_revision)
        if old is None:
            old = card_of(output_dir)
        merged_card(card or run_card(self.facts(), name), old).save(folder / CARD_FILE)
        self._draw_loss_terms(folder)

    def _draw_loss_terms(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        settings = getattr(model, "loss_settings", None)
        drops = drop_steps(settings, self.state.max_steps) if settings is not None else {}
        title = Path(str(self.args.output_dir)).absolute().name
        plot_loss_terms(self.state.log_history, drops, folder / PICTURE, title, loss_unit(model))


def _recipe(args: TrainingArguments, max_steps: int) -> dict[str, Any]:
    processes = max(1, args.world_size)
    return {
        "Optimizer steps": f"{max_steps:,}",
        "Rows per step": args.train_batch_size * args.gradient_accumulation_steps * processes,
        "Optimizer": f"{'muon and ' if getattr(args, 'muon', False) else ''}"
        f"{OptimizerNames(args.optim).value} {args.optim_args or ''}".strip(),
        "Learning rate": f"{args.learning_rate:g}, {SchedulerType(args.lr_scheduler_type).value}",
        "Warm-up steps": args.get_warmup_steps(max_steps),
        "Weight decay": args.weight_decay,
        "Gradient clipping": args.max_grad_norm,
        "Precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "f32",
        "Seed": args.seed,
    }


def push_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    inference_only: bool = False,
    commit_message: str = "Upload model",
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Push a saved Charformer, like a run's folder, as one commit of model, tokenizer, code, card and picture.

    What a person wrote into the repository's card is kept.

    Args:
        folder: The folder of the model. Other files in it, such as checkpoints and pickles, are not pushed.
        repo_id: `"user/name"`; created if it does not exist.
        inference_only: Push the model without the parts that only training needs. Training can only be resumed from the
            full one.
        commit_message: The title of the commit.
        token: By default that of HF_TOKEN or of `hf auth login`.
        private: Whether a new repository is private.
        revision: The branch; by default `"main"`.

    Raises:
        OSError: If the folder holds no model, or the push fails. The message says why.
    """
    architectures = CharformerConfig.from_pretrained(folder).architectures or []
    kind: Any = getattr(modeling_charformer, architectures[0] if architectures else "CharformerModel")
    model = kind.from_pretrained(folder)
    with tempfile.TemporaryDirectory() as stage:
        (model.without_auxiliary_heads() if inference_only else model).save_pretrained(stage)
        window = model.config.max_position_embeddings
        CharformerTokenizer.from_pretrained(folder, model_max_length=window).save_pretrained(stage)
        for name in (CARD_FILE, PICTURE):
            if Path(folder, name).exists():
                shutil.copy(Path(folder, name), stage)
        try:
            HfApi().create_repo(repo_id, token=token, private=private, exist_ok=True)
            if Path(stage, CARD_FILE).exists():
                merged_card(ModelCard.load(Path(stage, CARD_FILE)), _card_on_hub(repo_id, token, revision)).save(
                    Path(stage, CARD_FILE)
                )
            return HfApi().upload_folder(
                repo_id=repo_id, folder_path=stage, commit_message=commit_message, token=token, revision=revision
            )
        except Exception as error:  # the layers below raise many kinds
            raise OSError(push_failed_message(repo_id, error)) from error


def _given(**options: Any) -> dict[str, Any]:
    """The options that are not `None`. Older versions of Transformers do not know all of them."""
    return {name: value for name, value in options.items() if value is not None}


def _joined(names: str | Sequence[str] | None) -> str:
    return names if isinstance(names, str) else ", ".join(names or ())


def stage_checkpoint(checkpoint: Path, stage: Path, subfolder: str | None) -> None:
    """Fill `stage` with the checkpoint's model and, if `subfolder` is given, with the whole checkpoint in it.

    Files are linked if the file system has links, and copied otherwise, so that the checkpoint can be deleted meanwhile.
    """
    for path in checkpoint.iterdir():
        if path.is_file() and not path.is_symlink() and path.suffix not in PICKLES and path.name not in RESUME_FILES:
            _link(path, stage / path.name)
    if (heads := checkpoint / HEADS_FILE).is_file():
        _link(heads, stage / HEADS_FILE)
    if subfolder is not None:
        for path in checkpoint.rglob("*"):
            if path.is_file() and not path.is_symlink():
                _link(path, stage / subfolder / path.relative_to(checkpoint))


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _push_stage(stage: Path, repo_id: str, **upload: Any) -> CommitInfo:
    """Push a staged repository as one commit. Runs in the background."""
    try:
        new = ModelCard.load(stage / CARD_FILE)
        merged_card(new, _card_on_hub(repo_id, upload["token"], upload["revision"])).save(stage / CARD_FILE)
        commit: CommitInfo = HfApi().upload_folder(repo_id=repo_id, folder_path=stage, **upload)
        return commit
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def card_of(folder: Path) -> ModelCard | None:
    """The model card in a folder, which the user may have written; `None` if there is none.

    Raises:
        ValueError: If it cannot be read, so that a new card could not keep what it says.
    """
    path = folder / CARD_FILE
    if path.is_symlink() or not path.is_file():
        return None
    try:
        card: ModelCard = ModelCard.load(path, ignore_metadata_errors=True)
    except (ValueError, YAMLError) as error:
        reason = one_line(str(error).split("\n")[0])
        raise ValueError(
            f"{one_line(path)} cannot be read, so its text could not be kept: {reason}; repair or delete it"
        ) from error
    return card


def _card_on_hub(repo_id: str, token: str | None, revision: str | None) -> ModelCard | None:
    try:
        path = HfApi().hf_hub_download(repo_id, CARD_FILE, token=token, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return None
    card: ModelCard = ModelCard.load(path, ignore_metadata_errors=True)
    return card


def push_failed_message(repo_id: str, error: BaseException) -> str:
    """The message about a failed push: the reason in the client's words, and advice."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    hints = {
        401: "Log in with `hf auth login`, or set HF_TOKEN to a valid token",
        403: "The token must have the right to write to this repository",
        404: "The repository, or the right to see it, is missing",
    }
    if status is None:
        from_network = isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore"))
        hint = "Can this machine reach the Hub?" if from_network else ""
    else:
        hint = hints.get(status, "Push again later" if status >= 500 else "")
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"pushing to {repo_id!r} failed: {reason.rstrip('.')}" + (f". {hint}" if hint else "")
