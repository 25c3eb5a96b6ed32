"""The chat in a terminal: reading lines and commands, streaming answers, Ctrl-C."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TextIO

from llava.engine import Completion, RequestHandle
from llava.engine.chat import ChatSession, parse_setting
from llava.errors import LlavaError

HELP = """\
/image PATH|URL       attach a picture to the next message (repeatable)
/system TEXT          replace the system message
/set NAME=VALUE       temperature, top_p, max_new_tokens, num_beams or seed
/clear, /reset        forget the conversation and its pictures
/save FILE            write the conversation as JSON
/help                 this list
/exit                 leave (also an empty line, or the end of input)
Ctrl-C stops the running answer; pressed again, it leaves."""


def role_name(role: str) -> str:
    """A role as shown to people: `<|im_start|>user` is `user`; a template without roles has `user` too."""
    return re.sub(r"<\|im_start\|>|\W+", "", role) or "user"


def say(text: str, out: TextIO | None = None) -> None:
    """Show text at once; where output is piped too."""
    out = out or sys.stdout
    out.write(text)
    out.flush()


@contextmanager
def interrupt_cancels(handle: RequestHandle) -> Iterator[None]:
    """Let Ctrl-C cancel a running answer between two steps; a second one raises `KeyboardInterrupt`."""

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if handle.cancelled:
            raise KeyboardInterrupt
        handle.cancel()

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def answer(session: ChatSession, text: str, out: TextIO | None, head: str = "") -> Completion:
    """Ask, stream the answer to `out` behind `head` as it comes, and keep it in the session."""
    handle = session.ask(text)
    if head:
        say(head, out)
    with interrupt_cancels(handle):
        for piece in handle:
            if out is not None:
                say(piece, out)
        completion = handle.result()
    session.add_answer(completion)
    return completion


def converse(session: ChatSession, *, debug: bool = False) -> int:
    """Read messages from standard input until it ends; answers go to standard output."""
    if sys.stdin.isatty():
        # a program started in the background ignores Ctrl-C until told otherwise
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(ImportError):  # line editing, where the platform has it
            import readline  # noqa: F401
    say("Type a message, /help for the commands, an empty line to leave.\n")
    user, assistant = map(role_name, session.conversation.roles)
    while True:
        try:
            line = input(f"{user}: ").strip()
        except EOFError:
            say("\n")
            line = ""
        if not line or line == "/exit":
            say("Goodbye.\n")
            return 0
        try:
            if line.startswith("/"):
                say(command(session, line) + "\n")
                continue
            completion = answer(session, line, sys.stdout, f"{assistant}: ")
            say(" [stopped]\n" if completion.finish_reason == "cancelled" else "\n")
            if debug:
                say(str({"prompt": session.prompt, "outputs": completion.text}) + "\n")
        except LlavaError as error:
            hint = " (/clear starts afresh)" if "context" in str(error) else ""
            say(f"error: {error}{hint}\n")


def command(session: ChatSession, line: str) -> str:
    """Carry out a `/command` and return what to show; raises `LlavaError` when it cannot be."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    match name:
        case "image" if rest:
            session.attach(rest)
            return f"{rest} goes with your next message."
        case "system" if rest:
            session.set_system(rest)
            return "The system message is replaced."
        case "set" if rest:
            session.params = parse_setting(session.params, rest)
            return f"{rest} from now on."
        case "save" if rest:
            session.save(Path(rest).expanduser())
            return f"Saved to {rest}."
        case "clear" | "reset":
            session.clear()
            return "The conversation is forgotten."
        case "help":
            return HELP
    return f"{line!r} is not a command or lacks its argument.\n{HELP}"
