"""Who may use a server: TLS, certificates of clients, and a token."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from covae_core.contract import TOKEN_HEADER, TOKEN_NAME
from covae_serving.errors import ServingError
from covae_serving.secrets import Secret

# What a token opens. Health stays open: whoever may connect may see that a server lives.
GUARDED = ("inference", "model-config", "metadata")
SYSTEM_AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
SHORTEST_TOKEN = 16
OWN_CERTIFICATE_DAYS = 3650


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ServingError(f"{error.filename}: cannot be read ({error.strerror}); put it back") from error


@dataclass(frozen=True)
class Access:
    """What a server asks of its clients.

    certificate, key: the server's, in PEM format, the certificate with its chain; None: plain text. client_authority:
    whose certificates clients must have; None: no client needs one. token_file: holds the token that clients must send;
    None: anybody's request is answered. insecure: even where others can reach the server without TLS.

    Raises:
        ServingError: a file cannot be read or is none of these, the key is of another certificate, the certificate has
            expired, or the token is too short or cannot be sent.
    """

    certificate: Path | None = None
    key: Path | None = None
    client_authority: Path | None = None
    token_file: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ServingError("--tls-cert, --tls-key: found one of them; expected both or none")
        if self.client_authority and not self.certificate:
            raise ServingError("--client-ca: found without --tls-cert and --tls-key; certificates need TLS")
        for option, path in (("--tls-cert", self.certificate), ("--client-ca", self.client_authority)):
            if path is not None:
                _certificates(option, path)
        if self.certificate and self.key:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password=_refuse)
            except (OSError, ValueError) as error:
                raise ServingError(
                    f"--tls-key: {self.key}: no key of {self.certificate} in PEM format without a password ({error})"
                ) from error
        if self.token_file:
            self._token()

    @property
    def encrypted(self) -> bool:
        """Whether clients speak TLS."""
        return self.certificate is not None

    def check_reach(self, host: str, loopback: bool) -> None:
        """See that nobody listens in, or that the operator means it.

        Raises:
            ServingError: the host can be reached from elsewhere, without TLS, and `insecure` was not said.
        """
        if not (loopback or self.encrypted or self.insecure):
            raise ServingError(
                f"--host: found {host}, which others can reach, without TLS: whoever sees the network reads every image"
                f"{' and the token' if self.token_file else ', and whoever reaches it uses the models'}; expected "
                "--tls-cert and --tls-key, or --insecure where a gateway or a private network keeps others out"
            )

    @_readable()
    def arguments(self, folder: Path, opened: Sequence[str] = ()) -> list[str]:
        """Triton's. folder: the service's own, to write to; opened: protocols that need no key of the service's, and so
        the token, if there is one.

        Raises:
            ServingError: a file cannot be read any more.
        """
        found: list[str] = []
        if self.certificate and self.key:
            found += ["--grpc-use-ssl=true", f"--grpc-server-cert={_safe(self.certificate, folder, 'server.pem')}"]
            found += [f"--grpc-server-key={_safe(self.key, folder, 'server.key')}"]
        if self.client_authority:
            own, _ = _own_certificate(folder)
            authorities = folder / "clients.pem"
            authorities.write_bytes(self.client_authority.read_bytes() + b"\n" + own)
            found += ["--grpc-use-ssl-mutual=true", f"--grpc-root-cert={authorities}"]
        if self.token_file:
            found.append(
                Secret(f"--grpc-restricted-protocol={','.join((*GUARDED, *opened))}:{TOKEN_NAME}={self._token()}")
            )
        return found

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What the supervisor's own calls send."""
        return ((TOKEN_HEADER, self._token()),) if self.token_file else ()

    @_readable()
    def channel(self, address: str, folder: Path, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """The supervisor's own, which trusts the server's chain, and has a certificate that this server alone takes.

        Raises:
            ServingError: a file cannot be read any more.
        """
        if self.certificate is None:
            return grpc.insecure_channel(address, options=options)
        authorities = (SYSTEM_AUTHORITIES, self.certificate, self.client_authority)
        roots = b"\n".join(path.read_bytes() for path in authorities if path is not None and path.is_file())
        own, key = _own_certificate(folder) if self.client_authority else (None, None)
        name = ("grpc.ssl_target_name_override", _server_name(self.certificate))
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(roots, key, own), options=[*options, name])

    def _token(self) -> str:
        assert self.token_file is not None
        try:
            token = self.token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(f"--token-file: {self.token_file}: cannot be read as a token ({error})") from error
        if len(token) < SHORTEST_TOKEN or not token.isprintable() or set(token) & set(" ,:="):
            raise ServingError(
                f"--token-file: {self.token_file}: found {len(token)} letters; expected {SHORTEST_TOKEN} or more, "
                "without spaces, ',', ':' and '=', as `openssl rand -hex 32` makes"
            )
        return token


def _refuse() -> str:
    raise ValueError("the key has a password")


def _certificates(option: str, path: Path) -> list[Any]:
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ServingError(f"{option}: {path}: cannot be read as certificates in PEM format ({error})") from error
    if found[0].not_valid_after_utc < datetime.datetime.now(datetime.timezone.utc):
        raise ServingError(f"{option}: {path}: expired on {found[0].not_valid_after_utc:%Y-%m-%d}; renew it")
    return found


def _server_name(certificate: Path) -> str:
    """A name that the certificate is for."""
    from cryptography import x509

    leaf = _certificates("--tls-cert", certificate)[0]
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        raise ServingError(f"--tls-cert: {certificate}: it has no subjectAltName, which clients go by") from None
    found = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    if not found:
        raise ServingError(f"--tls-cert: {certificate}: it is for no DNS name and no address")
    return str(found[0]).replace("*", "any")


def _safe(path: Path, folder: Path, name: str) -> Path:
    """The file under a name without a space or a comma."""
    link = folder / name
    link.unlink(missing_ok=True)
    link.symlink_to(path.resolve())
    return link


def _own_certificate(folder: Path) -> tuple[bytes, bytes]:
    """The supervisor's certificate and key, made once a service."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    certificate_file, key_file = folder / "supervisor.pem", folder / "supervisor.key"
    if not certificate_file.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "covae-supervisor")])
        now = datetime.datetime.now(datetime.timezone.utc)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=OWN_CERTIFICATE_DAYS))
            .sign(key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        form, secret = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        key_file.touch(mode=0o600)
        key_file.write_bytes(key.private_bytes(pem, form, secret))
        certificate_file.write_bytes(certificate.public_bytes(pem))
    return certificate_file.read_bytes(), key_file.read_bytes()
