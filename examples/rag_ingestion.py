"""A folder of documents into a searchable index: each file is embedded once, and later only what has changed.

    pip install stroma-runner wordllama
    python examples/rag_ingestion.py     # the documents of this project, or a folder as an argument

Needs neither a key nor a network: the embedding model (16 MB) ships in the wheel of wordllama.
"""

import asyncio
import hashlib
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import wordllama
from pydantic import BaseModel

from stroma import ExecutionResult, NodeContract, Pipeline, SQLiteStore, StromaRunner, stroma_node

CHUNK = 600  # characters
QUESTION = "what happens to finished work when the process is killed?"

# wordllama turns on the log of everything that is imported.
logging.getLogger("stroma").setLevel(logging.ERROR)

# By itself it would look for the tokenizer on the network; both files are in the package.
model = wordllama.WordLlama.load(cache_dir=Path(wordllama.__path__[0]), disable_download=True)


class Document(BaseModel):
    name: str
    text: str


class Chunks(BaseModel):
    name: str
    texts: list[str]


class Index(BaseModel):
    name: str
    texts: list[str]
    vectors: list[list[float]]


@stroma_node("cut", NodeContract(node_id="cut", input_schema=Document, output_schema=Chunks))
async def cut(document: Document) -> dict[str, object]:
    if not document.text.strip():
        raise ValueError(f"{document.name} is empty")
    texts: list[str] = []
    for paragraph in document.text.split("\n\n"):
        if texts and len(texts[-1]) + len(paragraph) < CHUNK:
            texts[-1] += "\n\n" + paragraph
        else:
            texts.append(paragraph)
    return {"name": document.name, "texts": texts}


# A plain function runs in a thread of its own, so that the event loop stays free while the model works.
@stroma_node("embed", NodeContract(node_id="embed", input_schema=Chunks, output_schema=Index))
def embed(chunks: Chunks) -> dict[str, object]:
    return {**dict(chunks), "vectors": model.embed(chunks.texts, norm=True).tolist()}


ingestion = Pipeline("ingestion", [cut, embed])


def named_after_content(number: int, document: BaseModel) -> str:
    # A file that has not changed is a run that has finished: with if_exists="return" it gives what it gave.
    return hashlib.sha256(document.model_dump_json().encode()).hexdigest()[:16]


def documents(folder: Path) -> Iterator[Document]:
    for path in sorted(folder.rglob("*.md")):
        yield Document(name=path.name, text=path.read_text("utf-8"))


async def ingest(folder: Path, database: Path) -> list[Index]:
    async with SQLiteStore(database) as store:
        runner = StromaRunner.quick(store=store, if_exists="return")
        # Files are read as there is room for them.
        results = await runner.run_many(
            ingestion, documents(folder), run_ids=named_after_content, max_concurrency=4
        )
    runs = [result for result in results if isinstance(result, ExecutionResult)]
    # One file that cannot be read is one failed run; the others are none the worse for it.
    for run in runs:
        if run.failure:
            print(f"  left out: {run.failure}")
    made = [run.final_state for run in runs if isinstance(run.final_state, Index)]
    print(f"{len(made)} files, {sum(len(run.trace) for run in runs)} calls")
    return made


def answer(indexes: list[Index]) -> None:
    texts = [(index.name, text) for index in indexes for text in index.texts]
    scores = np.array([v for index in indexes for v in index.vectors]) @ model.embed([QUESTION], norm=True)[0]
    print(QUESTION)
    for place in np.argsort(-scores)[:3]:
        name, text = texts[place]
        print(f"  {scores[place]:.2f}  {name}: {' '.join(text.split())[:90]}")


if __name__ == "__main__":
    given = Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "docs"
    with tempfile.TemporaryDirectory() as name:
        folder, database = Path(name, "documents"), Path(name, "runs.db")
        shutil.copytree(given, folder)
        (folder / "empty.md").write_text("")
        answer(asyncio.run(ingest(folder, database)))
        print("\nAgain, after one file has changed:")
        (folder / "empty.md").write_text("It is kept, and the next process goes on from there.")
        answer(asyncio.run(ingest(folder, database)))
