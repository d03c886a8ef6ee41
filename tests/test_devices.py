"""On an accelerator: no tensor of another device, and no step that waits for the device."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from charformer_training import Split
from modeling_charformer import compatibility
from modeling_charformer import modeling_charformer as modeling
from modeling_charformer.auxiliary_heads import AuxiliaryHead
from tests.helpers import ROOT, tiny_trainer


@pytest.mark.slow
def test_models_stay_on_their_device_and_read_no_value():
    done = subprocess.run(
        [sys.executable, "-m", "tests.device_program"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if "no devices made in Python" in done.stdout:
        pytest.skip(done.stdout)
    assert "stays on its device" in done.stdout


def test_heads_are_drawn_alike_where_another_device_is_the_default():
    heads = [AuxiliaryHead(8, 4, index=1) for _ in range(2)]
    heads[0].draw(0.1)
    with torch.device("meta"):  # as for `with torch.device("cuda")`, whose generator is another
        heads[1].draw(0.1)
    weights = [head.weight.detach() for head in heads]
    assert weights[0].equal(weights[1]) and float(weights[0].std()) > 0


class Reading(TorchDispatchMode):
    """Counts the values that are read from tensors, each of which waits for the device, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0
        self.reads: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select"):
            self.reads[self.step] = self.reads.get(self.step, 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"muon": True}], ids=str)
def test_trainer_waits_for_the_device_at_log_entries_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
):
    for module in (modeling, compatibility):  # ids are looked at on the CPU only
        monkeypatch.setattr(module, "check_range", lambda *args, **kwargs: None)
    reading = Reading()

    class Step(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            reading.step = state.global_step + 1

    split = Split("train", np.frombuffer(b"The wind and the sea. " * 100, np.uint8))
    splits = {"train": split, "validation": split}
    trainer = tiny_trainer(str(tmp_path), splits, callbacks=[Step()], max_steps=8, logging_steps=4, **settings)
    with reading:
        trainer.train()
    assert set(reading.reads) - {0, 1} == {4, 8}  # the data loader draws its seed before the first
