"""The chat: piped and in a terminal, its commands, what it keeps and what it drops."""

import contextlib
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import moe_gpu
from moe_gpu.metrics import LayerMetrics, Metrics
from test_examples import (
    DEMO,
    SIZES,
    check_refusal,
    demo_main,
    environment,
    importable,  # noqa: F401 - a fixture
    save,
)

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def start(*options, **streams):
    command = [sys.executable, DEMO, "--chat", *options]
    return subprocess.Popen(command, env=environment(), text=True, **streams)


@pytest.fixture(scope="module")
def piped():
    """A conversation with the model that comes along, as a script has it."""
    said = r"""
Return the number of
def f(x):\
    y = x
/policy
/policy exact
/stats
/nope
/policy all
/reset now
//usr/bin
/reset
Return the number of
/help
/quit
never reached
"""
    options = "--max-new-tokens 16 --policy mass:0.1 --policy bonus:0.3 --slots 2".split()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    child = start(*options, **pipes)
    stdout, stderr = child.communicate(said.removeprefix("\n"), timeout=120)
    assert (child.returncode, stderr) == (0, ""), stderr
    return stdout


def replies(text):
    """What came after each line that was read, by that line; the last of equal ones."""
    parts = re.split(r"^> (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_it_says_what_the_model_is_first(piped):
    first, second = piped.splitlines()[:2]
    assert first.startswith("tiny_mixtral is a base model without a chat template")
    assert "8 of 32 experts resident, policy bonus:0.3, 1,024 tokens of context" in second


def test_an_answer_and_the_line_under_it(piped):
    answer, _, line = replies(piped)["    y = x"].rstrip("\n").rpartition("\n")
    assert answer.strip()
    assert re.match(r"16 tokens, [\d.]+/s, first after [\d.]+ s, hits [\d.]+%, loads/token ", line)
    assert replies(piped)["def f(x):\\"] == ""  # the line goes on


def test_commands(piped):
    said = replies(piped)
    assert said["/policy"] == "policy bonus:0.3\n" and said["/policy exact"] == "policy exact\n"
    assert re.match(r"[\d,]+ tokens, hits [\d.]+%, loads/token ", said["/stats"])
    assert said["/nope"].startswith("error: there is no command /nope; ")
    assert said["/policy all"].startswith(
        "error: /policy takes exact, bonus[:B], mass[:M] or quality[:Q], got"
    )
    assert said["/reset now"] == "error: /reset takes nothing, got 'now'\n"
    assert "16 tokens" in said["//usr/bin"]
    assert "/policy [P]" in said["/help"] and said["/quit"] == "" and "never" not in piped
    assert "\033" not in piped  # no bar, no colour


def read_until(pattern, descriptor, seen="", seconds=60):
    """Read what a child writes until the pattern is in it; returns all that was seen."""
    end = time.monotonic() + seconds
    while not re.search(pattern, seen):
        assert select.select([descriptor], [], [], max(0, end - time.monotonic()))[0], seen
        piece = os.read(descriptor, 4096)
        assert piece, seen
        seen += piece.decode(errors="replace")
    return seen


def test_ctrl_c_stops_the_answer_and_end_of_input_the_program():
    child = start(
        "--max-new-tokens", "1000", bufsize=0,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    child.stdin.write("a\n")
    seen = read_until(r"> a\n.*\w", child.stdout.fileno())
    child.send_signal(signal.SIGINT)
    seen = read_until(r"stopped, \d{1,3} tokens", child.stdout.fileno(), seen)
    child.stdin.write("/reset\n")
    read_until("conversation is forgotten", child.stdout.fileno())
    child.stdin.close()
    assert child.wait(timeout=30) == 0
    assert child.stderr.read() == ""


def press(key, pattern, screen):
    """Press until it helps: what comes before the prompt is ready can be lost, as for a person."""
    seen = ""
    for _ in range(30):
        os.write(screen, key)
        while not re.search(pattern, seen) and select.select([screen], [], [], 2)[0]:
            seen += os.read(screen, 4096).decode(errors="replace")
        if re.search(pattern, seen):
            return
    raise AssertionError(seen)


def test_in_a_terminal():
    screen, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 100))
    child = start(
        "--max-new-tokens", "900",
        stdin=side, stdout=side, stderr=side, start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # Ctrl-C is for this one
    )  # fmt: skip
    os.close(side)
    try:
        seen = read_until("\n> ", screen)
        os.write(screen, b"import os\n")
        seen = read_until(r"\d+ tokens, [\d.]+/s, hits", screen, seen)  # while it writes
        os.write(screen, b"\x03")
        seen = read_until(r"stopped, \d{1,3} tokens(.|\n)*> ", screen, seen)
        press(b"\x03", r"Ctrl-D or /quit leaves(.|\n)*> ", screen)
        with contextlib.suppress(OSError):  # how Linux says that the other side is closed
            press(b"\x04", "Traceback", screen)
        assert child.wait(timeout=30) == 0
    finally:
        child.kill()
        os.close(screen)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--json out.json", "--chat only talks, so it does not go with --json"),
        ("--verify", "does not go with --verify"),
        ("--eval-tokens 9", "does not go with --eval-tokens"),
        ("--prompt a --prompt b", "does not go with --prompt"),
        ("--profile out --quick", "does not go with --profile, --quick"),
    ],
)
def test_refuses_what_does_not_go_with_a_chat(options, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        demo_main(f"--chat {options}")
    check_refusal(capsys, sentence)


def test_text_is_written_under_the_policy_named_last():
    from demo.options import parse

    def chosen(options):
        args = parse("", "", options.split())
        return args.text_policy, args.max_new_tokens

    assert chosen("--chat --policy mass:0.1 --policy exact") == (("exact", 0.0), 256)
    assert chosen("--chat --max-new-tokens 3") == (("quality", 0.05), 3)
    assert chosen("--policy exact --policy all --policy bonus") == (("bonus", 0.15), 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=8))
    return save(model, tmp_path_factory.mktemp("random_mixtral"))


