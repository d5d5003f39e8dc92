"""The processes of one run: how they find each other, add up, agree, stop together, and notice a lost one.

All of it is JAX's distributed runtime: its coordination service, which process 0 hosts, with a store of keys that
every process can reach, and its collectives (gloo on CPUs).

JAX's own heartbeats end a process by an abort from C++, with a stack trace, as soon as the coordinator's socket
closes. So we leave its agent behind once all are connected, which keeps the store and the collectives, and each
process tells it every second that it is there (`_Watch`).
"""

import contextlib
import importlib
import json
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from intlm.engine.distributed import EXCHANGES, MOST_PROCESSES
from intlm.errors import InputError, unknown
from train.lanes import Lanes
from train.stop import PATIENCE, STOPS, GroupStop

LOST = 3
"""Exit code of a process that goes because another one is lost."""
WAIT_SECONDS = 120
"""How long processes wait for each other at the start, unless --wait says otherwise."""
LOST_SECONDS = 20
"""A process that has not been heard of for so long is lost, unless --lost-after says otherwise."""
BROKEN_SECONDS = 5
"""The same where a connection to some process has broken already."""
BEAT_SECONDS = 1.0
GAP_SECONDS = 3.0
"""A thread that wakes up so late was stopped, with the whole process or machine: no time has passed for it."""
LEAST_LOST_SECONDS = 5
LONGEST_SECONDS = 86_400
FAREWELL_SECONDS = 3.0
"""How long process 0, which hosts the store, outlives the news of its end."""
BLOCK_BYTES = 64 << 20
"""What is sent at once at most, when arrays are gathered or handed out."""
POLL_SECONDS = 0.05

METHODS = ("auto", "slurm", "ompi", "k8s", "mpi4py")
"""How JAX can find out about a cluster by itself, for --cluster."""

STOP_NUMBERS = {getattr(signal, name) for name in STOPS if hasattr(signal, name)}

_AXIS = "process"
_BEATS, _NEWS = "intlm/beats", "intlm/news"


@dataclass(frozen=True)
class Membership:
    """Which process of a run this is. coordinator: HOST:PORT of process 0; devices: None takes all."""

    coordinator: str
    processes: int
    process: int
    wait: int = WAIT_SECONDS
    lost_after: int = LOST_SECONDS
    devices: tuple[int, ...] | None = None
    exchange: str = "auto"


def membership(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    cluster: str | None,
    wait: int | None,
    lost_after: int | None,
    exchange: str | None,
) -> Membership | None:
    """What the flags of a command line come to; None where a process is to train alone. Raises InputError."""
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    given = [flag for flag, value in flags.items() if value is not None]
    for flag, seconds, least in (("--wait", wait, 1), ("--lost-after", lost_after, LEAST_LOST_SECONDS)):
        if seconds is not None and not least <= seconds <= LONGEST_SECONDS:
            raise InputError(f"{flag} {seconds}: must be from {least} to {LONGEST_SECONDS} seconds")
    if exchange is not None and exchange not in ("auto", *EXCHANGES):
        raise unknown("--exchange", exchange, ("auto", *EXCHANGES))
    devices = None
    if cluster is not None:
        if given:
            raise InputError(f"--cluster and {given[0]}: give --cluster alone, or the other three")
        coordinator, processes, process, devices = _detect(cluster)
    elif not given:
        return None
    elif len(given) < len(flags):
        (missing, *_) = (flag for flag in flags if flag not in given)
        raise InputError(f"{given[0]}: {missing} is missing (give {', '.join(flags)}, all three)")
    # Before JAX is imported: what it logs about processes that come and go we say in a line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    assert coordinator is not None and processes is not None and process is not None
    _split_address(coordinator)
    if not 1 <= processes <= MOST_PROCESSES:
        raise InputError(f"--processes {processes}: must be from 1 to {MOST_PROCESSES}")
    if not 0 <= process < processes:
        raise InputError(f"--process {process}: must be from 0 to {processes - 1}, as there are {processes}")
    if processes == 1:
        return None
    return Membership(
        coordinator,
        processes,
        process,
        wait or WAIT_SECONDS,
        lost_after or LOST_SECONDS,
        devices,
        exchange or "auto",
    )


