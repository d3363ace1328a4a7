"""Stage rm: a scalar head on the decoder, trained so that the better answer of a pair gets the higher number.

With v_c[t], v_r[t] the head's values at the t-th token of prompt + chosen and prompt + rejected, rm_loss says
what the loss of a pair is:

    span   mean of -log sigmoid(v_c[t] - v_r[t]) over t from the first token in which the two differ to the
           end of the longer (of two that are equal, the last token alone): LLaMA-Factory's
    last   -log sigmoid(v_c - v_r) at the two last tokens alone: arXiv 2009.01325 section 3.4; trl's

The score of a text is the value at its last token, so `last` teaches what is asked, and `span` gives a value
to every token, which a value function may start from. There is no padding here: beyond its end the shorter
answer keeps the value of its last token. An answer ends with the last token that the model has to write (its
stop token); what a template puts behind that is not looked at. The head has no dropout (trl's has 0.1): with
it the loss would depend on how pairs are put together.

    dialogue = [Message("user", "2 + 2?"), Message("assistant", "4")]
    scores = score_dialogues(model, tokenizer, template, [dialogue])
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from generation.company import called_alone
from model import Decoder
from options.errors import UserError
from options.option import option
from pipeline.batch import ROW_MULTIPLE, Batch, Example, collate
from stages.logprobs import device_of, hidden_states, in_eval_mode
from stages.metrics import Metrics, by_kind, summed
from stages.stage import Stage
from text.render import Message, encode_dialogue
from text.tokenizer import Tokenizer

SCORE_TOKENS = 4096  # tokens scored at once: enough to keep a device busy, and few beside what training holds


def span_loss(values: Tensor, tokens: Tensor, starts: Tensor, ends: Tensor, longest: int) -> Tensor:
    """Loss of each pair, (P,) in the dtype of values.

    values, tokens (T,) of the flat row; starts, ends (2P,) int64: where in it the segments begin and,
    exclusively, end, first those of the chosen answers; longest: at least ends - starts, known on the host.
    """
    pairs = len(starts) // 2
    starts, lengths = starts.view(2, pairs, 1), (ends - starts).view(2, pairs, 1)
    place = torch.arange(longest, device=values.device)  # (M,)
    at = starts + torch.minimum(place, lengths - 1)  # (2, P, M)
    chosen, rejected = values[at]
    within = place < lengths.amax(0)  # (P, M)
    differs = ((tokens[at[0]] != tokens[at[1]]) | (place >= lengths.amin(0))) & within
    span = (differs.cumsum(1) > 0) & within  # from the first difference on
    last = place == lengths.amax(0) - 1
    span = torch.where(differs.any(1, keepdim=True), span, last)
    losses = -F.logsigmoid(chosen - rejected) * span
    return losses.sum(1) / span.sum(1)


def answer_ends(batch: Batch) -> Tensor:
    """(N,) int64: the row behind the last trained token of each segment with a source; all have labels."""
    return batch.label_rows[batch.label_counts.cumsum(0) - 1] + 2  # a label is the token behind its row


@dataclass(frozen=True)
class RewardModelOptions:
    STAGES = "rm"

    rm_loss: Literal["span", "last"] = option(
        "span", "rm: compare values from where two answers differ, or at their last tokens alone"
    )


class RewardModel(Stage):
    evaluation_names = ("loss", "accuracy", "rewards/chosen", "rewards/rejected", "rewards/margins")
    has_value_head = True

    def __init__(self, options: RewardModelOptions):
        self.options = options

    def weight(self, batch: Batch) -> int:
        return batch.pairs

    def loss(self, model: Decoder, batch: Batch) -> tuple[Tensor, Metrics]:
        """Sum over the pairs."""
        values = model.v_head(hidden_states(model, batch))  # (T,) fp32
        ends = answer_ends(batch)
        scores = values[ends - 1].view(2, batch.pairs)
        if self.options.rm_loss == "last":
            losses = -F.logsigmoid(scores[0] - scores[1])
        else:
            starts = batch.cu_seqlens[: len(ends)].long()
            losses = span_loss(values, batch.tokens, starts, ends, batch.max_seqlen)
        scores = scores.detach()
        metrics = {"accuracy": (scores[0] > scores[1]).float()} | by_kind("rewards", scores)
        metrics["rewards/margins"] = scores[0] - scores[1]
        return losses.sum(), summed(metrics, batch.pairs)


@torch.no_grad()
def pair_scores(model: Decoder, batch: Batch) -> tuple[list[float], list[float]]:
    """Scores of the chosen and of the rejected answers of a batch. The model's mode stays."""
    values = model.v_head(hidden_states(model, batch))
    return tuple(values[answer_ends(batch) - 1].view(2, batch.pairs).tolist())


@torch.no_grad()
def score_texts(model: Decoder, texts: Sequence[Sequence[int]], most_tokens: int = SCORE_TOKENS) -> Tensor:
    """(n,) fp32 on the CPU: the value at the last token of each text. The model's mode and what trains stay.

    texts: token ids up to the end of the answer, at least one each; none depends on the others."""
    if model.v_head is None:
        raise ValueError("the model has no value head, so it gives no scores (checkpoints/value_head.py)")
    device, scores = device_of(model), torch.empty(len(texts))
    with in_eval_mode(model), called_alone(model):  # ranks have texts of other lengths
        for numbers in _together(texts, most_tokens):
            batch = collate([_example(texts[number]) for number in numbers])
            batch = batch.rounded(ROW_MULTIPLE[device.type]).to(device)
            ends = torch.tensor(batch.borders[1 : len(numbers) + 1])
            hidden = hidden_states(model, batch)[(ends - 1).to(device)]  # (n, E)
            scores[numbers] = model.v_head(hidden).cpu()
    return scores


def score_dialogues(model: Decoder, tokenizer: Tokenizer, template, dialogues: list[list[Message]]) -> Tensor:
    """(n,) fp32: the scores of the last answers of these dialogues. Raises UserError if one has none."""
    texts = []
    for number, messages in enumerate(dialogues):
        named = {"variables": tokenizer.special_tokens}
        spans = template.render(messages, tokenizer.bos_token, tokenizer.eos_token, **named)
        encoded = encode_dialogue(tokenizer, spans)
        if not messages or messages[-1].role not in ("assistant", "function") or not any(encoded.answer):
            raise UserError(f"dialogue {number} does not end with an answer, so there is nothing to score")
        texts.append(encoded.ids[: int(np.flatnonzero(encoded.answer)[-1]) + 1])
    return score_texts(model, texts)


def _example(ids: Sequence[int]) -> Example:
    nothing = np.zeros(len(ids), np.uint8)
    return Example(np.asarray(ids, np.int32), nothing > 0, nothing.astype(np.int16), nothing, (-1, -1))


def _together(texts: Sequence[Sequence[int]], most_tokens: int) -> Iterator[list[int]]:
    """Numbers of the texts that are scored in one row."""
    numbers, total = [], 0
    for number, text in enumerate(texts):
        if numbers and total + len(text) > most_tokens:
            yield numbers
            numbers, total = [], 0
        numbers.append(number)
        total += len(text)
    if numbers:
        yield numbers
