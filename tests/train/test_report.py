"""Statistics against SciPy, result files against the JSON standard, figures against what they were given."""

import json
import math
import re
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jtl.report import figures, report, result
from jtl.report.figures import style

ROWS = [
    {"arm": arm, "seed": seed, "size": size, "accuracy": base + 0.1 * seed + 0.01 * math.log(size)}
    for seed in range(3)
    for size in (64, 256)
    for arm, base in (("full", 0.6), ("scratch", 0.5 - 0.02 * seed))
]
AT_64 = [row for row in ROWS if row["size"] == 64]


def found(rows=AT_64, metrics=("accuracy",)):
    config = {"technique": "full", "rate": 5e-5}
    return report.Result(
        "finetune", config, report.environment(), 75.0, rows, report.summarise(rows, metrics)
    )


# statistics


def test_interval_is_students():
    values = [0.81, 0.84, 0.79, 0.88]
    own = report.estimate(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    np.testing.assert_allclose(
        [own["mean"] - own["ci95"], own["mean"] + own["ci95"]], [low, high], rtol=1e-12
    )
    assert own["n"] == 4


def test_one_value_has_no_interval_and_a_diverged_run_no_mean():
    assert report.estimate([0.5]) == {"mean": 0.5, "ci95": None, "n": 1}
    assert report.estimate([0.5, math.nan, 0.6]) == {"mean": None, "ci95": None, "n": 3}
    assert report.estimate([0.5, None]) == {"mean": None, "ci95": None, "n": 2}


def test_summarise_by_arm():
    rows = [*AT_64, {"arm": "majority", "accuracy": 0.5}]
    rows[0] = {**rows[0], "seconds": 7.0}
    summary = report.summarise(rows, ["accuracy", "seconds"])
    assert list(summary["accuracy"]) == ["full", "scratch", "majority"]
    assert summary["accuracy"]["full"] == report.estimate(r["accuracy"] for r in AT_64 if r["arm"] == "full")
    assert summary["seconds"] == {"full": {"mean": 7.0, "ci95": None, "n": 1}}


def test_summarise_refuses_to_pool_settings_and_unknown_metrics():
    with pytest.raises(ValueError, match="'full' has several rows of seed 0"):
        report.summarise(ROWS, ["accuracy"])
    with pytest.raises(KeyError, match="'acuracy'.*accuracy"):
        report.summarise(AT_64, ["acuracy"])


def test_paired_difference_is_the_paired_t_interval():
    own = report.paired_difference(ROWS, "accuracy", "full", "scratch")
    a, b = ([r["accuracy"] for r in ROWS if r["arm"] == arm] for arm in ("full", "scratch"))
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose([own["mean"] - own["ci95"], own["mean"] + own["ci95"]], interval, rtol=1e-9)
    assert own["n"] == 6
    shuffled = report.paired_difference(ROWS[::-1], "accuracy", "full", "scratch")
    np.testing.assert_allclose(shuffled["ci95"], own["ci95"], rtol=1e-9)


def test_paired_difference_names_what_does_not_pair():
    with pytest.raises(ValueError, match="seed 2, size 256"):
        report.paired_difference(ROWS[:-1], "accuracy", "full", "scratch")
    with pytest.raises(ValueError, match="'full' has several rows with seed 0"):
        report.paired_difference(ROWS, "accuracy", "full", "scratch", over=("seed",))
    with pytest.raises(ValueError, match="no row of arm 'lora'"):
        report.paired_difference(ROWS, "accuracy", "full", "lora")


# result.json


def test_result_survives_the_file(tmp_path):
    written = found()
    path = report.write_result(tmp_path, written)
    assert report.read_result(tmp_path) == written == report.read_result(path)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]
    keys = list(json.loads(path.read_text()))
    assert keys == ["experiment", "config", "environment", "seconds", "rows", "summary"]


