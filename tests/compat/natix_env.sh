#!/bin/sh
# Runs the detector's tests with the miner in the oldest environment that it must work in: Python 3.10,
# torch 2.6, timm 1.0.12, numpy 2.0 and Pillow 10.4, as the subnet's pyproject.toml has them. Not a part of
# `make test`: the first run downloads 3 GB. Run it in the project's folder, in its environment:
#
#   tests/compat/natix_env.sh [PYTHON3.10 [FOLDER]]
#
# FOLDER is where the environment is made and kept (.streetvision/natix-env).
set -eu
python=${1:-python3.10}
folder=${2:-.streetvision/natix-env}

if [ ! -e "$folder/made" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10) and "Python 3.10 is needed")'
    "$python" -m venv --clear "$folder"
    "$folder/bin/python" -m pip install --quiet \
        torch==2.6.0 torchvision==0.21.0 timm==1.0.12 numpy==2.0.2 pillow==10.4.0 pyyaml
    touch "$folder/made"
fi
export MINER_PYTHON="$(cd "$folder" && pwd)/bin/python" OMP_NUM_THREADS=1
python -m pytest -q -n 0 tests/bundle/natix
