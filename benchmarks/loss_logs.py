"""What a stock Trainer, TRL and this package log about the losses of four models, with random weights and data.

    python -m benchmarks.loss_logs [--output benchmarks/results/loss_logs.md]

Each model is trained for one step of two micro-batches of four rows. The table holds the keys that end in or contain `loss`.
TRL's `SFTTrainer` is left out where it is not installed, or where it does not take the model.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForObjectDetection,
    AutoModelForSeq2SeqLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from charformer_training import AuxiliaryLossTrainer, add_auxiliary_losses


SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BACKBONE: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
DETR: dict[str, Any] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    "num_labels": 3,
    "auxiliary_loss": True,
}


def detr() -> Any:
    backbone = AutoConfig.for_model("resnet", **BACKBONE)
    return AutoModelForObjectDetection.from_config(AutoConfig.for_model("detr", **DETR, backbone_config=backbone))


def experts() -> Any:
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES, **more))


def gpt2() -> Any:
    sizes = {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes, bos_token_id=0, eos_token_id=0))
    return add_auxiliary_losses(model, num_targets=2, intermediate_layers=None)


def t5() -> Any:
    sizes = {"vocab_size": 256, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2}
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("t5", **sizes, decoder_start_token_id=0))


MODELS: dict[str, Callable[[], Any]] = {
    "DETR, auxiliary losses": detr,
    "Mixtral, 4 experts": experts,
    "GPT-2, two targets": gpt2,
    "T5, z-loss added": t5,
}


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Random text, or noise with one box in each picture."""

    def __init__(self, pictures: bool):
        self.pictures = pictures

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        if self.pictures:
            box = {
                "class_labels": torch.tensor([index % 3]),
                "boxes": 0.2 + 0.3 * torch.rand(1, 4, generator=generator),
            }
            return {"pixel_values": torch.randn(3, 64, 64, generator=generator), "labels": box}
        ids = torch.randint(3, 256, (16,), generator=generator)
        return {"input_ids": ids, "labels": ids}

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        stacked = {name: [row[name] for row in rows] for name in rows[0]}
        return {
            name: values if isinstance(values[0], dict) else torch.stack(values) for name, values in stacked.items()
        }


def z_loss(outputs: Any, inputs: Any) -> torch.Tensor:
    return outputs.logits.logsumexp(-1).square().mean()


def settings(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def losses(trainer: Any) -> dict[str, float]:
    trainer.train()
    return {key: value for key, value in trainer.state.log_history[0].items() if "loss" in key}


def with_sft(model: Any, folder: str) -> dict[str, float] | None:
    """What TRL's `SFTTrainer` logs; `None` where it cannot train the model."""
    if importlib.util.find_spec("trl") is None or type(model).__name__ not in (
        "MixtralForCausalLM",
        "GPT2LMHeadModel",
    ):
        return None
    import datasets
    import trl  # type: ignore[import-not-found]  # not in every environment

    from modeling_charformer import CharformerTokenizer

    rows = Rows(pictures=False)
    texts = datasets.Dataset.from_list([{name: value.tolist() for name, value in rows[i].items()} for i in range(8)])
    args = trl.SFTConfig(**settings(folder), bf16=False)
    return losses(trl.SFTTrainer(model, args, train_dataset=texts, processing_class=CharformerTokenizer()))


def shown(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    return ", ".join(f"`{name}` {value:.3f}" for name, value in found.items())


def table() -> str:
    lines = ["| Model | `Trainer` | TRL's `SFTTrainer` | `AuxiliaryLossTrainer` |", "| --- | --- | --- | --- |"]
    for name, make in MODELS.items():
        rows = Rows(pictures="DETR" in name)
        with tempfile.TemporaryDirectory() as folder:
            cells = []
            for kind in (Trainer, None, AuxiliaryLossTrainer):
                set_seed(0)
                model = make()
                if kind is None:
                    cells.append(shown(with_sft(model, folder)))
                    continue
                args = TrainingArguments(**settings(folder))
                trainer: Any = kind(model, args, train_dataset=rows, data_collator=rows.collate)
                if "z-loss" in name and kind is AuxiliaryLossTrainer:
                    trainer.add_loss_term("z", z_loss, weight=1e-4)
                cells.append(shown(losses(trainer)))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = table()
    print(found)
    if arguments.output:
        arguments.output.write_text(found + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
