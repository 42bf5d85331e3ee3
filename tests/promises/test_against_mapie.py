"""P-values and the fixed sequence agree with MAPIE's, where that is installed."""

import numpy as np
import pytest

from evenkeel.promises.binomial import cdf, max_errors

methods = pytest.importorskip("mapie.risk_control.methods", reason="mapie is not installed")
fwer = pytest.importorskip("mapie.risk_control.fwer_control", reason="mapie is not installed")


def test_p_values_and_what_is_rejected_agree() -> None:
    random = np.random.default_rng(0)
    for n, alpha in ((100, 0.2), (1000, 0.05), (5000, 0.2)):
        errors = np.sort(random.binomial(n, alpha * random.uniform(0.7, 1.05, 40)))
        # A trifle less, since it rounds errors / n * n up, which may be a trifle too much.
        rates = (errors - 1e-6) / n
        theirs = methods.compute_hoeffding_bentkus_p_value(rates, n, alpha, binary=True).reshape(-1)
        ours = np.array([cdf(int(k), n, alpha) for k in errors])
        assert ours == pytest.approx(theirs, rel=1e-6)
        accepted = np.sort(np.asarray(fwer.control_fwer(theirs, 0.05, fwer_method="fixed_sequence")).reshape(-1))
        assert accepted.tolist() == list(range(int((errors <= max_errors(n, alpha, 0.05)).sum())))
