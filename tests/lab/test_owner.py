"""Whose a network namespace is."""

import os
import subprocess
import sys

import pytest

from evenkeel.lab.owner import NamespaceOwner, new_label, owner_of
from evenkeel.lab.topology import Topology


def test_names_say_who_made_them():
    topology = Topology(3)
    label = new_label()
    owners = {owner_of(name) for name in topology.namespaces(label)}
    assert len(owners) == 1
    (owner,) = owners
    assert owner.pid == os.getpid()
    assert owner.lives()


def test_two_labs_of_one_process_have_different_names():
    assert not set(Topology(2).namespaces(new_label())) & set(Topology(2).namespaces(new_label()))


@pytest.mark.parametrize(
    "name",
    [
        "blue",
        "evenkeel",
        "evenkeel-lab-1",
        "evenkeel-lab-1-2-0-host",
        "evenkeel-lab-1-2-0-host1-x",
        "my-evenkeel-lab-1-2-0-host1",
    ],
)
def test_others_names_are_left_alone(name):
    assert owner_of(name) is None


def test_a_number_used_again_is_another_process():
    own = owner_of(f"{new_label()}-switch")
    assert not NamespaceOwner(own.pid, own.started + 1).lives()


def test_an_owner_that_ended_does_not_live():
    code = "from evenkeel.lab.owner import new_label; print(new_label() + '-host0', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        owner = owner_of(process.stdout.readline().strip())
        assert owner.pid == process.pid
        assert owner.lives()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not owner.lives()  # what is left of it until we ask how it ended does not count
    finally:
        process.kill()
        process.communicate()
    assert not owner.lives()
