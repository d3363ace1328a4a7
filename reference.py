"""The reference policy of a preference stage: its log-probabilities, computed beside the training or before it."""

import torch
from torch import Tensor

from batches import Batch
from heads import answer_sums, batch_logprobs
from lora import lora_off
from model import Decoder


class Reference:
    """The start of the training: the adapters switched off. ld_alpha: as in heads.answer_sums."""

    def __init__(self, ld_alpha: float | None = None):
        self.ld_alpha = ld_alpha

    @torch.no_grad()
    def sums(self, model: Decoder, batch: Batch) -> Tensor:
        """(N,) fp32: log-probability of each segment's labels, their sum. The model's mode stays."""
        if batch.reference is not None:
            return batch.reference
        return answer_sums(self.logprobs(model, batch), batch, self.ld_alpha)

    @torch.no_grad()
    def logprobs(self, model: Decoder, batch: Batch, temperature: float = 1.0) -> Tensor:
        """(L,) fp32: log-probability of each label."""
        was_training = model.training
        model.eval()
        with lora_off(model):
            values = batch_logprobs(model, batch, temperature)
        model.train(was_training)
        return values
