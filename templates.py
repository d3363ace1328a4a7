"""Chat templates: a list of messages -> text spans that say which text the model has to produce.

A `ChatTemplate` is data: a slot of text per role, with {{content}}, {{bos}} and {{eos}} to fill in. A
`JinjaTemplate` is the checkpoint's own chat_template; its answers are found by rendering prefixes of the
dialogue. Both keep one promise: the text before a trained answer is exactly the text that generation is
given.

The built-in templates give the same tokens as the chat_template that the model's vendor publishes, where
there is one; where LLaMA-Factory's template of the same name differs, a note at the entry says so. The
end-of-turn token is trained; a newline after it is not.

Run: python -c "from templates import *; print(TEMPLATES['chatml'].render([Message('user', 'Hi')], '',
'</s>'))"
"""

import difflib
import json
import re
from bisect import bisect_left
from dataclasses import dataclass, replace

from options.option import COMMON, option
from text.jinja_template import PRODUCED, JinjaTemplate, Message, Span, split_thought, tool_calls
from text.tools import TOOL_TEXTS, qwen_tools


@dataclass(frozen=True)
class TemplateOptions:
    template: str | None = option(
        None,
        "chat template by name; none: the checkpoint's own",
        COMMON,
        also="template_type prompt_template",
    )
    default_system: str | None = option(
        None,
        "system text of dialogues without one; '' = no system turn",
        also="system system_message system_prompt",
    )
    enable_thinking: bool = option(True, "thinking models: whether the model is asked to think")


@dataclass(frozen=True)
class ChatTemplate:
    """A template as data. In a slot {{content}} is the message, {{bos}} and {{eos}} are the tokenizer's
    tokens."""

    name: str
    prefix: str = ""
    system: str = "{{content}}"
    user: str = "{{content}}"
    header: str = ""  # before an answer: what generation is given last
    answer: str = "{{content}}{{eos}}"  # trained
    turn_end: str = ""  # after an answer, not trained
    observation: str | None = None  # None: as user
    # what becomes of a function turn that is a JSON call; any other text stands as it is
    function: str = "Action: {{name}}\nAction Input: {{arguments}}"
    tools: str = "generic"  # how tool definitions are written, a key of TOOL_TEXTS
    default_system: str | None = None
    system_in_first_user: bool = False
    trim: bool = False  # strip white space around every content
    thinking: bool = False  # <think> blocks as Qwen3
    stop: tuple[str, ...] = ()

    def render(
        self,
        messages: list[Message],
        bos: str | None,
        eos: str | None,
        *,
        generation_prompt: bool = False,
        enable_thinking: bool = True,
        tools: list[dict] | None = None,
    ) -> list[Span]:
        """Spans of the dialogue; with generation_prompt, the text up to where the next answer begins.

        tools: definitions as JSON-like dicts; their description is appended to the system text.
        """
        self._check(messages, eos)
        tokens = {"bos": bos or "", "eos": eos or ""}
        spans = [Span(_fill(self.prefix, tokens), False, -1, "prefix")]
        system, system_turn, first = self.default_system, -1, 0
        if messages and messages[0].role == "system":
            system, system_turn, first = messages[0].content, 0, 1
        if tools:
            system = TOOL_TEXTS[self.tools](system or "", tools)
        before_user = ""
        if system is not None:
            trim = self.trim and not self.system_in_first_user  # there the user turn is trimmed with it
            text = _fill(self.system, tokens, content=system.strip() if trim else system)
            if self.system_in_first_user:
                if len(messages) == first or messages[first].role != "user":
                    raise ValueError(
                        f"template {self.name!r} writes the system text into the first user turn, so a "
                        "system message "
                        "needs a user message after it"
                    )
                before_user = text
            else:
                spans.append(Span(text, False, system_turn, "system"))
        last_query = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
        for turn in range(first, len(messages)):
            role, content = messages[turn].role, messages[turn].content
            if role in PRODUCED:
                thinks = turn > last_query and self.thinking
                spans += self._answer(messages, turn, tokens, thinks, enable_thinking)
                continue
            content = before_user + content
            before_user = ""
            slot = self.user if role == "user" or self.observation is None else self.observation
            content = content.strip() if self.trim else content
            spans.append(Span(_fill(slot, tokens, content=content), False, turn, role))
        if generation_prompt:
            text = _fill(self.header, tokens)
            if self.thinking and not enable_thinking:
                text += NO_THOUGHT
            spans.append(Span(text, False, len(messages), "assistant"))
        return [span for span in spans if span.text]

    def _answer(self, messages, turn: int, tokens: dict, thinks: bool, enable_thinking: bool) -> list[Span]:
        role, content = messages[turn].role, messages[turn].content
        header, trained = _fill(self.header, tokens), True
        if role == "function":
            content = _function_text(content, self.function)
        if self.trim:
            content = content.strip()
        if self.thinking:
            thought, content = split_thought(content)
            if thinks and not enable_thinking and turn == len(messages) - 1:
                header += NO_THOUGHT
            elif thinks and enable_thinking and (thought or turn == len(messages) - 1):
                content = f"<think>\n{thought}\n</think>\n\n{content}"
            else:
                # An earlier answer is shown without its thought, and that is not what the model is to write.
                trained = False
        return [
            Span(header, False, turn, role),
            Span(_fill(self.answer, tokens, content=content), trained, turn, role),
            Span(_fill(self.turn_end, tokens), False, turn, role),
        ]

    def _check(self, messages: list[Message], eos: str | None) -> None:
        for turn, message in enumerate(messages):
            if message.role == "system" and turn > 0:
                raise ValueError(
                    f"message {turn} is a system message; a system message can only be the first one"
                )
        if eos is None and "{{eos}}" in self.answer:
            raise ValueError(
                f"template {self.name!r} ends an answer with the tokenizer's eos token, but the tokenizer "
                "has none;"
                " name eos_token in tokenizer_config.json, or choose a template with its own end token like "
                "chatml"
            )

    def stop_words(self, eos: str | None) -> tuple[str, ...]:
        """Texts that end an answer in generation."""
        return tuple(dict.fromkeys([*self.stop, *([eos] if eos else [])]))

    def content(self, text: str) -> str:
        """A generated text as the content of an assistant message: without the space that some templates
        begin with."""
        return text.removeprefix(self.answer.partition("{{content}}")[0])

    def describe(self) -> str:
        text = f"template {self.name} (built in)"
        if self.default_system:
            text += f", default system text {self.default_system!r}"
        if self.thinking:
            text += ", trains what follows the last user turn (earlier answers are shown without thoughts)"
        return text

    def to_jinja(self) -> str:
        """The same template as a chat_template for transformers and servers."""
        return _to_jinja(self)


