"""Where nodes are: what a file, DNS and Kubernetes say, right and wrong, and what becomes of a fleet by it."""

import asyncio
import json
import struct

import pytest
from hypothesis import given, strategies as st

from evenkeel.errors import BackendError, BackendLostError, ConfigurationError
from evenkeel.serving.config import read_config
from evenkeel.serving.discovery import dns, kubernetes
from evenkeel.serving.discovery.by_name import discovery_of
from evenkeel.serving.discovery.dns import DnsNames, DnsServices, read_srv, write_question
from evenkeel.serving.discovery.kubernetes import ApiServer, KubernetesService
from evenkeel.serving.discovery.watched_file import WatchedFile, read_addresses
from evenkeel.serving.feed import Feed


class Found:
    """Collects what a discovery finds; `next` waits for what comes after what was seen."""

    def __init__(self):
        self.all, self.came = [], asyncio.Event()

    def __call__(self, addresses):
        self.all.append(list(addresses))
        self.came.set()

    async def next(self):
        async with asyncio.timeout(10):
            await self.came.wait()
        self.came.clear()
        return self.all[-1]


def watching(discovery):
    found = Found()
    return found, asyncio.ensure_future(discovery.watch(found))


async def stop(watch):
    assert not watch.done()
    watch.cancel()
    await asyncio.wait([watch])


# ---- texts ----


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("file:nodes.yaml", WatchedFile),
        ("dns://workers.example:9000", DnsNames),
        ("srv://_evenkeel._tcp.example.org", DnsServices),
        ("kubernetes://workers.prod:work", KubernetesService),
        ("kubernetes://workers", KubernetesService),
    ],
)
def test_a_text_names_a_discovery(text, kind):
    assert isinstance(discovery_of(text), kind)


@pytest.mark.parametrize(
    "text", ["file:", "dns://", "dns://x", "dns://x:0", "dns://x:70000", "dns://a b:1", "srv://", "srv://a..b",
             "kubernetes://", "kubernetes://Up", "kubernetes://a/b", "kubernetes://a.b:c/d", "etcd://x"],
)  # fmt: skip
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigurationError, match="expected file:path, dns://name:port"):
        discovery_of(text)


def test_a_configuration_lists_discoveries_among_nodes(tmp_path):
    config = read_config({"replicas": ["tcp://127.0.0.1:1", "file:nodes.txt", "dns://w:1"]}, tmp_path)
    assert config.replicas.discover == (f"file:{tmp_path}/nodes.txt", "dns://w:1")
    assert config.replicas.total == 3
    assert read_config({"backups": {"count": 1, "discover": ["file:b"]}}, tmp_path).backups.discover == (
        f"file:{tmp_path}/b",
    )
    with pytest.raises(ConfigurationError, match=r"replicas.*dns://w:"):
        read_config({"replicas": ["dns://w:"]})


# ---- a file ----


def test_a_file_is_a_list_in_yaml_or_json_or_text():
    assert read_addresses(b"- tcp://a:1\n- tcp://b:2\n- tcp://a:1\n", ".yaml") == ["tcp://a:1", "tcp://b:2"]
    assert read_addresses(b'{"addresses": ["tcp://a:1"]}', ".json") == ["tcp://a:1"]
    assert read_addresses(b"# nodes\ntcp://a:1  # first\n\n unix:/x\n", "") == ["tcp://a:1", "unix:/x"]


@pytest.mark.parametrize(
    ("content", "suffix", "says"),
    [
        (b"", "", "holds no addresses"),
        (b"# nothing\n", "", "holds no addresses"),
        (b"[1, 2]", ".json", "holds no addresses"),
        (b"{a: b}", ".yaml", "holds no addresses"),
        (b"&a [*a]", ".yaml", "holds no addresses"),
        (b"- [", ".yaml", "cannot be read"),
        (b"- 2026-13-45", ".yaml", "cannot be read"),
        (b"- !!timestamp x", ".yaml", "cannot be read"),
        (b"[" * 2_000, ".yaml", "cannot be read"),
        (b"!!python/object/apply:os.system [true]", ".yaml", "cannot be read"),
        (b"\xff\xff", "", "cannot be read"),
        (b"x\n" * 1025, "", "duplicates"),
        (b"\n".join(b"tcp://a:%d" % number for number in range(1025)), "", "holds 1025 addresses; at most 1024"),
        (b"x" * ((1 << 20) + 1), "", "holds more than 1 MiB"),
    ],
)
def test_other_files_are_refused(content, suffix, says):
    if says == "duplicates":
        says = "holds 1025 addresses; at most 1024"
    with pytest.raises(ConfigurationError, match=says):
        read_addresses(content, suffix)


