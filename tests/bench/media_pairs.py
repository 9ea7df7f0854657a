"""Writes the records of `tests/bench/recipes/tiny_multimodal.yaml`: pictures with their names, and digits spoken by espeak-ng.

    python tests/bench/media_pairs.py --emoji FOLDER --espeak COMMAND --out runs/media

--emoji: an unpacked npm package such as emoji-datasource-google (`npm pack emoji-datasource-google@16.0.0`); pictures of Noto,
Apache-2.0. --espeak: espeak-ng (Debian: espeak-ng). Animals and food with names of at most two words; twelve variants of three
voices say each digit. Nothing of either is part of this project.
"""

import argparse
import base64
import json
import subprocess
import tempfile
from pathlib import Path

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = ("en-us", "en-gb", "en-029")
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4", "f5", "croak")
CATEGORIES = ("Animals & Nature", "Food & Drink")


def emoji_records(package: Path) -> list[dict[str, list[dict[str, str]]]]:
    """One record a picture, its name after it."""
    found = []
    for entry in json.loads((package / "emoji.json").read_text()):
        name = entry["short_name"].replace("_", " ").replace("-", " ")
        picture = package / "img/google/64" / entry["image"]
        if entry["category"] in CATEGORIES and len(name.split()) <= 2 and picture.exists():
            content = base64.b64encode(picture.read_bytes()).decode()
            found.append({"content": [{"type": "image", "bytes": content}, {"type": "text", "text": f" {name}"}]})
    return found


def digit_records(espeak: str) -> list[dict[str, list[dict[str, str]]]]:
    """One record a voice and digit, the word after it."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "one.wav"
        for voice in VOICES:
            for variant in VARIANTS:
                for word in DIGITS:
                    subprocess.run([espeak, "-v", f"{voice}+{variant}", "-w", file, word], check=True)
                    content = base64.b64encode(file.read_bytes()).decode()
                    parts = [{"type": "audio", "bytes": content}, {"type": "text", "text": f" {word}"}]
                    found.append({"content": parts})
    return found


def main() -> None:
    """Write emoji.jsonl and digits.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True)
    parser.add_argument("--espeak", default="espeak-ng")
    parser.add_argument("--out", type=Path, default=Path("runs/media"))
    parsed = parser.parse_args()
    parsed.out.mkdir(parents=True, exist_ok=True)
    for name, records in (("emoji", emoji_records(parsed.emoji)), ("digits", digit_records(parsed.espeak))):
        (parsed.out / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        print(f"{len(records):,} records in {parsed.out / name}.jsonl")


if __name__ == "__main__":
    main()
