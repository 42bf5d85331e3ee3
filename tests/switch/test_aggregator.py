"""What each policy decides, by example."""

from dataclasses import replace

import pytest

from evenkeel.errors import ConfigurationError
from evenkeel.switch.aggregator import SERVER, Event, Job, Rule, SlotPolicy, SwitchState, To, step
from evenkeel.switch.packet import Kind, LaneType, Packet, Reason

JOBS = {0: Job(5, 2, LaneType.BYTES, 1, 9), 1: Job(6, 2, LaneType.BYTES, 1, 9)}


class Switch:
    """A switch with one set, and the words of a story about it."""

    def __init__(self, policy: SlotPolicy, **settings: int) -> None:
        tombs = {"tombs": 64} if policy == SlotPolicy.ASSOC else {}
        self.state = SwitchState(Rule(policy, **{"sets": 1, "words": 1, **tombs, **settings}), JOBS)
        self.now = 0

    def comes(self, worker: int, fragment: int, *, job: int = 0, priority: int = 100, kind=Kind.GRADIENT, **fields):
        """Gives who got what, or the reason or event."""
        sender = SERVER if kind in (Kind.RESULT, Kind.REMINDER) else worker
        bitmap = {Kind.RESULT: 0b11, Kind.REMINDER: 0}.get(kind, 1 << worker)
        payload = b"" if kind == Kind.REMINDER else bytes([worker + 1] * 8)
        packet = Packet(kind, LaneType.BYTES, job, JOBS[job].token, fragment, bitmap, 0, priority, payload)
        before = self.state.counts
        self.state, sent = step(self.state, replace(packet, **fields), sender, self.now)
        if sent:
            return sent[0].to, sent[0].packet.kind, sent[0].packet.fragment, sent[0].packet.bitmap
        names = [*Reason, *Event]
        return next(what for what in names if self.state.counts.get(what, 0) > before.get(what, 0))


@pytest.mark.parametrize("policy", [SlotPolicy.ATP_FREE, SlotPolicy.ESA, SlotPolicy.ASSOC, SlotPolicy.UNLIMITED])
def test_a_complete_sum_goes_to_all_and_its_slot_is_free(policy):
    switch = Switch(policy)
    assert switch.comes(0, 1) == Event.INSTALLED
    assert switch.comes(1, 1) == (To.ALL, Kind.RESULT, 1, 0b11)
    assert switch.state.slots == {}


def test_atp_holds_its_slot_until_the_servers_result_passes():
    switch = Switch(SlotPolicy.ATP)
    switch.comes(0, 1)
    assert switch.comes(1, 1) == (To.SERVER, Kind.PARTIAL, 1, 0b11)
    assert switch.comes(0, 2) == (To.SERVER, Kind.GRADIENT, 2, 0b01)
    assert switch.comes(0, 1) == Reason.DUPLICATE
    assert switch.comes(0, 1, kind=Kind.RESULT) == (To.WORKERS, Kind.RESULT, 1, 0b11)
    assert switch.comes(0, 2) == Event.INSTALLED


def test_switchml_answers_again_until_a_later_fragment_comes():
    switch = Switch(SlotPolicy.SWITCHML)
    switch.comes(0, 1)
    switch.comes(1, 1)
    assert switch.comes(0, 1, kind=Kind.RESEND) == (To.SENDER, Kind.RESULT, 1, 0b11)
    assert switch.comes(0, 2) == Event.INSTALLED
    assert switch.comes(0, 1) == Reason.STALE


def test_esa_gives_a_slot_to_the_more_urgent_and_halves_the_holders_priority_at_each_failed_try():
    switch = Switch(SlotPolicy.ESA)
    switch.comes(0, 1, priority=100)
    assert switch.comes(0, 7, job=1, priority=100) == (To.SERVER, Kind.GRADIENT, 7, 0b01)
    assert switch.state.slots[0, 0].priority == 50
    assert switch.comes(0, 8, job=1, priority=51) == (To.SERVER, Kind.PARTIAL, 1, 0b01)
    assert switch.state.slots[0, 0].job == 1


def test_assoc_evicts_what_has_waited_longest_and_the_rest_of_it_goes_after_it():
    switch = Switch(SlotPolicy.ASSOC, ways=2)
    switch.comes(0, 1)
    switch.now = 10_000
    switch.comes(0, 2)
    switch.now = 20_000
    assert switch.comes(0, 3, priority=1) == (To.SERVER, Kind.PARTIAL, 1, 0b01)
    assert switch.comes(1, 1) == (To.SERVER, Kind.GRADIENT, 1, 0b10)
    assert switch.state.counts[Event.ENTOMBED] == 1
    assert switch.comes(0, 1, kind=Kind.RESULT) == (To.WORKERS, Kind.RESULT, 1, 0b11)
    assert switch.state.tombs == {}


