"""Settings of a training run: those of the Trainer, of the model and of the data."""

from dataclasses import dataclass, field

from transformers import TrainingArguments


@dataclass
class AuxiliaryLossTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments`, with what `AuxiliaryLossTrainer` adds."""

    log_loss_terms: str = field(
        default="each",
        metadata={
            "help": "'each' logs every term of the loss under its own name; 'groups' logs the mean over the layers of"
            " terms that differ in the layer only (loss_layers, loss_layers_target_2): for deep models.",
            "choices": ["each", "groups"],
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Whether nan and inf losses are left out of the logged loss. Off here: AuxiliaryLossTrainer stops"
            " at them, and looking at every loss would stall the device at every step."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.log_loss_terms not in ("each", "groups"):
            raise ValueError(f"log_loss_terms is {self.log_loss_terms!r}; it must be 'each' or 'groups'")
