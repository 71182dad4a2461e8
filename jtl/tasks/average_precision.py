"""Average precision for object detection as COCO defines it, computed by ``pycocotools``."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from jaxtyping import Float, Int

from jtl.errors import InputError


def average_precision(
    boxes: Float[np.ndarray, "N K 4"],
    score: Float[np.ndarray, "N K"],
    label: Int[np.ndarray, "N K"],
    true_boxes: Float[np.ndarray, "N M 4"],
    true_label: Int[np.ndarray, "N M"],
) -> dict[str, float]:
    """Returns COCO's average precision as ``map``, ``map_50`` and ``map_75``, all in [0, 1].

    ``map`` is the mean over the IoU thresholds 0.50, 0.55, ..., 0.95 and over the classes that occur in the ground
    truth; ``map_50`` and ``map_75`` use one threshold. At most 100 detections per image count. Lin et al. 2014,
    "Microsoft COCO: Common Objects in Context", https://arxiv.org/abs/1405.0312.

    Args:
        boxes: detected boxes of each of N images, as in ``jtl.tasks.boxes``.
        score: confidences; rows of score 0 are padding.
        label: predicted classes.
        true_boxes: ground-truth boxes.
        true_label: ground-truth classes, -1 for padding rows.

    Raises:
        ValueError: there is no ground-truth object.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    image, place = np.nonzero(np.asarray(true_label) >= 0)
    if not len(image):
        raise InputError("no image has an object, so none can be found: is true_label -1 throughout?")
    there = _corner_and_sides(np.asarray(true_boxes)[image, place])
    classes = np.asarray(true_label)[image, place]
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i} for i in range(len(true_label))],
        "categories": [{"id": int(c)} for c in np.unique(classes)],
        "annotations": [
            {"id": i + 1, "image_id": int(n), "category_id": int(c), "bbox": list(map(float, box)),
             "area": float(box[2] * box[3]), "iscrowd": 0}
            for i, (n, c, box) in enumerate(zip(image, classes, there, strict=True))
        ],
    }  # fmt: skip
    image, place = np.nonzero((np.asarray(score) > 0) & np.isin(label, classes))
    if not len(image):
        return {"map": 0.0, "map_50": 0.0, "map_75": 0.0}
    found = np.column_stack(
        [
            image,
            _corner_and_sides(np.asarray(boxes)[image, place]),
            np.asarray(score)[image, place],
            np.asarray(label)[image, place],
        ]
    ).astype(np.float64)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        truth.createIndex()
        judged = COCOeval(truth, truth.loadRes(found), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return {name: float(judged.stats[i]) for i, name in enumerate(("map", "map_50", "map_75"))}


def _corner_and_sides(boxes: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, "N 4"]:
    """COCO's box format: left, top, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
