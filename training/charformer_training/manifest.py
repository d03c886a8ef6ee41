"""Check that checkpoints are complete and undamaged, by a manifest with a checksum of each file.

`SafeTrainer` writes the manifest last. A checkpoint of `transformers.Trainer` has none: there, only missing files and visible
damage are found.
"""

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from .files import whole_file


MANIFEST = "manifest.json"
# Sums since the last log entry. Only `SafeTrainer` writes this file.
RUNNING_SUMS = "running_sums.json"
CHECKPOINT_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_FORMAT, _PARTS = 1, ("settings", "files")
# Names of files that are read on resuming. A foreign file with such a name would change the run.
READ_ON_RESUME = re.compile(
    r"(model[-.]|pytorch_model|adapter|optimizer|scheduler|scaler|rng_state|auxiliary_heads|trainer_state|running_sums|global_step)"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint: its faults, warnings about what could not be checked, and the settings of its run."""

    path: Path
    faults: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    complete: bool = True


def write_manifest(folder: Path, settings: Mapping[str, Any], **more: Any) -> None:
    """Write the last file of a checkpoint: the checksums of all files in `folder`, and the run's settings.

    Raises:
        OSError: If a file cannot be read or written.
    """
    _write(folder / MANIFEST, {"settings": settings, **more, "files": _checksums(_files(folder))})


def write_result(path: Path, settings: Mapping[str, Any], complete: bool) -> None:
    """Write a file for `inspect_result`: checksums of the model in the same folder, and whether the run is complete.

    Raises:
        OSError: If a file cannot be read or written.
    """
    kinds = ("*.safetensors", "*.py", "config.json")
    model = {file.name: file for kind in kinds for file in path.parent.glob(kind)}
    _write(path, {"settings": settings, "complete": complete, "files": _checksums(model)})


def _write(path: Path, content: dict[str, Any]) -> None:
    content = {"format": _FORMAT, **content}
    content["sha256"] = _digest(content)
    with whole_file(path) as file:
        file.write(_dumped(content).encode())


def inspect(folder: str | os.PathLike[str], processes: int = 1) -> Checkpoint:
    """Check every byte of a checkpoint, for a run on this number of processes."""
    folder = Path(folder)
    if not folder.is_dir():
        return Checkpoint(folder, (f"there is no folder {folder}",))
    if odd := [name for name, path in _entries(folder) if not path.is_file() and not path.is_dir()]:
        return Checkpoint(folder, tuple(f"{name} is no regular file" for name in sorted(odd)))
    if (folder / MANIFEST).exists():
        return _inspect_manifest(folder)
    if (folder / RUNNING_SUMS).exists():
        return Checkpoint(folder, (f"{MANIFEST} is missing",))
    faults = [*_missing_files(folder, processes), *_damaged_files(folder)]
    warning = (
        f"{folder} has no {MANIFEST}, so it was not written by this package's Trainer: its files have no checksums,"
        " and whether its run had the same data, seed, batches, model settings, losses and schedule cannot be checked"
    )
    return Checkpoint(folder, tuple(faults), (warning,), settings=_settings_of_plain(folder))


def is_scheduled(folder: Path) -> bool:
    """Whether a checkpoint was due at its step. One that was written only because of a signal was not."""
    return bool((_read(folder / MANIFEST) or {}).get("scheduled", True))


def newest_good(output_dir: str | os.PathLike[str], processes: int = 1) -> tuple[Checkpoint | None, list[Checkpoint]]:
    """The good checkpoint with the highest step in a run's folder, if any, and the bad ones with higher steps."""
    steps = {
        int(match[1]): path for path in Path(output_dir).glob("*") if (match := CHECKPOINT_NAME.fullmatch(path.name))
    }
    bad: list[Checkpoint] = []
    for step in sorted(steps, reverse=True):
        found = inspect(steps[step], processes)
        if not found.faults:
            return found, bad
        bad.append(found)
    return None, bad


def inspect_result(folder: Path, name: str) -> Checkpoint | None:
    """The trained model in a run's folder, as described by `write_result` in the file `name`. `None` without that file."""
    if not (folder / name).exists():
        return None
    if (content := _read(folder / name)) is None:
        return Checkpoint(folder, (f"{name} is damaged",))
    present = {name: folder / name for name in content["files"] if (folder / name).is_file()}
    faults = _differing(content["files"], present)
    return Checkpoint(folder, tuple(faults), settings=content["settings"], complete=bool(content.get("complete")))


def _read(path: Path) -> dict[str, Any] | None:
    """The content of a manifest, or `None` if any byte of it has changed, or a later version wrote it."""
    try:
        text = path.read_text(encoding="utf-8")
        content: dict[str, Any] = json.loads(text)
        stated = content.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    whole = stated == _digest(content) and _dumped({**content, "sha256": stated}) == text
    readable = content.get("format") == _FORMAT and all(isinstance(content.get(key), dict) for key in _PARTS)
    readable = readable and all(isinstance(entry, dict) and "bytes" in entry for entry in content["files"].values())
    return content if whole and readable else None


def _differing(files: Mapping[str, dict[str, Any]], present: Mapping[str, Path]) -> list[str]:
    faults = [f"{name} is missing" for name in sorted(files.keys() - present.keys())]
    found = _checksums({name: path for name, path in present.items() if name in files})
    for name, checksum in sorted(found.items()):
        if checksum["bytes"] != files[name]["bytes"]:
            faults.append(
                f"{name} has {checksum['bytes']:,} bytes, not the {files[name]['bytes']:,} that were written"
            )
        elif checksum != files[name]:
            faults.append(f"{name} is damaged (its sha256 is not that of the file that was written)")
    return faults


def _inspect_manifest(folder: Path) -> Checkpoint:
    if (content := _read(folder / MANIFEST)) is None:
        return Checkpoint(folder, (f"{MANIFEST} is damaged",))
    files, present = content["files"], _files(folder)
    faults = _differing(files, present)
    # An empty folder of such a name would also be read.
    folders = {
        name
        for name, path in _entries(folder)
        if path.is_dir() and not any(file.startswith(f"{name}/") for file in files)
    }
    foreign = sorted(present.keys() - files.keys() | {name for name in folders if READ_ON_RESUME.match(name)})
    faults += [f"{name} is not of this run" for name in foreign if READ_ON_RESUME.match(name)]
    warnings = [
        f"{folder / name} is not of this run, and is not read" for name in foreign if not READ_ON_RESUME.match(name)
    ]
    if content.get("save_only_model"):
        faults.append(
            "it holds the model alone (save_only_model), without the optimizer and other state that resuming needs"
        )
    return Checkpoint(folder, tuple(faults), tuple(warnings), content["settings"])


def _files(folder: Path) -> dict[str, Path]:
    """All files of a checkpoint by name, except the manifest."""
    return {name: path for name, path in _entries(folder) if path.is_file() and path.name != MANIFEST}


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """All that is in a checkpoint by name, except hidden files, which file systems add."""
    return ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if not path.name.startswith("."))


