"""Freed memory that the process keeps: a block that is allocated again costs no page faults."""

import os
import platform
import subprocess
import sys

import pytest

from qtale_jax import allocator
from qtale_jax.allocator import keep_freed_memory

FAULTS = """
import resource, sys
from qtale_jax.allocator import keep_freed_memory

kept = sys.argv[1] == "keep" and keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    b"x" * 200_000_000
use()
before = faults()
use()
print(kept, faults() - before)
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")


@pytest.fixture
def plain(monkeypatch):
    """An environment that says nothing about allocation."""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def run(way: str) -> tuple[str, int]:
    found = subprocess.run([sys.executable, "-c", FAULTS, way], check=True, capture_output=True, text=True)
    kept, faults = found.stdout.split()
    return kept, int(faults)


@needs_glibc
def test_a_block_that_was_freed_is_taken_again_without_page_faults(plain):
    kept, few = run("keep")
    _, many = run("as it is")
    assert kept == "True" and few < 100 < 10_000 < many


@pytest.mark.parametrize(
    "variables", [{"MALLOC_ARENA_MAX": "2"}, {"JAX_PLATFORMS": "cuda"}, {"JAX_PLATFORMS": "tpu,cpu"}]
)
def test_nothing_changes_on_accelerators_and_where_the_environment_speaks(plain, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not keep_freed_memory()


@pytest.mark.parametrize(("installed", "expected"), [((), True), (("jax_plugins",), False), (("libtpu",), False)])
def test_plugins_of_accelerators_count_where_nothing_is_said(plain, monkeypatch, installed, expected):
    class Spec:
        submodule_search_locations = ("somewhere",)

    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(allocator.importlib.util, "find_spec", lambda name: Spec() if name in installed else None)
    monkeypatch.setattr(allocator.pkgutil, "iter_modules", lambda path: ["xla_cuda"] if path else [])
    assert allocator._computes_on_cpus() is expected
