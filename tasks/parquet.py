"""Writing Parquet so that the first error is the one that is told."""

from __future__ import annotations

from types import TracebackType

import pyarrow.parquet as pq


class TableWriter(pq.ParquetWriter):  # type: ignore[misc]  # pyarrow says nothing of its types
    """A Parquet file that is being written. Where the block that writes it fails, closing adds nothing to that."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file; after an error, whatever closing says."""
        try:
            self.close()
        except Exception:
            if error is None:
                raise
        finally:
            self.is_open = False  # or its end would close it once more, and print what that says
