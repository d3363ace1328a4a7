"""Messages that hold more than a role and a text: what reaches the template and the trained tokens, against
transformers' apply_chat_template on the row itself."""

import copy
import json
from pathlib import Path

import pytest
import transformers
import trl
from tiny_tokenizers import make_tokenizer

from options.errors import UserError
from pipeline.encoding import ChunkEncoder, EncodeOptions
from pipeline.formats import Dropped, to_conversation, to_pair, to_rated
from pipeline.report import DataReport, DatasetReport
from pipeline.sources import OPENAI_TAGS, SHAREGPT_TAGS, DatasetInfo, find_dataset, read_rows
from pipeline.store import Tally
from templates import get_template
from text.tokenizer import Tokenizer

# writes all that a message may hold
ALL = (
    "{%- for tool in tools or [] %}{{- 'TOOL ' ~ tool.function.name ~ (tool.function.parameters | tojson) }}"
    "{%- endfor %}{%- for d in documents or [] %}{{- 'DOC ' ~ d.title ~ '\n' }}{%- endfor %}{{- mood or '' }}"
    "{%- for m in messages %}{{- '<|im_start|>' ~ m.role ~ ' ' ~ m.name ~ ' ' ~ m.tool_call_id ~ '\n' }}"
    "{%- if m.reasoning_content %}{{- '<think>' ~ m.reasoning_content ~ '</think>' }}{%- endif %}"
    "{{- m.content or '' }}{%- for c in m.tool_calls or [] %}"
    "{{- '<call ' ~ c.id ~ '>' ~ c.function.name ~ ' ' ~ (c.function.arguments | tojson) }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant  \n' }}{%- endif %}"
)
PARTS = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- for p in m.content %}"
    "{%- if p.type == 'text' %}{{- '[' + p.text + ']' }}{%- endif %}{%- endfor %}{{- '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
FORECAST = {
    "name": "forecast",
    "description": "rain or not",
    "parameters": {"type": "object", "properties": {"day": {"type": "integer", "description": "when"}}},
}


def call(number, arguments, **more):
    return {
        "id": f"call{number:05}",
        "type": "function",
        "function": {"name": "f", "arguments": arguments},
        **more,
    }


def said(role, content, **more):
    return {"role": role, "content": content, **more}


