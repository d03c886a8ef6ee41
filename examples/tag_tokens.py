"""Fine-tune a token classifier from a language model: is a byte of Python source part of a name, a string, a comment, ...?

python examples/tag_tokens.py runs/quickstart OUTPUT_FOLDER [STEPS]

The labels come from Python's own tokenizer, so nothing is downloaded. The baseline gives each byte its commonest label.
"""

import io
import keyword
import sys
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
from transformers import DataCollatorForTokenClassification, set_seed

from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments
from modeling_charformer import CharformerForTokenClassification, CharformerTokenizer


LABELS = ("other", "keyword", "name", "number", "string", "comment", "operator")
KINDS = {tokenize.NAME: 2, tokenize.NUMBER: 3, tokenize.STRING: 4, tokenize.COMMENT: 5, tokenize.OP: 6}


def labelled(source: str) -> tuple[bytes, np.ndarray]:
    """The bytes of an ASCII source, and the label of each."""
    starts = np.cumsum([0, *(len(line) for line in source.splitlines(keepends=True))])
    labels = np.zeros(len(source), np.int64)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = 1 if keyword.iskeyword(token.string) else KINDS.get(token.type, 0)
        (row, column), (last_row, last_column) = token.start, token.end
        if kind:
            labels[starts[row - 1] + column : starts[last_row - 1] + last_column] = kind
    return source.encode("ascii"), labels


def windows(files: list[Path], length: int) -> list[dict[str, list[int]]]:
    found = []
    for file in files:
        source = file.read_text(encoding="utf-8")
        if source.isascii() and "\f" not in source:
            data, labels = labelled(source)
            found += [
                {"input_ids": list(data[start : start + length]), "labels": labels[start : start + length].tolist()}
                for start in range(0, len(data) - length, length)
            ]
    return found


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    folder, output_dir = sys.argv[1:3]
    steps = int(sys.argv[3]) if len(sys.argv) == 4 else 400
    set_seed(0)
    model = CharformerForTokenClassification.from_pretrained(
        folder, id2label=dict(enumerate(LABELS)), label2id={label: number for number, label in enumerate(LABELS)}
    )
    tokenizer = CharformerTokenizer.for_model(model.config)
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    length = model.config.max_position_embeddings
    train, test = windows(files[: len(files) // 2], length), windows(files[-len(files) // 8 :], length)[:1000]

    def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
        return float((predictions == labels)[labels >= 0].mean())

    trainer = AuxiliaryLossTrainer(
        model=model,
        args=AuxiliaryLossTrainingArguments(
            output_dir=output_dir,
            max_steps=steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            logging_steps=max(1, steps // 6),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": accuracy(found.predictions.argmax(-1), found.label_ids)},
    )
    trainer.train()
    result = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()

    counts = np.zeros((256, len(LABELS)))
    for window in train:
        np.add.at(counts, (window["input_ids"], window["labels"]), 1)
    guesses = counts.argmax(1)[np.array([window["input_ids"] for window in test])]
    baseline = accuracy(guesses, np.array([window["labels"] for window in test]))
    print(
        f"accuracy on bytes of files that training has not seen: {result:.3f}; commonest label of each byte {baseline:.3f}"
    )


if __name__ == "__main__":
    main()
