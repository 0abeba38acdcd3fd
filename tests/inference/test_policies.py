import jax.numpy as jnp
import numpy as np

from qtale_jax.inference.policies import inference_policy
from qtale_jax.models.policy import Dense, Thresholded
from qtale_jax.models.specification import QuantizationSpecification, TensorFormat


def test_a_dense_model_is_dense(dense):
    assert inference_policy(dense[0]) == Dense() == inference_policy(dense[0], 0.3)


def test_thresholds_are_those_of_the_bit_width(routed):
    spec, _ = routed
    policy = inference_policy(spec)
    assert isinstance(policy, Thresholded) and policy.threshold.dtype == jnp.float32
    np.testing.assert_allclose(policy.threshold, spec.routing.thresholds["16"])
    quantized = spec.model_copy(
        update={"quantization": QuantizationSpecification(method="rtn", formats={"0/key": TensorFormat(bits=4)})}
    )
    np.testing.assert_array_equal(inference_policy(quantized).threshold, [0.5, 0.5])


def test_one_theta_for_all_layers(routed):
    np.testing.assert_allclose(inference_policy(routed[0], 0.2).threshold, [0.2, 0.2])