def test_result_file_is_strict_json(tmp_path):
    row = {
        "arm": "full",
        "loss": float("nan"),
        "b": np.float32(0.5),
        "c": jnp.arange(2),
        "d": [math.inf, True],
    }
    path = report.write_result(tmp_path, report.Result("x", {"out": tmp_path}, {}, np.float64(1.0), [row]))

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    values = json.loads(path.read_text(), parse_constant=refuse)
    assert values["rows"] == [{"arm": "full", "loss": None, "b": 0.5, "c": [0, 1], "d": [None, True]}]
    assert values["seconds"] == 1.0


def test_failed_write_leaves_the_old_file(tmp_path):
    path = report.write_result(tmp_path, found())
    before = path.read_bytes()
    with pytest.raises(TypeError, match="object"):
        report.write_result(tmp_path, report.Result("x", {"a": object()}, {}, 1.0, []))
    with pytest.raises(UnicodeEncodeError):
        report.write_result(tmp_path, report.Result("\udc80", {}, {}, 1.0, []))
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_unreadable_results_are_named(tmp_path):
    (tmp_path / "half.json").write_text('{"experiment": "fine')
    with pytest.raises(ValueError, match=r"half\.json is not JSON"):
        report.read_result(tmp_path / "half.json")
    (tmp_path / "other.json").write_text('{"experiment": "finetune"}')
    with pytest.raises(ValueError, match="expected the fields.*found.*experiment"):
        report.read_result(tmp_path / "other.json")


def test_environment_names_versions_and_no_machine():
    import getpass
    import platform

    import jax

    own = report.environment()
    assert own["jax"] == jax.__version__ and own["python"] == platform.python_version()
    assert own["devices"]["count"] == 8 and own["devices"]["platform"] == "cpu" and own["cpu_count"] >= 1
    text = json.dumps({name: value for name, value in own.items() if name != "system"})
    assert platform.node() not in text and f"/{getpass.getuser()}" not in text and "/" not in text


def test_commit_is_that_of_the_source_alone(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    source = tmp_path / "result.py"
    source.write_text("1")
    monkeypatch.setattr(result, "__file__", str(source))
    assert result._commit() is None
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "another's"], check=True)
    assert result._commit() is None
    subprocess.run([*git, "add", "result.py"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    assert re.fullmatch("[0-9a-f]{40}", result._commit())
    source.write_text("2")
    assert result._commit().endswith("+changes")


# report.md


def test_tables_keep_their_cells_whole():
    lines = report.table(["name", "value"], [["a|b *c*\nd", 0.5], ["lp_ft", None]]).splitlines()
    assert lines[1] == "| --- | ---: |"
    assert lines[2] == r"| a\|b \*c\* d | 0.500 |"
    assert lines[3] == "| lp_ft | – |"


def test_summary_table_shows_n_where_it_differs():
    assert "n = 3." in report.summary_table(report.summarise(AT_64, ["accuracy"]))
    rows = [*AT_64, {"arm": "majority", "accuracy": 0.5}]
    text = report.summary_table(report.summarise(rows, ["accuracy"]))
    assert "| majority | 0.500 (n = 1) |" in text and "(n = 3) |" in text


def test_confident_errors_are_the_surest_wrong_ones():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), 50)
    true = rng.integers(0, 3, 50)
    text = report.confident_errors(
        [f"text {i}" for i in range(50)], true, probabilities, ["a", "b", "c"], count=5
    )
    wrong = [i for i in range(50) if np.argmax(probabilities[i]) != true[i]]
    expected = sorted(wrong, key=lambda i: -max(probabilities[i]))[:5]
    assert [int(i) for i in re.findall(r"text (\d+)", text)] == expected
    assert report.confident_errors(["x"], [0], [[0.9, 0.1]], ["a", "b"]) == "No errors among 1 examples."


