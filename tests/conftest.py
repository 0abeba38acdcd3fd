"""The environment of all tests: eight CPU devices, strict promotion, deterministic examples, one compilation cache.

What has to be set before JAX starts is set in the environment here, at import; processes that tests start inherit it.
"""

import gc
import importlib
import importlib.metadata
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DEVICES_FLAG = "--xla_force_host_platform_device_count"
# Most of the tests' time goes to compiling programs that run once; without the optimizer that takes a quarter of it.
# The programs mean the same. Tests that are about the last bit ask for the fixture `optimized`, or for processes that
# compile as users' do (`process_environment`). XLA_FLAGS=--xla_backend_optimization_level=3 turns it on for all.
_OPTIMIZER_FLAGS = {"--xla_backend_optimization_level": "0"}
OPTIMIZED: dict[str, int | bool] = {"xla_backend_optimization_level": 3}
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):  # it knows no such flag since
    _OPTIMIZER_FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
    OPTIMIZED["xla_cpu_use_fusion_emitters"] = True
_CACHE = "JAX_COMPILATION_CACHE_DIR"


def _prepare_environment() -> str | None:
    """Sets what JAX reads when it starts; returns the compilation cache if this process is to remove it."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in flags}
    if not names & set(_OPTIMIZER_FLAGS):
        flags += [f"{name}={value}" for name, value in _OPTIMIZER_FLAGS.items()]
    if DEVICES_FLAG not in names:
        flags.append(f"{DEVICES_FLAG}=8")
    os.environ["XLA_FLAGS"] = " ".join(flags)
    # XLA's thread pool has one thread per device by default. Steps that are dispatched before their predecessor is done
    # then take the threads that the predecessor's collectives wait for, and the process hangs.
    os.environ.setdefault("NPROC", "32")
    os.environ.setdefault("PJRT_NPROC", "32")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MPLBACKEND", "Agg")
    if _CACHE in os.environ:  # chosen by the user, or by the process that started this pytest-xdist worker
        return None
    os.environ[_CACHE] = tempfile.mkdtemp(prefix="qtale-jax-compiled-")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    return os.environ[_CACHE]


_own_cache = _prepare_environment()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402

# Tracing makes many objects that live as long as the program: looking through them after every 700 is wasted.
gc.set_threshold(50_000, 20, 20)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")

REPOSITORY = Path(__file__).resolve().parents[1]

RunModule = Callable[..., subprocess.CompletedProcess[str]]


def pytest_unconfigure() -> None:
    """Removes the compilation cache after the last worker."""
    if _own_cache:
        shutil.rmtree(_own_cache, ignore_errors=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--exhaustive`."""
    parser.addoption("--exhaustive", action="store_true", help="also run the tests marked exhaustive")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests marked exhaustive unless they are asked for, and puts the longest tests first."""
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out and not config.getoption("--exhaustive"):
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(scope="module", autouse=True)
def _few_compiled_programs():
    """Lets programs go between modules while memory maps last: each takes several, Linux gives a process 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(autouse=True)
def _own_hooks():
    """Puts back what entry points that run in this process replace for good."""
    unraisable, threads = sys.unraisablehook, threading.excepthook
    yield
    sys.unraisablehook, threading.excepthook = unraisable, threads


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the checkpoints and texts that tests may use where they are present."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no data in {path}")
    return path


@pytest.fixture(scope="session")
def optimized() -> dict[str, int | bool]:
    """`compiler_options` of a `jax.jit` that compiles as outside the tests, for what depends on it to the last bit."""
    return OPTIMIZED


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator that gives every test the same numbers."""
    return np.random.default_rng(20240607)


@pytest.fixture(scope="session")
def process_environment() -> Callable[..., dict[str, str]]:
    """The environment of a process as users start it: this package, `devices` CPU devices; `optimized` programs or not.

    Coverage is not measured there: it would take a quarter of a process's time.
    """
    own = [f"{name}={value}" for name, value in _OPTIMIZER_FLAGS.items()]

    def environment(devices: int = 1, optimized: bool = False) -> dict[str, str]:
        left_out = (DEVICES_FLAG, *own) if optimized else DEVICES_FLAG
        flags = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(left_out)]
        return os.environ | {
            "XLA_FLAGS": " ".join([*flags, f"{DEVICES_FLAG}={devices}"]),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }

    return environment


@pytest.fixture
def run_module(tmp_path: Path, process_environment) -> RunModule:
    """Runs `python -m MODULE ARGUMENTS...` as a user would: a process of its own, in the test's empty folder.

    `devices` and `optimized` go to `process_environment`; other keywords go to `subprocess.run`.
    """

    def run(
        module: str, *arguments: str | Path, devices: int = 1, optimized: bool = False, **settings
    ) -> subprocess.CompletedProcess[str]:
        defaults = {"cwd": tmp_path, "env": process_environment(devices, optimized), "timeout": 600}
        command = [sys.executable, "-m", module, *map(str, arguments)]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, **(defaults | settings)
        )

    return run


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -m MODULE ARGUMENTS...` in the test's empty folder, but in this process: imports take seconds."""

    def run(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        from qtale_jax import command

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            command.run(importlib.import_module(module).main)
        captured = capsys.readouterr()
        return subprocess.CompletedProcess(sys.argv, int(stop.value.code or 0), captured.out, captured.err)

    return run


class Together:
    """Processes that run side by side, what they print in files."""

    def __init__(self, folder: Path):
        self.folder, self.running = folder, []

    def start(self, command: list[str], environment: dict[str, str]) -> None:
        out, err = ((self.folder / f"{len(self.running)}.{name}").open("w") for name in ("out", "err"))
        with out, err:
            self.running.append(
                subprocess.Popen(
                    command, cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err
                )
            )

    def output(self, process: int) -> str:
        return (self.folder / f"{process}.out").read_text()

    def errors(self, process: int) -> str:
        return (self.folder / f"{process}.err").read_text()

    def until(self, condition: Callable[[], bool], timeout: float = 300) -> None:
        """Waits for something that happens while all are running."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end and all(process.poll() is None for process in self.running), self.logs()
            time.sleep(0.02)

    def wait(self, timeout: float = 300) -> list[int]:
        """The exit codes."""
        try:
            return [process.wait(timeout) for process in self.running]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.logs()}") from None

    def logs(self) -> str:
        return "\n".join(f"-- process {index}:\n{self.errors(index)}" for index in range(len(self.running)))


@pytest.fixture
def together(tmp_path_factory) -> Iterator[Callable[[], Together]]:
    """Makes groups of processes that run side by side; what is left of them at the end is killed."""
    groups = []

    def make() -> Together:
        groups.append(Together(tmp_path_factory.mktemp("together")))
        return groups[-1]

    yield make
    for process in (process for group in groups for process in group.running):
        process.kill()
        process.wait()


@pytest.fixture
def free_port() -> Callable[[], int]:
    """Finds a port that nothing listens on."""

    def find() -> int:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            return found.getsockname()[1]

    return find
