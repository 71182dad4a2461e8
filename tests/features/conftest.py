import jaxtyping
import pytest


@pytest.fixture
def no_shape_checks():
    """What a user meets, who runs without the shape checks of the test run."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
