"""The web server's record of conversations, JSON Lines by day (spec/serve.md §8.7): one writer, a limited time."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import threading
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Final

from llava.serve.web.chat import Chat, Turn
from llava.serve.web.images import as_jpeg

logger = logging.getLogger(__name__)
_DAY: Final = re.compile(r"(\d{4}-\d{2}-\d{2})(-conv\.json)?")


class ConversationLog:
    """Lines in `directory/YYYY-MM-DD-conv.json`, pictures in `directory/serve_images/YYYY-MM-DD/MD5.jpg`.

    A vote is always written, since clicking it asks for that. Answers (`chats`), with the visitor's address and
    pictures, are written only when the operator says so. What is older than `keep_days` is deleted.
    """

    def __init__(self, directory: Path, *, chats: bool = False, keep_days: int = 30) -> None:
        self.directory = directory
        self.chats = chats
        self.keep_days = keep_days
        self._lock = threading.Lock()
        self._today = ""

    def chat(self, chat: Chat, turn: Turn, finish: float, address: str) -> None:
        """Record a finished answer, if answers are recorded."""
        if self.chats:
            times = {"start": round(turn.started, 4), "finish": round(finish, 4)}
            images = [self._save(as_jpeg(picture)) for picture in turn.pictures]
            self._write({"type": "chat", **_facts(chat, turn), **times, "images": images, "ip": address}, finish)

    def vote(self, kind: str, chat: Chat, address: str, **more: Any) -> str:
        """Record a click on upvote, downvote or flag, or on a button of the comparison; what to tell the visitor."""
        line = {"type": kind, **_facts(chat, chat.turns[-1]), **more}
        written = self._write({**line, "ip": address} if self.chats else line, time.time())
        return "Thank you; recorded." if written else "⚠️ This server cannot record votes at the moment."

    def _write(self, line: dict[str, Any], when: float) -> bool:
        try:
            with self._lock:
                today = date.today().isoformat()
                self._start(today)
                with (self.directory / f"{today}-conv.json").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"tstamp": round(when, 4), **line}, ensure_ascii=False) + "\n")
        except OSError as error:  # a full disk must not end a conversation
            logger.error("The conversation log cannot be written: %s", error)
            return False
        return True

    def _save(self, data: bytes) -> str:
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        path = self.directory / "serve_images" / date.today().isoformat() / f"{digest}.jpg"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_bytes(data)
        except OSError as error:
            logger.error("A picture of the conversation log cannot be written: %s", error)
        return digest

    def _start(self, today: str) -> None:
        """On the first line of a day: make the folder, and delete what is too old."""
        if today == self._today:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._today = today
        oldest = (date.today() - timedelta(days=self.keep_days)).isoformat()
        for path in [*self.directory.glob("*-conv.json"), *(self.directory / "serve_images").glob("*")]:
            match = _DAY.fullmatch(path.name)
            if match and match[1] < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _facts(chat: Chat, turn: Turn) -> dict[str, Any]:
    """What every line holds: the contract's keys, and the turn and settings that a vote is about (defect G22)."""
    return {
        "model": turn.model,
        "state": chat.conversation()[0].dict(),
        "turn_id": turn.turn_id,
        "temperature": turn.sampling.temperature,
        "top_p": turn.sampling.top_p,
        "max_new_tokens": turn.sampling.max_new_tokens,
        "finish_reason": turn.finish_reason,
    }
