"""Pushing a run to the Hub: whole repositories at every commit, no secrets, and failures that are told."""

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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

import modeling_charformer
from modeling_charformer import CharformerConfig, CharformerTokenizer
from modeling_charformer.auxiliary_heads import TRAINING_ONLY

from .card import RunFacts, is_charformer, merged_card, run_card
from .data import ConsecutiveWindows, RandomWindows
from .files import remove
from .history import drop_steps, final_terms, last_evaluation
from .models import HEADS_FILE, loss_unit
from .plots import PICTURE, plot_loss_terms


logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
STAGE_PREFIX = "_push-"  # the Trainer's own pushes leave out what begins with an underscore
# What a checkpoint holds beside the model. Pickles are of no use to those who load it, and they can run code.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
RESUME_FILES = ("trainer_state.json", "running_sums.json", "manifest.json", "latest", "zero_to_fp32.py")
# What a run keeps in its folder for itself: with the paths of a machine, and of no use to others.
RECIPE, COMMAND, RESULT = "recipe.yaml", "command.txt", "_result.json"
PRIVATE = (RECIPE, COMMAND)


class HubTrainer(Trainer):
    """`transformers.Trainer` whose pushes to the Hub can be relied on.

    - Every commit with weights has the code, configuration and tokenizer that load them. A checkpoint is pushed as one
      commit, from links to its files, so that training can delete it meanwhile.
    - `training_args.bin`, a pickle of the arguments with token and paths, is neither written nor pushed.
    - A repository that cannot be written to is reported when the Trainer is built, a failed background push at the next
      save and when training ends; a later push makes up for it.
    - The card says what is known of the run, and keeps what a person wrote into it.
    """

    hub_model_id: str | None = None  # type: ignore[assignment]  # None is all that Trainer declares

    def __init__(self, *args, **kwargs):
        self._pushes: list[Future] = []
        super().__init__(*args, **kwargs)
        name = getattr(getattr(self.accelerator.unwrap_model(self.model), "config", None), "_name_or_path", "")
        # Asked now: a folder may be gone by the time that the card is written.
        self.finetuned_from: str | None = name if name and not Path(name).exists() else None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository if need be, and make sure that it can be written to.

        Raises:
            OSError: If it cannot, with the reason.
            ValueError: If the output folder holds pickles, which would be pushed.
        """
        if not self.is_world_process_zero():
            return
        self._refuse_pickles()
        output_dir = Path(str(self.args.output_dir))
        for left in output_dir.glob(f"{STAGE_PREFIX}*"):  # by a process that was killed
            remove(left)
        name = self.args.hub_model_id or output_dir.absolute().name
        try:
            super().init_hf_repo(token, **_given(private=private))
            HfApi().auth_check(str(self.hub_model_id), token=token or self.args.hub_token, write=True)
        except Exception as error:  # each layer below has exceptions of its own
            raise OSError(push_failed_message(name, error)) from error

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or str(self.args.output_dir))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        config = getattr(self.accelerator.unwrap_model(self.model), "config", None)
        if self.processing_class is None and config is not None and is_charformer(config):
            CharformerTokenizer.for_model(config).save_pretrained(folder)  # one that needs no training: ids are bytes

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        except Exception:
            self._finish_current_push()
            raise
        except BaseException:  # whoever interrupts a run does not want to wait
            self._report_failed_pushes()
            raise

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """As `Trainer.push_to_hub`.

        Raises:
            ValueError: If the output folder holds pickled weights.
            OSError: If the push fails, with the reason; what is in the output folder stays as it is.
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
    ) -> Any:
        """As `Trainer.push_to_hub`, but for what a run keeps for itself, and links: these stay at home."""
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
        upload: Any = HfApi().upload_folder
        return upload(
            repo_id=str(self.hub_model_id),
            folder_path=folder,
            commit_message=message,
            token=token or self.args.hub_token,
            run_as_future=not blocking,
            ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*", *PRIVATE, *links],
            revision=revision or self.args.hub_revision,
        )

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
            return  # the next push has it all
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        subfolder = {
            HubStrategy.CHECKPOINT: "last-checkpoint",
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }.get(HubStrategy(self.args.hub_strategy))
        stage = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=str(self.args.output_dir)))
        try:
            _stage_checkpoint(Path(checkpoint_folder), stage, subfolder)
            run_card(self.facts(), str(self.hub_model_id).split("/")[-1]).save(stage / CARD_FILE)
            self._draw_loss_terms(stage)
        except OSError as error:  # such as a full disk: the checkpoint itself is whole
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
        """Say which background pushes have failed since this was last called; those under way are left alone."""
        done = [job for job in self._pushes if job.done()]
        self._pushes = [job for job in self._pushes if job not in done]
        for job in done:
            if (error := job.exception()) is not None:
                self._report(error)

    def _report(self, error: BaseException) -> None:
        logger.error(
            "%s. Training and its checkpoints are not affected; the next push brings all that is missing",
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
        """Write `README.md`, and the picture of the loss terms that it shows, into the output folder.

        The arguments are those of `Trainer.create_model_card`; what they say goes into the card. The card that the
        repository has already, or else the output folder, keeps what a person wrote into it.
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
        """What a card tells of the run so far."""
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
        """Write the card of the run so far (or `card`), merged into the one that is there, and its picture into `folder`."""
        output_dir = Path(str(self.args.output_dir))
        name = (self.hub_model_id or output_dir.absolute().name).split("/")[-1]
        old = None
        if self.hub_model_id is not None:
            old = _card_on_hub(self.hub_model_id, self.args.hub_token, self.args.hub_revision)
        path = output_dir / CARD_FILE
        if old is None and path.is_file() and not path.is_symlink():
            old = ModelCard.load(path, ignore_metadata_errors=True)
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
    folder: str | os.PathLike,
    repo_id: str,
    inference_only: bool = False,
    commit_message: str = "Upload model",
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Push the Charformer in `folder`, such as a run has left there, as one commit: model, tokenizer, code, card, picture.

    The card that the repository has already keeps what a person wrote into it.

    Args:
        folder: What holds the model; other files in it, checkpoints and pickles among them, stay at home.
        repo_id: `"user/name"`; made if need be.
        inference_only: Push the model without what only training needs. Training can be resumed from the full one only.
        commit_message: What the commit is called.
        token: By default the one of HF_TOKEN or of `hf auth login`.
        private: Whether a new repository is private.
        revision: The branch; by default `"main"`.

    Raises:
        OSError: If the folder holds no model, or the push fails; the message tells why.
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
        except Exception as error:  # each layer below has exceptions of its own
            raise OSError(push_failed_message(repo_id, error)) from error


def _given(**options: Any) -> dict[str, Any]:
    """The options that are given: older versions of Transformers do not know them all."""
    return {name: value for name, value in options.items() if value is not None}


def _joined(names: str | Sequence[str] | None) -> str:
    return names if isinstance(names, str) else ", ".join(names or ())


def _stage_checkpoint(checkpoint: Path, stage: Path, subfolder: str | None) -> None:
    """Make `stage` a repository: the checkpoint's model, and if asked for, all of it in a subfolder to resume from.

    Files are linked, not copied, where the file system can: what is being pushed outlives the checkpoint's deletion.
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


def _push_stage(stage: Path, repo_id: str, **upload: Any) -> Any:
    """Push a staged repository as one commit; runs in the background."""
    try:
        new = ModelCard.load(stage / CARD_FILE)
        merged_card(new, _card_on_hub(repo_id, upload["token"], upload["revision"])).save(stage / CARD_FILE)
        return HfApi().upload_folder(repo_id=repo_id, folder_path=stage, **upload)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _card_on_hub(repo_id: str, token: str | None, revision: str | None) -> ModelCard | None:
    try:
        path = HfApi().hf_hub_download(repo_id, CARD_FILE, token=token, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return None
    return ModelCard.load(path, ignore_metadata_errors=True)


def push_failed_message(repo_id: str, error: BaseException) -> str:
    """What to tell the user of a push that failed: the reason in the client's words, and what helps."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    hints = {
        401: "Log in with `hf auth login`, or set HF_TOKEN to a valid token",
        403: "The token must have the right to write to this repository",
        404: "The repository, or the right to see it, is missing",
    }
    if status is None:
        from_network = isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore"))
        hint = "Is the Hub within reach?" if from_network else ""
    else:
        hint = hints.get(status, "Push again later" if status >= 500 else "")
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"pushing to {repo_id!r} failed: {reason.rstrip('.')}" + (f". {hint}" if hint else "")
