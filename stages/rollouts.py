"""Rollouts: prompts, texts that the model being trained writes to them, and these as a batch.

    prompts = prompts_of(examples, tokenizer)             # what a loader draws for ppo and grpo, not a Batch
    seeds = [seed_of(run_seed, draw, prompt) for prompt in prompts]
    completions = roll_out(model, prompts, seeds, options, stop_ids=tokenizer.stop_ids, tokenizer=tokenizer)
    batch = completions_batch(prompts, completions)                         # labels: the completions' tokens

A text depends on the weights, its prompt and its seed only, and the seed is a pure function of what the text
is for: batch 8, 8 x 1 accumulated and 2 ranks x 1 x 4 sample the same texts, and a resumed run needs no
generator's state. (Products round by the shape of the batch, so a draw within about 1e-6 of the border
between two tokens may differ.)
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from generation.company import called_alone
from generation.generate import Completion, generate
from generation.sampling import GenerateOptions
from model import Decoder
from options.errors import fitting
from pipeline.batch import ROLES, Batch, Example, collate
from stages.logprobs import in_eval_mode

TOGETHER = 64  # sequences decoded at once: more share each read of the weights, and hold a cache each
PROMPT, COMPLETION = ROLES.index("user"), ROLES.index("assistant")


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    text: str  # as the model reads it: rendered by the template, special tokens included
    answer: str | None  # the row's own answer, for rewards that compare; the policy never sees it
    source: tuple[int, int]  # (dataset, row)
    copy: int = 0  # of that row: the same prompt may come several times in one draw


def prompts_of(examples: Iterable[Example], tokenizer) -> list[Prompt]:
    """The prompts of examples of kind "prompt", in which what is trained is the row's own answer."""
    prompts = []
    for example in examples:
        begin = int(np.argmax(example.trained)) if example.trained.any() else len(example)
        ids, label = example.tokens[:begin].tolist(), example.tokens[begin:].tolist()
        text = tokenizer.decode(ids, skip_special=False)
        answer = tokenizer.decode(label, skip_special=False) if label else None
        prompts.append(Prompt(ids, text, answer, example.source, example.copy))
    return prompts


def ending_with(options: GenerateOptions, template, tokenizer) -> GenerateOptions:
    """These options, with what ends an answer of this template (or None) among the stop words."""
    words = () if template is None else template.stop_words(tokenizer.eos_token)
    return replace(options, stop=tuple(dict.fromkeys([*options.stop, *words])))


def seed_of(seed: int, draw: int, prompt: Prompt, number: int = 0, texts: int = 1) -> int:
    """Seed of a text, by that of the run, how often it drew prompts before, the prompt's row, and the number
    of the text among the `texts` that are written to this copy of the row."""
    entropy = [seed, draw, *prompt.source, prompt.copy * texts + number]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 2)


@fitting("the texts that are written together", "lower max_new_tokens, cutoff_len or the batch size")
def roll_out(
    model: Decoder, prompts: list[Prompt], seeds: list[int], options: GenerateOptions, *, stop_ids, tokenizer
) -> list[Completion]:
    """A completion for each prompt, with its text. The model's mode stays; nothing has a gradient.

    seeds: one for each prompt; the same prompt may come several times, with a seed each. stop_ids: token ids.
    Raises UserError for a prompt that leaves the model no room for an answer.
    """
    # Merging the adapters first would save a fifth of a step (8 texts of a 135M model in fp32 on one core),
    # but costs as long as five steps, and the weights twice; in 16 bit the policy that writes would not be
    # the one that trains.
    common = {"stop_ids": stop_ids, "tokenizer": tokenizer}
    completions: list[Completion] = []
    with in_eval_mode(model), called_alone(model):  # ranks write texts of other lengths
        for start in range(0, len(prompts), TOGETHER):
            part = slice(start, start + TOGETHER)
            ids = [prompt.ids for prompt in prompts[part]]
            completions += generate(model, ids, options, seeds=seeds[part], **common)
    return completions


def completions_batch(prompts: list[Prompt], completions: list[Completion]) -> Batch:
    """Each prompt with its completion as one segment; its labels are the completion's tokens, with the stop
    token. No prompts: the empty batch."""
    examples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        trained = np.arange(len(prompt.ids) + len(completion.ids)) >= len(prompt.ids)
        tokens = np.array([*prompt.ids, *completion.ids], np.int32)
        roles = np.where(trained, COMPLETION, PROMPT).astype(np.uint8)
        examples.append(Example(tokens, trained, trained.astype(np.int16), roles, prompt.source))
    return collate(examples)


def clipped_losses(log_ratio: Tensor, advantages: Tensor, lower: float, upper: float) -> Tensor:
    """-min(r A, clip(r, 1 - lower, 1 + upper) A), r = exp(log_ratio); all (n,). arXiv 1707.06347 eq. 7."""
    ratio = torch.exp(log_ratio)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - lower, 1 + upper) * advantages)