def _checksums(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    def checksum(path: Path) -> dict[str, Any]:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _file_digest(file)
        return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        return dict(zip(files, pool.map(checksum, files.values()), strict=True))


def _file_digest(file: Any) -> Any:
    """`hashlib.file_digest`, for Python 3.10."""
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest


def _dumped(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_dumped(content).encode()).hexdigest()


def _missing_files(folder: Path, processes: int) -> list[str]:
    """What a checkpoint of `transformers.Trainer` lacks. Training would resume without it, but differently."""
    if not (folder / "trainer_state.json").exists():
        if (folder / "config.json").exists():
            return [
                "it holds a model, but not the state of a training (trainer_state.json); to begin a new training with its"
                " weights, give it as model_name_or_path. A model for inference only cannot be resumed"
            ]
        return ["trainer_state.json is missing"]
    names = {path.name for path in folder.iterdir()}
    faults = []
    if not any(re.match(r"(model[-.]|pytorch_model|adapter_model|global_step)", name) for name in names):
        faults.append("its weights are missing")
    for index in folder.glob("*.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            faults.append(f"{index.name} is damaged")
        else:
            faults += [f"{name} is missing" for name in sorted(shards - names)]
    by_deepspeed = any(name.startswith("global_step") for name in names)
    needed = [] if by_deepspeed else ["optimizer", "scheduler.pt"]
    needed += ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    missing = [name for name in needed if not any(there.startswith(name) for there in names)]
    if len(missing) == len(needed):
        return [
            *faults,
            "it holds the model alone (save_only_model), without the optimizer and other state that resuming needs",
        ]
    return [*faults, *(f"{name if '.' in name else name + '.pt'} is missing" for name in missing)]


def _damaged_files(folder: Path) -> list[str]:
    faults = []
    for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")]):
        if not zipfile.is_zipfile(path):
            faults.append(f"{path.name} is damaged or truncated")
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as weights:
                weights.keys()
        except (SafetensorError, OSError) as error:
            faults.append(f"{path.name} is damaged or truncated ({error})")
    if (folder / "trainer_state.json").exists() and _trainer_state(folder) is None:
        faults.append("trainer_state.json is damaged or truncated")
    return faults


def _trainer_state(folder: Path) -> dict[str, Any] | None:
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _settings_of_plain(folder: Path) -> dict[str, Any]:
    state = _trainer_state(folder) or {}
    known = {"max_steps": state.get("max_steps"), "per_device_train_batch_size": state.get("train_batch_size")}
    return {name: value for name, value in known.items() if value}
