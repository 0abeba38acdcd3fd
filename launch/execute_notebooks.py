"""Executes notebooks, each in a kernel of its own and in the folder that it is in.

    python launch/execute_notebooks.py TARGET NOTEBOOK.ipynb ...

Executed copies go to TARGET. The exit code is 1 if a cell failed or wrote to standard error: warnings are errors.
"""

import asyncio
import contextlib
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

TIMEOUT = 600
"""Seconds that a kernel may take to start, and a cell to run."""

SIDE_BY_SIDE = 2
"""Kernels at a time: most of a notebook's time is spent in one thread, on imports and compilation."""


def remarks(notebook: nbformat.NotebookNode) -> list[str]:
    """What cells wrote to standard error."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.text.strip() for output in outputs if output.get("name") == "stderr"]


@contextlib.asynccontextmanager
async def sockets() -> AsyncIterator[Config]:
    """Kernels talk through files that only this user can open; over TCP everyone on the machine could listen."""
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        yield Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/socket"}})


async def execute(path: Path, target: Path, turn: asyncio.Semaphore) -> list[str]:
    """Executes one notebook, writes the copy also where a cell failed, and returns what went wrong."""
    notebook, folder = nbformat.read(path, as_version=4), {"metadata": {"path": str(path.parent)}}
    async with turn, sockets() as config:
        times = {"timeout": TIMEOUT, "startup_timeout": TIMEOUT}
        client = NotebookClient(notebook, kernel_name="python3", resources=folder, config=config, **times)
        started, problems = time.monotonic(), []
        try:
            await client.async_execute()
        except CellExecutionError as error:
            problems.append(str(error))
        nbformat.write(notebook, target / path.name)
        problems += remarks(notebook)
        print(f"{path.name}: {time.monotonic() - started:.0f} s{', FAILED' if problems else ''}", file=sys.stderr)
    return [f"{path}: {problem}" for problem in problems]


async def execute_all(target: Path, paths: list[Path]) -> list[str]:
    """Executes notebooks side by side and returns what went wrong in any of them."""
    target.mkdir(parents=True, exist_ok=True)
    turn = asyncio.Semaphore(SIDE_BY_SIDE)
    found = await asyncio.gather(*(execute(path, target, turn) for path in paths))
    return [problem for problems in found for problem in problems]


def main(target: str, *paths: str) -> int:
    """Executes notebooks; returns 1 if anything went wrong."""
    problems = asyncio.run(execute_all(Path(target).resolve(), [Path(path).resolve() for path in paths]))
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