SLOT = re.compile(r"\{\{(content|bos|eos|name|arguments)\}\}")
NO_THOUGHT = "<think>\n\n</think>\n\n"


def _fill(slot: str, tokens: dict[str, str], **values: str) -> str:
    values = {**tokens, **values}
    return SLOT.sub(lambda match: values[match.group(1)], slot)


def _function_text(content: str, slot: str) -> str:
    """A JSON call in the template's own form; any other text stands as it is."""
    calls = tool_calls(content)
    if calls is None:
        return content
    filled = [
        _fill(slot, {}, name=name, arguments=json.dumps(arguments, ensure_ascii=False), content=content)
        for name, arguments in calls
    ]
    return "\n".join(filled)


_CHATML = ChatTemplate(
    name="chatml",
    system="<|im_start|>system\n{{content}}<|im_end|>\n",
    user="<|im_start|>user\n{{content}}<|im_end|>\n",
    header="<|im_start|>assistant\n",
    answer="{{content}}<|im_end|>",
    turn_end="\n",  # LLaMA-Factory trains this newline too
    observation="<|im_start|>tool\n{{content}}<|im_end|>\n",
    stop=("<|im_end|>", "<|im_start|>"),
)
_QWEN = replace(
    _CHATML,
    name="qwen",  # Qwen2.5-Instruct
    observation="<|im_start|>user\n<tool_response>\n{{content}}\n</tool_response><|im_end|>\n",
    function='<tool_call>\n{"name": "{{name}}", "arguments": {{arguments}}}\n</tool_call>',
    tools="qwen",
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)
_LLAMA3 = ChatTemplate(
    name="llama3",  # Meta-Llama-3-Instruct
    prefix="{{bos}}",
    system="<|start_header_id|>system<|end_header_id|>\n\n{{content}}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{{content}}<|eot_id|>",
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer="{{content}}<|eot_id|>",
    observation="<|start_header_id|>tool<|end_header_id|>\n\n{{content}}<|eot_id|>",
    trim=True,  # the published template trims; LLaMA-Factory does not
    stop=("<|eot_id|>", "<|end_of_text|>"),
)
_TEMPLATES = (
    ChatTemplate(
        name="default",
        system="{{content}}\n",
        user="Human: {{content}}\n",
        header="Assistant:",  # LLaMA-Factory: "Assistant: "; a prompt must not end in a space (see answer)
        answer=" {{content}}{{eos}}",
        turn_end="\n",
    ),
    # The text alone; nothing marks the end of an answer, as in LLaMA-Factory.
    ChatTemplate(name="empty", answer="{{content}}"),
    # LLaMA-Factory 0.6.0: bare texts, the answer ends with eos.
    ChatTemplate(name="vanilla"),
    # Prompts of worked examples. Answers end with the empty line that separates the examples.
    ChatTemplate(name="fewshot", answer="{{content}}\n\n", stop=("\n\n",)),
    ChatTemplate(
        name="alpaca",
        system="{{content}}\n\n",
        user="### Instruction:\n{{content}}\n\n",
        header="### Response:\n",
        turn_end="\n\n",
        default_system=(
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request."
        ),
        stop=("### Instruction:",),
    ),
    # FastChat's vicuna_v1.1. LLaMA-Factory leaves out bos and the spaces after the system text and before the
    # answer.
    ChatTemplate(
        name="vicuna",
        prefix="{{bos}}",
        system="{{content}} ",
        user="USER: {{content}} ",
        header="ASSISTANT:",
        answer=" {{content}}{{eos}}",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
    _CHATML,
    _QWEN,
    # Qwen3 with its thinking switch. Answers before the last user turn are context: their thoughts are
    # removed.
    replace(_QWEN, name="qwen3", default_system=None, thinking=True),
    # Qwen3 without any thinking block (Qwen3-*-Instruct-2507): every answer is trained.
    replace(_QWEN, name="qwen3_nothink", default_system=None),
    replace(
        _CHATML,
        name="smollm2",
        default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face",
    ),
    # Llama-2-chat. LLaMA-Factory adds Meta's long default system text; the published chat_template has none.
    ChatTemplate(
        name="llama2",
        system="<<SYS>>\n{{content}}\n<</SYS>>\n\n",
        user="{{bos}}[INST] {{content}} [/INST]",
        answer=" {{content}} {{eos}}",
        system_in_first_user=True,
        trim=True,
    ),
    _LLAMA3,
    # Llama-3.1/3.3-Instruct: always a system turn, with the date that the published chat_template falls back
    # to.
    replace(
        _LLAMA3,
        name="llama31",
        system=(
            "<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
            "Today Date: 26 Jul 2024\n\n{{content}}<|eot_id|>"
        ),
        observation="<|start_header_id|>ipython<|end_header_id|>\n\n{{content}}<|eot_id|>",
        default_system="",
        stop=("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    ),
    # Mistral-7B-Instruct v0.1 and v0.2, Mixtral, as published since September 2024. The first published form
    # had no space before [INST] and none before the answer, and refused system texts.
    ChatTemplate(
        name="mistral",
        prefix="{{bos}}",
        system="{{content}}\n\n",
        user=" [INST] {{content}} [/INST]",
        answer=" {{content}}{{eos}}",
        system_in_first_user=True,
    ),
    # LLaMA-Factory has a default system text and no newline after eos, other than the published form.
    ChatTemplate(
        name="zephyr",
        system="<|system|>\n{{content}}{{eos}}\n",
        user="<|user|>\n{{content}}{{eos}}\n",
        header="<|assistant|>\n",
        turn_end="\n",
    ),
    # Yi-1.5-Chat: the system text stands bare. (Yi-Chat is plain chatml.)
    replace(_CHATML, name="yi", system="{{content}}"),
    # deepseek-llm-chat. LLaMA-Factory has no space before the answer and no empty line after the system text.
    ChatTemplate(
        name="deepseek",
        prefix="{{bos}}",
        system="{{content}}\n\n",
        user="User: {{content}}\n\n",
        header="Assistant:",
        answer=" {{content}}{{eos}}",
    ),
)
TEMPLATES: dict[str, ChatTemplate] = {template.name: template for template in _TEMPLATES}


def get_template(
    name: str | None, chat_template: str | None = None, default_system: str | None = None
) -> ChatTemplate | JinjaTemplate:
    """The template of that name; without a name the checkpoint's own. default_system replaces the template's;
    "" means no system turn. ValueError when there is neither, or no such name."""
    if name is None:
        if chat_template is None:
            raise ValueError(
                "template: the checkpoint has no chat_template, so the option has to name one; "
                f"choices: {', '.join(TEMPLATES)}"
            )
        return JinjaTemplate(chat_template, default_system or None)
    if name not in TEMPLATES:
        close = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"template: there is no template {name!r}; {hint}choices: {', '.join(TEMPLATES)}")
    template = TEMPLATES[name]
    if default_system is not None:
        template = replace(template, default_system=default_system or None)
    return template


def _to_jinja(template: ChatTemplate) -> str:
    """The slots as jinja. Every tag strips the white space before it, so line breaks mean nothing."""
    default = "none" if template.default_system is None else _literal(template.default_system)
    trim = " | trim" if template.trim else ""
    trim_system = "" if template.system_in_first_user else trim
    lines = [
        "{%- if messages and messages[0]['role'] == 'system' %}",
        f"{{%- set system_message = messages[0]['content']{trim_system} %}}",
        "{%- set dialogue = messages[1:] %}",
        f"{{%- else %}}{{%- set system_message = {default} %}}{{%- set dialogue = messages %}}{{%- endif %}}",
        *_jinja_tools(template),
        f"{{{{- {_expression(template.prefix)} }}}}" if template.prefix else "",
        "{%- set state = namespace(before='', query=-1) %}",
        "{%- if system_message is not none %}",
        f"{{%- set state.before = {_expression(template.system, 'system_message')} %}}"
        if template.system_in_first_user
        else f"{{{{- {_expression(template.system, 'system_message')} }}}}",
        "{%- endif %}",
        "{%- for message in dialogue %}{%- if message['role'] == 'user' %}",
        "{%- set state.query = loop.index0 %}{%- endif %}{%- endfor %}",
        "{%- for message in dialogue %}",
        "{%- if message['role'] == 'assistant' %}",
        *_jinja_answer(template, trim),
        "{%- else %}",
        f"{{%- set content = (state.before + message['content']){trim} %}}{{%- set state.before = '' %}}",
        "{%- if message['role'] == 'user' %}",
        f"{{{{- {_expression(template.user)} }}}}",
        "{%- elif message['role'] in ['tool', 'observation', 'ipython'] %}",
        f"{{{{- {_expression(template.observation or template.user)} }}}}",
        "{%- else %}{{- raise_exception('no place for a message of ' + message['role']) }}{%- endif %}",
        "{%- endif %}{%- endfor %}",
        "{%- if add_generation_prompt %}",
        f"{{{{- {_expression(template.header)} }}}}",
    ]
    if template.thinking:
        lines.append("{%- if enable_thinking is defined and not enable_thinking %}")
        lines.append(f"{{{{- {_literal(NO_THOUGHT)} }}}}{{%- endif %}}")
    return "\n".join(line for line in [*lines, "{%- endif %}"] if line)


def _jinja_tools(template: ChatTemplate) -> list[str]:
    if template.tools != "qwen":
        return [
            "{%- if tools %}{{- raise_exception('this template has no form for tool definitions') }}{%- "
            "endif %}"
        ]
    before, after = qwen_tools("", ["here"]).split('\n"here"')
    return [
        "{%- if tools %}",
        "{%- set system_message = (system_message + '\\n\\n' if system_message else '') + "
        f"{_literal(before)} %}}",
        "{%- set defined = namespace(text='') %}",
        "{%- for tool in tools %}{%- set defined.text = defined.text + '\\n' + (tool | tojson) %}{%- endfor "
        "%}",
        f"{{%- set system_message = system_message + defined.text + {_literal(after)} %}}",
        "{%- endif %}",
    ]


def _jinja_answer(template: ChatTemplate, trim: str) -> list[str]:
    call = _expression(template.function, name="call['name']", arguments="(call['arguments'] | tojson)")
    lines = [
        f"{{%- set content = (message['content'] or ''){trim} %}}",
        "{%- if message['tool_calls'] %}",
        "{%- set calls = namespace(text='') %}",
        "{%- for entry in message['tool_calls'] %}",
        "{%- set call = entry['function'] if entry['function'] else entry %}",
        f"{{%- set calls.text = calls.text + ('' if loop.first else '\\n') + {call} %}}",
        "{%- endfor %}",
        "{%- set content = (content + '\\n' if content else '') + calls.text %}",
        "{%- endif %}",
    ]
    if template.thinking:
        lines += [
            "{%- set thought = '' %}{%- if '</think>' in content %}",
            "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}",
            "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}",
            "{%- if loop.index0 > state.query and (loop.last or thought) %}",
            "{%- set content = '<think>\\n' + thought + '\\n</think>\\n\\n' + content %}{%- endif %}",
        ]
    text = " + ".join(
        _expression(slot) for slot in (template.header, template.answer, template.turn_end) if slot
    )
    return [*lines, f"{{{{- {text} }}}}"]


def _expression(slot: str, content: str = "content", **names: str) -> str:
    """A slot as a jinja expression: literals and variables joined by +."""
    names = {"content": content, "bos": "(bos_token or '')", "eos": "(eos_token or '')", **names}
    pieces = SLOT.split(slot)
    terms = [names[piece] if i % 2 else _literal(piece) for i, piece in enumerate(pieces) if i % 2 or piece]
    return " + ".join(terms) or "''"


def _literal(text: str) -> str:
    """A jinja string literal."""
    text = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{text}'"


@dataclass(frozen=True)
class EncodedDialogue:
    """A dialogue as tokens. All four lists have one entry per token."""

    ids: list[int]
    answer: list[bool]  # the model has to produce this token
    turn: list[int]  # index of the message, -1 = before the first
    role: list[str]


def encode_dialogue(tokenizer, spans: list[Span]) -> EncodedDialogue:
    """Tokens of rendered spans. Neighbouring spans with the same `answer` are joined first, so that the
    tokens are those of the whole text; a token belongs to the span in which it begins."""
    parts, flags, starts = [], [], []
    position = 0
    for span in spans:
        if flags and flags[-1] == span.answer:
            parts[-1] += span.text
        else:
            parts.append(span.text)
            flags.append(span.answer)
        starts.append(position)
        position += len(span.text)
    ids, answer, turn, role = [], [], [], []
    owner = 0
    for flag, (part_ids, part_starts) in zip(flags, tokenizer.encode_parts_with_starts(parts)):
        ids += part_ids
        answer += [flag] * len(part_ids)
        begin = 0
        while begin < len(part_ids):
            last = owner + 1 == len(spans)
            end = len(part_ids) if last else bisect_left(part_starts, starts[owner + 1], begin)
            turn += [spans[owner].turn] * (end - begin)
            role += [spans[owner].role] * (end - begin)
            begin = end
            owner += begin < len(part_ids)
    return EncodedDialogue(ids, answer, turn, role)


def compare(tokenizer, left, right, messages: list[Message], **options) -> str | None:
    """The first token at which two templates differ for a dialogue, in words; None when they give the same
    tokens.

    left, right: ChatTemplate or JinjaTemplate; options as for render, such as generation_prompt=True.
    """
    ids = [
        encode_dialogue(
            tokenizer, template.render(messages, tokenizer.bos_token, tokenizer.eos_token, **options)
        ).ids
        for template in (left, right)
    ]
    return first_difference(tokenizer, *ids)


def first_difference(tokenizer, left: list[int], right: list[int]) -> str | None:
    """Where two token lists part, in words; None when they are equal."""
    if left == right:
        return None
    # pairs stop at the shorter list; then one of them ends there
    index = next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))
    named = [repr(tokenizer.piece(ids[index])) if index < len(ids) else "the end" for ids in (left, right)]
    before = "".join(tokenizer.piece(i) for i in left[max(0, index - 8) : index])
    return f"token {index}: {named[0]} against {named[1]}, after {before!r}"