ASK = said("user", "Rain?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "chatml")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def openai(**columns):
    return DatasetInfo("d", "file", "x", "openai", {"messages": "messages", **columns}, OPENAI_TAGS)


def encode(row, tokenizer, template, info=None, tally=None, cutoff=4096, **options):
    """The whole text and the list of trained texts of one row of stage sft."""
    encoder = ChunkEncoder(
        info or openai(tools="tools"), 0, template, tokenizer, EncodeOptions("dialogue", cutoff, **options)
    )
    (example,) = encoder.encode((0, "row 0", row), tally or Tally())
    texts, last = [], False
    for token, trained in zip(example.tokens.tolist(), example.trained.tolist()):
        if trained and not last:
            texts.append([])
        if trained:
            texts[-1].append(token)
        last = trained
    decode = [tokenizer.decode(ids, skip_special=False) for ids in (example.tokens.tolist(), *texts)]
    return decode[0], decode[1:]


ROWS = {
    "text beside a call": [
        ASK,
        said("assistant", "I look.", tool_calls=[call(1, {"day": 1})]),
        said("tool", "dry"),
        said("assistant", "No."),
    ],
    "a call alone, content null": [ASK, said("assistant", None, tool_calls=[call(1, {"day": 1})])],
    "several calls and results with ids and names": [
        ASK,
        said("assistant", "", tool_calls=[call(1, {"day": 1}), call(2, {"day": 2})]),
        said("tool", "dry", tool_call_id="call00001", name="f"),
        said("tool", "wet", tool_call_id="call00002", name="g"),
        said("assistant", "No, yes."),
    ],
    "reasoning_content": [ASK, said("assistant", "No.", reasoning_content="Dry air.")],
    "thinking": [ASK, said("assistant", "No.", thinking="Dry air.")],
    "reasoning": [ASK, said("assistant", "No.", reasoning="Dry air.")],
    "a thought before a call": [
        ASK,
        said("assistant", None, reasoning_content="Look.", tool_calls=[call(1, {})]),
    ],
    "names of speakers": [said("user", "Rain?", name="Ann"), said("assistant", "No.")],
    "a developer": [said("developer", "Be brief."), ASK, said("assistant", "No.")],
    "nulls": [
        said("user", "Rain?", tool_calls=None, name=None),
        said("assistant", "No.", reasoning_content=None),
    ],
    "arguments with every type": [
        ASK,
        said("assistant", "", tool_calls=[call(1, {"a": [1, {"b": "\u00fc"}], "c": True})]),
    ],
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("as_text", [False, True])
def test_all_that_a_message_holds_reaches_the_template(tokenizer, theirs, name, as_text):
    expected = theirs.apply_chat_template(ROWS[name], chat_template=ALL, tokenize=False)
    row = {"messages": copy.deepcopy(ROWS[name])}
    for message in row["messages"] if as_text else []:  # OpenAI's arguments are JSON text
        for each in message.get("tool_calls") or []:
            each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
    before, tally = copy.deepcopy(row), Tally()
    text, trained = encode(row, tokenizer, get_template(None, ALL), tally=tally)
    assert text == expected
    answers = sum(message["role"] == "assistant" for message in ROWS[name])
    assert len(trained) == answers and all(each.endswith("<|im_end|>") for each in trained)
    assert tally.notes == {} and row == before


def test_the_nulls_that_arrow_fills_in_are_absent(tokenizer, theirs, tmp_path):
    import pyarrow
    import pyarrow.parquet

    from pipeline.readers import read_file

    tools = [
        FORECAST,
        {"name": "g", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
    ]
    rows = [
        {"messages": [ASK, said("assistant", None, tool_calls=[call(1, {"day": 1})])], "tools": tools},
        {"messages": [ASK, said("assistant", "No.", reasoning_content="Hm.")], "tools": None},
        {
            "messages": [ASK, said("assistant", "", tool_calls=[call(2, {"x": "y"}, index=3)])],
            "tools": tools[1:],
        },
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    filled = [row for _, row in read_file(tmp_path / "a.parquet")]
    assert filled[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"day": 1, "x": None}
    for row, read in zip(rows, filled):
        wrapped = [{"type": "function", "function": tool} for tool in row["tools"] or []] or None
        expected = theirs.apply_chat_template(
            row["messages"], chat_template=ALL, tools=wrapped, tokenize=False
        )
        assert encode(read, tokenizer, get_template(None, ALL))[0] == expected


@pytest.mark.parametrize("form", ["wrapped", "bare", "flat", "texts", "JSON", "JSON of wrapped"])
def test_every_form_of_tool_definitions_is_one(tokenizer, theirs, form):
    wrapped = {"type": "function", "function": FORECAST}
    tools = {
        "wrapped": [wrapped],
        "bare": [FORECAST],
        "flat": [{"type": "function", **FORECAST}],
        "texts": [json.dumps(FORECAST)],
        "JSON": json.dumps([FORECAST]),
        "JSON of wrapped": json.dumps([wrapped]),
    }[form]
    row = {"messages": [ASK, said("assistant", "No.")], "tools": tools}
    expected = theirs.apply_chat_template(row["messages"], chat_template=ALL, tools=[wrapped], tokenize=False)
    assert encode(row, tokenizer, get_template(None, ALL))[0] == expected
    assert f"<tools>\n{json.dumps(wrapped)}\n</tools>" in encode(row, tokenizer, get_template("qwen"))[0]
    assert "> Tool Name: forecast\n" in encode(row, tokenizer, get_template("chatml"))[0]


def test_what_a_row_sets_for_its_template(tokenizer, theirs):
    row = {"messages": [ASK, said("assistant", "No.")], "documents": [{"title": "Weather", "text": "dry"}]}
    expected = theirs.apply_chat_template(
        row["messages"], chat_template=ALL, documents=row["documents"], mood="sad", tokenize=False
    )
    for given in ({"mood": "sad"}, '{"mood": "sad"}'):
        assert (
            encode(row | {"chat_template_kwargs": given}, tokenizer, get_template(None, ALL))[0] == expected
        )
    silent = row | {"chat_template_kwargs": {"enable_thinking": False}}
    assert "<think>\n\n</think>\n\n" not in encode(silent, tokenizer, get_template("qwen3"))[1][0]
    assert "<think>\n\n</think>\n\n" in encode(row, tokenizer, get_template("qwen3"))[1][0]
    for wrong in ("{", "[1]", {"messages": []}):
        with pytest.raises(UserError, match="row 0 .*'chat_template_kwargs'"):
            encode(row | {"chat_template_kwargs": wrong}, tokenizer, get_template(None, ALL))


def test_a_content_of_parts_stays_one_where_the_template_reads_parts(tokenizer, theirs):
    either = PARTS.replace(
        "{%- for p in m.content %}",
        "{%- if m.content is string %}{{- m.content }}{%- else %}{%- for p in m.content %}",
    )
    either = either.replace("{%- endfor %}{{- '<|im_end|>", "{%- endfor %}{%- endif %}{{- '<|im_end|>")
    listed = [
        said(role, [{"type": "text", "text": text}, {"type": "text", "text": "!"}])
        for role, text in (("system", "s"), ("user", "q"), ("assistant", "a"))
    ]
    plain = [said("user", "q"), said("assistant", "a")]
    for source in (PARTS, either):
        expected = theirs.apply_chat_template(listed, chat_template=source, tokenize=False)
        text, trained = encode({"messages": listed}, tokenizer, get_template(None, source))
        assert text == expected and trained == ["[a][!]<|im_end|>"]
    # a text, where the template reads only parts, and parts, where it reads only text
    assert encode({"messages": plain}, tokenizer, get_template(None, PARTS))[1] == ["[a]<|im_end|>"]
    assert encode({"messages": plain}, tokenizer, get_template(None, either))[1] == ["a<|im_end|>"]
    assert encode({"messages": listed}, tokenizer, get_template(None, ALL))[1] == ["a!<|im_end|>"]
    assert encode({"messages": listed}, tokenizer, get_template("chatml"))[1] == ["a!<|im_end|>"]
    newer = [
        said("user", [{"type": "text", "value": "q"}]),
        said(
            "assistant",
            [
                {"type": "reasoning", "value": "t"},
                {"type": "text", "value": "a"},
                {"type": "tool_call", "value": '{"name": "f", "arguments": {}}'},
            ],
        ),
    ]
    assert encode({"messages": newer}, tokenizer, get_template("qwen3"))[1] == [
        '<think>\nt\n</think>\n\na\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'
    ]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "video", "text": None},
        "x",
    ],
)
def test_a_part_that_is_no_text_is_named(tokenizer, part):
    row = {"messages": [said("user", [{"type": "text", "text": "q"}, part]), said("assistant", "a")]}
    kind = part["type"] if isinstance(part, dict) else "str"
    with pytest.raises(
        UserError, match=rf"row 0 .*'messages'\[0\]: a part of the content is not text but '{kind}'"
    ):
        encode(row, tokenizer, get_template("chatml"))


@pytest.mark.parametrize("name", ["qwen", "qwen3", "qwen3_nothink"])
def test_built_in_templates_write_calls_thoughts_and_results_as_the_published_ones(tokenizer, theirs, name):
    from tests.test_templates import SAME_AS, fixture

    rows = [
        row
        for case, row in ROWS.items()
        if case not in ("a developer", "names of speakers", "thinking", "reasoning")
    ]
    for messages in rows:
        empty = [message | {"content": message["content"] or ""} for message in messages]
        expected = theirs.apply_chat_template(empty, chat_template=fixture(SAME_AS[name]), tokenize=False)
        thought = any(message.get("reasoning_content") for message in messages)
        tally = Tally()
        assert encode({"messages": messages}, tokenizer, get_template(name), tally=tally)[0] == expected
        if name == "qwen3" or not thought:
            assert not any("reasoning" in note for note in tally.notes)
        else:  # it has no place for a thought; so says the report
            assert tally.notes == {f"template {name!r} does not read 'reasoning_content' of a message": 1}
        exported = theirs.apply_chat_template(
            messages, chat_template=get_template(name).to_jinja(), tokenize=False
        )
        assert exported == expected


PUBLISHED = Path(trl.__file__).parent / "chat_templates"
TALK = [
    said("system", "Be brief."),
    ASK,
    said("assistant", "No."),
    said("user", "Sure?"),
    said("assistant", "Yes."),
]
CALLS, THOUGHT = "several calls and results with ids and names", "reasoning_content"
TOOLS = [{"type": "function", "function": FORECAST}]
# what the last answer of TALK, CALLS and the thoughtful row is, behind the prompt that fits it
LAST = {
    "qwen3": (
        "<think>\n\n</think>\n\nYes.",
        "<think>\n\n</think>\n\nNo, yes.",
        "<think>\nDry air.\n</think>\n\nNo.",
    ),
    "qwen3_5_think": ("\n</think>\n\nYes.", "\n</think>\n\nNo, yes.", "Dry air.\n</think>\n\nNo."),
    "qwen3_5_nothink": ("Yes.", "No, yes.", "Dry air.\n</think>\n\nNo."),  # the prompt of the other mode
    "nemotron_3_nano": ("Yes.", "No, yes.", "Dry air.\n</think>\nNo."),
    "lfm2_v2": ("Yes.", "No, yes.", "No."),
    "glm4moe": ("\n<think></think>\nYes.", "\n<think></think>\nNo, yes.", "\n<think>Dry air.</think>\nNo."),
    "gptoss": (
        "<|channel|>final<|message|>Yes.",
        "<|channel|>final<|message|>No, yes.",
        "<|channel|>analysis<|message|>Dry air.<|end|><|start|>assistant<|channel|>final<|message|>No.",
    ),
}


@pytest.mark.parametrize("name", LAST)
def test_templates_as_their_vendors_publish_them(tokenizer, theirs, name):
    source = (PUBLISHED / f"{name}.jinja").read_text()
    for messages, last in zip((TALK, ROWS[CALLS], ROWS[THOUGHT]), LAST[name]):
        row = {"messages": messages, "tools": TOOLS}
        expected = theirs.apply_chat_template(messages, chat_template=source, tools=TOOLS, tokenize=False)
        tally = Tally()
        text, trained = encode(row, tokenizer, get_template(None, source), tally=tally)
        assert text == expected
        assert trained[-1].startswith(last) and len(trained[-1]) < len(last) + 16  # and an end mark
        lost = [note for note in tally.notes if "thought" in note or "reasoning" in note]
        assert len(lost) == (name == "lfm2_v2" and messages is ROWS[THOUGHT])


def test_a_vendor_template_that_reads_only_parts_gets_parts(tokenizer):
    source = (PUBLISHED / "smolvlm.jinja").read_text()
    text, trained = encode({"messages": ROWS[CALLS]}, tokenizer, get_template(None, source))
    assert "User: Rain?" in text and "Tool: dry" in text and "Tool: wet" in text
    assert trained[-1].startswith(" No, yes.")


def sharegpt(*turns, **more):
    return {"conversations": [{"from": role, "value": text} for role, text in turns], **more}


def test_function_turns_of_llama_factory_with_a_thought_or_a_text():
    info = DatasetInfo("d", "file", "x", "sharegpt", {"messages": "conversations"}, SHAREGPT_TAGS)
    spoken = '{"name": "f", "arguments": {"day": 1}}'
    written = f"<tool_call>\n{spoken}\n</tool_call>"
    cases = {
        spoken: written,
        f"[{spoken}, {spoken}]": f"{written}\n{written}",
        f"<think>\nt\n</think>\n\n{spoken}": f"<think>\nt\n</think>\n\n{written}",
        f"I look.\n{written}": f"I look.\n{written}",
    }
    for content, expected in cases.items():
        row = sharegpt(("human", "q"), ("function_call", content))
        turns = to_conversation(row, info).turns
        spans = get_template("qwen3_nothink").render(turns, None, "<|im_end|>")
        assert [span.text for span in spans if span.answer] == [expected + "<|im_end|>"]
    for wrong in ("f(x)", '{"name": "f"}', f"{written} <tool_call>x</tool_call>"):
        with pytest.raises(UserError, match=r"\[1\]: a function call is not JSON"):
            to_conversation(sharegpt(("human", "q"), ("function_call", wrong)), info)


def test_an_answer_of_weight_0_is_shown_and_not_trained(tokenizer):
    turns = [
        ASK,
        said("assistant", "No.", weight=0),
        said("user", "Sure?"),
        said("assistant", "Yes.", weight=1),
    ]
    for source in (None, ALL):
        template = get_template(None, ALL) if source else get_template("chatml")
        text, trained = encode({"messages": turns}, tokenizer, template)
        assert trained == ["Yes.<|im_end|>"] and "No.<|im_end|>" in text
    whole = encode({"messages": turns}, tokenizer, get_template("chatml"), train_on_prompt=True)[1]
    assert "No." not in "".join(whole) and "Sure?" in "".join(whole)
    newer = [ASK, said("assistant", "No.", loss_weight=0.0), ASK, said("assistant", "Yes.", loss_weight=1.0)]
    assert encode({"messages": newer}, tokenizer, get_template("chatml"))[1] == ["Yes.<|im_end|>"]
    with pytest.raises(UserError, match=r"'messages'\[1\]\.weight: expected 0 or 1, found float 0\.5"):
        encode({"messages": [ASK, said("assistant", "No.", weight=0.5)]}, tokenizer, get_template("chatml"))


def test_what_no_template_can_use_is_counted_in_the_report(tokenizer):
    messages = [
        ASK,
        said("assistant", "I look.", tool_calls=[call(1, {})], mood=3),
        said("tool", "dry", tool_call_id="call00001"),
        said("assistant", "No."),
    ]
    deaf = ALL.replace("m.tool_calls", "[]").replace("m.tool_call_id", "''")
    mute = ALL.replace("m.content or ''", "m.content if not m.tool_calls else ''")
    tally = Tally()
    for template in (get_template("chatml"), get_template(None, deaf), get_template(None, mute)):
        encode({"messages": messages, "tools": [FORECAST]}, tokenizer, template, openai(), tally)
    lines = str(DataReport([DatasetReport("d", "train", tally)])).splitlines()
    assert [line.partition(" (first: row 0")[0] for line in lines[2:]] == [
        "d: 3 rows: column 'tools' is not used: the data set's entry does not name it",
        "d: 1 rows: template 'chatml' does not read 'mood' of a message",
        "d: 1 rows: template 'chatml' does not read 'tool_call_id' of a message",
        "d: 2 rows: template 'checkpoint' does not read 'mood' of a message",
        "d: 1 rows: template 'checkpoint' has no form for tool calls: they stand as JSON",
        "d: 1 rows: template 'checkpoint' does not read 'tool_call_id' of a message",
        "d: 1 rows: template 'checkpoint' leaves out the text beside a tool call",
    ]
    text, trained = encode({"messages": messages}, tokenizer, get_template(None, deaf))
    assert trained[0] == 'I look.\n{"name": "f", "arguments": {}}<|im_end|>'


def test_an_answer_that_the_template_does_not_write_is_an_error(tokenizer):
    lost = ALL.replace("m.content or ''", "m.content if m.role == 'user' else ''")
    with pytest.raises(
        UserError, match=r"row 0 .*does not write the answer 'No\.': it writes '<\|im_end\|>\\n'"
    ):
        encode({"messages": [ASK, said("assistant", "No.")]}, tokenizer, get_template(None, lost))


def test_arguments_are_text_where_the_template_joins_text(tokenizer, theirs):
    joined = ALL.replace("(c.function.arguments | tojson)", "c.function.arguments")
    strict = joined.replace(" ~ ' ' ~ c.function.arguments", " + ' ' + c.function.arguments")
    row = {"messages": [ASK, said("assistant", "", tool_calls=[call(1, '{"day":1}')])]}
    for source in (joined, strict):
        expected = theirs.apply_chat_template(row["messages"], chat_template=source, tokenize=False)
        assert encode(row, tokenizer, get_template(None, source))[0] == expected
        spelled = {"messages": [ASK, said("assistant", "", tool_calls=[call(1, {"day": 1})])]}
        assert '{"day": 1}' in encode(spelled, tokenizer, get_template(None, source))[0]


@pytest.mark.parametrize("arguments", ['{"day": 1}', {"day": 1}])
@pytest.mark.parametrize("content", [None, "I look.", "absent"])
def test_the_function_call_of_older_data_is_a_call_without_an_id(tokenizer, theirs, arguments, content):
    older = said("assistant", content, function_call={"name": "f", "arguments": arguments})
    call = {"type": "function", "function": {"name": "f", "arguments": {"day": 1}}}
    newer = said("assistant", content, tool_calls=[call])
    if content == "absent":
        del older["content"], newer["content"]
    rest = [said("assistant", "No.", function_call=None)]
    row = {"messages": [ASK, older, said("function", "dry", name="f"), *rest], "functions": [FORECAST]}
    expected = theirs.apply_chat_template(
        [ASK, newer, said("tool", "dry", name="f"), *rest], chat_template=ALL, tools=TOOLS, tokenize=False
    )
    tally = Tally()
    text, trained = encode(row, tokenizer, get_template(None, ALL), openai(tools="functions"), tally)
    assert text == expected and len(trained) == 2 and tally.notes == {}
    assert '<call >f {"day": 1}<|im_end|>' in trained[0]
    with pytest.raises(UserError, match=r"'messages'\[1\]\.tool_calls: not JSON"):
        encode(
            {"messages": [ASK, said("assistant", None, function_call="f")]}, tokenizer, get_template("qwen")
        )


@pytest.mark.parametrize("result", [{"t": 3}, [1, 2], [{"a": None}], 7, True, None, "dry", []])
def test_what_a_tool_gives_need_not_be_text(tokenizer, theirs, result):
    messages = [
        ASK,
        said("assistant", "", tool_calls=[call(1, {})]),
        said("tool", result),
        said("assistant", "No."),
    ]
    plain = [{}] if result == [{"a": None}] else result
    as_text = result if isinstance(result, str) else "" if result in (None, []) else json.dumps(plain)
    as_json = ALL.replace(
        "m.content or ''",
        "(m.content | tojson if m.content is mapping else m.content) if m.role == 'tool' else m.content",
    )
    for source, of_tool in ((ALL, as_text), (as_json, result if isinstance(result, dict) else as_text)):
        expected = theirs.apply_chat_template(
            [*messages[:2], said("tool", of_tool), messages[3]], chat_template=source, tokenize=False
        )
        text, trained = encode({"messages": messages}, tokenizer, get_template(None, source))
        assert text == expected and trained[-1].startswith("No.")
    assert (
        f"<tool_response>\n{as_text}\n</tool_response>"
        in encode({"messages": messages}, tokenizer, get_template("qwen"))[0]
    )
    for source in (None, as_json):  # also where the row is cut
        template = get_template(None, source) if source else get_template("qwen")
        assert encode({"messages": messages}, tokenizer, template, cutoff=90)[1]


def test_calls_in_other_spellings():
    bare = {"name": "f", "arguments": {}}
    for calls in (
        [bare],
        [{"function": bare}],
        json.dumps([{"type": "function", "function": bare}]),
        [{"function": {"name": "f"}}],
    ):
        turns = to_conversation({"messages": [ASK, said("assistant", "", tool_calls=calls)]}, openai()).turns
        assert (turns[1].role, turns[1].more["tool_calls"]) == (
            "function",
            [{"type": "function", "function": bare}],
        )
    alone = [{"id": "call00001", **bare}]  # its id is the call's, not the function's
    found = to_conversation({"messages": [ASK, said("assistant", "", tool_calls=alone)]}, openai()).turns
    assert found[1].more["tool_calls"] == [{"type": "function", "function": bare, "id": "call00001"}]
    for calls in ("f", {"a": 1}, ["f"], [{"function": "f"}], [{"id": "x"}]):
        with pytest.raises(UserError, match=r"'messages'\[1\]\.tool_calls: "):
            to_conversation({"messages": [ASK, said("assistant", "", tool_calls=calls)]}, openai())
    for empty in ([], None):
        message = said("assistant", "a", tool_calls=empty)
        assert to_conversation({"messages": [ASK, message]}, openai()).turns[1].role == "assistant"
    with pytest.raises(UserError, match=r"'messages'\[1\]\.content: expected text, found NoneType"):
        to_conversation({"messages": [ASK, said("assistant", None)]}, openai())


def test_an_answer_that_is_a_thought_alone_is_one(tokenizer):
    thoughts = [said("assistant", text, reasoning_content="Dry.") for text in ("", None)]
    info = openai(chosen="chosen", rejected="rejected")
    for thought in thoughts:
        row = {"messages": [ASK], "chosen": thought, "rejected": said("assistant", "Yes.")}
        _, chosen, rejected = to_pair(row, info)
        assert chosen.more["reasoning_content"] == "Dry." and rejected.content == "Yes."
    with pytest.raises(Dropped, match="empty chosen answer"):
        to_pair(row | {"chosen": said("assistant", "", reasoning_content="")}, info)


def test_calls_are_answers_in_every_kind_of_row():
    row = {"messages": [ASK, said("assistant", None, tool_calls=[call(1, {})])], "ok": True}
    assert to_rated(row, openai(kto_tag="ok"))[1].more["tool_calls"] == [call(1, {})]
    # the tail that nobody answers may be several results
    tail = [ASK, said("assistant", "", tool_calls=[call(1, {})]), said("tool", "a"), said("tool", "b")]
    found = to_conversation({"messages": tail}, openai())
    assert [turn.role for turn in found.turns] == ["user", "function"] and found.notes == ("odd tail cut",)
    with pytest.raises(Dropped, match="alternate"):
        to_conversation({"messages": [ASK, said("tool", "a"), said("assistant", "b")]}, openai())


MARKED = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}"
    "{% generation %}{{- TEXT ~ '<|im_end|>' }}{% endgeneration %}{%- else %}{{- m.content ~ '<|im_end|>' }}"
    "{%- endif %}{{- '\n' }}{%- endfor %}"
)


