"""Auxiliary classifiers, like Inception's, in a ResNet that reads letters: images of matplotlib's own fonts, three of which are held out.

python examples/image_classifier.py OUTPUT_FOLDER
"""

import string
import sys
from pathlib import Path

import matplotlib
import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoModelForImageClassification, ResNetConfig, set_seed

from charformer_training import AuxiliaryLossTrainer, AuxiliaryLossTrainingArguments, add_auxiliary_losses


if len(sys.argv) != 2:
    sys.exit(__doc__)
(output_dir,) = sys.argv[1:]
set_seed(0)
LETTERS, SIDE, COPIES = string.ascii_lowercase, 24, 12
fonts = [
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold", "STIXGeneral",
    "STIXGeneralBol", "cmr10", "cmss10", "cmb10",
]  # fmt: skip
held_out = ["STIXGeneralBolIta", "cmtt10", "DejaVuSansMono-Oblique"]


def images(names: list[str], copies: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Every letter of each font, drawn `copies` times at random places, in random sizes, with noise."""
    random, rows = numpy.random.default_rng(seed), []
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    for name in names:
        for _ in range(copies):
            font = ImageFont.truetype(str(folder / f"{name}.ttf"), int(random.integers(14, 20)))
            for label, letter in enumerate(LETTERS):
                image = Image.new("L", (SIDE, SIDE))
                place = SIDE / 2 + random.uniform(-2, 2, size=2)
                ImageDraw.Draw(image).text((place[0], place[1]), letter, fill=255, font=font, anchor="mm")
                pixels = numpy.asarray(image, dtype=numpy.float32)[None] / 255 + random.normal(0, 0.2, (1, SIDE, SIDE))
                rows.append({"pixel_values": torch.tensor(pixels, dtype=torch.float32), "labels": torch.tensor(label)})
    return rows


def accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


train, test = images(fonts, COPIES, seed=1), images(held_out, 4, seed=2)
# Any image classifier: AutoModelForImageClassification.from_pretrained(...). This one is small and new.
config = ResNetConfig(
    num_channels=1, embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], layer_type="basic"
)
config.num_labels = len(LETTERS)
model = AutoModelForImageClassification.from_config(config)
add_auxiliary_losses(model, intermediate_layers=[2, 3], intermediate_weight=0.3)

trainer = AuxiliaryLossTrainer(
    model=model,
    args=AuxiliaryLossTrainingArguments(
        output_dir=output_dir, num_train_epochs=4, per_device_train_batch_size=64, per_device_eval_batch_size=64,
        learning_rate=3e-3, lr_scheduler_type="cosine", logging_steps=40, save_strategy="no", report_to="none",
    ),
    train_dataset=train,
    eval_dataset=test,
    compute_metrics=accuracy,
)  # fmt: skip
trainer.train()
found = trainer.evaluate()
trainer.save_model()

# The baseline: the letter of the nearest image of the training set.
seen, wanted = (torch.stack([row["pixel_values"] for row in rows]).flatten(1) for rows in (train, test))
nearest = torch.cdist(wanted, seen).argmin(1)
right = sum(int(train[int(index)]["labels"] == row["labels"]) for index, row in zip(nearest, test, strict=True))
print(
    f"letters read in fonts never seen: {found['eval_accuracy']:.1%}, by the nearest image {right / len(test):.1%},"
    f" by chance {1 / len(LETTERS):.1%}"
)
