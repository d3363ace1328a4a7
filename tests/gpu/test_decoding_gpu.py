"""Decoding on a GPU: replayed steps give the tokens of the ordinary path, and starting one never waits for
the GPU."""

import dataclasses

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from architectures import config_from_hf
from generation.generate import Decoding, generate, new_cache
from generation.layout import lay_out_for_decoding
from generation.sampling import GenerateOptions
from model import Decoder, initialize_weights

SHAPE = {
    "model_type": "llama", "vocab_size": 1001, "hidden_size": 128, "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
GREEDY = GenerateOptions(do_sample=False, max_new_tokens=70)
DRAWN = GenerateOptions(temperature=1.5, top_k=40, top_p=0.9, repetition_penalty=1.2, max_new_tokens=70)


def make_model(dtype=torch.float32):
    model = Decoder(config_from_hf(SHAPE), dtype=dtype, device="cuda").eval()
    initialize_weights(model, torch.Generator("cuda").manual_seed(0))
    lay_out_for_decoding(model)
    return model


def prompts_of(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(2, 1000, (length,), generator=generator).tolist() for length in lengths]


def texts_of(model, prompts, options, fixed_shapes, cache=None):
    decoding = Decoding(
        model, prompts, options, stop_ids=range(100, 110), generator=torch.Generator().manual_seed(5),
        cache=cache, fixed_shapes=fixed_shapes,
    )  # fmt: skip
    while decoding.live:
        decoding.step()
    return [decoding.completion(i) for i in range(len(prompts))], decoding


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("lengths", [(9,), (40, 3, 17, 1, 120)], ids=["one", "five"])
def test_replayed_steps_give_the_tokens_of_the_ordinary_path(lengths, options):
    model, prompts = make_model(), prompts_of(*lengths)
    expected, _ = texts_of(model, prompts, options, False)
    found, decoding = texts_of(model, prompts, options, True)
    assert found == expected
    assert any(steps.replay.graph is not None for steps in decoding.cache.kept.values())
    cache = decoding.cache  # once more, with the graphs of the first time
    cache.restart(len(prompts))
    assert texts_of(model, prompts, options, True, cache)[0] == expected


@pytest.mark.parametrize("options", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_starting_a_step_never_waits_for_the_gpu(options):
    model = make_model(torch.bfloat16)
    decoding = Decoding(
        model, prompts_of(5, 9), dataclasses.replace(options, max_new_tokens=200), stop_ids=()
    )
    for _ in range(5):
        decoding.step()
    steps, launched = decoding.steps, 0
    assert steps.replay.graph is not None
    torch.cuda.set_sync_debug_mode("error")
    try:
        while launched < 100:  # three rounds of random numbers
            while steps.waiting < 4:
                steps.launch()
                launched += 1
            steps.read()
        decoding.stop(0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_batch_in_bfloat16_decodes_as_each_sequence_alone_begins():
    """bf16 rounds differently for other batch sizes, so texts may part later; the first tokens are the
    same."""
    model, prompts = make_model(torch.bfloat16), prompts_of(30, 7, 64)
    together = generate(model, prompts, GREEDY, stop_ids=(), cache=new_cache(model, 3, 140))
    alone = [generate(model, [prompt], GREEDY, stop_ids=())[0] for prompt in prompts]
    assert [text.ids[:3] for text in together] == [text.ids[:3] for text in alone]
