"""The manifest of prepared data."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from shards import random_documents, write_folder

from data.store.manifest import read_manifest


def test_identity_is_the_digest_of_the_whole_content(tmp_path: Path) -> None:
    """Runs resume only on data of the same identity: it must stay what it was in every version."""
    manifest = write_folder(tmp_path, {"b": [random_documents(3, seed=1)], "a": [random_documents(2, seed=2)] * 2})
    expected = hashlib.sha256(json.dumps(asdict(manifest), sort_keys=True).encode()).hexdigest()
    assert manifest.hash == read_manifest(tmp_path).hash == expected