def test_a_file_is_watched_and_what_cannot_be_used_changes_nothing(tmp_path, caplog):
    async def run():
        path = tmp_path / "nodes"
        found, watch = watching(WatchedFile(path, 0.01))
        while "cannot be read: No such file" not in caplog.text:
            await asyncio.sleep(0.01)
        path.write_text("tcp://a:1\n")
        assert await found.next() == ["tcp://a:1"]
        path.write_text("")
        while "holds no addresses" not in caplog.text:
            await asyncio.sleep(0.01)
        path.write_text("tcp://a:1\ntcp://b:1\n")
        assert await found.next() == ["tcp://a:1", "tcp://b:1"]
        await stop(watch)
        assert len(found.all) == 2

    asyncio.run(run())


# ---- DNS ----


def test_names_are_looked_up_again_and_no_answer_changes_nothing(monkeypatch, caplog):
    answers = [["tcp://1:9"], OSError("no such host"), ["tcp://2:9"], [], ["tcp://2:9"], ["tcp://2:9"]]

    async def addresses(host, port):
        answer = answers.pop(0) if answers else ["tcp://2:9"]
        if isinstance(answer, OSError):
            raise answer
        return answer

    async def run():
        monkeypatch.setattr(dns, "_addresses", addresses)
        found, watch = watching(DnsNames("workers", 9, 0.001))
        assert await found.next() == ["tcp://1:9"]
        assert sorted(await found.next()) == ["tcp://1:9", "tcp://2:9"]  # a large set is answered in part
        assert await found.next() == ["tcp://2:9"]  # missing three times in a row
        await stop(watch)
        assert "no answer for workers" in caplog.text

    asyncio.run(run())


def test_a_name_of_this_machine_is_looked_up():
    async def run():
        found, watch = watching(DnsNames("127.0.0.1", 9000))
        assert await found.next() == ["tcp://127.0.0.1:9000"]
        await stop(watch)

    asyncio.run(run())


NAME = "_evenkeel._tcp.example.org"


def srv_answer(question, services, ttl=7, flags=0x8180):
    """An answer with names that point back into the question."""
    number = struct.unpack("!H", question[:2])[0]
    records = b""
    for priority, host, port in services:
        target = b"".join(bytes([len(label)]) + label.encode() for label in host.split(".")) + b"\0"
        data = struct.pack("!3H", priority, 0, port) + target
        records += b"\xc0\x0c" + struct.pack("!HHIH", 33, 1, ttl, len(data)) + data
    return struct.pack("!6H", number, flags, 1, len(services), 0, 0) + question[12:] + records


def test_services_of_the_best_priority_are_read():
    question = write_question(NAME, 7)
    answer = srv_answer(question, [(1, "a.example.org", 9000), (1, "b", 9001), (2, "c", 1)])
    assert read_srv(answer, NAME, 7) == ([("a.example.org", 9000), ("b", 9001)], 7.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda answer: b"", "cannot be read"),
        (lambda answer: b"\0\1" + answer[2:], "another question"),
        (lambda answer: answer[:2] + b"\x01\x00" + answer[4:], "another question"),
        (lambda answer: answer[:2] + b"\x81\x83" + answer[4:], "no such name"),
        (lambda answer: answer[:2] + b"\x81\x82" + answer[4:], "says error 2"),
        (lambda answer: answer[:13] + b"X" + answer[14:], "another question"),
        (lambda answer: answer[:-3], "cannot be read|holds no service|no end"),
        (lambda answer: answer[:12] + b"\xc0\x0c" + answer[14:], "no end"),
        (lambda answer: answer[:6] + b"\0\0" + answer[8:], "holds no service"),
    ],
)
def test_improper_answers_are_refused(change, says):
    answer = srv_answer(write_question(NAME, 7), [(1, "a", 9000)])
    with pytest.raises(BackendError, match=says):
        read_srv(change(answer), NAME, 7)


@given(st.binary(max_size=300), st.integers(0, 200))
def test_whatever_an_answer_holds_it_is_read_or_refused(noise, place):
    answer = srv_answer(write_question(NAME, 7), [(1, "a.b", 9000), (1, "c", 2)])
    mixed = answer[:place] + noise + answer[place + len(noise) :]
    try:
        services, ttl = read_srv(mixed, NAME, 7)
        assert services
        assert 0 <= ttl < 1 << 32
    except BackendError:
        pass


@pytest.mark.parametrize("name", ["a" * 64, ".".join(["abc"] * 80), "a..b"])
def test_what_is_no_name_is_not_asked_for(name):
    with pytest.raises((BackendError, UnicodeError)):
        write_question(name, 1)


