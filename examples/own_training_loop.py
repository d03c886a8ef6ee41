"""The losses in a custom training loop, without a Trainer: `loss`, `loss_dict` and `loss_weights`.

python examples/own_training_loop.py
"""

import torch

from modeling_charformer import CharformerConfig, CharformerForCausalLM, CharformerTokenizer


torch.manual_seed(0)
model = CharformerForCausalLM(
    CharformerConfig(
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
ids = CharformerTokenizer()(["round and round the rugged rock "] * 8, return_tensors="pt")["input_ids"]

steps = 60
for step in range(steps):
    # The schedule of the intermediate layers follows the share of training done.
    outputs = model(ids, labels=ids, training_progress=step / steps)
    outputs.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 15 == 0:
        weighted = sum(outputs.loss_weights[name] * value for name, value in outputs.loss_dict.items())
        assert torch.isclose(outputs.loss, weighted)
        terms = "  ".join(
            f"{outputs.loss_weights[name]:g} * {name} {value:.2f}" for name, value in outputs.loss_dict.items()
        )
        print(f"step {step:2}  loss {outputs.loss:.2f}  =  {terms}")

model.eval()
with torch.no_grad():
    print(f"language-model loss {model(ids, labels=ids).loss:.3f} nats per character")
