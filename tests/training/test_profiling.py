"""What is said of the compiled step, and the trace of some steps."""

import re

import pytest
from pydantic import ValidationError

from qtale_jax.config.schema import ProfileConfig
from qtale_jax.errors import InputError
from qtale_jax.training.loop import train

pytestmark = pytest.mark.slow


def configured(make_config, folder, steps):
    config = make_config(train={"steps": 4, "log_every": 2, "evaluate_every": 0})
    return config.model_copy(update={"output": str(folder / "run"), "profile": ProfileConfig(steps=steps)})


def test_some_steps_are_traced_and_the_step_is_summarized(make_config, tmp_path, capsys):
    train(configured(make_config, tmp_path, (2, 3)))
    said = capsys.readouterr().err
    pattern = (
        r"the step was compiled in [\d.]+ s; per device [\d.]+ MB of state and batch, [\d.]+ MB of temporary arrays"
    )
    assert len(re.findall(pattern, said)) == 1
    traces = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    assert f"profile: {tmp_path / 'run' / 'profile'}" in said


def test_steps_that_do_not_come_are_refused_before_anything_is_written(make_config, tmp_path):
    with pytest.raises(InputError, match=r"profile.steps=\[5, 6\] begins after the last step, 4"):
        train(configured(make_config, tmp_path, (5, 6)), quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValidationError, match="has to rise"):
        ProfileConfig(steps=(3, 2))