@pytest.mark.parametrize("text", ["m.content[:2]", "m.content | upper", "''", "m.content[0].text"])
def test_an_answer_that_is_not_within_the_marks_is_an_error(tokenizer, text):
    parts = [{"type": "text", "text": "Yes, "}, {"type": "text", "text": "it will."}]
    answer = parts if "[0]" in text else "Yes, it will."
    template = get_template(None, MARKED.replace("TEXT", f"({text})"))
    with pytest.raises(UserError, match=r"row 0 .*chat_template marks .* as the answer 'Yes, it will\.'"):
        encode({"messages": [ASK, said("assistant", answer)]}, tokenizer, template)
    template = get_template(None, MARKED.replace("TEXT", "m.content"))
    assert encode({"messages": [ASK, said("assistant", "Yes.")]}, tokenizer, template)[1] == [
        "Yes.<|im_end|>"
    ]


@pytest.mark.parametrize(
    "source", ["m.content | dictsort", "m.content | truncate(-5)", "cycler()", "m.content.pop()", "1 / 0"]
)
def test_whatever_a_template_raises_is_one_line_with_the_row(tokenizer, source):
    template = get_template(None, f"{{%- for m in messages %}}{{{{- {source} }}}}{{%- endfor %}}")
    with pytest.raises(UserError, match="row 0 .*chat_template refuses a dialogue"):
        encode({"messages": [ASK, said("assistant", "No.")]}, tokenizer, template)


