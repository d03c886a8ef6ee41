"""Two processes (torchrun, gloo) give the same figures as one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import loss_logs
from tests.training.distributed_program import CASES


@pytest.fixture(scope="module")
def two_processes(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("distributed")
    program = Path(__file__).with_name("distributed_program.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(program)]
    result = subprocess.run([*command, str(text_file), str(folder)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-5000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_processes_log_the_figures_of_one(make_trainer, two_processes, case):
    single = make_trainer(model=CASES[case].get("model"))
    single.train()
    metrics, expected = single.evaluate(), loss_logs(single)
    found = two_processes[case]
    assert found["processes"] == 2
    assert [set(entry) for entry in found["logs"]] == [set(entry) for entry in expected]
    for one, other in zip(found["logs"], expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    # 27 windows over batches of 4 on two processes: the last ones are filled up, and must not count twice
    assert len(single.eval_dataset) % 8 != 0
    for name, value in found["metrics"].items():
        assert value == pytest.approx(metrics[name], rel=1e-5), name
    assert "eval_bpc" in found["metrics"]
