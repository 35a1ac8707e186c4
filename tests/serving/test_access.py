"""Who may use a server: certificates and tokens, on a real Triton; and that no other user can read its keys."""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tritonclient.grpc import service_pb2 as messages

from covae_client import Client, Timeout, Tls, errors
from covae_serving.access import Access
from covae_serving.errors import ServingError
from covae_serving.process import TritonProcess
from covae_serving.secrets import Secret
from covae_serving.service import Service

TOKEN = "0123456789abcdef0123456789abcdef"
SOON = Timeout(connect_s=2, request_s=5)


class Authority:
    """A certificate authority with a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.certificate = self._write(name, self._made(self._name, self._key.public_key(), None), None)

    def issue(self, name: str, days: int = 30) -> tuple[Path, Path]:
        """A certificate for localhost and the loopback, with the authority's own behind it, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._write(name, self._made(subject, key.public_key(), days), key)
        return self._folder / f"{name}.pem", self._folder / f"{name}.key"

    def _made(self, subject, public_key, days):
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=60))
            .not_valid_after(now + datetime.timedelta(days=days or 30))
            .add_extension(x509.BasicConstraints(ca=days is None, path_length=None), critical=True)
        )
        if days is not None:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())

    def _write(self, name, certificate, key):
        pem, path = serialization.Encoding.PEM, self._folder / f"{name}.pem"
        chain = self.certificate.read_bytes() if key else b""
        path.write_bytes(certificate.public_bytes(pem) + chain)
        if key:
            secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            path.with_suffix(".key").write_bytes(secret)
        return path


class Papers(NamedTuple):
    """Two authorities; a certificate and key of each."""

    ours: Authority
    theirs: Authority
    server: tuple[Path, Path]
    user: tuple[Path, Path]
    stranger: tuple[Path, Path]
    token: Path


@pytest.fixture(scope="module")
def papers(tmp_path_factory) -> Papers:
    folder = tmp_path_factory.mktemp("papers with a space")
    ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
    (folder / "token").write_text(f"{TOKEN}\n")
    return Papers(ours, theirs, ours.issue("server"), ours.issue("user"), theirs.issue("stranger"), folder / "token")


def tls(authority: Authority, chain: tuple[Path, Path] | None = None) -> Tls:
    certificate, key = chain or (None, None)
    return Tls(authority.certificate, key, certificate)


