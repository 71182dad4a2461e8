"""The experiment on progressive networks: its sequences, what its methods may know, and a real run."""

import json
from typing import get_args

import numpy as np
import pytest

from experiments.progressive import study as experiment
from experiments.progressive.columns import Progressive as Columns
from experiments.progressive.config import Progressive
from experiments.progressive.methods import METHODS, Method
from experiments.progressive.single_network import PackNet
from experiments.progressive.study import METRICS, run
from experiments.progressive.task_sequences import TaskSequence, _mlp, prepare_tasks
from experiments.progressive.training import Trainer
from experiments.progressive.trial import Trial
from jtl import progressive, tree
from jtl.continual import packnet
from jtl.data import Arrays
from jtl.outputs import predict

T, CLASSES = 3, 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tasks": 1}, "--tasks must be at least 2"),
        ({"steps": 5}, "--steps must be at least 10"),
        ({"data": ("mnist5k",)}, "--data needs two data sets or more"),
        ({"data": ("mnist5k", "rotten_tomatoes")}, "--data rotten_tomatoes holds texts"),
    ],
)
def test_bad_flags_are_named(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(Progressive(out=tmp_path, **flags))


def test_every_name_of_the_command_line_is_a_method():
    assert tuple(METHODS) == get_args(Method)


def test_sequences_of_digits():
    options = {"hidden": (8,), "tasks": 4, "train": 60, "seed": 0, "limits": {"validation": 20, "test": 30}}
    split = prepare_tasks("split_mnist", **options)
    assert split.names[1] == "2_or_3" and split.classes == 2 and not split.shared and len(split.names) == 4
    for i, task in enumerate(split.splits):
        assert [len(task[s]) for s in ("train", "validation", "test")] == [60, 20, 30]
        assert set(task["train"].arrays["label"]) == {0, 1} and set(task["test"].arrays["task"]) == {i}
    permuted = prepare_tasks("permuted_mnist", **options)
    first, second = (task["test"].arrays for task in permuted.splits[:2])
    np.testing.assert_array_equal(first["label"], second["label"])
    assert (first["x"] != second["x"]).any()
    np.testing.assert_array_equal(np.sort(first["x"], 1), np.sort(second["x"], 1))
    turned = prepare_tasks("rotated_mnist", **options)
    assert turned.names == ("0_degrees", "15_degrees", "30_degrees", "45_degrees")
    assert np.abs(turned.splits[2]["test"].arrays["x"] - first["x"]).max() > 0.5
    np.testing.assert_array_equal(turned.splits[0]["test"].arrays["x"], first["x"])


@pytest.fixture(scope="module")
def trial():
    """Three small tasks of 784 inputs: class means that differ by task."""
    rng = np.random.default_rng(0)
    splits = []
    for task in range(T):
        means = rng.normal(size=(CLASSES, 784))

        def rows(count, means=means, task=task):
            label = np.arange(count, dtype=np.int32) % CLASSES
            x = means[label] + rng.normal(size=(count, 784))
            return Arrays({"x": x.astype(np.float32), "label": label, "task": np.full(count, task, np.int32)})

        splits.append({"train": rows(64), "validation": rows(32), "test": rows(32)})
    tasks = TaskSequence("toy", ("a", "b", "c"), tuple(splits), CLASSES, False,
                  lambda key: _mlp((9, 8), key), 8, "dense_.*", "dense_.*")  # fmt: skip
    return Trial(tasks, 10, 16, 0, 30.0)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return Trainer(
        Progressive(out=tmp_path_factory.mktemp("out"), steps=10, hidden=(9, 8), learning_rate=0.01)
    )


@pytest.mark.parametrize("name", [n for n in METHODS if n != "joint"])
def test_no_method_sees_a_later_task_or_more_of_an_earlier_one_than_it_remembers(trial, name):
    """Batches hold the rows of the current task, and of earlier ones the remembered rows alone."""
    method = METHODS[name](trial)
    memory = {t: {tuple(x[:4]) for x in trial.remembered(t).arrays["x"]} for t in range(T)}
    for task in range(2):
        learning = method.learn(task)
        recipe = next(learning)
        while True:
            for batch in list(recipe.batches):
                for part in batch.values() if "memory" in batch else [batch]:
                    for row, owner in zip(part["x"], part["task"], strict=True):
                        assert owner == task or (owner < task and tuple(row[:4]) in memory[owner])
            if name == "si":
                method.state = _tracked(recipe.model)
            try:
                recipe = learning.send(recipe.model)
            except StopIteration:
                break


def _tracked(model):
    import optax

    from jtl import finetune

    return finetune.track(optax.sgd(0.1)).init(model.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["separate", "progressive", "progressive_linear", "head", "packnet", "lora"])
def test_methods_with_leaves_of_each_tasks_own_forget_exactly_nothing(trial, trainer, name):
    method = METHODS[name](trial)
    tests = [split["test"].batch(np.arange(32)) for split in trial.tasks.splits]
    said = []
    for task in range(T):
        trainer.learn(method, task, trial.tasks)
        said.append([predict(method.view(j), [tests[j]])[0] for j in range(task + 1)])
    for task in range(T):
        for j in range(task + 1):
            np.testing.assert_array_equal(said[task][j], said[j][j])
    assert method.parameters > 0


@pytest.mark.slow
def test_a_row_has_what_the_summary_needs(trial, trainer):
    rows = []
    for name in ("separate", "progressive", "joint"):
        row, curves = trainer.row(name, trial)
        rows.append({**row, "sequence": "toy", "arm": name, "seed": 0})
        assert {p["task"] for p in curves} == ({"a"} if name == "joint" else {"a", "b", "c"})
    scored = {row["arm"]: experiment._scored(row, rows) for row in rows}
    assert scored["separate"]["scores"] == [1.0] * T and scored["separate"]["transfer_score"] == 1.0
    # The first column is the first separate network, and each later one begins as a separate network does.
    assert scored["progressive"]["scores"][0] == 1.0
    assert scored["progressive"]["bwt"] == 0 and scored["progressive"]["fwt"] == 0
    assert set(METRICS) - scored["joint"].keys() == {"bwt", "fwt", "transfer_score"}
    for shares in scored["progressive"]["sensitivity"].values():
        assert len(shares) == T and np.isclose(sum(shares), 1)


def test_progressive_columns_start_as_the_separate_networks(trial):
    method = Columns(trial)
    model = method.grown(1)
    for path, leaf in tree.flatten(progressive.single_column(model, 2).params).items():
        np.testing.assert_array_equal(leaf, tree.flatten(trial.column(1).params)[path])


def test_packnet_deals_all_weights_out(trial, trainer):
    method = PackNet(trial)
    for task in range(T):
        trainer.learn(method, task, trial.tasks)
    owner = np.asarray(method.model.variables["packnet"]["owner"]["dense_0"]["kernel"])
    share = [np.mean(owner == task + 1) for task in range(T)]
    np.testing.assert_allclose(share, [0.5, 0.25, 0.25], atol=0.01)
    with pytest.raises(ValueError, match="no weight belongs to task 4"):
        packnet.select(method.model, 4)


@pytest.mark.slow
def test_every_method_on_digits(tmp_path):
    config = Progressive(out=tmp_path, quick=True, sequence=("split_mnist", "digits"), method=tuple(METHODS))
    result = run(config)
    assert list(result.summary["average_accuracy_digits"]) == list(METHODS)
    assert result.summary["bwt_digits"]["progressive"]["mean"] == 0
    pictures = {path.stem for path in tmp_path.glob("*.png") if path.stat().st_size > 5_000}
    kinds = (
        "with_and_without_laterals",
        "sensitivity",
        "accuracy_of_every_task_after_every_task",
        "parameters",
    )
    assert {f"digits_{kind}" for kind in kinds} <= pictures
    again = run(Progressive(out=tmp_path, quick=True, sequence=("split_mnist", "digits"), method=tuple(METHODS),
                            resume=True))  # fmt: skip
    assert again.rows == result.rows
    assert json.loads((tmp_path / "result.json").read_text())["summary"] == json.loads(
        json.dumps(result.summary)
    )


@pytest.mark.slow
def test_a_transformer_on_newsgroups(tmp_path):
    result = run(Progressive(out=tmp_path, quick=True, sequence=("newsgroups",), method=("progressive",)))
    assert result.summary["bwt_newsgroups"]["progressive"]["mean"] == 0
    (row,) = [row for row in result.rows if row["arm"] == "progressive"]
    assert set(row["sensitivity"]) == {"encoder/layer_1", "head"}
