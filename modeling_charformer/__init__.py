"""Charformer: the character-level Transformer of Al-Rfou et al. (2018) for Hugging Face Transformers.

Importing this package makes `AutoConfig`, `AutoModel`, `AutoModelForCausalLM` and `AutoTokenizer` know the model.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from .auxiliary_losses import register_schedule
from .configuration_charformer import CharformerConfig
from .modeling_charformer import CharformerForCausalLM, CharformerModel
from .tokenization_charformer import CharformerTokenizer


AutoConfig.register("charformer", CharformerConfig)
AutoModel.register(CharformerConfig, CharformerModel)
AutoModelForCausalLM.register(CharformerConfig, CharformerForCausalLM)
AutoTokenizer.register(CharformerConfig, slow_tokenizer_class=CharformerTokenizer)

__version__ = "0.1.0"

__all__ = [
    "CharformerConfig",
    "CharformerForCausalLM",
    "CharformerModel",
    "CharformerTokenizer",
    "__version__",
    "register_schedule",
]
