"""README's snippets and the console programs of an installed package, run in a folder outside the repository.

`make test-wheel` builds and installs the package in an environment of its own, and calls this with it. No test of `make test`
imports it: there, the packages are those of the repository.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import transformers

import charformer_training
import modeling_charformer


README = Path(__file__).parents[1] / "README.md"
SMALL = (
    "--max_steps 4 --logging_steps 2 --eval_steps 2 --save_steps 2 --hidden_size 16 --intermediate_size 32"
    " --max_eval_bytes 300 --sample_length 5 --data_path my_text.txt"
)


def readers_names() -> dict[str, Any]:
    """What README's snippets leave to the reader: GPT-2, here a tiny one, and two datasets."""
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 12, "n_head": 2, "n_positions": 64, "vocab_size": 256}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained("gpt2")
    corpus = charformer_training.load_corpus(charformer_training.arguments.DataArguments(data_path="my_text.txt"))
    splits = charformer_training.split_corpus(corpus, 0.8, 0.2)
    return {
        "train_dataset": charformer_training.RandomWindows(splits["train"], 24, 16, seed=0),
        "eval_dataset": charformer_training.ConsecutiveWindows(splits["validation"], 24),
    }


def call(program: str, arguments: str, expected: str) -> None:
    """Call a console program, which must succeed and print the expected words."""
    command = [str(Path(sys.executable).with_name(program)), *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and expected in result.stdout, result.stdout + result.stderr
    print(f"{program} runs")


def main() -> None:
    for package in (modeling_charformer, charformer_training):
        assert "site-packages" in str(package.__file__), f"{package.__name__} is not an installed one"
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("my_text.txt").write_text("To be, or not to be, that is the question.\n" * 60)
        names = readers_names()
        for number, block in enumerate(blocks, 1):
            exec(compile(block.replace("max_steps=1000", "max_steps=2"), f"snippet {number}", "exec"), names)  # noqa: S102
            print(f"snippet {number} of the README runs")
        for run in ("runs/one", "runs/two"):
            call("charformer-train", f"quickstart.yaml {SMALL} --output_dir {run}", "Load it with:")
        call("charformer-evaluate", "runs/one my_text.txt --stride 64", "bits per character")
        call("charformer-compare", "runs/one runs/two --output both.png", "steps")
        assert Path("both.png").is_file()
        os.chdir("/")


if __name__ == "__main__":
    main()
