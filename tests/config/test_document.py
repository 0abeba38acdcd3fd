"""Plain-data side of the configuration: YAML reading, merging, assignments."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.config.document import assign, merge, parse_assignment, parse_yaml, read_document
from qtale_jax.errors import InputError


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("-2E4", -2e4), (".5e-2", 5e-3), ("3.e2", 300.0), ("1e-3x", "1e-3x"), ("e5", "e5"), ("10", 10)],
)
def test_exponents_are_numbers_without_a_point(text, value):
    read = parse_yaml(text, "here")
    assert read == value
    assert type(read) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_writes_is_read_back(value):
    assert parse_yaml(repr(value), "here") == value


def test_duplicate_keys_are_refused_with_their_line():
    with pytest.raises(InputError, match=r"^here, line 4: invalid YAML: duplicate key 'steps'$"):
        parse_yaml("train:\n  steps: 1\n  epochs: 2\n  steps: 3\n", "here")


def test_anchors_and_merge_keys_still_work():
    read = parse_yaml("a: &x {one: 1, two: 2}\nb:\n  <<: *x\n  two: 3\n", "here")
    assert read["b"] == {"one": 1, "two": 3}


def test_invalid_yaml_names_the_line():
    with pytest.raises(InputError, match=r"^here, line 3: invalid YAML: "):
        parse_yaml("train:\n  steps: 1\n batch: [2\n", "here")


@pytest.mark.parametrize(
    "text", ["\x00", "2024-13-45", "--- 1\n--- 2\n", "!!python/object:os.system {}", "? [1, 2]: 3"]
)
def test_what_yaml_cannot_construct_is_one_line(text):
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "here")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"# only a comment\n", "the file is empty"),
        (b"- 1\n- 2\n", "found a list at the top"),
        (b"just text\n", "found a str at the top"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        (b"extends: [a, b]\n", r"extends: found \['a', 'b'\]; allowed: the name of one YAML file"),
        (b"extends: nowhere.yaml\n", "extends: no such file: .*nowhere.yaml"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_document(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("seed: 1\n")
    with pytest.raises(InputError, match=r"no such configuration file; there is .*quickstart\.yaml"):
        read_document(tmp_path / "quickstar.yaml")
    with pytest.raises(InputError, match="no such configuration file$"):
        read_document(tmp_path / "empty" / "x.yaml")


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_document(tmp_path)


def test_extends_merges_deeply_and_remembers_where_values_are_from(tmp_path):
    (tmp_path / "shared").mkdir()
    base, child = tmp_path / "shared" / "base.yaml", tmp_path / "child.yaml"
    base.write_text("train: {steps: 5, batch_size: 8}\nlora: {rank: 2}\nseed: 3\n")
    child.write_text("extends: shared/base.yaml\ntrain: {steps: 7}\nlora: null\n")
    document = read_document(child)
    assert document.values == {"train": {"steps": 7, "batch_size": 8}, "lora": None, "seed": 3}
    assert document.origin(("train", "steps"), "-") == str(child)
    assert document.origin(("train", "batch_size"), "-") == str(base)
    assert document.origin(("lora",), "-") == str(child)
    assert document.origin((), "-") == "-"


def test_extends_in_a_circle_is_refused(tmp_path):
    for name, parent in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {parent}.yaml\n")
    with pytest.raises(InputError, match=r"a\.yaml: 'extends' leads back to this file through c\.yaml"):
        read_document(tmp_path / "a.yaml")


nested = st.recursive(
    st.integers() | st.none() | st.text(max_size=3),
    lambda children: st.dictionaries(st.sampled_from(["a", "b", "c"]), children, max_size=3),
    max_leaves=5,
)
mappings = st.dictionaries(st.sampled_from(["a", "b", "c"]), nested, max_size=3)


@pytest.mark.slow
@given(mappings, mappings)
def test_merging_keeps_what_the_later_says_and_what_only_the_earlier_has(base, over):
    merged = merge(base, over)
    assert set(merged) == set(base) | set(over)
    assert merge(merged, over) == merged
    assert merge(base, {}) == base
    assert merge({}, over) == over
    for key in set(base) - set(over):
        assert merged[key] == base[key]


def test_merging_changes_neither_side():
    base, over = {"a": {"b": [1]}}, {"a": {"c": [2]}}
    merge(base, over)["a"]["b"].append(3)
    assert base == {"a": {"b": [1]}}
    assert over == {"a": {"c": [2]}}


def test_null_removes_an_inherited_method():
    base = {"experiment": {"methods": {"dense": {}, "dllm": {}, "qtale": {}}}}
    assert merge(base, {"experiment": {"methods": {"dllm": None}}}) == {
        "experiment": {"methods": {"dense": {}, "qtale": {}}}
    }


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("train.steps=null", ("train", "steps"), None),
        ("lora.targets=[query,value]", ("lora", "targets"), ["query", "value"]),
        ("train.optimizer.learning_rate=1e-3", ("train", "optimizer", "learning_rate"), 1e-3),
        ("output=runs/a=b", ("output",), "runs/a=b"),
        ("experiment.title=''", ("experiment", "title"), ""),
    ],
)
def test_assignments(text, path, value):
    assert parse_assignment(text) == (path, value)


@pytest.mark.parametrize(
    "text", ["seed", "=3", "a..b=3", "train.=3", "seed=", "seed= ", "seed=[1,", "seed={a: 1, a: 2}"]
)
def test_malformed_assignments(text):
    with pytest.raises(InputError, match="^command line: "):
        parse_assignment(text)


def test_assigning_makes_sections_and_goes_into_lists():
    values = {"quantizers": [{"bits": 4}, {"bits": 3}], "lora": None}
    assign(values, ("quantizers", "1", "bits"), 2, {})
    assign(values, ("lora", "rank"), 4, {})
    assign(values, ("new", "deep", "key"), 5, {})
    assert values == {"quantizers": [{"bits": 4}, {"bits": 2}], "lora": {"rank": 4}, "new": {"deep": {"key": 5}}}


def test_assigning_into_a_default_container_keeps_its_other_entries():
    values = {}
    assign(values, ("experiment", "methods", "dllm", "seed"), 1, {"experiment": {"methods": {"dense": {}, "dllm": {}}}})
    assert values == {"experiment": {"methods": {"dense": {}, "dllm": {"seed": 1}}}}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("quantizers", "1", "bits"), "quantizers: found index '1'; allowed: 0 to 0"),
        (("quantizers", "x"), "quantizers: found index 'x'; allowed: 0 to 0"),
        (("seed", "deep"), "seed.deep: seed holds 3, no section"),
    ],
)
def test_assigning_where_nothing_can_be(path, message):
    with pytest.raises(InputError, match=f"^command line: {message}$"):
        assign({"quantizers": [{}], "seed": 3}, path, 1, {})
