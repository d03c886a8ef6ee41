"""Push a trained model twice, each time with its card and tokenizer: for further training, and smaller, for inference.

HF_TOKEN=... python examples/push_to_hub.py runs/quickstart user/my-model
"""

import sys

from charformer_training import push_folder


if len(sys.argv) != 3:
    sys.exit(__doc__)
folder, repo_id = sys.argv[1:]
print(push_folder(folder, repo_id).commit_url)
print(push_folder(folder, f"{repo_id}-inference", inference_only=True).commit_url)
