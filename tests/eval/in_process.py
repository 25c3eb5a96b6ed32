"""A replacement of `python` in scripts: programs run in the process of the test, where torch is already loaded.

Scripts, arguments, files and exit statuses are real; only the start of the interpreter is skipped.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import runpy
import socketserver
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.test_package import ROOT

CLIENT = """#!{python} -SE
import json, socket, sys
with socket.create_connection(("127.0.0.1", {port})) as link:
    link.sendall((json.dumps(sys.argv[1:]) + "\\n").encode())
    reply = json.loads(link.makefile().readline())
sys.stdout.write(reply["out"])
sys.stderr.write(reply["err"])
sys.exit(reply["status"])
"""


def run(words: list[str]) -> dict[str, Any]:
    """Output and exit status of `python WORDS` for modules and scripts of this project."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        if words[0] == "-m":
            main, arguments = importlib.import_module(words[1]).main, words[2:]
        elif words[0].startswith("llava/"):
            name = words[0].removesuffix(".py").replace("/", ".")
            main, arguments = importlib.import_module(name).main, words[1:]
        else:
            path = list(sys.path)
            main, arguments = runpy.run_path(str(ROOT / words[0]))["main"], words[1:]
            sys.path[:] = path
        try:
            status = main(arguments)
        except SystemExit as end:
            status = end.code
        except Exception as error:
            status = 1
            print(f"{type(error).__name__}: {error}", file=err)
    return {"out": out.getvalue(), "err": err.getvalue(), "status": status}


@contextlib.contextmanager
def python_in_process(folder: Path) -> Iterator[Path]:
    """Yield the path of an executable for `PYTHON`; programs run sequentially."""
    one_at_a_time = threading.Lock()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            words = json.loads(self.rfile.readline())
            with one_at_a_time:
                reply = run(words)
            self.wfile.write((json.dumps(reply) + "\n").encode())

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        client = folder / "python"
        client.write_text(CLIENT.format(python=sys.executable, port=server.server_address[1]), encoding="utf-8")
        client.chmod(0o755)
        yield client
        server.shutdown()
        thread.join()
