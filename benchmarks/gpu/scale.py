"""The sizes of all parts: those that are reported, and toy ones that a CPU runs in seconds."""

from dataclasses import dataclass, field
from typing import Any

from benchmarks.train_step import Shape


@dataclass(frozen=True)
class Scale:
    device: str
    text: str
    """The file of tiny Shakespeare."""
    compiler: str | None = "inductor"
    """The backend of torch.compile; `None` leaves out all that is compiled."""
    shapes: dict[str, Shape] = field(default_factory=lambda: {"T64": Shape(64, 64), "T12": Shape(12, 64)})
    memory: Shape = Shape(64, 16)
    repeats: int = 8
    multiply: int = 8192
    shakespeare: dict[str, Any] = field(default_factory=dict)
    """Fields in place of those of the recipe, as for the two below."""
    drafting: dict[str, Any] = field(default_factory=lambda: {"data_path": "python-stdlib", "bf16": True})
    prompts: int = 4
    length: int = 300
    exact_length: int = 40
    """Characters of each text that must be the same as on the CPU."""
    gpt2: dict[str, Any] = field(default_factory=dict)
    gpt2_batch: int = 8
    gpt2_window: int = 512
    tests: tuple[str, ...] = ("tests/modeling/test_auxiliary_losses.py",)


def toy(text: str, device: str = "cpu") -> Scale:
    """Every part in seconds on a CPU. The figures mean nothing."""
    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "max_eval_bytes": 200,
        "warmup_steps": 0,
        "bf16": False,
        "dataloader_pin_memory": False,
        "use_cpu": device == "cpu",
    }
    return Scale(
        device=device,
        text=text,
        compiler="eager",
        shapes={"T12": Shape(2, 2, 32, 32)},
        memory=Shape(2, 2, 32, 32),
        repeats=1,
        multiply=64,
        shakespeare=small | {"num_hidden_layers": 3, "eval_steps": 2},
        drafting=small | {"num_hidden_layers": 2, "data_path": text},
        prompts=1,
        length=20,
        exact_length=16,
        gpt2={"n_layer": 12, "n_embd": 16, "n_head": 2, "vocab_size": 64, "bos_token_id": None, "eos_token_id": None},
        gpt2_batch=1,
        gpt2_window=16,
        tests=(),
    )
