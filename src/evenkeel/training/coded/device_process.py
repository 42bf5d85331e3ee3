"""Runs a device as a process: it connects to its coordinator, again and again, and serves blocks to its peers.

Run as `evenkeel device`. Its examples stay in its file; coded blocks lie in its store, so that it can be stopped and
started at any time. The main thread does what the coordinator asks for, one thing at a time; a thread for each peer
gives blocks meanwhile, for else two devices that fetch from each other would wait for ever.
"""

import argparse
import contextlib
import logging
import random
import select
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from evenkeel.backends.worker.address import Address, parse_address
from evenkeel.backends.worker.key import read_key
from evenkeel.delays.laws import Delay
from evenkeel.delays.text import parse_delay
from evenkeel.errors import ConfigurationError, EvenkeelError, ProtocolError
from evenkeel.processes import end_by_signal, end_with_parent
from evenkeel.training.coded.data_files import read_examples
from evenkeel.training.coded.device import Device
from evenkeel.training.coded.messages import DeviceMessage
from evenkeel.training.coded.sockets import (
    KEY_VARIABLE,
    UNPROVEN_BYTES,
    Listener,
    MessageSocket,
    call,
    listen,
    tcp_address,
)
from evenkeel.training.coded.store import BlockStore

__all__ = ["main", "run_device"]

_log = logging.getLogger(__name__)
_MAX_PEERS = 64
_PEER_SILENCE_S = 30.0
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 2.0
_EXAMPLES = """\
Examples:
    evenkeel device --coordinator tcp://127.0.0.1:7100 --name camera-3 --data day1.svm --columns 123 --store ./blocks
    evenkeel device --coordinator tcp://10.0.0.1:7100 --listen tcp://10.0.0.7:0 --key-file key --name helper --store b
"""


class _PeerServer:
    """Gives blocks to peers, in a thread for each."""

    def __init__(self, device: Device, address: Address, key: bytes) -> None:
        self._device, self._key = device, key
        self._server, self.address = listen(address)
        self._places = threading.BoundedSemaphore(_MAX_PEERS)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._server.accept()
            except OSError:
                return
            if not self._places.acquire(blocking=False):
                plain.close()
                continue
            plain.settimeout(_PEER_SILENCE_S)
            threading.Thread(target=self._serve, args=(MessageSocket(plain, UNPROVEN_BYTES),), daemon=True).start()

    def _serve(self, peer: MessageSocket) -> None:
        listener = Listener(self._key)
        try:
            peer.send(listener.welcome())
            while True:
                request = peer.receive()
                if not listener.trusted:
                    peer.send(listener.take(request))
                elif request.kind == "fetch":
                    peer.send(self._device.answer(request))
                else:
                    raise ProtocolError(f"a peer is never sent a {request.kind} message")
        except ProtocolError as error:
            _log.warning("a peer was refused: %s", error)
            with contextlib.suppress(EvenkeelError):
                peer.send(DeviceMessage("refused", {"text": str(error)}))
        except EvenkeelError:
            pass  # it has what it wanted, or will come again
        finally:
            peer.close()
            self._places.release()


def run_device(
    device: Device,
    coordinator: str,
    listen_on: str,
    key: bytes,
    *,
    no_key: bool = False,
    delay: Delay | None = None,
    number: int = 0,
) -> int:
    """Does what the coordinator asks for until it says that the training has ended; gives the exit code.

    Raises:
        ConfigurationError: an address is wrong, or open to anybody.
        ProtocolError: the coordinator does not hold the key, or refuses the device.
    """
    server = _PeerServer(device, tcp_address(listen_on, key, no_key), key)
    device.address = str(server.address)

    def fetch(address: str, request: DeviceMessage) -> DeviceMessage:
        with call(parse_address(address), key, _PEER_SILENCE_S) as peer:
            peer.send(request)
            return peer.receive()

    device.connect(fetch)
    home = parse_address(coordinator)
    retry_s = _FIRST_RETRY_S
    print(f"evenkeel device: {device.name} gives blocks at {device.address}", flush=True)
    while True:
        try:
            with call(home, key, None) as connection:
                connection.send(device.hello())
                retry_s = _FIRST_RETRY_S
                if _work(device, connection, delay, number):
                    return 0
        except ProtocolError:
            raise
        except EvenkeelError as error:
            _log.info("%s; trying again", error)
        # Devices that lost their coordinator at one moment should not all come back at one.
        time.sleep(retry_s * random.uniform(0.5, 1.5))
        retry_s = min(2 * retry_s, _LAST_RETRY_S)


