"""Clients that race for the same few names and blocks: what they see has one order.

``KVFS_RACE_ROUNDS`` sets the moves of each client (default 600)."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from kvfs_metadata.client import BlockingMetadataClient
from linearizability import UNANSWERED, NotLinearizable, Operation, check
from metadata_models import BlockPlayer, Blocks, NamePlayer, Names, made_by
from metadata_servers import (
    Store,
    breaking_env,
    make_directory,
    make_namespace,
    play,
    running,
    store,
)

__all__ = ["store"]

ROUNDS = int(os.environ.get("KVFS_RACE_ROUNDS", "600"))
NAMES = 3
KEYS = 3


@pytest.mark.parametrize("clients", [2, 3])
def test_races_for_names(tmp_path: Path, store: Store, clients: int) -> None:
    with running(tmp_path, store) as servers:
        links = [servers.client(n) for n in range(clients)]
        race_for_names(links, ROUNDS)


@pytest.mark.parametrize("clients", [2, 3])
def test_races_for_blocks(tmp_path: Path, store: Store, clients: int) -> None:
    with running(tmp_path, store) as servers:
        links = [servers.client(n) for n in range(clients)]
        race_for_blocks(links, ROUNDS)


@pytest.mark.parametrize("race", ["names", "blocks"])
def test_races_over_connections_that_break(tmp_path: Path, store: Store, race: str) -> None:
    """A request whose connection broke may still lie with the server when it is repeated."""
    with running(tmp_path, store) as servers:
        worlds = [breaking_env(seed, 0.1) for seed in range(3)]
        links = [servers.client(n, env) for n, (env, _) in enumerate(worlds)]
        {"names": race_for_names, "blocks": race_for_blocks}[race](links, ROUNDS // 4)
    assert min(network.broken for _, network in worlds) > ROUNDS // 100


def race_for_names(links: list[BlockingMetadataClient], rounds: int) -> None:
    """Closes the links."""
    directory = make_directory(links[0], "d")
    players = [
        NamePlayer(
            link,
            f"client {n}",
            n,
            directory=directory,
            count=NAMES,
            marks=itertools.count(n + 1, len(links)),
        )
        for n, link in enumerate(links)
    ]
    play(players, rounds)
    players[-1].final()
    for link in links:
        link.close()
    history = [operation for player in players for operation in player.history]
    assert len(history) > len(links) * rounds
    made = made_by(history)
    assert len(made) == len(set(made))
    check(history, Names(NAMES, made))


def race_for_blocks(links: list[BlockingMetadataClient], rounds: int) -> None:
    """Closes the links."""
    namespace = make_namespace(links[0], "a/b")
    players = [
        BlockPlayer(link, f"client {n}", n, namespace=namespace, first=0, count=KEYS)
        for n, link in enumerate(links)
    ]
    play(players, rounds)
    for player in players:
        player.final()
    for link in links:
        link.close()
    history = [operation for player in players for operation in player.history]
    assert len(history) > len(links) * rounds // 2
    check(history, Blocks(KEYS))


# --- the models themselves


def history_of(*answers: tuple[object, object]) -> list[Operation]:
    """One after the other."""
    return [Operation("a", *pair, 2 * n, 2 * n + 1) for n, pair in enumerate(answers)]


NAME_ERRORS = {
    "made twice": [(("create", 0, 1, 16), ("made", 16)), (("create", 0, 2, 17), ("made", 17))],
    "told to exist": [(("create", 0, 1, 16), "exists")],
    "lost": [(("create", 0, 1, 16), ("made", 16)), (("stat", 0), "missing")],
    "both names of a rename": [
        (("create", 0, 1, 16), ("made", 16)),
        (("rename", 0, 1, 0), "done"),
        (("list",), ("lists", (0, 16, 1, 1), (1, 16, 1, 1))),
    ],
    "neither": [
        (("create", 0, 1, 16), ("made", 16)),
        (("rename", 0, 1, 0), "done"),
        (("list",), ("lists",)),
    ],
    "not exchanged": [
        (("create", 0, 1, 16), ("made", 16)),
        (("create", 1, 2, 17), ("made", 17)),
        (("rename", 0, 1, 2), "done"),
        (("stat", 0), ("is", 16, 1, 1)),
    ],
    "replaced though it must not be": [
        (("create", 0, 1, 16), ("made", 16)),
        (("create", 1, 2, 17), ("made", 17)),
        (("rename", 0, 1, 1), "done"),
    ],
    "links miscounted": [
        (("create", 0, 1, 16), ("made", 16)),
        (("link", 16, 1), ("linked", 16, 2)),
        (("unlink", 0), ("unlinked", 16, 0)),
    ],
    "an attribute set twice": [
        (("create", 0, 1, 16), ("made", 16)),
        (("set_xattr", 16, b"1"), "done"),
        (("set_xattr", 16, b"2"), "done"),
    ],
    "an attribute that is back": [
        (("create", 0, 1, 16), ("made", 16)),
        (("set_xattr", 16, b"1"), "done"),
        (("remove_xattr", 16), "done"),
        (("get_xattr", 16, b"1"), b"1"),
    ],
    "an owner forgotten": [
        (("create", 0, 1, 16), ("made", 16)),
        (("set_mark", 16, 2), "done"),
        (("stat", 0), ("is", 16, 1, 1)),
    ],
    "another file than was made": [
        (("create", 0, 1, 16), ("made", 16)),
        (("stat", 0), ("is", 17, 1, 1)),
    ],
}

BLOCK_ERRORS = {
    "half a batch": [
        (("prepare", (0, 1)), (16, 17)),
        (("commit", {0: 16, 1: 17}), "done"),
        (("lookup", (0, 1)), (16, None)),
    ],
    "visible before its commit": [(("prepare", (0,)), (16,)), (("match", (0,)), 1)],
    "the later value": [
        (("prepare", (0,)), (16,)),
        (("prepare", (0,)), (17,)),
        (("commit", {0: 16}), "done"),
        (("commit", {0: 17}), "done"),
        (("lookup", (0,)), (17,)),
    ],
    "removed twice": [
        (("prepare", (0,)), (16,)),
        (("commit", {0: 16}), "done"),
        (("remove", (0,), ()), 1),
        (("remove", (0,), ()), 1),
    ],
    "another generation removed": [
        (("prepare", (0,)), (16,)),
        (("commit", {0: 16}), "done"),
        (("remove", (0,), (15,)), 1),
    ],
    "a gap matched": [
        (("prepare", (1,)), (16,)),
        (("commit", {1: 16}), "done"),
        (("match", (0, 1)), 1),
    ],
    "prepared though it is stored": [
        (("prepare", (0,)), (16,)),
        (("commit", {0: 16}), "done"),
        (("prepare", (0,)), (17,)),
    ],
}


@pytest.mark.parametrize("name", NAME_ERRORS)
def test_the_model_of_names_refuses(name: str) -> None:
    history = history_of(*NAME_ERRORS[name])
    check(history[:-1], Names(2, made_by(history)))
    with pytest.raises(NotLinearizable):
        check(history, Names(2, made_by(history)))


@pytest.mark.parametrize("name", BLOCK_ERRORS)
def test_the_model_of_blocks_refuses(name: str) -> None:
    history = history_of(*BLOCK_ERRORS[name])
    check(history[:-1], Blocks(2))
    with pytest.raises(NotLinearizable):
        check(history, Blocks(2))


def test_a_file_made_without_an_answer_is_known_when_it_is_seen() -> None:
    lost = Operation("b", ["create", 0, 7, None], UNANSWERED, 0, None)
    good = history_of(
        (("stat", 0), "missing"),
        (("stat", 0), ("is", 16, 7, 1)),
        (("link", 16, 1), ("linked", 16, 2)),
        (("unlink", 0), ("unlinked", 16, 1)),
        (("list",), ("lists", (1, 16, 7, 1))),
    )
    check([lost, *good], Names(2, []))
    with pytest.raises(NotLinearizable):
        check([lost, *good], Names(2, [16]))
    with pytest.raises(NotLinearizable):
        check(good, Names(2, []))
    other = history_of((("stat", 0), ("is", 16, 7, 1)), (("stat", 0), ("is", 17, 7, 1)))
    with pytest.raises(NotLinearizable):
        check([lost, *other], Names(2, []))
