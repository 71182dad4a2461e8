"""``domain_pretraining`` for real, as short as ``--quick`` and two layers make it."""

import pytest
from short_runs import means, run

from experiments import domain_pretraining

pytestmark = pytest.mark.slow


def test_domain_pretraining(tmp_path, short_minilm):
    result = run(domain_pretraining, tmp_path, model=short_minilm)
    assert {"accuracy", "mlm_loss_domain", "mlm_loss_other"} <= set(result.summary)
    for domain in ("domain", "other"):
        losses = means(result, f"mlm_loss_{domain}")
        assert list(losses) == ["none", "domain", "other", "replay"]
        assert min(losses, key=losses.get) == domain  # each learns best what it reads
        assert losses["replay"] < losses["none"]
    again = run(
        domain_pretraining, tmp_path, resume=True, model=short_minilm
    )  # a killed run goes on with what it has measured
    assert again.rows == result.rows and again.summary == result.summary