@pytest.mark.parametrize(
    "message, reason",
    [
        (said("assistant", [{"type": ["text"], "text": "a"}]), r"a part of the content is not text but "),
        (said("assistant", "a", reasoning_content=5), r"reasoning_content: expected text, found int 5"),
        (said("function_call", '{"name": 5, "arguments": {}}'), "a function call is not JSON of 'name'"),
    ],
)
def test_values_of_another_kind_are_one_line_with_the_row(tokenizer, message, reason):
    with pytest.raises(UserError, match=rf"row 0 .*'messages'\[1\].*{reason}"):
        encode({"messages": [ASK, message]}, tokenizer, get_template("qwen3"))


@pytest.mark.parametrize("template", ["default", "alpaca", "qwen3"])
def test_schemas_of_every_form_are_described(tokenizer, template):
    schemas = ([], {"properties": ["a"]}, {"properties": {"a": True, "b": "text"}, "required": True})
    schemas += ({"properties": {"a": {"enum": 5, "items": ["x"], "description": 5}}},)
    tools = [{"name": f"tool{i}", "parameters": schema} for i, schema in enumerate(schemas)]
    row = {"messages": [ASK, said("assistant", "No.")], "tools": tools}
    text = encode(row, tokenizer, get_template(template))[0]
    assert all(tool["name"] in text for tool in tools)


@pytest.mark.parametrize("none", [None, "", "  ", "null", "[]", []])
def test_no_tools_in_any_spelling(tokenizer, none):
    messages = [ASK, said("assistant", "No.")]
    template = get_template("qwen3")
    expected = encode({"messages": messages}, tokenizer, template)
    assert encode({"messages": messages, "tools": none}, tokenizer, template) == expected


@pytest.mark.parametrize("answer", ["No.", [said("assistant", "No.")]])
def test_prompt_and_completion_by_path_are_one_dialogue(tokenizer, tmp_path, answer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": [ASK], "completion": answer}))
    info = find_dataset(str(path), tmp_path)
    (_, _, row), *_ = read_rows(info)
    whole = {"messages": [ASK, said("assistant", "No.")]}
    template = get_template("chatml")
    assert encode(row, tokenizer, template, info) == encode(whole, tokenizer, template)
    with pytest.raises(Dropped, match="no answer"):
        to_conversation(row | {"completion": None}, info)
