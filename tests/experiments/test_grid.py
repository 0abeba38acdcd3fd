from pathlib import Path

import pytest

from qtale_jax.config import load_config
from qtale_jax.config.loading import with_overrides
from qtale_jax.errors import InputError
from qtale_jax.experiments.grid import plan
from qtale_jax.experiments.schedule import is_done, read_job, stamp, write_job

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def config(tmp_path):
    return with_overrides(load_config(CONFIG), {"output": str(tmp_path)})


def test_the_quickstart_trains_a_base_then_methods_and_measures_each(config):
    jobs = {job.name: job for job in plan(config)}
    assert jobs["base"].needs == () and [step.stage for step in jobs["base"].steps] == ["train"]
    assert jobs["measure dense"].needs == ("base",)
    for method in ("dllm", "qtale"):
        assert jobs[f"train {method}-seed0"].needs == ("base",)
        assert jobs[f"measure {method}-seed0"].needs == (f"train {method}-seed0",)
    assert len(jobs) == 6


def test_jobs_come_after_what_they_need_and_outputs_are_their_own(config):
    jobs, seen = plan(config), set()
    for job in jobs:
        assert set(job.needs) <= seen
        seen.add(job.name)
    outputs = [step.output for job in jobs for step in job.steps]
    assert len(outputs) == len(set(outputs)) and all(str(o).startswith(config.output) for o in outputs)


def test_every_quantizer_is_measured_at_its_own_and_every_asked_ratio(config):
    jobs = {job.name: job for job in plan(config)}
    grid = config.experiment
    stages = [step.stage for step in jobs["measure qtale-seed0"].steps]
    quantized = sum(quantizer.bits != 16 for quantizer in grid.quantizers)
    assert stages.count("quantize") == quantized
    assert stages.count("calibrate") == len(grid.quantizers) * len(grid.ratios)
    assert stages.count("evaluate") == len(grid.quantizers) * (1 + len(grid.ratios))
    assert "calibrate" not in [step.stage for step in jobs["measure dense"].steps]


def test_every_quantizer_is_evaluated_at_every_asked_threshold(config):
    changed = with_overrides(config, {"experiment": {"thresholds": [0.3, 0.7], "ratios": []}})
    jobs = {job.name: job for job in plan(changed)}
    evaluations = [step for step in jobs["measure qtale-seed0"].steps if step.stage == "evaluate"]
    thetas = [step.config.evaluate.threshold for step in evaluations]
    assert thetas == [None, 0.3, 0.7] * len(config.experiment.quantizers)
    for own, *others in (evaluations[i : i + 3] for i in range(0, len(evaluations), 3)):
        assert {other.config.evaluate.model for other in others} == {own.config.evaluate.model}
        names = [f"{own.output.stem}-theta{theta}.json" for theta in ("0.3", "0.7")]
        assert [other.output.name for other in others] == names
    dense = [step.config.evaluate.threshold for step in jobs["measure dense"].steps if step.stage == "evaluate"]
    assert set(dense) == {None}


def test_a_threshold_that_results_would_not_tell_from_the_trained_one_is_refused(config):
    def asked(**experiment):
        return plan(with_overrides(config, {"experiment": {"ratios": [], **experiment}}))

    message = r"experiment.thresholds: 0.501 and the trained threshold of dllm, 0.5, are both shown as 0.50; allowed: "
    with pytest.raises(InputError, match=message):
        asked(thresholds=[0.3, 0.501])
    with pytest.raises(InputError, match=r"experiment.points.qtale.thresholds: 0.499 and .* of qtale, 0.5, are both"):
        asked(points={"qtale": {"thresholds": [0.499]}})
    dense = {"dense": {}, "tuned": {"routing": {"method": "dense"}}}  # these have no threshold
    assert asked(
        thresholds=[0.501], methods={**dense, "dllm": None, "qtale": None, "mod": {"routing": {"threshold": 0.7}}}
    )
    assert asked(thresholds=[0.5, 0.51])


