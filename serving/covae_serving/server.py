"""One Triton on one model repository: started with safe defaults, asked to reload a model, stopped without a trace."""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import grpc
from google.protobuf import text_format

from covae_core.release import CONFIG_FILE
from covae_serving.access import Access
from covae_serving.connection import KEY_NAME, RESTRICTED, Connection
from covae_serving.errors import ServingError
from covae_serving.health import NO_ANSWER, Timing
from covae_serving.installation import find_installation, has_gpu
from covae_serving.metrics import fetch_page
from covae_serving.ports import LOOPBACK, choose_ports, free_port, is_free
from covae_serving.probe import probe_request
from covae_serving.process import TritonProcess
from covae_serving.regions import Regions, backend_folders, check_folder, remove_stale
from covae_serving.repository import HarmfulError, ServedModel, read_model
from covae_serving.secrets import Secret
from covae_serving.stubs import STOPPED, Stub, find_stubs, is_stopped

POLL_S = 0.05
CONNECT_S = 0.5
# In the log of a Triton that could not listen.
ADDRESS_TAKEN = "already in use"
BIND_ATTEMPTS = 3
# A stub's region holds its tensors in flight. It is allocated whole at the start, and a container's /dev/shm can be as
# small as 64 MB; a batch of factors takes 80 MB, which steps of 1 MB (Triton's default) would reach slowly.
REGION_BYTES = 4 << 20
REGION_GROWTH_BYTES = 16 << 20
# Triton's own exit takes this long at most once its requests are done.
EXIT_S = 4.0
# A Triton that does not tell its name within this time is hung itself.
ALIVE_S = 2.0
# A stopped one is given this long to be continued, by whoever stopped it.
STOPPED_S = 3.0


class Stopped(Exception):
    """The service was stopped before it was ready."""


class ModelRefusedError(ServingError):
    """Triton is well but cannot load the model: restarting Triton would not help."""