@pytest.fixture(scope="module")
def model(folder):
    return MixtralForCausalLM.from_pretrained(folder).eval()


@pytest.fixture
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_refuses_answers_as_long_as_the_context(folder, capsys):
    assert demo_main(f"--chat --model {folder} --max-new-tokens 512") == 2
    check_refusal(capsys, "--max-new-tokens 512: the conversation may have 512 tokens")


class Chatting:
    """A chat in this process, with the model as it is and metrics that stand still."""

    def __init__(self, model, tokenizer, monkeypatch, capsys):
        from demo.chat import Chat

        self.policies, self.capsys = [], capsys
        self.now = Metrics(tokens=4, pairs=9, hits=6, layers=(LayerMetrics(layer=1),))
        moe = SimpleNamespace(
            state=SimpleNamespace(slot_of_LE=torch.zeros(2, 8), num_layers=2, num_experts=8),
            set_policy=self.policies.append,
            metrics=lambda: self.now,
        )
        args = SimpleNamespace(
            model="some/model", max_new_tokens=20, seed=3, text_policy=("mass", 0.2)
        )
        self._chat = Chat(args, model, moe, tokenizer, 200)
        self.history, self._patch = self._chat._history, monkeypatch

    def say(self, lines):
        self._patch.setattr(sys, "stdin", io.StringIO(lines))
        self._chat.talk()
        return self.capsys.readouterr().out


@pytest.fixture
def chatting(importable, model, tokenizer, monkeypatch, capsys):  # noqa: F811
    return Chatting(model, tokenizer, monkeypatch, capsys)


def test_policies_reach_the_gates(chatting):
    chatting.say("/policy exact\n/policy bonus\n/policy mass:-1\n")
    want = [moe_gpu.MassBudget(0.2), moe_gpu.Exact(), moe_gpu.CacheBonus(0.15)]
    assert chatting.policies == want


def test_stats_go_by_layer(chatting):
    said = chatting.say("/stats\n")
    assert "4 tokens, hits 66.7%" in said and re.search(r"^ *1 +0\.0% +0", said, re.MULTILINE)


def test_stats_before_any_token(chatting):
    chatting.now = Metrics()
    assert chatting.say("/stats\n").endswith("> /stats\nno tokens yet\n")


def test_the_seed_makes_answers_repeatable(chatting, monkeypatch):
    seeds, seed = [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda n: seeds.append(n) or seed(n))
    said = chatting.say("a\n/reset\na\na\n")
    assert seeds == [3, 3, 4]  # not the same dice for every turn
    _, first, again, other = [part.split("\n20 tokens")[0] for part in said.split("> a\n")]
    assert first == again != other


def test_the_oldest_turns_make_room(chatting):
    said = chatting.say("first question\n" + "another question\n" * 9)
    assert "The oldest " in said and "200 tokens is the limit" in said
    assert 0 < len(chatting.history.turns) < 10
    assert chatting.history.turns[0].question == "another question"


def test_a_question_too_long_is_refused_and_the_rest_kept(chatting):
    said = chatting.say("a\n" + 181 * "b" + "\nc\n")
    assert "error: that has " in said and "the limit is 200\n" in said
    assert [turn.question for turn in chatting.history.turns] == ["a", "c"]


