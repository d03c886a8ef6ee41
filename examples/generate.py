"""Load a trained model and let it write.

python examples/generate.py runs/quickstart "def "
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

import modeling_charformer  # noqa: F401  (makes the Auto classes know the model)


if len(sys.argv) != 3:
    sys.exit(__doc__)
folder, prompt = sys.argv[1:]
set_seed(0)
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)

inputs = tokenizer(prompt, return_tensors="pt")
room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
model.generate(
    **inputs,
    max_new_tokens=min(200, room),
    do_sample=True,
    temperature=0.8,
    streamer=TextStreamer(tokenizer),
)
