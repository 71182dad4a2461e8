"""The transfer tasks of 20 Newsgroups: which groups, which labels, and what a wrong name is told."""

import numpy as np
import pytest

import jtl.data as data
from jtl.data.sets.newsgroups import GROUPS, TASKS


@pytest.fixture(scope="module")
def whole():
    return data.load("newsgroups20")


@pytest.mark.parametrize("task", GROUPS)
def test_domains_share_the_groups_of_two_categories(task, whole):
    source, target = (set(GROUPS[task][domain]) for domain in ("source", "target"))
    assert not source & target
    assert source | target == {name for name in whole.classes if name.split(".")[0] in task.split("_")}
    for groups in (source, target):
        assert {name.split(".")[0] for name in groups} == set(task.split("_"))


@pytest.mark.parametrize(
    ("domain", "sizes"),
    [
        ("source", [[1035, 1064], [115, 119], [783, 789]]),
        ("target", [[1576, 1068], [176, 118], [1169, 790]]),
    ],
)
def test_class_counts(domain, sizes):
    splits = data.load(f"newsgroups20:comp_sci:{domain}").splits
    assert [np.bincount(data.labels(source)).tolist() for source in splits.values()] == sizes


@pytest.mark.parametrize("name", ["newsgroups20:rec_talk:source", "newsgroups20:rec_talk:target"])
def test_examples_are_those_of_the_groups(name, whole):
    one = data.load(name)
    assert one.classes == ("rec", "talk") and one.kind == "text" and one.name == name
    assert one.version == "newsgroups20/1.0.0:" + name.removeprefix("newsgroups20:")
    groups = GROUPS["rec_talk"][name.split(":")[2]]
    assert one.notes == (f"subgroups: {', '.join(groups)}",)
    for split in ("validation", "test"):
        theirs = [whole.splits[split][i] for i in range(len(whole.splits[split]))]
        expected = [
            (row["text"], int(whole.classes[row["label"]].startswith("talk.")))
            for row in theirs
            if whole.classes[row["label"]] in groups
        ]
        source = one.splits[split]
        assert [(source[i]["text"], source[i]["label"]) for i in range(len(source))] == expected
        assert data.labels(source).tolist() == [label for _, label in expected]


def test_domains_hold_different_texts():
    domains = [
        data.load(f"newsgroups20:sci_talk:{domain}").splits["train"] for domain in ("source", "target")
    ]
    source, target = ({one[i]["text"] for i in range(len(one))} for one in domains)
    assert not source & target


def test_tasks():
    assert len(TASKS) == 12 and TASKS[0] == "newsgroups20:comp_rec:source"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("newsgroups20:comp_scy:source", r"_scy:source' \(did you mean newsgroups20:comp_sci:source or"),
        ("newsgroups20:comp_sci", r"with TASK one of comp_rec, .*, sci_talk, and DOMAIN source or target"),
        ("newsgroups20:comp_sci:goal", "unknown transfer task"),
        ("newsgroup:comp_sci:target", "unknown data set .* did you mean newsgroups20:comp_sci:target"),
    ],
)  # fmt: skip
def test_unknown_tasks(name, message):
    with pytest.raises(data.DataError, match=message):
        data.load(name)
