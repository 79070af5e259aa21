"""Takes another package while the old one serves; a package that is not sound, or answers wrongly, never takes over."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import suppress
from functools import partial

from papilio.data_pipeline.schema import Schema
from papilio.trainer.inference.package.format import MANIFEST, PackageError
from papilio.trainer.inference.package.sample_check import load_checked_scorer
from papilio.trainer.inference.scorer import Formats, Scorer
from papilio.trainer.inference.serving.http_messages import one_line
from papilio.trainer.inference.serving.metrics import Metrics
from papilio.trainer.inference.serving.micro_batcher import MicroBatcher
from papilio.trainer.inference.serving.serve_options import ServeOptions

logger = logging.getLogger(__name__)
_Files = frozenset[tuple[str, int, int, int]]


class PackageSwap:
    """Loads what a folder, or the link to one, leads to now."""

    def __init__(self, options: ServeOptions, batcher: MicroBatcher, metrics: Metrics) -> None:
        self._folder, self._batcher, self._metrics = options.package, batcher, metrics
        self._load = partial(load_checked_scorer, options.package, formats=formats_of(options))
        self._one_at_a_time = asyncio.Lock()
        self._seen = _place(options.package)
        self._refused: _Files | None = None  # what the folder held when it was refused, None if it was not

    async def swap(self) -> bool:
        """Load, check and take the package; whether it was taken.

        Requests go on being answered by the old one meanwhile; those that came before the change still are after it.
        """
        async with self._one_at_a_time:
            self._seen, files = _place(self._folder), _files(self._folder)
            begin_s = time.monotonic()
            old = self._batcher.scorer
            new = await asyncio.get_running_loop().run_in_executor(None, self._try_to_load)
            if isinstance(new, str):
                logger.error("package refused, %s keeps serving: %s", old.label, new)
                self._metrics.record_swap("refused")
                self._refused = files
                return False
            self._refused = None
            self._batcher.scorer = new
            self._metrics.record_swap("done")
            logger.info("package %s replaces %s (%.1f s)", new.label, old.label, time.monotonic() - begin_s)
            _warn_of_columns(old.encoder.schema, new.encoder.schema)
            return True

    async def watch(self, every_s: float) -> None:
        """Swap whenever the folder leads elsewhere, or holds another manifest, than when it was last looked at.

        One that was refused is tried again when any of its files changes: it may have been half-written.
        """
        while True:
            await asyncio.sleep(every_s)
            place = _place(self._folder)
            is_fixed = self._refused is not None and _files(self._folder) != self._refused
            if place is not None and (place != self._seen or is_fixed):
                await self.swap()

    def _try_to_load(self) -> Scorer | str:
        """Return the package, or why it cannot be served, in a line."""
        try:
            return self._load()
        except (PackageError, OSError) as error:
            return one_line(str(error))
        except BaseException as error:
            # Whatever a file makes its reader raise (safetensors' panics are no Exceptions, even), it is no reason to
            # take no package any more; and nothing but loading runs in this thread.
            return one_line(f"it cannot be loaded: {type(error).__name__}: {error}")


def formats_of(options: ServeOptions) -> Formats:
    """Return whether a server uses packages' formats, and whose."""
    return Formats("never" if options.exact else "if_fit", options.trust_formats)


def _place(folder: str) -> tuple[str, int, int] | None:
    """What tells packages apart without reading them; None while there is none."""
    try:
        found = os.stat(os.path.join(folder, MANIFEST))
    except OSError:
        return None
    return os.path.realpath(folder), found.st_ino, found.st_mtime_ns


def _files(folder: str) -> _Files:
    """What tells the contents of folders apart without reading them."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # it has gone meanwhile
                status = os.stat(os.path.join(parent, name))
                found.append((os.path.join(parent, name), status.st_ino, status.st_size, status.st_mtime_ns))
    return frozenset(found)


def _warn_of_columns(old: Schema, new: Schema) -> None:
    before = {*old.dense_names, *old.categorical_names}
    after = {*new.dense_names, *new.categorical_names}
    if before != after:
        logger.warning(
            "the new package has other columns (%s added, %s gone): requests with those that are gone get a 400",
            ", ".join(sorted(after - before)) or "none",
            ", ".join(sorted(before - after)) or "none",
        )
