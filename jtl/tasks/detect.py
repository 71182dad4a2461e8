"""Detection: every cell of a feature pyramid says which object it lies in and how far the edges are.

Tian, Shen, Chen, He: "FCOS: Fully Convolutional One-Stage Object Detection", 2019, https://arxiv.org/abs/1904.01355,
with the improvements of its last table: GIoU as the loss of boxes, cells near the centre of an object alone, distances
in units of the stride. ``jtl.models.feature_pyramid.detector`` makes the model.

A model's outputs: ``cells`` (L, 3), the centre x and y of each cell of all levels and its stride, in pixels;
``class_logits`` (B, L, C); ``distances`` (B, L, 4) from the centre to the left, top, right and bottom edge, in pixels;
``centerness`` (B, L), a logit. A batch: ``boxes`` (B, K, 4) as in ``jtl.tasks.boxes``, ``box_label`` (B, K), -1 for
rows that only fill up.
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
    """What each cell of an image should say; see ``assign``.

    Attributes:
        label: class of its object, -1 for background.
        box: its object's box; zeros for background.
        centerness: how central the cell is in it, in [0, 1]; 0 for background.
    """

    label: Int[Array, " L"]
    box: Float[Array, "L 4"]
    centerness: Float[Array, " L"]


class Detections(NamedTuple):
    """The objects found in each image, surest first; rows of score 0 only fill up.

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
    """Which object each cell answers for (section 3.1 and 3.2 of the paper).

    An object claims the cells inside its box whose centre is within ``radius`` strides of the box's own, on the level
    whose range holds the largest of the four distances m: ``reach / 2 < m / stride <= reach``, without a lower end on
    the finest level and without an upper one on the coarsest. Of several objects the smallest gets the cell.

    Args:
        cells: centre x, y and stride of every cell.
        boxes: of the objects.
        label: their classes, -1 for rows that only fill up.
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
    """The boxes that lie so far around the centres of the cells."""
    at = jnp.concatenate([cells[:, :2], cells[:, :2]], -1)
    signs = jnp.array([-1.0, -1.0, 1.0, 1.0], distances.dtype)
    return jnp.broadcast_to(at, distances.shape) + distances * jnp.broadcast_to(signs, distances.shape)


class Detect(Loss):
    """Focal loss of the classes, GIoU loss of the boxes and cross-entropy of the centerness (equation 2 of the paper).

    The first and the last are sums over cells, divided by the number of cells that answer for an object; boxes count by
    their centerness. Rows of ``batch["weight"]`` 0 do not count.

    Attributes:
        alpha: weight of the positive class (Lin et al. 2017, https://arxiv.org/abs/1708.02002, equation 5).
        gamma: by how much easy cells count less.
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
        """Dropout on, normalisation as ``stats`` says."""
        return Mode(train=True, stats=self.stats)

    def value(
        self, model: Model, outputs: Outputs, batch: Batch, key: Array | None
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The loss, and its parts ``class_loss``, ``box_loss`` and ``centerness_loss``."""
        cells, logits = outputs["cells"], outputs["class_logits"]
        boxes, label = batch["boxes"], batch["box_label"]
        true = jax.vmap(lambda b, c: assign(cells, b, c, radius=self.radius, reach=self.reach))(boxes, label)
        weight = rows.weights(batch, len(boxes))[:, None]
        owned = weight * (true.label >= 0)
        count = owned.sum()

        targets = jax.nn.one_hot(true.label, logits.shape[-1])  # -1 gives zeros: no class at all
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
    """The objects of each image: the surest cells, and of boxes that overlap the surest alone.

    A cell's score for a class is the geometric mean of the class's probability and the centerness. Static shapes
    throughout, for ``jit``.

    Args:
        outputs: of the model.
        size: height and width of the images, to which boxes are cut.
        threshold: the least score.
        candidates: how many pairs of a cell and a class enter ``jtl.tasks.boxes.nms``.
        overlap: see there.
        most: K, the most objects of an image.
        one_class: whether a box also removes those of other classes, so that an object is named once: for people.
            Average precision is better where each class has its say.
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
