"""The reference policy of a preference stage: its log-probabilities, computed beside the training or before it."""

import torch
from torch import Tensor

from batches import Batch
from heads import batch_logprobs, label_counts, segment_sums
from lora import lora_off
from model import Decoder


class Reference:
    """The start of the training: the adapters switched off."""

    @torch.no_grad()
    def sums(self, model: Decoder, batch: Batch) -> Tensor:
        """(N,) fp32: log-probability of each segment's labels. The model's mode stays."""
        if batch.reference is not None:
            return batch.reference
        return segment_sums(self.logprobs(model, batch), label_counts(batch))

    @torch.no_grad()
    def logprobs(self, model: Decoder, batch: Batch, temperature: float = 1.0) -> Tensor:
        """(L,) fp32: log-probability of each label."""
        was_training = model.training
        model.eval()
        with lora_off(model):
            values = batch_logprobs(model, batch, temperature)
        model.train(was_training)
        return values
