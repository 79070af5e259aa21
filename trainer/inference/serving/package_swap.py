"""Takes another package while the old one serves; a package that is not sound, or answers wrongly, never takes over."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from functools import partial

from data_pipeline.schema import Schema
from trainer.inference.package import MANIFEST
from trainer.inference.sample_check import load_checked_scorer
from trainer.inference.scorer import Formats
from trainer.inference.serving.metrics import Metrics
from trainer.inference.serving.micro_batcher import MicroBatcher
from trainer.inference.serving.serve_options import ServeOptions

logger = logging.getLogger(__name__)


class PackageSwap:
    """Loads what a folder, or the link to one, leads to now."""

    def __init__(self, options: ServeOptions, batcher: MicroBatcher, metrics: Metrics) -> None:
        self._folder, self._batcher, self._metrics = options.package, batcher, metrics
        self._load = partial(load_checked_scorer, options.package, formats=formats_of(options))
        self._one_at_a_time = asyncio.Lock()
        self._seen = _place(options.package)

    async def swap(self) -> bool:
        """Load, check and take the package; whether it was taken.

        Requests go on being answered by the old one meanwhile; those that came before the change still are after it.
        """
        async with self._one_at_a_time:
            self._seen = _place(self._folder)
            begin_s = time.monotonic()
            old = self._batcher.scorer
            try:
                new = await asyncio.get_running_loop().run_in_executor(None, self._load)
            except (ValueError, OSError, RuntimeError) as error:
                logger.error("package refused, %s goes on: %s", old.label, error)
                self._metrics.record_swap("refused")
                return False
            self._batcher.scorer = new
            self._metrics.record_swap("done")
            logger.info("package %s replaces %s (%.1f s)", new.label, old.label, time.monotonic() - begin_s)
            _warn_of_columns(old.encoder.schema, new.encoder.schema)
            return True

    async def watch(self, every_s: float) -> None:
        """Swap whenever the folder leads elsewhere, or holds another manifest, than when it was last looked at."""
        while True:
            await asyncio.sleep(every_s)
            if _place(self._folder) not in (self._seen, None):
                await self.swap()


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


def _warn_of_columns(old: Schema, new: Schema) -> None:
    before = {*old.dense_names, *old.categorical_names}
    after = {*new.dense_names, *new.categorical_names}
    if before != after:
        logger.warning(
            "the new package has other columns (%s added, %s gone): requests with those that are gone get a 400",
            ", ".join(sorted(after - before)) or "none",
            ", ".join(sorted(before - after)) or "none",
        )
