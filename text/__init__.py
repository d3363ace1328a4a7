"""Text <-> tokens, and a dialogue <-> text that says which part of it the model has to produce.

A dialogue is a list of Message (role, content). A template is an object with render(messages, bos, eos,
generation_prompt=, enable_thinking=, tools=) -> list of Span (text, answer, turn, role), stop_words(eos),
content(text) and to_jinja(). Spans become tokens by encode_dialogue: ids, answer, turn, role, one each per
token.

tokenizer.py       Tokenizer of a Hugging Face folder: encode, encode_parts, decode, special tokens, save
stream.py          the text of ids that arrive one by one
render.py          Message, Span, ChatTemplate (a template as data), encode_dialogue, the way back to jinja
jinja_template.py  JinjaTemplate: the checkpoint's own chat_template, sandboxed, with its answers found
tools.py           how tool definitions are described in the system text

The built-in templates stand in templates.py. To add a form of tool definitions: a function in tools.py, a
line in TOOL_TEXTS.
"""
