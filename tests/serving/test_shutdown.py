"""How a server ends: accepted requests finish, new ones are refused, and what if they cannot."""

import os
import signal
import subprocess
import sys
import threading

import openai
import pytest
import yaml

from qtale_jax.artifact import save_model
from qtale_jax.data import reasoning

pytestmark = pytest.mark.slow

PROMPT = " ".join(list(reasoning.WORDS)[5:9])
SETTINGS = {"model": "tiny", "prompt": PROMPT, "temperature": 0, "stream": True}


def connected(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)


def text(stream) -> str:
    return "".join(chunk.choices[0].text for chunk in stream)


def test_sigterm_lets_streams_finish_and_refuses_new_ones(model, tmp_path):
    save_model(tmp_path / "tiny", model.spec, model.params, tokenizer=model.tokenizer)
    serve = {"model": str(tmp_path / "tiny"), "port": 0, "rows": 1, "chunk": 1, "width": 4, "context": 32}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"serve": serve}))
    command = [sys.executable, "-m", "qtale_jax.serve", "config.yaml"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("serving tiny on http://127.0.0.1:"), process.stderr.read()
        expected = model.generate([PROMPT], 27)[0].text
        with connected(line.split()[-1]) as client:
            assert client.models.list().data[0].id == "tiny"
            streams = [client.completions.create(**SETTINGS, max_tokens=27) for _ in range(30)]
            first = next(streams[0])
            process.send_signal(signal.SIGTERM)
            with pytest.raises(openai.InternalServerError) as refused:
                for _ in range(1000):  # the signal takes a moment
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
    with connected(running.url) as client, running.engine._stepping:
        stream = client.completions.create(**SETTINGS, max_tokens=20)
        failures = []

        def whole():
            try:
                client.completions.create(**SETTINGS | {"stream": False}, max_tokens=20)
            except openai.InternalServerError as error:
                failures.append(error)

        waiting = threading.Thread(target=whole)
        waiting.start()
        while len(list(running.engine._schedule.requests)) < 2:
            pass
        running.server.handle_exit(signal.SIGTERM, None)
        while not all(request.cancelled for request in running.engine._schedule.requests):
            pass
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


def stage(*arguments: str) -> tuple[int, str, str]:
    """Runs the stage in this process, as far as the first answer would be given."""
    code = (
        "import sys; from qtale_jax import command; from qtale_jax.serve import main; "
        f"sys.argv[1:] = {list(arguments)!r}; command.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    return done.returncode, done.stdout, done.stderr


def test_a_dry_run_says_what_would_be_served(folder):
    code, out, _ = stage("config.yaml", "--dry-run", "serve.rows=4", "serve.pool=0.5")
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
def test_what_cannot_be_served_is_one_line(folder, arguments, message, monkeypatch, capsys):
    from qtale_jax import command
    from qtale_jax.serve import main

    monkeypatch.setattr(sys, "argv", ["serve", "config.yaml", *arguments])
    for dry in ([], ["--dry-run"]):
        with pytest.raises(SystemExit) as stop:
            command.run(lambda dry=dry: main(["config.yaml", *arguments, *dry]))
        captured = capsys.readouterr()
        assert stop.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
        assert message in captured.err
