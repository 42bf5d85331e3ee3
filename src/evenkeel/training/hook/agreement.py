"""Checks that all ranks are configured alike; if they are not, all of them say so in the same words."""

import hashlib
import json
from collections.abc import Mapping

import torch

from evenkeel.errors import ConfigurationError, ReducerError
from evenkeel.reducers.ranks.collectives import Collectives

__all__ = ["check_agreement"]

_REMEDIES = {"step": "load every rank's own checkpoint of the same step, and on a rank that is new any other rank's"}


def check_agreement(ranks: Collectives, fields: Mapping[str, object], device: torch.device) -> None:
    """Compares `fields` over the ranks: first 32 bytes each, and the fields themselves only if those differ.

    Raises:
        ConfigurationError: the same on every rank, naming the first field that differs and who has which value.
        ReducerError: a peer is gone or silent, or has no hook.
    """
    text = json.dumps({name: str(value) for name, value in fields.items()}).encode()
    digest = torch.frombuffer(bytearray(hashlib.sha256(text).digest()), dtype=torch.uint8)
    try:
        digests = ranks.gather(digest.to(device))
    except ReducerError as error:
        # A rank without the hook never comes to this, the first exchange of all.
        raise ReducerError(f"{error}; is the hook registered on every rank?") from error
    if all(torch.equal(each, digests[0]) for each in digests):
        return
    lengths = [int(row) for row in ranks.gather(torch.tensor([len(text)], device=device))]
    row = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
    theirs = [json.loads(bytes(each.tolist())) for each in ranks.gather(row, lengths)]
    names = list(dict.fromkeys(name for each in theirs for name in each))
    for name in names:
        holders: dict[str, list[int]] = {}
        for rank, each in enumerate(theirs):
            holders.setdefault(each.get(name, "absent"), []).append(rank)
        if len(holders) > 1:
            found = ", ".join(f"{value} on rank{'s' * (len(who) > 1)} {who}" for value, who in holders.items())
            remedy = _REMEDIES.get(name, f"start every rank with the same {name}")
            raise ConfigurationError(f"the ranks differ in {name}: {found}; {remedy}")
