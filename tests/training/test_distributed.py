"""Several processes (gloo), however they are started, give the same figures as one."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from charformer_training import bits_per_character
from modeling_charformer import CharformerConfig, CharformerForCausalLM, linear_cross_entropy
from tests.helpers import TINY, loss_logs
from tests.training.distributed_program import CASES, IN_ONE_PASS, case_settings


pytestmark = pytest.mark.slow


CONFIGS = Path(__file__).parents[2] / "training" / "accelerate"
PROGRAM = Path(__file__).with_name("distributed_program.py")


def torchrun(processes: int) -> list[list[str]]:
    return [["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]]


def accelerate(config: str, *options: str) -> list[str]:
    return ["accelerate.commands.launch", "--config_file", str(CONFIGS / config), *options]


def two_machines() -> list[list[str]]:
    """Both of them this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port))
    return [accelerate("several_nodes.yaml", "--machine_rank", str(rank), *options) for rank in range(2)]


# How the processes are started, by command lines that run at once; how many there are; and what they train.
LAUNCHES: dict[str, tuple[Callable[[], list[list[str]]], int, list[str]]] = {
    "torchrun on 2": (lambda: torchrun(2), 2, list(CASES)),
    "torchrun on 4": (lambda: torchrun(4), 4, ["plain"]),
    "accelerate, one node": (lambda: [accelerate("one_node.yaml")], 2, ["plain"]),
    "accelerate, several nodes": (two_machines, 2, ["plain"]),
    "accelerate, FSDP2": (
        lambda: [accelerate("fsdp2.yaml")],
        2,
        ["plain", "checkpointed", "learned_weights", "saved", "added", "muon"],
    ),
}


def model() -> CharformerForCausalLM:
    """What the processes evaluate."""
    torch.manual_seed(0)
    return CharformerForCausalLM(CharformerConfig(**(TINY | {"initializer_range": 0.1})))


@pytest.fixture(scope="module")
def launched(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    """The results of a launch, which happens once."""
    results: dict[str, dict] = {}

    def launch(name: str) -> dict:
        if name not in results:
            commands, _, cases = LAUNCHES[name]
            folder = tmp_path_factory.mktemp("distributed")
            torch.save(model().state_dict(), folder / "weights.pt")
            processes = [
                subprocess.Popen(
                    [sys.executable, "-m", *command, str(PROGRAM), str(text_file), str(folder), *cases],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for command in commands()
            ]
            shown = [process.communicate(timeout=300)[0] for process in processes]
            assert all(process.returncode == 0 for process in processes), "\n".join(shown)[-5000:]
            results[name] = json.loads((folder / "results.json").read_text())
        return results[name]

    return launch


@pytest.mark.parametrize(
    ("launch", "case"), [(name, case) for name, (_, _, cases) in LAUNCHES.items() for case in cases]
)
def test_several_processes_log_the_figures_of_one(make_trainer, launched, launch, case, monkeypatch):
    monkeypatch.setattr(linear_cross_entropy, "MIN_VOCABULARY", 1 if case in IN_ONE_PASS else 4096)
    settings = case_settings(case, 1)
    settings.pop("gradient_checkpointing", None)  # changes nothing, but where the memory goes
    single = make_trainer(**settings)
    if case == "added":
        single.add_loss_term("confidence", lambda outputs, inputs: outputs.logits.amax(-1).mean(), 0.1, "cosine")
    single.train()
    metrics, expected = single.evaluate(), loss_logs(single)
    found = launched(launch)[case]
    processes = LAUNCHES[launch][1]
    assert found["processes"] == processes
    assert found["kind"] == ("FSDP" if "FSDP" in launch else "MULTI_CPU")
    tolerance = 0.02 if case in ("half", "muon") else 1e-4  # Muon computes in bfloat16
    assert [set(entry) for entry in found["logs"]] == [set(entry) for entry in expected]
    for one, other in zip(found["logs"], expected, strict=True):
        assert one == pytest.approx(other, rel=tolerance)
    # 27 windows over batches of 4 on two processes: the last ones are filled up, and must not count twice
    assert len(single.eval_dataset) % (4 * processes) != 0
    for name, value in found["metrics"].items():
        assert value == pytest.approx(metrics[name], rel=tolerance / 10), name
    assert ("eval_bpc" in found["metrics"]) == (case not in ("added", "ignores_counts"))
    # Each process reads its own windows only, and together they read each once.
    assert sorted(index for read in found["read"] for index in read) == list(range(8 * 8))


@pytest.mark.parametrize("launch", ["torchrun on 2", "torchrun on 4"])
def test_several_processes_evaluate_as_one(launched, text_file, launch):
    expected = bits_per_character(model(), text_file.read_bytes()[:700], stride=5, batch_size=3, progress=False)
    assert launched(launch)["evaluation"] == pytest.approx(expected.bpc, rel=1e-9)
