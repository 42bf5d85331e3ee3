"""Chooses the kind of spares that fits a policy, its codes and its workers."""

from collections.abc import Callable, Mapping, Sequence

from evenkeel.backends.backend import Backend
from evenkeel.clock import Clock
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.coding.answers.cascade import Cascade
from evenkeel.errors import ConfigurationError
from evenkeel.serving.gateway.backups import Backups, Offload, OnPassOver
from evenkeel.serving.gateway.budget import Budget
from evenkeel.serving.gateway.coded_fleet import CodedFleet, OnLost
from evenkeel.serving.gateway.groups import OnAnswer
from evenkeel.serving.gateway.item import Item
from evenkeel.serving.gateway.light_first import LightFirst
from evenkeel.serving.gateway.policy import Policy
from evenkeel.serving.gateway.quantile import LiveQuantiles
from evenkeel.serving.gateway.replicas import Replicas
from evenkeel.serving.gateway.spares import NoSpares, Spares
from evenkeel.serving.gateway.stats import Stats

__all__ = ["make_spares"]


def make_spares(
    clock: Clock,
    policy: Policy,
    codes: Sequence[BackupCode],
    *,
    model: str,
    replicas: Replicas,
    backups: Sequence[Backend],
    service_times: LiveQuantiles,
    stats: Stats,
    pass_limit_s: float,
    costs: Mapping[str, float],
    offload: Offload,
    on_answer: OnAnswer,
    on_lost: OnLost,
    on_pass_over: OnPassOver,
    escalate: Callable[[Item], object],
    may_add_worker: Callable[[Item], bool],
    approximate: Budget,
    backups_join: bool = False,
) -> Spares:
    """Makes the spares that the policy can use; see `Gateway` for the arguments.

    Where `backups_join` later there need be none now.

    Raises:
        ConfigurationError: codes that cannot work together.
    """
    if policy.max_approximate < 1 and any(not code.systematic for code in codes):
        raise ConfigurationError(
            "policy.max_approximate: a code that is not systematic answers nothing exactly; leave one of the two out"
        )
    if policy.max_approximate == 0 and policy.fill_after is not None and backups:
        codes = [code for code in codes if code.model == model]
        if not codes:
            raise ConfigurationError(
                "policy.max_approximate: 0 leaves the backups nothing to do; add replicate to the codes"
            )
    if any(not code.systematic for code in codes):
        if len(codes) > 1:
            raise ConfigurationError("codes: a code that is not systematic cannot be combined with others")
        return CodedFleet(
            clock, model, replicas, codes[0], policy.group_wait_s or 0.0, stats, on_answer, on_lost, on_pass_over
        )
    if policy.light_first:
        if policy.max_approximate < 1:
            raise ConfigurationError(
                "policy.max_approximate: a cascade's answers are bounded by its promise; leave it out"
            )
        codes = [code for code in codes if isinstance(code, Cascade)]
        if len(codes) != 1 or not (backups or backups_join):
            raise ConfigurationError(
                "policy: a cascade needs exactly one code of kind cascade, and backups to run its light model"
            )
    if policy.fill_after is not None and (backups or backups_join) and codes:
        made = Backups(
            clock,
            backups,
            codes,
            policy.fill_after,
            service_times,
            policy.group_wait_s,
            stats,
            dict(costs),
            offload,
            on_answer,
            on_pass_over,
            model,
            pass_limit_s,
            may_add_worker,
            approximate,
        )
        return LightFirst(made, escalate) if policy.light_first else made
    return NoSpares()
