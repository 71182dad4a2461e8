import jax
import pytest
from progressive_models import MODELS, WHERE, batch_of, mlp, stirred

from jtl import progressive


@pytest.fixture(scope="session", params=list(MODELS))
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def three():
    """Three columns of an MLP, the second wider, whose laterals carry something."""
    batch = batch_of("mlp")
    model = mlp(jax.random.key(0))
    for seed, column in ((1, mlp(jax.random.key(5), (9, 4))), (2, mlp(jax.random.key(6)))):
        model = progressive.grow(model, column, where=WHERE["mlp"], batch=batch, key=jax.random.key(seed))
    return stirred(model)
