"""Training that skips (`train.skipped_share`) against masked training: time of a step, and what the sample adds to it.

    python benchmarks/train_skip.py --output benchmarks/results/train_skip_cpu.json

Routers of a random Llama execute half of the tokens in each routed layer. The routers' gradient of the cross-entropy
is taken for one batch under masked execution, and again and again with other samples of the skipped tokens: without a
bias the mean of n gradients is off by the root of their variance over n. The variance is compared with that which the
masked gradient has already, from other tokens and other noise of the routers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from harness import Row, in_turns, parser, report
from jaxtyping import Array, Float, PRNGKeyArray
from train import HUNDRED_MILLION, SMALLER, Step, configuration

from qtale_jax.config import with_overrides
from qtale_jax.models.forward import run_trunk
from qtale_jax.models.policy import Sampled
from qtale_jax.models.skipping import Skipping
from qtale_jax.training import head
from qtale_jax.training.optimizer import Flat, nest

SHARES = (1 / 8, 1 / 4)
ROWS, LENGTH = 4, 256


def step(shape: dict[str, int], share: float | None) -> Step:
    """A step whose routers execute half of the tokens, and stay as they are."""
    train = {"skipped_share": share, "optimizer": {"learning_rate": 1e-12}}
    made = Step(with_overrides(configuration(shape, ROWS, LENGTH), {"train": train}))
    path = "layers/routed/router/output"
    undecided = {f"{path}/bias": 0.0, f"{path}/kernel": 0.1}  # layers would differ more than a trained model's tokens
    for name, factor in undecided.items():
        made.state.trainable[name] = factor * made.state.trainable[name]
    return made


def speeds(rounds: int) -> list[Row]:
    """Tokens per second of both models."""
    rows = []
    models = {"8 layers, d 512": SMALLER, "100 M, 12 layers, d 768": HUNDRED_MILLION}
    for name, shape in models.items():
        steps = {share: step(shape, share) for share in (None, *SHARES)}
        times = in_turns({str(share): made for share, made in steps.items()}, rounds)
        masked = f"{name}, {ROWS} x {LENGTH}, masked"
        rate = ROWS * LENGTH / times["None"]
        rows.append(Row(masked, rate, "tokens/s"))
        for share in SHARES:
            found = ROWS * LENGTH / times[str(share)]
            rows.append(Row(f"{name}, skipped share {share:g}", found, "tokens/s", masked, found / rate))
        rows += [
            Row(f"{name}, {share and f'skipped share {share:g}' or 'masked'}, compiling", made.compile_seconds, "s")
            for share, made in steps.items()
        ]
    return rows


def router_gradient(made: Step, share: float | None) -> Callable[..., Float[Array, " n"]]:
    """The routers' gradient of the mean cross-entropy, of tokens, the key of noise and that of samples."""
    spec, frozen, everything = made.start.spec, made.start.frozen, made.state.trainable
    routers = {name: leaf for name, leaf in everything.items() if "/router/" in name}

    def loss(routers: Flat, tokens: Array, noise: PRNGKeyArray, sample: PRNGKeyArray) -> Array:
        params, ones = nest(everything | routers, frozen), jnp.ones(tokens.shape, jnp.int32)
        skipping = None if share is None else Skipping(sample, share)
        hidden, *_ = run_trunk(spec, params, tokens, segment_ids=ones, policy=Sampled(noise), skipping=skipping)
        weights = ones.astype(jnp.float32)
        given = head.Given(head.needed(params), jnp.sum(weights))
        positions = head.Positions(jnp.roll(tokens, -1, axis=1), weights)
        return head.losses(head.Head(spec), hidden, given, positions, trained=False)[0]

    @jax.jit
    def gradient(tokens: Array, noise: PRNGKeyArray, sample: PRNGKeyArray) -> Array:
        return jnp.concatenate([leaf.ravel() for leaf in jax.grad(loss)(routers, tokens, noise, sample).values()])

    return gradient


def noise(count: int) -> list[Row]:
    """Bias of the routers' gradient against its standard error, and variance against that of the masked gradient."""
    made = step(SMALLER, None)
    keys = jax.random.split(jax.random.key(2), count)

    def tokens(key: PRNGKeyArray) -> Array:
        return jax.random.randint(key, (ROWS, LENGTH), 3, 32000, jnp.int32)

    def variance(gradients: list[np.ndarray]) -> float:
        return float(np.sum(np.var(np.stack(gradients), axis=0, ddof=1)))

    def found(gradient: Callable, *arguments: Array) -> np.ndarray:
        return np.asarray(gradient(*arguments), np.float64)

    masked = router_gradient(made, None)
    own = variance([found(masked, tokens(key), key, key) for key in keys])
    expected = found(masked, tokens(keys[0]), keys[0], keys[0])
    length = float(np.linalg.norm(expected))
    rows = [Row("routers' masked gradient, standard deviation over its length", own**0.5 / length, "")]
    for share in SHARES:
        gradient = router_gradient(made, share)
        samples = [found(gradient, tokens(keys[0]), keys[0], key) for key in keys]
        more, name = variance(samples), f"skipped share {share:g}"
        error, usual = float(np.linalg.norm(np.mean(samples, axis=0) - expected)), (more / count) ** 0.5
        rows += [
            Row(f"{name}, error of the mean of {count} gradients over its length", error / length, ""),
            Row(f"{name}, the same of an unbiased mean", usual / length, ""),
            Row(f"{name}, variance that the sample adds over that of the masked gradient", more / own, ""),
        ]
    return rows


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--samples", type=int, default=24, help="gradients for each share (default 24)")
    given = arguments.parse_args()
    report("train_skip", [*speeds(given.rounds), *noise(given.samples)], given.output)


if __name__ == "__main__":
    main()
