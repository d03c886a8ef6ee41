"""What Charformer adds to `push_to_hub`: a model card with the known facts instead of an empty template."""

import os
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard, ModelCardData


TAGS = ["charformer", "character-level", "byte-level", "auxiliary-losses"]

# The Hub's name for the task of each Auto class, and the card's name for a model of each task.
TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
KINDS = {
    "feature-extraction": "model",
    "text-generation": "language model",
    "text-classification": "classifier of texts",
    "token-classification": "classifier of characters",
}

CARD = """
# {name}

A character-level {kind} in the architecture of
[Al-Rfou et al. (2018)](https://arxiv.org/abs/1808.04444), with the code of the `charformer` package. Its characters are the
bytes of UTF-8.

{facts}
## Use

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("{repo_id}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{repo_id}", trust_remote_code=True)
```

Where the `charformer` package is installed, `import modeling_charformer` takes the place of `trust_remote_code=True`, and no
code of this repository is run.

## Limits

The model knows nothing but the text it was trained on, cannot see further back than its window, and nothing in it checks
that what it writes is true, safe or original.

## Citation

```bibtex
@inproceedings{{alrfou2019character,
  title     = {{Character-Level Language Modeling with Deeper Self-Attention}},
  author    = {{Al-Rfou, Rami and Choe, Dokook and Constant, Noah and Guo, Mandy and Jones, Llion}},
  booktitle = {{Proceedings of the AAAI Conference on Artificial Intelligence}},
  year      = {{2019}},
}}
```
"""


def is_unfilled_form(card: ModelCard) -> bool:
    """Whether `card` is the unfilled template that Transformers writes for a repository without a card."""
    form = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    return all(
        line in form or line.startswith("This is the model card of a 🤗 transformers model")
        for line in card.text.splitlines()
    )


class CharformerPushToHubMixin:
    """`push_to_hub` and `save_pretrained(push_to_hub=True)` with a filled-in model card.

    A card that somebody has written is not changed.
    """

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
    ) -> CommitInfo:
        path = Path(working_dir, "README.md")
        if path.exists() and is_unfilled_form(form := ModelCard.load(path)):
            self._write_card(path, repo_id, list(form.data.tags or []))
        commit: CommitInfo = super()._upload_modified_files(  # type: ignore[misc]  # PushToHubMixin's, a later base
            working_dir, repo_id, *args, **kwargs
        )
        return commit

    def _write_card(self, path: Path, repo_id: str, tags: list[str]) -> None:
        # A configuration or a tokenizer belongs to a model, which is most often a language model.
        auto_class = getattr(self, "_auto_class", None)
        auto_class = auto_class if auto_class in TASKS else "AutoModelForCausalLM"
        task = TASKS[auto_class]
        data = ModelCardData(
            library_name="transformers",
            pipeline_tag=task,
            license="apache-2.0",
            tags=[*TAGS, *(tag for tag in tags if tag not in TAGS)],
        )
        text = CARD.format(
            name=repo_id.split("/")[-1],
            repo_id=repo_id,
            kind=KINDS[task],
            auto_class=auto_class,
            facts=self._card_facts(),
        )
        ModelCard(f"---\n{data.to_yaml()}\n---\n{text}").save(path)

    def _card_facts(self) -> str:
        """Facts about the pushed object: a paragraph or a table in Markdown that ends with a line break."""
        return ""
