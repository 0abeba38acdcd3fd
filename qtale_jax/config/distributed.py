"""The section of several processes."""

import re

from pydantic import Field, model_validator

from qtale_jax.config.section import Positive, Section


class DistributedConfig(Section):
    """Several processes that train as one, on one machine or many; all are started with the same command."""

    enabled: bool = Field(default=False, description="train as one of several processes")
    coordinator: str | None = Field(
        default=None, description="HOST:PORT of process 0; default: from Slurm, Open MPI, Cloud TPU or GKE"
    )
    processes: Positive | None = Field(default=None, description="number of processes; default: from the cluster")
    process_id: int | None = Field(
        default=None, ge=0, description="number of this process, from 0; default: from the cluster"
    )
    timeout_s: Positive = Field(
        default=300,
        description="seconds that processes wait for each other, and that one may give no sign of life",
    )

    @model_validator(mode="after")
    def _check(self):
        given = [name for name in ("coordinator", "processes", "process_id") if getattr(self, name) is not None]
        if given and not self.enabled:
            raise ValueError(f"{given[0]}={getattr(self, given[0])!r} would do nothing without enabled=true")
        if self.coordinator is not None and not re.fullmatch(r"\S+:\d{1,5}", self.coordinator):
            raise ValueError(f"coordinator={self.coordinator!r}; allowed: HOST:PORT, such as 10.0.0.1:8476")
        if self.processes is not None and self.process_id is not None and self.process_id >= self.processes:
            raise ValueError(
                f"process_id={self.process_id} is not one of processes={self.processes}; "
                f"allowed: 0 to {self.processes - 1}"
            )
        return self
