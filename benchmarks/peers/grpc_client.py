"""Asks a gRPC method again and again with the same bytes, closed loop; prints what it saw as JSON.

Arguments: target, method, connections, seconds of warm-up, seconds measured (0: one question and its answer), and the
server's processes separated by commas. The request's bytes come on standard input. Runs in the peer's environment,
where grpcio is; like the HTTP client it does no more than it has to: messages are not parsed.
"""

import asyncio
import json
import sys
import time

import grpc
from process_tree import cpu_s

_TIMEOUT_S = 30.0
# Without it channels to the same target share one connection.
_OPTIONS = (("grpc.use_local_subchannel_pool", 1),)


class Client:
    def __init__(self, target: str, method: str, connections: int, request: bytes) -> None:
        self.channels = [grpc.aio.insecure_channel(target, options=_OPTIONS) for _ in range(connections)]
        self._method = method
        self._request = request

    async def ask_once(self) -> bytes:
        return await self.channels[0].unary_unary(self._method)(self._request, timeout=2.0)

    async def drive(self, seconds: float) -> tuple[list[float], int]:
        """Latencies of all answers in ms, and how many were errors."""
        latencies_ms: list[float] = []
        failed = await asyncio.gather(*[self._loop(channel, seconds, latencies_ms) for channel in self.channels])
        return latencies_ms, sum(failed)

    async def _loop(self, channel: grpc.aio.Channel, seconds: float, latencies_ms: list[float]) -> int:
        ask = channel.unary_unary(self._method)
        failed = 0
        now_s = time.perf_counter()
        until_s = now_s + seconds
        while now_s < until_s:
            sent_s = now_s
            try:
                await ask(self._request, timeout=_TIMEOUT_S)
            except grpc.aio.AioRpcError:
                failed += 1
            now_s = time.perf_counter()
            latencies_ms.append((now_s - sent_s) * 1e3)
        return failed


async def main() -> None:
    target, method, connections, warm_up_s, seconds, pids = sys.argv[1:]
    client = Client(target, method, int(connections), sys.stdin.buffer.read())
    servers = [int(pid) for pid in pids.split(",") if pid]
    if not float(seconds):
        try:
            print(json.dumps({"answer": (await client.ask_once()).hex()}))
        except grpc.aio.AioRpcError as error:
            print(json.dumps({"wrong": f"gRPC {error.code().name}: {(error.details() or '')[:160]}"}))
        return
    await client.drive(float(warm_up_s))
    server_cpu_s, client_cpu_s, began_s = cpu_s(servers), time.process_time(), time.perf_counter()
    latencies_ms, failed = await client.drive(float(seconds))
    seen = {
        "latencies_ms": latencies_ms,
        "failed": failed,
        "elapsed_s": time.perf_counter() - began_s,
        "client_cpu_s": time.process_time() - client_cpu_s,
        "server_cpu_s": cpu_s(servers) - server_cpu_s,
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    asyncio.run(main())
