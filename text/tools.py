"""How tool definitions are described in the system text: system text, definitions -> system text.

A definition is OpenAI's JSON: {"type": "function", "function": {"name", "description", "parameters"}}.
Sources: LLaMA-Factory's "default" format; the chat_template of Qwen2.5 and Qwen3. Run:
python -c "from text.tools import *; print(qwen_tools('Be brief.', [{'name': 'f'}]))"
"""

import json


def wrapped(tool: dict) -> dict:
    """A definition in OpenAI's form, whether it was that or the inner part (LLaMA-Factory's own form)."""
    if "function" in tool:
        return tool if "type" in tool else {"type": "function"} | tool
    inner = {key: value for key, value in tool.items() if (key, value) != ("type", "function")}
    return {"type": "function", "function": inner}


def generic_tools(system: str, tools: list[dict]) -> str:
    """LLaMA-Factory's "default" tool format."""
    lines, names = "", []
    for tool in tools:
        tool = tool.get("function", tool)
        parameters = _object(tool.get("parameters"))
        needed = parameters.get("required")
        described = ""
        for name, parameter in _object(parameters.get("properties")).items():
            required = ", required" if isinstance(needed, list) and name in needed else ""
            parameter = _object(parameter)
            kind, text = parameter.get("type", ""), str(parameter.get("description", ""))
            if isinstance(parameter.get("enum"), list) and parameter["enum"]:
                text += f", should be one of [{', '.join(map(str, parameter['enum']))}]"
            if parameter.get("items"):
                text += f", where each item should be {_object(parameter['items']).get('type', '')}"
            described += f"  - {name} ({kind}{required}): {text}\n"
        lines += f"> Tool Name: {tool['name']}\nTool Description: {tool.get('description', '')}\n"
        lines += f"Tool Args:\n{described}\n"
        names.append(tool["name"])
    return (
        f"{system}You have access to the following tools:\n{lines}Use the following format if using a tool:\n"
        f"```\nAction: tool name (one of [{', '.join(names)}])\n"
        "Action Input: the input to the tool, in a JSON format representing the kwargs "
        '(e.g. ```{"input": "hello world", "num_beams": 5}```)\n```\n'
    )


def _object(value) -> dict:
    """A schema's object; one without names where something else stands there, such as true or a word."""
    return value if isinstance(value, dict) else {}


def qwen_tools(system: str, tools: list[dict]) -> str:
    """The system text that Qwen2.5's and Qwen3's chat_template writes."""
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML "
        f"tags:\n<tools>{lines}\n</tools>"
        "\n\nFor each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )
    return f"{system}\n\n{text}" if system else text


TOOL_TEXTS = {"generic": generic_tools, "qwen": qwen_tools}
