"""Decoding: samplers against transformers' processors, greedy text against transformers' generate, ragged
batches, stop words, streaming, seeds, the layout for decoding, and bad requests."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import transformers
from tiny_tokenizers import make_tokenizer
from transformers.generation import logits_process

from checkpoints.huggingface import load_model
from generation.generate import (
    Completion,
    Decoding,
    TextStream,
    TextWriter,
    context_limit,
    generate,
    new_cache,
    split_stop_words,
)
from generation.layout import lay_out_for_decoding
from generation.sampling import (
    GenerateOptions,
    ban_repeated_ngrams,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    sample,
)
from kernels.linear import matvec_by_rows
from lora import LoraOptions, add_lora
from text.tokenizer import Tokenizer

SIZES = {
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 77,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "initializer_range": 0.5,  # large, so that texts do not fall into one repeated token
    "bos_token_id": 1,
    "eos_token_id": 96,
    "pad_token_id": 0,
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
CASES = {
    "llama": ("Llama", {}),
    "llama-biases-tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-dynamic": ("Llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}),
    "mistral-window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 14}),
}
GREEDY = GenerateOptions(do_sample=False, max_new_tokens=30)
LENGTHS = (17, 1, 5, 30, 5)
SMOL = Path(__file__).resolve().parents[2] / "models" / "SmolLM2-135M-Instruct"


def prompts_of(lengths=LENGTHS, vocab=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    family, changes = CASES[request.param]
    torch.manual_seed(3)
    config = getattr(transformers, family + "Config")(**{**SIZES, **changes})
    theirs = getattr(transformers, family + "ForCausalLM")(config).eval()
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    return theirs, load_model(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    return load_model(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_folder(make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml"))


def theirs_greedy(theirs, prompt, **options):
    ids = torch.tensor([prompt])
    theirs(ids[:, :1])  # its dynamic rope remembers the longest text until a short one comes
    out = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=30,
        pad_token_id=0,
        **options,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("pair", CASES, indirect=True)
def test_greedy_text_equals_transformers_one_by_one_and_as_a_ragged_batch(pair):
    theirs, ours = pair
    prompts = prompts_of()
    expected = [theirs_greedy(theirs, prompt) for prompt in prompts]
    assert len({tuple(text) for text in expected}) == len(prompts)  # else the comparison would say little
    alone = [generate(ours, [prompt], GREEDY, stop_ids=[96])[0].ids for prompt in prompts]
    # transformers goes beyond the length the model knows; this project stops there
    limit = context_limit(ours.config)
    assert alone == [text[: limit - len(prompt)] for text, prompt in zip(expected, prompts)]
    together = generate(ours, prompts, GREEDY, stop_ids=[96])
    assert [completion.ids for completion in together] == alone
    lay_out_for_decoding(ours)
    assert [completion.ids for completion in generate(ours, prompts, GREEDY, stop_ids=[96])] == alone
    assert [generate(ours, [prompt], GREEDY, stop_ids=[96])[0].ids for prompt in prompts] == alone


def test_penalties_in_greedy_decoding_equal_transformers(tmp_path):
    torch.manual_seed(4)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SIZES, "initializer_range": 0.1})
    ).eval()
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    for change in ({"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 1}):
        options = dataclasses.replace(GREEDY, **change)
        prompts = prompts_of()
        expected = [theirs_greedy(theirs, prompt, **change) for prompt in prompts]
        assert [c.ids for c in generate(ours, prompts, options, stop_ids=[96])] == expected
        assert expected != [c.ids for c in generate(ours, prompts, GREEDY, stop_ids=[96])]


@pytest.mark.skipif(
    not SMOL.is_dir(), reason="models/SmolLM2-135M-Instruct is not there; `make demo` brings it"
)
def test_greedy_text_of_a_real_model_equals_transformers_over_20_prompts():
    tokenizer, ours = Tokenizer.from_folder(SMOL), load_model(SMOL)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(SMOL, dtype=torch.float32).eval()
    words = [
        "a river",
        "prime numbers",
        "Paris",
        "tea",
        "a for loop",
        "the moon",
        "gravity",
        "bread",
        "chess",
        "rain",
    ]
    texts = [f"<|im_start|>user\nExplain {word}.<|im_end|>\n<|im_start|>assistant\n" for word in words]
    texts += [f"Once upon a time, {word}" for word in words]
    prompts = [tokenizer.encode(text) for text in texts]
    lay_out_for_decoding(ours)
    options = dataclasses.replace(GREEDY, max_new_tokens=16)
    completions = generate(ours, prompts, options, stop_ids=tokenizer.stop_ids)
    for prompt, completion in zip(prompts, completions):
        out = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)[
            0, len(prompt) :
        ].tolist()
        assert completion.ids == out


# Samplers


def logits_of(rows=4, vocab=97, seed=0, ties=False):
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if ties else logits


@pytest.mark.parametrize("ties", [False, True])
def test_samplers_equal_transformers_processors(ties):
    logits = logits_of(ties=ties)
    texts = [
        [1, 5, 5, 7, 5, 5, 9],
        [3, 3, 3, 3, 3, 3, 3],
        [0, 1, 2, 0, 1, 2, 0],
        [96, 95, 94, 93, 92, 91, 90],
    ]
    ids = torch.tensor(texts)
    seen = torch.zeros(4, 97, dtype=torch.bool).scatter(1, ids, True)
    before = logits.clone()
    for penalty in (1.3, 0.7):
        expected = logits_process.RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
        assert torch.equal(penalize_repetition(logits, seen, penalty), expected)
    for size in (1, 2, 3, 7, 8):
        expected = logits_process.NoRepeatNGramLogitsProcessor(size)(ids, logits)
        assert torch.equal(ban_repeated_ngrams(logits, texts, size), expected)
    for k in (1, 5, 96, 97, 500):
        assert torch.equal(keep_top_k(logits, k), logits_process.TopKLogitsWarper(k)(ids, logits))
    for p in (1e-6, 0.3, 0.7, 0.999, 1.0):
        assert torch.equal(keep_top_p(logits, p), logits_process.TopPLogitsWarper(p)(ids, logits))
    for p in (0.0, 0.01, 0.5, 1.0):
        assert torch.equal(keep_min_p(logits, p), logits_process.MinPLogitsWarper(p)(ids, logits))
    assert torch.equal(logits, before)


def test_draw_follows_the_probabilities_and_never_takes_an_excluded_token():
    logits = torch.tensor([[0.0, math.log(3.0), -math.inf, math.log(4.0), -math.inf]])  # 1/8, 3/8, 0, 4/8, 0
    uniforms = (torch.arange(8000, dtype=torch.float64) + 0.5) / 8000
    tokens = draw(logits.expand(8000, -1), uniforms)
    assert torch.bincount(tokens, minlength=5).tolist() == [1000, 3000, 0, 4000, 0]
    first, last = torch.zeros(1, dtype=torch.float64), torch.full((1,), 1 - 2**-53, dtype=torch.float64)
    assert draw(logits, first).item() == 0
    assert draw(logits, last).item() == 3
    assert draw(torch.tensor([[-math.inf, 0.0]]), first).item() == 1


@pytest.mark.parametrize("ties", [False, True])
def test_looking_at_few_candidates_changes_no_probability(ties):
    logits = logits_of(rows=1, vocab=5000, seed=2, ties=ties)
    top_p = 1.0 if ties else 0.9  # of equal tokens at its border top-p takes whichever the sort puts first
    options = GenerateOptions(temperature=0.8, top_k=20, top_p=top_p, min_p=0.02)
    expected = keep_min_p(keep_top_p(keep_top_k(logits / 0.8, 20), top_p), 0.02).softmax(-1)[0]
    assert not ties or (expected > 0).sum() > 20
    uniforms = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    tokens = sample(logits.expand(20000, -1), options, uniforms)
    shares = torch.bincount(tokens, minlength=5000) / 20000
    torch.testing.assert_close(shares, expected, atol=2e-4, rtol=0)


def test_sampled_texts_repeat_with_the_seed_and_do_not_depend_on_their_neighbours(model):
    prompts = prompts_of()
    options = GenerateOptions(temperature=1.5, top_p=0.95, top_k=0, max_new_tokens=20)

    def run(groups, seed):
        generator = torch.Generator().manual_seed(seed)
        return [
            c.ids
            for group in groups
            for c in generate(model, group, options, stop_ids=[96], generator=generator)
        ]

    together = run([prompts], 11)
    assert run([prompts], 11) == together
    assert run([prompts[:2], prompts[2:]], 11) == together
    assert run([[prompt] for prompt in prompts], 11) == together
    assert run([prompts], 12) != together
    same = run([[prompts[0]] * 6], 11)
    assert len({tuple(text) for text in same}) > 1  # equal prompts, different draws
    torch.manual_seed(5)
    first = generate(model, prompts, options, stop_ids=[96])
    torch.manual_seed(5)
    assert generate(model, prompts, options, stop_ids=[96]) == first


# Ends


def test_stop_tokens_lengths_and_reasons(model):
    prompts = prompts_of()
    free = generate(model, prompts, GREEDY, stop_ids=[])
    assert all(len(c.ids) == 30 and c.finish_reason == "length" for c in free)
    stop = free[0].ids[9]
    ended = generate(model, prompts, GREEDY, stop_ids=[stop])
    for before, after in zip(free, ended):
        if stop in before.ids:
            assert after.ids == before.ids[: before.ids.index(stop) + 1] and after.finish_reason == "stop"
        else:
            assert after == before
    short = dataclasses.replace(GREEDY, max_new_tokens=1)
    assert generate(model, prompts, short, stop_ids=[])[0] == Completion(free[0].ids[:1], "length")
    assert generate(model, [], GREEDY, stop_ids=[]) == []


def test_text_ends_where_the_model_ends(model):
    prompt = prompts_of([90])[0]
    (completion,) = generate(model, [prompt], GREEDY, stop_ids=[])
    assert len(prompt + completion.ids) == 96 and completion.finish_reason == "length"


def test_on_token_sees_every_token_and_can_end_a_sequence(model):
    prompts, seen = prompts_of(), []
    free = generate(model, prompts, GREEDY, stop_ids=[])

    def on_token(sequence, token):
        seen.append((sequence, token))
        return sequence == 2 and len([s for s, _ in seen if s == 2]) == 4

    completions = generate(model, prompts, GREEDY, stop_ids=[], on_token=on_token)
    assert completions[2].ids == free[2].ids[:4] and completions[2].finish_reason == "stop"
    for i in (0, 1, 3, 4):
        assert completions[i] == free[i]
        assert [token for sequence, token in seen if sequence == i] == free[i].ids


def test_a_given_cache_of_the_beginning_gives_the_same_text(model):
    prompt = prompts_of([40])[0]
    expected = generate(model, [prompt], GREEDY, stop_ids=[])[0].ids
    cache = new_cache(model, 1, 8)  # too small: it has to grow
    first = Decoding(
        model, [prompt[:25]], dataclasses.replace(GREEDY, max_new_tokens=3), stop_ids=[], cache=cache
    )
    while first.live:
        first.step()
    assert cache.lengths == [27]
    cache.lengths = [25]  # what both texts share
    second = Decoding(model, [prompt], GREEDY, stop_ids=[], cache=cache)
    while second.live:
        second.step()
    assert second.completion(0).ids == expected


# Text


def write_all(writer, ids):
    return [writer.push(i) for i in ids] + [writer.flush()]


@pytest.mark.parametrize("word", ["capital", "l of Fra", "?", " is Paris", "s, a"])
def test_stop_words_over_several_tokens_never_show(tokenizer, word):
    text = "What is the capital of France? The capital of France is Paris, as everybody knows."
    ids = tokenizer.encode(text)
    writer = TextWriter(tokenizer, [word, "never there"])
    pieces = write_all(writer, ids)
    assert "".join(pieces) == text[: text.index(word)]
    assert writer.stopped
    shown = ""
    for piece in pieces:
        shown += piece
        assert not any(shown.endswith(word[:n]) and text[: len(shown) + 1] == shown + word[n]
                       and text.index(word) == len(shown) - n for n in range(1, len(word)))  # fmt: skip


def test_text_that_only_begins_like_a_stop_word_comes_out(tokenizer):
    text = "the end is near, the en"
    writer = TextWriter(tokenizer, ["the end."])
    assert "".join(write_all(writer, tokenizer.encode(text))) == text and not writer.stopped
    overlapping = TextWriter(tokenizer, ["aab"])
    assert "".join(write_all(overlapping, [tokenizer.encode(c)[0] for c in "aaaabaa"])) == "aa"


@pytest.mark.parametrize("word, shown", [("\n</s>", "Hi"), ("</s>\n", "Hi\n"), ("\u65e5</s>", None)])
def test_text_in_bytes_stands_before_the_special_token_behind_it(tmp_path, word, shown):
    tokenizer = Tokenizer.from_folder(make_tokenizer(tmp_path, "llama2"))  # a line break is <0x0A>
    ids = [i for text in ("Hi", "\n", "</s>", "\n") for i in tokenizer.encode_parts(["a", text])[1]]
    writer = TextWriter(tokenizer, [word])
    assert "".join(write_all(writer, ids)) == ("Hi\n\n" if shown is None else shown)
    assert writer.stopped == (shown is not None)


def test_stop_words_that_are_special_tokens_become_stop_tokens(tokenizer):
    end = tokenizer.token_id("<|im_end|>")
    assert split_stop_words(tokenizer, ["<|im_end|>", "User:"]) == ((end,), ("User:",))


@pytest.mark.parametrize(
    "word", ["ris<|im_end|>", "<|im_end|>\n<|im_start|>", "s<|im_end|>\n<|im_start|>us", "end|>\n"]
)
def test_stop_words_of_text_and_special_tokens_are_found(tokenizer, word):
    """A special token is not shown, whether it ends up in a stop word or not; its letters are found too."""
    text = "It is <|im_start|>Paris<|im_end|>\n<|im_start|>user Rome"
    before = text.partition(word)[0].replace("<|im_start|>", "")
    spelled = [i for letter in text for i in tokenizer.encode(letter)]
    for ids, wanted in ((tokenizer.encode(text), before), (spelled, text.partition(word)[0])):
        writer = TextWriter(tokenizer, ["never<|im_end|>", word])
        pieces = write_all(writer, ids)
        if word.startswith("end") and ids != spelled:  # a part of a special token is no text
            assert not writer.stopped and "".join(pieces) == tokenizer.decode(ids)
        else:
            assert writer.stopped and "".join(pieces) == wanted


@pytest.mark.parametrize(
    "text", ["ab Hu<|im_start|>man: c", "ab Human: c", "ab Human<|im_start|>: c", "Human:"]
)
def test_a_special_token_within_a_word_parts_it_as_in_transformers(tokenizer, text):
    """Though what is shown reads as the word; oracle: StopStringCriteria."""
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer.folder)
    criteria = transformers.StopStringCriteria(theirs, ["Human:"])
    ids = tokenizer.encode(text)
    stops = any(bool(criteria(torch.tensor([ids[:n]]), None)[0]) for n in range(1, len(ids) + 1))
    writer = TextWriter(tokenizer, ["Human:"])
    pieces = write_all(writer, ids)
    assert writer.stopped == stops == ("Human:" in text)
    assert "".join(pieces) == (text.partition("Human:")[0] if stops else tokenizer.decode(ids))


def test_what_only_begins_like_a_stop_word_with_a_special_token_comes_out(tokenizer):
    ids = tokenizer.encode("a b<|im_end|>")
    writer = TextWriter(tokenizer, ["b<|im_end|>c", "<|im_end|><|im_end|>"])
    assert "".join(write_all(writer, ids)) == tokenizer.decode(ids) and not writer.stopped


@pytest.fixture(scope="module")
def speaker(tokenizer, tmp_path_factory):
    """A model with the tokenizer's vocabulary."""
    torch.manual_seed(6)
    folder = tmp_path_factory.mktemp("speaker")
    config = transformers.LlamaConfig(**{**SIZES, "vocab_size": tokenizer.vocab_size})
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return load_model(folder)