@pytest.mark.parametrize("truncated", [False, True], ids=["udp", "tcp"])
def test_a_service_is_asked_for_over_the_network(truncated):
    async def run():
        class Server(asyncio.DatagramProtocol):
            def connection_made(self, transport):
                self.transport = transport

            def datagram_received(self, data, addr):
                self.transport.sendto(b"\0\0 of somebody else", addr)
                flags = 0x8380 if truncated else 0x8180
                services = [] if truncated else [(1, "127.0.0.1", 9000)]
                self.transport.sendto(srv_answer(data, services, flags=flags), addr)

        async def over_tcp(reader, writer):
            (size,) = struct.unpack("!H", await reader.readexactly(2))
            answer = srv_answer(await reader.readexactly(size), [(1, "127.0.0.1", 9000)])
            writer.write(struct.pack("!H", len(answer)) + answer)
            await writer.drain()
            writer.close()

        tcp = await asyncio.start_server(over_tcp, "127.0.0.1", 0)
        port = tcp.sockets[0].getsockname()[1]
        loop = asyncio.get_running_loop()
        udp, _ = await loop.create_datagram_endpoint(Server, local_addr=("127.0.0.1", port))
        found, watch = watching(DnsServices(NAME, ["127.0.0.1"], port))
        assert await found.next() == ["tcp://127.0.0.1:9000"]
        await stop(watch)
        udp.close()
        tcp.close()

    asyncio.run(run())


# ---- Kubernetes ----


def a_slice(name, *addresses, ready=True, version="1", **changes):
    return {
        "metadata": {"name": name, "resourceVersion": version},
        "addressType": "IPv4",
        "ports": [{"name": "other", "port": 1}, {"name": "work", "port": 9000}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": ready}} for address in addresses],
        **changes,
    }


class FakeApi:
    """Answers list and watch on loopback; `events` are sent to those who watch, None ends a watch."""

    def __init__(self):
        self.pages = [{"metadata": {"resourceVersion": "5"}, "items": [a_slice("s1", "10.0.0.1")]}]
        self.status, self.asked, self.raw = 200, [], None
        self.events: asyncio.Queue = asyncio.Queue()
        self.serving: dict[asyncio.Task, asyncio.StreamWriter] = {}

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for task, writer in self.serving.items():
            task.cancel()
            writer.close()
        await asyncio.wait(self.serving)
        await self.server.wait_closed()

    async def serve(self, reader, writer):
        self.serving[asyncio.current_task()] = writer
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(head)
        if self.raw is not None or self.status != 200:
            writer.write(self.raw or b"HTTP/1.1 %d No\r\ncontent-length: 0\r\n\r\n" % self.status)
        elif "watch=1" in head:
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            while (event := await self.events.get()) is not None:
                line = json.dumps(event).encode() + b"\n"
                for part in (line[:10], line[10:]):  # a line may come in several chunks
                    writer.write(b"%x\r\n%b\r\n" % (len(part), part))
                await writer.drain()
            writer.write(b"0\r\n\r\n")
        else:
            page = self.pages["continue=next" in head] if len(self.pages) > 1 else self.pages[0]
            body = json.dumps(page, indent=1).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await writer.drain()
        writer.close()


def test_slices_are_listed_and_watched(tmp_path, monkeypatch):
    monkeypatch.setattr(kubernetes, "_SHORT_S", 0.01)
    (tmp_path / "token").write_text("secret\n")

    async def run():
        async with FakeApi() as api:
            service = KubernetesService("workers", "prod", "work", ApiServer(api.url, tmp_path / "token"))
            found, watch = watching(service)
            assert await found.next() == ["tcp://10.0.0.1:9000"]
            await api.events.put({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "6"}}})
            await api.events.put({"type": "ADDED", "object": a_slice("s2", "10.0.0.2", "10.0.0.3", version="7")})
            assert await found.next() == [f"tcp://10.0.0.{number}:9000" for number in (1, 2, 3)]
            await api.events.put({"type": "MODIFIED", "object": a_slice("s2", "10.0.0.3", version="8")})
            assert await found.next() == ["tcp://10.0.0.1:9000", "tcp://10.0.0.3:9000"]
            await api.events.put(None)  # the watch ends, and another one goes on from there
            await api.events.put({"type": "DELETED", "object": a_slice("s1", version="9")})
            assert await found.next() == ["tcp://10.0.0.3:9000"]
            assert "resourceVersion=8" in api.asked[-1]
            await api.events.put({"type": "ERROR", "object": {"code": 410}})  # too old: it begins with a list
            assert await found.next() == ["tcp://10.0.0.1:9000"]
            await stop(watch)
            assert all("Authorization: Bearer secret\r\n" in head for head in api.asked)
            assert (
                "/namespaces/prod/endpointslices?labelSelector=kubernetes.io%2Fservice-name%3Dworkers" in api.asked[0]
            )

    asyncio.run(run())


