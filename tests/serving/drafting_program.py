"""vLLM in a process of its own: greedy text with and without draft heads, and how many drafts were right.

python drafting_program.py MODEL HEADS NUMBER_OF_DRAFTS MAX_TOKENS < prompts.json > results.json
"""

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]  # of an environment of its own

    folder, heads, count, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    prompts = [{"prompt_token_ids": ids} for ids in json.load(sys.stdin)]
    more: dict[str, Any] = {}
    if heads != "none":
        more["speculative_config"] = {"method": "medusa", "model": heads, "num_speculative_tokens": count}
        config = json.loads(Path(heads, "config.json").read_text())
        if config["truncated_vocab_size"] < config["vocab_size"]:
            # vLLM 0.32 sets `token_map`, and then takes it for a weight that it has not loaded.
            more["model_loader_extra_config"] = {"enable_weights_track": False}
    llm = LLM(
        folder,
        trust_remote_code=True,
        dtype="float32",
        enforce_eager=True,
        disable_log_stats=False,
        max_num_seqs=1,
        **more,
    )
    settings = SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
    texts = [list(output.outputs[0].token_ids) for output in llm.generate(prompts, settings)]
    counters = {one.name: getattr(one, "value", None) for one in llm.get_metrics()}
    print("RESULTS" + json.dumps({"texts": texts, "counters": {k: v for k, v in counters.items() if "spec" in k}}))


if __name__ == "__main__":
    main()
