"""Share a trained model: all of it to train on, and beside it the smaller one to use.

HF_TOKEN=... python examples/push_to_hub.py runs/quickstart user/my-model
"""

import sys

from modeling_charformer import CharformerForCausalLM, CharformerTokenizer


folder, repo_id = sys.argv[1:]
model = CharformerForCausalLM.from_pretrained(folder)
tokenizer = CharformerTokenizer.from_pretrained(folder)
for name, pushed in ((repo_id, model), (f"{repo_id}-inference", model.without_auxiliary_heads())):
    pushed.push_to_hub(name)  # type: ignore[arg-type]  # wrapped by Transformers
    tokenizer.push_to_hub(name)
    print(f"{name}: {pushed.num_parameters():,} parameters")
