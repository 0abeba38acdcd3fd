"""The section of several processes: what goes together."""

import pytest
from pydantic import ValidationError

from qtale_jax.config import Config
from qtale_jax.config.distributed import DistributedConfig
from qtale_jax.errors import InputError
from qtale_jax.experiments.grid import plan


def test_off_by_default_and_complete_by_itself():
    assert not Config().distributed.enabled
    assert DistributedConfig(enabled=True).coordinator is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"processes": 2}, "processes=2 would do nothing without enabled=true"),
        ({"coordinator": "host:1"}, "coordinator='host:1' would do nothing"),
        ({"enabled": True, "coordinator": "host"}, "coordinator='host'; allowed: HOST:PORT"),
        ({"enabled": True, "processes": 2, "process_id": 2}, "process_id=2 is not one of processes=2; allowed: 0 to 1"),
        ({"enabled": True, "timeout_s": 0}, "greater than 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(values, message):
    with pytest.raises(ValidationError, match=message):
        DistributedConfig(**values)


def test_an_experiment_refuses_it():
    with pytest.raises(InputError, match=r"distributed\.enabled=true: an experiment runs in one process"):
        plan(Config.model_validate({"distributed": {"enabled": True}}))
