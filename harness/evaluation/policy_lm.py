"""lm-eval's view of the policy in memory."""

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class PolicyLM(HFLM):
    """HFLM that ends sequences at the end-of-sequence token itself.

    HFLM looks for it by decoding the whole batch after every token, which takes longer than the forward pass of a small
    model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        # The arithmetic of the rollouts: bfloat16 on a GPU, from float32 weights.
        precision = torch.bfloat16 if model.device.type == "cuda" else None
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            mixed_precision_dtype=precision,
        )

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        eos = self.tokenizer.eos_token
        others = [text for text in stop if text != eos]
        return super()._model_generate(context, max_length, others, eos_token_id=self.tokenizer.eos_token_id, **kwargs)
