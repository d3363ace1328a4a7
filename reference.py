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
        was_training = model.training
        model.eval()
        with lora_off(model):
            sums = segment_sums(batch_logprobs(model, batch), label_counts(batch))
        model.train(was_training)
        return sums
