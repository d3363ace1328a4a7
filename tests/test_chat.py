"""chat.py: one message and a conversation through the command line, the cache between turns, run folders,
Ctrl-C, and bad input in one clear line."""

import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_tokenizers import make_tokenizer

import chat
from checkpoints.huggingface import load_model
from checkpoints.peft import save_adapter
from generation.generate import GenerateOptions, generate
from lora import LoraOptions, add_lora
from options.errors import UserError, harmless
from templates import get_template
from text.render import Message, encode_dialogue
from text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GREEDY = GenerateOptions(do_sample=False, max_new_tokens=12)


def make_model(folder: Path, seed: int = 0, **changes) -> Path:
    """A tiny random chat model that transformers made, with a ChatML template of its own."""
    make_tokenizer(folder, "chatml", JINJA)
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": Tokenizer.from_folder(folder).vocab_size,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.3,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    config = transformers.LlamaConfig(**(sizes | changes))
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run_folder(folder, tmp_path_factory):
    """What train.py leaves: an adapter, the tokenizer, the resolved options."""
    run = tmp_path_factory.mktemp("run")
    save_adapted(folder, run, seed=1)
    make_tokenizer(run, "chatml", JINJA)
    (run / "run_config.yaml").write_text("template: vicuna\ndefault_system: Be brief.\ncutoff_len: 64\n")
    return run


def save_adapted(base: Path, target: Path, seed: int) -> None:
    model = load_model(base)
    generator = torch.Generator().manual_seed(seed)
    add_lora(model, LoraOptions(lora_rank=4), generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(0, 0.3, generator=generator)
    save_adapter(model, target, str(base))


def words(**keys) -> list[str]:
    return [f"{key}={value}" for key, value in ({"do_sample": False, "max_new_tokens": 12} | keys).items()]


def start(*argv: str, cwd=ROOT, **pipes) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | pipes
    command = [sys.executable, str(ROOT / "chat.py"), *argv]
    return subprocess.Popen(command, env=environment, cwd=cwd, text=True, **pipes)


def expected_answer(folder: Path, messages: list[Message], template, options=GREEDY) -> str:
    """By a plain model, without cache between turns, without the layout for decoding."""
    tokenizer = Tokenizer.from_folder(folder)
    spans = template.render(messages, tokenizer.bos_token, tokenizer.eos_token, generation_prompt=True)
    stop_ids = [*tokenizer.stop_ids, tokenizer.token_id("<|im_end|>")]
    prompt = encode_dialogue(tokenizer, spans).ids
    (completion,) = generate(load_model(folder), [prompt], options, stop_ids=stop_ids, tokenizer=tokenizer)
    return completion.text


# The command line


def test_one_message_from_the_command_line_equals_transformers(folder, tmp_path):
    process = start(*words(model_name_or_path=folder, prompt="Hello, who are you?"), cwd=tmp_path)
    out, remarks = process.communicate(timeout=120)
    assert process.returncode == 0, remarks
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "Hello, who are you?"}]
    inputs = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    stops = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    ids = theirs.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=stops)
    text = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text and out == text.replace("\r", "\n") + "\n"
    assert "tokens/s" in remarks and "template checkpoint" in remarks
    assert "\x1b" not in out + remarks  # no colours in a pipe
    assert list(tmp_path.iterdir()) == []


def test_a_conversation_remembers_clears_and_ends(folder):
    process = start(*words(model_name_or_path=folder))
    out, remarks = process.communicate(
        "Hello\nWhat is that?\n\nclear\nWhat is that?\nexit\nnever asked\n", timeout=120
    )
    assert process.returncode == 0 and "forgotten" in remarks
    template = get_template(None, JINJA)
    first = expected_answer(folder, [Message("user", "Hello")], template)
    history = [Message("user", "Hello"), Message("assistant", first), Message("user", "What is that?")]
    second = expected_answer(folder, history, template)
    fresh = expected_answer(folder, history[-1:], template)
    assert out == f"{first}\n{second}\n{fresh}\n".replace("\r", "\n")  # as the pipe is read
    assert second != fresh


def test_ctrl_c_stops_the_answer_and_not_the_conversation(folder):
    process = start(*words(model_name_or_path=folder, max_new_tokens=4000))
    process.stdin.write("Hello\n")
    process.stdin.flush()
    begun = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, remarks = process.communicate("exit\n", timeout=120)
    assert process.returncode == 0, remarks
    assert "(stopped)" in out and "Traceback" not in remarks
    assert len(begun + out) < 4000


