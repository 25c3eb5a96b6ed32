"""Terminal chat with commands, streamed answers and interruption by Ctrl-C."""

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
/image PATH|URL       attach an image to the next message (repeatable)
/system TEXT          replace the system message
/set NAME=VALUE       temperature, top_p, max_new_tokens, num_beams or seed
/clear, /reset        start a new conversation
/save FILE            save the conversation as JSON
/help                 show this list
/exit                 exit (also an empty line, or end of input)
Ctrl-C stops the running answer; a second one exits."""


def role_name(role: str) -> str:
    """Display name of a template's role: `<|im_start|>user` becomes `user`, as does an empty role."""
    return re.sub(r"<\|im_start\|>|\W+", "", role) or "user"


def echo(text: str, out: TextIO | None = None) -> None:
    """Write text and flush, so that it also appears immediately in a pipe."""
    out = out or sys.stdout
    out.write(text)
    out.flush()


@contextmanager
def interrupt_cancels(handle: RequestHandle) -> Iterator[None]:
    """Context in which Ctrl-C cancels the request, and a second one raises `KeyboardInterrupt`."""

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
    """Send a message, stream the answer to `out` after `head`, and add it to the session."""
    handle = session.ask(text)
    if head:
        echo(head, out)
    with interrupt_cancels(handle):
        for delta in handle:
            if out is not None:
                echo(delta, out)
        completion = handle.result()
    session.add_answer(completion)
    return completion


def chat(session: ChatSession, *, debug: bool = False) -> int:
    """Converse over standard input and output until the input ends; returns the exit status."""
    if sys.stdin.isatty():
        # a program started in the background ignores SIGINT
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with suppress(ImportError):  # line editing, where the platform has it
            import readline  # noqa: F401
    echo("Enter a message, /help for commands, or an empty line to exit.\n")
    user, assistant = map(role_name, session.conversation.roles)
    while True:
        try:
            line = input(f"{user}: ").strip()
        except EOFError:
            echo("\n")
            line = ""
        if not line or line == "/exit":
            echo("Goodbye.\n")
            return 0
        try:
            if line.startswith("/"):
                echo(command(session, line) + "\n")
                continue
            completion = answer(session, line, sys.stdout, f"{assistant}: ")
            echo(" [stopped]\n" if completion.finish_reason == "cancelled" else "\n")
            if debug:
                echo(str({"prompt": session.prompt, "outputs": completion.text}) + "\n")
        except LlavaError as error:
            hint = " (/clear starts a new conversation)" if "context" in str(error) else ""
            echo(f"error: {error}{hint}\n")


def command(session: ChatSession, line: str) -> str:
    """Run a `/command` and return its message; raises `LlavaError` when it fails."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    match name:
        case "image" if rest:
            session.attach(rest)
            return f"{rest} is attached to the next message."
        case "system" if rest:
            session.set_system(rest)
            return "System message replaced."
        case "set" if rest:
            session.params = parse_setting(session.params, rest)
            return f"Set {rest}."
        case "save" if rest:
            session.save(Path(rest).expanduser())
            return f"Saved to {rest}."
        case "clear" | "reset":
            session.clear()
            return "Conversation cleared."
        case "help":
            return HELP
    return f"{line!r} is not a command, or its argument is missing.\n{HELP}"