def test_generation_ends_at_a_stop_word_of_text_and_a_special_token(speaker, tokenizer):
    """In rollouts (generate) and in a conversation (TextStream)."""
    prompt = tokenizer.encode("What")
    free = generate(speaker, [prompt], GREEDY, stop_ids=[])[0].ids
    special = tokenizer.token_id("<|im_end|>")
    weight = speaker.head_weight()
    kept = weight.detach().clone()
    with torch.no_grad():  # the sixth token becomes the special one
        weight[[special, free[5]]] = weight[[free[5], special]]
    try:
        written = generate(speaker, [prompt], GREEDY, stop_ids=[])[0].ids
        place = written.index(special)
        word = (
            tokenizer.decode(written[place - 1 : place])
            + "<|im_end|>"
            + tokenizer.decode(written[place + 1 : place + 2])
        )
        options = dataclasses.replace(GREEDY, stop=(word,))
        (stopped,) = generate(speaker, [prompt], options, stop_ids=[], tokenizer=tokenizer)
        assert stopped.finish_reason == "stop" and stopped.ids == written[: place + 2]
        assert stopped.text == tokenizer.decode(written[: place - 1])
        stream = TextStream(speaker, tokenizer, prompt, options, stop_ids=[])
        assert "".join(stream) == stopped.text and stream.finish_reason == "stop"
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_generated_text_is_cut_before_the_stop_word_and_streaming_shows_the_same(speaker, tokenizer):
    prompts = [tokenizer.encode(text) for text in ("Hello, who are you?", "What", "The capital of France")]
    free = generate(speaker, prompts, GREEDY, stop_ids=[], tokenizer=tokenizer)
    assert [c.text for c in free] == [tokenizer.decode(c.ids) for c in free]
    word = free[1].text[10:14]
    options = dataclasses.replace(GREEDY, stop=(word,))
    stopped = generate(speaker, prompts, options, stop_ids=[], tokenizer=tokenizer)
    for before, after in zip(free, stopped):
        assert after.text == before.text.partition(word)[0]
        if word in before.text:
            assert after.finish_reason == "stop" and len(after.ids) < len(before.ids)
            assert word in tokenizer.decode(after.ids)
    for prompt, expected in zip(prompts, stopped):
        stream = TextStream(speaker, tokenizer, prompt, options, stop_ids=[])
        pieces = list(stream)
        assert "".join(pieces) == expected.text and all(pieces)
        assert (stream.ids, stream.finish_reason) == (expected.ids, expected.finish_reason)
        assert stream.cached_ids == (prompt + stream.ids)[:-1]
    with pytest.raises(ValueError, match="give generate.. the tokenizer"):
        generate(speaker, prompts, options, stop_ids=[])


