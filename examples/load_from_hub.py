"""Use a shared model where the charformer package is not installed: with the code of its own repository.

python examples/load_from_hub.py user/my-model "def "
"""

import sys

from transformers import pipeline, set_seed


if len(sys.argv) != 3:
    sys.exit(__doc__)
repo_id, prompt = sys.argv[1:]
set_seed(0)
generator = pipeline("text-generation", model=repo_id, trust_remote_code=True)
room = generator.model.config.max_position_embeddings - len(prompt.encode())
print(generator(prompt, max_new_tokens=min(200, room), do_sample=True, temperature=0.8)[0]["generated_text"])