class Server:
    """One Triton that serves the given models.

    Models are loaded by name in Triton's explicit model control, for two reasons: a service can be a part of a
    repository, and a model whose process died can be loaded anew while the others answer. Control, like every other
    protocol that changes the server, needs a key drawn at each start, which no other user of the machine can read
    (`covae_serving.secrets`).

    Create and use it in one thread, which must live as long as the server (see `TritonProcess`); only `kill` may be
    called from elsewhere. `stopping` is asked while it waits; once it says yes, the wait ends with `Stopped`.

    Raises:
        ServingError: there is no Triton to start.
    """

    def __init__(
        self,
        repository: Path,
        models: Sequence[ServedModel],
        host: str,
        port: int,
        timing: Timing,
        stopping: Callable[[], bool],
        open_protocols: Sequence[str] = (),
        trace_url: str = "",
        access: Access | None = None,
    ) -> None:
        self._access = access or Access()
        self._trace_url = trace_url
        self._restricted = [name for name in RESTRICTED if name not in open_protocols]
        self._open_protocols = tuple(open_protocols)
        self.ports: tuple[int, int] | None = None
        self.stubs: dict[str, list[Stub]] = {}
        self._repository = repository
        self.models = {model.model_name: model for model in models}
        # NAMEs of which an operation has answered: all of theirs keep their version, whatever is exported meanwhile and
        # however often Triton starts.
        self._pinned: set[str] = set()
        self._host = LOOPBACK if host == "localhost" else host
        self._asked_port = port
        self._timing = timing
        self._stopping = stopping
        self._process: TritonProcess | None = None
        self._stopped_since: float | None = None
        self._metrics_url = ""
        self._connection: Connection | None = None
        self._installation = find_installation()
        try:
            remove_stale()
            self._regions = Regions()
        except OSError as error:
            raise ServingError(f"shared memory or the temp folder cannot be used: {error}") from error
        self._models = self._regions.folder / "models"
        try:
            for model in models:
                self._lay_out(model)
        except OSError as error:
            self._regions.close()
            raise ServingError(f"{self._models}: the models cannot be laid out there: {error}") from error
        try:
            check_folder(self._regions.folder)
            self._backends = self._installation.lay_out_backends(self._regions.folder)
        except OSError as error:
            self._regions.close()
            raise ServingError(f"Triton's backends cannot be copied to the temp folder: {error}") from error
        except ServingError:
            self._regions.close()
            raise

    @property
    def connection(self) -> Connection:
        """The connection to the Triton that runs now."""
        if self._connection is None:
            raise ServingError("Triton does not run; call launch() first")
        return self._connection

    def metrics_page(self) -> bytes:
        """The page of the Triton that runs now; empty if none does. Any thread may ask."""
        url = self._metrics_url
        return fetch_page(url) if url else b""

    def launch(self) -> dict[str, str]:
        """Start Triton and wait until every model has been tried with a real inference.

        Returns:
            The models that do not answer, each with its own error; empty when all is well.

        Raises:
            ServingError: a port is taken, or Triton does not start; the message ends with the tail of Triton's log.
            Stopped: the service is being stopped.
        """
        if self.ports is not None:  # a restart keeps the addresses that clients know
            harmful = {}
            for name in self.models:
                try:
                    self._read_again(name)
                except HarmfulError as error:
                    harmful[name] = str(error)
            return self._start((self.ports[0], free_port(LOOPBACK)), harmful)
        for _ in range(BIND_ATTEMPTS):
            ports = choose_ports(self._host, self._asked_port)
            try:
                failures = self._start(ports)
            except ServingError as error:
                # Another program may have taken a chosen port before Triton could, and let go of it since.
                if ADDRESS_TAKEN not in str(error) and is_free(self._host, ports[0]) and is_free(LOOPBACK, ports[1]):
                    raise
                continue
            self.ports = ports
            return failures
        raise ServingError(f"{self._host}: other programs took the chosen ports {BIND_ATTEMPTS} times; try again")

    def _lay_out(self, model: ServedModel) -> None:
        """An entry for Triton in a folder that is the service's own: the configuration as it was checked, and a link to
        the version's folder. Nothing that is exported later is seen, nor is a name that a shell would read."""
        folder = self._models / model.model_name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / CONFIG_FILE).write_text(text_format.MessageToString(model.config), encoding="utf-8")
        (folder / str(model.version)).symlink_to(model.graph.parent.resolve(), target_is_directory=True)

    def _read_again(self, model_name: str) -> None:
        """Take a model that never answered as the repository has it now; if it is broken, that is Triton's to say.

        Raises:
            HarmfulError: it holds what Triton would run.
        """
        old = self.models[model_name]
        if old.name in self._pinned:
            return
        try:
            self.models[model_name] = read_model(self._repository, old.name, old.operation)
        except HarmfulError:
            raise
        except (ServingError, OSError):
            return
        self._lay_out(self.models[model_name])

    @property
    def pid(self) -> int | None:
        """Triton's, which is also its stubs' group; None while it does not run."""
        return self._process.pid if self._process else None

    def stopped(self) -> bool:
        """Whether Triton's process has been stopped by a signal for STOPPED_S: it answers nobody, and uses nothing."""
        now, pid = time.monotonic(), self.pid
        if pid is None or not is_stopped(pid):
            self._stopped_since = None
            return False
        self._stopped_since = self._stopped_since or now
        return now - self._stopped_since > STOPPED_S

    def exit_code(self) -> int | None:
        """None while Triton runs; negative: the signal that ended it."""
        return self._process.exit_code() if self._process else 0

    def reload(self, model_name: str, hung: bool) -> None:
        """Load a model anew and try it with a real inference; the others answer meanwhile.

        A model of which any operation ever answered is loaded in the same version, whatever was exported meanwhile, as
        its siblings have that one too, and clients opened it; another one as the repository has it now.

        Raises:
            ModelRefusedError: the model cannot be loaded from the repository as it is now.
            ServingError: Triton did not do it; only a new Triton will help.
        """
        old = self.stubs[model_name]
        self._check_alive()
        if hung:
            for stub in old:
                stub.kill()
        try:
            self.connection.unload(model_name, self._timing.reload_s)
            self._read_again(model_name)
            self.connection.load(model_name, self._timing.reload_s)
        except HarmfulError as error:
            raise ModelRefusedError(str(error)) from error
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {readable(error.details())}"
            if error.code() in NO_ANSWER:
                raise ServingError(reason) from error
            raise ModelRefusedError(reason) from error
        for stub in old:
            if stub.state() is None:
                self._regions.remove(stub.region)
        failure = self._try_models([model_name], self._timing.reload_s).get(model_name)
        if failure:
            raise ServingError(failure)
        self._pinned.add(self.models[model_name].name)
        self._regions.hide()
        known = {stub.pid for stub in old}
        self.stubs[model_name] = [stub for stub in self._find_stubs(model_name) if stub.pid not in known]

    def stop(self) -> None:
        """Let Triton finish the requests in flight, within `drain_s` seconds; then remove every trace of it."""
        if self._process and self._process.exit_code() is None:
            self._process.terminate()
            self._drain(self._process)
        self.discard()
        self._regions.close()

    def discard(self) -> None:
        """Kill Triton with its stubs and remove its regions; `launch` may follow."""
        if self._process:
            self._process.close()
        if self._connection:
            self._connection.close()
        self._regions.clear()
        self._process = self._connection = None
        self._metrics_url = ""
        self.stubs = {}

    def kill(self) -> None:
        """Kill Triton and its stubs at once; whoever waits for it goes on. Safe in a signal handler."""
        process = self._process
        if process:
            process.kill()

    def _drain(self, process: TritonProcess) -> None:
        """Wait until Triton exits, or has nothing left to do.

        Triton ends a model's processes once the model's requests are done. After a process has died, even if its
        model was healed, Triton itself never exits: it waits for the dead one, requests or none.
        """
        done_by = time.monotonic() + self._timing.drain_s
        while time.monotonic() < done_by:
            if process.wait(POLL_S):
                return
            working = [stub for stub in find_stubs(self._regions.prefix) if stub.state() not in STOPPED]
            if not working and not self._installation.has_onnxruntime:
                break
        process.wait(EXIT_S)

    def _start(self, ports: tuple[int, int], harmful: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
        """harmful: models that must not be loaded, each with why."""
        key, identity = secrets.token_hex(16), f"covae-{secrets.token_hex(8)}"
        # Triton listens on every interface for 0.0.0.0; this process needs one that it can connect to.
        near = LOOPBACK if self._host == "0.0.0.0" else self._host
        self._connection = Connection(f"{near}:{ports[0]}", key, self._access, self._regions.folder)
        self._metrics_url = f"http://{LOOPBACK}:{ports[1]}/metrics"
        before = backend_folders()
        self._process = TritonProcess(
            self._command(ports, key, identity, [name for name in self.models if name not in harmful]),
            self._installation.environment(self._regions.folder),
            self._regions.folder,
        )
        deadline = time.monotonic() + self._timing.start_s
        try:
            self._wait_until(lambda: self._answers_as(identity), deadline)
            # Triton answers over gRPC for a moment even when it is about to exit because the metrics port was taken.
            self._wait_until(lambda: b"nv_inference" in self.metrics_page(), deadline)
            failures = self._failures(deadline, harmful)
            self._pinned |= {model.name for name, model in self.models.items() if name not in failures}
        except BaseException:
            self._regions.note_backend_folder(before)
            self.discard()
            raise
        self._regions.note_backend_folder(before)
        self._regions.hide()
        self.stubs = {name: self._find_stubs(name) for name in self.models}
        return failures

    def _command(self, ports: tuple[int, int], key: str, identity: str, models: Sequence[str]) -> list[str]:
        settings = {
            "shm-region-prefix-name": self._regions.prefix,
            "shm-default-byte-size": REGION_BYTES,
            "shm-growth-byte-size": REGION_GROWTH_BYTES,
        }
        return [
            str(self._installation.binary),
            f"--id={identity}",
            f"--model-repository={self._models}",
            f"--backend-directory={self._backends}",
            "--model-control-mode=explicit",
            *(f"--load-model={name}" for name in models),
            # Covae's configs are complete; completing them would start every model's process twice.
            "--disable-auto-complete-config",
            # A broken model is reported by name; after a fault the healthy ones are served meanwhile.
            "--exit-on-error=false",
            "--strict-readiness=true",
            f"--exit-timeout-secs={max(1, round(self._timing.drain_s))}",
            "--allow-http=false",
            f"--grpc-address={self._host}",
            f"--grpc-port={ports[0]}",
            # Else Triton keeps as many messages for reuse, each as large as it ever was: 400 MB, if one was.
            "--grpc-infer-allocation-pool-size=0",
            # A peer that is gone, or never speaks, is asked after so many milliseconds, and left.
            "--grpc-keepalive-time=60000",
            "--grpc-keepalive-timeout=20000",
            "--grpc-keepalive-permit-without-calls=1",
            Secret(f"--grpc-restricted-protocol={','.join(self._restricted)}:{KEY_NAME}={key}"),
            *self._access.arguments(self._regions.folder, self._open_protocols),
            f"--metrics-address={LOOPBACK}",
            f"--metrics-port={ports[1]}",
            f"--allow-gpu-metrics={str(has_gpu()).lower()}",
            *(self._trace_settings() if self._trace_url else ()),
            *(f"--backend-config=python,{name}={value}" for name, value in settings.items()),
        ]

    def _trace_settings(self) -> list[str]:
        """Spans of every request that comes with a trace of its client's, and of no other."""
        settings = ["rate=0", "level=TIMESTAMPS", "mode=opentelemetry", f"opentelemetry,url={self._trace_url}"]
        return [f"--trace-config={setting}" for setting in settings]

    def _answers_as(self, identity: str) -> bool:
        """Whether the server at the gRPC address is the one started with this id, not another program's."""
        with suppress(grpc.RpcError):
            return self.connection.identity(CONNECT_S) == identity
        return False

    def _wait_until(self, condition: Callable[[], bool], deadline: float) -> None:
        while not condition():
            code = self.exit_code()
            if code is not None:
                raise ServingError(f"Triton exited with code {code} before it was ready. {self._log_tail()}")
            self._check_patience(deadline)
            time.sleep(POLL_S)

    def _failures(self, deadline: float, harmful: Mapping[str, str]) -> dict[str, str]:
        """Every model that does not answer a real inference, with its own error; harmful: those not loaded."""
        try:
            unavailable = self.connection.unavailable()
        except grpc.RpcError as error:
            raise ServingError(f"Triton does not list its models: {error.details()}. {self._log_tail()}") from error
        found = {name: readable(reason) for name, reason in unavailable.items() if name in self.models}
        failures = found | dict(harmful)
        rest = [name for name in self.models if name not in failures]
        return failures | self._try_models(rest, deadline - time.monotonic())

    def _try_models(self, names: Sequence[str], timeout_s: float) -> dict[str, str]:
        """Send each model one real inference; those that fail, with their errors."""
        deadline = time.monotonic() + timeout_s
        answers = {name: self.connection.infer(probe_request(self.models[name].config), timeout_s) for name in names}
        while not all(answer.done() for answer in answers.values()):
            self._check_patience(deadline + EXIT_S)
            time.sleep(POLL_S)
        errors = {name: answer.exception() for name, answer in answers.items()}
        return {name: f"{error.code().name}: {readable(error.details())}" for name, error in errors.items() if error}

    def _check_patience(self, deadline: float) -> None:
        if self._stopping():
            raise Stopped
        if self.stopped():
            raise ServingError("Triton was stopped by a signal before it was ready")
        if time.monotonic() > deadline:
            raise ServingError(f"Triton was not ready within {self._timing.start_s:.0f} s. {self._log_tail()}")

    def _check_alive(self) -> None:
        try:
            self.connection.identity(ALIVE_S)
        except grpc.RpcError as error:
            raise ServingError(f"Triton itself does not answer: {error.code().name}") from error

    def _log_tail(self) -> str:
        tail = self._process.log_tail() if self._process else ""
        return f"Its log ends:\n{tail}"

    def _find_stubs(self, model_name: str) -> list[Stub]:
        return find_stubs(self._regions.prefix, model_name)


def readable(reason: str) -> str:
    """Triton's error without the class names it puts before it and the traceback it appends."""
    return reason.removeprefix("Internal: ").removeprefix("TritonModelException: ").partition("\n\nAt:")[0].strip()
