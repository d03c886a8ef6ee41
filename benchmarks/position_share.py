"""What `position_share` does to learning: the same seconds of training, with auxiliary losses on all and on some positions.

    python benchmarks/position_share.py [--text FILE] [--seconds 30] [--seeds 3] [--output FILE]

A model of GPT-2's kind (4 layers, width 128, 16,384 tokens) is trained on real text: FILE, or the sources of Python's standard
library. Its tokens are those of a byte-pair encoding that is trained on the same text. Auxiliary losses are those of all layers
and of 2 targets. All runs have the same seconds of one CPU thread, in which the learning rate falls to 0, so that dearer steps are fewer.

- `validation`: the loss of the next token after training, in nats, and its standard deviation over seeds.
- `gradient`: variance of the gradient of the weighted loss over draws of positions, on one batch, relative to the squared norm of the
  gradient on all positions; `from batches` is its variance over batches on all positions. Both of a model that was trained for a while.
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="python-stdlib")
    parser.add_argument("--bytes", type=int, default=8_000_000, help="of the text that are read")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus = load_corpus(DataArguments(data_path=arguments.text))
    text = bytes(corpus[: arguments.bytes]).decode("utf-8", "replace")
    tokens = tokens_of(text)
    training, held_out = tokens[: int(0.95 * len(tokens))], tokens[int(0.95 * len(tokens)) :]
    runs: dict[str, dict[str, Any]] = {}
    for variant in VARIANTS:
        losses, steps = [], []
        for seed in range(arguments.seeds):
            model, count = train(variant, training, arguments.seconds, seed)
            losses.append(validation_loss(model, held_out))
            steps.append(count)
        deviation = statistics.stdev(losses) if len(losses) > 1 else None
        runs[variant] = {
            "validation": round(statistics.mean(losses), 4),
            "deviation": None if deviation is None else round(deviation, 4),
            "steps": round(statistics.mean(steps)),
            "losses": [round(loss, 4) for loss in losses],
        }
        print(variant, runs[variant], flush=True)
    variances = gradient_variances(model, training, arguments.draws)
    print(variances)
    results = {
        "shape": f"4 layers, width 128, {VOCABULARY:,} tokens, window {WINDOW}, batch {BATCH}, f32, 1 thread",
        "text": f"{len(text):,} characters, {len(tokens):,} tokens of {arguments.text if arguments.text == 'python-stdlib' else 'a file'}",
        **machine("cpu"),
        "seconds": arguments.seconds,
        "runs": runs,
        "gradient": {name: round(value, 4) for name, value in variances.items()},
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
