"""The whole plan: what is planned for, training and inference on the topology, what would fit instead."""

import math
from dataclasses import dataclass

import jax

from qtale_jax.config.schema import Config
from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.parallel.axes import AXES
from qtale_jax.parallel.mesh import abstract_mesh, mesh_sizes
from qtale_jax.planning.devices import Topology, topology
from qtale_jax.planning.inference import InferenceEstimate, InferencePlanner, deployed
from qtale_jax.planning.proposal import Proposal, propose, smallest
from qtale_jax.planning.subject import check_divides, planned_model
from qtale_jax.planning.traffic import Sizes
from qtale_jax.planning.training import TrainingEstimate, TrainingPlanner
from qtale_jax.training.loop import check_rows
from qtale_jax.training.plan import extended_abstract


@dataclass(frozen=True)
class Subject:
    """What is planned for.

    Attributes:
        name: what the model is called.
        spec: the model that trains, with routers and adapters.
        deployed: the model that inference runs.
        topology: where.
        sizes: of the mesh over it.
    """

    name: str
    spec: ModelSpecification
    deployed: ModelSpecification
    topology: Topology
    sizes: Sizes

    @property
    def parameters(self) -> int:
        """Parameters of the model without routers and adapters."""
        bare = self.spec.model_copy(update={"routing": None, "lora": None, "quantization": None})
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_parameters(bare)))


@dataclass(frozen=True)
class Plan:
    """Estimates for a subject.

    Attributes:
        subject: what is planned for.
        training: a step as it is configured.
        inference: prefill and decode for every batch size.
        here: what fits on the topology; None: nothing.
        smallest: the smallest topology of the same kind that takes the configured batch; None: none does.
        there: a step on it, in its microbatches; None: there is none.
    """

    subject: Subject
    training: TrainingEstimate
    inference: list[InferenceEstimate]
    here: Proposal | None
    smallest: Proposal | None
    there: TrainingEstimate | None


def subject_of(config: Config) -> Subject:
    """Checks everything that can be refused, on shapes.

    Raises:
        InputError: an unknown topology or model, a mesh that does not fit, counts that do not divide.
    """
    where = topology(config.plan.topology)
    sizes = mesh_sizes(config.mesh, where.count)
    name, spec = planned_model(config)
    check_rows(config, abstract_mesh(sizes))
    spec, _ = extended_abstract(config, spec)
    check_divides(spec, dict(zip(AXES, sizes, strict=True)), config.data.length)
    return Subject(name, spec, deployed(config, spec), where, sizes)


def plan(config: Config, subject: Subject) -> Plan:
    """Estimates everything."""
    training = TrainingPlanner(config, subject.spec)
    inference = InferencePlanner(config, subject.deployed, subject.topology)
    steps = [step(rows) for step in (inference.prefill, inference.decode) for rows in config.plan.batch_sizes]
    least = smallest(training, subject.topology)
    there = None if least is None else training.estimate(topology(least.topology), least.mesh, least.microbatches)
    here = propose(training, subject.topology)
    return Plan(subject, training.estimate(subject.topology, subject.sizes), steps, here, least, there)
