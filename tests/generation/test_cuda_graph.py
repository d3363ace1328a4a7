"""Steps of fixed shapes give the ordinary path's tokens: greedy and drawn, batches that shrink, caches that
grow, windows, a rope that follows the length, penalties, given caches. On a GPU the same tests replay a
graph."""

import contextlib
import dataclasses
import math

import pytest
import torch
import transformers
from kernel_checks import DEVICE

import kernels
import lora
import quant
from architectures import config_from_hf
from checkpoints.huggingface import load_model
from generation import cuda_graph
from generation import generate as generation
from generation.generate import Decoding, generate, new_cache
from generation.layout import lay_out_for_decoding
from generation.sampling import GenerateOptions, choose
from kernels.lora_linear import shared_buffers
from model import Decoder
from quant.eetq import EETQFormat
from quant.hqq import HQQFormat
from quant.int8 import Int8Format
from quant.nf4 import NF4Format

SIZES = {
    "vocab_size": 97, "hidden_size": 60, "intermediate_size": 77, "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.5, "bos_token_id": 1,
    "eos_token_id": 96, "pad_token_id": 0,
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
CASES = {
    "llama": ("Llama", {}),
    "llama-dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen3": ("Qwen3", {"head_dim": 14, "tie_word_embeddings": True}),
}
GREEDY = GenerateOptions(do_sample=False, max_new_tokens=30)
DRAWN = GenerateOptions(temperature=1.5, top_p=0.95, top_k=0, max_new_tokens=60)
LENGTHS = (17, 1, 5, 30, 5)


def make_model(folder, case="llama", **changes):
    family, more = CASES[case]
    torch.manual_seed(3)
    config = getattr(transformers, family + "Config")(**{**SIZES, **more, **changes})
    getattr(transformers, family + "ForCausalLM")(config).save_pretrained(folder)
    return load_model(folder, device=DEVICE)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def prompts_of(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 90, (length,), generator=generator).tolist() for length in lengths]


def texts_of(model, prompts, options, fixed_shapes, stop_ids=(), seed=11, **more):
    generator = torch.Generator().manual_seed(seed)
    decoding = Decoding(
        model, prompts, options, stop_ids=stop_ids, generator=generator, fixed_shapes=fixed_shapes, **more
    )
    while decoding.live:
        decoding.step()
    assert (decoding.steps is not None) == fixed_shapes
    return [decoding.completion(i) for i in range(len(prompts))]


def assert_same(model, prompts, options, **more):
    expected = texts_of(model, prompts, options, False, **more)
    assert texts_of(model, prompts, options, True, **more) == expected
    return expected


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_the_ordinary_path(case, options, tmp_path):
    model = make_model(tmp_path, case)
    texts = assert_same(model, prompts_of(), options, stop_ids=[96, 40, 41, 42])
    assert len({tuple(text.ids) for text in texts}) == len(LENGTHS)
    for prompt in prompts_of():
        assert_same(model, [prompt], options)
    lay_out_for_decoding(model)
    assert_same(model, prompts_of([9]), options)


@pytest.mark.parametrize(
    "change",
    [{"repetition_penalty": 1.7}, {"top_k": 5}, {"top_k": 30, "min_p": 0.01}, {"do_sample": False}],
    ids=str,
)
def test_samplers_and_penalties_work_the_same(model, change):
    for penalty in ({}, {"repetition_penalty": 1.3}):
        options = dataclasses.replace(DRAWN, **{**penalty, **change})
        assert_same(model, prompts_of(), options, stop_ids=[7, 8, 9])


def test_rows_leave_and_the_cache_grows_on_the_way(model, monkeypatch):
    """Ends at very different places, in a cache too small for anything: steps begin anew many times."""
    begun, kept = [], cuda_graph.TokenSteps

    class Counted(kept):
        def __init__(self, model, cache, *more, **named):
            begun.append((len(cache.lengths), cache.capacity))
            super().__init__(model, cache, *more, **named)

    monkeypatch.setattr(generation, "TokenSteps", Counted)
    prompts = prompts_of([3, 8, 2, 8, 5, 4, 1])
    for options in (GREEDY, DRAWN):
        options = dataclasses.replace(options, max_new_tokens=80)
        expected = texts_of(model, prompts, options, False, stop_ids=range(40, 46))
        assert len({len(text.ids) for text in expected}) > 3
        begun.clear()
        cache = new_cache(model, len(prompts), 9)
        assert texts_of(model, prompts, options, True, stop_ids=range(40, 46), cache=cache) == expected
        rows, capacities = map(set, zip(*begun))
        assert max(rows) >= 5 and min(rows) < 4 and len(capacities) > 2


