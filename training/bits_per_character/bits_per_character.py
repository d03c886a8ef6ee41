"""Bits per character as a metric of the library Evaluate, computed by `charformer_training.bits_per_character`."""

from dataclasses import asdict
from typing import Any

import datasets
import evaluate
import torch

from charformer_training import bits_per_character
from modeling_charformer import CharformerForCausalLM


_DESCRIPTION = """
The code length of texts under a character-level language model, in bits per character of UTF-8 and bits per byte. The
model's window slides over each text by `stride` bytes, and every byte except the first of a text counts once. Stride 1 is
the protocol of Al-Rfou et al. (2018): each character is predicted from the full window before it.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of str): The texts, each of two bytes or more.
    model_id (str): The folder of a Charformer, or its id on the Hub.
    stride (int): Number of bytes by which the window slides, 1 to `window`.
    window (int): Number of bytes that the model sees at once; default: all it can.
    batch_size (int): Number of windows in a batch.
    device (str): Default: "cuda" if available, else "cpu".

Returns:
    bpc (float): Bits per character of UTF-8, over all texts.
    bpb (float): Bits per byte, over all texts.
    texts (list of dict): For each text: bpc, bpb, standard_error, counts, checksum, window, stride and seconds.
"""

_CITATION = """
@inproceedings{al-rfou2019character,
    title={Character-Level Language Modeling with Deeper Self-Attention},
    author={Al-Rfou, Rami and Choe, Dokook and Constant, Noah and Guo, Mandy and Jones, Llion},
    booktitle={Proceedings of the AAAI Conference on Artificial Intelligence},
    year={2019}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class BitsPerCharacter(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/1808.04444"],
        )

    def _compute(
        self,
        predictions: list[str],
        model_id: str,
        stride: int = 1,
        window: int | None = None,
        batch_size: int = 32,
        device: str | None = None,
    ) -> dict[str, Any]:
        model: Any = CharformerForCausalLM.from_pretrained(model_id)
        model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        results = [bits_per_character(model, text, window, stride, batch_size, progress=False) for text in predictions]
        bits = sum(result.bpb * result.counted_bytes for result in results)
        return {
            "bpc": bits / sum(result.counted_characters or 0 for result in results),
            "bpb": bits / sum(result.counted_bytes for result in results),
            "texts": [asdict(result) for result in results],
        }