# The layout for decoding


def test_layout_for_decoding_keeps_values_names_and_memory(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lay_out_for_decoding(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in after.values()
    }
    assert sum(storages.values()) == sum(value.numel() * 4 for value in before.values())


def test_an_adapter_put_on_after_the_layout_is_not_passed_over(model):
    lay_out_for_decoding(model)
    prompt = prompts_of([12])
    before = generate(model, prompt, GREEDY, stop_ids=[])
    for target in ("v_proj", "up_proj"):
        add_lora(model, LoraOptions(lora_target=(target,)), torch.Generator().manual_seed(0))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("lora_b"):
                    parameter.normal_(0, 1.0)
        assert generate(model.eval(), prompt, GREEDY, stop_ids=[]) != before
        for block in model.layers:
            for parent, name in ((block.self_attn, "v_proj"), (block.mlp, "up_proj")):
                child = getattr(parent, name)
                setattr(parent, name, getattr(child, "base", child))
        assert generate(model, prompt, GREEDY, stop_ids=[]) == before


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("inputs, outputs", [(1, 7), (2, 1), (123, 45), (576, 960)])
def test_the_one_row_product_is_exact_for_any_number_of_threads(threads, inputs, outputs):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, inputs), (inputs, outputs), (outputs,))
    x, table, bias = (torch.randn(*shape, generator=generator) for shape in shapes)
    try:
        for given in (None, bias):
            expected = x.double() @ table.double() + (0 if given is None else given)
            found = matvec_by_rows(x, table, given).double()
            plain = torch.nn.functional.linear(x, table.T, given).double()
            error, allowed = (found - expected).abs().max(), (plain - expected).abs().max()
            assert found.shape == (1, outputs) and error <= 2 * allowed + 1e-6 * expected.abs().max()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_decode_in_the_layout_near_the_wide_model(model, tmp_path, dtype):
    narrow = load_model_like(model, tmp_path, dtype)
    plain = Decoding(narrow, prompts_of([9, 4]), GREEDY, stop_ids=[])
    lay_out_for_decoding(narrow)
    tokens, positions = torch.tensor([5]), torch.tensor([0], dtype=torch.int32)
    borders = torch.tensor([0, 1], dtype=torch.int32)
    wide = model.logits(model(tokens, positions, borders, 1)).detach()
    with torch.no_grad():
        ours = narrow.logits(narrow(tokens, positions, borders, 1)).float()
    assert (ours - wide).abs().max() < 0.05 * wide.abs().max()
    while plain.live:
        plain.step()
    assert plain.cache.storage.dtype is dtype


