import jax
import jax.numpy as jnp
import pytest

from jtl import tree

PARAMS = {"encoder": {"layer_0": {"kernel": 1, "bias": 2}}, "head": {"out": {"kernel": 3}}}


def test_flatten_and_nest_are_inverse():
    flat = tree.flatten(PARAMS)
    assert flat == {"encoder/layer_0/bias": 2, "encoder/layer_0/kernel": 1, "head/out/kernel": 3}
    assert tree.nest(flat) == PARAMS


@pytest.mark.parametrize("leaves", [{"a": 1, "a/b": 2}, {"a/b": 2, "a": 1}])
def test_nest_refuses_a_leaf_that_is_a_branch(leaves):
    with pytest.raises(ValueError, match="'a'"):
        tree.nest(leaves)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([(".*", 0)], [0, 0, 0]),
        ([("head/.*", 1), (".*", 0)], [0, 0, 1]),
        ([(".*/kernel", 5), (".*/bias", 6)], [6, 5, 5]),
        ([(".*/bias", 6), (".*", 7)], [6, 7, 7]),
        ([("encoder/.*", 1), ("head/.*", 2), (".*", 9)], [1, 1, 2]),
    ],
)
def test_first_match_wins(rules, expected):
    assert jax.tree.leaves(tree.assign(rules, PARAMS)) == expected


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("head/.*", 1)], r"no rule covers 2 of 3 leaves: 'encoder/layer_0/bias'"),
        ([("hed/.*", 1), (".*", 0)], r"'hed/\.\*' meets no leaf \(near misses: 'head', 'encoder'\)"),
        ([("head", 1), (".*", 0)], r"rules match whole paths; '\.\*head\.\*' would meet 'head/out/kernel'"),
        ([(".*", 0), ("head/.*", 1)], r"rule 'head/\.\*' is hidden"),
    ],
)
def test_misfits_raise(rules, message):
    with pytest.raises(tree.RuleError, match=message):
        tree.assign(rules, PARAMS)


def test_partition_and_combine_are_inverse():
    mask = tree.matches(".*/kernel", PARAMS)
    chosen, rest = tree.partition(PARAMS, mask)
    assert jax.tree.leaves(chosen) == [1, 3] and jax.tree.leaves(rest) == [2]
    assert tree.combine(chosen, rest) == PARAMS == tree.combine(rest, chosen)


def test_overlay_adds_and_never_replaces_in_silence():
    assert tree.overlay(PARAMS, {"head": {"out": {"bias": 4}}})["head"]["out"] == {"kernel": 3, "bias": 4}
    with pytest.raises(ValueError, match="'head/out/kernel'"):
        tree.overlay(PARAMS, {"head": {"out": {"kernel": 9}}})
    assert tree.overlay(PARAMS, {"head": {"out": {"kernel": 9}}}, replace=True)["head"]["out"]["kernel"] == 9
    assert PARAMS["head"]["out"] == {"kernel": 3}


def test_remove():
    assert tree.remove("head/.*", PARAMS) == {"encoder": PARAMS["encoder"]}


def test_diff_names_every_change():
    before = {"a": jnp.zeros(2), "b": jnp.zeros(1), "c": jnp.zeros(3)}
    after = {"a": jnp.zeros(2, int), "c": jnp.zeros(3), "d": jnp.zeros((1, 2))}
    assert tree.diff(before, after) == ["~ a: float32[2] -> int32[2]", "- b: float32[1]", "+ d: float32[1,2]"]


def test_arithmetic():
    a, b = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 6.0])}
    assert tree.interpolate(a, b, 0.25)["w"].tolist() == [1.5, 3.0]
    assert tree.size({"a": jnp.zeros((2, 3)), "b": jnp.zeros(())}) == 7
    assert float(tree.vdot(a, b)) == 15.0


def test_keys_of_leaves_do_not_depend_on_other_leaves(key):
    one, two = tree.fold_path(key, "a/b"), tree.fold_path(key, "a/c")
    assert (jax.random.key_data(one) != jax.random.key_data(two)).any()
    assert (jax.random.key_data(one) == jax.random.key_data(tree.fold_path(key, "a/b"))).all()