@pytest.mark.parametrize("word", ["quit", "/exit", "bye", "Exit", "/quit", "exit()"])
def test_words_that_leave(folder, monkeypatch, word):
    said = iter([word])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    assert chat.talk(conversation(folder)) == 0


def test_pasted_lines_are_one_message(folder, monkeypatch):
    """In a terminal: what it marks as pasted is taken as a whole, and Enter sends it."""
    monkeypatch.setenv("TERM", "xterm")
    main, terminal = os.openpty()
    process = start(*words(model_name_or_path=folder), stdin=terminal, stdout=terminal)
    os.close(terminal)
    seen = b""

    def until(mark: bytes) -> None:
        nonlocal seen
        ready = select.poll()  # not select: this process may have more than 1,024 files open
        ready.register(main, select.POLLIN)
        while mark not in seen:
            assert ready.poll(60_000), seen
            seen += os.read(main, 1000)

    until(b"\x1b[?2004h")  # it asks for the marks
    os.write(main, b"\x1b[200~What is\nthat?\x1b[201~\n")
    until(b"Assistant: ")
    until(b"\n\x1b[?2004hUser: ")
    os.write(main, b"/exit\n")
    assert process.wait(60) == 0
    os.close(main)
    template = get_template(None, JINJA)
    answer = expected_answer(folder, [Message("user", "What is\nthat?")], template)
    shown = harmless(answer).encode().replace(b"\n", b"\r\n")
    assert b"Assistant: " + shown in seen


def test_a_conversation_that_is_too_long_says_so(folder):
    talk = conversation(folder)
    talk.model.config = replace(talk.model.config, max_positions=40)
    long = "The hammer sings upon an anvil. " * 9
    with pytest.raises(UserError, match=r"^the message has \d+ tokens, but the model takes 40 with"):
        list(talk.ask(long))
    assert talk.messages == []
    talk.messages = [Message("user", "Hello"), Message("assistant", "Hello")]
    with pytest.raises(UserError, match=r"^the conversation has \d+ tokens"):
        list(talk.ask(long))


