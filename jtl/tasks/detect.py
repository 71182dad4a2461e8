"""Object detection with FCOS: each cell of a feature pyramid predicts a class and the distances to its object's edges.

Tian, Shen, Chen, He 2019, "FCOS: Fully Convolutional One-Stage Object Detection", https://arxiv.org/abs/1904.01355,
with the improvements of its last table: GIoU loss for boxes, positive cells only near an object's centre, distances in
units of the stride. ``jtl.models.feature_pyramid.detector`` builds the model.

Model outputs: ``cells`` (L, 3), centre x, centre y and stride of each cell of all levels, in pixels; ``class_logits``
(B, L, C); ``distances`` (B, L, 4) from the centre to the left, top, right and bottom edge, in pixels; ``centerness``
(B, L), a logit. Batch fields: ``boxes`` (B, K, 4) as in ``jtl.tasks.boxes``, and ``box_label`` (B, K), -1 for padding
rows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Float, Int

from jtl import rows
from jtl.loss import Loss
from jtl.model import Batch, Mode, Model, Outputs
from jtl.tasks.boxes import area, giou, nms


class Assigned(NamedTuple):
    """Training targets of each cell of an image; see ``assign``.

    Attributes:
        label: class of its object, -1 for background.
        box: its object's box; zeros for background.
        centerness: how central the cell is in the box, in [0, 1]; 0 for background.
    """

    label: Int[Array, " L"]
    box: Float[Array, "L 4"]
    centerness: Float[Array, " L"]


class Detections(NamedTuple):
    """Detected objects of each image, by falling score; rows of score 0 are padding.

    Attributes:
        boxes: in pixels.
        score: in [0, 1].
        label: class.
    """

    boxes: Float[Array, "B K 4"]
    score: Float[Array, "B K"]
    label: Int[Array, "B K"]


def assign(
    cells: Float[Array, "L 3"],
    boxes: Float[Array, "K 4"],
    label: Int[Array, " K"],
    *,
    radius: float = 1.5,
    reach: float = 8.0,
) -> Assigned:
    """Assigns an object or background to each cell (sections 3.1 and 3.2 of the paper).

    An object claims cells whose centre is inside its box and within ``radius`` strides of the box's centre. They lie on
    the level whose range contains m, the largest of the four distances: ``reach / 2 < m / stride <= reach``, with no
    lower bound on the finest level and no upper bound on the coarsest. If several objects claim a cell, the smallest
    gets it.

    Args:
        cells: centre x, centre y and stride of every cell.
        boxes: ground-truth boxes.
        label: ground-truth classes, -1 for padding rows.
        radius: in strides.
        reach: in strides; the paper's levels of stride 8, 16, 32 end at 64, 128, 256 pixels.
    """
    at, stride = cells[:, None, :2], cells[:, 2]
    near, far = at - boxes[None, :, :2], boxes[None, :, 2:] - at  # (L, K, 2) each
    inside = (near > 0).all(-1) & (far > 0).all(-1)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    central = (jnp.abs(at - centre[None]) < radius * stride[:, None, None]).all(-1)
    furthest = jnp.maximum(near, far).max(-1)
    low = jnp.where(stride == stride.min(), 0.0, reach / 2 * stride)
    high = jnp.where(stride == stride.max(), jnp.inf, reach * stride)
    fits = (furthest > low[:, None]) & (furthest <= high[:, None])
    claims = inside & central & fits & (label >= 0)[None]
    size = jnp.where(claims, area(boxes)[None], jnp.inf)
    owner = jnp.argmin(size, 1)
    owned = claims.any(1)
    least = jnp.minimum(near, far)[jnp.arange(len(cells)), owner]
    most = jnp.maximum(near, far)[jnp.arange(len(cells)), owner]
    shares = jnp.where(owned[:, None], least / jnp.where(owned[:, None], most, 1.0), 0.0)
    # The square root has no gradient at 0, but nothing here is differentiated: targets are constants.
    return Assigned(
        jnp.where(owned, label[owner], -1),
        jnp.where(owned[:, None], boxes[owner], 0.0),
        jnp.sqrt(shares.prod(-1)),
    )


def to_boxes(cells: Float[Array, "L 3"], distances: Float[Array, "*B L 4"]) -> Float[Array, "*B L 4"]:
    """Returns the boxes at the given distances around the centres of the cells."""
    at = jnp.concatenate([cells[:, :2], cells[:, :2]], -1)
    signs = jnp.array([-1.0, -1.0, 1.0, 1.0], distances.dtype)
    return jnp.broadcast_to(at, distances.shape) + distances * jnp.broadcast_to(signs, distances.shape)


class Detect(Loss):
    """Sum of the focal loss of classes, GIoU loss of boxes and cross-entropy of centerness (equation 2 of the paper).

    The focal loss is summed over all cells and divided by the number of cells with an object. The other two are means
    over cells with an object, the GIoU loss weighted by target centerness. Rows of ``batch["weight"]`` 0 do not count.

    Attributes:
        alpha: weight of the positive class (Lin et al. 2017, "Focal Loss for Dense Object Detection",
            https://arxiv.org/abs/1708.02002, equation 5).
        gamma: focusing parameter: the larger, the less easy cells count.
        radius: see ``assign``.
        reach: see ``assign``.
        stats: normalise by ``"running"`` or ``"batch"`` statistics.
    """

    alpha: float = struct.field(pytree_node=False, default=0.25)
    gamma: float = struct.field(pytree_node=False, default=2.0)
    radius: float = struct.field(pytree_node=False, default=1.5)
    reach: float = struct.field(pytree_node=False, default=8.0)
    stats: Literal["running", "batch"] = struct.field(pytree_node=False, default="running")

    def mode(self) -> Mode:
        """Dropout on, normalisation as set by ``stats``."""
        return Mode(train=True, stats=self.stats)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """Returns the loss, and its parts ``class_loss``, ``box_loss`` and ``centerness_loss`` as metrics."""
        cells, logits = outputs["cells"], outputs["class_logits"]
        boxes, label = batch["boxes"], batch["box_label"]
        true = jax.vmap(lambda b, c: assign(cells, b, c, radius=self.radius, reach=self.reach))(boxes, label)
        weight = rows.weights(batch, len(boxes))[:, None]
        owned = weight * (true.label >= 0)
        count = owned.sum()

        targets = jax.nn.one_hot(true.label, logits.shape[-1])  # -1 becomes zeros: no class
        focal = optax.sigmoid_focal_loss(logits, targets, alpha=self.alpha, gamma=self.gamma)
        class_loss = (weight * focal.sum(-1)).sum() / jnp.where(count > 0, count, 1.0)
        overlap = giou(to_boxes(cells, outputs["distances"]), true.box)
        pull = owned * true.centerness
        box_loss = rows.mean(1 - overlap, pull)
        central = optax.sigmoid_binary_cross_entropy(outputs["centerness"], true.centerness)
        centerness_loss = rows.mean(central, owned)
        parts = {"class_loss": class_loss, "box_loss": box_loss, "centerness_loss": centerness_loss}
        return class_loss + box_loss + centerness_loss, parts


def decode(
    outputs: Outputs,
    size: tuple[int, int],
    *,
    threshold: float = 0.05,
    candidates: int = 100,
    overlap: float = 0.6,
    most: int = 20,
    one_class: bool = False,
) -> Detections:
    """Returns the detected objects of each image: the highest-scoring cells after non-maximum suppression.

    A cell's score for a class is the geometric mean of the class probability and the centerness. Shapes are static, for
    ``jit``.

    Args:
        outputs: of the model.
        size: height and width of the images, to which boxes are clipped.
        threshold: scores must exceed this.
        candidates: number of (cell, class) pairs that enter ``jtl.tasks.boxes.nms``.
        overlap: IoU threshold of ``jtl.tasks.boxes.nms``.
        most: K, the maximum number of objects per image.
        one_class: whether boxes also suppress those of other classes, so that each object gets one label. This is for
            display; average precision is better with suppression within each class.
    """
    height, width = size
    edge = jnp.array([width, height, width, height], jnp.float32)

    def of_image(logits: Array, distances: Array, centerness: Array) -> Detections:
        classes = logits.shape[-1]
        scores = jnp.sqrt(jax.nn.sigmoid(logits) * jax.nn.sigmoid(centerness)[:, None]).ravel()
        score, place = jax.lax.top_k(scores, min(candidates, scores.size))
        boxes = to_boxes(outputs["cells"][place // classes], distances[place // classes])
        boxes = jnp.clip(boxes, 0.0, jnp.broadcast_to(edge, boxes.shape))
        score = jnp.where(score > threshold, score, 0.0)
        stay = nms(boxes, score, 0 * place if one_class else place % classes, overlap)
        score, chosen = jax.lax.top_k(jnp.where(stay, score, 0.0), min(most, score.size))
        return Detections(boxes[chosen], score, (place % classes)[chosen])

    return jax.vmap(of_image)(outputs["class_logits"], outputs["distances"], outputs["centerness"])
