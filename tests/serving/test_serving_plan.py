"""What a plan says, and the bound that stands beside it."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from evenkeel.cli.main import main
from evenkeel.delays.laws import Constant, Pareto, ShiftedExponential, TwoMode
from evenkeel.errors import ConfigurationError
from evenkeel.serving.gateway.policy import POLICIES, preset
from evenkeel.serving.ideal import ideal_quantile
from evenkeel.serving.plan import ServingInputs, plan_serving
from evenkeel.serving.simulate import Fleet, arrivals, simulate

LAWS = [TwoMode(), TwoMode(slow_share=0.1), Pareto(), ShiftedExponential(0.1, 10.0)]


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in ("replicate-all", "cascade")])
@pytest.mark.parametrize("law", LAWS, ids=["2 %", "10 %", "pareto", "exponential"])
def test_no_policy_is_better_than_the_ideal_with_its_shares(law, policy):
    fleet = Fleet()
    times_s = arrivals(0.3 * 9 / law.mean_s, 3000, seed=0)
    records, stats = simulate(preset(policy), law, times_s, fleet)
    latencies_s = np.array([record.latency_ms for record in records]) / 1e3
    fills = (len(records) - sum(record.source in ("exact", "hedge") for record in records)) / len(records)
    fills += stats.fills.get("replicate", 0) / len(records)  # exact ones, of a backup
    for q in (0.9, 0.99):
        best_s = ideal_quantile(
            law, q, hedges=stats.hedges / len(records), approximate=fills, fill_cost=min(fleet.costs), items=3000
        )
        assert np.quantile(latencies_s, q) >= 0.97 * best_s  # the draws of passes are not those of the simulation


def test_without_budgets_the_ideal_is_the_law_itself():
    draws = [TwoMode().draw(key, 0, 0.0) for key in range(4000)]
    best_s = ideal_quantile(TwoMode(), 0.99, hedges=0.0, approximate=0.0, items=4000)
    assert best_s == pytest.approx(np.quantile(draws, 0.99, method="higher"), rel=0.01)
    with pytest.raises(ConfigurationError, match="between 0 and 1"):
        ideal_quantile(TwoMode(), 1.0, hedges=0.0, approximate=0.0)


def test_more_of_either_budget_never_makes_the_ideal_worse():
    shares = (0.0, 0.02, 0.1, 1.0)
    table = [
        [ideal_quantile(TwoMode(slow_share=0.1), 0.99, hedges=h, approximate=a, items=2000) for a in shares]
        for h in shares
    ]
    assert (np.diff(table, axis=0) <= 0).all()
    assert (np.diff(table, axis=1) <= 0).all()
    assert table[0][0] > 3 * table[-1][-1]


def test_where_nothing_is_late_nothing_is_to_be_gained():
    plan = plan_serving(Constant(0.1), ServingInputs(load=0.1, requests=2000))
    assert plan.recommended.policy == "none"
    assert "Nothing is to be gained" in plan.sentence


def test_stragglers_call_for_backups_unless_answers_must_be_exact():
    law = TwoMode(slow_share=0.06)
    plan = plan_serving(law, ServingInputs(requests=3000, backups=(1,)))
    assert plan.recommended.policy.startswith("collage")
    assert plan.recommended.p99_ms < 0.6 * plan.options[0].p99_ms
    assert plan.recommended.ideal_p99_ms <= plan.recommended.p99_ms
    exact = plan_serving(law, ServingInputs(requests=3000, backups=(1,), max_approximate=0.0))
    assert all(option.approximate == 0 for option in exact.options)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"replicas": 0}, "replicas: must be from 1"),
        ({"load": 1.0}, "load: must be from 0.01 to 0.99"),
        ({"max_approximate": 1.5}, "max_approximate"),
        ({"requests": 10}, "requests: must be from 1000"),
        ({"backups": (0,)}, "backups"),
        ({"costs": (1.0, 0.0, 0.5)}, "costs: must be above 0"),
    ],
)
def test_what_cannot_be_planned_is_refused(change, why):
    with pytest.raises(ConfigurationError, match=why):
        ServingInputs(**change)


def test_the_command_plans_from_a_file_and_writes_rows(tmp_path):
    law = TwoMode(slow_share=0.06)
    (tmp_path / "x.csv").write_text("took_ms\n" + "".join(f"{law.draw(key, 0, 0) * 1e3}\n" for key in range(600)))
    arguments = ["plan", "serving", str(tmp_path / "x.csv"), "--backups", "1", "--requests", "1000"]
    done = CliRunner().invoke(main, [*arguments, "--json", str(tmp_path / "plan.json")])
    assert done.exit_code == 0, done.output
    assert "service times of" in done.output
    document = json.loads((tmp_path / "plan.json").read_text())
    assert [row["policy"] for row in document["rows"]] == ["none", "hedge", "collage", "collage+hedge"]
    assert document["recommendation"]
    refused = CliRunner().invoke(main, ["plan", "serving"])
    assert refused.exit_code == 2
    assert "give either recorded ones or a law" in refused.output
