"""A certificate in the configuration: where it is named, what it sets, and when the server does not start."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evenkeel.coding.answers import Cascade, Collage, Replicate, ScoreForm
from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import load_card
from evenkeel.models.digest import card_digest
from evenkeel.models.shipped import card_path
from evenkeel.promises.certificate import Certificate
from evenkeel.promises.promise import Promise
from evenkeel.promises.thresholds import Threshold
from evenkeel.serving.config import read_config
from evenkeel.serving.hosted import HostedModel
from evenkeel.serving.promised import AuditFile, apply_certificate

CARD = load_card(card_path("cifar10-base"))
LIGHT = "cifar10-light"
CARDS = {CARD.name: CARD, "light": replace(CARD, name="light", relative_cost=0.1)}
DIGESTS = {CARD.name: "onnx:bb", "light": "onnx:aa"}
AGREE, FILLS = Promise("min_agreement", 0.9), Promise("min_fill_agreement", 0.9)
CERTIFICATE = Certificate(
    "cascade", "light", CARD.name, {"light": "onnx:aa", CARD.name: "onnx:bb"}, "margin", 1.5,
    (Threshold(AGREE, 0, 0.7, 5000, 0.3, 0.31, 0.09, 0.1),), time.time(), time.time() + 1000,
)  # fmt: skip
OF_FILLS = replace(CERTIFICATE, use="fills", thresholds=(replace(CERTIFICATE.thresholds[0], promise=FILLS),))


def applied(folder: Path, certificate: Certificate, policy: Any, codes: list[Any], **promises: Any) -> Any:
    certificate.save(folder / "c.json")
    raw = {"policy": policy, "promises": promises} if promises else {"policy": policy}
    return apply_certificate(read_config(raw, folder), CARDS, codes, DIGESTS, None)


def test_a_cascade_scores_as_its_certificate_says(tmp_path: Path) -> None:
    code = Cascade(8, ScoreForm(10), model="light")
    gate = applied(tmp_path, CERTIFICATE, {"name": "cascade", "certificate": "c.json"}, [code], audit=0.01)
    assert (code.kind, code.scores.temperature) == ("margin", 1.5)
    grant = gate.grant(AGREE)
    assert (grant.threshold, grant.certificate, gate.audit_share) == (0.7, CERTIFICATE.id, 0.01)


def test_a_certificate_gates_the_fills_of_a_collage(tmp_path: Path) -> None:
    collage = Collage(2, 16, ScoreForm(10), model="light")
    codes = [Replicate(ScoreForm(10), model=CARD.name), collage]
    assert applied(tmp_path, OF_FILLS, "collage(certificate=c.json)", codes) is None
    assert collage.min_confidence == 0.7
    with pytest.raises(ConfigurationError, match="says nothing of other"):
        applied(tmp_path, OF_FILLS, "collage(certificate=c.json)", [Collage(2, 16, ScoreForm(10), model="other")])
    with pytest.raises(ConfigurationError, match=r"does not keep min_fill_agreement 0\.95"):
        applied(tmp_path, OF_FILLS, "collage(certificate=c.json)", codes, default={"min_fill_agreement": 0.95})


@pytest.mark.parametrize(
    ("certificate", "policy", "promises", "words"),
    [
        (CERTIFICATE, "collage(certificate=c.json)", {}, "is for cascade, and the policy collage needs one for fills"),
        (CERTIFICATE, "hedge(certificate=c.json)", {}, "uses no light model and no fills"),
        (CERTIFICATE, "cascade(certificate=none.json)", {}, "cannot be read"),
        (CERTIFICATE, "cascade(certificate=c.json)", {"default": {"min_agreement": 0.95}}, "promises.default: "),
        (replace(CERTIFICATE, expires_s=time.time() - 10), "cascade(certificate=c.json)", {}, "expired"),
        (replace(CERTIFICATE, digests=DIGESTS | {"light": "onnx:zz"}), "cascade(certificate=c.json)", {}, "another"),
    ],
)  # fmt: skip
def test_a_certificate_that_does_not_fit_stops_the_start(
    tmp_path: Path, certificate: Certificate, policy: str, promises: Any, words: str
) -> None:
    with pytest.raises(ConfigurationError, match=words):
        applied(tmp_path, certificate, policy, [Cascade(8, ScoreForm(10), model="light")], **promises)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"promises": {"audit": 0.1}}, "need policy.certificate"),
        ({"policy": "cascade(certificate=c)", "promises": {"audit": 2}}, "promises.audit"),
        ({"policy": "cascade(certificate=c)", "promises": {"default": {}}}, "give one of min_accuracy"),
        ({"policy": "cascade(certificate=c)", "promises": {"default": {"min_accuracy": 3}}}, "min_acc"),
        ({"policy": "cascade(certificate=c)", "promises": {"adult": 1}}, "promises.adult: unknown field"),
        ({"policy": "cascade(c)"}, "unknown policy"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_the_configuration_is_named(raw: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        read_config(raw)


def test_audits_go_to_a_file_and_a_full_disk_stops_only_them(tmp_path: Path) -> None:
    audits = AuditFile(tmp_path / "a.jsonl")
    audits(0.5, True)
    audits(0.25, False)
    audits.close()
    audits(0.1, True)
    assert (tmp_path / "a.jsonl").read_text().splitlines() == [
        '{"score": 0.5, "agree": true}', '{"score": 0.25, "agree": false}',
    ]  # fmt: skip
    with pytest.raises(ConfigurationError, match=r"promises.audit_file: .* cannot be written"):
        AuditFile(tmp_path / "no" / "a.jsonl")
    full = Path("/dev/full")
    if full.exists():
        AuditFile(full)(0.5, True)


def test_a_new_version_goes_on_with_what_audits_have_shown_of_the_same_promise(tmp_path: Path) -> None:
    digests = {name: card_digest(load_card(card_path(name)), card_path(name).parent) for name in (CARD.name, LIGHT)}
    certificate = replace(CERTIFICATE, light=LIGHT, digests=digests)
    certificate.save(tmp_path / "c.json")
    raw = {
        "policy": {"name": "cascade", "certificate": "c.json"},
        "codes": [{"kind": "cascade", "model": LIGHT}],
        "promises": {"audit": 0.1, "audit_file": "audits"},
    }

    async def run() -> None:
        first = HostedModel(read_config(raw, tmp_path))
        second = HostedModel(read_config({**raw, "replicas": 3}, tmp_path), before=first)
        assert first.gateway.promises is not None
        assert second.gateway.promises is first.gateway.promises
        assert second.gateway.stats is first.gateway.stats
        second.take_audits(first)
        await first.close()
        assert first.gateway.promises._record is not None
        first.gateway.promises._record(0.5, True)  # the file is still open: the second one has it now
        assert (tmp_path / "audits").read_text() == '{"score": 0.5, "agree": true}\n'
        replace(certificate, created_s=certificate.created_s - 1).save(tmp_path / "c.json")
        third = HostedModel(read_config(raw, tmp_path), before=second)
        assert third.gateway.promises is not second.gateway.promises  # another certificate begins anew
        third.take_audits(second)
        await second.close()
        await third.close()

    asyncio.run(run())