def test_report_embeds_its_figures(tmp_path):
    path = report.write_report(
        tmp_path, found(), title="Fine-tuning", about="What was asked.", command="python -m experiments.finetune",
        sections=[report.Section("Accuracy & labels", "Read it so.", figures.over_sizes(ROWS, "accuracy"))],
        notes=["One split."],
    )  # fmt: skip
    text = path.read_text()
    picture = re.search(r"!\[.*\]\((.*)\)", text).group(1)
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for part in ("# Fine-tuning", "```\npython -m experiments.finetune\n```", "| full | 0.742 ±", "* One split.",
                 "5e-05", "1 min 15 s", "devices.count"):  # fmt: skip
        assert part in text


# figures


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


@pytest.mark.filterwarnings("error")
def test_learning_curves_draw_means_over_seeds():
    rows = [
        {"arm": "full", "seed": s, "step": k, "loss": s + 1 / (k + 1)} for s in (0, 2) for k in range(250)
    ]
    rows += [
        {"arm": "full", "seed": s, "step": k, "validation_accuracy": 0.1 * s + k / 1000}
        for s in (0, 2)
        for k in (0, 250)
    ]
    left, right = figures.learning_curves(rows, points=50).axes
    np.testing.assert_allclose(lines(right)["full"].get_ydata(), [0.1, 0.35])
    loss = lines(left)["full"]
    expected = (1 + 1 / (np.arange(250) + 1)).reshape(50, 5).mean(1)
    np.testing.assert_allclose(loss.get_xdata(), np.arange(250).reshape(50, 5).mean(1))
    np.testing.assert_allclose(loss.get_ydata(), expected)


@pytest.mark.filterwarnings("error")
def test_curves_over_sizes_with_one_seed_or_many():
    (axes,) = figures.over_sizes(ROWS, "accuracy").axes
    containers = {c.get_label(): c for c in axes.containers}
    mean = [
        np.mean([r["accuracy"] for r in ROWS if r["arm"] == "full" and r["size"] == s]) for s in (64, 256)
    ]
    np.testing.assert_allclose(containers["full"].lines[0].get_ydata(), mean)
    assert axes.get_xscale() == "log" and [t.get_text() for t in axes.get_xticklabels()] == ["64", "256"]
    one = [{**row, "seconds": row["size"] / 10} for row in ROWS if row["seed"] == 0]
    assert figures.png(figures.over_sizes(one, "seconds", "time (s)", log_y=True)).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no row has both 'size' and 'second'"):
        figures.over_sizes(one, "second")


@pytest.mark.filterwarnings("error")
def test_curves_over_rates_weights_and_parameters():
    rows = [{**row, "learning_rate": row["size"] / 1e5, "weight": row["size"] / 256, "trained_parameters": row["size"]}
            for row in ROWS]  # fmt: skip
    (rates,) = figures.over_rates(rows, "accuracy").axes
    assert [t.get_text() for t in rates.get_xticklabels()] == [
        "0.00064",
        "0.0026",
    ] and rates.get_xscale() == "log"
    (weights,) = figures.over_weights(rows, "accuracy").axes
    assert [t.get_text() for t in weights.get_xticklabels()] == [
        "0.2",
        "1.0",
    ] and weights.get_xscale() == "linear"
    one = [row for row in rows if row["size"] == 64]
    left, right = figures.over_parameters(one, "accuracy").axes
    means = {
        arm: np.mean([row["accuracy"] for row in one if row["arm"] == arm]) for arm in ("full", "scratch")
    }
    names = [tick.get_text() for tick in left.get_yticklabels()]
    assert names == sorted(means, key=means.__getitem__) and right.get_xscale() == "log"


@pytest.mark.filterwarnings("error")
def test_gap_is_train_minus_test():
    rows = [{**row, "train_accuracy": 0.95} for row in AT_64]
    (axes,) = figures.gap_bars([*rows, {"arm": "majority", "accuracy": 0.5}]).axes
    heights = {c.get_label(): c[0].get_height() for c in axes.containers if hasattr(c, "patches")}
    expected = {
        a: 0.95 - np.mean([r["accuracy"] for r in rows if r["arm"] == a]) for a in ("full", "scratch")
    }
    assert heights == pytest.approx(expected)