def test_steps_run_ahead_but_never_beyond_what_is_needed(model, monkeypatch):
    launched, kept = [], cuda_graph.TokenSteps

    class Counted(kept):
        def launch(self):
            super().launch()
            assert self.waiting <= cuda_graph.AHEAD
            launched.append(self.waiting)

    monkeypatch.setattr(generation, "TokenSteps", Counted)
    (text,) = texts_of(model, prompts_of([5]), GREEDY, True)
    assert len(text.ids) == 30 and len(launched) == 29  # the prompt gave the first token
    assert max(launched) == cuda_graph.AHEAD
    launched.clear()
    stop = text.ids[9]
    (stopped,) = texts_of(model, prompts_of([5]), GREEDY, True, stop_ids=[stop])
    assert stopped.ids == text.ids[: text.ids.index(stop) + 1]
    assert len(launched) <= len(stopped.ids) + cuda_graph.AHEAD


def test_a_conversation_goes_on_from_the_cache_that_ran_ahead(model):
    prompt = prompts_of([20])[0]
    stop = generate(model, [prompt], GREEDY, stop_ids=[])[0].ids[6]
    first = Decoding(model, [prompt], GREEDY, stop_ids=[stop], fixed_shapes=True)
    while first.live:
        first.step()
    text, filled = first.texts[0], first.cache.lengths[0]
    assert filled == len(text) - 1
    longer = text + prompts_of([9], seed=5)[0]
    second = Decoding(model, [longer], GREEDY, stop_ids=[], cache=first.cache, fixed_shapes=True)
    while second.live:
        second.step()
    assert second.completion(0) == generate(model, [longer], GREEDY, stop_ids=[])[0]


def test_a_cache_is_used_again_with_the_steps_made_for_it(model):
    cache = new_cache(model, 5, 60)
    penalised = dataclasses.replace(DRAWN, repetition_penalty=1.4, max_new_tokens=20)
    for options in (GREEDY, penalised):
        kept = []
        for lengths in (LENGTHS, (4, 4, 9, 2, 2), (3, 8, 5)):
            prompts = prompts_of(lengths, seed=sum(lengths))
            cache.restart(len(prompts))
            expected = texts_of(model, prompts, options, False)
            assert texts_of(model, prompts, options, True, cache=cache) == expected
            kept.append(dict(cache.kept))
        assert kept[0][5] is kept[1][5] is kept[2][5] and 3 not in kept[1] and 3 in kept[2]
        cache.kept.clear()
    before = cache.storage
    cache.restart(7)
    assert cache.storage is not before and not cache.kept
    assert texts_of(model, prompts_of([3] * 7), GREEDY, True, cache=cache) == texts_of(
        model, prompts_of([3] * 7), GREEDY, False
    )


def test_ending_a_sequence_from_outside_leaves_the_others_alone(model):
    prompts, free = prompts_of(), texts_of(model, prompts_of(), GREEDY, False)
    decoding = Decoding(model, prompts, GREEDY, stop_ids=[], fixed_shapes=True)
    while decoding.live:
        for sequence, _ in decoding.step():
            if sequence != 3 and len(decoding.completion(sequence).ids) == 2 + sequence:
                decoding.stop(sequence)
    for sequence in (0, 1, 2, 4):
        assert decoding.completion(sequence).ids == free[sequence].ids[: 2 + sequence]
    assert decoding.completion(3) == free[3]


def test_a_finished_row_reads_and_fills_no_more_of_the_cache(model):
    decoding = Decoding(model, prompts_of(), GREEDY, stop_ids=[], fixed_shapes=True)
    for _ in range(4):
        decoding.step()
    begun = decoding.steps
    decoding.stop(1)
    for _ in range(10):
        decoding.step()
    assert decoding.steps is begun  # one of five: no reason to begin anew
    assert [length > 0 for length in begun.cache.lengths.tolist()] == [True, False, True, True, True]


def test_logits_that_are_not_finite_are_reported(tmp_path):
    """Also when the damage shows in the middle of a text only."""
    model = make_model(tmp_path)
    decoding = Decoding(model, prompts_of([4, 6]), GREEDY, stop_ids=[], fixed_shapes=True)
    decoding.step()
    decoding.step()
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        while decoding.live:
            decoding.step()


def test_text_that_the_host_must_look_at_takes_the_ordinary_path(model):
    options = dataclasses.replace(GREEDY, no_repeat_ngram_size=2)
    decoding = Decoding(model, prompts_of(), options, stop_ids=[], fixed_shapes=True)
    while decoding.live:
        decoding.step()
    assert decoding.steps is None
    assert decoding.completion(0) == generate(model, prompts_of(), options, stop_ids=[])[0]