def heals(own_stubs) -> None:
    """Kill the toy's process, and see that its supervisor gets through to Triton."""
    (stub,) = own_stubs(model_name="toy_sample")
    os.kill(stub.pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while stub.pid in {one.pid for one in own_stubs(model_name="toy_sample")} or not own_stubs():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_tls_is_for_those_who_trust_the_server_and_speak_it(papers, toy_repository, own_stubs):
    access = Access(*papers.server)
    with Service(toy_repository, operations=["sample"], grpc_port=0, metrics_port=0, access=access) as service:
        with Client(service.grpc_address, tls=tls(papers.ours)) as client:
            model = client.model("toy")
            before = model.sample(2, seed=0)
            heals(own_stubs)
            assert (model.sample(2, seed=0) == before).all()
        advice = {None: "does it ask for TLS", tls(papers.theirs): "do you trust its authority", Tls(): "do you trust"}
        for wrong, words in advice.items():
            with (
                Client(service.grpc_address, tls=wrong, timeout=SOON) as client,
                pytest.raises(errors.ConnectionFailed, match=f"no server answered.*{words}"),
            ):
                client.model("toy")


@pytest.mark.slow
def test_a_client_without_a_certificate_of_the_authority_is_refused(papers, toy_repository, own_stubs, monkeypatch):
    access = Access(*papers.server, client_authority=papers.ours.certificate)
    with Service(toy_repository, operations=["sample"], grpc_port=0, metrics_port=0, access=access) as service:
        with Client(service.grpc_address, tls=tls(papers.ours, papers.user)) as client:
            assert client.model("toy").sample(2, seed=0).shape == (2, 2, 2, 1)
            heals(own_stubs)
            assert client.model("toy").sample(2, seed=0).shape == (2, 2, 2, 1)
        for wrong in (tls(papers.ours), tls(papers.ours, papers.stranger), None):
            with (
                Client(service.grpc_address, tls=wrong, timeout=SOON) as client,
                pytest.raises(errors.ConnectionFailed, match="no server answered"),
            ):
                client.model("toy")
        # As the commands have it.
        monkeypatch.setenv("COVAE_TLS_CA", str(papers.ours.certificate))
        monkeypatch.setenv("COVAE_TLS_CERT", str(papers.user[0]))
        monkeypatch.setenv("COVAE_TLS_KEY", str(papers.user[1]))
        with Client(service.grpc_address) as client:
            assert client.model("toy").sample(1, seed=0).shape == (1, 2, 2, 1)


@pytest.mark.slow
def test_a_token_is_asked_of_every_request_and_keys_are_in_no_command_line(
    papers, toy_repository, own_stubs, monkeypatch
):
    seen, ended = [], threading.Event()

    def watch() -> None:
        """What any user of the machine can read, as often as it goes."""
        while not ended.is_set():
            for place in Path("/proc").iterdir():
                if place.name.isdecimal():
                    try:
                        line = (place / "cmdline").read_bytes()
                    except OSError:
                        continue
                    if b"tritonserver" in line:
                        seen.append(line)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        access = Access(token_file=papers.token)
        with Service(toy_repository, operations=["sample"], grpc_port=0, metrics_port=0, access=access) as service:
            address = service.grpc_address
            for token in (None, "guess"):
                began = time.monotonic()
                with (
                    Client(address, token=token) as client,
                    pytest.raises(errors.AccessDenied, match=r"its token goes in Client\(token=…\)"),
                ):
                    client.model("toy")
                assert time.monotonic() - began < 5, "it was asked again"
            with Client(address, token=TOKEN) as client:
                before = client.model("toy").sample(2, seed=0)
                heals(own_stubs)
                assert (client.model("toy").sample(2, seed=0) == before).all()
            monkeypatch.setenv("COVAE_TOKEN_FILE", str(papers.token))
            with Client(address) as client:
                assert (client.model("toy").sample(2, seed=0) == before).all()
            key = service._server.connection._admin[0][1]
    finally:
        ended.set()
        watcher.join()
    assert len(seen) > 10
    assert any(b"COVAE_SECRET_" in line for line in seen)
    assert not any(TOKEN.encode() in line or key.encode() in line for line in seen)


def test_secrets_reach_a_program_that_a_script_becomes(tmp_path):
    script = tmp_path / "sleep"
    script.write_text('#!/bin/sh\ntouch ran\nexec /bin/sleep "$@"\n')
    script.chmod(0o700)
    process = TritonProcess([str(script), Secret("0.5")], {"PATH": os.environ["PATH"]}, tmp_path)
    try:
        time.sleep(0.1)
        assert Path(f"/proc/{process.pid}/cmdline").read_bytes() == b"/bin/sleep\0COVAE_SECRET_1\0"
        assert process.wait(10)
        assert (process.exit_code(), process.log_tail(), (tmp_path / "ran").exists()) == (0, "", True)
    finally:
        process.close()


def test_a_program_that_does_not_start_is_told_as_without_secrets(tmp_path):
    process = TritonProcess(["/nonexistent/tritonserver", Secret("x")], {}, tmp_path)
    assert process.wait(10)
    process.close()
    assert process.exit_code() == 1
    assert "No such file or directory" in process.log_tail()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Access(p.server[0]), "--tls-cert, --tls-key: found one of them"),
        (lambda p: Access(p.server[1], p.server[1]), r"--tls-cert: .*server\.key: cannot be read as certificates"),
        (lambda p: Access(p.server[0], p.user[1]), r"--tls-key: .*user\.key: no key of .*server\.pem"),
        (lambda p: Access(*p.ours.issue("old", days=-1)), r"--tls-cert: .*old\.pem: expired on 20"),
        (lambda p: Access(client_authority=p.ours.certificate), "--client-ca: found without --tls-cert"),
        (lambda p: Access(token_file=p.server[0].parent / "none"), "--token-file: .*none: cannot be read as a token"),
        (lambda p: Access(token_file=p.server[0]), "--token-file: .*: found .* letters; expected 16 or more"),
    ],
)
def test_papers_that_are_not_in_order_are_named(make, message, papers):
    with pytest.raises(ServingError, match=message):
        make(papers)