def test_a_method_can_be_evaluated_at_points_of_its_own(config):
    points = {"qtale": {"ratios": [0.4, 0.8], "thresholds": [0.2]}}
    changed = with_overrides(config, {"experiment": {"ratios": [0.6], "points": points}})
    jobs = {job.name: job for job in plan(changed)}

    def ratios(method: str) -> set[float]:
        steps = jobs[f"measure {method}-seed0"].steps
        return {step.config.calibrate.ratio for step in steps if step.stage == "calibrate"}

    assert ratios("qtale") == {0.4, 0.8} and ratios("dllm") == {0.6}
    with pytest.raises(InputError, match="points names 'mod', which is not one of methods: "):
        with_overrides(config, {"experiment": {"points": {"mod": {"ratios": [0.5]}}}})


def test_methods_start_from_the_base_and_differ_as_asked(config):
    jobs = {job.name: job for job in plan(config)}
    base, dllm, qtale = (jobs[n].steps[0].config for n in ("base", "train dllm-seed0", "train qtale-seed0"))
    assert (base.routing.method, base.model.path, base.train.parameters) == ("dense", None, "all")
    assert dllm.model.path == qtale.model.path == str(jobs["base"].steps[0].output)
    assert (dllm.routing.method, qtale.routing.method) == ("dllm", "qtale")
    assert dllm.routing.effective_entropy_weight == 0 < qtale.routing.effective_entropy_weight


def test_a_model_is_measured_as_soon_as_it_is_trained(config):
    names = [job.name for job in plan(with_overrides(config, {"experiment": {"seeds": [0, 1]}}))]
    for name in (name for name in names if name.startswith("train ")):
        assert names[names.index(name) + 1] == name.replace("train", "measure")


def test_seeds_multiply_fine_tunes_but_not_the_base(config):
    jobs = plan(with_overrides(config, {"experiment": {"seeds": [0, 1, 2]}}))
    names = [job.name for job in jobs]
    assert names.count("base") == names.count("measure dense") == 1
    assert {f"train qtale-seed{seed}" for seed in range(3)} <= set(names)
    seeds = {job.steps[0].config.seed for job in jobs if job.name.startswith("train qtale")}
    assert seeds == {0, 1, 2}


def test_a_step_is_done_for_the_same_inputs_only(config):
    def step(**changes):
        return next(j for j in plan(with_overrides(config, changes)) if j.name == "measure qtale-seed0").steps[0]

    one = step()
    assert not is_done(one)
    one.output.parent.mkdir(parents=True)
    one.output.write_text("{}")
    assert not is_done(one)
    stamp(one).write_text(one.fingerprint())
    assert is_done(step()) and is_done(step(experiment={"title": "Another"}))
    assert is_done(step(generate={"max_new_tokens": 3}, profile={"steps": [1, 2]}))  # what no stage of it reads
    assert not is_done(step(evaluate={"batch_size": 32}))
    assert not is_done(step(experiment={"base": {"train": {"steps": 7}}}))  # a step far upstream


def test_workers_read_the_jobs_that_were_written(config, tmp_path):
    for job in plan(config):
        steps = read_job(write_job(job, tmp_path / "jobs"))
        assert [s.fingerprint() for s in steps] == [s.fingerprint() for s in job.steps]
        assert [(s.stage, s.output) for s in steps] == [(s.stage, s.output) for s in job.steps]


def test_nothing_to_start_from_is_refused(config):
    with pytest.raises(InputError, match="nothing to start from"):
        plan(config.model_copy(update={"experiment": config.experiment.model_copy(update={"base": None})}))


def test_held_out_tasks_are_asked_after_everything_else(config):
    changed = with_overrides(config, {"experiment": {"held_out_tasks": ["rank", "sum"]}})
    plain, jobs = plan(config), plan(changed)
    assert [job.name for job in jobs[: len(plain)]] == [job.name for job in plain]
    looks = jobs[len(plain) :]
    assert [job.name for job in looks] == [f"ask {method} once more" for method in config.experiment.methods]
    assert all(job.needs == tuple(job.name for job in plain) for job in looks)
    asked = [step for job in looks for step in job.steps]
    before = [step for job in plain for step in job.steps if step.stage == "evaluate"]
    before = [step for step in before if step.output.name.startswith("dense") or "-ratio" in step.output.name]
    assert [step.config.evaluate.model for step in asked] == [step.config.evaluate.model for step in before]
    assert {step.config.evaluate.tasks for step in asked} == {("rank", "sum")}
    assert {step.config.data.tasks for step in asked} == {()}  # training and calibration are as they were
    assert {step.output.parent.name for step in asked} == {"held_out"}
