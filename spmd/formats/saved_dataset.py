"""The files of a dataset that Hugging Face's `datasets` saved to a folder, or that lies on the Hub."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from huggingface_hub import snapshot_download

from spmd.messages import Mistake, first_line, listed

HUB = "hf://"
CONVERTED = "refs/convert/parquet"  # the Hub's own copy of a dataset, <config>/<split>/<number>.parquet
MOST_NAMED = 8


def files_of_folder(folder: str) -> list[str] | None:
    """The Arrow files of a dataset saved by `save_to_disk`, in order; None if the folder holds none.

    Raises:
        Mistake: it has several splits, of which one must be chosen, or rows are selected by a file of indices.
    """
    path = Path(folder)
    if (path / "dataset_dict.json").is_file():
        splits = _told(path / "dataset_dict.json", "splits")
        raise Mistake(
            f"input={folder} has several splits: choose {' or '.join(f'input={path / name}' for name in splits)}"
        )
    if not (path / "state.json").is_file():
        return None
    if _told(path / "state.json", "_indices_files", []):
        raise Mistake(f"input={folder} selects rows by a file of indices: save it after flatten_indices()")
    return [str(path / Path(file["filename"]).name) for file in _told(path / "state.json", "_data_files")]


def _told(file: Path, key: str, *default: Any) -> Any:
    """What a file of JSON says under a key."""
    try:
        found = json.loads(file.read_bytes())
        return found.get(key, *default) if default else found[key]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Mistake(f"input={file.parent} is no dataset as save_to_disk leaves it: {first_line(error)}") from error


def files_of_hub(url: str) -> list[str]:
    """The Parquet files of hf://datasets/OWNER/NAME?split=train&config=NAME, downloaded or from the cache.

    Raises:
        Mistake: it isn't such an address, the Hub or the dataset is out of reach, or a split or config must be chosen.
    """
    parts, wanted = urlsplit(url), parse_qs(urlsplit(url).query)
    name = parts.path.strip("/")
    if parts.netloc != "datasets" or not name or name.count("/") > 1 or wanted.keys() - {"split", "config"}:
        raise Mistake(f"input={url} is no address of a dataset: hf://datasets/OWNER/NAME?split=train&config=NAME is")
    split, config = wanted.get("split", ["train"])[-1], wanted.get("config", ["*"])[-1]
    pattern = f"{config}/{split}/*.parquet"
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", revision=CONVERTED, allow_patterns=pattern))
    except Exception as error:  # the Hub's client raises errors of several libraries
        raise Mistake(
            f"input={url} can't be had: {first_line(error).rstrip('.')}; where the Hub is out of reach, download the "
            f"dataset's Parquet files elsewhere, and give these as input"
        ) from error
    files = sorted(folder.glob(pattern))
    if len(configs := sorted({file.parts[-3] for file in files})) > 1:
        raise Mistake(f"input={url} has several configs: choose one by config=, of {listed(configs, MOST_NAMED)}")
    if not files:
        raise Mistake(f"input={url} has no rows in the Hub's Parquet copy of split {split}, config {config}")
    return [str(file) for file in files]
