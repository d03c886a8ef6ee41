"""Fine-tune a sequence classifier from a language model, and print its accuracy beside three baselines.

python examples/classify_texts.py runs/quickstart OUTPUT_FOLDER [DATASET] [--steps STEPS]

Without DATASET the program asks which package of Python's standard library a snippet of source is from, and downloads nothing.
DATASET is any dataset that `datasets.load_dataset` reads and that has the splits `train` and `test` with the columns `text` and
`label`: a Hub id such as `stanfordnlp/imdb`, or a folder.
"""

import argparse
import random
import sysconfig
from collections import Counter
from math import log
from pathlib import Path

import numpy as np
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, set_seed

from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments
from modeling_charformer import (
    CharformerForSequenceClassification,
    CharformerForTokenClassification,
    CharformerTokenizer,
)


PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
Examples = list[tuple[str, int]]


def snippets(length: int) -> tuple[Examples, Examples]:
    """Pieces of the packages' sources and their labels, to train on and to test on. No file is in both."""
    train: Examples = []
    test: Examples = []
    for label, package in enumerate(PACKAGES):
        files = sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py"))
        for number, file in enumerate(path for path in files if "test" not in path.parts):
            text = file.read_text(encoding="utf-8")
            part, step = (test, length) if number % 3 == 1 else (train, 16)  # those to train on overlap
            part.extend((text[start : start + length], label) for start in range(0, len(text) - length, step))
    return balanced(train), balanced(test)


def balanced(examples: Examples) -> Examples:
    """As many examples of each label as the rarest label has, in random order."""
    shuffled = random.Random(0).sample(examples, len(examples))
    each = min(Counter(label for _, label in examples).values())
    groups = [[example for example in shuffled if example[1] == label][:each] for label in range(len(PACKAGES))]
    return [example for group in zip(*groups, strict=True) for example in group]


def of_dataset(name: str, length: int) -> tuple[Examples, Examples]:
    """The texts and labels of a dataset; of each text what fits the model's window."""
    from datasets import load_dataset

    splits = load_dataset(name)
    train, test = ([(cut(row["text"], length), row["label"]) for row in splits[part]] for part in ("train", "test"))
    return train, test


def cut(text: str, length: int) -> str:
    return text.encode()[:length].decode(errors="ignore")


def naive_bayes(train: Examples, test: Examples, length: int) -> float:
    """The accuracy of naive Bayes on the byte n-grams of one length: what the model must beat to be worth its time."""

    def grams(text: str) -> list[bytes]:
        data = text.encode()
        return [data[start : start + length] for start in range(len(data) - length + 1)]

    counts: dict[int, Counter[bytes]] = {label: Counter() for _, label in train}
    for text, label in train:
        counts[label].update(grams(text))
    frequent = Counter(label for _, label in train)
    kinds = len(set().union(*counts.values()))
    totals = {label: log(found.total() + 0.1 * kinds) for label, found in counts.items()}

    def guess(text: str) -> int:
        read = grams(text)
        scores = {
            label: log(frequent[label]) + sum(log(found[gram] + 0.1) for gram in read) - len(read) * totals[label]
            for label, found in counts.items()
        }
        return max(scores, key=scores.__getitem__)

    return float(np.mean([guess(text) == label for text, label in test]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a Charformer")
    parser.add_argument("output_dir")
    parser.add_argument("dataset", nargs="?")
    parser.add_argument("--steps", type=int, default=1200)
    arguments = parser.parse_args()
    set_seed(0)

    tokenizer = CharformerTokenizer.from_pretrained(arguments.model)
    length = tokenizer.model_max_length
    train, test = of_dataset(arguments.dataset, length) if arguments.dataset else snippets(length - 8)
    test = random.Random(0).sample(test, min(len(test), 2000))
    args = AuxiliaryLossTrainingArguments(
        output_dir=arguments.output_dir,
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=64,
        muon=True,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 10,
        logging_steps=max(1, arguments.steps // 6),
        save_strategy="no",
        report_to="none",
    )

    # Every position is trained to name the label of the text up to it, which teaches far more than the last position alone.
    # The body is the language model's; the classifiers, one of them on each third of the layers, are new.
    reader = CharformerForTokenClassification.from_pretrained(
        arguments.model, num_labels=1 + max(label for _, label in train)
    )
    encoded = [(tokenizer(text, truncation=True), label) for text, label in train]
    trainer = AuxiliaryLossTrainer(
        model=reader,
        args=args,
        train_dataset=[{**inputs, "labels": [label] * len(inputs["input_ids"])} for inputs, label in encoded],
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()

    # The same weights as a sequence classifier, which reads the last position.
    classifier = AuxiliaryLossTrainer(
        model=CharformerForSequenceClassification.from_pretrained(arguments.output_dir),
        args=args,
        eval_dataset=[{**tokenizer(text, truncation=True), "labels": label} for text, label in test],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    accuracy = classifier.evaluate()["eval_accuracy"]
    classifier.save_model()
    commonest = Counter(label for _, label in train).most_common(1)[0][0]
    print(
        f"accuracy on {len(test)} texts that training has not seen: {accuracy:.3f};"
        f" naive Bayes on bytes {naive_bayes(train, test, 1):.3f}, on 4-grams {naive_bayes(train, test, 4):.3f},"
        f" always the commonest label {np.mean([label == commonest for _, label in test]):.3f}"
    )


if __name__ == "__main__":
    main()
