"""Losses over pairs of answers, and the stages dpo and orpo.

Letters: c and r are the policy's log-probabilities of the chosen and the rejected answer (sums over their tokens), c0
and r0 those of the reference policy, all (P,) fp32; delta = (c - r) - (c0 - r0).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from batches import Batch
from heads import batch_logprobs, label_counts, segment_sums
from model import Decoder
from objectives import Metrics, Stage
from reference import Reference


@dataclass(frozen=True)
class PreferenceOptions:
    pref_beta: Annotated[float, "how strongly the policy is held to the reference; spec: beta"] = 0.1
    pref_loss: Annotated[Literal["sigmoid"], "loss of a pair"] = "sigmoid"


def sigmoid_loss(delta: Tensor, beta: float) -> Tensor:
    """-log sigmoid(beta delta): DPO, arXiv 2305.18290 eq. 7. delta (P,) -> (P,)."""
    return -F.logsigmoid(beta * delta)


class PairPreference(Stage):
    metric_names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
                    "logps/rejected")  # fmt: skip
    evaluation_names = ("loss", *metric_names)

    def __init__(self, options: PreferenceOptions, reference: Reference):
        self.options, self.reference = options, reference

    def weight(self, batch: Batch) -> int:
        return batch.pairs

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over the pairs."""
        policy = segment_sums(batch_logprobs(model, batch), label_counts(batch))  # (2P,)
        reference = self.reference.sums(model, batch)
        chosen, rejected = policy.split(batch.pairs) if batch.pairs else (policy, policy)
        rewards = self.options.pref_beta * (policy - reference).detach()
        rewards_chosen, rewards_rejected = rewards.split(batch.pairs) if batch.pairs else (rewards, rewards)
        delta = (policy - reference).view(2, -1)
        losses = sigmoid_loss(delta[0] - delta[1], self.options.pref_beta)
        metrics = {
            "rewards/chosen": rewards_chosen,
            "rewards/rejected": rewards_rejected,
            "rewards/accuracies": (rewards_chosen > rewards_rejected).float(),
            "rewards/margins": rewards_chosen - rewards_rejected,
            "logps/chosen": chosen.detach(),
            "logps/rejected": rejected.detach(),
        }
        count = torch.full((), float(batch.pairs), device=policy.device)
        return losses.sum(), {name: torch.stack([value.sum(), count]) for name, value in metrics.items()}
