"""What `position_share` does to learning: the same seconds of training, with auxiliary losses on all and on some positions.

    python benchmarks/position_share.py [--text FILE] [--seconds 60] [--seeds 3] [--output FILE] [--only "seed 0"]

A model of GPT-2's kind (4 layers, width 128, 16,384 tokens) is trained on real text: FILE, or the sources of Python's standard
library. Its tokens are those of a byte-pair encoding that is trained on the same text. Auxiliary losses are those of all layers
and of 2 targets. All runs have the same seconds of one CPU thread, in which the learning rate falls to 0, so that dearer steps are fewer.
The seconds are those that the process used the CPU, which other programs on the machine hardly change.

- `validation`: the loss of the next token after training, in nats, and its standard deviation over seeds.
- `gradient`: variance of the gradient of the weighted loss over draws of positions, on one batch, relative to the squared norm of the
  gradient on all positions; `from batches` is its variance over batches on all positions. Both of a model trained with auxiliary losses on 1/32 of the positions.

What the output file holds already is not measured again. `--only "seed 0"` measures the parts whose names end so; the last part is
called `gradient`.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, set_seed

from benchmarks.measure import machine
from charformer_training import add_auxiliary_losses
from charformer_training.arguments import DataArguments
from charformer_training.data import load_corpus


VOCABULARY, WINDOW, BATCH = 16_384, 64, 4
LOSSES: dict[str, Any] = {"num_targets": 2, "intermediate_schedule": "constant", "intermediate_weight": 0.3}
VARIANTS: dict[str, dict[str, Any] | None] = {
    "no auxiliary losses": None,
    "all positions": LOSSES,
    "1/32 of the positions": LOSSES | {"position_share": 1 / 32},
}


def tokens_of(text: str) -> torch.Tensor:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = text.splitlines(keepends=True)
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
    return torch.tensor([token for line in tokenizer.encode_batch(lines) for token in line.ids])


def windows(tokens: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(tokens) - WINDOW, (BATCH, 1), generator=generator)
        yield tokens[starts + torch.arange(WINDOW)]


def build(variant: str, seed: int) -> Any:
    set_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=WINDOW, n_embd=128, n_layer=4, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model, settings = GPT2LMHeadModel(config), VARIANTS[variant]
    return (model if settings is None else add_auxiliary_losses(model, **settings)).train()


def train(variant: str, tokens: torch.Tensor, seconds: float, seed: int) -> tuple[Any, int]:
    """The trained model, and the number of steps."""
    model, batches, step = build(variant, seed), windows(tokens, seed), 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1, fused=True)
    begin = time.process_time()
    while (progress := (time.process_time() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * progress)) / 2
        ids = next(batches)
        moment = {} if VARIANTS[variant] is None else {"training_progress": progress, "training_step": step}
        model(input_ids=ids, labels=ids, **moment).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return model, step


@torch.no_grad()
def validation_loss(model: Any, tokens: torch.Tensor) -> float:
    rows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)[:256]
    model.eval()
    return statistics.mean(float(model(input_ids=ids, labels=ids).loss) for ids in rows.split(16))


def gradient(model: Any, ids: torch.Tensor, step: int) -> torch.Tensor:
    model.zero_grad()
    model(input_ids=ids, labels=ids, training_progress=0.0, training_step=step).loss.backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters()])


def relative_variance(whole: torch.Tensor, others: list[torch.Tensor]) -> float:
    return float(torch.stack([(other - whole).square().sum() for other in others]).mean() / whole.square().sum())


def gradient_variances(trained: Any, tokens: torch.Tensor, draws: int) -> dict[str, float]:
    batches = windows(tokens, 1000)
    found = {}
    weights, ids = trained.state_dict(), next(batches)
    for share in (1.0, 1 / 4, 1 / 8, 1 / 32):
        model = build("all positions", 0)
        model.load_state_dict(weights)
        if share == 1.0:
            whole = gradient(model, ids, 0)
            over_batches = [gradient(model, next(batches), 0) for _ in range(draws)]
            mean = torch.stack(over_batches).mean(0)
            # Divided by draws - 1 rather than draws: the mean is one of the same batches.
            found["from batches"] = relative_variance(mean, over_batches) * draws / (draws - 1)
            continue
        model.loss_settings.position_share = share
        found[f"share 1/{round(1 / share)}"] = relative_variance(
            whole, [gradient(model, ids, s) for s in range(draws)]
        )
    return found


def measured(part: str, tokens: torch.Tensor, seconds: float, draws: int) -> dict[str, float]:
    """One part of the results: a run, called `VARIANT, seed N`, or `gradient`."""
    training, held_out = tokens[: int(0.95 * len(tokens))], tokens[int(0.95 * len(tokens)) :]
    if part == "gradient":
        model, _ = train("1/32 of the positions", training, seconds, 0)
        return {name: round(value, 4) for name, value in gradient_variances(model, training, draws).items()}
    variant, _, seed = part.partition(", seed ")
    model, steps = train(variant, training, seconds, int(seed))
    return {"validation": round(validation_loss(model, held_out), 4), "steps": steps}


def summary(parts: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Over the seeds of each variant: the mean loss with its standard deviation, and the mean number of steps."""
    found = {}
    for variant in VARIANTS:
        runs = [run for part, run in parts.items() if part.startswith(f"{variant}, seed ")]
        losses = [run["validation"] for run in runs]
        if runs:
            found[variant] = {
                "validation": round(statistics.mean(losses), 4),
                "deviation": round(statistics.stdev(losses), 4) if len(losses) > 1 else None,
                "steps": round(statistics.mean(run["steps"] for run in runs)),
            }
    return found


def parts_in(output: Path | None, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """What an earlier call has measured with the same settings."""
    if output is None or not output.exists():
        return {}
    before = json.loads(output.read_text(encoding="utf-8"))
    if different := [name for name in settings if name not in ("runs", "gradient") and before[name] != settings[name]]:
        raise SystemExit(f"{output} has other {', '.join(different)} than this call")
    return dict(before["parts"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="python-stdlib")
    parser.add_argument("--bytes", type=int, default=3_000_000, help="of the text that are read")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--only", default="", help="measure only the parts whose names end so")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = load_corpus(DataArguments(data_path=arguments.text))
    text = bytes(corpus[: arguments.bytes]).decode("utf-8", "replace")
    tokens = tokens_of(text)
    results: dict[str, Any] = {
        "shape": f"4 layers, width 128, {VOCABULARY:,} tokens, window {WINDOW}, batch {BATCH}, f32, 1 thread",
        "text": f"{len(text):,} characters, {len(tokens):,} tokens of {arguments.text if arguments.text == 'python-stdlib' else 'a file'}",
        **machine("cpu"),
        "seconds": arguments.seconds,
    }
    named = [f"{variant}, seed {seed}" for seed in range(arguments.seeds) for variant in VARIANTS] + ["gradient"]
    parts = parts_in(arguments.output, results)
    for part in [name for name in named if name not in parts and name.endswith(arguments.only)]:
        found = measured(part, tokens, arguments.seconds, arguments.draws)
        print(part, found, flush=True)
        parts = {**parts, **parts_in(arguments.output, results), part: found}  # another call may have added some
        results |= {"runs": summary(parts), "gradient": parts.get("gradient")}
        if arguments.output:
            arguments.output.write_text(json.dumps(results | {"parts": parts}, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary(parts), indent=2))


if __name__ == "__main__":
    main()
