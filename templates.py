"""The chat templates by name, the lookup, and the option that chooses one; a template is data.

What a slot means stands at text/render.ChatTemplate. Without a name the checkpoint's own chat_template serves
(text/jinja_template.py). The built-in templates give the same tokens as the chat_template that the model's
vendor publishes, where there is one; where LLaMA-Factory's template of the same name differs, a note at the
entry says so. The end-of-turn token is trained; a newline after it is not.

To add one: copy an entry. Run: python -c "from templates import *; print(get_template('chatml'))"
"""

import difflib
import re
from dataclasses import dataclass, replace

from options.errors import UserError
from options.option import COMMON, option
from text.jinja_template import JinjaTemplate
from text.render import ChatTemplate


@dataclass(frozen=True)
class TemplateOptions:
    template: str | None = option(None, "chat template; or the checkpoint's", COMMON, also="prompt_template")
    default_system: str | None = option(
        None, "system text where none is; '' = no system turn", also="system system_message system_prompt"
    )
    enable_thinking: bool | None = option(
        None, "thinking models: whether the model is asked to think; none: as its template does"
    )


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
    results="\n</tool_response>\n<tool_response>\n",
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
    results=None,
    trim=True,  # the published template trims; LLaMA-Factory does not
    stop=("<|eot_id|>", "<|end_of_text|>"),
)
_DEEPSEEK3 = ChatTemplate(
    name="deepseek3", prefix="{{bos}}", user="<\uff5cUser\uff5c>{{content}}", header="<\uff5cAssistant\uff5c>"
)
_SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
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
    # FastChat's vicuna_v1.1. LLaMA-Factory leaves out bos and the spaces behind system text and "ASSISTANT:".
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
    # Qwen3 with its thinking switch. Answers before the last user turn are context, without their thoughts.
    replace(_QWEN, name="qwen3", default_system=None, thinking=True),
    # Qwen3 without any thinking block (Qwen3-*-Instruct-2507): every answer is trained.
    replace(_QWEN, name="qwen3_nothink", default_system=None),
    replace(_CHATML, name="smollm2", default_system=_SMOLLM),
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
    # Llama-3.1/3.3-Instruct: always a system turn, with the date that the published template falls back to.
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
    _DEEPSEEK3,
    # DeepSeek-R1 and its distills. The published templates drop the thought that is to be trained.
    replace(_DEEPSEEK3, name="deepseekr1", thinking=True),
)
TEMPLATES: dict[str, ChatTemplate] = {template.name: template for template in _TEMPLATES}


def marks_split_up(template: ChatTemplate | JinjaTemplate, tokenizer) -> list[str]:
    """Marks of a built-in template, such as <|im_end|>, that this tokenizer has not and splits into letters;
    none where it has the one that ends an answer."""

    def missing(text: str) -> list[str]:
        marks = dict.fromkeys(re.findall(r"<[^<>{}\s]+>", text))
        return [mark for mark in marks if tokenizer.token_id(mark) is None]

    if isinstance(template, JinjaTemplate) or not missing(template.answer):
        return []
    return missing(template.user + template.header + template.answer)


def get_template(
    name: str | None, chat_template: str | dict[str, str] | None = None, default_system: str | None = None
) -> ChatTemplate | JinjaTemplate:
    """The template of that name; without a name the checkpoint's own. default_system replaces the template's;
    "" means no system turn. UserError when there is neither, or no such name.

    chat_template: the checkpoint's, or several by name: "default", "tool_use" where a dialogue has tool
    definitions (for such alone, where there is no "default"), and others that `name` may choose."""
    named = chat_template if isinstance(chat_template, dict) else {"default": chat_template}
    tool_use = named.get("tool_use")
    if name is None and (own := named.get("default", tool_use)) is not None:
        how = {"tool_use": tool_use, "needs_tools": "default" not in named}
        return JinjaTemplate(own, default_system or None, **how)
    choices = ", ".join([*TEMPLATES, *(key for key in named if key not in TEMPLATES)])
    if name is None:
        why = "the checkpoint has no chat_template, so the option has to name one"
        why = why if chat_template is None else f"the checkpoint's are {', '.join(named)}: name one"
        raise UserError(f"template: {why}; choices: {choices}")
    if name not in TEMPLATES and name in named:
        return JinjaTemplate(named[name], default_system or None, name)
    if name not in TEMPLATES:
        close = difflib.get_close_matches(name, TEMPLATES, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"template: there is no template {name!r}; {hint}choices: {choices}")
    if default_system is None:
        return TEMPLATES[name]
    return replace(TEMPLATES[name], default_system=default_system or None)
