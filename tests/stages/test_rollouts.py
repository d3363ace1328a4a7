"""Rollouts: prompts without their answers, texts that depend on weights, prompt and seed alone, labels that
are the texts' own tokens."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from tiny_runs import tiny_runs

import lora
from checkpoints import trainable
from checkpoints.huggingface import load_model
from generation.sampling import GenerateOptions
from lora import LoraOptions
from pipeline.batch import IGNORED, ROW_MULTIPLE, Example
from pipeline.store import ExampleStore
from pipeline.streaming import RowStream, StreamingLoader
from stages import rollouts
from stages.logprobs import batch_logprobs
from stages.rollouts import Prompt, completions_batch, prompts_of, roll_out, seed_of
from text.tokenizer import Tokenizer

SAMPLED = GenerateOptions(max_new_tokens=7, top_k=0, top_p=1.0, temperature=1.0)
GREEDY = GenerateOptions(do_sample=False, max_new_tokens=7)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("rollouts")) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return Tokenizer.from_folder(tiny.model)


@pytest.fixture(params=["lora", "full", "qlora"])
def model(tiny, request):
    from quant import QuantOptions, from_options

    quantization = from_options(QuantOptions(quantization_bit=4)) if request.param == "qlora" else None
    model = load_model(tiny.model, torch.float32, quantization=quantization)
    kind = "full" if request.param == "full" else "lora"
    trainable.prepare_trainable(
        model, LoraOptions(finetuning_type=kind, lora_rank=3), torch.Generator().manual_seed(0)
    )
    for layer in lora.lora_layers(model).values():
        layer.lora_b.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    return model.train()


def batch_of(tokenizer, rows) -> list[Example]:
    """(prompt, answer or None) -> examples as kind "prompt" has them."""
    examples = []
    for number, (prompt, answer) in enumerate(rows):
        ids, label = tokenizer.encode(prompt), tokenizer.encode(answer) if answer else []
        tokens = np.array(ids + label, np.int32)
        trained = np.arange(len(tokens)) >= len(ids)
        zeros = np.zeros(len(tokens))
        examples.append(Example(tokens, trained, zeros.astype(np.int16), zeros.astype(np.uint8), (1, number)))
    return examples


ROWS = [("the hammer", "sings"), ("blue sparks fly and 12 smiths", None), ("an", "anvil seven count")]


def test_a_prompt_is_what_stands_before_the_answer_and_the_answer_is_kept_as_text(tokenizer):
    prompts = prompts_of(batch_of(tokenizer, ROWS), tokenizer)
    assert [prompt.ids for prompt in prompts] == [tokenizer.encode(text) for text, _ in ROWS]
    assert [prompt.text for prompt in prompts] == [text for text, _ in ROWS]
    assert [prompt.answer for prompt in prompts] == [answer for _, answer in ROWS]
    assert [prompt.source for prompt in prompts] == [(1, 0), (1, 1), (1, 2)]
    assert prompts_of([], tokenizer) == []


def test_the_labels_of_a_rollout_are_its_new_tokens_and_only_these(model, tokenizer):
    prompts = prompts_of(batch_of(tokenizer, ROWS), tokenizer)
    completions = roll_out(model, prompts, [3, 4, 5], SAMPLED, stop_ids=[], tokenizer=tokenizer)
    batch = completions_batch(prompts, completions).rounded(ROW_MULTIPLE["cpu"])
    assert batch.sources == [(1, 0), (1, 1), (1, 2)]
    for number, (prompt, completion) in enumerate(zip(prompts, completions)):
        span = slice(*batch.borders[number : number + 2])
        assert batch.tokens[span].tolist() == prompt.ids + completion.ids
        labels = batch.labels[span]
        assert labels[labels != IGNORED].tolist() == completion.ids
        assert len(completion.ids) == 7 and completion.finish_reason == "length"
        assert completion.text == tokenizer.decode(completion.ids)
    assert len(batch.label_rows) == 21


def test_a_text_depends_on_its_prompt_and_seed_alone(model, tokenizer, monkeypatch):
    prompts = prompts_of(batch_of(tokenizer, ROWS), tokenizer)
    prompts, seeds = prompts + prompts[:1], [seed_of(42, 1, prompt) for prompt in prompts]
    seeds.append(seed_of(42, 1, prompts[0], 1, 2))
    common = {"stop_ids": tokenizer.stop_ids, "tokenizer": tokenizer}
    together = roll_out(model, prompts, seeds, SAMPLED, **common)
    with monkeypatch.context() as patch:
        patch.setattr(rollouts, "TOGETHER", 2)
        in_twos = roll_out(model, prompts, seeds, SAMPLED, **common)
    torch.manual_seed(123)  # the global generator has no say
    backwards = roll_out(model, prompts[::-1], seeds[::-1], SAMPLED, **common)[::-1]
    assert together == in_twos == backwards
    assert together[0].ids != together[3].ids, "the second text of a prompt is another one"


def test_seeds_differ_by_run_draw_row_copy_and_number():
    first = Prompt([5], "", None, (0, 0))
    prompts = [
        replace(first, source=source, copy=copy) for source in ((0, 0), (0, 1), (1, 0)) for copy in range(3)
    ]
    seeds = [
        seed_of(run, draw, prompt, number, 4)
        for run in (42, 43)
        for draw in (1, 2)
        for prompt in prompts
        for number in range(4)
    ]
    assert len(set(seeds)) == 2 * 2 * 9 * 4
    assert seeds[0] == seed_of(42, 1, first) < 2**62


def test_rows_that_an_order_repeats_are_copies_of_their_own(tokenizer):
    parts = [ExampleStore.from_examples(batch_of(tokenizer, ROWS), ["", ""]).parts[1]] * 2
    index = np.array([(1, 2), (0, 2), (1, 2), (1, 0), (0, 1), (1, 2), (1, 0)])
    store = ExampleStore(parts, ["a", "b"], index)
    examples = [store.example(i) for i in range(7)]
    assert [prompt.copy for prompt in prompts_of(examples, tokenizer)] == [0, 0, 1, 0, 0, 2, 1]
    assert not store.select(np.array([1, 2, 6])).copies.any()  # each is there once


def test_a_stream_that_comes_to_its_end_begins_again_with_other_copies(tokenizer):
    rows = batch_of(tokenizer, ROWS)
    collate = partial(prompts_of, tokenizer=tokenizer)
    source = RowStream([None], [None], "concat", (), seed=1)
    source.read = lambda part: ((n, "", n) for n in range(len(rows)))
    source.encoded = lambda dealt: ((what, [rows[row[0]]]) for what, _, row in dealt)
    loader = StreamingLoader(source, rows_per_batch=5, collate=collate)
    prompts = next(loader.batches())
    assert len({prompt.source for prompt in prompts}) == 3
    assert len({(prompt.source, prompt.copy) for prompt in prompts}) == 5
    (again,) = itertools.islice(loader.batches(start=1), 1)
    (resumed,) = itertools.islice(loader.batches(), 1, 2)
    assert again == resumed


def test_greedy_texts_are_the_likeliest_tokens_of_the_policy_that_trains(model, tokenizer):
    prompts = prompts_of(batch_of(tokenizer, ROWS), tokenizer)
    state = torch.get_rng_state()
    completions = roll_out(model, prompts, [0, 0, 0], GREEDY, stop_ids=[], tokenizer=tokenizer)
    assert model.training and torch.equal(state, torch.get_rng_state())
    batch = completions_batch(prompts, completions)
    hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)[batch.label_rows]
    logits = model.logits(hidden)
    assert torch.equal(logits.argmax(-1), batch.labels[batch.label_rows])
    expected = logits.log_softmax(-1).amax(-1)
    torch.testing.assert_close(batch_logprobs(model, batch), expected, rtol=1e-5, atol=1e-5)


def test_no_prompts_make_the_empty_batch():
    batch = completions_batch([], [])
    assert batch.sources == [] and len(batch) == 0
    assert len(batch.label_rows) == 0
