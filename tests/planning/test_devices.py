"""The table of devices, and the topologies that it allows."""

import pytest

from qtale_jax.errors import InputError
from qtale_jax.models.cost import PEAK_BF16
from qtale_jax.planning.devices import DEVICES, topologies, topology


@pytest.mark.parametrize(
    ("text", "count"),
    [("v5e:1x1", 1), ("v5e:4x4", 16), ("v5p:2x2x2", 8), ("v6e:2x4", 8), ("h100:8", 8), ("a100:16", 16)],
)
def test_topologies_count_their_devices(text, count):
    found = topology(text)
    assert (found.name, found.count) == (text, count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h10:8", r"plan.topology='h10:8': unknown device kind \(did you mean 'h100'\?\); allowed: kind:shape with"),
        ("v5e", "v5e does not come in this shape; allowed: 1x1, 2x2"),
        ("v5e:3x3", "v5e does not come in this shape; allowed: 1x1, 2x2"),
        ("v5p:4x4", "v5p does not come in this shape; allowed: 2x2x1"),
        ("h100:2x4", "allowed: h100: and 1 to 8 devices, or a multiple of 8"),
        ("h100:0", "allowed: h100: and 1 to 8"),
        ("h200:12", "or a multiple of 8"),
        ("", "unknown device kind"),
    ],
)
def test_others_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        topology(text)


@pytest.mark.parametrize("kind", DEVICES)
def test_candidates_grow_and_can_be_named(kind):
    found = topologies(DEVICES[kind])
    counts = [candidate.count for candidate in found]
    assert counts == sorted(set(counts)) and counts[-1] >= 256
    assert [topology(candidate.name) for candidate in found] == found


def test_peaks_are_those_that_training_logs_by():
    names = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "a100": "NVIDIA A100", "h100": "NVIDIA H100"}
    assert {kind: DEVICES[kind].bf16 for kind in names} == {kind: PEAK_BF16[name] for kind, name in names.items()}


def test_beyond_a_node_the_network_is_what_counts():
    assert topology("h100:8").link == DEVICES["h100"].link > topology("h100:16").link == DEVICES["h100"].network
    assert topology("v5e:16x16").link == DEVICES["v5e"].link
