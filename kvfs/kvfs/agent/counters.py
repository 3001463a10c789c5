"""What the node agent counts (docs/metrics.md)."""

COUNTERS = (
    "blocks_requested",
    "arena_hits",
    "blocks_leased",
    "blocks_loaded",
    "blocks_unknown",
    "blocks_corrupt",
    "blocks_missing",
    "load_failures",
    "loaded_bytes",
    "put_blocks",
    "put_bytes",
    "put_duplicates",
    "puts_aborted",
)
"""``blocks_requested`` = ``arena_hits`` (in the arena, or being loaded by somebody else)
+ ``blocks_loaded`` + ``blocks_unknown`` (the metadata service has no such key)
+ ``blocks_corrupt`` (wrong bytes: checksum, key or generation) + ``blocks_missing`` (no chunk)
+ ``load_failures`` (a server could not be asked, or a load that a get waited for failed).
``blocks_leased`` of ``arena_hits`` were given without a question."""