def test_nothing_that_a_model_writes_steers_the_terminal():
    """C0 and C1 but tab and newline, DEL, and what turns the direction of writing."""
    steering = [*range(9), *range(11, 32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    shown = chat.Painter(True).paint("".join(map(chr, steering)) + "a\tb\n\u00e9")
    assert not {ord(letter) for letter in shown} & set(steering) and shown.endswith("a\tb\n\u00e9")
    assert len(shown) == len(steering) + 5


def test_the_end_of_the_input_ends_the_program(folder, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", raise_end)
    assert chat.talk(conversation(folder)) == 0


def raise_end(prompt):
    raise EOFError


# The cache between turns


def conversation(folder, template="chatml", options=GREEDY) -> chat.Conversation:
    tokenizer = Tokenizer.from_folder(folder)
    chosen = get_template(template, tokenizer.chat_template, None)
    return chat.Conversation(load_model(folder), tokenizer, chosen, options, True, torch.Generator())


def test_turns_reuse_the_cache_and_answer_as_without_it(folder):
    talk = conversation(folder)
    fed = []
    forward = talk.model.forward

    def count(tokens, *rest):
        fed.append(tokens.shape[0])
        return forward(tokens, *rest)

    talk.model.forward = count
    history = []
    for text in ("Hello, who are you?", "What is the capital of France?", "Why?"):
        fed.clear()
        answer = "".join(talk.ask(text))
        history.append(Message("user", text))
        assert answer == expected_answer(folder, history, talk.template)
        history.append(Message("assistant", answer))
        prompt_tokens = len(talk.cached_ids) - talk.new_tokens + 1
        if len(history) > 2:
            assert fed[0] < prompt_tokens - 10  # not the whole conversation again
    assert talk.messages == history


def test_an_answer_left_early_stays_in_the_history_and_the_cache_stays_right(folder):
    talk = conversation(folder)
    answer = talk.ask("Hello, who are you?")
    begun = next(answer) + next(answer)
    answer.close()
    history = [Message("user", "Hello, who are you?"), Message("assistant", begun)]
    assert talk.messages == history
    history.append(Message("user", "Go on"))
    assert "".join(talk.ask("Go on")) == expected_answer(folder, history, talk.template)


def test_a_conversation_that_gets_too_long_says_so_and_goes_on_after_clear(tmp_path):
    talk = conversation(make_model(tmp_path, max_position_embeddings=40))
    first = "".join(talk.ask("Hello"))
    messages = list(talk.messages)
    with pytest.raises(ValueError, match="the model takes 40"):
        list(talk.ask("What is the capital of France? " * 5))
    assert talk.messages == messages
    talk.clear()
    assert "".join(talk.ask("Hello")) == first


def test_words_that_end_a_turn_as_text_end_the_answer(folder):
    free = "".join(conversation(folder).ask("Hello"))
    middle = free[len(free) // 2 :][:3]
    talk = conversation(folder, options=replace(GREEDY, stop=(middle,)))
    assert "".join(talk.ask("Hello")) == free.partition(middle)[0]


# Run folders


def test_a_run_folder_alone_names_base_adapter_template_and_system(folder, run_folder, capsys):
    assert chat.main(words(model_name_or_path=run_folder, prompt="Hello")) == 0
    alone = capsys.readouterr()
    explicit = {"model_name_or_path": folder, "adapter_name_or_path": run_folder, "prompt": "Hello"}
    assert chat.main(words(**explicit, template="vicuna", default_system="Be brief.")) == 0
    assert capsys.readouterr().out == alone.out
    assert f"base model {folder}" in alone.err and "template vicuna" in alone.err
    assert chat.main(words(**explicit)) == 0
    assert capsys.readouterr().out == alone.out
    assert chat.main(words(**explicit, template="chatml")) == 0  # what the user gives beats the run
    assert capsys.readouterr().out != alone.out
    assert chat.main(words(model_name_or_path=folder, template="vicuna", prompt="Hello")) == 0
    assert capsys.readouterr().out != alone.out


def test_adapters_that_lay_under_the_trained_one_are_merged_too(folder, run_folder, tmp_path, capsys):
    save_adapted(folder, tmp_path, seed=2)
    (tmp_path / "run_config.yaml").write_text(
        f"template: chatml\ncreate_new_adapter: true\nadapter_name_or_path: [{run_folder}]\n"
    )
    assert chat.main(words(model_name_or_path=tmp_path, prompt="Hello")) == 0
    alone = capsys.readouterr()
    assert f"on top of {run_folder}" in alone.err
    both = f"{run_folder},{tmp_path}"
    keys = {"model_name_or_path": folder, "template": "chatml", "prompt": "Hello"}
    assert chat.main(words(**keys, adapter_name_or_path=both)) == 0
    assert capsys.readouterr().out == alone.out
    (tmp_path / "run_config.yaml").unlink()
    assert chat.main(words(**keys, adapter_name_or_path=tmp_path)) == 0
    assert capsys.readouterr().out != alone.out


def test_a_training_file_can_be_used_as_it_is(folder, tmp_path, capsys):
    file = tmp_path / "train.yaml"
    file.write_text(
        f"model_name_or_path: {folder}\ntemplate: chatml\nstage: sft\ndataset: x\nlearning_rate: 1e-4\n"
    )
    assert chat.main([str(file), *words(prompt="Hello")]) == 0
    assert capsys.readouterr().out.strip()


def test_the_seed_decides_the_draws(folder, capsys):
    def run(seed):
        keys = {"do_sample": True, "temperature": 3.0, "top_p": 1, "top_k": 0, "prompt": "Hello"}
        assert chat.main(words(model_name_or_path=folder, seed=seed, **keys)) == 0
        return capsys.readouterr().out

    assert run(1) == run(1) != run(2)


# Thoughts in a terminal


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_thoughts_are_dimmed_however_the_marks_are_cut(size):
    text = "<think>\nHm, 1 < 2.\n</think>\n\nYes <b>, <think>again</think>."
    painter = chat.Painter(colours=True)
    painted = "".join(painter.paint(text[i : i + size]) for i in range(0, len(text), size)) + painter.end()
    dim, plain = chat.DIM, chat.PLAIN
    expected = f"{dim}<think>\nHm, 1 < 2.\n</think>{plain}\n\nYes <b>, {dim}<think>again</think>{plain}."
    assert painted == expected
    quiet = chat.Painter(colours=False)
    assert "".join(quiet.paint(text[i : i + size]) for i in range(0, len(text), size)) + quiet.end() == text


def test_a_thought_that_begins_in_the_prompt_or_never_ends(folder):
    painter = chat.Painter(colours=True, begins_in_thought=True)
    assert painter.paint("Hm.</think>Yes") + painter.end() == f"{chat.DIM}Hm.</think>{chat.PLAIN}Yes"
    painter = chat.Painter(colours=True)
    assert painter.paint("<think>Hm</th") + painter.end() == f"{chat.DIM}<think>Hm</th{chat.PLAIN}"
    assert not conversation(folder).begins_in_thought
    assert (
        chat.Painter(colours=True).paint("a\x1b[2Jb") == "a\u241b[2Jb"
    )  # a text must not steer the terminal


# Bad input


def bad_cases(folder: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    other = make_model(tmp_path / "other", hidden_size=48)
    adapter = tmp_path / "adapter"
    save_adapted(other, adapter, seed=0)
    mixed = make_model(tmp_path / "mixed", vocab_size=300)
    plain = make_model(tmp_path / "plain")
    make_tokenizer(plain, "chatml")  # no chat template
    orphan = tmp_path / "orphan"
    save_adapted(folder, orphan, seed=0)
    text = (orphan / "adapter_config.json").read_text().replace(str(folder), str(tmp_path / "moved"))
    (orphan / "adapter_config.json").write_text(text)
    lying = tmp_path / "lying"
    save_adapted(folder, lying, seed=0)
    (lying / "run_config.yaml").write_text("template: [unclosed")
    return {
        "template": (words(model_name_or_path=folder, template="chatlm"), "did you mean 'chatml'"),
        "no template": (words(model_name_or_path=plain), "template: the checkpoint has no chat_template"),
        "no model": (words(), "model_name_or_path: missing"),
        "no folder": (words(model_name_or_path=tmp_path / "nowhere"), "nowhere"),
        "empty folder": (words(model_name_or_path=tmp_path), "config.json"),
        "adapter": (words(model_name_or_path=folder, adapter_name_or_path=adapter), "was trained on"),
        "no adapter": (
            words(model_name_or_path=folder, adapter_name_or_path=other),
            "holds no adapter_config.json",
        ),
        "tokenizer": (words(model_name_or_path=mixed), "but the model has vocab_size 300"),
        "moved base": (
            words(model_name_or_path=orphan),
            "give model_name_or_path=BASE adapter_name_or_path=",
        ),
        "broken run": (words(model_name_or_path=lying), "run_config.yaml line 1: not valid YAML"),
        "temperature": (words(model_name_or_path=folder, do_sample=True, temperature=0), "temperature: 0.0"),
        "unknown key": (words(model_name_or_path=folder, promt="x"), "prompt"),
        "device": (words(model_name_or_path=folder, device="cuda"), "torch sees no GPU"),
        "too long": (words(model_name_or_path=folder, prompt="Hello " * 5000), "the model takes 4096"),
    }


def test_bad_input_gives_one_clear_line_and_status_2(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, (argv, message) in bad_cases(folder, tmp_path).items():
        status = chat.main([*argv, *([] if any(a.startswith("prompt=") for a in argv) else ["prompt=Hi"])])
        streams = capsys.readouterr()
        assert (name, status) == (name, 2), streams
        last = streams.err.strip().splitlines()[-1]
        assert message in streams.err and streams.out.strip() == "", (name, streams)
        assert "Traceback" not in streams.err and "chat.py: " in streams.err, (name, last)


def test_an_error_of_the_program_keeps_its_traceback(folder, monkeypatch):
    """Such as this one of numpy's planted in the way of every answer: it is no mistake of the user's."""
    monkeypatch.setattr(Tokenizer, "from_folder", lambda *folders: np.stack([]))
    with pytest.raises(ValueError, match="need at least one array to stack"):
        chat.main(words(model_name_or_path=folder, prompt="Hello"))


def test_a_mistake_is_one_line_on_stderr_and_status_2(folder):
    process = start(*words(model_name_or_path=folder, prompt="Hello", template="chatlm"))
    out, remarks = process.communicate(timeout=120)
    assert process.returncode == 2 and out == ""
    (line,) = remarks.splitlines()
    assert line.startswith("chat.py: template:") and "did you mean 'chatml'" in line


def test_neither_stages_nor_a_training_are_imported(tmp_path):
    script = "import chat, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"stages", "training", "data", "pipeline", "conversion", "train"} & set(process.stdout.split())
