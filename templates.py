"""Chat templates: a list of messages -> text spans that say which text the model has to produce.

A `ChatTemplate` is data: a slot of text per role, with {{content}}, {{bos}} and {{eos}} to fill in. A `JinjaTemplate`
is the checkpoint's own chat_template; its answers are found by rendering prefixes of the dialogue. Both keep
one promise: the text before a trained answer is exactly the text that generation is given.

The built-in templates give the same tokens as the chat_template that the model's vendor publishes, where there is
one; where LLaMA-Factory's template of the same name differs, a note at the entry says so. The end-of-turn token is
trained; a newline after it is not.

Run: python -c "from templates import *; print(TEMPLATES['chatml'].render([Message('user', 'Hi')], '', '</s>'))"
"""

import difflib
import functools
import json
import re
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Annotated, Literal

import jinja2
import jinja2.ext
import jinja2.sandbox

Role = Literal["system", "user", "assistant", "observation", "function"]
ROLES = ("system", "user", "assistant", "observation", "function")
PRODUCED = ("assistant", "function")  # roles whose text the model writes


@dataclass(frozen=True)
class TemplateOptions:
    template: Annotated[str | None, "chat template by name; none = the one that comes with the checkpoint"] = None
    default_system: Annotated[str | None, "system text of dialogues that have none; '' = no system turn"] = None
    enable_thinking: Annotated[bool, "thinking models: whether the model is asked to think"] = True


@dataclass(frozen=True)
class Message:
    """One turn. function = the assistant's call of a tool (trained); observation = the tool's result (not trained)."""

    role: Role
    content: str

    def __post_init__(self):
        if self.role not in ROLES:
            raise ValueError(f"message role: found {self.role!r}, expected one of {', '.join(ROLES)}")


@dataclass(frozen=True)
class Span:
    """A piece of the rendered text. turn: index of the message; -1 = what the template puts before the first one."""

    text: str
    answer: bool
    turn: int
    role: str


@dataclass(frozen=True)
class ChatTemplate:
    """A template as data. In every slot {{content}} is the message, {{bos}} and {{eos}} the tokenizer's tokens."""

    name: str
    prefix: str = ""
    system: str = "{{content}}"
    user: str = "{{content}}"
    header: str = ""  # before an answer: what generation is given last
    answer: str = "{{content}}{{eos}}"  # trained
    turn_end: str = ""  # after an answer, not trained
    observation: str | None = None  # None: as user
    function: str = "Action: {{name}}\nAction Input: {{arguments}}"  # content of a function turn that is a JSON call
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
            text = _fill(self.system, tokens, content=system.strip() if self.trim else system)
            if self.system_in_first_user:
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
                # An earlier answer: the template shows it without its thought, and that is not what the model is to write.
                trained = False
        return [
            Span(header, False, turn, role),
            Span(_fill(self.answer, tokens, content=content), trained, turn, role),
            Span(_fill(self.turn_end, tokens), False, turn, role),
        ]

    def _check(self, messages: list[Message], eos: str | None) -> None:
        for turn, message in enumerate(messages):
            if message.role == "system" and turn > 0:
                raise ValueError(f"message {turn} is a system message; a system message can only be the first one")
        if eos is None and "{{eos}}" in self.answer:
            raise ValueError(
                f"template {self.name!r} ends an answer with the tokenizer's eos token, but the tokenizer has none; "
                "name eos_token in tokenizer_config.json, or choose a template with its own end token such as chatml"
            )

    def stop_words(self, eos: str | None) -> tuple[str, ...]:
        """Texts that end an answer in generation."""
        return tuple(dict.fromkeys([*self.stop, *([eos] if eos else [])]))

    def describe(self) -> str:
        text = f"template {self.name} (built in)"
        if self.default_system:
            text += f", default system text {self.default_system!r}"
        if self.thinking:
            text += ", trains the answers after the last user turn (earlier ones are shown without their thoughts)"
        return text

    def to_jinja(self) -> str:
        """The same template as a chat_template for transformers and servers (dialogues of system, user, assistant, tool)."""
        return _to_jinja(self)