def test_an_error_costs_one_turn(chatting, monkeypatch):
    from demo import session

    generate, calls = session.generate, []

    def failing(*args, past_key_values, **more):
        calls.append(past_key_values.get_seq_length())
        if len(calls) == 2:
            generate(*args, past_key_values=past_key_values, **more)
            raise RuntimeError("layer 1, expert 5: the shard is truncated\nand more")
        return generate(*args, past_key_values=past_key_values, **more)

    monkeypatch.setattr(session, "generate", failing)
    said = chatting.say("a\nb\nc\n")
    assert "error: layer 1, expert 5: the shard is truncated; this turn is forgotten\n" in said
    assert [turn.question for turn in chatting.history.turns] == ["a", "c"]
    assert calls == [0, 20, 0]  # what the error left in the cache is not used


def test_ctrl_c_twice_ends_even_a_token(chatting, monkeypatch):
    from demo import interrupt, session

    def hanging(*_, **__):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, interrupt.noted():
        patch.setattr(session, "generate", hanging)
        assert "Stopped at once; this turn is forgotten." in chatting.say("a\n")
        interrupt.check()  # it was answered
    assert chatting.history.turns == []


def test_without_a_template_the_text_goes_on(tokenizer, model):
    from demo.history import History

    def ids(text):
        return tokenizer(text)["input_ids"]

    history, cache = History(tokenizer, model.config, 100), Filled(0)
    for question, before, answer in [
        ("one", "one", ids(" two")),
        ("three", "one two\nthree", ids(" four\n")),  # the line is at its end already
        ("five", "one two\nthree four\nfive", [*ids(" six"), tokenizer.eos_token_id]),
    ]:
        prompt, dropped = history.prompt(question, 10)
        assert (prompt, dropped) == (ids(before), 0)
        history.add(question, prompt, prompt + answer, cache)
    end = [*ids("one two\nthree four\nfive six"), tokenizer.eos_token_id]
    assert history.prompt("seven", 10) == (end + ids("seven"), 0)


class Filled:
    """A cache of so many ids."""

    def __init__(self, length):
        self.get_seq_length = lambda: length


def test_with_a_template_the_messages_are_formatted(tokenizer, model):
    from demo.history import History

    tokenizer.chat_template = TEMPLATE
    history = History(tokenizer, model.config, 100)
    prompt, _ = history.prompt("one", 10)
    assert tokenizer.decode(prompt) == "<user>one\n<assistant>"
    answer = [*tokenizer("two")["input_ids"], tokenizer.eos_token_id]
    history.add("one", prompt, prompt + answer, Filled(0))
    prompt, _ = history.prompt("three", 10)
    want = "<user>one\n<assistant>two\n<user>three\n<assistant>"
    assert tokenizer.decode(prompt) == want


def test_a_template_that_fails_is_one_sentence(tokenizer, model):
    from demo.errors import Refusal
    from demo.history import History

    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(Refusal, match="chat template failed: roles must alternate"):
        History(tokenizer, model.config, 100).prompt("one", 10)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_cached_keys_and_values_are_those_of_the_ids(template, model, tokenizer):
    """The second turn reads only what is new, and the model sees the same as without a cache."""
    from demo import session
    from demo.history import History

    tokenizer.chat_template = template
    history = History(tokenizer, model.config, 200)
    read = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for question in ("one", "two", "three"):
        prompt, _ = history.prompt(question, 10)
        cache = history.take_cache(prompt)
        known = cache.get_seq_length()
        read.clear()
        ids = session.generate(
            model, tokenizer, torch.tensor([prompt]), 10, 0, past_key_values=cache
        )
        assert read[0] == len(prompt) - known
        assert (known > 5) == (question != "one")
        history.add(question, prompt, ids[0].tolist(), cache)
    hook.remove()
    with torch.no_grad():
        cached = model(input_ids=ids[:, -1:], past_key_values=cache).logits[0, -1]
        torch.testing.assert_close(cached, model(input_ids=ids).logits[0, -1])


def test_a_cache_that_cannot_be_cut_is_made_anew(tokenizer, model):
    from demo.history import History

    class Uncut(Filled):
        def crop(self, count):
            raise RuntimeError("past states are not tracked")

    history = History(tokenizer, model.config, 100)
    prompt, _ = history.prompt("one", 10)
    cache = Uncut(len(prompt))
    history.add("one", prompt, [*prompt, 5], cache)
    assert history.take_cache([*prompt, 5, 6]) is cache  # nothing to cut
    history.add("two", prompt, [*prompt, 5], cache)
    assert history.take_cache(prompt).get_seq_length() == 0  # one id must be left to read


def test_the_terminal_does_not_obey_the_model(tokenizer):
    from demo.screen import Stream

    writing = Stream(tokenizer, "title", "prompt", 1)
    writing.on_finalized_text("a\033[2J\tb\r\n")
    assert writing.text().plain == "prompta␛[2J\tb␍\n"
