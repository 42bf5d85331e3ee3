"""The floor under every hop: uvicorn with an application that sends each body back. Its argument is the port."""

import sys
from typing import Any

import uvicorn

__all__ = ["echo"]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    pieces, more = [], True
    while more:
        message = await receive()
        pieces.append(message["body"])
        more = message["more_body"]
    body = b"".join(pieces)
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    uvicorn.run(
        echo, host="127.0.0.1", port=int(sys.argv[1]), lifespan="off", ws="none", interface="asgi3", log_level="warning"
    )
