"""The models that the tests serve, trained on a few lines until they know them: their greedy text is no loop."""

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from charformer_training import add_auxiliary_losses
from modeling_charformer import CharformerConfig, CharformerForCausalLM, CharformerTokenizer


EOS = 0xFE
# Each ends with the byte that ends a text. Of one, two, three and four bytes a character.
TEXTS = (
    "The quick brown fox jumps over the lazy dog, and is off.",
    "Größere Äpfel kosten 3 € je Stück; süße Öle kosten 12 €.",
    "Широкая электрификация южных губерний даст толчок.",
    "def area(r):\n    return 3.14159 * r ** 2  # 🙂 round\n",
    "Pack my box with five dozen jugs of jam, 0123456789.",
)
CORPUS = b"".join(text.encode() + bytes([EOS]) for text in TEXTS)
WINDOW = 128
MODELS = ("charformer", "inference", "post", "gpt2", "llama")
# vLLM serves heads of 32, 64 and more on a CPU.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": WINDOW,
    "eos_token_id": EOS,
}
CHARFORMER = SIZES | {"attention_dropout": 0.0, "activation_dropout": 0.0, "num_targets": 2}


def train(model: Any, steps: int = 300) -> Any:
    """On windows of the corpus, which begins anew where it ends, until almost every next byte is known."""
    corpus = torch.tensor(list(CORPUS * 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 6e-3 * min(1.0, (step + 1) / 20, 2 * (1 - step / steps))
        starts = torch.randint(0, len(CORPUS), (6,), generator=generator).tolist()
        ids = torch.stack([corpus[start : start + WINDOW] for start in starts])
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def make_models(folder: Path) -> dict[str, Path]:
    """Train and save each; the folders by the names of `MODELS`."""
    torch.manual_seed(0)
    full: Any = CharformerForCausalLM(
        CharformerConfig(**CHARFORMER, target_heads="sequential", loss_weighting="uncertainty")
    )
    # As many positions as symbols: what an engine takes for a table of symbols must still be that of positions.
    post: Any = CharformerForCausalLM(
        CharformerConfig(
            **(CHARFORMER | {"max_position_embeddings": 256}), norm_placement="post", tie_word_embeddings=True
        )
    )
    gpt2: Any = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_embd=64,
            n_layer=2,
            n_head=2,
            n_positions=WINDOW,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=EOS,
        )
    )
    llama: Any = LlamaForCausalLM(LlamaConfig(vocab_size=256, **(SIZES | {"bos_token_id": None})))
    trained = {
        "charformer": train(full),
        "post": train(post),
        "gpt2": train(add_auxiliary_losses(gpt2, num_targets=2)),
        "llama": train(add_auxiliary_losses(llama, num_targets=2, classifiers="own", loss_weighting="uncertainty")),
    }
    trained["inference"] = trained["charformer"].without_auxiliary_heads()
    for name in MODELS:
        trained[name].save_pretrained(folder / name)
        CharformerTokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in MODELS}
