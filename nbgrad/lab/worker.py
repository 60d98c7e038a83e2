"""A process that runs cells: ``python -m nbgrad.lab.worker``, asked and answering in lines of JSON.

    {"function": "module:name", "cell": {…}, "path": [folders to import from]}
    {"record": {…}, "seconds": 1.2}    or    {"error": "ValueError: …", "trace": "…"}

No pickle: a cell and its record are what JSON can hold. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from nbgrad.lab.results import clean

__all__ = ["answer", "main"]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)                       # what a study prints is no answer
        for line in sys.stdin:
            request = json.loads(line)
            sys.path.extend(p for p in request["path"] if p not in sys.path)
            found = answer(partial(_call, request["function"]), request["cell"])
            answers.write(json.dumps(found, allow_nan=False) + "\n")
            answers.flush()


def answer(run: Callable[[dict[str, Any]], Any], cell: dict[str, Any]) -> dict[str, Any]:
    """What a cell found, and the CPU's seconds for it (with one thread, what it would take alone);
    or what it raised."""
    begin = time.process_time()
    try:
        record = clean(run(cell))
        if not isinstance(record, dict):
            raise TypeError(f"a record is a dict, got {type(record).__name__}")
    except Exception as e:
        return {"error": " ".join(f"{type(e).__name__}: {e}".split()),
                "trace": traceback.format_exc()}
    return {"record": record, "seconds": time.process_time() - begin}


def _call(function: str, cell: dict[str, Any]) -> Any:
    module, _, name = function.partition(":")
    return getattr(import_module(module), name)(cell)


if __name__ == "__main__":
    main()
