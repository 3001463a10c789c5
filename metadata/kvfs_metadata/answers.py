"""Answers of requests that must not be carried out twice (``messages.Once``)."""

from __future__ import annotations

from typing import Any

import msgspec

from kvfs_base.errors import InvalidRequest, KvfsError, from_wire
from kvfs_base.frames import ErrorBody
from kvfs_metadata import records
from kvfs_metadata.limits import ANSWERS_PER_COLLECTION, ONCE_SECONDS
from kvfs_metadata.messages import Once
from kvfs_metadata.records import AnswerRecord
from kvfs_metadata.transaction import Tx

_decode_error = msgspec.msgpack.Decoder(ErrorBody).decode


class Answers:
    """They lie in the store only; memory has the place at which the collector goes on."""

    def __init__(self) -> None:
        self._decoders: dict[Any, msgspec.msgpack.Decoder[Any]] = {}
        self._collected_to = records.ANSWER

    def find(self, tx: Tx, slot: bytes, request: Once) -> Any:
        """The answer or KvfsError that ``request`` got the first time, or None. ``slot`` is the key
        of its slot. Raises InvalidRequest if that has answered a later request: nobody waits for
        this one."""
        value = tx.kv.get(slot)
        if value is None:
            return None
        record = records.decode_answer(value)
        if record.number > request.number:
            raise InvalidRequest(detail=f"slot {request.slot} is at {record.number}")
        if record.number < request.number:
            return None
        if record.failed:
            error = _decode_error(record.reply)
            return from_wire(error.code, error.data)
        reply_type = request.reply_type()
        decoder = self._decoders.get(reply_type)
        if decoder is None:
            decoder = self._decoders[reply_type] = msgspec.msgpack.Decoder(reply_type)
        return decoder.decode(record.reply)

    def keep(self, tx: Tx, slot: bytes, request: Once, reply: Any) -> None:
        """``slot`` as for ``find``. ``reply`` may be a KvfsError: of a request that was sent
        before."""
        failed = isinstance(reply, KvfsError)
        body = ErrorBody(reply.wire_code, reply.wire_data()) if failed else reply
        record = AnswerRecord(request.number, tx.now_ns, records.encode(body), failed)
        tx.kv.put(slot, records.encode(record))

    def collect(self, tx: Tx) -> int:
        """Deletes what clients left that are gone, one transaction's worth; goes on where it
        stopped. Answers with the number deleted."""
        oldest = tx.now_ns - int(ONCE_SECONDS * 1e9)
        end = records.ANSWER + b"\xff" * 19
        items = tx.kv.range(self._collected_to, end, ANSWERS_PER_COLLECTION)
        late = [key for key, value in items if records.decode_answer(value).time_ns < oldest]
        for key in late:
            tx.kv.delete(key)
        more = len(items) == ANSWERS_PER_COLLECTION
        self._collected_to = items[-1][0] + b"\x00" if more else records.ANSWER
        return len(late)