def test_assoc_evicts_the_less_urgent_of_two_that_have_waited_as_long():
    switch = Switch(SlotPolicy.ASSOC, ways=2)
    switch.comes(0, 1, priority=120)
    switch.comes(0, 2, priority=100)
    switch.now = 20_000
    assert switch.comes(0, 3) == (To.SERVER, Kind.PARTIAL, 2, 0b01)


def test_a_late_worker_of_a_result_without_it_goes_straight_to_the_server():
    switch = Switch(SlotPolicy.ASSOC)
    switch.comes(0, 1, kind=Kind.RESULT, bitmap=0b01)
    assert switch.comes(1, 1) == (To.SERVER, Kind.GRADIENT, 1, 0b10)


@pytest.mark.parametrize("policy", [each for each in SlotPolicy if each != SlotPolicy.SWITCHML])
def test_a_resend_takes_along_what_its_slot_holds_and_never_stays(policy):
    switch = Switch(policy)
    assert switch.comes(0, 1, kind=Kind.RESEND) == (To.SERVER, Kind.RESEND, 1, 0b01)
    switch = Switch(policy)
    switch.comes(0, 1)
    assert switch.comes(1, 1, kind=Kind.RESEND) == (To.SERVER, Kind.PARTIAL, 1, 0b11)
    switch = Switch(policy)
    switch.comes(0, 1)
    assert switch.comes(0, 1, kind=Kind.RESEND) == (To.SERVER, Kind.PARTIAL, 1, 0b01)
    assert switch.state.slots == {}


@pytest.mark.parametrize("policy", SlotPolicy)
def test_a_reminder_gets_what_there_is(policy):
    switch = Switch(policy)
    assert switch.comes(0, 1, kind=Kind.REMINDER) == (To.SERVER, Kind.REMINDER, 1, 0)
    switch = Switch(policy)
    switch.comes(1, 1)
    assert switch.comes(0, 1, kind=Kind.REMINDER) == (To.SERVER, Kind.PARTIAL, 1, 0b10)


@pytest.mark.parametrize("policy", SlotPolicy)
def test_a_restarted_workers_other_gradient_meets_nothing_of_before(policy):
    switch = Switch(policy)
    switch.comes(0, 1)
    assert switch.comes(0, 1, epoch=1) == Event.INSTALLED
    assert switch.state.counts[Event.RECLAIMED] == 1
    assert switch.comes(1, 1) == Reason.EPOCH


@pytest.mark.parametrize("policy", [SlotPolicy.ATP, SlotPolicy.ATP_FREE, SlotPolicy.ESA, SlotPolicy.ASSOC])
def test_what_nobody_completes_is_given_up_after_a_time(policy):
    switch = Switch(policy, stale_ns=1000)
    switch.comes(0, 1, priority=200)
    switch.now = 1000
    assert switch.comes(0, 2, priority=0) == (To.SERVER, Kind.PARTIAL, 1, 0b01)


def test_with_a_deadline_only_the_server_says_what_the_result_is():
    switch = Switch(SlotPolicy.ESA)
    switch.state = replace(switch.state, jobs={0: replace(JOBS[0], via_server=True)})
    switch.comes(0, 1)
    assert switch.comes(1, 1) == (To.SERVER, Kind.PARTIAL, 1, 0b11)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sets": 3}, "sets: must be a power of two"),
        ({"regions": 2}, "regions: must be at most 1"),
        ({"ways": 2}, "ways: must be 1 to 16, and 1 for all policies but assoc"),
        ({"tombs": 8}, "tombs: policy assoc needs tombstones, and no other has them"),
        ({"words": 429}, "words: must be 1 to 428"),
        ({"stale_ns": 0}, "must be at least 1"),
    ],
)
def test_a_rule_out_of_range_is_refused(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        Rule(SlotPolicy.ESA, **{"sets": 1, **settings})


def test_a_job_whose_sums_could_carry_is_refused():
    with pytest.raises(ConfigurationError, match="use at most 3 workers, or wider lanes"):
        Job(1, 4, LaneType.BYTES, 2, 64)
    with pytest.raises(ConfigurationError, match="token: must be a number of 64 bits that is not 0"):
        Job(0, 2, LaneType.BYTES, 2, 64)
    with pytest.raises(ConfigurationError, match="even for lanes of 4 bits"):
        Job(1, 2, LaneType.THC, 3, 17)
    with pytest.raises(ConfigurationError, match="policy: must be one of unlimited, atp"):
        SlotPolicy.of("best")
