"""CheckpointStoreTests: right stores pass it, and each possible error is found."""

import ast
import copy
import hashlib
import inspect
import json
import shutil
from typing import ClassVar

import pytest

from stroma import AsyncInMemoryStore, InMemoryStore, SQLiteStore
from stroma.testing import CheckpointStoreTests
from stroma.testing.checkpoints import Document, State


class TestInMemoryStore(CheckpointStoreTests):
    test_another_object_finds_what_was_saved = None  # It is kept as long as its object is.

    @pytest.fixture
    def store(self):
        return InMemoryStore()


class TestAsyncInMemoryStore(CheckpointStoreTests):
    test_another_object_finds_what_was_saved = None  # It is kept as long as its object is.

    @pytest.fixture
    def store(self):
        return AsyncInMemoryStore()


class TestSQLiteStore(CheckpointStoreTests):
    @pytest.fixture
    async def store(self, tmp_path):
        async with SQLiteStore(tmp_path / "x.db") as store:
            yield store

    async def reopened(self, store):
        return SQLiteStore(store.path)


class Files:
    """A store as its author would write it: one file for each node."""

    classes: ClassVar = {"State": State, "Document": Document}

    def __init__(self, directory):
        self.directory = directory

    def path(self, run_id, node_id):
        return self.directory / digest(run_id) / f"{digest(node_id)}.json"

    def save(self, run_id, node_id, state):
        path = self.path(run_id, node_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([type(state).__name__, repr(state.model_dump())]))

    def load(self, run_id, node_id):
        path = self.path(run_id, node_id)
        if not path.exists():
            return None
        name, data = json.loads(path.read_text())
        return self.classes[name].model_validate(ast.literal_eval(data))

    def delete(self, run_id):
        shutil.rmtree(self.directory / digest(run_id), ignore_errors=True)


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


class TestFiles(CheckpointStoreTests):
    @pytest.fixture
    def store(self, tmp_path):
        return Files(tmp_path)

    async def reopened(self, store):
        return Files(store.directory)


class Broken:
    """A dict, and one thing wrong."""

    def __init__(self):
        self.states = {}

    def key(self, run_id, node_id):
        return run_id, node_id

    def save(self, run_id, node_id, state):
        self.states[self.key(run_id, node_id)] = copy.deepcopy(state)

    def load(self, run_id, node_id):
        return copy.deepcopy(self.states.get(self.key(run_id, node_id)))

    def delete(self, run_id):
        for key in [key for key in self.states if key[0] == run_id]:
            del self.states[key]


class JoinsIds(Broken):
    def key(self, run_id, node_id):
        return f"{run_id}:{node_id}"

    def delete(self, run_id):
        for key in [key for key in self.states if key.startswith(f"{run_id}:")]:
            del self.states[key]


class KeepsTheObject(Broken):
    def save(self, run_id, node_id, state):
        self.states[run_id, node_id] = state


class GivesTheObject(Broken):
    def load(self, run_id, node_id):
        return self.states.get((run_id, node_id))


class KeepsTheFirst(Broken):
    def save(self, run_id, node_id, state):
        self.states.setdefault((run_id, node_id), copy.deepcopy(state))


class RaisesForUnknown(Broken):
    def load(self, run_id, node_id):
        return copy.deepcopy(self.states[run_id, node_id])


class DeletesNothing(Broken):
    def delete(self, run_id):
        pass


class DeletesByPrefix(Broken):
    def delete(self, run_id):
        for key in [key for key in self.states if key[0].startswith(run_id)]:
            del self.states[key]


class LosesTheClass(Broken):
    def load(self, run_id, node_id):
        result = super().load(run_id, node_id)
        return result if result is None else State(**{k: v for k, v in result if k in State.model_fields})


class OneRun(Broken):
    def key(self, run_id, node_id):
        return "", node_id


SUITE = [
    test
    for name, test in inspect.getmembers(CheckpointStoreTests, inspect.isfunction)
    if name.startswith("test_") and name != "test_another_object_finds_what_was_saved"
]


async def failures(store_class):
    findings = []
    for test in SUITE:
        try:
            await test(CheckpointStoreTests(), store_class())
        except (Exception, pytest.fail.Exception):
            findings.append(test.__name__)
    return findings


@pytest.mark.parametrize("wrong", Broken.__subclasses__(), ids=lambda wrong: wrong.__name__)
async def test_a_store_with_one_thing_wrong_fails(wrong):
    """The suite finds each mistake that an author may make, and nothing in a dict that is right."""
    assert await failures(Broken) == []
    assert await failures(wrong)