def load_model_like(model, folder, dtype):
    from checkpoints.huggingface import save_model

    save_model(model, folder, source_folder=None)
    return load_model(folder, dtype=dtype)


# Bad requests


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": 0.0}, "temperature: 0.0 with do_sample=true"),
        ({"temperature": -1.0}, "temperature: -1.0"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"top_p": 0.0}, "top_p: 0.0 expected more than 0"),
        ({"top_p": 1.01}, "top_p: 1.01"),
        ({"top_k": -1}, "top_k: -1"),
        ({"min_p": 1.5}, "min_p: 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size: -2"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0"),
        ({"stop": ("a", "")}, "stop: an empty text"),
    ],
)
def test_options_that_make_no_sense_name_the_key(change, message):
    with pytest.raises(ValueError, match=message):
        GenerateOptions(**change)


def test_temperature_zero_is_fine_when_nothing_is_drawn():
    assert GenerateOptions(do_sample=False, temperature=0.0).temperature == 0.0


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "prompt 1 has no token"),
        ([5] * 96, "prompt 1 has 96 tokens, but the model takes 96"),
        ([5, 97], "prompt 1 holds token 97, but the model has 97"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [[3], prompt], GREEDY, stop_ids=[])


def test_a_broken_model_and_a_model_in_training_mode_are_refused(model, tmp_path):
    broken = load_model_like(model, tmp_path, torch.float32)
    with pytest.raises(ValueError, match="training mode"):
        generate(broken.train(), [[3]], GREEDY, stop_ids=[])
    with torch.no_grad():
        broken.norm.weight[0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        generate(broken.eval(), [[3]], GREEDY, stop_ids=[])