@pytest.mark.filterwarnings("error")
def test_confusion_counts():
    from sklearn.metrics import confusion_matrix

    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, (2, 90))
    axes = figures.confusion(true, predicted, ["a", "b", "c", "d"]).axes[0]
    drawn = np.zeros((4, 4), int)
    for text in axes.texts:
        x, y = text.get_position()
        drawn[y, x] = int(text.get_text())
    np.testing.assert_array_equal(drawn, confusion_matrix(true, predicted))


@pytest.mark.filterwarnings("error")
def test_principal_components_are_sklearns():
    from sklearn.decomposition import PCA

    features = np.random.default_rng(0).normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1] + 7
    points, shares = figures.principal_components(features)
    oracle = PCA(2).fit(features)
    np.testing.assert_allclose(np.abs(points), np.abs(oracle.transform(features)), atol=1e-9)
    np.testing.assert_allclose(shares, oracle.explained_variance_ratio_, atol=1e-9)
    figure = figures.embeddings({"before": features, "after": features}, np.arange(40) % 3, ["a", "b", "c"])
    assert [axes.get_title() for axes in figure.axes] == ["before", "after"]


@pytest.mark.filterwarnings("error")
def test_images_mark_the_wrong_ones():
    pictures = np.random.default_rng(0).random((3, 5, 5, 1))
    panels = figures.images(pictures, ["cat", "dog", "cat"], ["cat", "cat", "dog"], columns=2).axes
    drawn = [axes for axes in panels if axes.images]
    titles = [
        axes.findobj(lambda t, a=axes: getattr(t, "get_text", str)() == a.get_title("left"))[0]
        for axes in drawn
    ]
    assert [t.get_text() for t in titles][1] == "true: dog\npredicted: cat"
    assert [t.get_color() == style.VERMILLION for t in titles] == [False, True, True]
    assert figures.png(figures.images([np.zeros((4, 6, 3), np.uint8), np.ones((8, 8))], ["a"] * 2, ["a"] * 2))


@pytest.mark.filterwarnings("error")
def test_score_scatter_says_the_rank_correlation():
    scores, accuracies = [0.1, 0.5, 0.3, 0.9], [0.7, 0.8, 0.75, 0.74]
    (axes,) = figures.score_scatter(scores, accuracies, list("abcd"), "LEEP", 0.254).axes
    assert axes.get_title() == "LEEP: weighted τ = 0.25"


def test_arms_keep_their_colour_and_differ():
    assert figures.colours(["majority", "full"])["full"] == figures.colours(["full", "scratch"])["full"]
    arms = ["full", "teacher", "student_alone", "soft_targets"]
    assert len(set(figures.colours(arms).values())) == 4


def test_users_matplotlib_settings_do_not_change_a_report():
    import matplotlib as mpl

    def draw():
        return figures.png(figures.over_sizes(ROWS, "accuracy"))

    plain = draw()
    with mpl.rc_context({"axes.facecolor": "black", "font.size": 30}):
        assert draw() == plain
        assert mpl.rcParams["font.size"] == 30


def test_heatmaps_write_every_finite_cell():
    panels = {"one": [[0.25, np.nan], [0.5, 1.0]], "two": np.zeros((2, 2))}
    figure = figures.heatmaps(panels, ("a", "b"), ("c", "d"), "share", "across", "down")
    one, two = figure.axes[:2]
    assert [text.get_text() for text in one.texts] == ["0.25", "0.50", "1.00"] and len(two.texts) == 4
    assert one.get_title() == "one" and [t.get_text() for t in two.get_xticklabels()] == ["c", "d"]


def test_over_tasks_has_a_tick_for_every_count():
    rows = [{"arm": "full", "seed": s, "tasks": t, "parameters": float(t)} for s in (0, 1) for t in (1, 2, 3)]
    (axes,) = figures.over_tasks(rows, "parameters").axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "2", "3"]