def test_a_cache_that_tells_lengths_by_a_tensor_gives_the_same(model):
    """What a GPU takes for the prompt and for a few new tokens behind a text, here on a CPU as well."""
    prompts, prompt = prompts_of(), prompts_of([40])[0]
    cache = new_cache(model, len(prompts), 99)
    cache.on_device = True
    assert texts_of(model, prompts, GREEDY, False, cache=cache) == texts_of(model, prompts, GREEDY, False)
    cache = new_cache(model, 1, 99)
    cache.on_device = True
    texts_of(model, [prompt[:25]], dataclasses.replace(GREEDY, max_new_tokens=1), False, cache=cache)
    assert cache.lengths == [25]
    assert texts_of(model, [prompt], GREEDY, True, cache=cache) == texts_of(model, [prompt], GREEDY, False)


def test_triton_kernels_in_the_step_give_the_same_tokens(model, monkeypatch):
    pytest.importorskip("triton")
    prompts, options = prompts_of([5, 2, 9]), dataclasses.replace(GREEDY, max_new_tokens=6)
    expected = texts_of(model, prompts, options, False)
    monkeypatch.setattr(kernels, "_MODE", "triton")
    cache = new_cache(model, 3, 15)
    cache.on_device = True
    assert texts_of(model, prompts, options, True, cache=cache) == expected


@pytest.mark.parametrize(
    "options", [GREEDY, DRAWN, dataclasses.replace(DRAWN, top_k=9, min_p=0.1)], ids="abc"
)
@pytest.mark.parametrize("case", CASES)
def test_the_step_asks_nothing_of_the_host(case, options):
    """On the meta device there are no values: whatever needs one on the host fails."""
    family, more = CASES[case]
    config = getattr(transformers, family + "Config")(**{**SIZES, **more})
    model = Decoder(config_from_hf(config.to_dict()), device="meta").eval()
    lay_out_for_decoding(model)  # as on a GPU
    assert model.layers[0].self_attn.q_proj.table is not None
    cache = new_cache(model, 3, 50)
    cache.lengths = [7, 1, 40]
    seen = torch.zeros(3, 97, dtype=torch.bool, device="meta")

    def chosen(logits, uniforms):
        return choose(logits, options, seen, uniforms)

    draws = (lambda first, count: torch.zeros(count, 3, dtype=torch.float64)) if options.do_sample else None
    with torch.inference_mode():
        steps = cuda_graph.TokenSteps(model, cache)
        steps.begin([5, 6, 7], cache.lengths, chosen, draws=draws)
        steps.replay(True)
        steps.tokens.copy_(chosen(steps.logits, torch.zeros(3, dtype=torch.float64, device="meta")))
        with pytest.raises(RuntimeError):  # the check checks
            steps.tokens.tolist()


QUANTISED = {
    "nf4": NF4Format(), "fp4": NF4Format("fp4", double=False), "int8": Int8Format(), "eetq": EETQFormat(),
    "hqq": HQQFormat(3),
}  # fmt: skip


@pytest.mark.parametrize("rows", [3, 17])
@pytest.mark.parametrize("name", QUANTISED)
def test_the_step_asks_nothing_of_the_host_with_quantised_weights(name, rows, monkeypatch):
    """The same; LLM.int8, which must ask for many rows, says so and is not captured."""
    monkeypatch.setattr(quant.int8, "int8_products_are_fast", lambda device: True)
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "num_attention_heads": 4}
    model = Decoder(config_from_hf(transformers.LlamaConfig(**sizes).to_dict())).eval()
    for path, linear in list(model.layers.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            layer = QUANTISED[name].quantise(torch.randn_like(linear.weight), None, torch.float32)
            lora.replace_module(model.layers, path, layer)
    lora.add_lora(model, lora.LoraOptions(lora_target=("q_proj", "down_proj")))
    model.to("meta")
    cache = new_cache(model, rows, 50)
    with torch.inference_mode():
        steps = cuda_graph.TokenSteps(model, cache)
        steps.begin([5] * rows, [7] * rows, lambda logits, uniforms: logits.argmax(-1))
        assert steps.capture is not (name == "int8" and rows == 17)
        if steps.capture:
            steps.replay(True)
        else:
            with pytest.raises(RuntimeError):
                steps.replay(False)


def test_a_graph_keeps_the_buffer_that_it_writes_dense_weights_to(monkeypatch):
    monkeypatch.setattr(kernels._lora_linear, "_shared", {})
    small, large = (NF4Format().quantise(torch.randn(size, 64), None, torch.float32) for size in (8, 99))
    with torch.no_grad():
        small(torch.randn(20, 64))
        (held,) = shared_buffers()
        large(torch.randn(20, 64))
    (now,) = shared_buffers()
    assert held.numel() == 8 * 64 and now.numel() == 99 * 64
    device = torch.device("cpu")
    replay = cuda_graph.Replay(lambda: None, device)
    monkeypatch.setattr(replay, "stream", "stream")
    replay.is_warm = True
    graph = type("Graph", (), {"replay": lambda self: None})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *given, **more: contextlib.nullcontext())
    replay(True)
    assert replay.held[0] is now