def _work(device: Device, connection: MessageSocket, delay: Delay | None, number: int) -> bool:
    """Answers requests until the connection ends (EvenkeelError) or the training does (True)."""
    requests: list[DeviceMessage] = []
    began_s = time.monotonic()
    while True:
        if not requests:
            requests.append(connection.receive())
        while connection.waiting():
            requests.append(connection.receive())
        request = requests.pop(0)
        if request.kind == "end":
            return True
        if request.kind == "refused":
            raise ProtocolError(f"the coordinator refuses this device: {request.fields.get('text')}")
        if _outdated(request, requests):
            continue
        now = time.monotonic()

        def outdated(request: DeviceMessage = request) -> bool:
            while connection.waiting():
                requests.append(connection.receive())
            return _outdated(request, requests)

        reply = device.answer(request, outdated)
        if delay is not None and "round" in request.fields:
            drawn_s = delay.draw((request.fields["round"] << 16) + number, number, now - began_s)
            until_s = now + drawn_s * device.work(request)
            while (left_s := until_s - time.monotonic()) > 0 and not outdated():
                select.select([connection], [], [], left_s)
        connection.send(reply)


def _outdated(request: DeviceMessage, following: Sequence[DeviceMessage]) -> bool:
    """Tells whether a later request belongs to a later round: then nobody waits for this one's reply any more."""
    own = request.fields.get("round")
    return isinstance(own, int) and any(
        isinstance(later.fields.get("round"), int) and later.fields["round"] > own for later in following
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a device's command line; gives the exit code."""
    end_by_signal()
    parser = argparse.ArgumentParser(
        "evenkeel device",
        description="One device of coded training: keeps examples and coded blocks, and works for its coordinator.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--coordinator", required=True, metavar="ADDRESS", help="Address of the coordinator: tcp://host:port.")
    add("--name", required=True, help="Name of the device; it must be the same after a restart.")
    add("--data", metavar="FILE", help="File of examples: LIBSVM text or npz. Without one the device only helps out.")
    add("--columns", type=int, metavar="N", help="Number of columns of LIBSVM text, the same on all devices.")
    add("--store", required=True, metavar="FOLDER", help="Folder for coded blocks; made if it is not there.")
    add(
        "--listen",
        default="tcp://127.0.0.1:0",
        metavar="ADDRESS",
        help="Address at which other devices get blocks; port 0 takes a free one. Default: tcp://127.0.0.1:0.",
    )
    add("--key-file", default="", metavar="FILE", help=f"File with the shared key; else the variable {KEY_VARIABLE}.")
    add("--no-key", action="store_true", help="Give blocks to anybody who can reach the address, without a key.")
    add(
        "--delay",
        default="",
        metavar="LAW",
        help="Delay to inject, for experiments: two-mode:scale=0.3,seed=7. It is that of an ordinary round; requests "
        "that multiply less take less.",
    )
    add("--number", type=int, default=0, help=argparse.SUPPRESS)  # given to the delay
    add("--parent-pid", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        if given.parent_pid:
            end_with_parent(given.parent_pid)
        key = read_key(given.key_file, KEY_VARIABLE)
        if parse_address(given.coordinator).kind != "tcp":
            raise ConfigurationError(f"--coordinator {given.coordinator!r}: expected tcp://host:port")
        examples = None if given.data is None else read_examples(given.data, given.columns)
        device = Device(given.name, examples, BlockStore(Path(given.store)))
        delay = parse_delay(given.delay) if given.delay else None
        return run_device(
            device, given.coordinator, given.listen, key, no_key=given.no_key, delay=delay, number=given.number
        )
    except EvenkeelError as error:
        print(f"evenkeel device: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigurationError) else 1


if __name__ == "__main__":
    sys.exit(main())
