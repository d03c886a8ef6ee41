"""Which classes of Transformers take auxiliary losses: each one is tried from a tiny configuration.

    python benchmarks/model_table.py [--only bert gpt2] [--seconds 60] [--output benchmarks/results/models.json]
    python benchmarks/model_table.py --table benchmarks/results/models.json docs/models.md    # write these results into the page

A class works if after `add_auxiliary_losses`, in training, every term is finite and every head gets a gradient; if the loss of
each layer is that of the model cut off after that layer, where such a model runs; if the evaluation loss is that of the plain model; and if
the heads, saved and loaded, give the same losses. Each class is tried in a process of its own.
"""

import argparse
import copy
import json
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, set_seed

from benchmarks.tiny_models import classes, tiny_config
from charformer_training import add_auxiliary_losses, load_auxiliary_losses
from charformer_training.probe import probe_inputs


def build(model_type: str, name: str, kind: str) -> Any:
    set_seed(0)
    config = tiny_config(model_type, name)
    if kind == "causal language models" and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    model = getattr(transformers, name)._from_config(config, attn_implementation="eager")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for field, value in (("decoder_start_token_id", 0), ("pad_token_id", 1)):
        if getattr(model.config, field, None) is None:
            setattr(model.config, field, value)
    return model


def batch_for(model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    num_labels = int(getattr(model.config, "num_labels", 2) or 2)
    classes_of_rows = torch.tensor([num_labels - 1, num_labels - 1])
    sensed = {
        name: torch.randn(2, *value.shape[1:], generator=generator)
        for name, value in probe_inputs(model).items()
        if value.is_floating_point()
    }
    if sensed and kind == "image classifiers":
        return {**sensed, "labels": classes_of_rows}
    vocab_size = min(getattr(model.config.get_text_config(), "vocab_size", 99), 99)
    ids = torch.randint(3, vocab_size, (2, 16), generator=generator)
    if kind in ("sequence classifiers", "image classifiers"):
        if isinstance(end := getattr(model.config, "eos_token_id", None), int):
            ids[:, -1] = end
        return {"input_ids": ids, "labels": classes_of_rows}
    if kind in ("causal language models", "speech recognition", "language models with images"):
        return {**(sensed or {"input_ids": ids}), "labels": ids}
    high = num_labels if kind == "token classifiers" else vocab_size
    labels = torch.randint(0, high, (2, 16), generator=generator)
    labels[0, 3:7] = -100
    return {"input_ids": ids, "labels": labels}


def problem(model_type: str, name: str, kind: str, **settings: Any) -> str | None:
    """What is wrong with the losses of a class; `None` if nothing is. A `ValueError` says that it was refused."""
    model = build(model_type, name, kind).eval()
    plain, batch = copy.deepcopy(model), batch_for(model, kind)
    add_auxiliary_losses(model, **settings)
    with torch.no_grad():
        expected, evaluated = plain(**batch).loss, model(**batch)
    if not torch.equal(evaluated.loss, expected):
        return f"the evaluation loss is {float(evaluated.loss)}, that of the plain model {float(expected)}"
    model.train()
    set_seed(2)
    outputs = model(**batch, training_progress=0.0)
    if wrong := [term for term, value in outputs.loss_dict.items() if not torch.isfinite(value)]:
        return f"terms that are not finite: {wrong}"
    outputs.loss.backward()
    without_gradient = [n for n, p in model.auxiliary_heads.named_parameters() if p.grad is None or not p.grad.any()]
    if without_gradient:
        return f"heads without a gradient: {without_gradient}"
    if not any(name.startswith(("layer_", "target_")) for name in outputs.loss_dict):
        return "there is no auxiliary term"
    return different_layers(plain, model, batch) or round_trip(model, batch)


CHECKED_LAYERS: list[int] = []


def different_layers(plain: Any, model: Any, batch: dict[str, Tensor]) -> str | None:
    """Compare the losses of intermediate layers with the own loss of a model cut off after that layer."""
    if model.accepted_heads == ("own",) or model.config.auxiliary_losses["heads"] == "own":
        return None
    model.eval()
    for module in (model.auxiliary_heads, model):
        module.training = True
    with torch.no_grad():
        losses = model(**batch, training_progress=0.0).loss_dict
    for layer in model.loss_settings.layers:
        cut = copy.deepcopy(plain).eval()
        if not cut_off(cut, model.loss_settings.num_layers, layer):
            return None
        try:
            with torch.no_grad():
                expected = cut(**batch).loss
        except Exception:  # a list of another meaning has been cut
            return None
        CHECKED_LAYERS.append(layer)
        if not torch.allclose(losses[f"layer_{layer}"], expected, rtol=1e-3):
            return f"the loss of layer {layer} is {float(losses[f'layer_{layer}'])}, that of the model cut off there {float(expected)}"
    return None


def cut_off(model: nn.Module, num_layers: int, layer: int) -> bool:
    """Leave out the layers after a layer, if the model has one list of that many layers (in the decoder, if there is one)."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers}
    if any("decoder" in name for name in lists):
        lists = {
            name: module for name, module in lists.items() if "encoder" not in name.replace("encoder_decoder", "")
        }
    names = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(names) != 1:
        return False
    parent, _, last = names[0].rpartition(".")
    setattr(model.get_submodule(parent), last, lists[names[0]][:layer])
    is_whole = not getattr(model.config, "is_encoder_decoder", False)
    for module in model.modules() if is_whole else model.get_submodule(parent).modules():
        config = getattr(module, "config", None)
        for field in ("num_hidden_layers", "num_layers", "n_layer", "decoder_layers", "num_decoder_layers"):
            if getattr(config, field, None) == num_layers:
                try:
                    setattr(config, field, layer)
                except Exception:  # a property, or one that another field must fit
                    pass
    return True


def round_trip(model: Any, batch: dict[str, Tensor]) -> str | None:
    kind = getattr(transformers, type(model).__name__)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = load_auxiliary_losses(kind.from_pretrained(folder, attn_implementation="eager"), folder)
    for module in loaded.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    losses = []
    for one in (model, loaded):
        set_seed(3)
        one.train()
        with torch.no_grad():
            terms = one(**batch, training_progress=0.0).loss_dict
        losses.append({name: float(value) for name, value in terms.items()})
    if any(abs(losses[0][name] - losses[1].get(name, 1e9)) > 1e-3 * abs(losses[0][name]) for name in losses[0]):
        return f"after saving and loading the losses are {losses[1]}, not {losses[0]}"
    return None


def attempt(kind: str, model_type: str, name: str) -> tuple[str, str]:
    """`("works" | "refused" | "not tried" | "fault", how or why)`."""
    try:
        model = build(model_type, name, kind)
    except Exception as error:
        return "not tried", f"{type(error).__name__}: {' '.join(str(error).split())}"[:150]
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > 3e8:
        return "not tried", f"the smallest model has {parameters:,} parameters"
    try:
        model.eval()(**batch_for(model, kind))
    except Exception as error:
        if not any(word in str(error) for word in ("specify", "unexpected keyword argument 'labels'")):
            return "not tried", f"a tiny model does not run: {type(error).__name__}: {error}".splitlines()[0]
    del model
    reasons: list[str] = []
    for settings in ({}, {"heads": "own"}, {"intermediate_layers": None}):
        if settings and f"{next(iter(settings))}=" not in reasons[-1]:
            continue
        try:
            wrong = problem(model_type, name, kind, **settings)
        except ValueError as error:
            if not from_ours(error):
                return "fault", short_traceback()
            reasons.append(str(error))
            continue
        except Exception:
            return "fault", short_traceback()
        if wrong:
            return "fault", wrong
        how = ", ".join(f"{field}={value!r}" for field, value in settings.items())
        return "works", " ".join(
            filter(None, [f"with {how}: {reasons[0]}" if how else "", "checked" if CHECKED_LAYERS else ""])
        )
    return "refused", reasons[0]


def short_traceback() -> str:
    kind, error, trace = sys.exc_info()
    frames = traceback.extract_tb(trace)
    where = " > ".join(
        f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[1:] if "torch/nn" not in frame.filename
    )
    return f"{type(error).__name__}: {error} ({where})"


def from_ours(error: ValueError) -> bool:
    """Whether `add_auxiliary_losses` raised an error itself."""
    frames = traceback.extract_tb(error.__traceback__)
    return "charformer_training" in frames[-1].filename or "loss_settings" in frames[-1].filename


def in_a_process(queue: Any, *what: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    queue.put(attempt(*what))


def try_all(only: list[str], seconds: float, output: Path | None) -> list[dict[str, str]]:
    context, rows = multiprocessing.get_context("fork"), []
    chosen = [one for one in classes() if not only or one[1] in only or one[2] in only]
    with tqdm(chosen) as bar:
        for kind, model_type, name in bar:
            bar.set_description(name)
            queue = context.SimpleQueue()
            process = context.Process(target=in_a_process, args=(queue, kind, model_type, name))
            process.start()
            process.join(seconds)
            if process.is_alive():
                process.kill()
                result, why = "not tried", f"it took longer than {seconds:g} seconds"
            elif queue.empty():
                result, why = "not tried", f"the process ended with status {process.exitcode}"
            else:
                result, why = queue.get()
            rows.append({"kind": kind, "class": name, "result": result, "why": why})
            if output is not None:  # after each one, since all take long
                write(output, rows)
            if result == "fault":
                bar.write(f"{name}: {why}")
    return rows


def write(output: Path, rows: list[dict[str, str]]) -> None:
    whole = {"transformers": transformers.__version__, "models": rows}
    output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """The results in Markdown: the numbers of each kind, then the classes."""
    rows = result["models"]
    lines = [
        f"Transformers {result['transformers']}, {len(rows)} entries. An entry is a class in one of the lists of the Auto classes.",
        "",
        "| Kind | Works | Works with a setting | Refused | Not tried |",
        "| --- | --- | --- | --- | --- |",
    ]
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for kind in kinds:
        states = [state_of(row) for row in rows if row["kind"] == kind]
        numbers = [str(states.count(state)) for state in ("works", "setting", "refused", "not tried")]
        lines.append(f"| {kind.capitalize()} | {' | '.join(numbers)} |")
    for kind in kinds:
        mine = [row for row in rows if row["kind"] == kind]
        working = sorted(row["class"] for row in mine if state_of(row) == "works")
        lines += ["", f"### {kind.capitalize()}", "", f"Work: {', '.join(f'`{name}`' for name in working)}.", ""]
        others = sorted((row for row in mine if state_of(row) != "works"), key=lambda row: row["class"].lower())
        if others:
            lines += ["| Class | Result |", "| --- | --- |"]
            lines += [f"| `{row['class']}` | {in_words(row)} |" for row in others]
    return "\n".join(lines) + "\n"


def state_of(row: dict[str, str]) -> str:
    return "setting" if row["result"] == "works" and row["why"].startswith("with ") else row["result"]


def in_words(row: dict[str, str]) -> str:
    why = row["why"].removesuffix(" checked").split("; choose ")[0]
    if state_of(row) == "setting":
        setting, _, reason = why.removeprefix("with ").partition(": ")
        why = f"works with `{setting}`: {reason}"
    else:
        why = f"{row['result']}: {why}"
    return why.replace("|", "\\|").replace("\n", " ").strip(" :")


def write_table(results: Path, page: Path) -> None:
    """Put the table in place of the former one, after the line that says where it begins."""
    begin = "<!-- The rest is written by benchmarks/model_table.py. -->"
    before, found, _ = page.read_text(encoding="utf-8").partition(begin)
    if not found:
        raise ValueError(f"{page} has no line {begin!r}, after which the table would come")
    result = json.loads(results.read_text(encoding="utf-8"))
    page.write_text(f"{before}{begin}\n\n{table(result)}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", default=[], help="model types or class names; their results replace those in OUTPUT"
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, nargs=2, metavar=("RESULTS", "PAGE"))
    arguments = parser.parse_args()
    if arguments.table:
        write_table(*arguments.table)
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    before = json.loads(arguments.output.read_text("utf-8"))["models"] if arguments.only and arguments.output else []
    rows = try_all(arguments.only, arguments.seconds, None if before else arguments.output)
    if before:
        known = {(row["kind"], row["class"]): row for row in (*before, *rows)}
        write(arguments.output, [known[kind, name] for kind, _, name in classes() if (kind, name) in known])
    for row in rows if arguments.only else []:
        sys.stdout.write(f"{row['kind']}: {row['class']}: {row['result']} {row['why']}\n")


if __name__ == "__main__":
    main()
