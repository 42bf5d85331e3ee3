"""The commands of docs/how-to/trust.md make files that servers, workers and clients take."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from evenkeel.trust.keys import KeyRing
from evenkeel.trust.tls import ClientTls, ServerTls, client_contexts, server_contexts
from tls_handshake import shake

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "trust.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_what_the_page_has_one_type_gives_keys_and_certificates_that_fit(tmp_path):
    blocks = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
    making = [text for language, text in blocks if not language and "openssl" in text]
    assert len(making) == 2
    for block in making:
        subprocess.run(["bash", "-euc", block], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    folder = tmp_path / "trust"
    ring = KeyRing(folder / "clients.keys")
    alice = ring.find((folder / "alice.key").read_text().strip())
    prometheus = ring.find((folder / "prometheus.key").read_text().strip())
    assert (alice.name, alice.rights) == ("alice", {"infer", "watch"})
    assert (prometheus.name, prometheus.rights) == ("prometheus", {"watch"})
    assert ring.find((folder / "worker.secret").read_text().strip()) is None
    ca = folder / "ca.pem"
    gateway = server_contexts(ServerTls(folder / "gateway.pem", folder / "gateway.key", ca))
    camera = client_contexts(ClientTls(ca, folder / "camera.pem", folder / "camera.key"))
    assert shake(gateway.get(), camera.get(), "127.0.0.1").getpeercert()["subject"] == ((("commonName", "camera"),),)
    worker = server_contexts(ServerTls(folder / "worker.pem", folder / "worker.key", ca))
    mine = client_contexts(ClientTls(ca, folder / "gateway.pem", folder / "gateway.key"))
    shake(worker.get(), mine.get(), "workers.internal")
    assert all(not file.stat().st_mode & 0o077 for file in folder.iterdir())
