"""Charformer: the character-level Transformer of Al-Rfou et al. (2018) for Hugging Face Transformers.

Importing this package makes `AutoConfig`, `AutoModel...` and `AutoTokenizer` know the models.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from .configuration_charformer import CharformerConfig
from .loss_settings import ScheduleContext, register_schedule, rotating_schedule, schedule_names
from .modeling_charformer import (
    CharformerForCausalLM,
    CharformerForSequenceClassification,
    CharformerForTokenClassification,
    CharformerModel,
)
from .tokenization_charformer import CharformerTokenizer


AutoConfig.register("charformer", CharformerConfig)
AutoModel.register(CharformerConfig, CharformerModel)
AutoModelForCausalLM.register(CharformerConfig, CharformerForCausalLM)
AutoModelForSequenceClassification.register(CharformerConfig, CharformerForSequenceClassification)
AutoModelForTokenClassification.register(CharformerConfig, CharformerForTokenClassification)
AutoTokenizer.register(CharformerConfig, slow_tokenizer_class=CharformerTokenizer)

__version__ = "0.1.0"

__all__ = [
    "CharformerConfig",
    "CharformerForCausalLM",
    "CharformerForSequenceClassification",
    "CharformerForTokenClassification",
    "CharformerModel",
    "CharformerTokenizer",
    "ScheduleContext",
    "__version__",
    "register_schedule",
    "rotating_schedule",
    "schedule_names",
]
