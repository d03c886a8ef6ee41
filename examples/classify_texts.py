"""Fine-tune a sequence classifier from a language model, and print its accuracy beside two baselines.

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
from transformers import DataCollatorWithPadding, set_seed

from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments
from modeling_charformer import CharformerForSequenceClassification, CharformerTokenizer


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
            pieces = [(text[start : start + length], label) for start in range(0, len(text) - length, length)]
            (test if number % 3 == 1 else train).extend(pieces)
    return balanced(train), balanced(test)


def balanced(examples: Examples) -> Examples:
    """As many examples of each label as the rarest label has, in random order."""
    shuffled = random.Random(0).sample(examples, len(examples))
    each = min(Counter(label for _, label in examples).values())
    groups = [[example for example in shuffled if example[1] == label][:each] for label in range(len(PACKAGES))]
    return [example for group in zip(*groups, strict=True) for example in group]


def of_dataset(name: str) -> tuple[Examples, Examples]:
    from datasets import load_dataset

    splits = load_dataset(name)
    train, test = ([(row["text"], row["label"]) for row in splits[part]] for part in ("train", "test"))
    return train, test


def letters_accuracy(train: Examples, test: Examples, num_labels: int) -> float:
    """Naive Bayes on single bytes: what the frequencies of letters alone tell."""
    counts = np.ones((num_labels, 256))
    for text, label in train:
        counts[label] += np.bincount(np.frombuffer(text.encode(), np.uint8), minlength=256)
    frequent = Counter(label for _, label in train)
    scores = np.log(counts / counts.sum(1, keepdims=True))
    prior = np.array([log(frequent[label] + 1) for label in range(num_labels)])
    guesses = [(prior + scores[:, np.frombuffer(text.encode(), np.uint8)].sum(1)).argmax() for text, _ in test]
    return float(np.mean([guess == label for guess, (_, label) in zip(guesses, test, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a Charformer")
    parser.add_argument("output_dir")
    parser.add_argument("dataset", nargs="?")
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    set_seed(0)

    tokenizer = CharformerTokenizer.from_pretrained(arguments.model)
    train, test = of_dataset(arguments.dataset) if arguments.dataset else snippets(tokenizer.model_max_length - 8)
    test = random.Random(0).sample(test, min(len(test), 2000))
    num_labels = 1 + max(label for _, label in train)
    # The body is the language model's; the classifiers, one of them on each third of the layers, are new.
    model = CharformerForSequenceClassification.from_pretrained(arguments.model, num_labels=num_labels)

    def encoded(examples: Examples) -> list[dict]:
        return [{**tokenizer(text, truncation=True), "labels": label} for text, label in examples]

    trainer = AuxiliaryLossTrainer(
        model=model,
        args=AuxiliaryLossTrainingArguments(
            output_dir=arguments.output_dir,
            max_steps=arguments.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 10,
            logging_steps=max(1, arguments.steps // 6),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=encoded(train),
        eval_dataset=encoded(test),
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    commonest = Counter(label for _, label in train).most_common(1)[0][0]
    print(
        f"accuracy on {len(test)} texts that training has not seen: {accuracy:.3f};"
        f" frequencies of letters {letters_accuracy(train, test, num_labels):.3f},"
        f" always the commonest label {np.mean([label == commonest for _, label in test]):.3f}"
    )


if __name__ == "__main__":
    main()
