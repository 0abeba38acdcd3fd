"""What later jobs of an experiment would stumble over, found before the first one starts."""

from collections.abc import Iterable, Sequence

from qtale_jax.artifact import StoredModel
from qtale_jax.calibration.calibrate import calibration_records
from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.errors import InputError
from qtale_jax.experiments.grid import Step
from qtale_jax.quantization.calibration_rows import calibration_rows
from qtale_jax.quantization.formats import formats_of


def check(steps: Iterable[Step], base: str, quantizers: Sequence[QuantizeConfig]) -> None:
    """Checks the steps that quantize and calibrate against the model that all methods start from, and against the data.

    Group sizes, rules and the number of calibration rows do not depend on training, so nobody has to wait for it.

    Args:
        steps: those that are still to be done.
        base: model directory that is there already. Methods that take layers out of it have fewer, of the same shape.
        quantizers: those of the experiment: an error names the one that it is about.

    Raises:
        InputError: as the steps would, with the keys as an experiment has them.
    """
    model, seen = StoredModel(base), set()
    for step in steps:
        config, generated = step.config, step.config.data.kind == "reasoning"  # those have rows enough
        quantizer = config.quantize.model_copy(update={"model": None, "output": None})
        asked = (step.stage, quantizer, config.calibrate.examples, config.data)
        if asked in seen:
            continue
        seen.add(asked)
        try:
            if step.stage == "calibrate" and not generated:
                calibration_records(config)
            elif step.stage == "quantize" and quantizer.bits != 16:
                formats_of(model.spec, quantizer)
                if quantizer.sees_activations and not generated:
                    calibration_rows(config, model.spec, model.tokenizer)
        except InputError as error:
            key = f"experiment.quantizers.{quantizers.index(quantizer)}." if quantizer in quantizers else "quantize."
            raise InputError(str(error).replace("quantize.", key)) from error