SLOT = re.compile(r"\{\{(content|bos|eos|name|arguments)\}\}")
NO_THOUGHT = "<think>\n\n</think>\n\n"


def _fill(slot: str, tokens: dict[str, str], **values: str) -> str:
    values = {**tokens, **values}
    return SLOT.sub(lambda match: values[match.group(1)], slot)


def split_thought(content: str) -> tuple[str, str]:
    """("reasoning", "answer") of "<think>\\nreasoning\\n</think>\\n\\nanswer"; no block -> ("", content). As in Qwen3's jinja."""
    if "</think>" not in content:
        return "", content
    head, answer = content.split("</think>")[0], content.split("</think>")[-1]
    thought = head.rstrip("\n").split("<think>")[-1].lstrip("\n")
    return thought.strip("\n"), answer.lstrip("\n")


def tool_calls(content: str) -> list[tuple[str, dict]] | None:
    """[(name, arguments)] when the text is a JSON call {"name": ..., "arguments": ...} or a list of calls, else None."""
    try:
        calls = json.loads(content)
    except json.JSONDecodeError:
        return None
    calls = calls if isinstance(calls, list) else [calls]
    result = []
    for call in calls:
        if not isinstance(call, dict) or "name" not in call or "arguments" not in call:
            return None
        arguments = call["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                pass  # a plain string is a legal argument
        result.append((call["name"], arguments))
    return result or None


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


def _generic_tools(system: str, tools: list[dict]) -> str:
    """LLaMA-Factory's "default" tool format."""
    lines, names = "", []
    for tool in tools:
        tool = tool.get("function", tool)
        parameters = tool.get("parameters", {})
        described = ""
        for name, parameter in parameters.get("properties", {}).items():
            required = ", required" if name in parameters.get("required", []) else ""
            enum = f", should be one of [{', '.join(map(str, parameter['enum']))}]" if parameter.get("enum") else ""
            items = f", where each item should be {parameter['items'].get('type', '')}" if parameter.get("items") else ""
            kind, text = parameter.get("type", ""), parameter.get("description", "")
            described += f"  - {name} ({kind}{required}): {text}{enum}{items}\n"
        lines += f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}\nTool Args:\n{described}\n"
        names.append(tool["name"])
    return (
        f"{system}You have access to the following tools:\n{lines}Use the following format if using a tool:\n"
        f"```\nAction: tool name (one of [{', '.join(names)}])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
    )


def _qwen_tools(system: str, tools: list[dict]) -> str:
    """The system text that Qwen2.5's and Qwen3's chat_template writes."""
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call>"
    )
    return f"{system}\n\n{text}" if system else text


TOOL_TEXTS = {"generic": _generic_tools, "qwen": _qwen_tools}

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
    # FastChat's vicuna_v1.1. LLaMA-Factory leaves out bos, the space after the system text and the answer's first space.
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
    # Qwen3 with its thinking switch. Answers before the last user turn are context only: their thoughts are removed.
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
    # Llama-3.1/3.3-Instruct: always a system turn, with the fixed date that the published chat_template falls back to.
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
    # Mistral-7B-Instruct v0.1 and v0.2, Mixtral (chat_template since September 2024; the system text goes into the
    # first user turn). The first published form had no space before [INST] and none before the answer.
    ChatTemplate(
        name="mistral",
        prefix="{{bos}}",
        system="{{content}}\n\n",
        user=" [INST] {{content}} [/INST]",
        answer=" {{content}}{{eos}}",
        system_in_first_user=True,
    ),
    # LLaMA-Factory has a default system text and no newline after eos; the published chat_template is as here.
    ChatTemplate(
        name="zephyr",
        system="<|system|>\n{{content}}{{eos}}\n",
        user="<|user|>\n{{content}}{{eos}}\n",
        header="<|assistant|>\n",
        turn_end="\n",
    ),
    # Yi-1.5-Chat: the system text stands bare. (Yi-Chat is plain chatml.)
    replace(_CHATML, name="yi", system="{{content}}"),
    # deepseek-llm-chat. LLaMA-Factory leaves the answer's first space to the tokenizer and puts system text unseparated.
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
) -> "ChatTemplate | JinjaTemplate":
    """The template of that name; without a name the checkpoint's own. default_system replaces the template's; ""
    means no system turn. ValueError when there is neither, or no such name."""
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


