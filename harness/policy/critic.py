"""PPO's value model: a copy of the policy's network with a scalar head, as large as the policy."""

import copy

from torch import Tensor, nn
from transformers import PreTrainedModel

from harness.policy.loading import decoder
from harness.policy.logprobs import completion_states
from harness.policy.packing import Packing
from harness.rollout.batch import Batch


class Critic(nn.Module):
    """Estimates the return before each completion token is chosen."""

    def __init__(self, policy: PreTrainedModel) -> None:
        """Starts from the policy's weights, with a head that says 0 everywhere."""
        super().__init__()
        self.network = copy.deepcopy(decoder(policy))
        width = policy.get_output_embeddings().weight.shape[1]  # of the last states; layers may have another (OPT-350m)
        # In float32 whatever the policy computes in: returns are regressed, not ranked.
        self.head = nn.Linear(width, 1, device=policy.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Values [B, T], 0 where masked, on the critic's device."""
        packing = Packing(self.network, batch)
        return packing.of_completions(self.head(completion_states(self.network, packing).float()).squeeze(-1))
