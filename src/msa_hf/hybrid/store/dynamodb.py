"""`DynamoDBStore`: a store in a table of DynamoDB, or of a server that speaks its API."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .errors import ItemTooLarge, StoreError, StoreFormatError, StoreUnavailable, VersionConflict
from .item import (
    MAX_ITEM,
    Item,
    check_expected,
    check_key,
    check_partition,
    check_range,
    check_version,
    decode_data,
    encode_item,
    next_version,
)

logger = logging.getLogger(__name__)
Attributes = Mapping[str, Mapping[str, str]]
KEYS = [{"AttributeName": "pk", "KeyType": "HASH"}, {"AttributeName": "sk", "KeyType": "RANGE"}]
TYPES = [{"AttributeName": "pk", "AttributeType": "S"}, {"AttributeName": "sk", "AttributeType": "S"}]
# Several are reserved words of DynamoDB's expressions.
NAMES = {"#version": "version", "#expires": "expires_at", "#type": "type"}
LIVES = "(attribute_not_exists(#expires) OR #expires > :now)"
PAGE = 1024  # items that a query asks for at most
# The last writes of a key, the newest first, as `version:mark`: by the mark a writer knows its own write again.
WRITES = ("w0", "w1", "w2", "w3", "w4")
BATCH, BATCH_BYTES = 25, 4 * 2**20  # of a BatchWriteItem; DynamoDB takes 16 MB
BUSY = ("ProvisionedThroughputExceededException", "ThrottlingException", "RequestLimitExceeded", "InternalServerError")


class DynamoDBStore:
    """A `MemoryStore` in one table with a partition key `pk` and a sort key `sk`, both strings.

    Data lies in the attribute `data` as JSON; `expires_at` is the table's TTL attribute. Reads are consistent ones.

    Args:
        table: its name.
        create: make the table if it is missing, paid by request, with its TTL attribute.
        endpoint: URL of the server, such as that of DynamoDB local. Default: AWS's for the region.
        region: default: that of the AWS configuration, as for credentials.
        timeout: seconds to wait for a connection, for an answer, and in all for what a busy table leaves of a batch.
        attempts: how often a request is sent before it fails.
        clock: seconds since 1970; for expiry and versions.

    Raises:
        ImportError: if boto3 is missing.
        StoreFormatError: if the table is missing, or has other keys.
        StoreUnavailable: if no server answers.
    """

    def __init__(
        self,
        table: str,
        *,
        create: bool = False,
        endpoint: str | None = None,
        region: str | None = None,
        timeout: float = 5.0,
        attempts: int = 3,
        clock: Callable[[], float] = time.time,
    ) -> None:
        try:
            import boto3
            from botocore import exceptions
            from botocore.config import Config
        except ImportError as error:
            raise ImportError('DynamoDBStore needs boto3: `pip install "msa-hf[dynamodb]"`.') from error
        if not 0 < timeout < 1e6:
            raise ValueError(f"`timeout` must be seconds, more than 0, got {timeout!r:.80}.")
        if type(attempts) is not int or attempts < 1:
            raise ValueError(f"`attempts` must be an integer of at least 1, got {attempts!r:.80}.")
        self.table = table
        self._endpoint, self._timeout, self._clock = endpoint, timeout, clock
        self._exceptions = exceptions
        retries = {"mode": "standard", "total_max_attempts": attempts}
        config = Config(connect_timeout=timeout, read_timeout=timeout, retries=retries)

        def connect() -> Any:
            session = boto3.session.Session()
            return session.client("dynamodb", endpoint_url=endpoint, region_name=region, config=config)

        self._connect = connect
        with self._reported():
            self._connected, self._process = connect(), os.getpid()
            self._check_table(create)

    @property
    def _client(self) -> Any:
        if self._process != os.getpid():  # forked: sockets must not be shared with the parent
            self._connected, self._process = self._connect(), os.getpid()
        return self._connected

    def now(self) -> float:
        """See `MemoryStore`."""
        return self._clock()

    # Reading ----------------------------------------------------------------------------------------------------------

    def get(self, partition: str, sort: str) -> Item | None:
        """See `MemoryStore`."""
        check_key(partition, sort)
        found = self._read(partition, sort)
        item = None if found is None else self._item(found)
        return item if item is not None and item.lives(self.now()) else None

    def query(
        self,
        partition: str,
        prefix: str = "",
        *,
        after: str | None = None,
        type: str | None = None,
        reverse: bool = False,
        limit: int | None = None,
    ) -> Iterator[Item]:
        """See `MemoryStore`."""
        check_partition(partition)
        check_range(prefix, after, type, limit)
        return self._pages(partition, prefix, after, type, reverse, limit)

    def _pages(
        self, partition: str, prefix: str, after: str | None, type: str | None, reverse: bool, limit: int | None
    ) -> Iterator[Item]:
        values = {":partition": {"S": partition}, ":now": {"N": repr(self.now())}}
        names = {"#expires": "expires_at"}
        condition, filter = "pk = :partition", LIVES
        if prefix:
            condition += " AND begins_with(sk, :prefix)"
            values[":prefix"] = {"S": prefix}
        if type is not None:
            filter += " AND #type = :type"
            values[":type"], names["#type"] = {"S": type}, "type"
        request: dict[str, Any] = {
            "TableName": self.table,
            "KeyConditionExpression": condition,
            "FilterExpression": filter,
            "ExpressionAttributeNames": names,
            "ExpressionAttributeValues": values,
            "ConsistentRead": True,
            "ScanIndexForward": not reverse,
        }
        if after is not None:
            request["ExclusiveStartKey"] = _key(partition, after)
        left = limit
        while True:
            if left is not None:
                request["Limit"] = min(left + 8, PAGE)  # some may be filtered out
            with self._reported():
                page = self._client.query(**request)
            for attributes in page["Items"][:left]:
                yield self._item(attributes)
            left = None if left is None else left - len(page["Items"])
            if "LastEvaluatedKey" not in page or (left is not None and left <= 0):
                return
            request["ExclusiveStartKey"] = page["LastEvaluatedKey"]

    def _read(self, partition: str, sort: str) -> Attributes | None:
        """The attributes of a key, expired or not."""
        with self._reported():
            answer = self._client.get_item(TableName=self.table, Key=_key(partition, sort), ConsistentRead=True)
        found: Attributes | None = answer.get("Item")
        return found

    def _item(self, attributes: Attributes) -> Item:
        try:
            partition, sort = attributes["pk"]["S"], attributes["sk"]["S"]
            type, data, version = attributes["type"]["S"], attributes["data"]["S"], int(attributes["version"]["N"])
            expires_at = int(attributes["expires_at"]["N"]) if "expires_at" in attributes else None
        except (KeyError, ValueError) as error:
            raise StoreFormatError(
                f"Table {self.table!r} has an item that no store wrote ({error!r}); give the store a table of its own."
            ) from error
        return Item(partition, sort, type, decode_data(partition, sort, data), version, expires_at)

    # Writing ----------------------------------------------------------------------------------------------------------

    def put(self, item: Item, *, expected: int | None = None) -> Item:
        """See `MemoryStore`."""
        check_expected(expected)
        data = encode_item(item, MAX_ITEM)
        mark = _mark()
        version = next_version(self.now(), expected or 0)
        retried = False
        while True:
            now = self.now()
            written = replace(item, version=version)
            if expected is None:
                condition = "attribute_not_exists(pk) OR #version < :version"
            elif expected == 0:
                condition = "attribute_not_exists(pk) OR (#expires <= :now AND #version < :version)"
            else:
                condition = f"#version = :expected AND {LIVES}"
            values = {":version": version, ":expected": expected, ":now": now}
            try:
                with self._reported():
                    self._client.update_item(TableName=self.table, **_update(written, data, mark, condition, values))
                return written
            except _ConditionFailed as failed:
                retried = retried or failed.retried
                found = self._read(item.partition, item.sort)
                writes = [] if found is None else _writes(found)
                if own := [number for number, made in writes if made == mark]:
                    return replace(item, version=own[0])
                there = None if found is None else self._item(found)
                lives = there is not None and there.lives(now)
                if expected is not None and (lives or expected):
                    if retried and not _after(writes, expected):
                        raise self._unknown(item.partition, item.sort) from None
                    raise VersionConflict(
                        item.partition, item.sort, expected, there.version if there is not None and lives else None
                    ) from None
                version = next_version(now, 0 if there is None else there.version)

    def delete(self, partition: str, sort: str, *, expected: int | None = None) -> bool:
        """See `MemoryStore`; where an answer was lost, an item that is gone now counts as deleted by this call."""
        check_key(partition, sort)
        check_expected(expected, 1)
        now = self.now()
        given = {}
        if expected is not None:
            given = _condition(f"#version = :expected AND {LIVES}", {":expected": expected, ":now": now})
        try:
            with self._reported():
                answer = self._client.delete_item(
                    TableName=self.table, Key=_key(partition, sort), ReturnValues="ALL_OLD", **given
                )
        except _ConditionFailed as failed:
            found = self._read(partition, sort)
            if failed.retried and found is None:
                return True
            there = None if found is None else self._item(found)
            if failed.retried and found is not None and not _after(_writes(found), expected or 0):
                raise self._unknown(partition, sort) from None
            lives = there is not None and there.lives(now)
            raise VersionConflict(
                partition, sort, expected or 0, there.version if there is not None and lives else None
            ) from None
        if "Attributes" in answer:
            return self._item(answer["Attributes"]).lives(now)
        return _retried(answer)

    def _unknown(self, partition: str, sort: str) -> StoreUnavailable:
        return StoreUnavailable(
            f"{partition!r:.80}/{sort!r:.80}: the answer to a write was lost, and others have written since: it may "
            "have been done or not. Read before repeating it."
        )

    def write(self, items: Iterable[Item], deletes: Iterable[tuple[str, str]] = ()) -> None:
        """See `MemoryStore`."""
        puts: dict[tuple[str, str], tuple[dict[str, Any], int]] = {}
        for item in items:
            check_version(item)
            data = encode_item(item, MAX_ITEM)
            written = replace(item, version=next_version(self.now(), item.version))
            request = {"PutRequest": {"Item": _attributes(written, data, _mark())}}
            puts[item.partition, item.sort] = request, len(data.encode())
        gone: dict[tuple[str, str], tuple[dict[str, Any], int]] = {}
        for key in deletes:
            check_key(*key)
            gone[key] = {"DeleteRequest": {"Key": _key(*key)}}, 0
        # A batch is done in any order, and in part where the table is busy: what is deleted waits for what is written.
        for requests in (puts, gone):
            batch: list[dict[str, Any]] = []
            size = 0
            for request, bytes in requests.values():
                if len(batch) == BATCH or size + bytes > BATCH_BYTES:
                    self._write_batch(batch)
                    batch, size = [], 0
                batch.append(request)
                size += bytes
            if batch:
                self._write_batch(batch)

    def _write_batch(self, batch: list[dict[str, Any]]) -> None:
        deadline, wait = time.monotonic() + self._timeout, 0.02
        while batch:
            with self._reported():
                answer = self._client.batch_write_item(RequestItems={self.table: batch})
            batch = answer.get("UnprocessedItems", {}).get(self.table, [])
            if batch and time.monotonic() > deadline:
                raise StoreUnavailable(
                    f"Table {self.table!r} left {len(batch)} writes of a batch undone for {self._timeout:g} s; write "
                    "more slowly, or give it more capacity."
                )
            if batch:
                time.sleep(random.uniform(0, wait))
                wait = min(2 * wait, 1.0)

    def purge(self) -> int:
        """See `MemoryStore`; it reads the whole table, where DynamoDB's own TTL costs nothing."""
        count = 0
        request: dict[str, Any] = {
            "TableName": self.table,
            "FilterExpression": "#expires <= :now",
            "ProjectionExpression": "pk, sk",
            "ExpressionAttributeNames": {"#expires": "expires_at"},
            "ExpressionAttributeValues": {":now": {"N": repr(self.now())}},
        }
        while True:
            with self._reported():
                page = self._client.scan(**request)
            for key in page["Items"]:
                with contextlib.suppress(_ConditionFailed), self._reported():  # written again meanwhile
                    self._client.delete_item(
                        TableName=self.table, Key=key, **_condition("#expires <= :now", {":now": self.now()})
                    )
                    count += 1
            if "LastEvaluatedKey" not in page:
                return count
            request["ExclusiveStartKey"] = page["LastEvaluatedKey"]

    # The table --------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """See `MemoryStore`."""
        self._connected.close()

    def __enter__(self) -> DynamoDBStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _check_table(self, create: bool) -> None:
        try:
            found = self._client.describe_table(TableName=self.table)["Table"]
        except self._client.exceptions.ResourceNotFoundException:
            if not create:
                raise StoreFormatError(
                    f"There is no table {self.table!r} at {self._where()}; create=True makes it."
                ) from None
            found = self._create_table()
        if found["TableStatus"] != "ACTIVE":
            wait = {"Delay": 1, "MaxAttempts": 60}
            self._client.get_waiter("table_exists").wait(TableName=self.table, WaiterConfig=wait)
        keys = {key["AttributeName"]: key["KeyType"] for key in found["KeySchema"]}
        types = {item["AttributeName"]: item["AttributeType"] for item in found["AttributeDefinitions"]}
        if keys != {"pk": "HASH", "sk": "RANGE"} or (types["pk"], types["sk"]) != ("S", "S"):
            described = ", ".join(f"{name} {types[name]} {kind}" for name, kind in keys.items())
            raise StoreFormatError(
                f"Table {self.table!r} at {self._where()} has the keys ({described}), a store needs (pk S HASH, sk S "
                "RANGE). Name another table; create=True makes it."
            )

    def _create_table(self) -> Any:
        client, name = self._client, self.table
        with contextlib.suppress(client.exceptions.ResourceInUseException):  # somebody else was faster
            client.create_table(
                TableName=name, KeySchema=KEYS, AttributeDefinitions=TYPES, BillingMode="PAY_PER_REQUEST"
            )
        client.get_waiter("table_exists").wait(TableName=name, WaiterConfig={"Delay": 1, "MaxAttempts": 60})
        try:
            specification = {"Enabled": True, "AttributeName": "expires_at"}
            client.update_time_to_live(TableName=name, TimeToLiveSpecification=specification)
        except self._exceptions.ClientError as error:
            logger.warning(
                "Table %r: the server does not reclaim expired items (%s); purge() does.", name, _code(error)
            )
        return client.describe_table(TableName=name)["Table"]

    def _where(self) -> str:
        return self._endpoint or "DynamoDB"

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn botocore's errors into a store's."""
        exceptions = self._exceptions
        try:
            yield
        except exceptions.ClientError as error:
            code, message = _code(error), error.response.get("Error", {}).get("Message", "")
            if code == "ConditionalCheckFailedException":
                raise _ConditionFailed(_retried(error.response)) from None
            if code == "ResourceNotFoundException":
                raise StoreFormatError(f"There is no table {self.table!r} at {self._where()} any more.") from error
            if code in BUSY:
                raise StoreUnavailable(f"Table {self.table!r} at {self._where()} is busy ({code}).") from error
            if "exceeded the maximum allowed size" in message:
                raise ItemTooLarge(f"Table {self.table!r}: {message}") from error
            raise StoreError(f"Table {self.table!r} at {self._where()}: {code}: {message}") from error
        except (exceptions.HTTPClientError, exceptions.ConnectionError, exceptions.WaiterError) as error:
            raise StoreUnavailable(
                f"No answer from {self._where()} within {self._timeout:g} s per attempt ({error}). Is the server there?"
            ) from error
        except (exceptions.NoCredentialsError, exceptions.NoRegionError, exceptions.PartialCredentialsError) as error:
            raise StoreError(
                f"{error} Set the region, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or configure a profile; a local "
                "server takes any values."
            ) from error
        except exceptions.BotoCoreError as error:
            raise StoreError(f"Table {self.table!r} at {self._where()}: {error}") from error


class _ConditionFailed(Exception):
    """A conditional write found something else; `retried`: it was sent more than once, so what it found may be what it
    wrote."""

    def __init__(self, retried: bool) -> None:
        super().__init__()
        self.retried = retried


def _retried(answer: Any) -> bool:
    return bool(answer.get("ResponseMetadata", {}).get("RetryAttempts", 0))


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown error"))


def _key(partition: str, sort: str) -> dict[str, dict[str, str]]:
    return {"pk": {"S": partition}, "sk": {"S": sort}}


def _mark() -> str:
    return uuid.uuid4().hex[:8]


def _attributes(item: Item, data: str, mark: str) -> dict[str, dict[str, str]]:
    attributes = {
        **_key(item.partition, item.sort),
        "type": {"S": item.type},
        "data": {"S": data},
        "version": {"N": str(item.version)},
        WRITES[0]: {"S": f"{item.version}:{mark}"},
    }
    return attributes if item.expires_at is None else {**attributes, "expires_at": {"N": str(item.expires_at)}}


def _update(
    item: Item, data: str, mark: str, condition: str, values: Mapping[str, float | int | None]
) -> dict[str, Any]:
    """A write of a whole item under a condition, as arguments of UpdateItem, which alone can keep what was there: the
    last writes move on by one."""
    given = _attributes(item, data, mark)
    names = {f"#{name}": name for name in ("type", "data", "version", "expires_at")}
    new = [f"#{name} = :new_{name}" for name in ("type", "data", "version", "expires_at") if name in given]
    new += [f"{WRITES[0]} = :written"]
    new += [f"{name} = if_not_exists({before}, :none)" for before, name in itertools.pairwise(WRITES)]
    gone = ["mark"] if "expires_at" in given else ["mark", "#expires_at"]  # `mark`: of earlier releases
    made = _condition(condition, values)
    return {
        "Key": _key(item.partition, item.sort),
        "UpdateExpression": f"SET {', '.join(new)} REMOVE {', '.join(gone)}",
        "ConditionExpression": condition,
        "ExpressionAttributeNames": {**made["ExpressionAttributeNames"], **names},
        "ExpressionAttributeValues": {
            **made["ExpressionAttributeValues"],
            **{f":new_{name}": given[name] for name in ("type", "data", "version", "expires_at") if name in given},
            ":written": given[WRITES[0]],
            ":none": {"S": ""},
        },
    }


def _writes(attributes: Attributes) -> list[tuple[int, str]]:
    """Version and mark of the last writes, the newest first; version 0 is behind the first one there was."""
    found: list[tuple[int, str]] = []
    for name in WRITES:
        version, _, mark = attributes.get(name, {}).get("S", "").partition(":")
        found.append((int(version) if version.isdecimal() else 0, mark))
    return found


def _after(writes: Iterable[tuple[int, str]], version: int) -> bool:
    """Tell whether all that was written after a version is among the last writes: they reach back to it, or for 0 to
    the first write there was. Versions grow, and a key that was deleted begins anew."""
    return any(0 < number <= version or number == version for number, _ in writes)


def _condition(expression: str, values: Mapping[str, float | int | None]) -> dict[str, Any]:
    """A condition as arguments of a request; of names and values only those that it uses, as DynamoDB asks for."""
    return {
        "ConditionExpression": expression,
        "ExpressionAttributeNames": {name: value for name, value in NAMES.items() if name in expression},
        "ExpressionAttributeValues": {
            name: {"N": repr(value)} for name, value in values.items() if name in expression.replace(")", " ").split()
        },
    }
