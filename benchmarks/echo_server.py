"""The floor under every hop: our own HTTP/1.1 with a handler that sends each body back. Its argument is the port."""

import asyncio
import sys

import uvloop

from evenkeel.serving.http.connection import Exchange, HttpLimits, HttpServer

__all__ = ["Echo"]


class Echo:
    def handle(self, exchange: Exchange) -> None:
        exchange.respond(200, b"content-type: application/octet-stream\r\n", exchange.request.body)

    def gone(self, exchange: Exchange) -> None:
        raise AssertionError("every exchange is answered at once")


async def main(port: int) -> None:
    http = HttpServer(Echo(), HttpLimits(), ())
    listener = await asyncio.get_running_loop().create_server(http.connect, "127.0.0.1", port)
    await listener.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
