"""Real routing for the tuner: topk_ids of a running server, written beside it where the user asks for them."""

from __future__ import annotations

import logging
import queue
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from sglang_moe_ext.engines.sglang import runner_hook
from sglang_moe_ext.serving import capture_writer
from sglang_moe_ext.serving.capture_writer import Bounds, Table
from sglang_moe_ext.serving.into_sglang import CAPTURE as VARIABLE

log = logging.getLogger(__name__)

DEFAULT_FILES = 200
_NUMBER = re.compile(r"[1-9][0-9]{0,8}")
_MOST_WAITING_BYTES = 128 << 20
"""Host memory for batches that are not written yet; 90 layers of 16,384 tokens with 9 experts are 53 MB."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user wants captured; `folder` is absolute, batches of fewer than `min_tokens` are left out."""

    folder: Path
    max_files: int = DEFAULT_FILES
    min_tokens: int = 1


def wish(environ: Mapping[str, str]) -> Wish | None:
    """What DIR[:max_files][:min_tokens] says; None where it is not set, and, with a warning, where it makes no sense.

    A colon after the last slash begins a number. So `/runs/a:b/ids:50` is the folder `/runs/a:b/ids`, 50 files of it;
    a folder whose own name has a colon is written with a slash behind it.
    """
    value = environ.get(VARIABLE, "")
    if not value:
        return None
    parents, slash, last = value.rpartition("/")
    name, *numbers = last.split(":")
    folder = parents + slash + name
    if not folder or len(numbers) > 2 or not all(map(_NUMBER.fullmatch, numbers)):
        log.warning(
            "%s=%s: expected DIR[:max_files][:min_tokens], both from 1 on; no routing is captured", VARIABLE, value
        )
        return None
    try:
        return Wish(Path(folder).absolute(), *map(int, numbers))
    except OSError as error:  # the folder that this process runs in is gone
        log.warning("%s=%s: %s; no routing is captured", VARIABLE, value, error)
        return None


def install(runner_module: ModuleType, wish: Wish) -> bool:
    """Watch the engine's MoE layers; False, and one line, where this engine has them otherwise."""
    reason = runner_hook.obstacle(runner_module)
    if reason is not None:
        log.warning("sglang-moe-ext captures no routing: %s; this SGLang is not supported yet", reason)
        return False
    if not runner_hook.is_watched(runner_module):
        runner_hook.watch(runner_module, Recorder(wish))
        log.info(
            "sglang-moe-ext captures topk_ids of batches of %d tokens or more, at most %d files, into %s; %s",
            wish.min_tokens,
            wish.max_files,
            wish.folder,
            runner_hook.UNSEEN,
        )
    return True


class Recorder:
    """Takes batches from the thread that launches the model, and writes them from one of its own."""

    def __init__(self, wish: Wish) -> None:
        self.dropped = 0
        self._wish = wish
        self._bounds = Bounds(wish.max_files)
        self._waiting: queue.SimpleQueue[runner_hook.Batch] = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._must_exceed = 0
        self._stopped = False
        self._writer: threading.Thread | None = None

    def wants(self, rows: int, size_bytes: int) -> bool:
        """True for a batch that would be kept, as far as is known."""
        return not self._stopped and rows >= self._wish.min_tokens and size_bytes > self._must_exceed

    def take(self, batch: runner_hook.Batch) -> None:
        """Have it written, unless too much waits for that already."""
        with self._lock:
            is_too_much = self._waiting_bytes + batch.size_bytes > _MOST_WAITING_BYTES
            if not is_too_much:
                self._waiting_bytes += batch.size_bytes
        if is_too_much:
            self.dropped += 1
            if self.dropped == 1:
                log.warning("%s is written slower than batches come: some are left out", self._wish.folder)
            return
        self._waiting.put(batch)
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="sglang-moe-ext capture", daemon=True)
            self._writer.start()

    def stop(self, why: str) -> None:
        """Take no more; `why` is said once, and nothing where it is empty."""
        if why and not self._stopped:
            log.warning("sglang-moe-ext captures no more routing: %s", why)
        self._stopped = True

    def _write(self) -> None:
        run, index = capture_writer.new_run(), 0
        try:
            capture_writer.clear_abandoned(self._wish.folder)
            while not self._stopped:
                batch = self._waiting.get()
                width, ids = batch.rows()
                if ids:
                    table = Table(batch.layer, width, ids)
                    self._must_exceed = capture_writer.keep(self._wish.folder, table, index, run, self._bounds)
                    index += 1
                with self._lock:
                    self._waiting_bytes -= batch.size_bytes
        except Exception as error:
            self.stop(f"{self._wish.folder}: {error}")
            self._waiting = queue.SimpleQueue()
