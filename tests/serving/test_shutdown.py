"""How a server ends: accepted requests finish, new ones are refused, and what if they cannot."""

import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import openai
import pytest
import yaml

from qtale_jax import command
from qtale_jax.artifact import save_model
from qtale_jax.data import reasoning
from qtale_jax.serve import main

pytestmark = pytest.mark.slow

PROMPT = " ".join(list(reasoning.WORDS)[5:9])
SETTINGS = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "stream": True}


def connected(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def text(stream) -> str:
    return "".join(chunk.choices[0].text for chunk in stream)


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def until(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_sigterm_lets_streams_finish_and_refuses_new_ones(model, tmp_path):
    save_model(tmp_path / "tiny", model.spec, model.params, tokenizer=model.tokenizer)
    serve = {"model": str(tmp_path / "tiny"), "port": 0, "rows": 1, "chunk": 1, "width": 4, "context": 32}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"serve": serve}))
    arguments = [sys.executable, "-m", "qtale_jax.serve", "config.yaml"]
    process = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving tiny on http://127.0.0.1:"), line
        expected = model.generate([PROMPT], 12)[0].text
        with connected(line.split()[-1]) as client:
            assert client.models.list().data[0].id == "tiny"
            streams = [client.completions.create(**SETTINGS, max_tokens=12) for _ in range(30)]
            first = next(streams[0])
            process.send_signal(signal.SIGTERM)
            until(lambda: status(f"{line.split()[-1]}/health") == 503)
            with pytest.raises(openai.InternalServerError) as refused:
                client.completions.create(**SETTINGS | {"stream": False}, max_tokens=1)
            assert refused.value.status_code == 503 and refused.value.code == "shutting_down"
            assert first.choices[0].text + text(streams[0]) == expected
            assert all(text(stream) == expected for stream in streams[1:])
        assert process.wait(60) == 0
        assert "new ones are refused" in process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_requests_that_do_not_finish_in_time_are_told(start, capsys):
    running = start(grace=0.1)
    with connected(running.url) as client:
        failures = []

        def whole():
            try:
                client.completions.create(**SETTINGS | {"stream": False}, max_tokens=20)
            except openai.InternalServerError as error:
                failures.append(error)

        with running.engine._stepping:
            stream = client.completions.create(**SETTINGS, max_tokens=20)
            waiting = threading.Thread(target=whole)
            waiting.start()
            until(lambda: len(list(running.engine._schedule.requests)) == 2)
            running.server.handle_exit(signal.SIGTERM, None)
            until(lambda: all(request.cancelled for request in running.engine._schedule.requests))
        with pytest.raises(openai.APIError, match="shutting down"):
            text(stream)
        waiting.join(60)
        assert failures[0].status_code == 503
    running.thread.join(60)
    assert not running.thread.is_alive() and running.is_idle()
    assert "requests were ended after serve.grace=0.1 seconds" in capsys.readouterr().err
    running.service.worker.stop()


def test_an_engine_that_fails_ends_the_server(start, monkeypatch, capsys):
    running = start()

    def fails():
        raise FloatingPointError("a broken device")

    with connected(running.url) as client:
        monkeypatch.setattr(running.engine, "step", fails)
        with pytest.raises(openai.InternalServerError) as failed:
            client.completions.create(**SETTINGS | {"stream": False}, max_tokens=20)
        assert failed.value.status_code == 500 and failed.value.code == "engine_failed"
    running.thread.join(60)
    assert not running.thread.is_alive() and isinstance(running.service.worker.failure, FloatingPointError)
    assert "a broken device" in capsys.readouterr().err


@pytest.fixture
def folder(model, tmp_path, monkeypatch):
    """A configuration and a model, in the working directory."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "tiny", model.spec, model.params, tokenizer=reasoning.tokenizer())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"serve": {"model": "tiny", "port": 0, "context": 32}}))
    return tmp_path


def stage(*arguments: str) -> int:
    """Runs the stage in this process; returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        command.run(lambda: main(["config.yaml", *arguments]))
    return int(stop.value.code or 0)


def test_a_dry_run_says_what_would_be_served(folder, capsys):
    code = stage("--dry-run", "serve.rows=4", "serve.pool=0.5")
    out = capsys.readouterr().out
    assert code == 0 and out.startswith("serve: dry run, nothing is written\n")
    assert "4 at a time, 256 wait, of up to 32 tokens" in out and "no: the tokenizer has no template" in out
    # 2 layers, 2 pages for 32 tokens, 4 rows, half: 8 pages of 16 slots with 2 vectors of 8 float32 and a position.
    assert f"{8 * 16 * (2 * 8 * 4 + 4) / 1000:.2f} kB in 8 pages of 16 tokens" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve.context=65"], "context=65; allowed: 2 to 64"),
        (["serve.chat_template=nowhere"], "serve.chat_template=nowhere: no such file"),
        (["serve.host=256.1.1.1"], "serve.host=256.1.1.1"),
    ],
)
def test_what_cannot_be_served_is_one_line(folder, arguments, message, capsys):
    for dry in ([], ["--dry-run"]):
        assert stage(*arguments, *dry) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert message in captured.err


def test_a_missing_package_is_named(folder, monkeypatch, capsys):
    monkeypatch.setattr("qtale_jax.serve.NEEDED", ("starlette", "no_such_package"))
    assert stage() == 2
    assert 'serve needs no_such_package; install with: pip install "qtale-jax[serve]"' in capsys.readouterr().err
