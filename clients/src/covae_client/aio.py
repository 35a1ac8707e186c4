"""The same client for asyncio: `AsyncClient` and `AsyncModel`, over tritonclient's asyncio transport."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from covae_client.addresses import channel_options, several, target
from covae_client.catalogue import find_model, find_spec, list_models
from covae_client.client import DEFAULT_ADDRESS, checked_settings
from covae_client.errors import ConnectionFailed, DeadlineExceeded, InvalidArgument, ServerError
from covae_client.metrics import Requests
from covae_client.model import BeyondReach, ModelBase, beyond_reach, least_softness
from covae_client.plans import REACH, Aligned, Call, Conditioned, Surprised
from covae_client.retry import ASKED_AGAIN, Attempts, Budget, Retry, Timeout
from covae_client.scoring import Scores, judged
from covae_client.transport import (
    CONNECT_POLL_S,
    MAX_IN_FLIGHT,
    PROBE_S,
    Endpoint,
    Progress,
    Question,
    Settings,
    Steps,
    Tls,
    checked_output,
    credentials,
    empty_results,
    request_parameters,
    request_parts,
    request_tensors,
    telling,
    translated,
)
from covae_core.contract import ModelSpec, Priority
from covae_core.warp import PRIOR

if TYPE_CHECKING:
    from covae_core.densities import Density

Result = TypeVar("Result")


class AsyncClient:
    """As `Client`, for asyncio; belongs to the event loop that it is first used in.

        async with AsyncClient("localhost:8001") as client:
            digits = await client.model("digits-sos-vae")
            images = await digits.sample(16, seed=0)

    Raises:
        InvalidArgument: as Client.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout: Timeout | float | None = None,
        retry: Retry | int | None = None,
        tls: Tls | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        metrics: Any = None,
        tracer: Any = None,
        priority: int = Priority.INTERACTIVE,
    ) -> None:
        self._transport = AsyncTransport(
            checked_settings(address, timeout, retry, tls, token, headers, metrics, tracer, priority)
        )

    def __repr__(self) -> str:
        return f"<AsyncClient of {self._transport.address}>"

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection; calls in flight fail, later ones too."""
        await self._transport.close()

    async def model(self, name: str) -> AsyncModel:
        """As Client.model."""
        found = await self._transport.run(find_model(name, self._transport.address))
        return AsyncModel(name, found.spec, found.endpoints, self._transport)

    async def models(self) -> dict[str, tuple[str, ...]]:
        """As Client.models."""
        return await self._transport.run(list_models())


class AsyncModel(ModelBase["AsyncTransport"]):
    """A model on a server; `AsyncClient.model` makes it. Its methods are those of `Model`, to be awaited."""

    async def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        noise_seed: int | None = None,
        start: int = 0,
        pose: Any = PRIOR,
        progress: Progress | None = None,
    ) -> NDArray[np.uint8]:
        """As Model.sample."""
        found = await self.sample_with_latents(
            n, seed=seed, noise_seed=noise_seed, start=start, pose=pose, progress=progress
        )
        return found[0]

    async def sample_with_latents(
        self,
        n: int,
        *,
        seed: int = 0,
        noise_seed: int | None = None,
        start: int = 0,
        pose: Any = PRIOR,
        progress: Progress | None = None,
    ) -> tuple[NDArray[np.uint8], Any]:
        """As Model.sample_with_latents."""
        return await self._do(self._plans.sample(n, seed, noise_seed, start, pose), progress)

    async def decode(
        self, latent: Any, *, scoring: bool = False, half: bool = False, progress: Progress | None = None
    ) -> Density:
        """As Model.decode."""
        return await self._do(self._plans.decode(latent, scoring, half), progress)

    async def encode(self, images: Any, *, progress: Progress | None = None) -> Any:
        """As Model.encode."""
        return await self._do(self._plans.encode(images), progress)

    async def draw(
        self, latent: Any, n: int, *, seed: int = 0, start: int = 0, progress: Progress | None = None
    ) -> NDArray[np.uint8]:
        """As Model.draw."""
        return await self._do(self._plans.draw(latent, n, seed, start), progress)

    async def condition(
        self,
        latent: Any,
        mask: Any,
        pixels: Any,
        *,
        softness: Any = 0.0,
        seed: int = 0,
        start: int = 0,
        progress: Progress | None = None,
    ) -> Conditioned:
        """As Model.condition."""
        result = await self._do(self._plans.condition(latent, mask, pixels, softness, seed, start), progress)
        if not result.within_reach:
            warnings.warn(beyond_reach(self.name, result), BeyondReach, stacklevel=2)
        return result

    async def softness_for(self, latent: Any, mask: Any, pixels: Any, *, tail: float = REACH) -> float:
        """As Model.softness_for."""
        search = least_softness()
        try:
            softness = next(search)
            while True:
                found = await self._do(self._plans.condition(latent, mask, pixels, softness, 0, 0), None)
                softness = search.send(bool(np.all(found.tail >= tail)))
        except StopIteration as end:
            return float(end.value)

    async def score(
        self,
        images: Any,
        *,
        num_samples: int = 100,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Scores:
        """As Model.score."""
        images = self._plans.as_arrays(images)
        scores = await self._do(self._plans.score(images, num_samples, seed), progress)
        if self.spec.calibration is None:
            return scores
        return judged(scores, self.spec.calibration, await self._do(self._plans.parts(images), None))

    async def align(self, images: Any, *, progress: Progress | None = None) -> Aligned:
        """As Model.align."""
        return await self._do(self._plans.align(images), progress)

    async def repose(self, latent: Any, pose: Any, *, progress: Progress | None = None) -> NDArray[np.uint8]:
        """As Model.repose."""
        return await self._do(self._plans.repose(latent, pose), progress)

    async def surprise(self, images: Any, *, mask: Any = None, progress: Progress | None = None) -> Surprised:
        """As Model.surprise."""
        return await self._do(self._plans.surprise(images, mask), progress)

    async def run(self, operation: str, *, progress: Progress | None = None, **arrays: Any) -> dict[str, NDArray[Any]]:
        """As Model.run."""
        return await self._do(self._plans.anything(operation, arrays), progress)

    async def served_spec(self) -> ModelSpec:
        """As Model.served_spec."""
        return await self._transport.run(find_spec(self.name, tuple(self._endpoints)))

    async def _do(self, call: Call[Result], progress: Progress | None) -> Result:
        endpoint = self._endpoints.get(call.operation)
        if endpoint is None:
            endpoint = await self._transport.run(self._ask_for(call.operation))
        return call.finish(await self._transport.infer(call.asks(endpoint), call, progress))


class AsyncTransport:
    """A connection to one Triton server over gRPC in an event loop; made on the first call."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.address = settings, settings.address
        self._triton: Any = None
        self._requests = Requests(settings.metrics, settings.tracer)
        self._connecting: asyncio.Lock | None = None
        self._connected = self._closed = self._doubted = False
        self._budget = Budget()
        self._left: list[Any] = []
        self._attempts = 0
        self._failure: ServerError | None = None

    async def close(self) -> None:
        """End the connection; calls in flight fail."""
        self._closed = True
        for client in (*self._left, self._triton):
            if client is not None:
                await client.close()

    async def run(self, steps: Steps[Result]) -> Result:
        """Ask the questions of a catalogue's steps, and give what they come to."""
        try:
            question = next(steps)
            while True:
                try:
                    answer = await self.call(question)
                except ServerError as error:
                    question = steps.throw(error)
                else:
                    question = steps.send(answer)
        except StopIteration as end:
            result: Result = end.value
            return result

    async def infer(self, endpoint: Endpoint, call: Call[Any], progress: Progress | None) -> dict[str, NDArray[Any]]:
        """Run a call's rows through an endpoint, split into requests, a few of them in flight at a time.

        progress: called after each request, in the order in which they end.
        """
        from tritonclient.grpc import InferRequestedOutput

        results = empty_results(endpoint, call.rows)
        free = asyncio.Semaphore(MAX_IN_FLIGHT)
        wanted = [InferRequestedOutput(tensor.name) for tensor in endpoint.outputs]

        done = 0

        async def send(part: slice) -> None:
            nonlocal done
            async with free:
                rows = part.stop - part.start
                tensors = request_tensors(endpoint, call.inputs(part))
                question = Question(endpoint.model_name, "infer", (endpoint.model_name, tensors))
                with self._requests.one(endpoint, rows) as request:
                    headers = {**self.settings.headers, **request.headers}
                    told: dict[str, Any] = {
                        "outputs": wanted,
                        "request_id": request.id,
                        "parameters": request_parameters(endpoint),
                    }
                    told |= {"priority": self.settings.priority}
                    answer = await self.call(question, request.again, headers=headers, **told)
                    for tensor in endpoint.outputs:
                        results[tensor.name][part] = checked_output(answer, tensor, rows, endpoint)
            done += rows
            if progress is not None:
                progress(done // call.per_unit, call.rows // call.per_unit)

        tasks = [asyncio.ensure_future(send(part)) for part in request_parts(endpoint, call.rows)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return results

    async def call(self, question: Question, on_retry: Callable[[], None] = lambda: None, **options: Any) -> Any:
        """Call a method of tritonclient's client with deadline and retries.

        Raises:
            ServerError: one of its kinds, by status. InvalidArgument: the client is closed.
        """
        await self._connect()
        request_s = self.settings.timeout.request_s
        attempts = Attempts(
            self.settings.retry, request_s, self._budget, on_retry, question.optional, several(self.address)
        )
        while True:
            try:
                await self._doubt(attempts.seconds_left)
                return await self._attempt(question, attempts.seconds_left, **options)
            except ASKED_AGAIN as error:
                pause_s = attempts.pause_s(error)
                if pause_s is None or self._closed:
                    raise
                await asyncio.sleep(pause_s)

    async def _attempt(self, question: Question, seconds: float, **options: Any) -> Any:
        from tritonclient.utils import InferenceServerException

        if self._closed:
            raise ConnectionFailed(f"{question.action}: the client was closed")
        method = getattr(self._triton, question.method)
        try:
            told = {"headers": self.settings.headers, "client_timeout": max(seconds, 0.001), **options}
            return await method(*question.arguments, **told)
        except InferenceServerException as error:
            found = translated(self.address, question.action, error)
            self._doubted = self._doubted or isinstance(found, DeadlineExceeded)
            raise found from error

    async def _doubt(self, seconds: float) -> None:
        """As Transport._doubt."""
        if not self._doubted or self._connecting is None:
            return
        async with self._connecting:
            if not self._doubted:
                return
            old = self._triton
            try:
                await old.is_server_live(client_timeout=max(0.001, min(PROBE_S, seconds / 2)))
            except Exception:  # whatever it says, it is no answer
                if not self._closed:
                    self._left.append(old)  # as in Transport
                    self._triton = self._opened()
            self._doubted = False

    def _opened(self) -> Any:
        from tritonclient.grpc.aio import InferenceServerClient

        tls = self.settings.tls
        return InferenceServerClient(
            target(self.address),
            creds=None if tls is None else credentials(tls),
            channel_args=channel_options(self.address),
        )

    async def _connect(self) -> None:
        if self._closed:
            raise InvalidArgument("client: it is closed; open another one")
        if self._connected:
            return
        self._connecting = self._connecting or asyncio.Lock()
        attempts = self._attempts
        async with self._connecting:
            if attempts != self._attempts and self._failure is not None:
                # Another call waited connect_s while this one waited for it: that was this one's wait too.
                raise type(self._failure)(str(self._failure))
            self._failure = None
            if self._triton is None:
                self._triton = self._opened()
            if not self._connected:
                try:
                    await self._wait_until_live()
                except ServerError as failure:
                    self._failure = failure
                    raise
                finally:
                    self._attempts += 1
            self._connected = True

    async def _wait_until_live(self) -> None:
        connect_s = self.settings.timeout.connect_s
        deadline, reason = time.monotonic() + connect_s, "it is not live"
        while True:
            try:
                if await self._attempt(Question("connect", "is_server_live", ()), deadline - time.monotonic()):
                    return
            except (ConnectionFailed, DeadlineExceeded) as error:
                cause: Any = error.__cause__
                reason = telling(reason, cause.message() if cause else str(error))
            if time.monotonic() + CONNECT_POLL_S >= deadline or self._closed:
                raise ConnectionFailed(
                    f"{self.address}: no server answered within {connect_s} s: start one with `covae serve`, "
                    f"or give another address ({reason})"
                )
            await asyncio.sleep(CONNECT_POLL_S)
