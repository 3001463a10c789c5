"""What chunk servers count, asked of each of them."""

from __future__ import annotations

from collections.abc import Sequence

from kvfs_base.cluster import Target
from kvfs_base.errors import KvfsError
from kvfs_base.rpc import BlockingRpcClient
from kvfs_base.seams import Env
from kvfs_base.types import Address
from kvfs_datapath.messages import Statistics

ANSWER_SECONDS = 5.0

Figures = dict[str, int]


def chunk_server_figures(
    env: Env, targets: Sequence[Target]
) -> tuple[dict[str, Figures], list[str]]:
    """By server, and what was wrong with those that did not answer."""
    found: dict[str, Figures] = {}
    errors: list[str] = []
    for server_id, address in _addresses(env, targets).items():
        client = BlockingRpcClient(env.blocking_network, address)
        try:
            found[server_id] = client.call(Statistics(), ANSWER_SECONDS)
        except KvfsError as exc:
            errors.append(f"{server_id} ({address}): {exc}")
        finally:
            client.close()
    return found, errors


def _addresses(env: Env, targets: Sequence[Target]) -> dict[str, Address]:
    """Of each server, as it is reached from here. One that says nothing of an address for others
    is left out."""
    found: dict[str, Address] = {}
    for target in targets:
        address = target.unix if target.host_id == env.host_id else None
        address = address or target.tcp
        if address is not None:
            found[target.server_id] = address
    return found


def told(figures: Figures) -> str:
    """For people: what is not zero."""
    shown = ", ".join(f"{name} {value:,}" for name, value in sorted(figures.items()) if value)
    return shown or "no figures"
