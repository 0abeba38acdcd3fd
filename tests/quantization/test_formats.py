"""Which matrix is stored how: rules, what stays in floating point, embedding, head and routers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from qtale_jax.artifact import load_model, save_model, weight_bytes
from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.data import reasoning
from qtale_jax.errors import InputError
from qtale_jax.model import Model
from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.models.forward import forward
from qtale_jax.models.policy import Dense, Thresholded
from qtale_jax.models.specification import LINEARS, TensorFormat
from qtale_jax.quantization.formats import formats_of
from qtale_jax.quantization.layer import restore_layer
from qtale_jax.quantization.pipeline import quantize_parameters

run = jax.jit(forward, static_argnums=0)
TOKENS = jax.random.randint(jax.random.key(1), (3, 9), 1, 64, jnp.int32)

RULES = (
    {"match": "*/down", "bits": 3, "group_size": -1},
    {"match": "0/*", "bits": 8},
    {"match": "[01]/up", "symmetric": True},
    {"match": "0/down", "bits": 16},
)
MIXED = QuantizeConfig(bits=4, group_size=16, rules=RULES, scale_dtype="bfloat16")


@pytest.fixture(scope="module")
def routed(make_routed):
    """Two layers, the second routed."""
    return make_routed(num_layers=2)


@pytest.fixture(scope="module")
def tied(make_routed):
    return make_routed(num_layers=2, tied_head=True)


@pytest.fixture(scope="module")
def mixed(routed):
    return quantize_parameters(*routed, MIXED)


def test_the_last_rule_that_matches_counts(routed):
    found = formats_of(routed[0], MIXED)
    rest = {"scale_dtype": "bfloat16"}
    assert "0/down" not in found
    assert found["0/query"] == TensorFormat(bits=8, group_size=16, **rest)
    assert found["0/up"] == TensorFormat(bits=8, group_size=16, symmetric=True, **rest)
    assert found["1/up"] == TensorFormat(bits=4, group_size=16, symmetric=True, **rest)
    assert found["1/down"] == TensorFormat(bits=3, group_size=-1, **rest)
    assert found["1/gate"] == TensorFormat(bits=4, group_size=16, **rest)
    assert len(found) == 2 * len(LINEARS) - 1
    reverse = QuantizeConfig(bits=4, rules=RULES[::-1])
    assert formats_of(routed[0], reverse)["0/down"].bits == 3


def test_what_has_no_rule_has_the_settings_of_the_quantizer(routed):
    plain = formats_of(routed[0], QuantizeConfig(bits=8, activation_bits=8))
    assert plain == {f"{i}/{name}": TensorFormat(bits=8, activation_bits=8) for i in range(2) for name in LINEARS}
    ends = formats_of(routed[0], QuantizeConfig(bits=3, embedding_bits=8, head_bits=8, router_bits=8))
    assert set(ends) - set(plain) == {"1/router", "embedding", "head"}  # layer 0 has no router
    assert {ends[name] for name in ("1/router", "embedding", "head")} == {TensorFormat(bits=8, symmetric=True)}


def test_routers_without_parameters_are_not_stored_in_any_format(make_routed):
    spec, params = make_routed(routing={"method": "random", "router": "hashed"}, num_layers=2)
    config = QuantizeConfig(bits=4, router_bits=8)
    assert set(formats_of(spec, config)) == {f"{i}/{name}" for i in range(2) for name in LINEARS}
    new_spec, new_params, _ = quantize_parameters(spec, params, config)
    assert new_spec.routing == spec.routing and "router" not in new_params["layers"][1]


@pytest.mark.slow
def test_mixed_widths_compute_with_the_restored_weights(routed, mixed):
    (spec, params), (new_spec, new_params, reports) = routed, mixed
    np.testing.assert_array_equal(
        new_params["layers"][0]["mlp"]["down"]["kernel"], params["layers"][0]["mlp"]["down"]["kernel"]
    )
    assert [linear.bits for linear in reports[1].linears.values()] == [4] * 6 + [3] and "down" not in reports[0].linears
    formats = new_spec.quantization.formats
    layers = {i: restore_layer(spec, i, layer, formats) for i, layer in new_params["layers"].items()}
    policy = Thresholded(jnp.full((1,), 0.5, jnp.float32))
    expected = run(spec, {**params, "layers": layers}, TOKENS, policy=policy).logits
    np.testing.assert_allclose(run(new_spec, new_params, TOKENS, policy=policy).logits, expected, atol=3e-5)
    assert np.abs(run(spec, params, TOKENS, policy=policy).logits - expected).max() > 0.01


@pytest.mark.slow
def test_mixed_widths_are_saved_and_loaded(mixed, tmp_path):
    spec, params, _ = mixed
    save_model(tmp_path / "model", spec, params)
    loaded = load_model(tmp_path / "model")
    assert loaded.spec == spec and "kernel" in loaded.params["layers"][0]["mlp"]["down"]
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert weight_bytes(loaded.params) == weight_bytes(abstract_parameters(spec))


def refused(spec, message: str, **settings) -> None:
    with pytest.raises(InputError) as error:
        formats_of(spec, QuantizeConfig(**{"bits": 4} | settings))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_refuses_what_does_not_fit_the_model(make_routed, routed, tied):
    spec, dense = routed[0], make_routed(routing=None, num_layers=2)[0]
    names = "the names are LAYER/LINEAR, from 0/query to 1/down"
    refused(spec, f"quantize.rules.1.match='2/*' matches no linear; {names}", rules=[RULES[1], {"match": "2/*"}])
    refused(spec, "rules.0.match='query' matches no linear", rules=[{"match": "query", "bits": 8}])
    refused(spec, "group_size=32 does not divide the 48 inputs of linear '0/down'", group_size=32)
    refused(spec, "; allowed: quantize.group_size=16, or quantize.group_size=-1 (one group)", group_size=32)
    rules = [{"match": "1/down", "group_size": 20}]
    refused(spec, "the 48 inputs of linear '1/down'; allowed: quantize.rules.0.group_size=16, or", rules=rules)
    refused(spec, "every linear in floating point", rules=[{"match": "*", "bits": 16}], embedding_bits=8)
    assert formats_of(dense, QuantizeConfig(router_bits=8)) == formats_of(dense, QuantizeConfig())
    refused(tied[0], "quantize.head_bits=8: the model's head is its embedding; use quantize.embedding", head_bits=8)


@pytest.mark.parametrize("idle", ["embedding_bits", "router_bits", "head_bits", "activation_bits", "rules"])
def test_sixteen_bits_with_settings_that_would_do_nothing_are_refused(idle):
    value = [{"match": "0/*", "bits": 4}] if idle == "rules" else 8
    with pytest.raises(ValidationError, match=f"bits=16 leaves the model as it is, {idle} would do nothing"):
        QuantizeConfig(method="none", bits=16, **{idle: value})


@pytest.mark.slow
@pytest.mark.parametrize("which", ["free", "tied"])
def test_eight_bit_ends_are_close_to_floating_point(routed, tied, which):
    spec, params = {"free": routed, "tied": tied}[which]
    ends = {"embedding_bits": 8, "router_bits": 8} | ({"head_bits": 8} if which == "free" else {})
    new_spec, new_params, _ = quantize_parameters(spec, params, QuantizeConfig(bits=8, **ends))
    assert set(new_params["embedding"]) == set(new_params.get("head", {"quantized": 0})) == {"quantized"}
    dense, everything = run(spec, params, TOKENS), run(new_spec, new_params, TOKENS, policy=Dense())
    for found, expected in (
        (everything.logits, dense.logits),
        (everything.routing.logits, dense.routing.logits),
    ):
        error = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
        assert 1e-4 < error < 0.05
    # Theta 0 executes everything, bit for bit.
    zero = run(new_spec, new_params, TOKENS, policy=Thresholded(jnp.zeros((1,), jnp.float32)))
    np.testing.assert_array_equal(zero.logits, everything.logits)
    if which == "tied":
        prompt = "first largest 12 14 25"
        model = Model(new_spec, new_params, reasoning.tokenizer(), {})
        found = model.generate([prompt], 3)[0]
        ids = model.tokenizer([prompt], add_special_tokens=False)["input_ids"][0]
        ids = [model.tokenizer.bos_token_id, *ids] if model.tokenizer.bos_token_id is not None else ids
        for token in found.tokens:  # what the forward pass over the whole text says comes next
            assert token == int(model.forward([ids]).logits[0, -1].argmax())
            ids.append(token)
