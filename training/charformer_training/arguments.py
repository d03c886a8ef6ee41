"""Settings of a training run: those of the Trainer, of the model and of the data."""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames


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
    muon: bool = field(
        default=False,
        metadata={
            "help": "Whether Muon trains the linear layers of the model's body, scaled so that learning_rate and"
            " weight_decay mean what they do for AdamW, which trains the rest. Dearer steps, and fewer of them."
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
        if self.muon and self.optim not in (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED):
            raise ValueError(
                f"optim is {OptimizerNames(self.optim).value!r} and muon is on: what Muon leaves is trained by AdamW, so"
                " that optim must be 'adamw_torch' or 'adamw_torch_fused'"
            )
        if self.muon and self.optim_args:
            raise ValueError(f"optim_args is {self.optim_args!r} and muon is on, which has none; leave it out")