def test_beyond_this_machine_it_takes_tls_or_a_word(papers, toy_repository):
    for host in ("0.0.0.0", "192.0.2.1"):
        with pytest.raises(
            ServingError, match=f"--host: found {host}, which others can reach, without TLS.*--insecure"
        ):
            Service(toy_repository, host=host)
        Service(toy_repository, host=host, access=Access(*papers.server))
        Service(toy_repository, host=host, access=Access(insecure=True))
    Service(toy_repository, host="localhost")


@pytest.mark.slow
def test_what_is_opened_still_asks_for_the_token(papers, toy_repository, connect):
    access = Access(token_file=papers.token)
    options = {"open_protocols": ["statistics", "logging"], "grpc_port": 0, "metrics_port": 0}
    with Service(toy_repository, operations=["sample"], access=access, **options) as service:
        stub = connect(service.grpc_address).stub
        request = messages.ModelStatisticsRequest(name="toy_sample")
        for refused in (lambda: stub.ModelStatistics(request), lambda: stub.LogSettings(messages.LogSettingsRequest())):
            with pytest.raises(grpc.RpcError, match="restricted"):
                refused()
        assert stub.ModelStatistics(request, metadata=[("triton-grpc-protocol-covae-token", TOKEN)]).model_stats


@pytest.mark.slow
def test_triton_is_started_again_under_tls_and_waits_for_papers_that_are_away(
    papers, toy_repository, own_stubs, tmp_path, caplog
):
    authority = Path(shutil.copy(papers.ours.certificate, tmp_path / "authority.pem"))
    access = Access(*papers.server, client_authority=authority)
    with (
        Service(toy_repository, operations=["sample"], grpc_port=0, metrics_port=0, access=access) as service,
        Client(service.grpc_address, tls=tls(papers.ours, papers.user)) as client,
    ):
        before = client.model("toy").sample(2, seed=0)
        authority.rename(tmp_path / "away.pem")
        os.kill(service.triton_pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while "authority.pem: cannot be read" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (tmp_path / "away.pem").rename(authority)
        assert (client.model("toy").sample(2, seed=0) == before).all()


def test_a_script_that_becomes_nothing_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr("covae_serving.secrets.PATIENCE_S", 0.5)
    script = tmp_path / "tritonserver"
    script.write_text("#!/bin/sh\nsleep 60\n")
    script.chmod(0o700)
    process = TritonProcess([str(script), Secret("x")], {"PATH": os.environ["PATH"]}, tmp_path)
    assert process.wait(10)
    process.close()
    assert process.exit_code() == -signal.SIGKILL


def test_where_nothing_can_be_hidden_it_is_said_and_the_program_runs(tmp_path, monkeypatch, caplog):
    def denied(*arguments: object) -> None:
        raise PermissionError(13, "denied")

    monkeypatch.setattr("covae_serving.secrets._lead", denied)
    process = TritonProcess(["/bin/echo", Secret("told")], {}, tmp_path)
    assert process.wait(10)
    process.close()
    assert (process.exit_code(), process.log_tail()) == (0, "told")
    assert "Triton's command line shows the service's key" in caplog.text
