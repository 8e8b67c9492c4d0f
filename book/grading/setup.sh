#!/usr/bin/env bash
# Gradescope runs this once, as root, when the zip is uploaded: /autograder/source is the unpacked zip.
# Only a person with an account can try it there: see README.
set -euo pipefail
cd "$(dirname "$0")"
export DEBIAN_FRONTEND=noninteractive

python=python3
python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || python=python3.11  # Ubuntu 22.04
apt-get -qq update
apt-get -qq install -y --no-install-recommends bubblewrap "$python" "$python-venv" > /dev/null
"$python" -m venv python
python/bin/pip install --quiet --no-cache-dir --requirement requirements.txt --constraint constraints.txt
