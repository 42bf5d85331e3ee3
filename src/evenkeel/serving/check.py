"""Finds what is wrong with a configuration beyond its fields: files, cards, keys, addresses. Starts nothing."""

import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from evenkeel.backends.worker.key import read_key
from evenkeel.coding.answers.backup_code import BackupCode
from evenkeel.errors import ConfigurationError
from evenkeel.models.cards import ModelCard, load_card
from evenkeel.models.digest import ModelDigests, read_whole
from evenkeel.schema import Problem
from evenkeel.serving.config import CodeConfig, ServeConfig
from evenkeel.serving.hosted import build_codes
from evenkeel.serving.nodes import NodeMaker, known_digests
from evenkeel.serving.promised import apply_certificate
from evenkeel.serving.trusted import guard_of
from evenkeel.settings import joined
from evenkeel.trust.tls import client_contexts, server_contexts

__all__ = ["find_problems"]

Made = TypeVar("Made")
Arguments = ParamSpec("Arguments")


def find_problems(config: ServeConfig, *, resolve: bool = False) -> list[Problem]:
    """Gives all that would keep a server from starting with `config`, or from answering.

    Args:
        config: whose fields are right.
        resolve: look the names of other machines up, too.
    """
    found = _Found()
    if config.models:
        _check_server(config, found)
        of_models = (
            Problem(("models", place, *one.place), one.text)
            for place, model in enumerate(config.models)
            for one in find_problems(model, resolve=resolve)
        )
        return [*found.problems, *of_models]
    cards, codes = _check_models(config, found)
    if config.certificate is not None and len(codes) == len(config.codes) and not found.problems:
        found.attempt(("policy", "certificate"), _check_certificate, config, cards, codes)
    if config.worker_key_file:
        found.attempt(("worker_key_file",), read_key, config.worker_key_file)
    if config.lossy.key_file:
        found.attempt(("lossy", "key_file"), read_key, config.lossy.key_file)
    _check_server(config, found)
    if not found.problems:
        # Addresses are refused where their backends are made: without a key, or of a kind that a model cannot have.
        maker = NodeMaker(config, list(cards.values()), ModelDigests())
        for where in (*config.replicas.addresses, *config.replicas.urls, *config.replicas.links):
            found.attempt(("replicas",), maker.at, "replica", where)
        for where in (*config.backups.addresses, *config.backups.urls) if config.policy.uses_backups else ():
            found.attempt(("backups",), maker.at, "backup", where)
    if config.promises.audit_file is not None:
        found.attempt(("promises", "audit_file"), _check_folder, config.promises.audit_file)
    if resolve:
        _resolve(config, found)
    return found.problems


class _Found:
    """Collects what is wrong."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def attempt(
        self,
        place: tuple[str | int, ...],
        do: Callable[Arguments, Made],
        *args: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Made | None:
        """Gives what `do` gives; None where it refuses something, which is noted at `place`."""
        try:
            return do(*args, **named)
        except ConfigurationError as error:
            text = str(error).removeprefix(f"{joined(place)}: ")
            if text.startswith(f"{joined(place)}."):
                inner, _, text = text.removeprefix(f"{joined(place)}.").partition(": ")
                place = (*place, inner)
            self.problems.append(Problem(place, text))
            return None


def _check_server(config: ServeConfig, found: _Found) -> None:
    """Reads certificates and keys, as the server would, and looks for the folders of sockets."""
    for host in config.host:
        if host.startswith("unix:"):
            found.attempt(("host",), _check_folder, Path(host.removeprefix("unix:")))
    found.attempt(("keys",) if config.keys.file is None else ("keys", "file"), guard_of, config)
    if config.tls is not None:
        found.attempt(("tls",), server_contexts, config.tls)
    for place, tls in (("worker_tls", config.worker_tls), ("remote_tls", config.remote_tls)):
        if tls is not None:
            found.attempt((place,), client_contexts, tls)
    found.attempt(("remote_credentials",), config.remote_credentials.load)


def _check_models(config: ServeConfig, found: _Found) -> tuple[dict[str, ModelCard], list[BackupCode]]:
    """Checks cards, their files, and that codes fit the classifier; gives those that are right."""
    backups = config.backups.count if config.policy.uses_backups else 0
    card = found.attempt(("model",), config.card)
    cards: dict[str, ModelCard] = {}
    codes: list[BackupCode] = []
    if card is not None:
        cards[card.name] = card
        field: tuple[str | int, ...] = ("run" if config.run else "model",)
        found.attempt(field, _check_file, config.model, card, config.run, config.replicas.count + backups)
    for place, code in enumerate(config.codes):
        where: tuple[str | int, ...] = ("codes", place)
        if code.model is not None:
            coded = found.attempt((*where, "model"), load_card, code.model)
            if coded is None:
                continue
            cards[coded.name] = coded
            field = (*where, "run" if code.run else "model")
            found.attempt(field, _check_file, code.model, coded, code.run, backups)
        if card is not None:
            codes += found.attempt(where, _build_alone, config, code, card) or []
    return cards, codes


def _build_alone(config: ServeConfig, code: CodeConfig, card: ModelCard) -> list[BackupCode]:
    try:
        return build_codes(replace(config, codes=(code,)), card)
    except ConfigurationError as error:
        raise ConfigurationError(re.sub(r"^codes\[0\](\.model)?: ", "", str(error))) from None


def _check_file(path: Path, card: ModelCard, run: str, workers: int) -> None:
    """Refuses a model that the workers started here could not load."""
    if workers and not run:
        read_whole(card, path)
    where = run.removeprefix("python:").rpartition(":")[0]
    if workers and where.endswith(".py") and not os.access(where, os.R_OK):
        raise ConfigurationError(f"{where} cannot be read")


def _check_certificate(config: ServeConfig, cards: Mapping[str, ModelCard], codes: Sequence[BackupCode]) -> None:
    apply_certificate(config, cards, codes, known_digests(config), None)


def _check_folder(file: Path) -> None:
    """Refuses a file that could not be made."""
    if not file.parent.is_dir():
        raise ConfigurationError(f"{file} cannot be made: there is no folder {file.parent}")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ConfigurationError(f"{file} cannot be written: no permission")


def _resolve(config: ServeConfig, found: _Found) -> None:
    nodes = {
        name: (*given.addresses, *given.urls, *given.links)
        for name, given in (("replicas", config.replicas), ("backups", config.backups))
    }
    places = [((name,), where) for name, all_of_them in nodes.items() for where in all_of_them]
    places += [(("host",), f"//{host}") for host in config.host if not host.startswith("unix:")]
    places += [(("lossy",), config.lossy.listen)] if config.lossy.listen else []
    for place, where in places:
        match = re.search(r"//(?:[^@/]*@)?(\[[^\]]*\]|[^:/]*:[^/]*:[^/]*|[^:/]*)", where)
        if match and match[1]:
            found.attempt(place, _look_up, match[1].strip("[]"))


def _look_up(host: str) -> None:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"the host {host!r} is not found: {why}") from None