@dataclass(frozen=True)
class JinjaTemplate:
    """The chat_template of a checkpoint, run in a sandbox as transformers runs it."""

    source: str
    default_system: str | None = None
    name: str = "checkpoint"

    def render_text(
        self,
        messages: list[Message],
        bos: str | None,
        eos: str | None,
        *,
        generation_prompt: bool = False,
        enable_thinking: bool = True,
        tools: list[dict] | None = None,
    ) -> str:
        """The rendered text, as transformers' apply_chat_template(tokenize=False)."""
        settings = _Settings(bos, eos, enable_thinking, tools)
        text = self._text(self._dialogue(messages, enable_thinking), settings, generation_prompt)
        if generation_prompt:
            text += self._probe(settings).missing_header
        return text.replace(ANSWER_BEGINS, "").replace(ANSWER_ENDS, "")

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
        """Spans of the dialogue. An answer is trained where the prompt that generation would be given is what stands
        before it, and the answer stands there unchanged by the later turns. ValueError when that fails for the last one.
        """
        settings = _Settings(bos, eos, enable_thinking, tools)
        dialogue = self._dialogue(messages, enable_thinking)
        whole = self._text(dialogue, settings, generation_prompt)
        probe = self._probe(settings)
        if generation_prompt:
            whole += probe.missing_header
        if ANSWER_BEGINS in whole:
            return _marked_spans(whole, messages)
        inserted = len(dialogue) - len(messages)
        spans, cursor = [], 0
        if bos and whole.startswith(bos):
            spans.append(Span(bos, False, -1, "prefix"))
            cursor = len(bos)
        for turn, message in enumerate(messages):
            position = turn + inserted
            if message.role not in PRODUCED:
                end = self._end_of(dialogue[: position + 1], settings, whole)
                if end > cursor:
                    spans.append(Span(whole[cursor:end], False, turn, message.role))
                    cursor = end
                continue
            last = turn == len(messages) - 1
            found = self._answer(dialogue, position, settings, whole, probe)
            if found is None or found[0] < cursor:
                if last:
                    raise ValueError(self._explain(dialogue, position, settings))
                continue
            spans.append(Span(whole[cursor : found[0]], False, turn, message.role))
            spans.append(Span(whole[found[0] : found[1]], True, turn, message.role))
            cursor = found[1]
        owner = len(messages) if generation_prompt else len(messages) - 1
        role = "assistant" if generation_prompt or not messages else messages[-1].role
        spans.append(Span(whole[cursor:], False, owner, role))
        return [span for span in spans if span.text]

    def stop_words(self, eos: str | None) -> tuple[str, ...]:
        """The template's end-of-turn mark and the tokenizer's eos."""
        end = self._probe(_Settings(None, eos, True, None)).end_mark.strip()
        return tuple(dict.fromkeys(word for word in (end, eos) if word))

    def describe(self) -> str:
        text = f"template of the checkpoint ({len(self.source)} characters of jinja"
        text += ", answers marked by {% generation %})" if _has_marks(self.source) else ", answers found by prefixes)"
        if not self.trains_earlier_answers():
            text += "; it rewrites earlier answers once later turns exist, so only the last one is trained"
        return text

    def trains_earlier_answers(self) -> bool:
        """Whether the first answer of a dialogue with two answers is trained."""
        sample = [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")]
        return any(span.answer and span.turn == 1 for span in self.render(sample, "<s>", "</s>"))

    def to_jinja(self) -> str:
        return self.source

    def _text(self, dialogue: list[dict], settings: "_Settings", generation_prompt: bool) -> str:
        values = {"bos_token": settings.bos, "eos_token": settings.eos}
        try:
            return _compile(self.source).render(
                messages=dialogue,
                tools=settings.tools,
                documents=None,
                add_generation_prompt=generation_prompt,
                enable_thinking=settings.enable_thinking,
                **{key: value for key, value in values.items() if value is not None},
            )
        except (jinja2.TemplateError, TypeError) as error:  # TypeError: the template adds text to a missing value
            roles = ", ".join(message["role"] for message in dialogue) or "no message"
            raise ValueError(
                f"the checkpoint's chat_template refuses a dialogue of {roles}: {error}. "
                f"Change the dialogue, or choose a built-in template, for example `template: {_closest(self.source)}`."
            ) from error

    def _dialogue(self, messages: list[Message], enable_thinking: bool) -> list[dict]:
        """Messages as the template expects them: role tool for observations, tool_calls for calls it can format."""
        dialogue = []
        if self.default_system is not None and not (messages and messages[0].role == "system"):
            dialogue.append({"role": "system", "content": self.default_system})
        for message in messages:
            entry = {"role": message.role, "content": message.content}
            if message.role == "observation":
                entry["role"] = "tool"
            elif message.role == "function":
                entry["role"] = "assistant"
                calls = tool_calls(message.content) if "tool_calls" in self.source else None
                if calls is not None:
                    entry["content"] = ""
                    entry["tool_calls"] = [
                        {"type": "function", "function": {"name": name, "arguments": arguments}}
                        for name, arguments in calls
                    ]
            if message.role in PRODUCED and not enable_thinking and "enable_thinking" in self.source:
                entry["content"] = split_thought(entry["content"])[1]
            dialogue.append(entry)
        return dialogue

    def _end_of(self, dialogue: list[dict], settings: "_Settings", whole: str) -> int:
        """Where the text of these first messages ends in the whole text; 0 when it is no prefix of it."""
        try:
            text = self._text(dialogue, settings, False)
        except ValueError:  # many templates refuse a dialogue that is not complete, such as a system message alone
            return 0
        return len(text) if whole.startswith(text) else 0

    def _answer(self, dialogue, position: int, settings, whole: str, probe: "_Probe") -> tuple[int, int] | None:
        """Begin and end of the trained text of one answer in `whole`; None when the prefixes do not agree."""
        prompt = self._text(dialogue[:position], settings, True) + probe.missing_header
        upto = self._text(dialogue[: position + 1], settings, False)
        end = len(upto) - len(probe.after_end) if upto.endswith(probe.after_end) else len(upto)
        if len(prompt) > end or not upto.startswith(prompt) or not whole.startswith(upto[:end]):
            return None
        return len(prompt), end

    def _probe(self, settings: "_Settings") -> "_Probe":
        return _probe(self.source, settings.bos, settings.eos, settings.enable_thinking)

    def _explain(self, dialogue: list[dict], position: int, settings: "_Settings") -> str:
        prompt = self._text(dialogue[:position], settings, True)
        upto = self._text(dialogue[: position + 1], settings, False)
        same = len(_common_prefix([prompt, upto]))
        return (
            "the checkpoint's chat_template does not show where the answer begins: the prompt for generation continues "
            f"with {prompt[same : same + 40]!r} where the finished dialogue continues with {upto[same : same + 40]!r}. "
            f"Choose a built-in template, for example `template: {_closest(self.source)}`."
        )


ANSWER_BEGINS, ANSWER_ENDS = "\U000f1000", "\U000f1001"  # private use: {% generation %} and {% endgeneration %}


@dataclass(frozen=True)
class _Settings:
    bos: str | None
    eos: str | None
    enable_thinking: bool
    tools: list[dict] | None


@dataclass(frozen=True)
class _Probe:
    """What a template does around an answer, found with a sample dialogue."""

    missing_header: str  # header of an answer that add_generation_prompt fails to give
    end_mark: str  # between the content and the end of the turn, as <|im_end|>
    after_end: str  # white space after the end mark: not trained


@functools.lru_cache(maxsize=64)
def _probe(source: str, bos: str | None, eos: str | None, enable_thinking: bool) -> _Probe:
    template, settings = JinjaTemplate(source), _Settings(bos, eos, enable_thinking, None)
    question = {"role": "user", "content": "question"}
    texts = [
        template._text([question, {"role": "assistant", "content": content}], settings, False)
        for content in ("alpha", "omega")
    ]
    texts = [text.replace(ANSWER_BEGINS, "").replace(ANSWER_ENDS, "") for text in texts]
    plain = template._text([question], settings, False)
    prompt = template._text([question], settings, True)
    missing = ""
    header = _common_prefix(texts)[len(plain) :]
    if prompt == plain and header.strip() and texts[0].startswith(plain):
        missing = header.rstrip(" ")  # the space belongs to the answer's first word
    tail = texts[0].rpartition("alpha")[2]
    end_mark = tail.rstrip()
    return _Probe(missing, end_mark or tail, tail[len(end_mark) :] if end_mark else "")


def _common_prefix(texts: list[str]) -> str:
    count = 0
    for characters in zip(*texts):
        if len(set(characters)) > 1:
            break
        count += 1
    return texts[0][:count]


def _has_marks(source: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None


def _marked_spans(whole: str, messages: list[Message]) -> list[Span]:
    """Spans of a template that marks its answers by {% generation %}: one mark per answer, in order."""
    produced = [turn for turn, message in enumerate(messages) if message.role in PRODUCED]
    pieces = re.split(f"{ANSWER_BEGINS}(.*?){ANSWER_ENDS}", whole, flags=re.DOTALL)
    if len(pieces) // 2 != len(produced):
        raise ValueError(
            f"the checkpoint's chat_template marks {len(pieces) // 2} answers by {{% generation %}}, but the dialogue "
            f"has {len(produced)}; choose a built-in template with the option `template`"
        )
    spans, turn = [], 0
    for index, piece in enumerate(pieces):
        turn = produced[index // 2] if index // 2 < len(produced) else max(len(messages) - 1, 0)
        spans.append(Span(piece, index % 2 == 1, turn, messages[turn].role))
    return [span for span in spans if span.text]


def _closest(source: str) -> str:
    """The built-in template that looks most like a jinja text."""
    signs = (
        ("<think>", "qwen3"), ("<|im_start|>", "chatml"), ("Cutting Knowledge", "llama31"),
        ("<|start_header_id|>", "llama3"), ("<<SYS>>", "llama2"), ("[INST]", "mistral"), ("<|assistant|>", "zephyr"),
        ("ASSISTANT", "vicuna"), ("### Response", "alpaca"), ("Assistant:", "deepseek"),
    )  # fmt: skip
    return next((name for sign, name in signs if sign in source), "default")


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}: marks what the model writes, as in transformers."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return ANSWER_BEGINS + caller() + ANSWER_ENDS


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # jinja's own tojson escapes HTML characters, which would change the text
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    """The environment of transformers' apply_chat_template: a chat_template is code from a stranger, so it is sandboxed."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(
            f"the checkpoint's chat_template is not valid jinja ({error}); choose a built-in template with the "
            "option `template`"
        ) from error


def _to_jinja(template: ChatTemplate) -> str:
    raise NotImplementedError


@dataclass(frozen=True)
class EncodedDialogue:
    """A dialogue as tokens. All four lists have one entry per token."""

    ids: list[int]
    answer: list[bool]  # the model has to produce this token
    turn: list[int]  # index of the message, -1 = before the first
    role: list[str]


def encode_dialogue(tokenizer, spans: list[Span]) -> EncodedDialogue:
    """Tokens of rendered spans. Neighbouring spans with the same `answer` are joined first, so that the tokens are
    those of the whole text; a token belongs to the span in which it begins."""
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
        for start in part_starts:
            while owner + 1 < len(spans) and starts[owner + 1] <= start:
                owner += 1
            turn.append(spans[owner].turn)
            role.append(spans[owner].role)
    return EncodedDialogue(ids, answer, turn, role)


def first_difference(tokenizer, left: list[int], right: list[int]) -> str | None:
    """Where two token lists part, in words; None when they are equal."""
    if left == right:
        return None
    index = next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), min(len(left), len(right)))
    named = [repr(tokenizer.piece(ids[index])) if index < len(ids) else "the end" for ids in (left, right)]
    before = "".join(tokenizer.piece(i) for i in left[max(0, index - 8) : index])
    return f"token {index}: {named[0]} against {named[1]}, after {before!r}"