def _split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise InputError(f"--coordinator {address}: must be HOST:PORT, with a port from 1 to 65535")
    return host.strip("[]"), int(port)


def _detect(method: str) -> tuple[str, int, int, tuple[int, ...] | None]:
    """Coordinator, count, number and devices, from what a cluster's launcher says of itself."""
    if method not in METHODS:
        raise unknown("--cluster", method, METHODS)
    import logging

    from jax._src.clusters import ClusterEnv

    # It logs what the exception below says.
    logging.getLogger("jax._src.clusters.cluster").disabled = True
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None if method == "auto" else method, WAIT_SECONDS
        )
    except KeyError as error:
        raise _no_cluster(method, f"its launcher sets {error.args[0]}, which is not set") from error
    except Exception as error:
        raise InputError(f"--cluster {method}: {type(error).__name__}: {error}") from error
    coordinator, processes, process, devices = found
    if coordinator is None or processes is None or process is None:
        raise _no_cluster(method, "its launcher's environment variables are not set")
    return coordinator, processes, process, None if devices is None else tuple(devices)


def _no_cluster(method: str, why: str) -> InputError:
    return InputError(
        f"--cluster {method}: no such cluster here: {why} (or give --coordinator, --processes and --process)"
    )


class Cluster:
    """This process and its peers. Made by `Cluster.connect`; all have to make the same calls in the same order.

    Where a peer is lost, a call does not return: the process ends.
    """

    def __init__(self, member: Membership, stop: GroupStop):
        self.process, self.processes = member.process, member.processes
        self.stop, self.exchange = stop, member.exchange
        self.note = ""
        self._member = member
        self._connect()
        self.watch = _Watch(member, self._client, stop)
        self._join()

    # --- sums ---------------------------------------------------------------------------------------------

    def total(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The sum over all processes of int32 [n], given in parts, one behind another.

        On the way all hear whether anyone was asked to stop.
        """
        saving = self.stop.save_asked
        summed = self._added(np.concatenate([*parts, np.array([self.stop.asked, saving], np.int32)]))
        self.stop.requested |= bool(summed[-2])
        self.stop.save_requested |= bool(summed[-1])
        self.stop.save_asked &= not saving
        return summed[:-2]

    # --- words ----------------------------------------------------------------------------------------------

    def gather(self, said: Any) -> list[Any]:
        """What each process says, in their order: anything that JSON can hold."""
        content = np.frombuffer(json.dumps(said).encode(), np.uint8)
        sizes = self._gathered(np.array([content.size], np.int32))[:, 0]
        rows = self._gathered(np.pad(content, (0, int(sizes.max()) - content.size)))
        return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def tell(self, said: Any = None) -> Any:
        """What process 0 says, in all processes; theirs is not looked at. Anything that JSON can hold."""
        content = np.frombuffer(json.dumps(said).encode(), np.uint8)
        size = int(self._handed_out(np.array([content.size], np.int32))[0])
        mine = content if self.process == 0 else np.zeros(size, np.uint8)
        return json.loads(self._handed_out(mine).tobytes())

    def hand_out(self, array: np.ndarray) -> np.ndarray:
        """The array of process 0 in all processes; those of the others give its shape and dtype."""
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        blocks = [
            self._handed_out(flat[start : start + BLOCK_BYTES]) for start in range(0, flat.size, BLOCK_BYTES)
        ]
        return np.concatenate(blocks).view(array.dtype).reshape(array.shape)

    def collect(self, rows: np.ndarray, counts: list[int]) -> np.ndarray | None:
        """All processes' rows, one process after another, in process 0; None elsewhere.

        counts: rows of each process. A block of rows goes from every process to all, since that is the
        collective there is, and is dropped where it is not wanted.
        """
        size = max(1, BLOCK_BYTES // max(1, rows[:1].nbytes * self.processes))
        found: list[list[np.ndarray]] = [[] for _ in counts]
        for start in range(0, max(counts), size):
            block = rows[start : start + size]
            missing = min(size, max(counts) - start) - len(block)
            parts = self._gathered(np.pad(block, [(0, missing)] + [(0, 0)] * (rows.ndim - 1)))
            for mine, part, count in zip(found, parts, counts, strict=True):
                mine.append(part[: max(0, count - start)].copy() if self.process == 0 else part[:0])
        return np.concatenate([part for mine in found for part in mine]) if self.process == 0 else None

    def _gathered(self, array: np.ndarray) -> np.ndarray:
        """[processes, ...]"""
        with self.watch.collective():
            return np.asarray(self._all(self._spread(array)).addressable_data(0))

    def _handed_out(self, array: np.ndarray) -> np.ndarray:
        """uint8 [n] or int32 [n] of process 0."""
        return self._added(array if self.process == 0 else np.zeros_like(array))

    def _added(self, array: np.ndarray) -> np.ndarray:
        with self.watch.collective():
            return np.asarray(self._add(self._spread(array)).addressable_data(0))

    def _spread(self, array: np.ndarray) -> Any:
        """[processes, ...], of which each process has its own row."""
        import jax

        part = jax.device_put(array[None], self._device)
        shape = (self.processes, *array.shape)
        return jax.make_array_from_single_device_arrays(shape, self._sharding, [part])

    # --- beginning and end ----------------------------------------------------------------------------------

    def name(self, process: int) -> str:
        """What people call a process."""
        return self.watch.names.get(process, f"process {process}")

    def say_saved(self, newest: Callable[[], Path | str | None]) -> None:
        """Which checkpoint to name, to the others too, where one is lost; None: there is none yet."""
        self.watch.saved = lambda: str(newest() or "none yet")

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process goes, and why; they go too."""
        self.watch.fail(2 if isinstance(error, InputError | MemoryError) else LOST, error)
        self._forget()

    def close(self) -> None:
        """Wait for all, then leave."""
        self.gather(None)
        self.watch.close()
        self._forget()

    def _forget(self) -> None:
        """Keep JAX from saying goodbye at the end of the process: its agent has gone already."""
        self._state.client = self._state.service = None

    def _connect(self) -> None:
        """Start or find the coordination service. Raises InputError where not all processes come in time."""
        member = self._member
        host, _ = _split_address(member.coordinator)
        # gRPC would go through a web proxy, which a cluster's own network has no use for.
        os.environ.setdefault("no_grpc_proxy", host)
        import jax
        from jax._src import distributed
        from jax._src.lib import _jax

        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_check_proxy_envs", False)
        # It would take over SIGTERM.
        jax.config.update("jax_enable_preemption_service", False)
        outcome: list[BaseException | None] = []
        make_client = _jax.get_distributed_runtime_client

        def initialize() -> None:
            try:
                # With a callback, which is never called right, what goes wrong is raised; without, it aborts.
                _jax.get_distributed_runtime_client = partial(make_client, missed_heartbeat_callback=print)
                jax.distributed.initialize(
                    member.coordinator, member.processes, member.process, member.devices,
                    cluster_detection_method="deactivate", initialization_timeout=member.wait,
                    heartbeat_timeout_seconds=max(60, 2 * member.lost_after),
                    shutdown_timeout_seconds=member.wait,
                )  # fmt: skip
                outcome.append(None)
            except BaseException as error:
                outcome.append(error)
            finally:
                _jax.get_distributed_runtime_client = make_client

        began = time.monotonic()
        # In a thread, so that Ctrl-C is heard.
        thread = threading.Thread(target=initialize, name="intlm-connect", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if self.stop.asked:
                _leave(130)
        if outcome[0] is not None:
            self._refuse(time.monotonic() - began, outcome[0])
        self._state = distributed.global_state
        self._client: Any = distributed.global_state.client

    def _refuse(self, waited: float, error: BaseException) -> NoReturn:
        """One line, and the end: JAX's half-made parts would complain at length when they are taken down."""
        member, why = self._member, " ".join(str(error).split())[:200]
        if waited >= member.wait - 1:
            what = "no answer" if member.process else "not all processes came"
            why = (
                f"{what} within {member.wait} seconds (--wait); {member.processes} processes are to start, of "
                f"which this is process {member.process}"
            )
        elif "bad_cast" in why:
            why = (
                f"process {member.process} of {member.processes} was not taken (accepted: one process of each "
                "number, and the same --processes for all)"
            )
        print(f"intlm: --coordinator {member.coordinator}: {why}", file=sys.stderr)
        _leave(2)

    def _join(self) -> None:
        """Make the collectives."""
        import jax
        from jax import lax
        from jax._src import xla_bridge
        from jax._src.lib import _jax
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        # By itself gloo takes what the host's name stands for, which is 127.0.0.1 on many.
        address = _own_address(*_split_address(self._member.coordinator))
        make = partial(_jax.make_gloo_tcp_collectives, distributed_client=self._client, hostname=address)
        xla_bridge.register_backend_factory(
            "cpu", lambda: xla_bridge.make_cpu_client(make()), priority=0, fail_quietly=False
        )
        firsts = {device.process_index: device for device in reversed(jax.devices())}
        mesh = Mesh(np.array([firsts[process] for process in range(self.processes)]), (_AXIS,))
        self._device = firsts[self.process]
        self._sharding = NamedSharding(mesh, PartitionSpec(_AXIS))

        everywhere = PartitionSpec()

        def over_processes(function: Any) -> Any:
            return jax.jit(
                jax.shard_map(
                    function, mesh=mesh, in_specs=PartitionSpec(_AXIS), out_specs=everywhere, check_vma=False
                )
            )

        self._all = over_processes(lambda x: lax.all_gather(x[0], _AXIS))
        self._add = over_processes(lambda x: lax.psum(x[0], _AXIS))
        with _without_output():
            # Whatever is to be connected is now: the store has no answers to wait for without the agent.
            self.watch.names = dict(enumerate(self.gather(self.watch.own_name)))
            self.total([np.zeros(1, np.int32)])
            local = Mesh(np.array(jax.local_devices()), (_AXIS,))
            if local.size > 1:
                among = jax.shard_map(
                    lambda x: lax.psum(x, _AXIS),
                    mesh=local,
                    in_specs=PartitionSpec(_AXIS),
                    out_specs=everywhere,
                )
                jax.block_until_ready(jax.jit(among)(np.zeros(local.size, np.int32)))
        # Its agent goes, see above.
        self._client.shutdown()


@contextlib.contextmanager
def together(member: Membership | None, stop: Any) -> Iterator[Cluster | None]:
    """The cluster of a process that has peers (`stop`: a `GroupStop`), left at the end; None for one alone.

    Where this process fails, the others are told why, and go too.
    """
    if member is None:
        yield None
        return
    cluster = Cluster(member, stop)
    try:
        yield cluster
        cluster.close()
    except BaseException as error:
        cluster.fail(error)
        raise


class _Watch:
    """Tells the others that this process is there, and ends it when one of them is not.

    Every second each process writes a new beat into the store. Process 0 reads them all and publishes what is
    wrong; the others read that, and see from it that process 0 is there. Evaluations and checkpoints of process
    0 may take as long as they like, since beats come from a thread.
    """

    def __init__(self, member: Membership, client: Any, stop: GroupStop):
        self.own_name = f"process {member.process} ({socket.gethostname()}, pid {os.getpid()})"
        self.names: dict[int, str] = {}
        self.saved: Callable[[], str | None] = lambda: None
        self.leaving: Callable[[], object] = lambda: None
        self._member, self._client, self._stop = member, client, stop
        self._broken: str | None = None
        self._broken_since: float | None = None
        self._last: str | None = None
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._heard = time.monotonic()
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._signals = reading
        # A signal is noticed here also while the main thread waits inside of a library.
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._threads = [
            threading.Thread(target=target, name=f"intlm-{target.__name__[1:]}", daemon=True)
            for target in (self._beat, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    @contextlib.contextmanager
    def collective(self) -> Iterator[None]:
        """What JAX raises in here means that a peer is gone: wait until it is known which, and end."""
        import jax

        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            # A call that waits for its result raises ValueError for the same: "UNKNOWN: Gloo ...".
            if isinstance(error, ValueError) and not re.match(r"[A-Z_]+: ", str(error)):
                raise
            self._broken = " ".join(str(error).split())[:200]
            while True:
                time.sleep(1)

    def fail(self, code: int, error: BaseException) -> None:
        """Publish why this process ends."""
        self._closed.set()
        why = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(Exception):
            self._publish(code, f"{self.own_name}: {why}")
        if self._member.process == 0:
            time.sleep(FAREWELL_SECONDS)

    def close(self) -> None:
        """No more beats."""
        self._closed.set()
        signal.set_wakeup_fd(-1)

    def _publish(self, code: int, line: str) -> None:
        """The first news of an end is what counts."""
        with contextlib.suppress(Exception):
            self._client.key_value_set(f"{_NEWS}/end", json.dumps([code, line]))

    def _beat(self) -> None:
        """The thread that talks to the store."""
        import jax

        member, count, first_signal = self._member, 0, None
        then = time.monotonic()
        beats = {process: ("", then) for process in range(member.processes)}
        while not self._closed.is_set():
            now = time.monotonic()
            if now - then > GAP_SECONDS:
                beats = {process: (beat, now) for process, (beat, _) in beats.items()}
            then = now
            try:
                beat = json.dumps([count, self._broken])
                self._client.key_value_set(f"{_BEATS}/{member.process}", beat, allow_overwrite=True)
                if first_signal is not None:
                    self._client.key_value_set(f"{_NEWS}/stop", "1", allow_overwrite=True)
                if member.process == 0:
                    self._look_at(beats, now)
                    beat = json.dumps([count, self.saved()])
                    self._client.key_value_set(f"{_NEWS}/beat", beat, allow_overwrite=True)
                news = dict(self._client.key_value_dir_get(_NEWS))
                self._hear({key.rpartition("/")[2]: value for key, value in news.items()})
            except jax.errors.JaxRuntimeError:
                pass  # `_judge` counts the seconds
            count += 1
            if select.select([self._signals], [], [], BEAT_SECONDS)[0]:
                now = time.monotonic()
                numbers = os.read(self._signals, 64)
                for number in STOP_NUMBERS.intersection(numbers):
                    again = first_signal is not None and now - first_signal >= PATIENCE
                    if again or (number == signal.SIGINT and (first_signal or numbers.count(number) > 1)):
                        _leave(130)
                    first_signal = first_signal or now
                    self._stop.asked = True

    def _hear(self, news: dict[str, str]) -> None:
        """Take in what the store says."""
        if "stop" in news:
            self._stop.asked = True
        if "end" in news and not self._closed.is_set():
            code, line = json.loads(news["end"])
            self._end(code, line)
        if "beat" in news and news["beat"] != self._last:
            self._last, self._heard = news["beat"], time.monotonic()
            saved = json.loads(news["beat"])[1]
            if self._member.process and saved:
                self.saved = partial(str, saved)

    def _look_at(self, beats: dict[int, tuple[str, float]], now: float) -> None:
        """Process 0: who has not been heard of for too long?"""
        broken = self._broken
        for key, beat in self._client.key_value_dir_get(_BEATS):
            process = int(key.rpartition("/")[2])
            if beats[process][0] != beat:
                beats[process] = beat, now
            broken = broken or json.loads(beat)[1]
        patience = min(BROKEN_SECONDS, self._member.lost_after) if broken else self._member.lost_after
        for process, (_, since) in beats.items():
            if process and now - since > patience:
                self._publish(LOST, self._lost(process, now - since))
        self._broken_since = self._broken_since or (now if broken else None)
        if self._broken_since and now - self._broken_since > self._member.lost_after:
            self._publish(LOST, f"a connection between processes has broken: {broken}; {self._where()}")

    def _judge(self) -> None:
        """The thread that ends a process which hears nothing from process 0 any more."""
        member, then = self._member, time.monotonic()
        while not self._closed.wait(BEAT_SECONDS / 2):
            now = time.monotonic()
            if now - then > GAP_SECONDS:
                self._heard = now
            then, silent = now, now - self._heard
            patience = min(BROKEN_SECONDS, member.lost_after) if self._broken else member.lost_after
            if member.process and silent > patience:
                self._end(LOST, self._lost(0, silent))

    def _lost(self, process: int, silent: float) -> str:
        name = self.names.get(process, f"process {process}")
        return f"{name} is lost: nothing was heard of it for {silent:.0f} seconds; {self._where()}"

    def _where(self) -> str:
        saved = self.saved() or "not known here"
        return f"last checkpoint: {saved}; start all processes again with the same command"

    def _end(self, code: int, line: str) -> None:
        """One line, and the end of the process, whatever its other threads are doing."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            print("\n" * sys.stderr.isatty() + "intlm:", " ".join(line.splitlines()), file=sys.stderr)
            with contextlib.suppress(OSError):
                self.leaving()
            if self._member.process == 0:
                time.sleep(FAREWELL_SECONDS)
            _leave(code)


class GroupLanes(Lanes):
    """Lanes whose text has to be at hand in all processes before any goes on.

    Where it fails in one of them, or one is told to stop while it waits, all hear so at the same segment.
    """

    cluster: Cluster
    _failure: InputError | None = None

    def wait(self, stop: Callable[[], bool]) -> bool:
        """See `Lanes.wait`."""
        if stop():
            return False
        if not self.at_boundary:
            return True
        ready = super().wait(lambda: self.cluster.stop.asked)
        error = self._error if ready else None
        answers = self.cluster.gather([ready, None if error is None else _said(error)])
        for process, (_, why) in enumerate(answers):
            if why is not None and error is None:
                self._failure = InputError(f"{self.cluster.name(process)}: {why}")
                break
        failed = error is not None or self._failure is not None
        if not failed and not all(ready for ready, _ in answers):
            self.cluster.stop.requested = True
        return failed or not stop()

    def next_segment(self) -> np.ndarray:
        """See `Lanes.next_segment`."""
        if self._failure is not None:
            raise self._failure
        return super().next_segment()


def _said(error: BaseException) -> str:
    return str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"


def _own_address(host: str, port: int) -> str:
    """The address by which this host reaches the coordinator, and by which the others can reach it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise InputError(f"--coordinator {host}:{port}: {error.strerror or error}") from error


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """gloo writes to standard output when it connects; what we write there is the result of a command."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _leave(code: int) -> NoReturn:
    """End the process now; threads inside of libraries cannot be ended."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def code_digests() -> dict[str, str]:
    """SHA-256 of each source file of the package, by its path."""
    import hashlib

    digests = {}
    for package in ("intlm", "tokenizer", "train", "eval"):
        root = Path(str(importlib.import_module(package).__file__)).parent
        for path in sorted(root.rglob("*.py")):
            name = f"{package}/{path.relative_to(root).as_posix()}"
            digests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests
