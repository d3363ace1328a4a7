"""The templates, text/render.py and text/jinja_template.py against transformers, on tiny tokenizers.

The jinja texts in fixtures/templates are the published formats of well-known models (see the README there).
"""

import itertools
import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import KINDS, make_tokenizer

from templates import TEMPLATES, TemplateOptions, get_template
from text.jinja_template import JinjaTemplate
from text.render import Message, Span, encode_dialogue, split_thought, tool_calls
from text.tokenizer import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "templates"
SAME_AS = {
    "chatml": "chatml",
    "smollm2": "smollm2",
    "qwen": "qwen25",
    "qwen3": "qwen3",
    "qwen3_nothink": "qwen3_2507",
    "llama2": "llama2",
    "llama3": "llama3",
    "llama31": "llama31",
    "mistral": "mistral",
    "zephyr": "zephyr",
    "yi": "yi15",
    "deepseek": "deepseek_llm",
    "vicuna": "vicuna_v11",
}
SYSTEM = Message("system", "You are Anvil.")
USER, ANSWER = Message("user", "Hello, who are you?"), Message("assistant", "I am Anvil,\nan assistant.")
MORE, LAST = (
    Message("user", " caf\u00e9 {{eos}} </s>? "),
    Message("assistant", " Paris \u65e5\u672c\U0001f600 "),
)
DIALOGUES = {
    "one turn": [USER, ANSWER],
    "system": [SYSTEM, USER, ANSWER],
    "system with spaces": [Message("system", " You are Anvil.\n"), USER, ANSWER],
    "empty system": [Message("system", ""), USER, ANSWER],
    "two turns": [USER, ANSWER, MORE, ANSWER],
    "two turns with spaces": [SYSTEM, MORE, LAST, USER, ANSWER],
    "three turns": [SYSTEM, USER, ANSWER, MORE, ANSWER, USER, ANSWER],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers & more.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "number", "description": "first"},
                    "b": {"type": "string", "enum": ["1", "2"], "items": {"type": "number"}},
                },
                "required": ["a"],
            },
        },
    }
]
QUERY = {"type": ["string", "null"], "description": "what"}
SEARCH = {"name": "search", "parameters": {"properties": {"query": QUERY, "items": {"type": "array"}}}}
CALL = Message("function", '{"name": "add", "arguments": {"a": 1, "b": "caf\u00e9"}}')
RESULT = Message("observation", '{"sum": 3}')


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """kind -> (our tokenizer, transformers' tokenizer)."""
    folders = {kind: make_tokenizer(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}
    return {
        kind: (Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder))
        for kind, folder in folders.items()
    }


def fixture(name):
    return (FIXTURES / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def dicts(messages):
    roles = {"observation": "tool", "function": "assistant"}
    result = []
    for message in messages:
        entry = {"role": roles.get(message.role, message.role), "content": message.content}
        calls = tool_calls(message.content) if message.role == "function" else None
        if calls:
            functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
            entry |= {"content": "", "tool_calls": [{"type": "function", "function": f} for f in functions]}
        result.append(entry)
    return result


def text_of(spans):
    return "".join(span.text for span in spans)


def answers_of(spans):
    return [span.text for span in spans if span.answer]


def render(template, messages, tokenizer, **options):
    return template.render(messages, tokenizer.bos_token, tokenizer.eos_token, **options)


@pytest.mark.parametrize("name", SAME_AS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_those_of_the_published_jinja(pairs, kind, name):
    ours, theirs = pairs[kind]
    source = fixture(SAME_AS[name])
    for case, messages in DIALOGUES.items():
        for end, prompt in ((len(messages), False), (len(messages) - 1, True)):
            expected = theirs.apply_chat_template(
                dicts(messages[:end]), chat_template=source, add_generation_prompt=prompt, return_dict=False
            )
            spans = render(TEMPLATES[name], messages[:end], ours, generation_prompt=prompt)
            assert text_of(spans) == theirs.apply_chat_template(
                dicts(messages[:end]), chat_template=source, add_generation_prompt=prompt, tokenize=False
            ), case
            # Without its end mark in the vocabulary, or with an answer that begins with a space where the
            # template has one too, a token would cross the border of an answer; encode_parts does not allow
            # that.
            end_is_token = ours.token_id(TEMPLATES[name].stop_words(ours.eos_token)[0]) is not None
            two_spaces = (
                "spaces" in case and TEMPLATES[name].answer.startswith(" ") and not TEMPLATES[name].trim
            )
            if end_is_token and not two_spaces:
                assert encode_dialogue(ours, spans).ids == expected, case


@pytest.mark.parametrize("name", SAME_AS)
def test_answers_of_the_jinja_are_those_of_the_built_in_template(pairs, name):
    ours, _ = pairs["llama2"]
    jinja = JinjaTemplate(fixture(SAME_AS[name]))
    for messages in DIALOGUES.values():
        built_in, found = render(TEMPLATES[name], messages, ours), render(jinja, messages, ours)
        assert text_of(found) == text_of(built_in)
        assert answers_of(found) == answers_of(built_in)
        turns = [(span.turn, span.role) for span in built_in if span.answer]
        assert [(span.turn, span.role) for span in found if span.answer] == turns
        left, right = (render(template, messages, ours) for template in (TEMPLATES[name], jinja))
        assert encode_dialogue(ours, left).ids == encode_dialogue(ours, right).ids
        prompt = render(jinja, messages[:-1], ours, generation_prompt=True)
        assert text_of(prompt) == text_of(
            render(TEMPLATES[name], messages[:-1], ours, generation_prompt=True)
        )
    end = TEMPLATES[name].stop_words("</s>")[0]
    assert jinja.stop_words("</s>")[0] == end
    assert jinja.content(" x") == TEMPLATES[name].content(" x")


@pytest.mark.parametrize("name", ["mistral_v01_2023", "mistral_v02_2023"])
def test_other_published_forms_have_exact_answers(pairs, name):
    ours, theirs = pairs["metaspace"]
    messages = DIALOGUES["two turns"]
    spans = render(JinjaTemplate(fixture(name)), messages, ours)
    assert answers_of(spans) == [ANSWER.content + "</s>"] * 2  # v0.1's space after </s> is not trained
    expected = theirs.apply_chat_template(dicts(messages), chat_template=fixture(name), return_dict=False)
    assert encode_dialogue(ours, spans).ids == expected


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_trained_answer_follows_exactly_the_prompt_of_generation(pairs, kind, name, data):
    ours, _ = pairs[kind]
    fragments = st.sampled_from(
        ["", " ", "a", "Hi", "\n", "\n\n", "  x", "12", "</s>", "<think>", "\u0301", "\U0001f600"]
    )
    content = st.lists(fragments, max_size=3).map("".join)
    thought = st.sampled_from(["", "<think>\nhm\n</think>\n\n"])
    messages = [Message("system", data.draw(content))] if data.draw(st.booleans()) else []
    for role in data.draw(
        st.sampled_from([("assistant",), ("assistant", "assistant"), ("function", "assistant")])
    ):
        asked = "user" if not messages or messages[-1].role != "function" else "observation"
        messages.append(Message(asked, data.draw(content)))
        messages.append(Message(role, data.draw(thought) + data.draw(content)))
    options = {"enable_thinking": data.draw(st.booleans())}
    spans = render(TEMPLATES[name], messages, ours, **options)
    encoded = encode_dialogue(ours, spans)
    assert any(encoded.answer) or not any(answers_of(spans))
    for turn in sorted({span.turn for span in spans if span.answer}):
        prompt = encode_dialogue(
            ours, render(TEMPLATES[name], messages[:turn], ours, generation_prompt=True, **options)
        )
        turns = of_tokens(spans, encoded, "turn")
        first = next((i for i, flag in enumerate(encoded.answer) if flag and turns[i] >= turn), None)
        if first is not None and turns[first] == turn:
            assert encoded.ids[:first] == prompt.ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_template_written_as_jinja_gives_the_same_text_in_transformers(pairs, name):
    ours, theirs = pairs["llama2"]
    source = TEMPLATES[name].to_jinja()
    dialogues = [*DIALOGUES.values(), [SYSTEM, USER, CALL, RESULT, ANSWER], [USER, RESULT, ANSWER]]
    ways = itertools.product((False, True), (True, False), (None, TOOLS, [TOOLS[0]["function"], SEARCH]))
    for messages, (prompt, thinking, tools) in itertools.product(dialogues, ways):
        end, way = len(messages) - prompt, {"enable_thinking": thinking, "tools": tools}
        got = theirs.apply_chat_template(
            dicts(messages[:end]), chat_template=source, tokenize=False, add_generation_prompt=prompt, **way
        )
        assert got == text_of(render(TEMPLATES[name], messages[:end], ours, generation_prompt=prompt, **way))


@pytest.mark.parametrize("name", ["qwen", "qwen3", "qwen3_nothink"])
def test_tool_turns_and_definitions_equal_the_published_jinja(pairs, name):
    _, theirs = pairs["chatml"]
    ours = pairs["chatml"][0]
    thought = Message("assistant", "<think>\nThe sum\n</think>\n\nIt is 3.")
    for messages in ([SYSTEM, USER, CALL, RESULT, thought], [USER, CALL, RESULT, ANSWER], [USER, CALL]):
        for tools in (None, TOOLS):
            expected = theirs.apply_chat_template(
                dicts(messages), chat_template=fixture(SAME_AS[name]), tools=tools, tokenize=False
            )
            assert text_of(render(TEMPLATES[name], messages, ours, tools=tools)) == expected
            jinja = JinjaTemplate(fixture(SAME_AS[name]))
            assert text_of(render(jinja, messages, ours, tools=tools)) == expected
            exported = theirs.apply_chat_template(
                dicts(messages), chat_template=TEMPLATES[name].to_jinja(), tools=tools, tokenize=False
            )
            assert exported == expected


def test_generic_tool_text_and_calls():
    spans = TEMPLATES["default"].render([SYSTEM, USER, CALL, RESULT, ANSWER], None, "</s>", tools=TOOLS)
    text = text_of(spans)
    assert text.startswith(
        "You are Anvil.You have access to the following tools:\n> Tool Name: add\n"
        "Tool Description: Adds two numbers & more.\nTool Args:\n  - a (number, required): first\n"
        "  - b (string): , should be one of [1, 2], where each item should be number\n\n"
        "Use the following format if using a tool:\n```\nAction: tool name (one of [add])\n"
    )
    assert answers_of(spans) == [
        ' Action: add\nAction Input: {"a": 1, "b": "caf\u00e9"}</s>',
        f" {ANSWER.content}</s>",
    ]
    plain = TEMPLATES["default"].render(
        [USER, Message("function", "search: x"), RESULT, ANSWER], None, "</s>"
    )
    assert answers_of(plain)[0] == " search: x</s>"


def test_tool_calls_are_read_from_json_only():
    assert tool_calls('[{"name": "f", "arguments": "{\\"a\\": 1}"}, {"name": "g", "arguments": "x"}]') == [
        ("f", {"a": 1}),
        ("g", "x"),
    ]
    for text in ("f(1)", "3", '{"name": "f"}', "[]", '["name", "arguments"]'):
        assert tool_calls(text) is None


EXPECTED = {
    # name: (text before the answer, trained text, text after it, stop words) for system S, user U, answer A,
    # user V
    "default": ("S\nHuman: U\nAssistant:", " A</s>", "\nHuman: V\nAssistant:", ("</s>",)),
    "empty": ("SU", "A", "V", ("</s>",)),
    "vanilla": ("SU", "A</s>", "V", ("</s>",)),
    "fewshot": ("SU", "A\n\n", "V", ("\n\n", "</s>")),
    "alpaca": (
        "S\n\n### Instruction:\nU\n\n### Response:\n",
        "A</s>",
        "\n\n### Instruction:\nV\n\n### Response:\n",
        ("### Instruction:", "</s>"),
    ),
    "vicuna": ("<s>S USER: U ASSISTANT:", " A</s>", "USER: V ASSISTANT:", ("</s>",)),
    "llama2": ("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST]", " A </s>", "<s>[INST] V [/INST]", ("</s>",)),
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n",
        "A<|im_end|>",
        "\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
        ("<|im_end|>", "<|im_start|>", "</s>"),
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_trained_text_is_the_answer_with_its_end_mark_and_nothing_else(name):
    before, answer, between, stop = EXPECTED[name]
    messages = [Message(role, text) for role, text in zip(("system", "user", "assistant", "user"), "SUAV")]
    spans = TEMPLATES[name].render(messages, "<s>", "</s>", generation_prompt=True)
    index = next(i for i, span in enumerate(spans) if span.answer)
    assert text_of(spans[:index]) == before
    assert spans[index] == Span(answer, True, 2, "assistant")
    assert text_of(spans[index + 1 :]) == between
    assert spans[-1].turn in (3, 4)
    assert TEMPLATES[name].stop_words("</s>") == stop


def test_default_system_text_and_its_replacement():
    assert "created by Alibaba Cloud" in text_of(get_template("qwen").render([USER], None, "</s>"))
    for template in (
        get_template("qwen", default_system="Be brief."),
        get_template("zephyr", default_system="Be brief."),
    ):
        assert "Be brief." in text_of(template.render([USER], None, "</s>"))
        assert "Be brief." not in text_of(template.render([SYSTEM, USER], None, "</s>"))
    assert "system" not in text_of(get_template("qwen", default_system="").render([USER], None, "</s>"))
    jinja = get_template(None, fixture("chatml"), default_system="Be brief.")
    spans = jinja.render([USER, ANSWER], None, "</s>")
    assert text_of(spans).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user")
    assert [span.turn for span in spans if span.answer] == [1]  # turns are those of the caller's list
    assert TemplateOptions() == TemplateOptions(template=None, default_system=None, enable_thinking=None)


PARTS = (
    "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("name", ["chatml", "qwen3", "parts", "with tool_use", "begins with lines"])
def test_a_default_system_text_is_in_the_template_that_is_saved(pairs, name):
    ours, theirs = pairs["chatml"]
    source = {
        "parts": PARTS,
        "begins with lines": "\n\n  {% if true %}\n x" + fixture("chatml") + "{% endif %}",
    }
    source = source.get(name) or fixture("qwen3" if name == "qwen3" else "chatml")
    named = {"default": source} | ({"tool_use": "TOOL\n" + source + "\n"} if name == "with tool_use" else {})
    system = 'Be "brief", it\'s {{ no }} \\d\n\u00fc \U0001f600'
    template = get_template(None, named, default_system=system)
    for messages, tools in itertools.product(([USER, ANSWER], [SYSTEM, USER, ANSWER]), (None, TOOLS)):
        parts = [
            {"role": each.role, "content": [{"type": "text", "text": each.content}]} for each in messages
        ]
        how = {"chat_template": template.to_jinja(), "tools": tools, "tokenize": False}
        found = theirs.apply_chat_template(parts if name == "parts" else dicts(messages), **how)
        assert found == text_of(render(template, messages, ours, tools=tools))
        assert (system in found) == (messages[0] is USER)
    assert get_template(None, source).to_jinja() == source


def of_tokens(spans, encoded, name):
    """The turn or the role of every token: that of its span."""
    return [getattr(span, name) for span, count in zip(spans, encoded.counts) for _ in range(count)]


def test_turns_and_roles_of_tokens(pairs):
    ours, _ = pairs["chatml"]
    for template in (TEMPLATES["chatml"], JinjaTemplate(fixture("chatml"))):
        spans = render(template, [SYSTEM, USER, ANSWER], ours)
        encoded = encode_dialogue(ours, spans)
        turns, roles = of_tokens(spans, encoded, "turn"), of_tokens(spans, encoded, "role")
        assert len(encoded.ids) == len(encoded.answer) == len(turns) == len(roles)
        by_turn = {turn: [i for i, t in zip(encoded.ids, turns) if t == turn] for turn in (0, 1, 2)}
        assert ours.decode(by_turn[0], False) == "<|im_start|>system\nYou are Anvil.<|im_end|>\n"
        assert ours.decode(by_turn[1], False) == "<|im_start|>user\nHello, who are you?<|im_end|>\n"
        assert {role for role, turn in zip(roles, turns) if turn == 2} == {"assistant"}
        trained = [i for i, flag in zip(encoded.ids, encoded.answer) if flag]
        assert ours.decode(trained, False) == ANSWER.content + "<|im_end|>"


def test_thinking_answers_of_qwen3():
    thoughtful = Message("assistant", "<think>\nThe sum.\n</think>\n\nIt is 3.")
    dialogue = [USER, thoughtful, MORE, thoughtful]
    qwen3 = TEMPLATES["qwen3"]
    assert answers_of(qwen3.render(dialogue, None, "</s>")) == [
        "<think>\nThe sum.\n</think>\n\nIt is 3.<|im_end|>"
    ]
    assert "<think>" not in text_of(qwen3.render(dialogue, None, "</s>")[:4])
    silent = qwen3.render(dialogue, None, "</s>", enable_thinking=False)
    assert answers_of(silent) == ["It is 3.<|im_end|>"]
    assert text_of(silent).count("<think>\n\n</think>\n\n") == 1
    jinja = JinjaTemplate(fixture("qwen3"))
    for thinking in (True, False):
        left = qwen3.render(dialogue, None, "</s>", enable_thinking=thinking)
        right = jinja.render(dialogue, None, "</s>", enable_thinking=thinking)
        assert (text_of(left), answers_of(left)) == (text_of(right), answers_of(right))
    assert len(answers_of(TEMPLATES["qwen3_nothink"].render([USER, ANSWER] * 2, None, "</s>"))) == 2
    assert split_thought("no block") == ("", "no block")


def test_names_and_missing_templates():
    assert get_template("llama3") is TEMPLATES["llama3"]
    with pytest.raises(
        ValueError, match=r"^template: there is no template 'lama3'; did you mean 'llama3'\? choices: .*yi"
    ):
        get_template("lama3")
    with pytest.raises(
        ValueError, match="^template: the checkpoint has no chat_template.*choices: default, "
    ):
        get_template(None, None)
    assert isinstance(get_template(None, "x"), JinjaTemplate)
    wanted = "default empty vanilla fewshot alpaca vicuna chatml qwen qwen3 llama2 llama3 mistral zephyr yi"
    assert {*wanted.split(), "deepseek"} <= set(TEMPLATES)


def test_bad_dialogues_are_refused():
    with pytest.raises(KeyError, match="robot"):
        TEMPLATES["chatml"].render([Message("robot", "x")], "", "")
    with pytest.raises(ValueError, match="message 1 is a system message"):
        TEMPLATES["chatml"].render([USER, SYSTEM], None, "</s>")
    with pytest.raises(ValueError, match="'zephyr' ends an answer with the tokenizer's eos token.*chatml"):
        TEMPLATES["zephyr"].render([USER, ANSWER], None, None)
    assert answers_of(TEMPLATES["chatml"].render([USER, ANSWER], None, None)) == [
        ANSWER.content + "<|im_end|>"
    ]
    with pytest.raises(ValueError, match="system message needs a user message after it"):
        TEMPLATES["llama2"].render([SYSTEM, ANSWER], "<s>", "</s>")


NO_GENERATION_PROMPT = (
    "{% for m in messages %}{{ '### ' + m['role'].upper() + ': ' + m['content'] + '\n' }}{% endfor %}"
)


def test_jinja_without_generation_prompt_gets_its_header_from_the_finished_dialogue(pairs):
    ours, _ = pairs["llama3"]
    jinja = JinjaTemplate(NO_GENERATION_PROMPT)
    spans = render(jinja, [USER, ANSWER, MORE, ANSWER], ours)
    assert answers_of(spans) == [f" {ANSWER.content}\n"] * 2  # nothing but the newline ends an answer
    prompt = render(jinja, [USER, ANSWER, MORE], ours, generation_prompt=True)
    assert prompt[-1] == Span("### ASSISTANT:", False, 3, "assistant")
    assert text_of(jinja.render([USER], None, None, generation_prompt=True)).endswith("\n### ASSISTANT:")
    assert jinja.content(" I am") == "I am"
    assert text_of(spans).startswith(text_of(prompt))


def test_jinja_that_strips_content_is_followed():
    source = fixture("chatml").replace("turn.content", "turn.content.strip()")
    spans = JinjaTemplate(source).render([MORE, LAST, MORE, LAST], None, "</s>")
    assert answers_of(spans) == [LAST.content.strip() + "<|im_end|>"] * 2


def test_jinja_whose_prompt_is_not_how_the_answer_begins_is_refused():
    source = fixture("chatml").replace("'<|im_start|>assistant\\n'", "'<|im_start|>model\\n'")
    with pytest.raises(ValueError, match=r"where the answer begins.*'model.*'assistant.*`template: chatml`"):
        JinjaTemplate(source).render([USER, ANSWER], None, "</s>")


def test_jinja_that_ends_only_the_last_answer_trains_only_that():
    source = (
        "{% for m in messages %}{{ m.role + ':' + m.content + (eos_token if loop.last else '\n') }}{% endfor "
        "%}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    jinja = JinjaTemplate(source.replace("if loop.last", "if loop.last and m.role == 'assistant'"))
    assert answers_of(jinja.render([USER, ANSWER, MORE, ANSWER], None, "</s>")) == [ANSWER.content + "</s>"]


MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}\n{% else %}{{ m.role + ':' + m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


def test_jinja_with_generation_marks_trains_what_transformers_masks(pairs):
    ours, theirs = pairs["llama3"]
    jinja = JinjaTemplate(MARKED)
    messages = [SYSTEM, USER, ANSWER, MORE, ANSWER]
    spans = render(jinja, messages, ours)
    assert [(span.text, span.turn) for span in spans if span.answer] == [
        (ANSWER.content + "<|eot_id|>", t) for t in (2, 4)
    ]
    encoded = encode_dialogue(ours, spans)
    expected = theirs.apply_chat_template(
        dicts(messages), chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert encoded.ids == expected["input_ids"]
    assert [int(flag) for flag in encoded.answer] == expected["assistant_masks"]
    assert jinja.stop_words("</s>") == ("</s>",)
    text = render(jinja, [USER], ours, generation_prompt=True)
    assert text_of(text).endswith("A:")


SOME_MARKED = {
    "the last answer": MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last"),
    "the first answer": MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.index < 4"),
    "no answer": MARKED.replace("m.role == 'assistant'", "m.role == 'robot'"),
    "each twice": MARKED.replace(
        "{{ m.content + eos_token }}", "{{ m.content }}{% endgeneration %}|{% generation %}{{ eos_token }}"
    ),
}


@pytest.mark.parametrize("case", SOME_MARKED)
def test_jinja_that_marks_not_every_answer_once_is_followed(pairs, case):
    ours, theirs = pairs["llama3"]
    first, last = Message("assistant", "one"), Message("assistant", "two")
    messages = [SYSTEM, USER, first, MORE, last]
    spans = render(JinjaTemplate(SOME_MARKED[case]), messages, ours)
    expected = theirs.apply_chat_template(
        dicts(messages), chat_template=SOME_MARKED[case], return_dict=True, return_assistant_tokens_mask=True
    )
    assert [int(flag) for flag in encode_dialogue(ours, spans).answer] == expected["assistant_masks"]
    turns = {"the last answer": [4], "the first answer": [2], "no answer": [], "each twice": [2, 2, 4, 4]}
    assert [span.turn for span in spans if span.answer] == turns[case]


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_marked_answer_is_that_of_its_turn_whatever_it_says(which, pieces):
    chosen = f"m.role == 'assistant' and (loop.index0 - 1) // 2 in {list(which)}"
    source = MARKED.replace("m.role == 'assistant'", chosen)
    if pieces == 2:
        cut = "{{ m.content }}{% endgeneration %}{% generation %}{{ eos_token }}"
        source = source.replace("{{ m.content + eos_token }}", cut)
    spans = JinjaTemplate(source).render([USER, ANSWER] * 3, None, "</s>")
    found = [span.turn for span in spans if span.answer]
    assert found == [2 * answer + 1 for answer in which for _ in range(pieces)]


@pytest.mark.parametrize(
    "refused", ["not tools", "messages | length < 4", "messages[0].role != 'system'", "not mood"]
)
def test_jinja_that_refuses_a_plain_question_still_takes_a_row_that_it_likes(refused):
    source = "{% if " + refused + " %}{{ raise_exception('no') }}{% endif %}" + fixture("chatml")
    jinja = JinjaTemplate(source)
    how = {"tools": TOOLS, "variables": {"mood": "sad"}}
    spans = jinja.render([SYSTEM, USER, ANSWER, MORE, ANSWER], None, "</s>", **how)
    trained = answers_of(spans)
    assert trained[-1] == ANSWER.content + "<|im_end|>" and len(trained) == (1 if "length" in refused else 2)
    assert jinja.stop_words("</s>") == ("</s>",) and jinja.content("x") == "x"


NO_HEADER = "{% if not tools %}{{ raise_exception('no') }}{% endif %}" + NO_GENERATION_PROMPT


def test_the_header_of_such_a_template_is_found_with_the_row_itself():
    spans = JinjaTemplate(NO_HEADER).render([USER, ANSWER], None, "</s>", tools=TOOLS)
    assert answers_of(spans) == [f" {ANSWER.content}\n"]


# what DeepSeek-R1's distills do, as first published and with the prompt that opens the thought
R1 = (
    "{%- for m in messages %}{%- if m.role == 'user' %}{{- '<\uff5cUser\uff5c>' + m.content }}"
    "{%- else %}{%- set c = m.content %}{%- if '</think>' in c %}{%- set c = c.split('</think>')[-1] %}"
    "{%- endif %}{{- '<\uff5cAssistant\uff5c>' + c + eos_token }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<\uff5cAssistant\uff5c>OPENING' }}{%- endif %}"
)
THOUGHT = "<think>\nadd\n</think>\n\n4"


@pytest.mark.parametrize("opening", ["", "<think>\n"])
def test_the_thought_that_a_template_drops_from_the_last_answer_is_trained(opening):
    jinja = JinjaTemplate(R1.replace("OPENING", opening.replace("\n", "\\n")))
    question, answer = Message("user", "2+2?"), Message("assistant", THOUGHT)
    for last in (answer, Message("assistant", "4", {"reasoning_content": "add"})):
        spans = jinja.render([question, answer, question, last], None, "</s>")
        # an earlier answer stands there without its thought, and that is not what the model is to write
        assert answers_of(spans) == [THOUGHT.removeprefix(opening) + "</s>"]
        header = f"<\uff5cUser\uff5c>2+2?<\uff5cAssistant\uff5c>{opening}"
        assert text_of(spans[:-1]).endswith(f"</s>{header}")
    if opening:
        with pytest.raises(ValueError, match="where the answer begins.*`template: deepseekr1`"):
            jinja.render([question, Message("assistant", "4")], None, "</s>")


def test_deepseek_templates_as_llama_factory_has_them():
    question, answer = Message("user", "2+2?"), Message("assistant", THOUGHT)
    for name, thought, trained in (
        ("deepseekr1", answer, THOUGHT),
        ("deepseekr1", Message("assistant", "4"), "<think>\n\n</think>\n\n4"),
        ("deepseek3", Message("assistant", "4"), "4"),
    ):
        spans = TEMPLATES[name].render([Message("system", "S"), question, thought], "<s>", "</s>")
        assert text_of(spans) == f"<s>S<\uff5cUser\uff5c>2+2?<\uff5cAssistant\uff5c>{trained}</s>"
        assert answers_of(spans) == [f"{trained}</s>"]


@pytest.mark.parametrize("said", ["<think>\n\n</think>\n\n4", "<think></think>4", "</think>4"])
def test_an_empty_thought_follows_the_prompt_that_opens_it(said):
    jinja = JinjaTemplate(R1.replace("OPENING", "<think>\\n"))
    spans = jinja.render([Message("user", "2+2?"), Message("assistant", said)], None, "</s>")
    assert answers_of(spans) == ["\n</think>\n\n4</s>"]


@pytest.mark.parametrize("keeps", [False, True])
def test_the_thought_of_an_earlier_answer_stands_where_the_template_keeps_it(pairs, keeps):
    _, theirs = pairs["llama3"]
    source = R1.replace("OPENING", "")
    if keeps:
        source = source.replace("c.split('</think>')[-1]", "c")
    question = Message("user", "2+2?")
    answer = Message("assistant", "4", {"reasoning_content": "add"})
    spans = JinjaTemplate(source).render([question, answer, question, answer], None, "</s>")
    earlier = [
        entry | ({"content": THOUGHT} if keeps and i else {})
        for i, entry in enumerate(dicts([question, answer]))
    ]
    expected = theirs.apply_chat_template(earlier, chat_template=source, tokenize=False, eos_token="</s>")
    assert text_of(spans).startswith(expected + "<\uff5cUser\uff5c>")
    assert answers_of(spans) == [THOUGHT + "</s>"] * (1 + keeps)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("<think>", "default"),
        ("<|im_start|><think>", "qwen3"),
        ("<|im_start|>", "chatml"),
        ("<\uff5cUser\uff5c></think>", "deepseekr1"),
        ("<|start_header_id|>", "llama3"),
        ("[INST]", "mistral"),
        ("Assistant: ", "default"),
    ],
)
def test_advice_names_a_template_whose_tokens_the_model_has(text, name):
    with pytest.raises(ValueError, match=f"refuses a dialogue.*`template: {name}`"):
        JinjaTemplate(text + "{{ raise_exception('no') }}").render([USER, ANSWER], None, "</s>")


def test_templates_by_name_as_transformers_chooses_them(tmp_path):
    folder = make_tokenizer(tmp_path, "chatml")
    plain, tool, other = (f"{name}{fixture('chatml')}" for name in ("PLAIN ", "TOOL ", "OTHER "))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    listed = {"default": plain, "tool_use": tool, "rag": other}
    ways = [
        [
            {"name": name, "template": text} for name, text in listed.items()
        ],  # as older transformers saved them
        None,
    ]
    for way in ways:
        if way is None:
            (folder / "additional_chat_templates").mkdir()
            (folder / "chat_template.jinja").write_text(plain)
            for name in ("tool_use", "rag"):
                (folder / "additional_chat_templates" / f"{name}.jinja").write_text(listed[name])
        path.write_text(json.dumps(config | ({} if way is None else {"chat_template": way})))
        ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
        assert ours.chat_template == theirs.chat_template == listed
        template = get_template(None, ours.chat_template)
        for tools in (None, TOOLS):
            expected = theirs.apply_chat_template(dicts([USER, ANSWER]), tools=tools, tokenize=False)
            assert text_of(template.render([USER, ANSWER], None, "</s>", tools=tools)) == expected
        chosen = get_template("rag", ours.chat_template)
        assert text_of(chosen.render([USER, ANSWER], None, "</s>", tools=TOOLS)).startswith("OTHER ")
    with pytest.raises(ValueError, match="the checkpoint's are rag, new: name one; choices: default, .*rag"):
        get_template(None, {"rag": other, "new": other})
    theirs.chat_template = {"tool_use": tool, "rag": other}  # none for a dialogue without definitions
    alone = get_template(None, theirs.chat_template)
    expected = theirs.apply_chat_template(dicts([USER, ANSWER]), tools=TOOLS, tokenize=False)
    assert text_of(alone.render([USER, ANSWER], None, "</s>", tools=TOOLS)) == expected
    assert alone.stop_words("</s>") == ("<|im_end|>", "</s>")
    with pytest.raises(ValueError, match="no default specified"):
        theirs.apply_chat_template(dicts([USER, ANSWER]), tokenize=False)
    with pytest.raises(ValueError, match="definitions alone.*this one has none; `template: tool_use`"):
        alone.render([USER, ANSWER], None, "</s>")
    path.write_text(json.dumps(config | {"chat_template": 3}))
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="chat_template: expected text"):
        Tokenizer.from_folder(folder)


def test_jinja_has_every_special_token_that_transformers_gives_it(tmp_path):
    folder = make_tokenizer(tmp_path, "chatml")
    path = folder / "tokenizer_config.json"
    added = {"sep_token": "<|im_start|>", "cls_token": "<think>", "tool_token": "<tool_call>"}
    path.write_text(json.dumps(json.loads(path.read_text()) | added))
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)
    names = ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "tool")
    shown = "{{ NAME_token is defined }}{{ NAME_token }}"
    source = " ".join(shown.replace("NAME", name) for name in names)
    source += "{{ enable_thinking is defined }}{{ 3 | tojson(false, 2) }}" + fixture("chatml")
    expected = theirs.apply_chat_template(dicts([USER, ANSWER]), chat_template=source, tokenize=False)
    spans = render(JinjaTemplate(source), [USER, ANSWER], ours, variables=ours.special_tokens)
    assert text_of(spans) == expected


def test_jinja_that_refuses_a_dialogue_names_the_reason_and_a_way_out():
    jinja = JinjaTemplate(fixture("mistral_v02_2023"))
    with pytest.raises(
        ValueError, match="refuses a dialogue of system, user.*must alternate.*`template: mistral`"
    ):
        jinja.render([SYSTEM, USER, ANSWER], "<s>", "</s>")
    with pytest.raises(ValueError, match="not valid jinja"):
        JinjaTemplate("{% for %}").render([USER], None, None)


@pytest.mark.parametrize(
    "attack",
    ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% for i in range(10**9) %}{% endfor %}"],
)
def test_jinja_is_sandboxed(attack):
    with pytest.raises(ValueError, match="refuses a dialogue"):
        JinjaTemplate(attack).render([USER], None, None)


def test_jinja_has_the_helpers_of_transformers(pairs):
    _, theirs = pairs["llama2"]
    source = (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson(indent=2) }}{% "
        "endfor %}"
        "{{ strftime_now('%Y') }}{{ tools | tojson }}{{ enable_thinking }}"
    )
    talk = [USER, ANSWER, MORE]
    ours = text_of(JinjaTemplate(source).render(talk, "<s>", "</s>", tools=TOOLS, enable_thinking=False))
    expected = theirs.apply_chat_template(
        dicts([USER, ANSWER, MORE]), chat_template=source, tokenize=False, tools=TOOLS, enable_thinking=False
    )
    assert ours == expected