def test_a_list_comes_in_pages_and_only_ready_pods_count():
    async def run():
        async with FakeApi() as api:
            first = a_slice("s1", "10.0.0.1")
            first["endpoints"] += [
                {"addresses": ["10.0.0.8"], "conditions": {"ready": True, "terminating": True}},
                {"addresses": ["10.0.0.9"], "conditions": {"ready": False}},
                {"addresses": ["10.0.0.7"]},  # nothing said is ready
                {"addresses": [7]},
                "nonsense",
            ]
            api.pages = [
                {"metadata": {"continue": "next"}, "items": [first, a_slice("x", "a", addressType="FQDN"), None]},
                {"metadata": {"resourceVersion": "5"}, "items": [a_slice("s6", "fd00::1", addressType="IPv6")]},
            ]
            found, watch = watching(KubernetesService("workers", "prod", "9000", ApiServer(api.url)))
            assert await found.next() == ["tcp://10.0.0.1:9000", "tcp://10.0.0.7:9000", "tcp://[fd00::1]:9000"]
            await stop(watch)

    asyncio.run(run())


def test_a_server_that_refuses_or_talks_nonsense_changes_nothing(monkeypatch, caplog):
    monkeypatch.setattr(kubernetes, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(kubernetes, "_MAX_PAUSE_S", 0.01)
    monkeypatch.setattr(kubernetes, "_SHORT_S", 0.01)

    async def run():
        async with FakeApi() as api:
            api.status = 403
            found, watch = watching(KubernetesService("workers", "prod", "", ApiServer(api.url)))
            while "status 403: see the service account's rights" not in caplog.text:
                await asyncio.sleep(0.005)
            for raw in (
                b"SSH-2.0\r\n\r\n",
                b"",
                b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nffffffffff\r\n",
                b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n",
                b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n[[[",
                b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]",
                b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 200 + b"\r\n",
            ):
                api.raw, before = raw, len(api.asked)
                while len(api.asked) < before + 2:
                    await asyncio.sleep(0.005)
            assert not watch.done()
            assert found.all == []
            api.raw, api.status = None, 200
            assert await found.next() == ["tcp://10.0.0.1:1"]
            await stop(watch)

    asyncio.run(run())


def test_outside_of_a_cluster_the_log_says_so(monkeypatch):
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigurationError, match="this is no pod of a cluster"):
        ApiServer.of_this_pod()


# ---- the fleet ----


class Backend:
    def __init__(self, name):
        self.name = name


class Joining:
    """A fleet that notes who comes and goes."""

    def __init__(self):
        self.here, self.steps = set(), []

    async def join(self, backend, kind, *, patient):
        assert patient
        if backend.name == "tcp://full:1":
            raise BackendLostError("no room")
        self.here.add(backend.name)
        self.steps.append(f"+{backend.name}")

    async def leave(self, name):
        self.here.remove(name)
        self.steps.append(f"-{name}")


class Said:
    """A discovery that says what it is told, after a fault of its own."""

    def __init__(self):
        self.watched, self.tries = asyncio.Event(), 0

    async def watch(self, found):
        self.tries += 1
        if self.tries == 1:
            raise RuntimeError("a fault of the discovery's own")
        self.found = found
        self.watched.set()
        await asyncio.Event().wait()


def make(kind, where):
    if where.startswith("bad"):
        raise ConfigurationError("no address")
    return Backend(where)


def test_a_fleet_follows_what_is_found_and_an_empty_answer_changes_nothing(caplog, monkeypatch):
    monkeypatch.setattr("evenkeel.serving.feed._PAUSE_S", 0.001)

    async def run():
        fleet, said = Joining(), Said()
        feed = Feed(fleet, "replica", make, said)
        running = asyncio.ensure_future(feed.run())
        await said.watched.wait()
        said.found(["tcp://a:1", "bad", "tcp://full:1", "tcp://b:1", "tcp://a:1"])
        await feed.settled.wait()
        assert fleet.here == {"tcp://a:1", "tcp://b:1"}
        said.found([])
        said.found(["tcp://b:1", "tcp://c:1"])
        while fleet.here != {"tcp://b:1", "tcp://c:1"}:
            await asyncio.sleep(0)
        assert fleet.steps[-2:] == ["+tcp://c:1", "-tcp://a:1"]  # never fewer than needed
        assert "no replica was found; those that are here stay" in caplog.text
        assert "the replica at bad does not join: no address" in caplog.text
        assert "a fault of the discovery's own" in caplog.text
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(run())
