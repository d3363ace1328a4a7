"""Rollouts: prompts out of a batch, texts that the model being trained writes to them, and these as a batch
again.

    prompts = prompts_of(batch, tokenizer)
    seeds = [seed_of(run_seed, draw, prompt) for prompt in prompts]
    completions = roll_out(model, prompts, seeds, options, stop_ids=tokenizer.stop_ids, tokenizer=tokenizer)
    batch = completions_batch(prompts, completions, {"advantages": [...]})      # labels = the completions' tokens

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

from generation.generate import Completion, generate
from generation.sampling import GenerateOptions
from model import Decoder
from pipeline.batch import IGNORED, ROLES, Batch, Example, collate

TOGETHER = 64  # sequences decoded at once: more share each read of the weights, and hold a cache each
PROMPT, COMPLETION = ROLES.index("user"), ROLES.index("assistant")


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    text: str  # as the model reads it: rendered by the template, special tokens included
    answer: str | None  # the row's own answer, for rewards that compare; the policy never sees it
    source: tuple[int, int]  # (dataset, row)
    copy: int = 0  # of that row: the same prompt may come several times in one draw


def prompts_of(batch: Batch, tokenizer) -> list[Prompt]:
    """The prompt of each segment: its tokens before the first trained one. What is trained is the row's own
    answer."""
    tokens, labels = batch.tokens.tolist(), batch.labels.tolist()
    prompts = []
    for source, copy, start, stop in zip(batch.sources, batch.copies, batch.borders, batch.borders[1:]):
        rows = [row for row in range(start, stop) if labels[row] != IGNORED]
        ids = tokens[start : rows[0] + 1 if rows else stop]
        answer = tokenizer.decode([labels[row] for row in rows], skip_special=False) if rows else None
        prompts.append(Prompt(ids, tokenizer.decode(ids, skip_special=False), answer, source, copy))
    return prompts


def ending_with(options: GenerateOptions, template, tokenizer) -> GenerateOptions:
    """These options, with what ends an answer of this template (None: of no template) among the stop
    words."""
    words = () if template is None else template.stop_words(tokenizer.eos_token)
    return replace(options, stop=tuple(dict.fromkeys([*options.stop, *words])))


def seed_of(seed: int, draw: int, prompt: Prompt, number: int = 0, texts: int = 1) -> int:
    """Seed of one text: that of the run, how often it drew prompts before, the prompt's row, which text of
    that row.

    number: of the `texts` that are written to this copy of the row.
    """
    entropy = [seed, draw, *prompt.source, prompt.copy * texts + number]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 2)


def roll_out(
    model: Decoder,
    prompts: list[Prompt],
    seeds: list[int],
    options: GenerateOptions,
    *,
    stop_ids: Iterable[int],
    tokenizer,
    together: int = TOGETHER,
) -> list[Completion]:
    """A completion for each prompt, with its text. The model's mode stays; nothing has a gradient.

    seeds: one for each prompt; the same prompt may come several times, with a seed each.
    Raises ValueError for a prompt that leaves the model no room for an answer.
    """
    # Merging the adapters first would save a fifth of a step (8 texts of a 135M model in fp32 on one core),
    # but costs as long as five steps, and the weights twice; in 16 bit the policy that writes would not be
    # the one that trains.
    was_training = model.training
    model.eval()
    completions: list[Completion] = []
    try:
        for start in range(0, len(prompts), together):
            part = slice(start, start + together)
            ids = [prompt.ids for prompt in prompts[part]]
            completions += generate(
                model, ids, options, stop_ids=stop_ids, seeds=seeds[part], tokenizer=tokenizer
            )
    finally:
        model.train(was_training)
    return completions


def completions_batch(
    prompts: list[Prompt], completions: list[Completion], extras: dict[str, list[Tensor]] | None = None
) -> Batch:
    """Each prompt with its completion as one segment; its labels are the completion's tokens, the stop token
    included.

    extras: for each completion a tensor (its tokens,), which becomes Batch.extras. No prompts: the empty
    batch.
    """
    examples = []
    for prompt, completion in zip(prompts, completions, strict=True):
        trained = np.arange(len(prompt.ids) + len(completion.ids)) >= len(prompt.ids)
        tokens = np.array([*prompt.ids, *completion.ids], np.int32)
        roles = np.where(trained, COMPLETION, PROMPT).astype(np.uint8)
        examples.append(Example(tokens, trained, trained.astype(np.int16), roles, prompt.source))
    batch = collate(examples)
    nothing = torch.zeros(0)
    return replace(batch, extras={name: torch.cat([nothing, *each]) for name, each in (extras or {}).items()})
