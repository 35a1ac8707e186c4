"""What a finished job leaves for people: a card, a contact sheet, and the list of what was refused."""

from __future__ import annotations

import json
from math import prod

from covae_client.batch.shards import columns_of, from_bytes
from covae_client.batch.specification import FORMATS, Specification
from covae_client.batch.store import Store
from covae_core.images import CONTACT_SHEET, JOB_FILE, contact_sheet, encode_png

CARD, REJECTS = "README.md", "rejects.jsonl"
SHEET_IMAGES = 64


def write(store: Store, job: Specification) -> None:
    """Write them, from the shards alone, which are all there.

    Raises:
        StoreError: the folder cannot be read or written. ShardError: a shard is damaged.
    """
    rows = rejected = 0
    lines = []
    first = None
    for shard in range(job.shards):
        if job.operation == "generate" and first is not None:
            rows += len(job.rows(shard))
            continue
        found = from_bytes(job, shard, store.read(job.name(shard)))
        first = first if first is not None else found.images
        rows, rejected = rows + len(found.values), rejected + len(found.rejects)
        lines += [json.dumps(reject, ensure_ascii=False) for reject in found.rejects]
    if first is not None:
        store.replace(CONTACT_SHEET, encode_png(contact_sheet(first[:SHEET_IMAGES])))
    if lines:
        store.replace(REJECTS, ("\n".join(lines) + "\n").encode())
    else:
        store.remove(REJECTS)
    store.replace(CARD, text(job, rows, rejected, sheet=first is not None).encode())


def text(job: Specification, rows: int, rejected: int, sheet: bool) -> str:
    """The card, in the form that Hugging Face's datasets reads."""
    height, width, channels = job.image_shape
    options = "\n".join(f"- {name}: {value}" for name, value in sorted(job.options.items()) if value is not None)
    columns = ", ".join(f"`{name}`" for name in columns_of(job))
    made = {
        "generate": f"Images drawn from the model {job.model}, none of them real",
        "score": f"Scores of pictures by the model {job.model}",
        "edit": f"Images that the model {job.model} makes of edits, none of them real",
    }[job.operation]
    members = f"part-{{00000..{job.shards - 1:05d}}}-of-{job.shards:05d}.tar"
    opened = (
        "`datasets.load_dataset(FOLDER)` opens it"
        if job.format == "parquet"
        else f'`webdataset.WebDataset(FOLDER + "/data/{members}")` reads it'
    )
    size = f" of {height}×{width}, {'RGB' if channels == 3 else 'grey'}," if prod(job.image_shape) and sheet else ""
    picture = f"![the first images]({CONTACT_SHEET})\n\n" if sheet else ""
    refused = f"{rejected} pictures were refused: `{REJECTS}` names each with the reason.\n\n" if rejected else ""
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        f"    path: data/*.{FORMATS[job.format]}\n---\n\n"
        f"# {job.operation} · {job.model}\n\n{made}: {rows} rows{size} in {job.shards} shards; {opened}.\n\n"
        f"{picture}{refused}Beside each row: {columns}.\n\n{options}\n\n"
        f"Training run {job.run_id}, SHA-256 {job.run_digest}. `{JOB_FILE}` is the whole specification; "
        "`covae batch verify FOLDER` holds every shard against it.\n"
    )
