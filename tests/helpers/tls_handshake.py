"""A handshake in memory."""

import ssl


def shake(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost") -> ssl.SSLObject:
    """Has the two make a connection; gives the server's side of it."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    of_server = server.wrap_bio(there, back, server_side=True)
    of_client = client.wrap_bio(back, there, server_hostname=name)
    for _ in range(4):
        for side in (of_client, of_server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return of_server
