"""lm-eval's view of the policy in memory."""

from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from harness.config import RolloutConfig
from harness.policy.loading import end_tokens
from harness.rollout.embedded import EmbeddedEngine


class PolicyLM(HFLM):
    """HFLM whose plain sampling is the rollouts'.

    It is faster, and the random numbers of a problem depend on its place alone, so that two policies are asked under
    the same ones. What is greedy, truncated or ended by other texts than the end-of-sequence token is transformers'.
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

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor, **settings: Any
    ) -> Tensor:
        # HFLM looks for the end-of-sequence token by decoding the whole batch after every token, which takes longer
        # than the forward pass of a small model.
        others = [text for text in stop if text != self.tokenizer.eos_token]
        if not others and _is_plain(settings):
            temperature = settings.get("temperature", 1.0)
            return self._sample(context, attention_mask, max_length - context.shape[1], temperature)
        return super()._model_generate(
            context,
            max_length,
            others,
            attention_mask=attention_mask,
            eos_token_id=list(end_tokens(self.model, self.tokenizer)),
            **settings,
        )

    def _sample(self, context: Tensor, present: Tensor, max_tokens: int, temperature: float) -> Tensor:
        """``context`` [B, W], which is padded on the left, with up to ``max_tokens`` tokens behind it."""
        prompts = [row[mask.bool()].tolist() for row, mask in zip(context.cpu(), present.cpu(), strict=True)]
        config = RolloutConfig("embedded", len(prompts), temperature, len(prompts), cuda_graphs=False)
        ends, pad = end_tokens(self.model, self.tokenizer), self.tokenizer.pad_token_id
        engine = EmbeddedEngine(self.model, config, ends, pad, max_tokens)
        # lm-eval's batches follow each other in torch's global generator, which the evaluation has seeded.
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        completions = engine.generate(prompts, 1, generator).completions
        return torch.cat([context, completions.to(context.device)], 1)


def _is_plain(settings: dict[str, Any]) -> bool:
    """Whether these generation settings ask for the whole distribution, at whatever temperature."""
    whole = {"do_sample": True, "top_k": 0, "top_p": 1.0}
    rest = {name: value for name, value in settings.items() if name != "temperature"}
    return rest == whole and settings.get("temperature", 1.0) > 0
